"""Running an implementation on some inputs, forward and backward."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from oracle import Cotangents, Inputs
from properties.harness.containment import undisturbed
from properties.harness.implementations import Implementation

Results = dict[str, Tensor]

STATE = ("M", "S", "anchor")
# Every tensor that a gradient is asked for; a result named `dq` is the gradient for `q`.
DIFFERENTIABLE = ("q", "k", "v", "w", "b", "theta", "alpha", "eta", *STATE)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the state for inputs of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors(inputs: Inputs) -> Results:
    """Return every tensor of some inputs by name."""
    return {name: x for name in DIFFERENTIABLE if (x := getattr(inputs, name)) is not None}


def run(
    implementation: Implementation,
    inputs: Inputs,
    cotangents: Cotangents | None = None,
    leaves: Results | None = None,
) -> Results:
    """Call an implementation, forward and, given cotangents, backward.

    Parameters
    ----------
    implementation : Implementation
    inputs : Inputs
    cotangents : Cotangents or None
    leaves : dict of Tensor or None
        Pass these tensors, on the right device, instead of those of `inputs`.

    Returns
    -------
    dict of Tensor
        `o`, and `M`, `S`, `anchor`, `offset` where they are claimed; with cotangents, where the backward is claimed,
        also `dq`, ... for every differentiable input that was given.
    """
    cotangents = cotangents if "backward" in implementation.claims else None
    given = (leaves or tensors(inputs)).items()
    leaves = {name: x.detach().to(implementation.device).requires_grad_(cotangents is not None) for name, x in given}
    outputs = call(implementation, inputs, leaves)
    check_form(inputs, outputs)
    results = {name: x.detach() for name, x in outputs.items()}
    if cotangents is not None:
        results |= backward(outputs, leaves, cotangents)
    # Copies: an implementation may use the memory of its results again.
    return {name: x.cpu().clone() for name, x in results.items()}


def call(implementation: Implementation, inputs: Inputs, leaves: Results) -> Results:
    """Call the implementation on these tensors; the rest comes from `inputs`."""
    implementation.require(inputs)
    device = implementation.device
    names = ("q", "k", "v", "w", "b", "theta", "alpha", "eta")
    start = leaves.get("M")
    if inputs.S is not None or inputs.anchor is not None:
        offset = torch.tensor(inputs.offsets, dtype=torch.int64, device=device)
        start = implementation.state(leaves["M"], leaves["S"], leaves.get("anchor", leaves["M"]), offset)
    options: dict[str, Any] = {"log_gates": True} if inputs.log_gates else {}
    if inputs.cu_seqlens is not None:
        options["cu_seqlens"] = torch.tensor(inputs.cu_seqlens, dtype=torch.int32, device=device)
    tensors = (leaves.get(name) for name in names)
    returned = implementation.call(*tensors, inputs.eps, inputs.chunk_size, start, True, **options)
    return parts(implementation, returned)


def parts(implementation: Implementation, returned: Any) -> Results:
    """Return the outputs and the claimed parts of the final state by name."""
    o, final = pair(returned)
    left = {name: getattr(final, name, None) for name in implementation.left}
    found = {name: plain(x) for name, x in left.items() if isinstance(x, Tensor)}
    if missing := left.keys() - found.keys():
        state = "no state" if final is None else f"a state of type {type(final).__name__}"
        raise LawBroken(
            f"an implementation must return (o, state), got {state} without the tensors {', '.join(sorted(missing))}: "
            "one that does not return them lacks final_state, resume or offset"
        )
    return {"o": plain(o)} | found


def plain(x: Tensor) -> Tensor:
    """Return a result as a tensor whose methods are PyTorch's: those of a subclass may show other numbers."""
    if type(x) is Tensor or type(x).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return Tensor.as_subclass(x, Tensor)


def pair(returned: Any) -> tuple[Tensor, Any]:
    """Return outputs and final state."""
    if isinstance(returned, Tensor):
        return returned, None
    if not (isinstance(returned, tuple | list) and len(returned) == 2 and isinstance(returned[0], Tensor)):
        kinds = [type(x).__name__ for x in returned] if isinstance(returned, tuple | list) else type(returned).__name__
        raise LawBroken(f"an implementation must return (o, state), o a tensor, got {kinds}")
    return returned[0], returned[1]


def backward(outputs: Results, leaves: Results, cotangents: Cotangents, retain_graph: bool = False) -> Results:
    """Return the gradients; an output without a cotangent, or with one of zeros, is left out of the backward pass."""
    flowing = [
        (outputs[name], x.to(outputs[name].device))
        for name in ("o", *STATE)
        if name in outputs
        and (x := getattr(cotangents, name)) is not None
        and outputs[name].requires_grad
        and bool((x != 0).any())
    ]
    gradients: Iterable[Tensor | None] = [None] * len(leaves)
    if flowing:
        ends, inflow = zip(*flowing, strict=True)
        with undisturbed():
            gradients = torch.autograd.grad(ends, list(leaves.values()), inflow, retain_graph, allow_unused=True)
    pairs = zip(leaves.items(), gradients, strict=True)
    return {f"d{name}": torch.zeros_like(x) if dx is None else dx.detach() for (name, x), dx in pairs}


def check_form(inputs: Inputs, outputs: Results) -> None:
    """Shapes and dtypes are those of the contract, and the offsets are exactly right."""
    B, T, H, D = inputs.q.shape
    N, dtype = len(inputs.sequences), compute_dtype(inputs.q.dtype)
    ends = [
        (start + end - begin) % inputs.chunk_size
        for start, (_, begin, end) in zip(inputs.offsets, inputs.sequences, strict=True)
    ]
    for name, x in outputs.items():
        expect(f"{name}.layout", x.layout, torch.strided)
        expect(f"{name}.is_meta", x.is_meta, False)
    expect("o", (outputs["o"].shape, outputs["o"].dtype), ((B, T, H, D), inputs.q.dtype))
    for name in (name for name in STATE if name in outputs):
        expect(name, (outputs[name].shape, outputs[name].dtype), ((N, H, D, D), dtype))
    if "offset" in outputs:
        expect("offset", outputs["offset"].tolist(), ends)
        expect("offset.is_floating_point()", outputs["offset"].is_floating_point(), False)


class LawBroken(AssertionError):
    """An implementation breaks a law.

    Parameters
    ----------
    message : str
    found : sequence of Comparison
        The comparisons of the call that failed, up to the one that is wrong.
    """

    def __init__(self, message: str = "", found: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.found = found


def expect(name: str, actual: object, wanted: object) -> None:
    """Raise unless two things are equal."""
    __tracebackhide__ = True
    if actual != wanted:
        raise LawBroken(f"`{name}` must be {wanted}, got {actual}")

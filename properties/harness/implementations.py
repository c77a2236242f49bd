"""Implementations with their claims, and those of this repository."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from oracle import Inputs, bounds
from properties.harness.workarounds import patch_once, sum_in_order
from properties.problems.domain import EVERYWHERE, Domain, OutsideDomain
from properties.problems.shapes import FEW

BACKENDS = ("recurrent", "chunk", "log", "triton")
DEFAULT = "recurrent,chunk,log,triton"
# Statements of law 18, each a claim of its own.
SAME_BITS = frozenset({"batch_invariant", "prefix_bits", "padding_bits", "resume_bits", "none_bits", "decode_bits"})
# Everything an implementation can claim.
CLAIMS = frozenset(
    {
        "plain",
        "normalised",
        "varlen",
        "initial_state",
        "final_state",
        "resume",
        "offset",
        "step",
        "log_gates",
        "backward",
    }
    | {"half", "bfloat16", "float64", "exact", "large", "threads"}
    | SAME_BITS
)


# Of the dtype of q, D and the chunk length.
Grid = Callable[[torch.dtype, int, int], int]


def whole_chunks(dtype: torch.dtype, D: int, C: int) -> int:
    """Return the grid of an implementation that starts afresh with every chunk."""
    return C


def always(dtype: torch.dtype, D: int, C: int) -> bool:
    """Return that a step has the bits of one call for every dtype, width and chunk length."""
    return True


def every_token(dtype: torch.dtype, D: int, C: int) -> int:
    """Return the grid of an implementation that starts afresh with every token."""
    return 1


@dataclass(frozen=True, repr=False)
class Implementation:
    """Something to verify.

    Parameters
    ----------
    name : str
    call, step : callable
        With the signatures of `titans.chunk_titans_linear` and `titans.titans_linear_step`.
    state : callable
        Makes an initial state, as `call` accepts it, of M, S, anchor and offset.
    claims : frozenset of str
        Which of `CLAIMS` it has.
    device : str
    arithmetic : callable
        Of a call, an `Inputs`: the error model of its arithmetic there, from which the bounds follow.
    share : float
        Of the profile's number of examples: slow ones get fewer.
    domain : Domain
        Where it is defined: nothing outside is ever called.
    grid : callable
        At multiples of how many tokens it resumes with the bits of one call: see `titans.grid`.
    decodes_alike : callable
        For which dtype, width and chunk length `step` gives the bits of one call: see `titans.decodes_alike`.
    decoding, decoded : callable
        Makes of a final state of `call`, and of the dtype of tokens, the state that `step` continues with the bits of
        one call; and of such a state a final one.
    """

    name: str
    call: Callable[..., Any]
    step: Callable[..., Any] | None
    state: Callable[..., Any]
    claims: frozenset[str]
    device: str = "cpu"
    arithmetic: Callable[[Inputs], bounds.ErrorModel] = lambda inputs: bounds.arithmetic_for(inputs.q.dtype)
    share: float = 1.0
    domain: Domain = EVERYWHERE
    grid: Grid = whole_chunks
    decodes_alike: Callable[[torch.dtype, int, int], bool] = always
    decoding: Callable[[Any, torch.dtype], Any] = lambda state, dtype: state
    decoded: Callable[[Any], Any] = lambda state: state

    @property
    def left(self) -> tuple[str, ...]:
        """The parts of a final state that it answers for, by its claims."""
        names = {"final_state": ("M",), "resume": ("S",), "offset": ("anchor", "offset")}
        return tuple(name for claim, of in names.items() if claim in self.claims for name in of)

    def require(self, inputs: Inputs) -> None:
        """Raise OutsideDomain unless a call is inside its domain: no other is made."""
        if objection := self.domain.objection(inputs):
            raise OutsideDomain(objection)

    def __repr__(self) -> str:
        """Show the name alone in reports."""
        return self.name

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the same in Hypothesis's report."""
        printer.text(self.name)


def share_of(backend: str, device: str) -> float:
    """Return how many of a profile's examples a backend gets.

    Triton's interpreter is slow. On a GPU the PyTorch backends compute as on a CPU, the token loop slowly.
    """
    if device == "cuda":
        return {"recurrent": 0.25, "chunk": 0.6, "log": 0.6}.get(backend, 1.0)
    return 0.12 if backend == "triton" else 1.0


def implementation(backend: str, device: str) -> Implementation:
    """Return one backend of `titans` on one device."""
    import titans

    if backend not in BACKENDS:
        raise ValueError(f"a backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    # A library's products may depend on the shape, and shapes on the other tokens and sequences of a call.
    shaped = SAME_BITS - {"none_bits"}
    lacks = {
        # Its products have the shape of one token of all sequences, always.
        "recurrent": {"batch_invariant"},
        "chunk": shaped,
        # The exponential of a sum of logs is not the exact product.
        "log": shaped | {"exact"},
        # Its interpreter takes bfloat16 for something else, and its time, and has one grid for all threads.
        "triton": {"float64"} | (set() if device == "cuda" else {"bfloat16", "large", "threads"}),
    }
    # A state of the definition is enough for the definition.
    carries: dict[str, Any] = {"decoding": titans.DecodeState.begin, "decoded": functools.partial(_settled, backend)}
    grids: dict[str, Grid] = {"triton": titans.grid, "recurrent": every_token}
    if (backend, device) == ("triton", "cpu"):
        patch_once()
        sum_in_order()
    call: Callable[..., Any] = titans.chunk_titans_linear
    step: Callable[..., Any] = titans.titans_linear_step
    return Implementation(
        name=backend,
        call=functools.partial(call, backend=backend),
        step=functools.partial(step, backend=backend),
        state=titans.TitansState,
        claims=CLAIMS - lacks[backend],
        device=device,
        arithmetic=functools.partial(arithmetic, backend, device),
        share=share_of(backend, device),
        domain=Domain(few_shapes=FEW if (backend, device) == ("triton", "cuda") else None),
        grid=grids.get(backend, whole_chunks),
        # Compiled, it orders some sums of a token otherwise.
        decodes_alike=titans.decodes_alike if (backend, device) == ("triton", "cuda") else always,
        **(carries if backend == "triton" else {}),
    )


def _settled(backend: str, state: Any) -> Any:
    return state.state(backend=backend)


def arithmetic(backend: str, device: str, inputs: Inputs) -> bounds.ErrorModel:
    """Return the error model of a backend in a call."""
    if backend == "triton":
        return bounds.kernel_arithmetic(inputs.q.dtype, inputs.q.shape[-1], tensor_cores=device == "cuda")
    return bounds.arithmetic_for(inputs.q.dtype, log_space=backend == "log")


def chosen(device: str, inputs: Inputs) -> bounds.ErrorModel:
    """Return the error model of a call for which `titans` chooses the backend."""
    kernels = device == "cuda" and inputs.q.dtype != torch.float64 and inputs.q.shape[-1] <= 128
    backend = "triton" if kernels else "log" if inputs.log_gates else "chunk"
    return arithmetic(backend, device, inputs)


def devices() -> str:
    """Name the devices there are."""
    if not torch.cuda.is_available():
        return "cpu only"
    count = torch.cuda.device_count()
    return f"{count} x {torch.cuda.get_device_name()}" if count > 1 else torch.cuda.get_device_name()

"""The implementations of this repository, with what they claim, and anybody else's."""

import functools
import importlib
import warnings
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from properties.checks import CLAIMS, Implementation

BACKENDS = ("recurrent", "chunk", "log", "triton")
DEFAULT = "recurrent,chunk,log,triton"
# What nobody has who has not the other.
IMPLIED = {
    "resume": {"initial_state", "final_state"},
    "offset": {"resume"},
    "step": {"offset"},
    "bfloat16": {"half"},
}
# What may be declared lacking; the rest of `CLAIMS` follows.
OPTIONAL = CLAIMS - {"step", "batch_invariant"}


def patch_once() -> None:
    """Let Triton's interpreter patch `triton.language` once in a launch, not in every call of a helper.

    Every call looks through all that the language has: that takes 2/5 of the time of these kernels.
    """
    from triton.runtime import interpreter

    function, patched = interpreter.InterpretedFunction, set[int]()
    if function.__call__.__module__ == __name__:
        return
    launch = function.run

    def run(self: Any, *arguments: Any, **options: Any) -> None:
        patched.clear()
        launch(self, *arguments, **options)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        # What is patched are the modules of the language that the helper's own module knows.
        if (module := id(self.fn.__globals__)) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*arguments, **options)

    function.run, function.__call__ = run, call


def share_of(backend: str, device: str) -> float:
    """Return how many of a profile's examples a backend gets: Triton's interpreter is slow."""
    return 0.15 if (backend, device) == ("triton", "cpu") else 1.0


def implementation(backend: str, device: str) -> Implementation:
    """Return one backend of `titans` on one device."""
    import titans

    if backend not in BACKENDS:
        raise ValueError(f"a backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    lacks = {
        "recurrent": {"batch_invariant"},
        "chunk": {"batch_invariant"},
        # The exponential of a sum of logs is not the exact product.
        "log": {"batch_invariant", "exact"},
        # Its interpreter takes bfloat16 for something else, and its time.
        "triton": {"float64"} | (set() if device == "cuda" else {"bfloat16", "large"}),
    }
    if (backend, device) == ("triton", "cpu"):
        patch_once()
    call, step = titans.chunk_titans_linear, titans.titans_linear_step
    return Implementation(
        name=backend,
        call=functools.partial(call, backend=backend),
        step=functools.partial(step, backend=backend),
        state=titans.TitansState,
        claims=CLAIMS - lacks[backend],
        device=device,
        log_space=backend == "log",
        blocks=backend == "triton",
        tensor_cores=(backend, device) == ("triton", "cuda"),
        share=share_of(backend, device),
    )


class State(NamedTuple):
    """What an implementation is given to resume from, unless it names a type of its own."""

    M: Tensor
    S: Tensor
    anchor: Tensor
    offset: Tensor


def foreign(target: str, device: str, lacks: Collection[str] | None = None) -> Implementation:
    """Return any callable with the signature of `titans.chunk_titans_linear` as an implementation.

    Parameters
    ----------
    target : str
        `package.module:callable`. Attributes of the callable say the rest: `lacks`, an iterable of claims; `state`,
        which makes its initial state of M, S, anchor and offset (`State`); `step`, with the signature of
        `titans.titans_linear_step`; `log_space`, whether it keeps coefficients in logs.
    device : str
    lacks : collection of str or None
        Instead of the callable's own `lacks`.

    Returns
    -------
    Implementation

    Raises
    ------
    ValueError
        If there is no such callable, or no such claim.
    """
    function = load(target)
    lacking = set(getattr(function, "lacks", ()) if lacks is None else lacks)
    if unknown := lacking - OPTIONAL:
        raise ValueError(
            f"what is lacking must be among {', '.join(sorted(OPTIONAL))}, got {', '.join(sorted(unknown))}"
        )
    log_space, step = getattr(function, "log_space", False), getattr(function, "step", None)
    lacking |= {"batch_invariant"} | ({"exact"} if log_space else set()) | (set() if step else {"step"})
    for claim, without in IMPLIED.items():
        lacking |= {claim} if without & lacking else set()
    return Implementation(
        name=target,
        call=functools.partial(adapted, function, frozenset(lacking)),
        step=step,
        state=getattr(function, "state", State),
        claims=CLAIMS - lacking,
        device=device,
        log_space=log_space,
    )


def load(target: str) -> Callable[..., Any]:
    """Import `package.module:callable`, or raise ValueError."""
    module, _, name = target.partition(":")
    if not (module and name):
        raise ValueError(f"an implementation must be named as package.module:callable, got {target!r}")
    try:
        with warnings.catch_warnings():
            # What others warn of while they are imported is not a verdict on them.
            warnings.simplefilter("ignore")
            function: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as error:
        raise ValueError(f"{target!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"{target!r} must be callable, got {type(function).__name__}")
    return function  # type: ignore[no-any-return]


def adapted(function: Callable[..., Any], lacking: frozenset[str], *arguments: Any, **options: Any) -> Any:
    """Call an implementation without the parameters that it lacks; its final state may take any of its forms."""
    named = dict(zip(("eps", "chunk_size", "initial_state", "output_final_state"), arguments[8:], strict=True))
    for parameter, claim in (("initial_state", "initial_state"), ("output_final_state", "final_state")):
        if claim in lacking:
            del named[parameter]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = function(*arguments[:8], **named, **options)
    o, final = result if isinstance(result, (tuple, list)) else (result, None)
    return o, final_state(final)


def final_state(final: Any) -> Any:
    """Return a final state by its names.

    M alone means what it means as an initial state: no momentum, at the start of a chunk.
    """
    if isinstance(final, Tensor):
        return State(final, torch.zeros_like(final), final, torch.zeros(len(final), dtype=torch.int64))
    return State(*final) if isinstance(final, (tuple, list)) and not hasattr(final, "anchor") else final


def devices() -> str:
    """Name the devices there are."""
    if not torch.cuda.is_available():
        return "cpu only"
    count = torch.cuda.device_count()
    return f"{count} x {torch.cuda.get_device_name()}" if count > 1 else torch.cuda.get_device_name()

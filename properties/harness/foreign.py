"""Anybody else's implementation: any callable with the signature of `titans.chunk_titans_linear`."""

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oracle import Inputs, bounds
from properties.harness.containment import undisturbed
from properties.harness.implementations import CLAIMS, SAME_BITS, Implementation, chosen, whole_chunks
from properties.harness.running import LawBroken, pair
from properties.problems.domain import EVERYWHERE, Domain
from properties.problems.shapes import FEW

# Claims, each with those that it needs.
IMPLIED = {
    "resume": {"initial_state", "final_state"},
    "offset": {"resume"},
    "step": {"offset"},
    "bfloat16": {"half"},
    "resume_bits": {"resume"},
    "padding_bits": {"backward"},
    "none_bits": {"initial_state"},
    "decode_bits": {"step"},
}
# The claims that may be declared missing; the rest of `CLAIMS` follows.
OPTIONAL = CLAIMS - SAME_BITS - {"step"}


class State(NamedTuple):
    """An initial state for an implementation without a type of its own."""

    M: Tensor
    S: Tensor
    anchor: Tensor
    offset: Tensor


def foreign(
    target: str,
    device: str,
    lacks: Collection[str] | None = None,
    domain: str | None = None,
    operands: str | None = None,
    claims: Collection[str] | None = None,
) -> Implementation:
    """Return any callable with the signature of `titans.chunk_titans_linear` as an implementation.

    Parameters
    ----------
    target : str
        `package.module:callable`. Attributes of the callable say the rest: `lacks`, an iterable of claims; `state`,
        which makes its initial state of M, S, anchor and offset (without it, the type of its final state does); `step`,
        with the signature of `titans.titans_linear_step`; `log_space`, whether it keeps coefficients in logs: True,
        False, or a function of the call, an `oracle.Inputs`; `domain`, a `Domain` or its text; `operands`, "inputs" if
        it rounds the operands of products to the dtype of q; `claims`, an iterable of the claims of law 18 that it
        makes; `grid`, with the signature of `titans.grid`.
    device : str
    lacks, domain, operands, claims : collection of str, str, str, collection of str, or None
        Instead of the callable's own.

    Returns
    -------
    Implementation

    Raises
    ------
    ValueError
        If there is no such callable, claim, domain or arithmetic, or if the domain lacks the device.
    """
    import titans

    function = load(target)
    lacking = claims_of(function, "lacks") if lacks is None else set(lacks)
    if unknown := lacking - OPTIONAL:
        raise ValueError(
            f"missing claims must be among {', '.join(sorted(OPTIONAL))}, got {', '.join(sorted(unknown))}"
        )
    more = claims_of(function, "claims") if claims is None else set(claims)
    if unknown := more - SAME_BITS:
        raise ValueError(f"claims must be among {', '.join(sorted(SAME_BITS))}, got {', '.join(sorted(unknown))}")
    region, narrow = where(function, device, domain), has_operands_of_inputs(function, operands)
    lacking |= region.lacks
    log_space, step = getattr(function, "log_space", False), function_of(function, "step")
    # A function of the call may keep `exact`: numbers fit where gates are linear.
    lacking |= (SAME_BITS - more) | ({"exact"} if log_space is True else set()) | (set() if step else {"step"})
    for claim, without in IMPLIED.items():
        lacking |= {claim} if without & lacking else set()
    own, adapter = function is titans.chunk_titans_linear, Adapter(function, frozenset(lacking), region)
    return Implementation(
        name=target,
        call=adapter,
        step=adapter.step if step else None,
        state=State,
        claims=CLAIMS - lacking,
        device=device,
        arithmetic=functools.partial(chosen, device) if own else functools.partial(declared, log_space, narrow),
        domain=region,
        grid=function_of(function, "grid") or whole_chunks,
    )


def claims_of(function: Callable[..., Any], name: str) -> set[str]:
    """Return the claims in an attribute of a callable, or raise ValueError."""
    given = getattr(function, name, ())
    if isinstance(given, str) or not isinstance(given, Iterable) or not all(isinstance(x, str) for x in given):
        raise ValueError(f"`{name}` of a callable must be an iterable of claims, got {given!r}")
    return set(given)


def where(function: Callable[..., Any], device: str, domain: str | None) -> Domain:
    """Return the domain that a callable has, or that is said instead of it; it must have the device.

    On a GPU it gets few shapes, since it may compile a kernel for each.
    """
    given = getattr(function, "domain", EVERYWHERE) if domain is None else domain
    if not isinstance(given, Domain | str):
        raise ValueError(f"`domain` of a callable must be a Domain or its text, got {given!r}")
    region = given if isinstance(given, Domain) else Domain.parse(given)
    if region.device and device not in region.device:
        raise ValueError(f"a device must be in the domain {region}, got {device}")
    return replace(region, few_shapes=FEW) if device == "cuda" else region


def has_operands_of_inputs(function: Callable[..., Any], operands: str | None) -> bool:
    """Whether a callable says that it rounds operands of products to the dtype of q, or someone says so."""
    given = getattr(function, "operands", "") if operands is None else operands
    if given not in ("", "inputs"):
        raise ValueError(f"operands must be inputs, or nothing, got {given!r}")
    return bool(given)


def declared(log_space: bool | Callable[[Inputs], bool], operands_of_inputs: bool, inputs: Inputs) -> bounds.ErrorModel:
    """Return the arithmetic of a call in which a callable says that it keeps coefficients as logs, or not."""
    dtype, logs = inputs.q.dtype, log_space(inputs) if callable(log_space) else log_space
    if operands_of_inputs and dtype.itemsize == 2:
        # The arithmetic of tensor cores, without the blocks of several chunks of this repository's kernels.
        cores = bounds.kernel_arithmetic(dtype, inputs.q.shape[-1], tensor_cores=True)
        narrow = torch.finfo(dtype)
        # float16 has a smaller range than the format of the cores: an operand may underflow or overflow.
        tiny, huge = max(cores.operand_tiny, narrow.tiny * narrow.eps), min(cores.huge, narrow.max)
        return replace(cores, block=0, log_space=logs, operand_tiny=tiny, huge=huge)
    return bounds.arithmetic_for(dtype, log_space=logs)


def load(target: str) -> Callable[..., Any]:
    """Import `package.module:callable`, or raise ValueError."""
    module, _, name = target.partition(":")
    if not (module and name):
        raise ValueError(f"an implementation must be named as package.module:callable, got {target!r}")
    try:
        with undisturbed():
            # Warnings of others at their import are no verdict on them.
            warnings.simplefilter("ignore")
            function: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as error:
        hint = f"; add its folder: PYTHONPATH={os.getcwd()}" if isinstance(error, ModuleNotFoundError) else ""
        raise ValueError(f"{target!r} cannot be imported: {type(error).__name__}: {error}{hint}") from error
    if isinstance(function, type):
        raise ValueError(f"{target!r} must be a function or an instance, got the class {function.__name__}")
    if not callable(function):
        raise ValueError(f"{target!r} must be callable, got {type(function).__name__}")
    return function  # type: ignore[no-any-return]


def function_of(owner: Any, name: str) -> Callable[..., Any] | None:
    """Return a callable attribute, if there is one: a module may have a buffer of this name."""
    found = getattr(owner, name, None)
    return found if callable(found) else None


class Adapter:
    """A foreign callable, called without the parameters that it lacks and with states of the type that it returns.

    Parameters
    ----------
    function : callable
    lacking : frozenset of str
        Claims.
    domain : Domain
    """

    def __init__(self, function: Callable[..., Any], lacking: frozenset[str], domain: Domain = EVERYWHERE) -> None:
        self.function, self.lacking, self.domain = function, lacking, domain
        self.state: Callable[..., Any] | None = function_of(function, "state")
        if "final_state" in lacking:
            self.state = self.state or State

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call it; its final state may take any of its forms."""
        *tensors, eps, chunk_size, state, wanted = arguments
        named = {"eps": eps, "chunk_size": chunk_size}
        if "initial_state" not in self.lacking:
            named["initial_state"] = self.initial(state, *tensors, **named, **options)
        if "final_state" not in self.lacking:
            named["output_final_state"] = wanted
        o, final = self.results(*tensors, **named, **options)
        return o, final_state(final)

    def initial(self, state: Any, *tensors: Any, **options: Any) -> Any:
        """Return an initial state in the form that the callable takes: one that it returns, if it has names."""
        if not isinstance(state, State):
            return state
        if self.state is None:
            _, final = self.results(*tensors, **options, initial_state=None, output_final_state=True)
            kind: Callable[..., Any] = type(final) if hasattr(final, "anchor") else State
            self.state = lambda *parts: kind(**State(*parts)._asdict())
        return self.state(*state)

    def step(self, *arguments: Any, **options: Any) -> Any:
        """Call its step, of one token, with states of the same type."""
        *tensors, state, eps, chunk_size = arguments
        # As many tokens as the callable itself takes, to see the type of its state.
        T = self.domain.T.nearest(1, chunk_size)
        rows = [x if i in (3, 4) else x[:, None].expand(-1, T, *x.shape[1:]) for i, x in enumerate(tensors)]
        state = self.initial(state, *rows, eps=eps, chunk_size=chunk_size, **options)
        o, final = pair(self.function.step(*tensors, state, eps, chunk_size, **options))  # type: ignore[attr-defined]
        return o, final_state(final)

    def results(self, *tensors: Any, **options: Any) -> tuple[Tensor, Any]:
        """Return outputs and final state."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pair(self.function(*tensors, **options))


def final_state(final: Any) -> Any:
    """Return a final state by its names.

    M alone is, as in an initial state, without momentum and at the start of a chunk.
    """
    if isinstance(final, Tensor):
        return State(final, torch.zeros_like(final), final, torch.zeros(len(final), dtype=torch.int64))
    if not isinstance(final, (tuple, list)) or hasattr(final, "anchor"):
        return final
    if len(final) != len(State._fields):
        raise LawBroken(f"a final state must be M, S, anchor and offset, got {len(final)} things")
    return State(*final)

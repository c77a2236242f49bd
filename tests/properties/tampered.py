"""An implementation whose results are right, except for one element of one result."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oracle import Cotangents, Inputs, bounds
from properties.harness.implementations import Implementation
from properties.harness.running import DIFFERENTIABLE, STATE

ARGUMENTS = ("q", "k", "v", "w", "b", "theta", "alpha", "eta")


@dataclass
class Tampered:
    """Calls an implementation, and changes the first element of one result.

    Parameters
    ----------
    of : Implementation
    result : str
        Such as `o` or `dq`.
    radii : float
        By how many radii; NaN: it becomes NaN.
    call : int or None
        The call, counted from 0; None: every call.
    """

    of: Implementation
    result: str
    radii: float
    call: int | None = None
    calls: int = 0

    def implementation(self) -> Implementation:
        """Return it as an implementation."""
        return replace(self.of, call=self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the implementation."""
        self.calls += 1
        if self.call not in (None, self.calls - 1):
            return self.of.call(*arguments, **options)
        *tensors, eps, C, start, wanted = arguments
        state = {"M": start} if isinstance(start, Tensor) else {} if start is None else start._asdict()
        given = dict(zip(ARGUMENTS, tensors, strict=True)) | {name: state.get(name) for name in STATE}
        inputs = recovered(given, state.get("offset"), eps, C, options)
        arithmetic, flowing = self.of.arithmetic(inputs), dict[str, Tensor]()

        def change(x: Tensor) -> Tensor:
            if torch.isnan(torch.tensor(self.radii)):
                return spoiled(x, torch.nan)
            gradient = self.result.startswith("d")
            radius: Any = bounds.forward_radius(inputs, arithmetic)
            if gradient:
                cotangents = Cotangents(**{"o": torch.zeros_like(inputs.q)} | flowing)
                _, radius = bounds.gradient_radius(inputs, cotangents, arithmetic)
            one = np.asarray(getattr(radius, self.result.removeprefix("d") if gradient else self.result)).flat[0]
            # A radius of 0 is that of an exact result.
            return spoiled(x, float(x.detach().flatten()[0]) + max(self.radii * one, torch.finfo(x.dtype).tiny))

        leaf = self.result.removeprefix("d")
        if leaf in DIFFERENTIABLE and self.result != leaf and given[leaf] is not None:
            given[leaf] = tapped(given[leaf], change)
        if isinstance(start, Tensor):
            start = given["M"]
        elif start is not None:
            start = self.of.state(*(given[name] for name in STATE), state["offset"])
        o, final = self.of.call(*(given[name] for name in ARGUMENTS), eps, C, start, wanted, **options)
        outputs = {"o": o} | ({name: getattr(final, name) for name in STATE} if final is not None else {})
        if self.result in outputs:
            outputs[self.result] = replaced(outputs[self.result], change)
        outputs = {name: tapped(x, keep(flowing, name)) for name, x in outputs.items()}
        o = outputs.pop("o")
        return o, self.of.state(*outputs.values(), final.offset) if final is not None else None


def keep(kept: dict[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """Return a function that keeps a cotangent as it flows by."""

    def through(x: Tensor) -> Tensor:
        kept[name] = x
        return x

    return through


def tapped(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a tensor that is the same, but for a change of its gradient."""
    if x.requires_grad:
        x = x.view_as(x)
        x.register_hook(change)
    return x


def spoiled(x: Tensor, value: float) -> Tensor:
    """Return a copy with another first element; it is a different one in any format."""
    x = x.detach().clone()
    first = x.view(-1)[:1] if x.is_contiguous() else x[(0,) * x.ndim].view(1)
    new = torch.full_like(first, value)
    first.copy_(torch.where(new == first, torch.nextafter(first, torch.full_like(first, torch.inf)), new))
    return x


def recovered(given: dict[str, Any], offset: Tensor | None, eps: float, C: int, options: dict[str, Any]) -> Inputs:
    """Return the inputs of a call from its arguments."""
    cu_seqlens = options.get("cu_seqlens")
    tensors = {name: None if x is None else x.detach() for name, x in given.items()}
    for name in ("theta", "alpha", "eta"):
        tensors[name] = tensors[name].squeeze(-1) if tensors[name].ndim == 4 else tensors[name]
    return Inputs(
        **tensors,
        eps=eps,
        chunk_size=C,
        offset=None if offset is None else tuple(offset.tolist()),
        cu_seqlens=None if cu_seqlens is None else tuple(cu_seqlens.tolist()),
        log_gates=bool(options.get("log_gates")),
    )


def replaced(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a tensor that is changed, with the gradient of one that is not."""
    changed = change(x)
    return changed if not x.requires_grad else Replaced.apply(x, changed)  # type: ignore[no-any-return]


class Replaced(torch.autograd.Function):
    """One tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, changed: Tensor) -> Tensor:
        """Return the second."""
        return changed.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        """Pass the cotangent on to the first."""
        return cotangents[0], None

"""The operators under `torch.func`: what `vmap` maps over becomes heads, and whether forward mode is on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

# The axis of the heads in each argument and result of an operator; a cotangent has that of its tensor.
_AXES = {
    **dict.fromkeys(("q", "k", "v", "o", "theta", "alpha", "eta", "x", "r"), 2),
    **dict.fromkeys(("M", "S", "anchor", "M0", "S0"), 1),
    **dict.fromkeys(("w", "b"), 0),
}  # fmt: skip
# Entries of a token in all heads: every backend takes as many.
_WIDEST = 2**25 - 1

Mapped = tuple[tuple[Tensor, ...], tuple[int | None, ...]]


def in_forward_mode() -> bool:
    """Whether derivatives are carried forward, by a dual level or by a transform of any level."""
    if forward_ad._current_level >= 0:
        return True
    return any(one.key() == TransformType.Jvp for one in get_interpreter_stack() or ())


def over_heads(operator: Any) -> Callable[..., Mapped]:
    """Return the rule of an operator for `vmap`: heads are independent, so V calls are one call with V times the heads.

    Offsets and bounds of sequences belong to all heads: where they are mapped over, the operator is called V times.
    """
    takes = [argument.name for argument in operator._schema.arguments]
    returns = [result.name for result in operator._schema.returns]

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Mapped:
        V, dims = info.batch_size, dict(zip(takes, in_dims, strict=True))
        given = dict(zip(takes, arguments, strict=True))
        q = given["q"] if dims["q"] is None else given["q"].select(dims["q"], 0)
        if dims["offset"] is None and dims["cu_seqlens"] is None and V * q.shape[-2:].numel() <= _WIDEST:
            return _unfold(operator(*(_fold(x, dims[name], name, V) for name, x in given.items())), returns, V)
        calls = [operator(*(_of_one(x, dims[name], i) for name, x in given.items())) for i in range(V)]
        return tuple(torch.stack(results) for results in zip(*calls, strict=True)), (0,) * len(returns)

    return rule


def _axis(name: str) -> int | None:
    return _AXES.get(name, _AXES.get(name.removeprefix("d")))


def _of_one(x: Any, dim: int | None, i: int) -> Any:
    return x if dim is None else x.select(dim, i)


def _fold(x: Any, dim: int | None, name: str, V: int) -> Any:
    """(..., H, ...) for each of V, along `dim` or the same for all: (..., V H, ...)."""
    axis = _axis(name)
    if axis is None or not isinstance(x, Tensor) or x.ndim - (dim is not None) <= axis:
        return _of_one(x, dim, 0)
    if dim is not None:
        return x.movedim(dim, axis).flatten(axis, axis + 1)
    sizes = (*x.shape[:axis], V, *x.shape[axis:])
    return x.unsqueeze(axis).expand(sizes).flatten(axis, axis + 1)


def _unfold(results: tuple[Tensor, ...], names: list[str], V: int) -> Mapped:
    """The inverse of `_fold`, with the axis of the V in each result: None where there is none."""
    parts: list[Tensor] = []
    axes: list[int | None] = []
    for x, axis in zip(results, map(_axis, names), strict=True):
        # a residual that the backend does not have is an empty vector
        there = axis is not None and x.ndim > axis
        axes.append(axis if there else None)
        if axis is not None and there:
            x = x.reshape(*x.shape[:axis], V, x.shape[axis] // max(V, 1), *x.shape[axis + 1 :])
        parts.append(x)
    return tuple(parts), tuple(axes)

"""Checks of the arguments, done before any work: every message gives the argument, the rule and the value."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from titans.arguments import TitansState, compute_dtype
from titans.backend import BACKENDS

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def name_of(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, x: Any, shape: tuple[int, ...], axes: str, device: torch.device) -> None:
    """`x` must be a tensor of a supported dtype with the given shape on the given device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"`{name}` must have dtype float32, float16, bfloat16 or float64, got {name_of(x.dtype)}")
    if tuple(x.shape) != shape:
        raise ValueError(f"`{name}` must have shape {axes} = {shape}, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"`{name}` must be on the device of `q`, {device}, got {x.device}")


def check_tokens(q: Any, k: Any, v: Any, axes: str, suffix: str = "") -> None:
    """q, k and v, whose names end in `suffix`, must be tensors of one shape, dtype and device."""
    rank = len(axes.split(","))
    first = f"`q{suffix}`"
    if not isinstance(q, Tensor):
        raise TypeError(f"{first} must be a torch.Tensor, got {type(q).__name__}")
    if q.ndim != rank:
        raise ValueError(f"{first} must have shape {axes}, got {tuple(q.shape)}")
    if q.shape[-1] == 0:
        raise ValueError(f"{first} must have D >= 1 in its shape {axes}, got {tuple(q.shape)}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name + suffix, x, tuple(q.shape), axes, q.device)
        if x.dtype != q.dtype:
            raise TypeError(
                f"`{name}{suffix}` must have the dtype of {first}, {name_of(q.dtype)}, got {name_of(x.dtype)}"
            )


def check_parameters(w: Any, b: Any, q: Tensor) -> None:
    """w and b must both be None, or both be (H, D)."""
    if (w is None) != (b is None):
        raise ValueError(f"`w` and `b` must both be given or both be None, got w={_kind(w)} and b={_kind(b)}")
    if w is not None:
        shape = tuple(q.shape[-2:])
        check_tensor("w", w, shape, "(H, D)", q.device)
        check_tensor("b", b, shape, "(H, D)", q.device)


def _kind(x: Any) -> str:
    return "None" if x is None else type(x).__name__


def check_gate(name: str, gate: Any, q: Tensor, axes: str) -> Tensor:
    """`gate` must have the shape of q without D, with or without a last axis of 1, which is dropped."""
    shape = tuple(q.shape[:-1])
    if isinstance(gate, Tensor) and gate.ndim == q.ndim and tuple(gate.shape) == (*shape, 1):
        gate = gate.squeeze(-1)  # a view backward, too
    check_tensor(name, gate, shape, axes, q.device)
    assert isinstance(gate, Tensor)
    return gate


def check_options(eps: Any, chunk_size: Any, backend: Any, **flags: Any) -> None:
    """eps, chunk_size, backend and the boolean flags."""
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"`eps` must be a float, got {type(eps).__name__}")
    if not (0 < eps < math.inf):
        raise ValueError(f"`eps` must be positive and finite, got {eps}")
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"`chunk_size` must be an int, got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"`backend` must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"`{name}` must be a bool, got {type(flag).__name__}")


def check_cu_seqlens(cu_seqlens: Any, q: Tensor) -> None:
    """`cu_seqlens` must be (N + 1,) integers with B = 1; values are checked on the CPU, where that is free."""
    if cu_seqlens is None:
        return
    check_integers("cu_seqlens", cu_seqlens)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"`cu_seqlens` must have shape (N + 1,), got {tuple(cu_seqlens.shape)}")
    if q.shape[0] != 1:
        raise ValueError(f"`cu_seqlens` needs B = 1 in `q`, got B = {q.shape[0]}")
    if cu_seqlens.device != q.device and cu_seqlens.device.type != "cpu":
        raise ValueError(f"`cu_seqlens` must be on the device of `q`, {q.device}, or the CPU, got {cu_seqlens.device}")
    if is_readable(cu_seqlens):
        T, values = q.shape[1], cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != T:
            raise ValueError(f"`cu_seqlens` must run from 0 to T = {T}, got {values[0]} to {values[-1]}")
        if any(i > j for i, j in pairwise(values)):
            raise ValueError(f"`cu_seqlens` must not decrease, got {values}")


def check_integers(name: str, x: Any) -> None:
    """`x` must be a tensor of int32 or int64."""
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`{name}` must have dtype int32 or int64, got {name_of(x.dtype)}")


def is_readable(x: Tensor) -> bool:
    """Whether reading values costs no synchronisation and breaks no graph."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_state(argument: str, state: Any, N: int, q: Tensor, chunk_size: int) -> None:
    """The state passed as `argument` must be None, a TitansState or M alone, for N sequences."""
    if state is None:
        return
    H, D = q.shape[-2:]
    shape, axes = (N, H, D, D), "(N, H, D, D)"
    if isinstance(state, Tensor):
        check_tensor(argument, state, shape, axes, q.device)
        return
    if not isinstance(state, TitansState):
        raise TypeError(f"`{argument}` must be None, a TitansState or a torch.Tensor, got {type(state).__name__}")
    dtype = compute_dtype(q.dtype)
    for name, x in (("M", state.M), ("S", state.S), ("anchor", state.anchor)):
        check_tensor(f"{argument}.{name}", x, shape, axes, q.device)
        if x.dtype != dtype:
            raise TypeError(f"`{argument}.{name}` must have dtype {name_of(dtype)}, got {name_of(x.dtype)}")
    check_integers(f"{argument}.offset", state.offset)
    if tuple(state.offset.shape) != (N,):
        raise ValueError(f"`{argument}.offset` must have shape (N,) = ({N},), got {tuple(state.offset.shape)}")
    if state.offset.device != q.device:
        raise ValueError(f"`{argument}.offset` must be on the device of `q`, {q.device}, got {state.offset.device}")
    if is_readable(state.offset) and not all(0 <= r < chunk_size for r in state.offset.tolist()):
        raise ValueError(
            f"`{argument}.offset` must satisfy 0 <= offset < chunk_size = {chunk_size}, got {state.offset.tolist()}"
        )

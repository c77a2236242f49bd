"""Checks of the arguments, done before any work: every message gives the argument, the rule and the value."""

from __future__ import annotations

import math
import operator
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from titans.arguments import Call, compute_dtype
from titans.backend import BACKENDS

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def name_of(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def check_dense(name: str, x: Any) -> None:
    """`x` must be a tensor with strides."""
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor" if x.is_nested else f"the layout {str(x.layout).removeprefix('torch.')}"
        raise TypeError(f"`{name}` must be a dense (strided) tensor, got {kind}")


def check_numbers(name: str, x: Any) -> None:
    """`x` must be a dense tensor of a supported dtype."""
    check_dense(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"`{name}` must have dtype float32, float16, bfloat16 or float64, got {name_of(x.dtype)}")


def check_tensor(name: str, x: Any, shape: tuple[int, ...], axes: str, device: torch.device) -> None:
    """`x` must be a dense tensor of a supported dtype with the given shape on the given device."""
    check_numbers(name, x)
    if x.shape != shape:
        raise ValueError(f"`{name}` must have shape {axes} = {tuple(shape)}, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"`{name}` must be on the device of `q`, {device}, got {x.device}")


def check_tokens(q: Any, k: Any, v: Any, axes: str, suffix: str = "") -> None:
    """q, k and v, whose names end in `suffix`, must be tensors of one shape, dtype and device."""
    rank = len(axes.split(","))
    first = f"`q{suffix}`"
    check_dense(f"q{suffix}", q)
    if q.ndim != rank:
        raise ValueError(f"{first} must have shape {axes}, got {tuple(q.shape)}")
    if q.shape[-1] == 0:
        raise ValueError(f"{first} must have D >= 1 in its shape {axes}, got {tuple(q.shape)}")
    shape, dtype, device = q.shape, q.dtype, q.device
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name + suffix, x, shape, axes, device)
        if x.dtype != dtype:
            raise TypeError(
                f"`{name}{suffix}` must have the dtype of {first}, {name_of(q.dtype)}, got {name_of(x.dtype)}"
            )


def check_parameters(w: Any, b: Any, q: Tensor) -> None:
    """w and b must both be None, or both be (H, D)."""
    if (w is None) != (b is None):
        raise ValueError(f"`w` and `b` must both be given or both be None, got w={_kind(w)} and b={_kind(b)}")
    if w is not None:
        shape = q.shape[-2:]
        check_tensor("w", w, shape, "(H, D)", q.device)
        check_tensor("b", b, shape, "(H, D)", q.device)


def _kind(x: Any) -> str:
    return "None" if x is None else type(x).__name__


def check_gate(name: str, gate: Any, q: Tensor, axes: str) -> Tensor:
    """`gate` must have the shape of q without D, with or without a last axis of 1, which is dropped."""
    shape = q.shape[:-1]
    if isinstance(gate, Tensor) and gate.ndim == q.ndim and gate.shape == (*shape, 1):
        gate = gate.squeeze(-1)  # a view backward, too
    check_tensor(name, gate, shape, axes, q.device)
    assert isinstance(gate, Tensor)
    return gate


def check_options(eps: Any, chunk_size: Any, backend: Any, q: Tensor, **flags: Any) -> tuple[float, int]:
    """eps, chunk_size, backend and the boolean flags; return eps and chunk_size as Python's own numbers."""
    check_backend(backend)
    check_flags(**flags)
    return _eps(eps, compute_dtype(q.dtype)), check_integer("chunk_size", chunk_size)


def check_flags(**flags: Any) -> None:
    """Each flag must be True or False."""
    for name, flag in flags.items():
        # NumPy's truth values are no `bool`, but called one; PyTorch's operators take them
        if not isinstance(flag, bool) and type(flag).__name__ not in ("bool", "bool_"):
            raise TypeError(f"`{name}` must be a bool, got {type(flag).__name__}")


def check_backend(backend: Any) -> None:
    """`backend` must be None or the name of one."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"`backend` must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")


def _eps(eps: Any, dtype: torch.dtype) -> float:
    # the first of these is quick
    if type(eps) is not float and (isinstance(eps, bool) or not isinstance(eps, Real)):
        raise TypeError(f"`eps` must be a float, got {type(eps).__name__}")
    # float32 rounds all that is outside these to 0 or infinity
    low, high = (0.0, math.inf) if dtype == torch.float64 else (2.0**-150, 2.0**128 - 2.0**103)
    try:
        value = float(eps)
    except OverflowError:
        raise ValueError("`eps` must be positive and finite, got more than the largest float") from None
    if not low < value < high:
        raise ValueError(f"`eps` must be positive and finite in {name_of(dtype)}, got {value}")
    return value


def check_integer(name: str, number: Any) -> int:
    """`number` must be an integer of at least 1 that 64 bits hold; return it as Python's own."""
    try:
        if isinstance(number, bool):
            raise TypeError
        value = operator.index(number)
    except TypeError:
        raise TypeError(f"`{name}` must be an int, got {type(number).__name__}") from None
    if not 1 <= value < 2**63:
        # nobody reads a longer one, and Python refuses to print it
        shown = value if abs(value) < 2**64 else f"an int of {value.bit_length()} bits"
        raise ValueError(f"`{name}` must be at least 1 and less than 2**63, got {shown}")
    return value


def check_cu_seqlens(cu_seqlens: Any, q: Tensor) -> None:
    """`cu_seqlens` must be (N + 1,) integers with B = 1; the operators check the values, by `check_values`."""
    if cu_seqlens is None:
        return
    check_integers("cu_seqlens", cu_seqlens)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"`cu_seqlens` must have shape (N + 1,), got {tuple(cu_seqlens.shape)}")
    if q.shape[0] != 1:
        raise ValueError(f"`cu_seqlens` needs B = 1 in `q`, got B = {q.shape[0]}")
    if cu_seqlens.device != q.device and cu_seqlens.device.type != "cpu":
        raise ValueError(f"`cu_seqlens` must be on the device of `q`, {q.device}, or the CPU, got {cu_seqlens.device}")


def check_integers(name: str, x: Any) -> None:
    """`x` must be a dense tensor of int32 or int64."""
    check_dense(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`{name}` must have dtype int32 or int64, got {name_of(x.dtype)}")


def check_values(call: Call) -> None:
    """Check the bounds and offsets of a call that lie on the CPU, where they are read at once."""
    if call.cu_seqlens is not None and call.cu_seqlens.device.type == "cpu":
        check_bounds(call.cu_seqlens.tolist(), call.q.shape[1])
    if call.offset is not None and call.offset.device.type == "cpu":
        check_offsets("offset", call.offset.tolist(), call.chunk_size)


def check_bounds(bounds: list[int], T: int) -> None:
    """The values of `cu_seqlens` must lead from 0 to T."""
    if bounds[0] != 0 or bounds[-1] != T:
        raise ValueError(f"`cu_seqlens` must run from 0 to T = {T}, got {bounds[0]} to {bounds[-1]}")
    if any(i > j for i, j in pairwise(bounds)):
        raise ValueError(f"`cu_seqlens` must not decrease, got {bounds}")


def check_offsets(name: str, offsets: list[int], chunk_size: int) -> None:
    """Every offset must be inside a chunk."""
    if offsets and not (0 <= min(offsets) and max(offsets) < chunk_size):
        raise ValueError(f"`{name}` must satisfy 0 <= offset < chunk_size = {chunk_size}, got {offsets}")


def is_readable(x: Tensor) -> bool:
    """Whether the values of `x` can be read at once: no synchronisation, no tracing, no fake tensor, no transform."""
    return x.device.type == "cpu" and has_values(x)


def has_values(x: Tensor) -> bool:
    """Whether `x` is a tensor of its own numbers: no meta or fake one, and none that is traced or transformed."""
    return (
        not torch.compiler.is_compiling()
        and not x.is_meta
        and type(x) is Tensor
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and torch._C._len_torch_dispatch_stack() == 0
    )


def check_state(argument: str, state: Any, N: int, q: Tensor, chunk_size: int) -> None:
    """The state passed as `argument` must be None, a TitansState or its fields, or M alone, for N sequences."""
    if state is None:
        return
    H, D = q.shape[-2:]
    if isinstance(state, Tensor) and state.ndim == 3:
        check_tensor(argument, state, (H, D, D), "(H, D, D)", q.device)
        return
    shape, axes = (N, H, D, D), "(N, H, D, D)"
    if isinstance(state, Tensor):
        check_tensor(argument, state, shape, f"{axes} or (H, D, D)", q.device)
        return
    if not isinstance(state, tuple) or len(state) != 4:
        kind = f"tuple of {len(state)}" if isinstance(state, tuple) else type(state).__name__
        raise TypeError(
            f"`{argument}` must be None, a TitansState, a tuple of its 4 fields or a torch.Tensor, got {kind}"
        )
    *matrices, offset = state
    for name, x in zip(("M", "S", "anchor"), matrices, strict=True):
        check_tensor(f"{argument}.{name}", x, shape, axes, q.device)
    check_integers(f"{argument}.offset", offset)
    if tuple(offset.shape) != (N,):
        raise ValueError(f"`{argument}.offset` must have shape (N,) = ({N},), got {tuple(offset.shape)}")
    if offset.device != q.device:
        raise ValueError(f"`{argument}.offset` must be on the device of `q`, {q.device}, got {offset.device}")
    made_with = getattr(state, "chunk_size", None)
    if made_with is not None and made_with != chunk_size:
        raise ValueError(
            f"`{argument}` must be continued with the chunk_size that it was made with, {made_with}, got {chunk_size}"
        )
    if is_readable(offset):
        check_offsets(f"{argument}.offset", offset.tolist(), chunk_size)


def check_layout(q: Tensor, heads: int | None = None) -> None:
    """Check that heads stand behind tokens, which the op itself cannot know.

    (B, H, T, D), the layout of attention, is a good shape, too: H tokens of T heads, and so other numbers.

    Parameters
    ----------
    q : Tensor, shape (B, T, H, D)
        Or k or v.
    heads : int, optional
        H. Without it, more heads than tokens are taken for a mistake.

    Raises
    ------
    TypeError
        If `q` is not a dense tensor.
    ValueError
        If it has another number of axes or of heads.
    """
    check_dense("q", q)
    if q.ndim != 4:
        raise ValueError(f"`q` must have shape (B, T, H, D), got {tuple(q.shape)}")
    _, T, H, _ = q.shape
    if heads is not None and H != heads:
        hint = ": transpose(1, 2) gives (B, T, H, D)" if T == heads else ""
        raise ValueError(f"`q` must have H = {heads} in its shape (B, T, H, D), got {tuple(q.shape)}{hint}")
    if heads is None and T < H:
        raise ValueError(
            f"`q` must have shape (B, T, H, D), got T = {T} tokens of H = {H} heads in {tuple(q.shape)}: if it is "
            "(B, H, T, D), transpose(1, 2); if it is right, give `heads`"
        )

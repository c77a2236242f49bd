"""The arguments of one call, checked and with defaults filled in, as every backend receives them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TitansState(NamedTuple):
    """Where a sequence stands; resumes it at any token, exactly.

    Attributes
    ----------
    M, S, anchor : Tensor, shape (N, H, D, D), float32 (float64 for float64 inputs)
        Memory, momentum, and the memory as it was when the running chunk began.
    offset : Tensor, shape (N,), int32 or int64
        Tokens already consumed of the running chunk, 0 <= offset < chunk_size.
    """

    M: Tensor
    S: Tensor
    anchor: Tensor
    offset: Tensor

    def detach(self) -> TitansState:
        """The same state, cut from the autograd graph."""
        return TitansState(*(x.detach() for x in self))

    def to(self, device: torch.device | str) -> TitansState:
        """The same state on another device."""
        return TitansState(*(x.to(device) for x in self))


# so that torch.load(..., weights_only=True), its default, accepts a saved state
torch.serialization.add_safe_globals([TitansState])


class Call(NamedTuple):
    """The arguments of a backend; shapes as in `titans.chunk_titans_linear`.

    Fields with a cotangent come first, then the other tensors, then the options.

    Attributes
    ----------
    q, k, v : Tensor, shape (B, T, H, D)
    w, b : Tensor, shape (H, D), or both None
    theta, alpha, eta : Tensor, shape (B, T, H)
    M, S, anchor : Tensor, shape (N, H, D, D)
        The initial state in the compute dtype.
    offset : Tensor, shape (N,), or None
        None: every sequence starts at the start of a chunk.
    cu_seqlens : Tensor, shape (N + 1,), or None
    eps : float
    chunk_size : int
    log_gates : bool
    """

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor | None
    b: Tensor | None
    theta: Tensor
    alpha: Tensor
    eta: Tensor
    M: Tensor
    S: Tensor
    anchor: Tensor
    offset: Tensor | None
    cu_seqlens: Tensor | None
    eps: float
    chunk_size: int
    log_gates: bool

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The fields that have a cotangent, q to anchor."""
        return self[:_DIFFERENTIABLE]  # type: ignore[return-value]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields that hold tensors, q to cu_seqlens."""
        return self[:_TENSORS]  # type: ignore[return-value]

    @property
    def options(self) -> tuple[float, int, bool]:
        """The fields that hold numbers: eps, chunk_size and log_gates."""
        return self[_TENSORS:]  # type: ignore[return-value]

    def contiguous(self) -> Call:
        """The call with contiguous tensors: results must not depend on strides, which choose the order of sums."""
        return Call._make(x.contiguous() if isinstance(x, Tensor) else x for x in self)


_DIFFERENTIABLE = Call._fields.index("offset")
_TENSORS = Call._fields.index("eps")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32

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
    """What a backend computes with; shapes as in `titans.chunk_titans_linear`.

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

    def slack(self, chunks: int = 1) -> int:
        """What rounding up to pieces of so many chunks costs a sequence at most, in tokens."""
        # r <= C - 1 tokens before the first, and what the last piece lacks
        return chunks * self.chunk_size - 1 + (0 if self.offset is None else self.chunk_size - 1)

    def max_pieces(self, chunks: int = 1) -> int:
        """Number of pieces, or an upper bound that is known without looking at `cu_seqlens` and `offset`.

        Parameters
        ----------
        chunks : int
            Of how many chunks a piece is a part.
        """
        T, N, C = self.q.shape[1], self.M.shape[0], chunks * self.chunk_size
        slack = self.slack(chunks)
        return N * ((T + slack) // C) if self.cu_seqlens is None else (T + N * slack) // C

    def contiguous(self) -> Call:
        """The call with contiguous tensors: results must not depend on strides, which choose the order of sums."""
        return Call._make(x.contiguous() if isinstance(x, Tensor) else x for x in self)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32

"""The arguments of one call, checked and with defaults filled in, as every backend receives them."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple


class _State(NamedTuple):
    M: Tensor
    S: Tensor
    anchor: Tensor
    offset: Tensor


class TitansState(_State):
    """The place that sequences have reached; resumes them at any token, exactly.

    A tuple of its four fields, and any tuple of such four is taken for a state.

    Attributes
    ----------
    M, S, anchor : Tensor, shape (N, H, D, D), float32 (float64 for float64 inputs)
        Memory, momentum, and the memory as it was when the running chunk began.
    offset : Tensor, shape (N,), int32 or int64
        Tokens already consumed of the running chunk, 0 <= offset < chunk_size.
    chunk_size : int or None
        The chunk length that the state was made with, and that it must be continued with. It is not one of the fields:
        a plain tuple and a state that was rebuilt from its fields do not have it, and are not checked for it.
    """

    chunk_size: int | None = None

    def __new__(  # noqa: D102 (see the class)
        cls, M: Tensor, S: Tensor, anchor: Tensor, offset: Tensor, chunk_size: int | None = None
    ) -> TitansState:
        self = super().__new__(cls, M, S, anchor, offset)
        self.chunk_size = chunk_size
        return self

    def _replace(self, **fields: Any) -> TitansState:
        return TitansState(*super()._replace(**fields), self.chunk_size)

    def detach(self) -> TitansState:
        """The same state, cut from the autograd graph."""
        return self._each(Tensor.detach)

    def clone(self) -> TitansState:
        """A copy that shares no memory with the state."""
        return self._each(Tensor.clone)

    def to(self, *args: Any, **kwargs: Any) -> TitansState:
        """The same state on another device or in another dtype, by the arguments of `torch.Tensor.to`.

        The offset stays an integer.
        """
        M, S, anchor = (x.to(*args, **kwargs) for x in (self.M, self.S, self.anchor))
        kept = {name: kwargs[name] for name in ("non_blocking", "copy") if name in kwargs}
        offset = self.offset.to(M.device, **kept)
        return TitansState(M, S, anchor, offset, self.chunk_size)

    def cpu(self) -> TitansState:
        """The same state on the CPU."""
        return self.to("cpu")

    def select(self, sequences: Any) -> TitansState:
        """The state of some sequences: `x[sequences]` of every field; a single number keeps the axis of sequences.

        For beams, `sequences` is the tensor of those that survive; one may survive many times.
        """
        rows = rows_of(sequences)
        return self._each(lambda x: x[rows])

    def _each(self, function: Callable[[Tensor], Tensor]) -> TitansState:
        M, S, anchor, offset = map(function, self)
        return TitansState(M, S, anchor, offset, self.chunk_size)


def rows_of(sequences: Any) -> Any:
    """An index of some sequences that keeps their axis, as a number alone would not."""
    alone = isinstance(sequences, Integral) or (isinstance(sequences, Tensor) and sequences.ndim == 0)
    return [int(sequences)] if alone else sequences


# so that torch.load(..., weights_only=True), its default, accepts a saved state
torch.serialization.add_safe_globals([TitansState])
# and torch.export.save a program with one
_register_namedtuple(TitansState, serialized_type_name="titans.TitansState")


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
        """The call with dense tensors: see `dense`."""
        return Call._make(dense(x) if isinstance(x, Tensor) else x for x in self)


_DIFFERENTIABLE = Call._fields.index("offset")
_TENSORS = Call._fields.index("eps")


def dense(x: Tensor) -> Tensor:
    """`x`, or a copy, contiguous and at a multiple of 16 bytes.

    Results must depend on neither. Strides choose the order of a library's sums. The address chooses how a kernel loads
    a tile, and so which threads add up a row of it.
    """
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32

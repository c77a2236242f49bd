"""The sizes and the pointers of a call, as the kernels take them.

All that the compiler must know travels as one `Tile`. Pointers that belong together travel as one of the tuples below.
Numbers known at run time (T, H, C, eps) travel one by one: Triton would compile a kernel anew for every value inside a
tuple.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans.arguments import Call
from titans.partition import Layout, layout_of, owners, shortened
from titans.partition import block_rows as block_rows_of

INTERPRETED = triton.knobs.runtime.interpret


class Where(NamedTuple):
    """Pointers that tell a program which tokens are its own."""

    cu_seqlens: Tensor | None  # (N + 1,), for packed sequences
    offset: Tensor | None  # (N,), for resumed ones
    owner: Tensor | None  # (K,): the sequence of each slot, -1 for none; for packed sequences


class Affine(NamedTuple):
    """Weight and bias of the normalised memory, or their cotangents of each block."""

    w: Tensor | None  # (H, D); cotangent (K, H, D)
    b: Tensor | None


class State(NamedTuple):
    """Initial or final memory, momentum and anchor, or their cotangents; (N, H, D, D) each, float32."""

    M: Tensor
    S: Tensor
    anchor: Tensor


class BlockState(NamedTuple):
    """Cotangents of the memory and the momentum that enter or leave each block; (K, H, D, D) each."""

    M: Tensor
    S: Tensor


class Saved(NamedTuple):
    """What the backward keeps, in the dtype of `storage` but for r and the means, which are float32."""

    M0: Tensor  # (K, H, D, D)
    S0: Tensor  # (K, H, D, D)
    x: Tensor  # (B, T, H, D): of eq. (2); k A in the plain memory
    r: Tensor  # (B, T, H): of eq. (2)
    means: Tensor | None = None  # (B, T, H, 2): mean e and mean e x of eq. (2); written by the backward


class Rows(NamedTuple):
    """Rows of (7) that queries and keys read, or their cotangents; float32."""

    beta_f: Tensor  # (K, H, 2, BC): beta_t and f_t
    G: Tensor  # (K, H, BC, BC): G_tj for j <= t


class End(NamedTuple):
    """The last row L of (7) of each block, or of each step of the chain, or its cotangent; float32."""

    weights: Tensor  # (K, H, 2, BC): n_Lj and G_Lj
    transition: Tensor  # (K, H, 3), or (K, H, PER, 3) of the steps: beta_L, f_L and m_L


class Coefficients(NamedTuple):
    """All that `coefficients_kernel` writes."""

    rows: Rows
    block_end: End
    step_end: End


@dataclass(frozen=True, eq=False)
class Tile:
    """What the compiler must know.

    Compared by identity: Triton looks a compiled kernel up by its arguments at every launch. See `tile_of`.

    Attributes
    ----------
    D, BD : int
        Head width, and the width of a tile: a power of two, for a product at least 16.
    NORM, LOG, RESUMED, PACKED : bool
        Whether the memory is normalised, gates are logs, sequences have an offset, and are packed.
    OP : tl.dtype
        The dtype of operands of products.
    PREC : str
        How products of float32 are made.
    BC, BS : int
        Rows of a block, and of a step of the chain.
    NB : int
        Blocks per chunk.
    SPLIT : bool
        Whether chunks share a block.
    """

    D: Any
    BD: Any
    NORM: Any
    LOG: Any
    RESUMED: Any
    PACKED: Any = False
    OP: Any = tl.float32
    PREC: Any = "ieee"
    BC: Any = 1
    BS: Any = 1
    NB: Any = 1
    SPLIT: Any = False

    def __post_init__(self) -> None:
        # the compiler takes the fields of a constant for constants only if they say so; the interpreter takes numbers
        if not INTERPRETED:
            for name, value in vars(self).items():
                object.__setattr__(self, name, tl.constexpr(value))


# equal sizes are one object
_tile = functools.cache(Tile)


def block_rows(q: Tensor) -> int:
    """Rows of a block of queries like `q`."""
    return block_rows_of(q.dtype, q.shape[-1])


def max_slots(call: Call) -> int:
    """Number of slots, known without looking at `cu_seqlens` and `offset`."""
    BC = block_rows(call.q)
    return layout_of(shortened(call, BC), BC).slots


def where_of(call: Call, layout: Layout) -> Where:
    """Tell the programs which tokens are theirs; for packed sequences a few small device operations, no wait."""
    if call.cu_seqlens is None:
        return Where(None, call.offset, None)
    cu_seqlens = call.cu_seqlens.to(call.q.device, non_blocking=True)
    return Where(cu_seqlens, call.offset, owners(call, cu_seqlens, layout))


def storage(call: Call) -> torch.dtype:
    """The dtype in which operands of dots are stored between kernels."""
    return torch.bfloat16 if call.q.dtype == torch.bfloat16 else torch.float32


def fused(dtype: torch.dtype) -> bool:
    """Whether products and sums are fused.

    Not where operands of products are split: the rest would be that of the unrounded operand where it is computed, and
    of the rounded one where it is loaded, as in decoding.
    """
    return dtype == torch.bfloat16


def tile_of(call: Call, layout: Layout, log_gates: bool = False) -> Tile:
    """The tile of the chunk form, whose stages but `coefficients` see no gates; or, with `log_gates`, of decoding.

    How dots round their operands: bfloat16 stays what it is. float16 is raised to tf32, which holds it exactly and does
    not overflow where a state or an inner gradient leaves its range. float32 follows
    `torch.get_float32_matmul_precision()`; at its "highest", three tf32 products make one of float32.
    """
    D = call.q.shape[-1]
    full = call.q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return _tile(
        D=D,
        BD=max(16, 1 << (D - 1).bit_length()),
        NORM=call.w is not None,
        LOG=log_gates,
        RESUMED=call.offset is not None,
        PACKED=call.cu_seqlens is not None,
        OP=tl.bfloat16 if call.q.dtype == torch.bfloat16 else tl.float32,
        PREC="tf32x3" if full else "tf32",
        BC=layout.BC,
        BS=layout.BS,
        NB=layout.NB,
        SPLIT=layout.PER > 1,
    )


def gates_tile(call: Call, layout: Layout) -> Tile:
    """The tile of the stage `coefficients`, which is the same for any width and dtype of q, k and v."""
    return _tile(
        D=1,
        BD=1,
        NORM=False,
        LOG=call.log_gates,
        RESUMED=call.offset is not None,
        PACKED=call.cu_seqlens is not None,
        BC=layout.BC,
        BS=layout.BC,
        NB=layout.NB,
        SPLIT=layout.PER > 1,
    )


def step_tile(call: Call) -> Tile:
    """The tile of one token, which makes no products on tensor cores."""
    D = call.q.shape[-1]
    return _tile(
        D=D,
        BD=1 << (D - 1).bit_length(),
        NORM=call.w is not None,
        LOG=call.log_gates,
        RESUMED=call.offset is not None,
    )

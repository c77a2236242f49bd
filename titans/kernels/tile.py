"""Sizes of the blocks, and what every launch of a call shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans.arguments import Call
from titans.partition import max_pieces, slack


@dataclass(frozen=True)
class Layout:
    """How the blocks of a call are laid out; see `titans.kernels.device`.

    Attributes
    ----------
    slots : int
        Number of slots K.
    stride : int
        Slots per sequence, for sequences that are not packed.
    slack : int
        What rounding up costs a packed sequence at most, in tokens.
    sequence : Tensor, shape (K,), or None
        The sequence of each slot, -1 for none, for packed sequences.
    BC, BS : int
        Rows of the tile of a block, and of a step of the chain.
    NB, PER : int
        Blocks per chunk, chunks per block; one of them is 1.
    BD : int
        D, rounded up to what a dot takes.
    """

    slots: int
    stride: int
    slack: int
    sequence: Tensor | None
    BC: int
    BS: int
    NB: int
    PER: int
    BD: int


def block_rows(q: Tensor) -> int:
    """Rows of a block: what fits the multiprocessor."""
    return 64 if q.dtype == torch.bfloat16 else (32 if q.shape[-1] <= 64 else 16)


def per_chunk(q: Tensor, chunk_size: int) -> tuple[int, int]:
    """Blocks per chunk and chunks per block."""
    BC = block_rows(q)
    return -(-chunk_size // BC), max(1, BC // chunk_size)


def max_slots(call: Call) -> int:
    """Number of slots, known without looking at `cu_seqlens` and `offset`."""
    NB, PER = per_chunk(call.q, call.chunk_size)
    return NB * max_pieces(call, PER)


def layout_of(call: Call) -> Layout:
    """Lay out the blocks of a call; for packed sequences a few small device operations, no synchronisation."""
    C, N, D = call.chunk_size, call.M.shape[0], call.q.shape[-1]
    BC, (NB, PER) = block_rows(call.q), per_chunk(call.q, C)
    slots, extra = max_slots(call), slack(call, PER)
    sequence = None
    if call.cu_seqlens is not None:
        cu = call.cu_seqlens.to(call.q.device, non_blocking=True).long()
        base = (cu + torch.arange(N + 1, device=cu.device) * extra) // (C * PER) * NB
        slot = torch.arange(slots, device=cu.device)
        n = torch.searchsorted(base, slot, right=True) - 1
        sequence = torch.where(n < N, n, -1).int()
    BS = min(BC, max(16, int(triton.next_power_of_2(C))))
    return Layout(slots, slots // max(N, 1), extra, sequence, BC, BS, NB, PER, max(16, triton.next_power_of_2(D)))


def storage(call: Call) -> torch.dtype:
    """The dtype in which operands of dots are stored between kernels."""
    return torch.bfloat16 if call.q.dtype == torch.bfloat16 else torch.float32


def places(call: Call, layout: Layout) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What tells a program which tokens are its own."""
    cu_seqlens = None if call.cu_seqlens is None else call.cu_seqlens.to(call.q.device, non_blocking=True)
    return cu_seqlens, call.offset, layout.sequence


def sizes(call: Call, layout: Layout) -> dict[str, Any]:
    """Arguments that every kernel takes."""
    T, H = call.q.shape[1:3]
    return {
        "T": T, "H": H, "C": call.chunk_size, "S": layout.stride, "slack": layout.slack,
        "PER": layout.PER, "SPLIT": layout.PER > 1, "NB": layout.NB, "BC": layout.BC,
        "PACKED": call.cu_seqlens is not None, "RESUMED": call.offset is not None,
        "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip


def stages(layout: Layout) -> int:
    """How many steps are in flight along the chain; in bfloat16, what was fastest on an H200."""
    if layout.BD > 64:
        return 2 if layout.BS == 64 else 1
    return 3


def tiles(call: Call, layout: Layout, square: bool = True) -> dict[str, Any]:
    """Arguments of the kernels that work on (BC, BD) tiles, or on `square` (BD, BD) ones, which take more warps.

    How dots round their operands: bfloat16 stays what it is. float16 is raised to tf32, which holds it exactly and does
    not overflow where a state or an inner gradient leaves its range. float32 follows
    `torch.get_float32_matmul_precision()`; at its "highest", three tf32 products make one of float32.
    """
    full = call.q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    narrow = call.q.dtype == torch.bfloat16
    return {
        **sizes(call, layout),
        "D": call.q.shape[-1], "BD": layout.BD, "NORM": call.w is not None,
        "OP": tl.bfloat16 if narrow else tl.float32, "PREC": "tf32x3" if full else "tf32",
        "num_warps": 4 if narrow and (layout.BD <= 64 or not square) else 8,
    }  # fmt: skip

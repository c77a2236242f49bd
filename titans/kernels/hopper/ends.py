"""The coefficients that the chain needs: those of the last row of each chunk, without the rows before it."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans.arguments import Call
from titans.kernels.block import own_block
from titans.kernels.coefficients import linear_gates
from titans.kernels.launcher import Launcher
from titans.kernels.tile import End, Tile, Where
from titans.partition import Layout

# a program takes so many heads, whose gates lie side by side
HEADS = tl.constexpr(16)
# columns of the counts, of which the first is in use: as `handover.LINE`
LINE = tl.constexpr(32)


@triton.jit
def then(later_m, later_f, later_beta, m, f, beta):
    """Eq. (7) for two runs of tokens as one: what they make of S, and of S and M for M."""
    return later_m * m, later_f * m + later_beta * f, later_beta * beta


@triton.jit
def load_gates(alpha_ptr, eta_ptr, at, mask):
    """Alpha and eta as they were passed, zero outside."""
    return tl.load(alpha_ptr + at, mask=mask, other=0.0), tl.load(eta_ptr + at, mask=mask, other=0.0)


@triton.jit
def near_one(product, log, inside):
    """Of each head, the product of decays from the sum of their logs where that is little: as `coefficients_kernel`."""
    total = tl.sum(tl.where(inside, log, 0.0), 0)[None, :]
    return tl.where(total > -1, tl.exp(total), product)


@triton.jit(do_not_specialize=["T", "H", "C", "counts"])
def ends_kernel(
    theta_ptr, alpha_ptr, eta_ptr,  # (B, T, H)
    where,
    end,  # out
    count_ptr,  # out: (counts, LINE)
    T, H, C, counts, tile: tl.constexpr,
):  # fmt: skip
    """Eq. (7) at the end L of each block: n_Lj, G_Lj, beta_L, f_L, m_L, as `coefficients_kernel`, by a scan.

    Every number is a sum of products of numbers that are not negative, in another order than there.

    Grid: (K ceil(H / HEADS),).
    Reads: gates.
    Writes: the ends; zeros for the counts.
    """
    for i in range(tl.program_id(0), counts, tl.num_programs(0)):
        tl.store(count_ptr + i * LINE, 0)
    BC: tl.constexpr = tile.BC
    # a block of groups of heads: only its tokens count here
    groups = (H + HEADS - 1) // HEADS
    block = own_block(where, T, groups, C, tile)
    if block.length <= 0:
        return
    offs_j = tl.arange(0, BC)[:, None]
    offs_h = block.h * HEADS + tl.arange(0, HEADS)[None, :]
    inside = offs_j < block.length
    mask = inside & (offs_h < H)
    at = (block.sequence.begin + block.first) * H + (offs_j * H + offs_h)
    theta = tl.load(theta_ptr + at, mask=mask, other=0.0)
    alpha, eta = load_gates(alpha_ptr, eta_ptr, at, mask)
    log_a, log_eta = alpha.to(tl.float32), eta.to(tl.float32)
    theta, a, eta = linear_gates(theta, alpha, eta, tile)
    has_next = offs_j + 1 < block.length
    alpha, eta_next = load_gates(alpha_ptr, eta_ptr, at + H, mask & has_next)
    _, a_next, eta_next = linear_gates(eta_next, alpha, eta_next, tile)
    # what the tokens after j make of the update of token j, which is in S and in M alike
    m, f, beta = tl.associative_scan(
        (tl.where(has_next, eta_next, 1.0), tl.where(has_next, eta_next, 0.0), tl.where(has_next, a_next, 1.0)),
        0, then, reverse=True,
    )  # fmt: skip
    index = (block.index // groups) * H + offs_h
    weights = end.weights + index * (2 * BC) + offs_j
    heads = offs_h + offs_j * 0 < H
    tl.store(weights, tl.where(inside, m * theta, 0.0), mask=heads)
    tl.store(weights + BC, tl.where(inside, (f + beta) * theta, 0.0), mask=heads)
    # what token 0 and those after it make of the state
    m, f, beta = m * eta, (f + beta) * eta, beta * a
    if tile.LOG:
        beta, m = near_one(beta, log_a, inside), near_one(m, log_eta, inside)
    first = (offs_j == 0) & heads
    transition = end.transition + index * 3 + offs_j
    tl.store(transition, beta, mask=first)
    tl.store(transition + 1, f, mask=first)
    tl.store(transition + 2, m, mask=first)


run = Launcher(ends_kernel)


def launch_ends(call: Call, layout: Layout, where: Where, tile: Tile, key: Hashable) -> tuple[End, Tensor]:
    """Launch the kernel: what the chain needs of (7), and the counts of the forward."""
    (N, H), T, K = call.M.shape[:2], call.q.shape[1], layout.slots
    new = functools.partial(call.M.new_empty, K, H)
    end, count = End(new(2, layout.BC), new(3)), call.M.new_empty(N * H + 1, LINE.value, dtype=torch.int32)
    sizes: dict[str, Any] = {"T": T, "H": H, "C": call.chunk_size, "counts": N * H + 1}
    run(
        K * -(-H // HEADS.value), key,
        theta_ptr=call.theta, alpha_ptr=call.alpha, eta_ptr=call.eta, where=where, end=end, count_ptr=count, **sizes,
        tile=tile, num_warps=4, num_stages=1,
    )  # fmt: skip
    return end, count

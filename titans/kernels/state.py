"""The `state` stage: the chain of steps, one program per sequence and head, M and S in float32 registers."""

import triton
import triton.language as tl

from titans.kernels.block import chunks_per_block, own_step, sequence_of, step_count
from titans.kernels.inner import inner_gradient, norm
from titans.kernels.memory import (
    load_affine,
    load_column,
    load_rows,
    load_square,
    store_column,
    store_rows,
    store_square,
)


@triton.jit
def load_step_end(step_end, step, PER, tile: tl.constexpr):
    """n_L, G_L (BS, 1) and beta_L, f_L, m_L of a step."""
    n_L = load_column(step_end.weights, step.index * 2 * tile.BC + step.skip, 1, step.length, tile.BS)
    G_L = load_column(step_end.weights, (step.index * 2 + 1) * tile.BC + step.skip, 1, step.length, tile.BS)
    transition = step_end.transition + (step.index * PER + step.sub) * 3
    beta_L = tl.load(transition)
    f_L = tl.load(transition + 1)
    m_L = tl.load(transition + 2)
    return n_L, G_L, beta_L, f_L, m_L


@triton.jit
def load_raised(x_ptr, step, RAISED: tl.constexpr, tile: tl.constexpr):
    """`load_rows` of a step in float32, if RAISED by a product with the unit matrix, which is exact in bfloat16.

    Triton keeps in shared memory what the steps to come need, laid out for products. What is no operand of one is read
    with conflicts between banks, which took a sixth of a step. Wide heads and long steps of the reverse lack registers.
    """
    if RAISED:
        offs = tl.arange(0, tile.BS)
        unit = (offs[:, None] == offs[None, :]).to(tl.bfloat16)
        x = tl.dot(unit, load_rows(x_ptr, step, tile.BS, tile, tl.bfloat16))
    else:
        x = load_rows(x_ptr, step, tile.BS, tile, tl.float32)
    return x


@triton.jit(do_not_specialize=["T", "H", "C"])
def state_kernel(
    k_ptr, v_ptr,  # (B, T, H, D)
    affine, step_end, initial, where,
    saved, final,  # out
    T, H, C, eps, tile: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Eq. (8)-(10): u = u(k A), M <- beta_L M + f_L S - 2 k^T (G_L u), S <- m_L S - 2 k^T (n_L u); A = M at each chunk.

    Grid: (N H,).
    Reads: k, v, w, b, coefficients of the steps' ends, the initial state.
    Writes: M0, S0 of each block, x and r of (2) (x = k A in the plain memory), the final state.
    """
    pid = tl.program_id(0)
    h = pid % H
    sequence = sequence_of(pid // H, where, T, C, tile)
    pid = pid.to(tl.int64)
    steps = step_count(sequence, C, tile)
    stop = sequence.offset + sequence.length
    M = load_square(initial.M, pid, tile, tl.float32)
    S = load_square(initial.S, pid, tile, tl.float32)
    anchor = load_square(initial.anchor, pid, tile, tl.float32)
    store_square(final.anchor, anchor, pid, tile)
    A = anchor.to(tile.OP)
    w, b = load_affine(affine, h, tile)
    PER = chunks_per_block(C, tile)
    RAISED: tl.constexpr = (tile.OP == tl.bfloat16) and (tile.BD <= 64)

    for s in tl.range(0, steps, num_stages=STAGES):
        i = sequence.offset // tile.BS + s
        step = own_step(i, sequence, h, H, C, tile)
        k = load_rows(k_ptr, step, tile.BS, tile, tile.OP)
        target = load_raised(v_ptr, step, RAISED, tile)
        n_L, G_L, beta_L, f_L, m_L = load_step_end(step_end, step, PER, tile)
        if (step.sub == 0) | (tile.SPLIT == 0):
            store_square(saved.M0, M, step.index, tile)
            store_square(saved.S0, S, step.index, tile)
        y = tl.dot(k, A, input_precision=tile.PREC)
        if tile.NORM:
            target -= k.to(tl.float32)
            x, r = norm(y, eps, tile)
            u, _, _ = inner_gradient(x, r, target, w, b, tile)
            store_column(saved.r, r, step.row, H, step.length, tile.BS)
        else:
            x = y
            u = y - target
        k_T = tl.trans(k)
        M = tl.dot(k_T, (-2 * G_L * u).to(tile.OP), beta_L * M + f_L * S, input_precision=tile.PREC)
        S = tl.dot(k_T, (-2 * n_L * u).to(tile.OP), m_L * S, input_precision=tile.PREC)
        store_rows(saved.x, x, step, tile.BS, tile)
        if tile.NB == 1:
            A = M.to(tile.OP)
        else:
            A = tl.where((i + 1) % tile.NB == 0, M.to(tile.OP), A)
        # the final anchor is the M that the last chunk starts from, or that a full one leaves
        if ((i + 1) % tile.NB == 0) & ((i + 1) // tile.NB == (stop - 1) // C) | (s == steps - 1) & (stop % C == 0):
            store_square(final.anchor, M, pid, tile)
    store_square(final.M, M, pid, tile)
    store_square(final.S, S, pid, tile)

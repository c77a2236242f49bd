"""The `output` stage: what each token reads, all blocks in parallel."""

import triton
import triton.language as tl

from titans.kernels.block import own_block
from titans.kernels.inner import load_inner_gradient, norm, norm_vjp
from titans.kernels.memory import (
    load_affine,
    load_column,
    load_rows,
    load_square,
    store_column,
    store_rows,
    store_square,
    store_width,
)


@triton.jit
def lower(x, BC: tl.constexpr):
    """The (BC, BC) tile x_tj, zero where j > t."""
    offs = tl.arange(0, BC)
    return tl.where(offs[None, :] <= offs[:, None], x, 0.0)


@triton.jit
def upper(x, BC: tl.constexpr):
    """The (BC, BC) tile x_jt, zero where j > t."""
    offs = tl.arange(0, BC)
    return tl.where(offs[:, None] <= offs[None, :], x, 0.0)


@triton.jit
def load_lower(G_ptr, block, BC: tl.constexpr):
    """G_tj of one block, (BC, BC): zero above the diagonal and outside."""
    offs_t = tl.arange(0, BC)[:, None]
    offs_j = tl.arange(0, BC)[None, :]
    mask = (offs_t < block.length) & (offs_j <= offs_t)
    return tl.load(G_ptr + block.index * BC * BC + (offs_t * BC + offs_j), mask=mask, other=0.0)


@triton.jit
def load_beta_f(rows, block, BC: tl.constexpr):
    """beta_t and f_t of one block, (BC, 1) each."""
    beta = load_column(rows.beta_f, block.index * 2 * BC, 1, block.length, BC)
    f = load_column(rows.beta_f, (block.index * 2 + 1) * BC, 1, block.length, BC)
    return beta, f


@triton.jit(do_not_specialize=["T", "H", "C"])
def output_kernel(
    q_ptr, k_ptr, v_ptr,  # (B, T, H, D)
    affine, rows, saved, where,
    o_ptr,  # out: (B, T, H, D)
    T, H, C, eps, tile: tl.constexpr,
):  # fmt: skip
    """Eq. (11) and (5): y_t = beta_t q_t M0 + f_t q_t S0 - 2 sum_j G_tj (q_t . k_j) u_j;  o = y + norm(y) w + b.

    Grid: (K H,).
    Reads: q, k, v, w, b, coefficients, M0, S0, x and r of `state_kernel`.
    Writes: o.
    """
    block = own_block(where, T, H, C, tile)
    if block.length <= 0:
        return
    BC: tl.constexpr = tile.BC
    q = load_rows(q_ptr, block, BC, tile, tile.OP)
    k = load_rows(k_ptr, block, BC, tile, tile.OP)
    w, b = load_affine(affine, block.h, tile)
    u, _, _ = load_inner_gradient(k, v_ptr, saved, w, b, block, tile)
    beta, f = load_beta_f(rows, block, BC)
    # what is above the diagonal may overflow, and must not meet the zeros of G there
    scores = lower(tl.dot(q, tl.trans(k), input_precision=tile.PREC), BC)
    weights = -2 * load_lower(rows.G, block, BC) * scores
    y = beta * tl.dot(q, load_square(saved.M0, block.index, tile, tile.OP), input_precision=tile.PREC)
    y += f * tl.dot(q, load_square(saved.S0, block.index, tile, tile.OP), input_precision=tile.PREC)
    if tile.SPLIT:
        # a u that is not finite must not meet the zeros, either: it is NaN from its own row on
        finite = tl.abs(u) < float("inf")
        wrong = tl.max(tl.where(finite, 0, 1), 1)
        u = tl.where(finite, u, 0.0)
        reached = tl.max(lower(wrong[None, :] + tl.zeros((BC, BC), tl.int32), BC), 1)
        y = tl.where((reached > 0)[:, None], float("nan"), y)
    y = tl.dot(weights.to(tile.OP), u.to(tile.OP), y, input_precision=tile.PREC)
    if tile.NORM:
        x_y, _ = norm(y, eps, tile)
        y += x_y * w + b
    store_rows(o_ptr, y, block, BC, tile)


@triton.jit
def readout_vjp(do, q, u, scores, M0, S0, beta, f, w, rows, daffine, block, eps, tile: tl.constexpr):
    """The reverse of (5) in the normalised memory, from (11) once more: dy; stores dw and db of the block."""
    y = beta * tl.dot(q, M0, input_precision=tile.PREC) + f * tl.dot(q, S0, input_precision=tile.PREC)
    weights = -2 * load_lower(rows.G, block, tile.BC) * scores
    y = tl.dot(weights.to(tile.OP), u, y, input_precision=tile.PREC)
    x_y, r_y = norm(y, eps, tile)
    store_width(daffine.w, tl.sum(do * x_y, 0)[None, :], block.index, tile)
    store_width(daffine.b, tl.sum(do, 0)[None, :], block.index, tile)
    return do + norm_vjp(do * w, x_y, r_y, tile)


@triton.jit(do_not_specialize=["T", "H", "C"])
def output_vjp_kernel(
    q_ptr, k_ptr, v_ptr,  # (B, T, H, D)
    affine, rows, saved, where,
    do_ptr,  # (B, T, H, D)
    drows,  # out; its G may be the memory of rows.G
    dq_ptr, du_ptr, dk_ptr,  # out: (B, T, H, D)
    dstate0,  # out: of M0 and S0
    daffine,  # out: of each block
    T, H, C, eps, tile: tl.constexpr,
):  # fmt: skip
    """Eq. (14): the reverse of `output_kernel`.

    Grid: (K H,).
    Reads: q, k, v, w, b, coefficients, M0, S0, x and r of `state_kernel`, do.
    Writes: mean e and mean e x of (2), dq, the parts of du, dk, dM0 and dS0 that come through the outputs, the
    cotangents of beta_t, f_t and G, dw and db of the block.
    """
    block = own_block(where, T, H, C, tile)
    if block.length <= 0:
        return
    BC: tl.constexpr = tile.BC
    OP: tl.constexpr = tile.OP
    PREC: tl.constexpr = tile.PREC
    offs_t = tl.arange(0, BC)
    k = load_rows(k_ptr, block, BC, tile, OP)
    w, b = load_affine(affine, block.h, tile)
    u, mean_e, c_e = load_inner_gradient(k, v_ptr, saved, w, b, block, tile)
    if tile.NORM:
        store_column(saved.means, mean_e, block.row * 2, H * 2, block.length, BC)
        store_column(saved.means, c_e, block.row * 2 + 1, H * 2, block.length, BC)
    u = u.to(OP)

    # (5) and (11)
    q = load_rows(q_ptr, block, BC, tile, OP)
    M0, S0 = load_square(saved.M0, block.index, tile, OP), load_square(saved.S0, block.index, tile, OP)
    beta, f = load_beta_f(rows, block, BC)
    dy = load_rows(do_ptr, block, BC, tile, tl.float32)
    scores = lower(tl.dot(q, tl.trans(k), input_precision=PREC), BC)
    if tile.NORM:
        dy = readout_vjp(dy, q, u, scores, M0, S0, beta, f, w, rows, daffine, block, eps, tile)

    # (14)
    dy_op = dy.to(OP)
    q32 = q.to(tl.float32)
    dy_M = tl.dot(dy_op, tl.trans(M0), input_precision=PREC)
    tl.store(drows.beta_f + block.index * 2 * BC + offs_t, tl.sum(dy_M * q32, 1))
    dq = beta * dy_M
    dy_S = tl.dot(dy_op, tl.trans(S0), input_precision=PREC)
    tl.store(drows.beta_f + (block.index * 2 + 1) * BC + offs_t, tl.sum(dy_S * q32, 1))
    dq += f * dy_S
    q_T = tl.trans(q)
    store_square(dstate0.M, tl.dot(q_T, (beta * dy).to(OP), input_precision=PREC), block.index, tile)
    store_square(dstate0.S, tl.dot(q_T, (f * dy).to(OP), input_precision=PREC), block.index, tile)

    G = -2 * load_lower(rows.G, block, BC)
    dweights = lower(tl.dot(dy_op, tl.trans(u), input_precision=PREC), BC)
    dq = tl.dot((G * dweights).to(OP), k, dq, input_precision=PREC)
    store_rows(dq_ptr, dq, block, BC, tile)
    # the two products again with j along the rows: no product is transposed as the left operand of another
    G_T = tl.trans(G)
    weights_T = G_T * upper(tl.dot(k, tl.trans(q), input_precision=PREC), BC)
    store_rows(du_ptr, tl.dot(weights_T.to(OP), dy_op, input_precision=PREC), block, BC, tile)
    dscores_T = G_T * upper(tl.dot(u, tl.trans(dy_op), input_precision=PREC), BC)
    store_rows(dk_ptr, tl.dot(dscores_T.to(OP), q, input_precision=PREC), block, BC, tile)
    # G has been read by every thread
    tl.debug_barrier()
    at = block.index * BC * BC + (offs_t[:, None] * BC + offs_t[None, :])
    tl.store(drows.G + at, -2 * dweights * scores, mask=offs_t[None, :] <= offs_t[:, None])

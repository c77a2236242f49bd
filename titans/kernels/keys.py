"""What the cotangents along the chain make of keys and values, all blocks in parallel."""

import triton
import triton.language as tl

from titans.kernels.device import (
    block_span,
    chunk_start,
    inner_gradient,
    inner_gradient_vjp,
    inner_residual,
    less_mean,
    load_column,
    load_pairs,
    load_rows,
    load_square,
    load_width,
    sequence_of,
    sequence_span,
    store_rows,
)


@triton.jit
def dot_square(x, y):
    """<x, y> of two square tiles."""
    return tl.sum(tl.sum(x.to(tl.float32) * y.to(tl.float32), 1), 0)


@triton.jit
def load_before(G, at, start, length, BC: tl.constexpr):
    """G_sj of one block, s = start_t - 1, (BC, BC): zero where j > s and outside."""
    offs_t = tl.arange(0, BC)[:, None]
    offs_j = tl.arange(0, BC)[None, :]
    start = start[:, None]
    mask = (offs_t < length) & (offs_j < start)
    return tl.load(G + at * BC * BC + ((start - 1) * BC + offs_j), mask=mask, other=0.0)


@triton.jit
def load_before_transposed(G, at, start, length, BC: tl.constexpr):
    """What `load_before` loads, with j along the rows."""
    offs_j = tl.arange(0, BC)[:, None]
    offs_t = tl.arange(0, BC)[None, :]
    start = start[None, :]
    mask = (offs_t < length) & (offs_j < start)
    return tl.load(G + at * BC * BC + ((start - 1) * BC + offs_j), mask=mask, other=0.0)


@triton.jit(do_not_specialize=["T", "H", "C", "S", "slack", "PER"])
def key_vjp_kernel(
    k, v, w, b, block_ends, anchor_in, cu_seqlens, offset, sequence, M0, S0, x, r_norm, means,
    dM_L, dS_L, du, dk_part,  # in: what `state_vjp_kernel` writes, the rest of dk
    dk, dv,  # out: (B, T, H, D); they may be the memory of dk_part and du
    dy_k,  # out: (B, T, H, D), of k A, if chunks share blocks
    dw, db,  # in and out: (K, H, D), added to
    dends, dend,  # out: like block_ends and block_end
    T, H, C, S, slack, PER,
    D: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr, NORM: tl.constexpr,
    PACKED: tl.constexpr, RESUMED: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Eq. (16): what the cotangents along the chain make of each block's k, v, w, b and coefficients.

    Grid: (K H,).
    Reads: k, v, w, b, coefficients, M0, S0, dM and dS after the block, du.
    Writes: dk, dv, dw and db of the block, and the cotangents of its last row of coefficients.
    """
    pid = tl.program_id(0)
    slot, h = pid // H, pid % H
    pid = pid.to(tl.int64)
    n_seq = sequence_of(slot, sequence, S, PACKED)
    if n_seq < 0:
        return
    begin, L, r, base = sequence_span(n_seq, cu_seqlens, offset, T, C * PER, S, slack, NB, PACKED, RESUMED)
    i = r // BC + (slot - base).to(tl.int32)
    first, length = block_span(i, L, r, C * PER, NB, BC)
    if length <= 0:
        return
    row = (begin + first) * H + h
    offs_t = tl.arange(0, BC)
    offs_d = tl.arange(0, BD)
    at_d, in_d = pid * D + offs_d, offs_d < D
    # all loads before the first product: one wait for memory, not one each
    M0_, S0_ = load_square(M0, pid, D, BD, OP), load_square(S0, pid, D, BD, OP)
    dM, dS = load_square(dM_L, pid, D, BD, OP), load_square(dS_L, pid, D, BD, OP)
    # the anchor of the chunk that the block starts in
    if i // NB == 0:
        A = load_square(anchor_in, n_seq.to(tl.int64) * H + h, D, BD, OP)
    else:
        A = load_square(M0, (base + i // NB * NB - r // BC) * H + h, D, BD, OP)
    k_ = load_rows(k, row, H, length, D, BC, BD, OP)
    target = load_rows(v, row, H, length, D, BC, BD, tl.float32)
    x_ = load_rows(x, row, H, length, D, BC, BD, tl.float32)
    du_ = load_rows(du, row, H, length, D, BC, BD, tl.float32)
    dk_ = load_rows(dk_part, row, H, length, D, BC, BD, tl.float32)
    n_L = load_column(block_ends, pid * 2 * BC, 1, length, BC)
    G_L = load_column(block_ends, (pid * 2 + 1) * BC, 1, length, BC)
    if NORM:
        r_ = load_column(r_norm, row, H, length, BC)
        mean_e, c = load_pairs(means, row * 2, H * 2, length, BC)
        w_, b_ = load_width(w, h, D, BD), load_width(b, h, D, BD)
        dw_, db_ = tl.load(dw + at_d, mask=in_d), tl.load(db + at_d, mask=in_d)

    tl.store(dend + pid * 3, dot_square(dM, M0_))
    tl.store(dend + pid * 3 + 1, dot_square(dM, S0_))
    tl.store(dend + pid * 3 + 2, dot_square(dS, S0_))
    if NORM:
        z, e = inner_residual(x_, target - k_.to(tl.float32), w_, b_)
        u = r_ * (less_mean(e, mean_e, D, BD) - x_ * c)
        de, dy = inner_gradient_vjp(du_, x_, r_, e, mean_e, c, w_, D, BD)
        dz = de * w_
        tl.store(dw + at_d, dw_ + tl.sum(de * (z + w_ * x_), 0), mask=in_d)
        tl.store(db + at_d, db_ + tl.sum(dz, 0), mask=in_d)
        dk_ += dz
    else:
        u = x_ - target
        dy, dz = du_, du_
    u_op = u.to(OP)
    # du and dk_part have been read by every thread
    tl.debug_barrier()
    store_rows(dv, -dz, row, H, length, D, BC, BD)
    if SPLIT:
        # later chunks of the block: `anchor_vjp_kernel`
        store_rows(dy_k, dy, row, H, length, D, BC, BD)
        dy = tl.where(chunk_start(offs_t, r, C, i)[:, None] == 0, dy, 0.0)
    dk_ = tl.dot(dy.to(OP), tl.trans(A), dk_, input_precision=PREC)

    k32 = k_.to(tl.float32)
    u_dM = -2 * tl.dot(u_op, tl.trans(dM), input_precision=PREC)
    tl.store(dends + (pid * 2 + 1) * BC + offs_t, tl.sum(u_dM * k32, 1))
    dk_ += G_L * u_dM
    u_dS = -2 * tl.dot(u_op, tl.trans(dS), input_precision=PREC)
    tl.store(dends + pid * 2 * BC + offs_t, tl.sum(u_dS * k32, 1))
    dk_ += n_L * u_dS
    store_rows(dk, dk_, row, H, length, D, BC, BD)


@triton.jit(do_not_specialize=["T", "H", "C", "S", "slack", "PER"])
def anchor_vjp_kernel(
    k, v, w, b, rows, G, cu_seqlens, offset, sequence, M0, S0, x, r_norm,
    danchor_out, dy_k, dk_part,  # in: what `key_vjp_kernel` writes
    dk,  # out: (B, T, H, D); it may be the memory of dk_part
    drows, dG,  # out: like rows and G, in the row of the token that reads; dG for j before its chunk
    T, H, C, S, slack, PER,
    D: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr, NORM: tl.constexpr,
    PACKED: tl.constexpr, RESUMED: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Eq. (20): the reverse of (19), y_t = k_t M_s, for the chunks of a block that begin inside it.

    Grid: (K H,).
    Reads: k, v, w, b, coefficients, M0, S0, x and r of `state_kernel`, dy of k A.
    Writes: dk, and the cotangents of the rows of coefficients that end a chunk inside the block.
    """
    pid = tl.program_id(0)
    slot, h = pid // H, pid % H
    pid = pid.to(tl.int64)
    n_seq = sequence_of(slot, sequence, S, PACKED)
    if n_seq < 0:
        return
    begin, L, r, base = sequence_span(n_seq, cu_seqlens, offset, T, C * PER, S, slack, NB, PACKED, RESUMED)
    i = r // BC + (slot - base).to(tl.int32)
    first, length = block_span(i, L, r, C * PER, NB, BC)
    if length <= 0:
        return
    row = (begin + first) * H + h
    offs_t = tl.arange(0, BC)
    start = chunk_start(offs_t, r, C, i)
    later = (offs_t < length) & (start > 0)
    k_ = load_rows(k, row, H, length, D, BC, BD, OP)
    k32 = k_.to(tl.float32)
    dk_ = load_rows(dk_part, row, H, length, D, BC, BD, tl.float32)
    target = load_rows(v, row, H, length, D, BC, BD, tl.float32)
    x_ = load_rows(x, row, H, length, D, BC, BD, tl.float32)
    if NORM:
        r_ = load_column(r_norm, row, H, length, BC)
        w_, b_ = load_width(w, h, D, BD), load_width(b, h, D, BD)
        u, _, _ = inner_gradient(x_, r_, target - k32, w_, b_, D, BD)
    else:
        u = x_ - target
    u_op = u.to(OP)

    # an unfinished chunk leaves its anchor behind, as if its last token read it
    dG_last = tl.zeros((BC,), tl.float32)
    dbeta_last, df_last = 0.0, 0.0
    s = chunk_start(length - 1, r, C, i)
    if (first + length == L) & (s > 0) & ((r + L) % C != 0):
        danchor = load_square(danchor_out, n_seq.to(tl.int64) * H + h, D, BD, tl.float32)
        u_danchor = -2 * tl.dot(u_op, tl.trans(danchor.to(OP)), input_precision=PREC)
        dG_last += tl.sum(u_danchor * k32, 1)
        dbeta_last += dot_square(danchor, load_square(M0, pid, D, BD, OP))
        df_last += dot_square(danchor, load_square(S0, pid, D, BD, OP))
        dk_ += load_column(G, (pid * BC + s - 1) * BC, 1, s, BC) * u_danchor
    last = offs_t == length - 1

    dy_ = load_rows(dy_k, row, H, length, D, BC, BD, OP)
    at = pid * 2 * BC + start - 1
    dy_M = tl.dot(dy_, tl.trans(load_square(M0, pid, D, BD, OP)), input_precision=PREC)
    dbeta = tl.where(later, tl.sum(dy_M * k32, 1), 0.0) + tl.where(last, dbeta_last, 0.0)
    tl.store(drows + pid * 2 * BC + offs_t, dbeta)
    dk_ += tl.load(rows + at, mask=later, other=0.0)[:, None] * dy_M
    dy_S = tl.dot(dy_, tl.trans(load_square(S0, pid, D, BD, OP)), input_precision=PREC)
    df = tl.where(later, tl.sum(dy_S * k32, 1), 0.0) + tl.where(last, df_last, 0.0)
    tl.store(drows + (pid * 2 + 1) * BC + offs_t, df)
    dk_ += tl.load(rows + BC + at, mask=later, other=0.0)[:, None] * dy_S

    before = offs_t[None, :] < start[:, None]
    scores = tl.where(before, tl.dot(k_, tl.trans(k_), input_precision=PREC), 0.0)
    dweights = tl.where(before, tl.dot(dy_, tl.trans(u_op), input_precision=PREC), 0.0)
    dG_ = -2 * dweights * scores + tl.where(last[:, None], dG_last[None, :], 0.0)
    tl.store(dG + pid * BC * BC + (offs_t[:, None] * BC + offs_t[None, :]), dG_, mask=before)
    weights = -2 * load_before(G, pid, start, length, BC) * dweights
    dk_ = tl.dot(weights.to(OP), k_, dk_, input_precision=PREC)
    # with j along the rows, as in `output_vjp_kernel`
    before_T = offs_t[:, None] < start[None, :]
    dweights_T = tl.where(before_T, tl.dot(u_op, tl.trans(dy_), input_precision=PREC), 0.0)
    weights_T = -2 * load_before_transposed(G, pid, start, length, BC) * dweights_T
    dk_ = tl.dot(weights_T.to(OP), k_, dk_, input_precision=PREC)
    store_rows(dk, dk_, row, H, length, D, BC, BD)

"""The `output` stage: what each token reads, all blocks in parallel."""

import triton
import triton.language as tl

from titans.kernels.device import (
    block_span,
    inner_residual,
    less_mean,
    load_rows,
    load_square,
    load_width,
    mean,
    norm,
    sequence_of,
    sequence_span,
    store_rows,
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
def load_lower(G, at, length, BC: tl.constexpr):
    """G_tj of one block, (BC, BC): zero above the diagonal and outside."""
    offs_t = tl.arange(0, BC)[:, None]
    offs_j = tl.arange(0, BC)[None, :]
    return tl.load(G + at * BC * BC + (offs_t * BC + offs_j), mask=(offs_t < length) & (offs_j <= offs_t), other=0.0)


@triton.jit
def load_lower_transposed(G, at, length, BC: tl.constexpr):
    """G_tj of one block with j along the rows, (BC, BC)."""
    offs_j = tl.arange(0, BC)[:, None]
    offs_t = tl.arange(0, BC)[None, :]
    return tl.load(G + at * BC * BC + (offs_t * BC + offs_j), mask=(offs_t < length) & (offs_j <= offs_t), other=0.0)


@triton.jit(do_not_specialize=["T", "H", "C", "S", "slack"])
def output_kernel(
    q, k, u, w, b, rows, G, M0, S0, cu_seqlens, offset, sequence,
    o,  # out: (B, T, H, D)
    T, H, C, S, slack, eps,
    D: tl.constexpr, BD: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr, NORM: tl.constexpr,
    PACKED: tl.constexpr, RESUMED: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Eq. (11) and (5): y_t = beta_t q_t M0 + f_t q_t S0 - 2 sum_j G_tj (q_t . k_j) u_j;  o = y + norm(y) w + b.

    Grid: (K H,).
    Reads: q, k, u, w, b, coefficients, M0, S0.
    Writes: o.
    """
    pid = tl.program_id(0).to(tl.int64)
    slot, h = pid // H, pid % H
    n_seq = sequence_of(slot, sequence, S, PACKED)
    if n_seq < 0:
        return
    begin, L, r, base = sequence_span(n_seq, cu_seqlens, offset, T, C, S, slack, NB, PACKED, RESUMED)
    first, length = block_span(r // BC + slot - base, L, r, C, NB, BC)
    if length <= 0:
        return
    row = (begin + first) * H + h
    offs_t = tl.arange(0, BC)
    q_ = load_rows(q, row, H, length, D, BC, BD, OP)
    k_ = load_rows(k, row, H, length, D, BC, BD, OP)
    u_ = load_rows(u, row, H, length, D, BC, BD, OP)
    beta = tl.load(rows + pid * 2 * BC + offs_t, mask=offs_t < length, other=0.0)[:, None]
    f = tl.load(rows + (pid * 2 + 1) * BC + offs_t, mask=offs_t < length, other=0.0)[:, None]
    # what is above the diagonal may overflow, and must not meet the zeros of G there
    scores = lower(tl.dot(q_, tl.trans(k_), input_precision=PREC), BC)
    weights = -2 * load_lower(G, pid, length, BC) * scores
    y = beta * tl.dot(q_, load_square(M0, pid, D, BD, OP), input_precision=PREC)
    y += f * tl.dot(q_, load_square(S0, pid, D, BD, OP), input_precision=PREC)
    y = tl.dot(weights.to(OP), u_, y, input_precision=PREC)
    if NORM:
        x, _ = norm(y, eps, D, BD)
        y += x * load_width(w, h, D, BD) + load_width(b, h, D, BD)
    store_rows(o, y, row, H, length, D, BC, BD)


@triton.jit(do_not_specialize=["T", "H", "C", "S", "slack"])
def output_vjp_kernel(
    q, k, v, w, b, rows, anchor_in, M0, S0, cu_seqlens, offset, sequence, do,
    G,  # in and out: becomes dG
    x, stats, dy, dq, du, dk,  # out: (B, T, H, D), but stats (K, H, 3, BC)
    drows, dw, db,  # out: like rows, (K, H, D) twice
    T, H, C, S, slack, eps,
    D: tl.constexpr, BD: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr, NORM: tl.constexpr,
    PACKED: tl.constexpr, RESUMED: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Eq. (14): the reverse of `output_kernel`, but for what reaches M0 and S0, which `state_vjp_kernel` forms from dy.

    Grid: (K H,).
    Reads: q, k, v, w, b, coefficients, M0, S0, do.
    Writes: x = norm(k A) with stats = r, mean(e), mean(e x) of eq. (2) (x = k A in the plain memory); dy, dq, the
    parts of du and dk that come through the outputs, drows, dG, dw and db of the block.
    """
    pid = tl.program_id(0).to(tl.int64)
    slot, h = pid // H, pid % H
    n_seq = sequence_of(slot, sequence, S, PACKED)
    if n_seq < 0:
        return
    begin, L, r, base = sequence_span(n_seq, cu_seqlens, offset, T, C, S, slack, NB, PACKED, RESUMED)
    i = r // BC + slot - base
    first, length = block_span(i, L, r, C, NB, BC)
    if length <= 0:
        return
    row = (begin + first) * H + h
    offs_t = tl.arange(0, BC)
    offs_d = tl.arange(0, BD)
    mask_t = offs_t < length
    k_ = load_rows(k, row, H, length, D, BC, BD, OP)
    w_ = load_width(w, h, D, BD) if NORM else 1.0

    # (2) once more: u
    if i // NB == 0:
        A = load_square(anchor_in, n_seq * H + h, D, BD, OP)
    else:
        A = load_square(M0, (base + i // NB * NB - r // BC) * H + h, D, BD, OP)
    recall = tl.dot(k_, A, input_precision=PREC)
    target = load_rows(v, row, H, length, D, BC, BD, tl.float32)
    if NORM:
        x_, r_ = norm(recall, eps, D, BD)
        _, e = inner_residual(x_, target - k_.to(tl.float32), w_, load_width(b, h, D, BD))
        mean_e, c = mean(e, D), mean(e * x_, D)
        u = (r_ * (less_mean(e, mean_e, D, BD) - x_ * c)).to(OP)
        store_rows(x, x_, row, H, length, D, BC, BD)
        tl.store(stats + pid * 3 * BC + offs_t[:, None], r_)
        tl.store(stats + (pid * 3 + 1) * BC + offs_t[:, None], mean_e)
        tl.store(stats + (pid * 3 + 2) * BC + offs_t[:, None], c)
    else:
        u = (recall - target).to(OP)
        store_rows(x, recall, row, H, length, D, BC, BD)

    # (5) and (11)
    q_ = load_rows(q, row, H, length, D, BC, BD, OP)
    M0_, S0_ = load_square(M0, pid, D, BD, OP), load_square(S0, pid, D, BD, OP)
    beta = tl.load(rows + pid * 2 * BC + offs_t, mask=mask_t, other=0.0)[:, None]
    f = tl.load(rows + (pid * 2 + 1) * BC + offs_t, mask=mask_t, other=0.0)[:, None]
    G_ = -2 * load_lower(G, pid, length, BC)
    G_T = -2 * load_lower_transposed(G, pid, length, BC)
    scores = lower(tl.dot(q_, tl.trans(k_), input_precision=PREC), BC)
    q_M0 = tl.dot(q_, M0_, input_precision=PREC)
    q_S0 = tl.dot(q_, S0_, input_precision=PREC)
    dy_ = load_rows(do, row, H, length, D, BC, BD, tl.float32)
    if NORM:
        y = tl.dot((G_ * scores).to(OP), u, beta * q_M0 + f * q_S0, input_precision=PREC)
        x_y, r_y = norm(y, eps, D, BD)
        tl.store(dw + pid * D + offs_d, tl.sum(dy_ * x_y, 0), mask=offs_d < D)
        tl.store(db + pid * D + offs_d, tl.sum(dy_, 0), mask=offs_d < D)
        dx = dy_ * w_
        dcentred = r_y * (dx - x_y * mean(dx * x_y, D))
        dy_ += less_mean(dcentred, mean(dcentred, D), D, BD)
    store_rows(dy, dy_, row, H, length, D, BC, BD)
    tl.store(drows + pid * 2 * BC + offs_t, tl.sum(dy_ * q_M0, 1))
    tl.store(drows + (pid * 2 + 1) * BC + offs_t, tl.sum(dy_ * q_S0, 1))

    # (14)
    dy_op = dy_.to(OP)
    dweights = lower(tl.dot(dy_op, tl.trans(u), input_precision=PREC), BC)
    # G has been read by every thread
    tl.debug_barrier()
    tl.store(G + pid * BC * BC + (offs_t[:, None] * BC + offs_t[None, :]), -2 * dweights * scores)
    dq_ = beta * tl.dot(dy_op, tl.trans(M0_), input_precision=PREC)
    dq_ += f * tl.dot(dy_op, tl.trans(S0_), input_precision=PREC)
    dq_ = tl.dot((G_ * dweights).to(OP), k_, dq_, input_precision=PREC)
    store_rows(dq, dq_, row, H, length, D, BC, BD)

    # the two products again with j along the rows: no product is transposed as the left operand of another
    weights_T = G_T * upper(tl.dot(k_, tl.trans(q_), input_precision=PREC), BC)
    store_rows(du, tl.dot(weights_T.to(OP), dy_op, input_precision=PREC), row, H, length, D, BC, BD)
    dscores_T = G_T * upper(tl.dot(u, tl.trans(dy_op), input_precision=PREC), BC)
    store_rows(dk, tl.dot(dscores_T.to(OP), q_, input_precision=PREC), row, H, length, D, BC, BD)

"""The `output` stage: what each token reads, all blocks in parallel."""

import triton
import triton.language as tl

from titans.kernels.device import (
    block_span,
    inner_gradient,
    less_mean,
    load_column,
    load_rows,
    load_square,
    load_width,
    mean,
    norm,
    sequence_of,
    sequence_span,
    store_column,
    store_rows,
    store_square,
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


@triton.jit(do_not_specialize=["T", "H", "C", "S", "slack", "PER"])
def output_kernel(
    q, k, v, w, b, rows, G, M0, S0, x, r_norm, cu_seqlens, offset, sequence,
    o,  # out: (B, T, H, D)
    T, H, C, S, slack, PER, eps,
    D: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr, NORM: tl.constexpr,
    PACKED: tl.constexpr, RESUMED: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Eq. (11) and (5): y_t = beta_t q_t M0 + f_t q_t S0 - 2 sum_j G_tj (q_t . k_j) u_j;  o = y + norm(y) w + b.

    Grid: (K H,).
    Reads: q, k, v, w, b, coefficients, M0, S0, x and r of `state_kernel`.
    Writes: o.
    """
    pid = tl.program_id(0)
    slot, h = pid // H, pid % H
    pid = pid.to(tl.int64)
    n_seq = sequence_of(slot, sequence, S, PACKED)
    if n_seq < 0:
        return
    begin, L, r, base = sequence_span(n_seq, cu_seqlens, offset, T, C * PER, S, slack, NB, PACKED, RESUMED)
    first, length = block_span(r // BC + (slot - base).to(tl.int32), L, r, C * PER, NB, BC)
    if length <= 0:
        return
    row = (begin + first) * H + h
    q_ = load_rows(q, row, H, length, D, BC, BD, OP)
    k_ = load_rows(k, row, H, length, D, BC, BD, OP)
    w_ = load_width(w, h, D, BD) if NORM else 1.0
    b_ = load_width(b, h, D, BD) if NORM else 0.0
    target = load_rows(v, row, H, length, D, BC, BD, tl.float32)
    if NORM:
        target -= k_.to(tl.float32)
    x_ = load_rows(x, row, H, length, D, BC, BD, tl.float32)
    if NORM:
        u, _, _ = inner_gradient(x_, load_column(r_norm, row, H, length, BC), target, w_, b_, D, BD)
    else:
        u = x_ - target
    beta = load_column(rows, pid * 2 * BC, 1, length, BC)
    f = load_column(rows, (pid * 2 + 1) * BC, 1, length, BC)
    # what is above the diagonal may overflow, and must not meet the zeros of G there
    scores = lower(tl.dot(q_, tl.trans(k_), input_precision=PREC), BC)
    weights = -2 * load_lower(G, pid, length, BC) * scores
    y = beta * tl.dot(q_, load_square(M0, pid, D, BD, OP), input_precision=PREC)
    y += f * tl.dot(q_, load_square(S0, pid, D, BD, OP), input_precision=PREC)
    if SPLIT:
        # a u that is not finite must not meet the zeros, either: it is NaN from its own row on
        finite = tl.abs(u) < float("inf")
        wrong = tl.max(tl.where(finite, 0, 1), 1)
        u = tl.where(finite, u, 0.0)
        reached = tl.max(lower(wrong[None, :] + tl.zeros((BC, BC), tl.int32), BC), 1)
        y = tl.where((reached > 0)[:, None], float("nan"), y)
    y = tl.dot(weights.to(OP), u.to(OP), y, input_precision=PREC)
    if NORM:
        x_y, _ = norm(y, eps, D, BD)
        y += x_y * w_ + b_
    store_rows(o, y, row, H, length, D, BC, BD)


@triton.jit(do_not_specialize=["T", "H", "C", "S", "slack", "PER"])
def output_vjp_kernel(
    q, k, v, w, b, rows, G, M0, S0, x, r_norm, cu_seqlens, offset, sequence, do,
    dG,  # out: like G; it may be the memory of G
    means, dq, du, dk, dM0, dS0,  # out: (B, T, H, 2), (B, T, H, D) thrice, (K, H, D, D) twice
    drows, dw, db,  # out: like rows, (K, H, D) twice
    T, H, C, S, slack, PER, eps,
    D: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr, NORM: tl.constexpr,
    PACKED: tl.constexpr, RESUMED: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Eq. (14): the reverse of `output_kernel`.

    Grid: (K H,).
    Reads: q, k, v, w, b, coefficients, M0, S0, x and r of `state_kernel`, do.
    Writes: mean e and mean e x of (2), dq, the parts of du, dk, dM0 and dS0 that come through the outputs, drows, dG,
    dw and db of the block.
    """
    pid = tl.program_id(0)
    slot, h = pid // H, pid % H
    pid = pid.to(tl.int64)
    n_seq = sequence_of(slot, sequence, S, PACKED)
    if n_seq < 0:
        return
    begin, L, r, base = sequence_span(n_seq, cu_seqlens, offset, T, C * PER, S, slack, NB, PACKED, RESUMED)
    first, length = block_span(r // BC + (slot - base).to(tl.int32), L, r, C * PER, NB, BC)
    if length <= 0:
        return
    row = (begin + first) * H + h
    offs_t = tl.arange(0, BC)
    offs_d = tl.arange(0, BD)
    k_ = load_rows(k, row, H, length, D, BC, BD, OP)
    w_ = load_width(w, h, D, BD) if NORM else 1.0
    b_ = load_width(b, h, D, BD) if NORM else 0.0
    target = load_rows(v, row, H, length, D, BC, BD, tl.float32)
    x_ = load_rows(x, row, H, length, D, BC, BD, tl.float32)
    if NORM:
        target -= k_.to(tl.float32)
        u, mean_e, c = inner_gradient(x_, load_column(r_norm, row, H, length, BC), target, w_, b_, D, BD)
        store_column(means, mean_e, row * 2, H * 2, length, BC)
        store_column(means, c, row * 2 + 1, H * 2, length, BC)
    else:
        u = x_ - target
    u_op = u.to(OP)

    # (5) and (11)
    q_ = load_rows(q, row, H, length, D, BC, BD, OP)
    M0_, S0_ = load_square(M0, pid, D, BD, OP), load_square(S0, pid, D, BD, OP)
    beta = load_column(rows, pid * 2 * BC, 1, length, BC)
    f = load_column(rows, (pid * 2 + 1) * BC, 1, length, BC)
    dy = load_rows(do, row, H, length, D, BC, BD, tl.float32)
    scores = lower(tl.dot(q_, tl.trans(k_), input_precision=PREC), BC)
    if NORM:
        y = beta * tl.dot(q_, M0_, input_precision=PREC) + f * tl.dot(q_, S0_, input_precision=PREC)
        weights = -2 * load_lower(G, pid, length, BC) * scores
        y = tl.dot(weights.to(OP), u_op, y, input_precision=PREC)
        x_y, r_y = norm(y, eps, D, BD)
        tl.store(dw + pid * D + offs_d, tl.sum(dy * x_y, 0), mask=offs_d < D)
        tl.store(db + pid * D + offs_d, tl.sum(dy, 0), mask=offs_d < D)
        dx = dy * w_
        dcentred = r_y * (dx - x_y * mean(dx * x_y, D))
        dy += less_mean(dcentred, mean(dcentred, D), D, BD)

    # (14)
    dy_op = dy.to(OP)
    q32 = q_.to(tl.float32)
    dy_M = tl.dot(dy_op, tl.trans(M0_), input_precision=PREC)
    tl.store(drows + pid * 2 * BC + offs_t, tl.sum(dy_M * q32, 1))
    dq_ = beta * dy_M
    dy_S = tl.dot(dy_op, tl.trans(S0_), input_precision=PREC)
    tl.store(drows + (pid * 2 + 1) * BC + offs_t, tl.sum(dy_S * q32, 1))
    dq_ += f * dy_S
    q_T = tl.trans(q_)
    store_square(dM0, tl.dot(q_T, (beta * dy).to(OP), input_precision=PREC), pid, D, BD)
    store_square(dS0, tl.dot(q_T, (f * dy).to(OP), input_precision=PREC), pid, D, BD)

    G_ = -2 * load_lower(G, pid, length, BC)
    dweights = lower(tl.dot(dy_op, tl.trans(u_op), input_precision=PREC), BC)
    dq_ = tl.dot((G_ * dweights).to(OP), k_, dq_, input_precision=PREC)
    store_rows(dq, dq_, row, H, length, D, BC, BD)
    # the two products again with j along the rows: no product is transposed as the left operand of another
    G_T = tl.trans(G_)
    weights_T = G_T * upper(tl.dot(k_, tl.trans(q_), input_precision=PREC), BC)
    store_rows(du, tl.dot(weights_T.to(OP), dy_op, input_precision=PREC), row, H, length, D, BC, BD)
    dscores_T = G_T * upper(tl.dot(u_op, tl.trans(dy_op), input_precision=PREC), BC)
    store_rows(dk, tl.dot(dscores_T.to(OP), q_, input_precision=PREC), row, H, length, D, BC, BD)
    # G has been read by every thread
    tl.debug_barrier()
    at = pid * BC * BC + (offs_t[:, None] * BC + offs_t[None, :])
    tl.store(dG + at, -2 * dweights * scores, mask=offs_t[None, :] <= offs_t[:, None])

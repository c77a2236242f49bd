"""The `state` stage: the chain of steps, one program per sequence and head, M and S in float32 registers."""

import triton
import triton.language as tl

from titans.kernels.device import (
    block_count,
    block_span,
    chunk_start,
    inner_gradient,
    inner_residual,
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
from titans.kernels.output import load_before, load_before_transposed


@triton.jit
def load_ends(ends, end, at, sub, skip, length, PER, BC: tl.constexpr, BS: tl.constexpr):
    """n_L, G_L (BS, 1) and beta_L, f_L, m_L of chunk `sub` of block `at`, whose tokens begin in row `skip`."""
    n_L = load_column(ends, at * 2 * BC + skip, 1, length, BS)
    G_L = load_column(ends, (at * 2 + 1) * BC + skip, 1, length, BS)
    at = (at * PER + sub) * 3
    beta_L = tl.load(end + at)
    f_L = tl.load(end + at + 1)
    m_L = tl.load(end + at + 2)
    return n_L, G_L, beta_L, f_L, m_L


@triton.jit
def step_place(i, r, C, PER, SPLIT: tl.constexpr):
    """Block of step i, which of the block's chunks it is, and the row of the block in which it begins."""
    if SPLIT:
        block = i // PER
        sub = i - block * PER
        row = tl.maximum(i * C - tl.maximum(block * PER * C, r), 0)
    else:
        block, sub, row = i, i * 0, i * 0
    return block, sub, row


@triton.jit(do_not_specialize=["T", "H", "C", "S", "slack", "PER"])
def state_kernel(
    k, v, w, b, ends, end, M_in, S_in, anchor_in, cu_seqlens, offset,
    M0, S0, x, r_norm, M_out, S_out, anchor_out,  # out: (K, H, D, D) 2x, (B, T, H, D), (B, T, H), (N, H, D, D) 3x
    T, H, C, S, slack, PER, eps,
    D: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
    NORM: tl.constexpr, PACKED: tl.constexpr, RESUMED: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Eq. (8)-(10): u = u(k A), M <- beta_L M + f_L S - 2 k^T (G_L u), S <- m_L S - 2 k^T (n_L u); A = M at each chunk.

    Grid: (N H,).
    Reads: k, v, w, b, coefficients of the steps' ends, the initial state.
    Writes: M0, S0 of each block, x and r of (2) (x = k A in the plain memory), the final state.
    """
    pid = tl.program_id(0)
    n_seq, h = pid // H, pid % H
    pid = pid.to(tl.int64)
    begin, L, r, base = sequence_span(n_seq, cu_seqlens, offset, T, C * PER, S, slack, NB, PACKED, RESUMED)
    steps = block_count(L, r, C, NB, BS)
    last_chunk = (r + L - 1) // C
    full = (r + L) % C == 0
    M = load_square(M_in, pid, D, BD, tl.float32)
    S_ = load_square(S_in, pid, D, BD, tl.float32)
    anchor = load_square(anchor_in, pid, D, BD, tl.float32)
    store_square(anchor_out, anchor, pid, D, BD)
    A = anchor.to(OP)
    w_ = load_width(w, h, D, BD) if NORM else 1.0
    b_ = load_width(b, h, D, BD) if NORM else 0.0
    base -= r // BC

    for s in tl.range(0, steps, num_stages=STAGES):
        i = r // BS + s
        first, length = block_span(i, L, r, C, NB, BS)
        row = (begin + first) * H + h
        k_ = load_rows(k, row, H, length, D, BS, BD, OP)
        target = load_rows(v, row, H, length, D, BS, BD, tl.float32)
        block, sub, skip = step_place(i, r, C, PER, SPLIT)
        at = (base + block) * H + h
        n_L, G_L, beta_L, f_L, m_L = load_ends(ends, end, at, sub, skip, length, PER, BC, BS)
        if (sub == 0) | (SPLIT == 0):
            store_square(M0, M, at, D, BD)
            store_square(S0, S_, at, D, BD)
        y = tl.dot(k_, A, input_precision=PREC)
        if NORM:
            target -= k_.to(tl.float32)
            x_, r_ = norm(y, eps, D, BD)
            u, _, _ = inner_gradient(x_, r_, target, w_, b_, D, BD)
            store_column(r_norm, r_, row, H, length, BS)
        else:
            x_ = y
            u = y - target
        k_T = tl.trans(k_)
        M = tl.dot(k_T, (-2 * G_L * u).to(OP), beta_L * M + f_L * S_, input_precision=PREC)
        S_ = tl.dot(k_T, (-2 * n_L * u).to(OP), m_L * S_, input_precision=PREC)
        store_rows(x, x_, row, H, length, D, BS, BD)
        if NB == 1:
            A = M.to(OP)
        else:
            A = tl.where((i + 1) % NB == 0, M.to(OP), A)
        # the final anchor is the M that the last chunk starts from, or that a full one leaves
        if ((i + 1) % NB == 0) & ((i + 1) // NB == last_chunk) | (s == steps - 1) & full:
            store_square(anchor_out, M, pid, D, BD)
    store_square(M_out, M, pid, D, BD)
    store_square(S_out, S_, pid, D, BD)


@triton.jit(do_not_specialize=["T", "H", "C", "S", "slack", "PER"])
def state_vjp_kernel(
    k, v, w, b, ends, end, x, r_norm, means, cu_seqlens, offset,
    dM_out, dS_out, danchor_out,  # in: cotangents of the final state
    du, dM0, dS0,  # in and out: parts through outputs; du becomes de (dy_k in the plain memory)
    dy_k, dM_in, dS_in, danchor_in,  # out: (B, T, H, D), (N, H, D, D) thrice
    T, H, C, S, slack, PER,
    D: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
    NORM: tl.constexpr, PACKED: tl.constexpr, RESUMED: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Eq. (15), (12), (17), (18): the reverse of `state_kernel`, last step first, carrying dM and dS.

    Grid: (N H,).
    Reads: k, v, w, b, coefficients, x, r and the means of (2); du, dM0 and dS0 as far as they come from outputs.
    Writes: dM0 and dS0 of each block, de, the cotangent of y = k A, and those of the initial state.
    """
    pid = tl.program_id(0)
    n_seq, h = pid // H, pid % H
    pid = pid.to(tl.int64)
    begin, L, r, base = sequence_span(n_seq, cu_seqlens, offset, T, C * PER, S, slack, NB, PACKED, RESUMED)
    steps = block_count(L, r, C, NB, BS)
    last_chunk = (r + L - 1) // C
    danchor = load_square(danchor_out, pid, D, BD, tl.float32)
    # a full last chunk leaves its M as the anchor
    full = (L > 0) & ((r + L) % C == 0)
    dM = load_square(dM_out, pid, D, BD, tl.float32) + tl.where(full, danchor, 0.0)
    dS = load_square(dS_out, pid, D, BD, tl.float32)
    if L == 0:
        store_square(danchor_in, danchor, pid, D, BD)
    w_ = load_width(w, h, D, BD) if NORM else 1.0
    b_ = load_width(b, h, D, BD) if NORM else 0.0
    if NB > 1:
        dA = tl.zeros((BD, BD), tl.float32)
    base -= r // BC

    for back in tl.range(0, steps, num_stages=STAGES):
        s = steps - 1 - back
        i = r // BS + s
        first, length = block_span(i, L, r, C, NB, BS)
        row = (begin + first) * H + h
        k_ = load_rows(k, row, H, length, D, BS, BD, OP)
        du_ = load_rows(du, row, H, length, D, BS, BD, tl.float32)
        block, sub, skip = step_place(i, r, C, PER, SPLIT)
        at = (base + block) * H + h
        n_L, G_L, beta_L, f_L, m_L = load_ends(ends, end, at, sub, skip, length, PER, BC, BS)
        # (15)
        du_ -= 2 * n_L * tl.dot(k_, dS.to(OP), input_precision=PREC)
        du_ -= 2 * G_L * tl.dot(k_, dM.to(OP), input_precision=PREC)
        if NORM:
            # (12)
            target = load_rows(v, row, H, length, D, BS, BD, tl.float32) - k_.to(tl.float32)
            x_ = load_rows(x, row, H, length, D, BS, BD, tl.float32)
            r_ = load_column(r_norm, row, H, length, BS)
            mean_e = load_column(means, row * 2, H * 2, length, BS)
            c = load_column(means, row * 2 + 1, H * 2, length, BS)
            _, e = inner_residual(x_, target, w_, b_)
            dg = du_ * r_
            dr = mean(du_ * (less_mean(e, mean_e, D, BD) - x_ * c), D)
            dc = -mean(dg * x_, D)
            de = less_mean(dg, mean(dg, D), D, BD) + dc * x_
            dx = dc * e - dg * c + de * w_ * w_
            # x has mean 0
            dy = r_ * (less_mean(dx, mean(dx, D), D, BD) - x_ * mean(dx * x_, D)) - x_ * (r_ * r_ * dr)
            store_rows(du, de, row, H, length, D, BS, BD)
        else:
            dy = du_
            store_rows(du, du_, row, H, length, D, BS, BD)
        store_rows(dy_k, dy, row, H, length, D, BS, BD)

        # (17), (18)
        dS = f_L * dM + m_L * dS
        if NB == 1:
            dA = tl.dot(tl.trans(k_), dy.to(OP), input_precision=PREC)
        else:
            dA = tl.dot(tl.trans(k_), dy.to(OP), dA, input_precision=PREC)
        dM = beta_L * dM
        if (i % NB == 0) | (s == 0):
            if (i // NB == last_chunk) & (full == 0):
                dA += load_square(danchor_out, pid, D, BD, tl.float32)
            if i // NB == 0:
                store_square(danchor_in, dA, pid, D, BD)
            else:
                # the anchor of this chunk is the memory it starts from
                dM += dA
            if NB > 1:
                dA = tl.zeros((BD, BD), tl.float32)
        if (sub == 0) | (SPLIT == 0):
            # what comes through the outputs is read by every thread before the whole is written
            dM += load_square(dM0, at, D, BD, tl.float32)
            dS += load_square(dS0, at, D, BD, tl.float32)
            store_square(dM0, dM, at, D, BD)
            store_square(dS0, dS, at, D, BD)
    store_square(dM_in, dM, pid, D, BD)
    store_square(dS_in, dS, pid, D, BD)


@triton.jit(do_not_specialize=["T", "H", "C", "S", "slack", "PER"])
def key_vjp_kernel(
    k, v, w, b, rows, G, block_ends, anchor_in, cu_seqlens, offset, sequence, M0, S0, x, r_norm, means,
    dM_out, dS_out, danchor_out, dM0, dS0, dy_k, de, dk_part,  # in: what `state_vjp_kernel` knows, dk through outputs
    dk, dv,  # out: (B, T, H, D); they may be the memory of dk_part and de
    dw, db,  # in and out: (K, H, D), added to
    drows_k, dG_k, dends, dend,  # out: like rows, G, block_ends and block_end
    T, H, C, S, slack, PER,
    D: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr, NORM: tl.constexpr,
    PACKED: tl.constexpr, RESUMED: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Eq. (16), (20): what the cotangents along the chain make of each block's k, v, w, b and coefficients.

    Grid: (K H,).
    Reads: k, v, w, b, coefficients, M0, S0, dM0 and dS0 of the next block, dy of k A, de.
    Writes: dk, dv, dw and db of the block, and the cotangents of its coefficients but for those through outputs.
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
    mask_t = offs_t < length
    k_ = load_rows(k, row, H, length, D, BC, BD, OP)
    target = load_rows(v, row, H, length, D, BC, BD, tl.float32)
    x_ = load_rows(x, row, H, length, D, BC, BD, tl.float32)
    de_ = load_rows(de, row, H, length, D, BC, BD, tl.float32)
    dk_ = load_rows(dk_part, row, H, length, D, BC, BD, tl.float32)
    w_ = load_width(w, h, D, BD) if NORM else 1.0
    b_ = load_width(b, h, D, BD) if NORM else 0.0
    if NORM:
        target -= k_.to(tl.float32)
        z, e = inner_residual(x_, target, w_, b_)
        r_ = load_column(r_norm, row, H, length, BC)
        mean_e = load_column(means, row * 2, H * 2, length, BC)
        c = load_column(means, row * 2 + 1, H * 2, length, BC)
        u = r_ * (less_mean(e, mean_e, D, BD) - x_ * c)
        dz = de_ * w_
        at_d, in_d = pid * D + offs_d, offs_d < D
        tl.store(dw + at_d, tl.load(dw + at_d, mask=in_d) + tl.sum(de_ * (z + w_ * x_), 0), mask=in_d)
        tl.store(db + at_d, tl.load(db + at_d, mask=in_d) + tl.sum(dz, 0), mask=in_d)
        dk_ += dz
    else:
        u = x_ - target
        dz = de_
    u_op = u.to(OP)
    tl.debug_barrier()
    store_rows(dv, -dz, row, H, length, D, BC, BD)

    # the anchor of the chunk that the block starts in
    if i // NB == 0:
        A = load_square(anchor_in, n_seq.to(tl.int64) * H + h, D, BD, OP)
    else:
        A = load_square(M0, (base + i // NB * NB - r // BC) * H + h, D, BD, OP)
    dy_ = load_rows(dy_k, row, H, length, D, BC, BD, OP)
    if SPLIT:
        start = chunk_start(offs_t, r, C, i)
        later = mask_t & (start > 0)
        dk_ = tl.dot(tl.where(later[:, None], 0.0, dy_).to(OP), tl.trans(A), dk_, input_precision=PREC)
    else:
        dk_ = tl.dot(dy_, tl.trans(A), dk_, input_precision=PREC)

    last = first + length == L
    if last:
        dM = load_square(dM_out, n_seq.to(tl.int64) * H + h, D, BD, tl.float32)
        if (r + L) % C == 0:
            dM += load_square(danchor_out, n_seq.to(tl.int64) * H + h, D, BD, tl.float32)
        dS = load_square(dS_out, n_seq.to(tl.int64) * H + h, D, BD, tl.float32)
    else:
        dM = load_square(dM0, pid + H, D, BD, tl.float32)
        dS = load_square(dS0, pid + H, D, BD, tl.float32)
    k32 = k_.to(tl.float32)
    n_L = load_column(block_ends, pid * 2 * BC, 1, length, BC)
    G_L = load_column(block_ends, (pid * 2 + 1) * BC, 1, length, BC)
    u_dM = -2 * tl.dot(u_op, tl.trans(dM.to(OP)), input_precision=PREC)
    tl.store(dends + (pid * 2 + 1) * BC + offs_t, tl.sum(u_dM * k32, 1))
    dk_ += G_L * u_dM
    u_dS = -2 * tl.dot(u_op, tl.trans(dS.to(OP)), input_precision=PREC)
    tl.store(dends + pid * 2 * BC + offs_t, tl.sum(u_dS * k32, 1))
    dk_ += n_L * u_dS

    M0_, S0_ = load_square(M0, pid, D, BD, tl.float32), load_square(S0, pid, D, BD, tl.float32)
    tl.store(dend + pid * 3, tl.sum(tl.sum(dM * M0_, 1), 0))
    tl.store(dend + pid * 3 + 1, tl.sum(tl.sum(dM * S0_, 1), 0))
    tl.store(dend + pid * 3 + 2, tl.sum(tl.sum(dS * S0_, 1), 0))

    if SPLIT:
        # (20): later chunks of the block read the memory that their chunk starts from
        at = pid * 2 * BC + start - 1
        beta = tl.load(rows + at, mask=later, other=0.0)
        f = tl.load(rows + BC + at, mask=later, other=0.0)
        # so does the final anchor, where a chunk is unfinished
        dG_anchor = tl.zeros((BC,), tl.float32)
        dbeta_anchor, df_anchor = 0.0, 0.0
        s = chunk_start(length - 1, r, C, i)
        if last & (s > 0) & ((r + L) % C != 0):
            danchor = load_square(danchor_out, n_seq.to(tl.int64) * H + h, D, BD, tl.float32)
            u_danchor = -2 * tl.dot(u_op, tl.trans(danchor.to(OP)), input_precision=PREC)
            dG_anchor += tl.sum(u_danchor * k32, 1)
            dbeta_anchor += tl.sum(tl.sum(danchor * M0_, 1), 0)
            df_anchor += tl.sum(tl.sum(danchor * S0_, 1), 0)
            dk_ += load_column(G, (pid * BC + s - 1) * BC, 1, s, BC) * u_danchor
        ends = offs_t == length - 1
        dy_M = tl.dot(dy_, tl.trans(M0_.to(OP)), input_precision=PREC)
        drow = tl.where(later, tl.sum(dy_M * k32, 1), 0.0)
        tl.store(drows_k + pid * 2 * BC + offs_t, drow + tl.where(ends, dbeta_anchor, 0.0))
        dk_ += beta[:, None] * dy_M
        dy_S = tl.dot(dy_, tl.trans(S0_.to(OP)), input_precision=PREC)
        drow = tl.where(later, tl.sum(dy_S * k32, 1), 0.0)
        tl.store(drows_k + (pid * 2 + 1) * BC + offs_t, drow + tl.where(ends, df_anchor, 0.0))
        dk_ += f[:, None] * dy_S
        before = offs_t[None, :] < start[:, None]
        scores = tl.where(before, tl.dot(k_, tl.trans(k_), input_precision=PREC), 0.0)
        dweights = tl.where(before, tl.dot(dy_, tl.trans(u_op), input_precision=PREC), 0.0)
        dG_ = -2 * dweights * scores + tl.where(ends[:, None], dG_anchor[None, :], 0.0)
        tl.store(dG_k + pid * BC * BC + (offs_t[:, None] * BC + offs_t[None, :]), dG_, mask=before)
        G_ = -2 * load_before(G, pid, start, length, BC)
        dk_ = tl.dot((G_ * dweights).to(OP), k_, dk_, input_precision=PREC)
        before_T = offs_t[:, None] < start[None, :]
        dweights_T = tl.where(before_T, tl.dot(u_op, tl.trans(dy_), input_precision=PREC), 0.0)
        G_T = -2 * load_before_transposed(G, pid, start, length, BC)
        dk_ = tl.dot((G_T * dweights_T).to(OP), k_, dk_, input_precision=PREC)
    store_rows(dk, dk_, row, H, length, D, BC, BD)

"""The `state` stage: the chain of blocks, one program per sequence and head, M and S in float32 registers."""

import triton
import triton.language as tl

from titans.kernels.device import (
    block_count,
    block_span,
    inner_gradient,
    inner_residual,
    less_mean,
    load_rows,
    load_square,
    load_width,
    mean,
    sequence_of,
    sequence_span,
    store_rows,
    store_square,
)


@triton.jit(do_not_specialize=["T", "H", "C", "S", "slack"])
def state_kernel(
    k, v, w, b, ends, end, M_in, S_in, anchor_in, cu_seqlens, offset,
    M0, S0, u, M_out, S_out, anchor_out,  # out: (K, H, D, D) twice, (B, T, H, D), (N, H, D, D) thrice
    T, H, C, S, slack, eps,
    D: tl.constexpr, BD: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr, NORM: tl.constexpr,
    PACKED: tl.constexpr, RESUMED: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Eq. (8)-(10): u = u(k A), M <- beta_L M + f_L S - 2 k^T (G_L u), S <- m_L S - 2 k^T (n_L u); A = M at each chunk.

    Grid: (N H,).
    Reads: k, v, w, b, coefficients of the blocks' ends, the initial state.
    Writes: M0, S0 of each block, u, the final state.
    """
    pid = tl.program_id(0).to(tl.int64)
    n_seq, h = pid // H, pid % H
    begin, L, r, base = sequence_span(n_seq, cu_seqlens, offset, T, C, S, slack, NB, PACKED, RESUMED)
    blocks = block_count(L, r, C, NB, BC)
    last_chunk = (r + L - 1) // C
    offs_t = tl.arange(0, BC)
    M = load_square(M_in, pid, D, BD, tl.float32)
    S_ = load_square(S_in, pid, D, BD, tl.float32)
    A32 = load_square(anchor_in, pid, D, BD, tl.float32)
    store_square(anchor_out, A32, pid, D, BD)
    A = A32.to(OP)
    w_ = load_width(w, h, D, BD) if NORM else 1.0
    b_ = load_width(b, h, D, BD) if NORM else 0.0

    for step in tl.range(0, blocks, num_stages=STAGES):
        i = r // BC + step
        first, length = block_span(i, L, r, C, NB, BC)
        at = (base + step) * H + h
        row = (begin + first) * H + h
        k_ = load_rows(k, row, H, length, D, BC, BD, OP)
        target = load_rows(v, row, H, length, D, BC, BD, tl.float32)
        mask_t = offs_t < length
        n_L = tl.load(ends + at * 2 * BC + offs_t, mask=mask_t, other=0.0)[:, None]
        G_L = tl.load(ends + (at * 2 + 1) * BC + offs_t, mask=mask_t, other=0.0)[:, None]
        beta_L, f_L, m_L = tl.load(end + at * 3), tl.load(end + at * 3 + 1), tl.load(end + at * 3 + 2)
        store_square(M0, M, at, D, BD)
        store_square(S0, S_, at, D, BD)

        if NORM:
            target -= k_.to(tl.float32)
        u_ = inner_gradient(tl.dot(k_, A, input_precision=PREC), target, w_, b_, eps, D, BD, NORM)
        store_rows(u, u_, row, H, length, D, BC, BD)
        k_T = tl.trans(k_)
        M = tl.dot(k_T, (-2 * G_L * u_).to(OP), beta_L * M + f_L * S_, input_precision=PREC)
        S_ = tl.dot(k_T, (-2 * n_L * u_).to(OP), m_L * S_, input_precision=PREC)
        if NB == 1:
            A = M.to(OP)
        else:
            A = tl.where((i + 1) % NB == 0, M.to(OP), A)
        # the final anchor is the M that the last chunk starts from, or that a full one leaves
        if ((i + 1) % NB == 0) & ((i + 1) // NB == last_chunk) | (step == blocks - 1) & ((r + L) % C == 0):
            store_square(anchor_out, M, pid, D, BD)
    store_square(M_out, M, pid, D, BD)
    store_square(S_out, S_, pid, D, BD)


@triton.jit(do_not_specialize=["T", "H", "C", "S", "slack"])
def state_vjp_kernel(
    q, k, v, w, b, ends, end, rows, x, stats, cu_seqlens, offset,
    dM_out, dS_out, danchor_out,  # in: cotangents of the final state
    dy, du,  # in and out: dy of the outputs becomes that of y = k A, du becomes de (du in the plain memory)
    dM, dS, dM_in, dS_in, danchor_in,  # out: (K, H, D, D) twice, (N, H, D, D) thrice
    T, H, C, S, slack,
    D: tl.constexpr, BD: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr, NORM: tl.constexpr,
    PACKED: tl.constexpr, RESUMED: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Eq. (15), (12), (17), (18): the reverse of `state_kernel`, last block first, carrying dM, dS and the anchor's dA.

    Grid: (N H,).
    Reads: q, k, v, w, b, coefficients, x and stats of `output_vjp_kernel`, dy and du as far as they come from outputs.
    Writes: dM and dS leaving each block, de, the cotangent of k A, and those of the initial state.
    """
    pid = tl.program_id(0).to(tl.int64)
    n_seq, h = pid // H, pid % H
    begin, L, r, base = sequence_span(n_seq, cu_seqlens, offset, T, C, S, slack, NB, PACKED, RESUMED)
    blocks = block_count(L, r, C, NB, BC)
    offs_t = tl.arange(0, BC)
    dM_ = load_square(dM_out, pid, D, BD, tl.float32)
    dS_ = load_square(dS_out, pid, D, BD, tl.float32)
    dA = load_square(danchor_out, pid, D, BD, tl.float32)
    if (L > 0) & ((r + L) % C == 0):
        dM_ += dA
        dA = tl.zeros((BD, BD), tl.float32)
    w_ = load_width(w, h, D, BD) if NORM else 1.0
    b_ = load_width(b, h, D, BD) if NORM else 0.0

    for back in tl.range(0, blocks, num_stages=STAGES):
        step = blocks - 1 - back
        i = r // BC + step
        first, length = block_span(i, L, r, C, NB, BC)
        at = (base + step) * H + h
        row = (begin + first) * H + h
        k_ = load_rows(k, row, H, length, D, BC, BD, OP)
        q_ = load_rows(q, row, H, length, D, BC, BD, OP)
        dy_ = load_rows(dy, row, H, length, D, BC, BD, tl.float32)
        du_ = load_rows(du, row, H, length, D, BC, BD, tl.float32)
        mask_t = offs_t < length
        beta = tl.load(rows + at * 2 * BC + offs_t, mask=mask_t, other=0.0)[:, None]
        f = tl.load(rows + (at * 2 + 1) * BC + offs_t, mask=mask_t, other=0.0)[:, None]
        n_L = tl.load(ends + at * 2 * BC + offs_t, mask=mask_t, other=0.0)[:, None]
        G_L = tl.load(ends + (at * 2 + 1) * BC + offs_t, mask=mask_t, other=0.0)[:, None]
        beta_L, f_L, m_L = tl.load(end + at * 3), tl.load(end + at * 3 + 1), tl.load(end + at * 3 + 2)

        # (15)
        dM_op, dS_op = dM_.to(OP), dS_.to(OP)
        store_square(dM, dM_op, at, D, BD)
        store_square(dS, dS_op, at, D, BD)
        du_ -= 2 * (n_L * tl.dot(k_, dS_op, input_precision=PREC) + G_L * tl.dot(k_, dM_op, input_precision=PREC))
        if NORM:
            # (12)
            target = load_rows(v, row, H, length, D, BC, BD, tl.float32) - k_.to(tl.float32)
            x_ = load_rows(x, row, H, length, D, BC, BD, tl.float32)
            r_ = tl.load(stats + at * 3 * BC + offs_t, mask=mask_t, other=0.0)[:, None]
            mean_e = tl.load(stats + (at * 3 + 1) * BC + offs_t, mask=mask_t, other=0.0)[:, None]
            c = tl.load(stats + (at * 3 + 2) * BC + offs_t, mask=mask_t, other=0.0)[:, None]
            _, e = inner_residual(x_, target, w_, b_)
            dg = du_ * r_
            dr = tl.sum(du_ * (less_mean(e, mean_e, D, BD) - x_ * c), 1)[:, None]
            dc = -mean(dg * x_, D)
            de = less_mean(dg, mean(dg, D), D, BD) + dc * x_
            dx = dc * e - dg * c + de * w_ * w_
            # x has mean 0
            dy_k = r_ * (less_mean(dx, mean(dx, D), D, BD) - x_ * mean(dx * x_, D)) - x_ * (r_ * r_ * dr / D)
            store_rows(du, de, row, H, length, D, BC, BD)
        else:
            dy_k = du_
            store_rows(du, du_, row, H, length, D, BC, BD)
        store_rows(dy, dy_k, row, H, length, D, BC, BD)

        # (17), (18)
        q_T = tl.trans(q_)
        dS_ = tl.dot(q_T, (f * dy_).to(OP), f_L * dM_ + m_L * dS_, input_precision=PREC)
        dM_ = tl.dot(q_T, (beta * dy_).to(OP), beta_L * dM_, input_precision=PREC)
        dA = tl.dot(tl.trans(k_), dy_k.to(OP), dA, input_precision=PREC)
        if (i % NB == 0) & (i > 0):
            # the anchor of this chunk is the memory it starts from
            dM_ += dA
            dA = tl.zeros((BD, BD), tl.float32)
    store_square(dM_in, dM_, pid, D, BD)
    store_square(dS_in, dS_, pid, D, BD)
    store_square(danchor_in, dA, pid, D, BD)


@triton.jit(do_not_specialize=["T", "H", "C", "S", "slack"])
def key_vjp_kernel(
    k, v, w, b, ends, anchor_in, cu_seqlens, offset, sequence, M0, S0, x, stats,
    dM, dS, dy_k, de, dk_part,  # in: what `state_vjp_kernel` wrote, and dk as far as it comes from outputs
    dk, dv,  # out: (B, T, H, D); they may be the memory of dk_part and de
    dw, db,  # in and out: (K, H, D), added to
    dends, dend,  # out: like ends and end
    T, H, C, S, slack,
    D: tl.constexpr, BD: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr, NORM: tl.constexpr,
    PACKED: tl.constexpr, RESUMED: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Eq. (16): what the cotangents along the chain make of each block's k, v, w, b and coefficients.

    Grid: (K H,).
    Reads: k, v, w, b, coefficients, M0, S0, dM, dS, dy of k A, de.
    Writes: dk, dv, dw and db of the block, dends, dend.
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
    k_ = load_rows(k, row, H, length, D, BC, BD, tl.float32)
    target = load_rows(v, row, H, length, D, BC, BD, tl.float32)
    x_ = load_rows(x, row, H, length, D, BC, BD, tl.float32)
    de_ = load_rows(de, row, H, length, D, BC, BD, tl.float32)
    dk_ = load_rows(dk_part, row, H, length, D, BC, BD, tl.float32)
    if NORM:
        target -= k_
        w_ = load_width(w, h, D, BD)
        z, e = inner_residual(x_, target, w_, load_width(b, h, D, BD))
        r_ = tl.load(stats + pid * 3 * BC + offs_t, mask=mask_t, other=0.0)[:, None]
        mean_e = tl.load(stats + (pid * 3 + 1) * BC + offs_t, mask=mask_t, other=0.0)[:, None]
        c = tl.load(stats + (pid * 3 + 2) * BC + offs_t, mask=mask_t, other=0.0)[:, None]
        u = r_ * (less_mean(e, mean_e, D, BD) - x_ * c)
        dz = de_ * w_
        at_d, in_d = pid * D + offs_d, offs_d < D
        tl.store(dw + at_d, tl.load(dw + at_d, mask=in_d) + tl.sum(de_ * (z + w_ * x_), 0), mask=in_d)
        tl.store(db + at_d, tl.load(db + at_d, mask=in_d) + tl.sum(dz, 0), mask=in_d)
        dk_ += dz
    else:
        # x is y here
        u = x_ - target
        dz = de_
    tl.debug_barrier()
    store_rows(dv, -dz, row, H, length, D, BC, BD)

    u_op = u.to(OP)
    if i // NB == 0:
        A = load_square(anchor_in, n_seq * H + h, D, BD, OP)
    else:
        A = load_square(M0, (base + i // NB * NB - r // BC) * H + h, D, BD, OP)
    dk_ = tl.dot(load_rows(dy_k, row, H, length, D, BC, BD, OP), tl.trans(A), dk_, input_precision=PREC)
    n_L = -2 * tl.load(ends + pid * 2 * BC + offs_t, mask=mask_t, other=0.0)
    G_L = -2 * tl.load(ends + (pid * 2 + 1) * BC + offs_t, mask=mask_t, other=0.0)
    dM_ = load_square(dM, pid, D, BD, OP)
    u_dM = tl.dot(u_op, tl.trans(dM_), input_precision=PREC)
    tl.store(dends + (pid * 2 + 1) * BC + offs_t, -2 * tl.sum(u_dM * k_, 1))
    dk_ += G_L[:, None] * u_dM
    dS_ = load_square(dS, pid, D, BD, OP)
    u_dS = tl.dot(u_op, tl.trans(dS_), input_precision=PREC)
    tl.store(dends + pid * 2 * BC + offs_t, -2 * tl.sum(u_dS * k_, 1))
    dk_ += n_L[:, None] * u_dS
    store_rows(dk, dk_, row, H, length, D, BC, BD)

    M0_, S0_ = load_square(M0, pid, D, BD, tl.float32), load_square(S0, pid, D, BD, tl.float32)
    dM_, dS_ = dM_.to(tl.float32), dS_.to(tl.float32)
    tl.store(dend + pid * 3, tl.sum(tl.sum(dM_ * M0_, 1), 0))
    tl.store(dend + pid * 3 + 1, tl.sum(tl.sum(dM_ * S0_, 1), 0))
    tl.store(dend + pid * 3 + 2, tl.sum(tl.sum(dS_ * S0_, 1), 0))

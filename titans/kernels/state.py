"""The `state` stage: the chain of steps, one program per sequence and head, M and S in float32 registers."""

import triton
import triton.language as tl

from titans.kernels.device import (
    block_count,
    block_span,
    inner_gradient,
    inner_gradient_vjp,
    inner_residual,
    load_column,
    load_pairs,
    load_rows,
    load_square,
    load_width,
    norm,
    sequence_span,
    store_column,
    store_rows,
    store_square,
)


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
def load_raised(x, row, H, length, D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, RAISED: tl.constexpr):
    """`load_rows` in float32, if RAISED by a product with the unit matrix, which is exact in bfloat16.

    Triton keeps in shared memory what the steps to come need, laid out for products. What is no operand of one is read
    with conflicts between banks, which took a sixth of a step. Wide heads and long steps of the reverse lack registers.
    """
    if RAISED:
        offs = tl.arange(0, BS)
        unit = (offs[:, None] == offs[None, :]).to(tl.bfloat16)
        x_ = tl.dot(unit, load_rows(x, row, H, length, D, BS, BD, tl.bfloat16))
    else:
        x_ = load_rows(x, row, H, length, D, BS, BD, tl.float32)
    return x_


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
    RAISED: tl.constexpr = (OP == tl.bfloat16) and (BD <= 64)

    for s in tl.range(0, steps, num_stages=STAGES):
        i = r // BS + s
        first, length = block_span(i, L, r, C, NB, BS)
        row = (begin + first) * H + h
        k_ = load_rows(k, row, H, length, D, BS, BD, OP)
        target = load_raised(v, row, H, length, D, BS, BD, RAISED)
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
    du,  # in and out: the part through the outputs becomes the whole
    dM0, dS0,  # in: (K, H, D, D), the parts through the outputs
    dM_L, dS_L,  # out: of what each block leaves; where steps are blocks it may be the memory of dM0 and dS0
    dM_in, dS_in, danchor_in,  # out: (N, H, D, D) thrice
    T, H, C, S, slack, PER,
    D: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
    NORM: tl.constexpr, PACKED: tl.constexpr, RESUMED: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Eq. (15), (12), (17), (18): the reverse of `state_kernel`, last step first, carrying dM and dS.

    Grid: (N H,).
    Reads: k, v, w, b, coefficients, x, r and the means of (2); du, dM0 and dS0 as far as they come from outputs.
    Writes: dM_L and dS_L of each block, du, and the cotangents of the initial state.
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
    # an empty sequence passes its anchor on
    dA = tl.where(L > 0, 0.0, danchor)
    w_ = load_width(w, h, D, BD) if NORM else 1.0
    b_ = load_width(b, h, D, BD) if NORM else 0.0
    base -= r // BC
    RAISED: tl.constexpr = (OP == tl.bfloat16) and (BD <= 64) and (BS < 64)

    for back in tl.range(0, steps, num_stages=STAGES):
        s = steps - 1 - back
        i = r // BS + s
        first, length = block_span(i, L, r, C, NB, BS)
        row = (begin + first) * H + h
        k_ = load_rows(k, row, H, length, D, BS, BD, OP)
        du_ = load_raised(du, row, H, length, D, BS, BD, RAISED)
        block, sub, skip = step_place(i, r, C, PER, SPLIT)
        at = (base + block) * H + h
        n_L, G_L, beta_L, f_L, m_L = load_ends(ends, end, at, sub, skip, length, PER, BC, BS)
        if SPLIT & ((sub == PER - 1) | (back == 0)):
            store_square(dM_L, dM, at, D, BD)
            store_square(dS_L, dS, at, D, BD)
        # (15)
        du_ -= 2 * n_L * tl.dot(k_, dS.to(OP), input_precision=PREC)
        du_ -= 2 * G_L * tl.dot(k_, dM.to(OP), input_precision=PREC)
        # the whole of du, of which de and dy are made again in `key_vjp_kernel`
        store_rows(du, du_, row, H, length, D, BS, BD)
        if NORM:
            target = load_raised(v, row, H, length, D, BS, BD, RAISED) - k_.to(tl.float32)
            x_ = load_raised(x, row, H, length, D, BS, BD, RAISED)
            r_ = load_column(r_norm, row, H, length, BS)
            mean_e, c = load_pairs(means, row * 2, H * 2, length, BS)
            _, e = inner_residual(x_, target, w_, b_)
            _, dy = inner_gradient_vjp(du_, x_, r_, e, mean_e, c, w_, D, BD)
        else:
            dy = du_

        # (17), (18)
        if SPLIT == 0:
            # before dM_L and dS_L are written, which may be the same memory
            dM0_, dS0_ = load_square(dM0, at, D, BD, tl.float32), load_square(dS0, at, D, BD, tl.float32)
            store_square(dM_L, dM, at, D, BD)
            store_square(dS_L, dS, at, D, BD)
            dS = f_L * dM + m_L * dS + dS0_
            dM = beta_L * dM + dM0_
        else:
            dS = f_L * dM + m_L * dS
            dM = beta_L * dM
        if NB == 1:
            dA = tl.dot(tl.trans(k_), dy.to(OP), input_precision=PREC)
        else:
            dA = tl.dot(tl.trans(k_), dy.to(OP), dA, input_precision=PREC)
        if (i % NB == 0) | (s == 0):
            if (i // NB == last_chunk) & (full == 0):
                dA += load_square(danchor_out, pid, D, BD, tl.float32)
            # the anchor of every chunk but the first is the memory it starts from
            later = i // NB > 0
            dM += tl.where(later, dA, 0.0)
            if NB > 1:
                dA = tl.where(later, 0.0, dA)
        if SPLIT & (sub == 0):
            dM += load_square(dM0, at, D, BD, tl.float32)
            dS += load_square(dS0, at, D, BD, tl.float32)
    store_square(dM_in, dM, pid, D, BD)
    store_square(dS_in, dS, pid, D, BD)
    store_square(danchor_in, dA, pid, D, BD)

"""The `coefficients` stage: what a block makes of its initial state and of each of its tokens. One warp each."""

import triton
import triton.language as tl

from titans.kernels.device import block_span, chunk_start, element, load_gates, sequence_of, sequence_span


@triton.jit
def near_one(product, log, inside):
    """The product of some decays, from the sum of their logs where that is little.

    Each of these decays rounds to 1 or close to it, and the same error in every token would add up along a sequence.
    """
    total = tl.sum(tl.where(inside, log, 0.0), 0)
    return tl.where(total > -1, tl.exp(total), product)


@triton.jit
def store_end(end, at, beta, f, m):
    """Store beta_L, f_L and m_L."""
    tl.store(end + at * 3, beta)
    tl.store(end + at * 3 + 1, f)
    tl.store(end + at * 3 + 2, m)


@triton.jit(do_not_specialize=["T", "H", "C", "S", "slack", "PER"])
def coefficients_kernel(
    theta, alpha, eta, cu_seqlens, offset, sequence,  # gates (B, T, H)
    rows, G, block_ends, block_end,  # out: (K, H, 2, BC), (K, H, BC, BC), (K, H, 2, BC), (K, H, 3)
    ends, end,  # out: (K, H, 2, BC), (K, H, PER, 3); with one chunk to a block they are the two above
    T, H, C, S, slack, PER,
    SPLIT: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr, LOG: tl.constexpr, PACKED: tl.constexpr,
    RESUMED: tl.constexpr,
):  # fmt: skip
    """Eq. (7): n <- eta_t n, n_t = theta_t;  G <- a_t G + n;  the same for (m, f) and beta.

    Logs of gates are summed for beta and m, which hand the state from block to block, where they sum up to little.

    Grid: (K H,), one warp each.
    Reads: gates.
    Writes: rows = beta_t, f_t;  G_tj for j <= t;  at the end L of the block and of each chunk, n_Lj, G_Lj and
    beta_L, f_L, m_L.
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
    theta_, a, eta_ = load_gates(theta, alpha, eta, row, H, length, BC, LOG)
    G += pid * BC * BC
    offs_j = tl.arange(0, BC)
    n = tl.zeros((BC,), tl.float32)
    G_t = tl.zeros((BC,), tl.float32)
    beta, m, f = 1.0, 1.0, 0.0
    beta_c, m_c, f_c = 1.0, 1.0, 0.0
    betas, fs = n, n
    if LOG:
        log_a = tl.load(alpha + row + offs_j * H, mask=offs_j < length, other=0.0).to(tl.float32)
        log_eta = tl.load(eta + row + offs_j * H, mask=offs_j < length, other=0.0).to(tl.float32)
    for t in range(length):
        a_t, eta_t = element(a, t, BC), element(eta_, t, BC)
        n = tl.where(offs_j == t, theta_, eta_t * n)
        m = eta_t * m
        G_t = a_t * G_t + n
        f = a_t * f + m
        beta = a_t * beta
        tl.store(G + (t * BC + offs_j), G_t, mask=offs_j <= t)
        betas = tl.where(offs_j == t, beta, betas)
        fs = tl.where(offs_j == t, f, fs)
        if SPLIT:
            m_c = eta_t * m_c
            f_c = a_t * f_c + m_c
            beta_c = a_t * beta_c
            start = chunk_start(t, r, C, i)
            last = (t == length - 1) | (chunk_start(t + 1, r, C, i) != start)
            if last:
                own = (offs_j >= start) & (offs_j <= t)
                if LOG:
                    beta_c, m_c = near_one(beta_c, log_a, own), near_one(m_c, log_eta, own)
                tl.store(ends + pid * 2 * BC + offs_j, n, mask=own)
                tl.store(ends + (pid * 2 + 1) * BC + offs_j, G_t, mask=own)
                # a first chunk that the sequence resumed in is chunk 0 all the same
                at = pid * PER + (tl.where(i == 0, r, 0) + t) // C
                store_end(end, at, beta_c, f_c, m_c)
            m_c, f_c, beta_c = tl.where(last, 1.0, m_c), tl.where(last, 0.0, f_c), tl.where(last, 1.0, beta_c)
    tl.store(block_ends + pid * 2 * BC + offs_j, n)
    tl.store(block_ends + (pid * 2 + 1) * BC + offs_j, G_t)
    if LOG:
        sums = tl.cumsum(log_a, 0)
        betas = tl.where(sums > -1, tl.exp(sums), betas)
        beta, m = near_one(beta, log_a, offs_j < length), near_one(m, log_eta, offs_j < length)
    store_end(block_end, pid, beta, f, m)
    tl.store(rows + pid * 2 * BC + offs_j, betas)
    tl.store(rows + (pid * 2 + 1) * BC + offs_j, fs)


@triton.jit(do_not_specialize=["T", "H", "C", "S", "slack", "PER"])
def coefficients_vjp_kernel(
    theta, alpha, eta, cu_seqlens, offset, sequence,
    drows, dG, drows_k, dG_k,  # in: shaped like rows and G, through queries and through keys; dG is overwritten
    dends, dend,  # in: like block_ends and block_end
    ln_rows,  # scratch: (K, H, BC, BC)
    dtheta, dalpha, deta,  # out: (B, T, H)
    T, H, C, S, slack, PER,
    SPLIT: tl.constexpr, NB: tl.constexpr, BC: tl.constexpr, LOG: tl.constexpr, PACKED: tl.constexpr,
    RESUMED: tl.constexpr,
):  # fmt: skip
    """Eq. (13): lG_t = dG_t + a_{t+1} lG_{t+1} and ln_t = lG_t + eta_{t+1} ln_{t+1} backwards; then forwards
    da_t = sum_j lG_tj G_{t-1,j} + ..., deta_t = sum_j ln_tj n_{t-1,j} + ...;  dtheta_t = ln_tt.

    Grid: (K H,), one warp each.
    Reads: gates, cotangents of the coefficients; those of the rows that keys read, (20), enter where the chunk starts.
    Writes: dtheta, dalpha, deta.
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
    theta_, a, eta_ = load_gates(theta, alpha, eta, row, H, length, BC, LOG)
    offs_j = tl.arange(0, BC)
    mask_j = offs_j < length
    dG += pid * BC * BC
    dG_k += pid * BC * BC
    ln_rows += pid * BC * BC
    drows += pid * 2 * BC
    drows_k += pid * 2 * BC

    # the cotangents of the last row enter here; in step t, (l...) belong to row t
    ln = tl.load(dends + pid * 2 * BC + offs_j, mask=mask_j, other=0.0)
    lG = tl.load(dends + (pid * 2 + 1) * BC + offs_j, mask=mask_j, other=0.0)
    lbeta, lf, lm = tl.load(dend + pid * 3), tl.load(dend + pid * 3 + 1), tl.load(dend + pid * 3 + 2)
    zero = tl.zeros((BC,), tl.float32)
    dbetas = tl.load(drows + offs_j, mask=mask_j, other=0.0)
    dfs = tl.load(drows + BC + offs_j, mask=mask_j, other=0.0)
    # of the row before the chunk of step t
    kG, kbeta, kf = zero, 0.0, 0.0
    if SPLIT:
        dbetas_k = tl.load(drows_k + offs_j, mask=mask_j, other=0.0)
        dfs_k = tl.load(drows_k + BC + offs_j, mask=mask_j, other=0.0)
    lbetas, lfs, lms, dtheta_ = zero, zero, zero, zero
    for back in tl.range(0, length, num_stages=4):
        t = length - 1 - back
        a_t, eta_t = element(a, t, BC), element(eta_, t, BC)
        lG += tl.load(dG + (t * BC + offs_j), mask=offs_j <= t, other=0.0)
        ln += lG
        lbeta += element(dbetas, t, BC)
        lf += element(dfs, t, BC)
        lm += lf
        tl.store(dG + (t * BC + offs_j), lG, mask=offs_j <= t)
        tl.store(ln_rows + (t * BC + offs_j), ln, mask=offs_j <= t)
        lbetas = tl.where(offs_j == t, lbeta, lbetas)
        lfs = tl.where(offs_j == t, lf, lfs)
        lms = tl.where(offs_j == t, lm, lms)
        dtheta_ = tl.where(offs_j == t, ln, dtheta_)
        lG, ln = a_t * lG, eta_t * ln
        lbeta, lf, lm = a_t * lbeta, a_t * lf, eta_t * lm
        if SPLIT:
            kG += tl.load(dG_k + (t * BC + offs_j), mask=offs_j < chunk_start(t, r, C, i), other=0.0)
            kbeta += element(dbetas_k, t, BC)
            kf += element(dfs_k, t, BC)
            starts = chunk_start(t, r, C, i) == t
            lG += tl.where(starts, kG, 0.0)
            lbeta += tl.where(starts, kbeta, 0.0)
            lf += tl.where(starts, kf, 0.0)
            kG = tl.where(starts, 0.0, kG)
            kbeta, kf = tl.where(starts, 0.0, kbeta), tl.where(starts, 0.0, kf)
    tl.debug_barrier()

    n, G, betas, fs, ms, da, deta_ = zero, zero, zero, zero, zero, zero, zero
    beta, m, f = 1.0, 1.0, 0.0
    for t in tl.range(0, length, num_stages=4):
        a_t, eta_t = element(a, t, BC), element(eta_, t, BC)
        lG = tl.load(dG + (t * BC + offs_j), mask=offs_j <= t, other=0.0)
        ln = tl.load(ln_rows + (t * BC + offs_j), mask=offs_j <= t, other=0.0)
        # row t - 1
        betas = tl.where(offs_j == t, beta, betas)
        fs = tl.where(offs_j == t, f, fs)
        ms = tl.where(offs_j == t, m, ms)
        da = tl.where(offs_j == t, tl.sum(lG * G, 0), da)
        deta_ = tl.where(offs_j == t, tl.sum(ln * n, 0), deta_)
        n = tl.where(offs_j == t, theta_, eta_t * n)
        m = eta_t * m
        G = a_t * G + n
        f = a_t * f + m
        beta = a_t * beta
    da += lbetas * betas + lfs * fs
    deta_ += lms * ms
    at = row + offs_j * H
    if LOG:
        dtheta_, da, deta_ = theta_ * dtheta_, a * da, eta_ * deta_
    else:
        da = -da
    tl.store(dtheta + at, dtheta_.to(dtheta.dtype.element_ty), mask=mask_j)
    tl.store(dalpha + at, da.to(dalpha.dtype.element_ty), mask=mask_j)
    tl.store(deta + at, deta_.to(deta.dtype.element_ty), mask=mask_j)

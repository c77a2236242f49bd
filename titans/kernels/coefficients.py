"""The `coefficients` stage: what a block makes of its initial state and of each of its tokens. One warp each."""

import triton
import triton.language as tl

from titans.kernels.device import block_span, element, load_gates, sequence_of, sequence_span


@triton.jit(do_not_specialize=["T", "H", "C", "S", "slack"])
def coefficients_kernel(
    theta, alpha, eta, cu_seqlens, offset, sequence,  # gates (B, T, H)
    rows, G, ends, end,  # out: (K, H, 2, BC), (K, H, BC, BC), (K, H, 2, BC), (K, H, 3)
    T, H, C, S, slack,
    NB: tl.constexpr, BC: tl.constexpr, LOG: tl.constexpr, PACKED: tl.constexpr, RESUMED: tl.constexpr,
):  # fmt: skip
    """Eq. (7): n <- eta_t n, n_t = theta_t;  G <- a_t G + n;  the same for (m, f) and beta.

    Grid: (K H,), one warp each.
    Reads: gates.
    Writes: rows = beta_t, f_t;  G_tj;  ends = n_Lj, G_Lj;  end = beta_L, f_L, m_L.
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
    theta_, a, eta_ = load_gates(theta, alpha, eta, (begin + first) * H + h, H, length, BC, LOG)
    offs_j = tl.arange(0, BC)
    n = tl.zeros((BC,), tl.float32)
    G_t = tl.zeros((BC,), tl.float32)
    betas = tl.zeros((BC,), tl.float32)
    fs = tl.zeros((BC,), tl.float32)
    beta, m, f = 1.0, 1.0, 0.0
    for t in range(length):
        a_t, eta_t = element(a, t, BC), element(eta_, t, BC)
        n = tl.where(offs_j == t, theta_, eta_t * n)
        m = eta_t * m
        G_t = a_t * G_t + n
        f = a_t * f + m
        beta = a_t * beta
        tl.store(G + pid * BC * BC + (t * BC + offs_j), G_t)
        betas = tl.where(offs_j == t, beta, betas)
        fs = tl.where(offs_j == t, f, fs)
    tl.store(rows + pid * 2 * BC + offs_j, betas)
    tl.store(rows + (pid * 2 + 1) * BC + offs_j, fs)
    tl.store(ends + pid * 2 * BC + offs_j, n)
    tl.store(ends + (pid * 2 + 1) * BC + offs_j, G_t)
    tl.store(end + pid * 3, beta)
    tl.store(end + pid * 3 + 1, f)
    tl.store(end + pid * 3 + 2, m)


@triton.jit(do_not_specialize=["T", "H", "C", "S", "slack"])
def coefficients_vjp_kernel(
    theta, alpha, eta, cu_seqlens, offset, sequence,
    drows, dG, dends, dend,  # in: shaped like rows, G, ends and end; dG is overwritten
    ln_rows,  # scratch: (K, H, BC, BC)
    dtheta, dalpha, deta,  # out: (B, T, H)
    T, H, C, S, slack,
    NB: tl.constexpr, BC: tl.constexpr, LOG: tl.constexpr, PACKED: tl.constexpr, RESUMED: tl.constexpr,
):  # fmt: skip
    """Eq. (13): lG_t = dG_t + a_{t+1} lG_{t+1} and ln_t = lG_t + eta_{t+1} ln_{t+1} backwards; then forwards
    da_t = sum_j lG_tj G_{t-1,j} + ..., deta_t = sum_j ln_tj n_{t-1,j} + ...;  dtheta_t = ln_tt.

    Grid: (K H,), one warp each.
    Reads: gates, cotangents of the coefficients.
    Writes: dtheta, dalpha, deta.
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
    theta_, a, eta_ = load_gates(theta, alpha, eta, row, H, length, BC, LOG)
    offs_j = tl.arange(0, BC)
    mask_j = offs_j < length
    dG += pid * BC * BC
    ln_rows += pid * BC * BC
    dbeta = tl.load(drows + pid * 2 * BC + offs_j, mask=mask_j, other=0.0)
    df = tl.load(drows + (pid * 2 + 1) * BC + offs_j, mask=mask_j, other=0.0)

    # the cotangents of the last row enter here; in step t, (l...) belong to row t
    ln = tl.load(dends + pid * 2 * BC + offs_j, mask=mask_j, other=0.0)
    lG = tl.load(dends + (pid * 2 + 1) * BC + offs_j, mask=mask_j, other=0.0)
    lbeta, lf, lm = tl.load(dend + pid * 3), tl.load(dend + pid * 3 + 1), tl.load(dend + pid * 3 + 2)
    lbetas = tl.zeros((BC,), tl.float32)
    lfs = tl.zeros((BC,), tl.float32)
    lms = tl.zeros((BC,), tl.float32)
    dtheta_ = tl.zeros((BC,), tl.float32)
    for back in tl.range(0, length, num_stages=4):
        t = length - 1 - back
        a_t, eta_t = element(a, t, BC), element(eta_, t, BC)
        lG += tl.load(dG + (t * BC + offs_j))
        ln += lG
        lbeta += element(dbeta, t, BC)
        lf += element(df, t, BC)
        lm += lf
        tl.store(dG + (t * BC + offs_j), lG)
        tl.store(ln_rows + (t * BC + offs_j), ln)
        lbetas = tl.where(offs_j == t, lbeta, lbetas)
        lfs = tl.where(offs_j == t, lf, lfs)
        lms = tl.where(offs_j == t, lm, lms)
        dtheta_ = tl.where(offs_j == t, ln, dtheta_)
        lG, ln = a_t * lG, eta_t * ln
        lbeta, lf, lm = a_t * lbeta, a_t * lf, eta_t * lm
    tl.debug_barrier()

    n = tl.zeros((BC,), tl.float32)
    G = tl.zeros((BC,), tl.float32)
    da = tl.zeros((BC,), tl.float32)
    deta_ = tl.zeros((BC,), tl.float32)
    beta, m, f = 1.0, 1.0, 0.0
    for t in tl.range(0, length, num_stages=4):
        a_t, eta_t = element(a, t, BC), element(eta_, t, BC)
        lG = tl.load(dG + (t * BC + offs_j))
        ln = tl.load(ln_rows + (t * BC + offs_j))
        da_t = tl.sum(lG * G, 0) + element(lbetas, t, BC) * beta + element(lfs, t, BC) * f
        deta_t = tl.sum(ln * n, 0) + element(lms, t, BC) * m
        da = tl.where(offs_j == t, da_t, da)
        deta_ = tl.where(offs_j == t, deta_t, deta_)
        n = tl.where(offs_j == t, theta_, eta_t * n)
        m = eta_t * m
        G = a_t * G + n
        f = a_t * f + m
        beta = a_t * beta
    at = row + offs_j * H
    if LOG:
        dtheta_, da, deta_ = theta_ * dtheta_, a * da, eta_ * deta_
    else:
        da = -da
    tl.store(dtheta + at, dtheta_.to(dtheta.dtype.element_ty), mask=mask_j)
    tl.store(dalpha + at, da.to(dalpha.dtype.element_ty), mask=mask_j)
    tl.store(deta + at, deta_.to(deta.dtype.element_ty), mask=mask_j)

"""The `coefficients` stage: what a block makes of its initial state and of each of its tokens. One warp each."""

import triton
import triton.language as tl

from titans.kernels.block import chunk_start, chunks_per_block, own_block
from titans.kernels.memory import element


@triton.jit
def linear_gates(theta, alpha, eta, tile: tl.constexpr):
    """theta, a and eta in float32, from what the caller passed."""
    theta = theta.to(tl.float32)
    alpha = alpha.to(tl.float32)
    eta = eta.to(tl.float32)
    if tile.LOG:
        theta = tl.exp(theta)
        a = tl.exp(alpha)
        eta = tl.exp(eta)
    else:
        a = 1 - alpha
    return theta, a, eta


@triton.jit
def load_gates(theta_ptr, alpha_ptr, eta_ptr, block, tile: tl.constexpr):
    """The gates of a block, (BC,) each."""
    at = block.row + tl.arange(0, tile.BC) * block.H
    mask_t = tl.arange(0, tile.BC) < block.length
    theta = tl.load(theta_ptr + at, mask=mask_t, other=0.0)
    alpha = tl.load(alpha_ptr + at, mask=mask_t, other=0.0)
    eta = tl.load(eta_ptr + at, mask=mask_t, other=0.0)
    return linear_gates(theta, alpha, eta, tile)


@triton.jit
def load_logs(gate_ptr, block, tile: tl.constexpr):
    """A gate of a block that is passed as a log, as it is, (BC,)."""
    offs_t = tl.arange(0, tile.BC)
    return tl.load(gate_ptr + block.row + offs_t * block.H, mask=offs_t < block.length, other=0.0).to(tl.float32)


@triton.jit
def near_one(product, log):
    """The product of some decays, from `log`, the sum of their logs, where that is little.

    Each of these decays rounds to 1 or close to it, and the same error in every token would add up along a sequence.
    """
    return tl.where(log > -1, tl.exp(log), product)


@triton.jit
def store_transition(transition_ptr, at, beta, f, m):
    """Store beta_L, f_L and m_L."""
    tl.store(transition_ptr + at * 3, beta)
    tl.store(transition_ptr + at * 3 + 1, f)
    tl.store(transition_ptr + at * 3 + 2, m)


@triton.jit(do_not_specialize=["T", "H", "C"])
def coefficients_kernel(
    theta_ptr, alpha_ptr, eta_ptr,  # (B, T, H)
    where,
    rows, block_end, step_end,  # out; with one step to a block, its two ends are the same memory
    T, H, C, tile: tl.constexpr,
):  # fmt: skip
    """Eq. (7): n <- eta_t n, n_t = theta_t;  G <- a_t G + n;  the same for (m, f) and beta.

    Logs of gates are summed for beta and m, which hand the state from block to block, where they sum up to little; one
    by one, as decoding does.

    Grid: (K H,), one warp each.
    Reads: gates.
    Writes: beta_t, f_t;  G_tj for j <= t;  at the end L of the block and of each step, n_Lj, G_Lj and beta_L, f_L, m_L.
    """
    block = own_block(where, T, H, C, tile)
    if block.length <= 0:
        return
    theta, a, eta = load_gates(theta_ptr, alpha_ptr, eta_ptr, block, tile)
    BC: tl.constexpr = tile.BC
    G_ptr = rows.G + block.index * BC * BC
    offs_j = tl.arange(0, BC)
    n = tl.zeros((BC,), tl.float32)
    G = tl.zeros((BC,), tl.float32)
    beta, m, f = 1.0, 1.0, 0.0
    # of the chunk
    beta_c, m_c, f_c = 1.0, 1.0, 0.0
    betas, fs = n, n
    if tile.LOG:
        log_a, log_eta = load_logs(alpha_ptr, block, tile), load_logs(eta_ptr, block, tile)
        log_beta, log_m, log_beta_c, log_m_c = 0.0, 0.0, 0.0, 0.0
    for t in range(block.length):
        a_t, eta_t = element(a, t, BC), element(eta, t, BC)
        n = tl.where(offs_j == t, theta, eta_t * n)
        m = eta_t * m
        G = a_t * G + n
        f = a_t * f + m
        beta = a_t * beta
        beta_t = beta
        if tile.LOG:
            log_a_t, log_eta_t = element(log_a, t, BC), element(log_eta, t, BC)
            log_beta, log_m = log_beta + log_a_t, log_m + log_eta_t
            beta_t = near_one(beta, log_beta)
        tl.store(G_ptr + (t * BC + offs_j), G, mask=offs_j <= t)
        betas = tl.where(offs_j == t, beta_t, betas)
        fs = tl.where(offs_j == t, f, fs)
        if tile.SPLIT:
            m_c = eta_t * m_c
            f_c = a_t * f_c + m_c
            beta_c = a_t * beta_c
            if tile.LOG:
                log_beta_c, log_m_c = log_beta_c + log_a_t, log_m_c + log_eta_t
            start = chunk_start(t, block, C)
            last = (t == block.length - 1) | (chunk_start(t + 1, block, C) != start)
            if last:
                own = (offs_j >= start) & (offs_j <= t)
                if tile.LOG:
                    beta_c, m_c = near_one(beta_c, log_beta_c), near_one(m_c, log_m_c)
                tl.store(step_end.weights + block.index * 2 * BC + offs_j, n, mask=own)
                tl.store(step_end.weights + (block.index * 2 + 1) * BC + offs_j, G, mask=own)
                # a first chunk that the sequence resumed in is chunk 0 all the same
                chunk = (tl.where(block.i == 0, block.sequence.offset, 0) + t) // C
                at = block.index * chunks_per_block(C, tile) + chunk
                store_transition(step_end.transition, at, beta_c, f_c, m_c)
            m_c, f_c, beta_c = tl.where(last, 1.0, m_c), tl.where(last, 0.0, f_c), tl.where(last, 1.0, beta_c)
            if tile.LOG:
                log_beta_c, log_m_c = tl.where(last, 0.0, log_beta_c), tl.where(last, 0.0, log_m_c)
    tl.store(block_end.weights + block.index * 2 * BC + offs_j, n)
    tl.store(block_end.weights + (block.index * 2 + 1) * BC + offs_j, G)
    if tile.LOG:
        beta, m = near_one(beta, log_beta), near_one(m, log_m)
    store_transition(block_end.transition, block.index, beta, f, m)
    tl.store(rows.beta_f + block.index * 2 * BC + offs_j, betas)
    tl.store(rows.beta_f + (block.index * 2 + 1) * BC + offs_j, fs)


@triton.jit
def load_beta_f_rows(drows, block, tile: tl.constexpr):
    """Cotangents of the beta_t and the f_t of a block, (BC,) each."""
    offs_t = tl.arange(0, tile.BC)
    beta_f = drows.beta_f + block.index * 2 * tile.BC
    mask_t = offs_t < block.length
    dbetas = tl.load(beta_f + offs_t, mask=mask_t, other=0.0)
    dfs = tl.load(beta_f + tile.BC + offs_t, mask=mask_t, other=0.0)
    return dbetas, dfs


@triton.jit
def backwards(a, eta, drows, drows_k, dblock_end, ln_ptr, block, C, tile: tl.constexpr):
    """Eq. (13), from the last token to the first: lG replaces dG, ln goes to `ln_ptr`; lbeta_t, lf_t, lm_t, ln_tt."""
    BC: tl.constexpr = tile.BC
    offs_j = tl.arange(0, BC)
    mask_j = offs_j < block.length
    dG_ptr = drows.G + block.index * BC * BC
    # the cotangents of the last row enter here; in step t, (l...) belong to row t
    ln = tl.load(dblock_end.weights + block.index * 2 * BC + offs_j, mask=mask_j, other=0.0)
    lG = tl.load(dblock_end.weights + (block.index * 2 + 1) * BC + offs_j, mask=mask_j, other=0.0)
    lbeta = tl.load(dblock_end.transition + block.index * 3)
    lf = tl.load(dblock_end.transition + block.index * 3 + 1)
    lm = tl.load(dblock_end.transition + block.index * 3 + 2)
    zero = tl.zeros((BC,), tl.float32)
    dbetas, dfs = load_beta_f_rows(drows, block, tile)
    # of the row before the chunk of step t
    kG, kbeta, kf = zero, 0.0, 0.0
    if tile.SPLIT:
        dG_k_ptr = drows_k.G + block.index * BC * BC
        dbetas_k, dfs_k = load_beta_f_rows(drows_k, block, tile)
    lbetas, lfs, lms, dtheta = zero, zero, zero, zero
    for back in tl.range(0, block.length, num_stages=4):
        t = block.length - 1 - back
        a_t, eta_t = element(a, t, BC), element(eta, t, BC)
        lG += tl.load(dG_ptr + (t * BC + offs_j), mask=offs_j <= t, other=0.0)
        ln += lG
        lbeta += element(dbetas, t, BC)
        lf += element(dfs, t, BC)
        lm += lf
        tl.store(dG_ptr + (t * BC + offs_j), lG, mask=offs_j <= t)
        tl.store(ln_ptr + (t * BC + offs_j), ln, mask=offs_j <= t)
        lbetas = tl.where(offs_j == t, lbeta, lbetas)
        lfs = tl.where(offs_j == t, lf, lfs)
        lms = tl.where(offs_j == t, lm, lms)
        dtheta = tl.where(offs_j == t, ln, dtheta)
        lG, ln = a_t * lG, eta_t * ln
        lbeta, lf, lm = a_t * lbeta, a_t * lf, eta_t * lm
        if tile.SPLIT:
            start = chunk_start(t, block, C)
            kG += tl.load(dG_k_ptr + (t * BC + offs_j), mask=offs_j < start, other=0.0)
            kbeta += element(dbetas_k, t, BC)
            kf += element(dfs_k, t, BC)
            starts = start == t
            lG += tl.where(starts, kG, 0.0)
            lbeta += tl.where(starts, kbeta, 0.0)
            lf += tl.where(starts, kf, 0.0)
            kG = tl.where(starts, 0.0, kG)
            kbeta, kf = tl.where(starts, 0.0, kbeta), tl.where(starts, 0.0, kf)
    return lbetas, lfs, lms, dtheta


@triton.jit
def forwards(theta, a, eta, lG_ptr, ln_ptr, block, tile: tl.constexpr):
    """Eq. (13), from the first token to the last: the tokens' sums in da and deta, and beta, f and m of row t - 1."""
    BC: tl.constexpr = tile.BC
    offs_j = tl.arange(0, BC)
    zero = tl.zeros((BC,), tl.float32)
    n, G, betas, fs, ms, da, deta = zero, zero, zero, zero, zero, zero, zero
    beta, m, f = 1.0, 1.0, 0.0
    for t in tl.range(0, block.length, num_stages=4):
        a_t, eta_t = element(a, t, BC), element(eta, t, BC)
        lG = tl.load(lG_ptr + (t * BC + offs_j), mask=offs_j <= t, other=0.0)
        ln = tl.load(ln_ptr + (t * BC + offs_j), mask=offs_j <= t, other=0.0)
        # row t - 1
        betas = tl.where(offs_j == t, beta, betas)
        fs = tl.where(offs_j == t, f, fs)
        ms = tl.where(offs_j == t, m, ms)
        da = tl.where(offs_j == t, tl.sum(lG * G, 0), da)
        deta = tl.where(offs_j == t, tl.sum(ln * n, 0), deta)
        n = tl.where(offs_j == t, theta, eta_t * n)
        m = eta_t * m
        G = a_t * G + n
        f = a_t * f + m
        beta = a_t * beta
    return da, deta, betas, fs, ms


@triton.jit(do_not_specialize=["T", "H", "C"])
def coefficients_vjp_kernel(
    theta_ptr, alpha_ptr, eta_ptr,  # (B, T, H)
    where,
    drows,  # in: through queries; its G is overwritten
    drows_k,  # in: through keys; None if no chunks share a block
    dblock_end,
    ln_ptr,  # scratch: (K, H, BC, BC)
    dtheta_ptr, dalpha_ptr, deta_ptr,  # out: (B, T, H)
    T, H, C, tile: tl.constexpr,
):  # fmt: skip
    """Eq. (13): lG_t = dG_t + a_{t+1} lG_{t+1} and ln_t = lG_t + eta_{t+1} ln_{t+1} backwards; then forwards
    da_t = sum_j lG_tj G_{t-1,j} + ..., deta_t = sum_j ln_tj n_{t-1,j} + ...;  dtheta_t = ln_tt.

    Grid: (K H,), one warp each.
    Reads: gates, cotangents of the coefficients; those of the rows that keys read, (20), enter where the chunk starts.
    Writes: dtheta, dalpha, deta.
    """
    block = own_block(where, T, H, C, tile)
    if block.length <= 0:
        return
    theta, a, eta = load_gates(theta_ptr, alpha_ptr, eta_ptr, block, tile)
    ln_ptr += block.index * tile.BC * tile.BC
    lbetas, lfs, lms, dtheta = backwards(a, eta, drows, drows_k, dblock_end, ln_ptr, block, C, tile)
    tl.debug_barrier()
    lG_ptr = drows.G + block.index * tile.BC * tile.BC
    da, deta, betas, fs, ms = forwards(theta, a, eta, lG_ptr, ln_ptr, block, tile)
    da += lbetas * betas + lfs * fs
    deta += lms * ms
    if tile.LOG:
        dtheta, da, deta = theta * dtheta, a * da, eta * deta
    else:
        da = -da
    offs_t = tl.arange(0, tile.BC)
    at, mask_t = block.row + offs_t * block.H, offs_t < block.length
    tl.store(dtheta_ptr + at, dtheta.to(dtheta_ptr.dtype.element_ty), mask=mask_t)
    tl.store(dalpha_ptr + at, da.to(dalpha_ptr.dtype.element_ty), mask=mask_t)
    tl.store(deta_ptr + at, deta.to(deta_ptr.dtype.element_ty), mask=mask_t)

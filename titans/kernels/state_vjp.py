"""The reverse of the `state` stage: the chain of cotangents, and what they make of keys and values, in parallel."""

import triton
import triton.language as tl

from titans.kernels.block import chunk_start, chunks_per_block, own_block, own_step, sequence_of, step_count
from titans.kernels.inner import inner_gradient_vjp, inner_residual, less_mean, load_inner_gradient
from titans.kernels.memory import (
    load_affine,
    load_column,
    load_pairs,
    load_rows,
    load_square,
    load_width,
    store_rows,
    store_square,
    store_width,
)
from titans.kernels.state import load_raised, load_step_end


@triton.jit
def load_recall_vjp(du, k, v_ptr, w, b, saved, step, RAISED: tl.constexpr, tile: tl.constexpr):
    """Eq. (12) for a step of the chain: dy of y = k A."""
    if tile.NORM:
        target = load_raised(v_ptr, step, RAISED, tile) - k.to(tl.float32)
        x = load_raised(saved.x, step, RAISED, tile)
        r = load_column(saved.r, step.row, step.H, step.length, tile.BS)
        mean_e, c_e = load_pairs(saved.means, step.row * 2, step.H * 2, step.length, tile.BS)
        _, e = inner_residual(x, target, w, b)
        _, dy = inner_gradient_vjp(du, x, r, e, mean_e, c_e, w, tile)
    else:
        dy = du
    return dy


@triton.jit(do_not_specialize=["T", "H", "C"])
def state_vjp_kernel(
    k_ptr, v_ptr,  # (B, T, H, D)
    affine, step_end, saved, where,
    dfinal,
    du_ptr,  # (B, T, H, D), in and out: the part through the outputs becomes the whole
    dstate0,  # in: of M0 and S0, the parts through the outputs
    dstate_L,  # out: of M and S after each block; where steps are blocks it may be the memory of dstate0
    dinitial,  # out
    T, H, C, tile: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Eq. (15), (12), (17), (18): the reverse of `state_kernel`, last step first, carrying dM and dS.

    Grid: (N H,).
    Reads: k, v, w, b, coefficients, x, r and the means of (2); du, dM0 and dS0 as far as they come from outputs.
    Writes: dM_L and dS_L of each block, du, and the cotangents of the initial state.
    """
    pid = tl.program_id(0)
    h = pid % H
    sequence = sequence_of(pid // H, where, T, C, tile)
    pid = pid.to(tl.int64)
    steps = step_count(sequence, C, tile)
    stop = sequence.offset + sequence.length
    danchor = load_square(dfinal.anchor, pid, tile, tl.float32)
    # a full last chunk leaves its M as the anchor
    full = (sequence.length > 0) & (stop % C == 0)
    dM = load_square(dfinal.M, pid, tile, tl.float32) + tl.where(full, danchor, 0.0)
    dS = load_square(dfinal.S, pid, tile, tl.float32)
    # an empty sequence passes its anchor on
    dA = tl.where(sequence.length > 0, 0.0, danchor)
    w, b = load_affine(affine, h, tile)
    PER = chunks_per_block(C, tile)
    RAISED: tl.constexpr = (tile.OP == tl.bfloat16) and (tile.BD <= 64) and (tile.BS < 64)

    for back in tl.range(0, steps, num_stages=STAGES):
        s = steps - 1 - back
        i = sequence.offset // tile.BS + s
        step = own_step(i, sequence, h, H, C, tile)
        k = load_rows(k_ptr, step, tile.BS, tile, tile.OP)
        du = load_raised(du_ptr, step, RAISED, tile)
        n_L, G_L, beta_L, f_L, m_L = load_step_end(step_end, step, PER, tile)
        if tile.SPLIT & ((step.sub == PER - 1) | (back == 0)):
            store_square(dstate_L.M, dM, step.index, tile)
            store_square(dstate_L.S, dS, step.index, tile)
        # (15)
        du -= 2 * n_L * tl.dot(k, dS.to(tile.OP), input_precision=tile.PREC)
        du -= 2 * G_L * tl.dot(k, dM.to(tile.OP), input_precision=tile.PREC)
        # the whole of du, of which de and dy are made again in `key_vjp_kernel`
        store_rows(du_ptr, du, step, tile.BS, tile)
        dy = load_recall_vjp(du, k, v_ptr, w, b, saved, step, RAISED, tile)

        # (17), (18)
        if tile.SPLIT == 0:
            # before dM_L and dS_L are written, which may be the same memory
            dM0 = load_square(dstate0.M, step.index, tile, tl.float32)
            dS0 = load_square(dstate0.S, step.index, tile, tl.float32)
            store_square(dstate_L.M, dM, step.index, tile)
            store_square(dstate_L.S, dS, step.index, tile)
            dS = f_L * dM + m_L * dS + dS0
            dM = beta_L * dM + dM0
        else:
            dS = f_L * dM + m_L * dS
            dM = beta_L * dM
        if tile.NB == 1:
            dA = tl.dot(tl.trans(k), dy.to(tile.OP), input_precision=tile.PREC)
        else:
            dA = tl.dot(tl.trans(k), dy.to(tile.OP), dA, input_precision=tile.PREC)
        if (i % tile.NB == 0) | (s == 0):
            if (i // tile.NB == (stop - 1) // C) & (full == 0):
                dA += load_square(dfinal.anchor, pid, tile, tl.float32)
            # the anchor of every chunk but the first is the memory it starts from
            later = i // tile.NB > 0
            dM += tl.where(later, dA, 0.0)
            if tile.NB > 1:
                dA = tl.where(later, 0.0, dA)
        if tile.SPLIT & (step.sub == 0):
            dM += load_square(dstate0.M, step.index, tile, tl.float32)
            dS += load_square(dstate0.S, step.index, tile, tl.float32)
    store_square(dinitial.M, dM, pid, tile)
    store_square(dinitial.S, dS, pid, tile)
    store_square(dinitial.anchor, dA, pid, tile)


@triton.jit
def dot_square(x, y):
    """<x, y> of two square tiles."""
    return tl.sum(tl.sum(x.to(tl.float32) * y.to(tl.float32), 1), 0)


@triton.jit
def load_block_anchor(anchor_ptr, M0_ptr, block, tile: tl.constexpr):
    """Anchor of the chunk that a block starts in."""
    if block.i // tile.NB == 0:
        A = load_square(anchor_ptr, block.sequence.n.to(tl.int64) * block.H + block.h, tile, tile.OP)
    else:
        first = block.sequence.slot + block.i // tile.NB * tile.NB
        A = load_square(M0_ptr, first * block.H + block.h, tile, tile.OP)
    return A


@triton.jit(do_not_specialize=["T", "H", "C"])
def key_vjp_kernel(
    k_ptr, v_ptr,  # (B, T, H, D)
    affine, block_end, saved, where,
    anchor_ptr,  # (N, H, D, D): the initial one
    dstate_L,  # in: of M and S after each block
    du_ptr, dk_part_ptr,  # (B, T, H, D): du of `state_vjp_kernel`, the rest of dk
    dk_ptr, dv_ptr,  # out: (B, T, H, D); they may be the memory of dk_part and du
    dy_k_ptr,  # out: (B, T, H, D), of k A, if chunks share blocks
    daffine,  # in and out: of each block, added to
    dblock_end,  # out
    T, H, C, tile: tl.constexpr,
):  # fmt: skip
    """Eq. (16): what the cotangents along the chain make of each block's k, v, w, b and coefficients.

    Grid: (K H,).
    Reads: k, v, w, b, coefficients, M0, S0, dM and dS after the block, du.
    Writes: dk, dv, dw and db of the block, and the cotangents of its last row of coefficients.
    """
    block = own_block(where, T, H, C, tile)
    if block.length <= 0:
        return
    BC: tl.constexpr = tile.BC
    OP: tl.constexpr = tile.OP
    PREC: tl.constexpr = tile.PREC
    offs_t = tl.arange(0, BC)
    weights = block.index * 2 * BC
    # all loads before the first product: one wait for memory, not one each
    M0, S0 = load_square(saved.M0, block.index, tile, OP), load_square(saved.S0, block.index, tile, OP)
    dM, dS = load_square(dstate_L.M, block.index, tile, OP), load_square(dstate_L.S, block.index, tile, OP)
    A = load_block_anchor(anchor_ptr, saved.M0, block, tile)
    k = load_rows(k_ptr, block, BC, tile, OP)
    target = load_rows(v_ptr, block, BC, tile, tl.float32)
    x = load_rows(saved.x, block, BC, tile, tl.float32)
    du = load_rows(du_ptr, block, BC, tile, tl.float32)
    dk = load_rows(dk_part_ptr, block, BC, tile, tl.float32)
    n_L = load_column(block_end.weights, weights, 1, block.length, BC)
    G_L = load_column(block_end.weights, weights + BC, 1, block.length, BC)
    if tile.NORM:
        r = load_column(saved.r, block.row, H, block.length, BC)
        mean_e, c_e = load_pairs(saved.means, block.row * 2, H * 2, block.length, BC)
        w, b = load_affine(affine, block.h, tile)
        dw, db = load_width(daffine.w, block.index, tile), load_width(daffine.b, block.index, tile)

    tl.store(dblock_end.transition + block.index * 3, dot_square(dM, M0))
    tl.store(dblock_end.transition + block.index * 3 + 1, dot_square(dM, S0))
    tl.store(dblock_end.transition + block.index * 3 + 2, dot_square(dS, S0))
    if tile.NORM:
        z, e = inner_residual(x, target - k.to(tl.float32), w, b)
        u = r * (less_mean(e, mean_e, tile) - x * c_e)
        de, dy = inner_gradient_vjp(du, x, r, e, mean_e, c_e, w, tile)
        dz = de * w
        store_width(daffine.w, dw + tl.sum(de * (z + w * x), 0)[None, :], block.index, tile)
        store_width(daffine.b, db + tl.sum(dz, 0)[None, :], block.index, tile)
        dk += dz
    else:
        u = x - target
        dy, dz = du, du
    u = u.to(OP)
    # du and dk_part have been read by every thread
    tl.debug_barrier()
    store_rows(dv_ptr, -dz, block, BC, tile)
    if tile.SPLIT:
        # later chunks of the block: `anchor_vjp_kernel`
        store_rows(dy_k_ptr, dy, block, BC, tile)
        dy = tl.where(chunk_start(offs_t, block, C)[:, None] == 0, dy, 0.0)
    dk = tl.dot(dy.to(OP), tl.trans(A), dk, input_precision=PREC)

    k32 = k.to(tl.float32)
    u_dM = -2 * tl.dot(u, tl.trans(dM), input_precision=PREC)
    tl.store(dblock_end.weights + weights + BC + offs_t, tl.sum(u_dM * k32, 1))
    dk += G_L * u_dM
    u_dS = -2 * tl.dot(u, tl.trans(dS), input_precision=PREC)
    tl.store(dblock_end.weights + weights + offs_t, tl.sum(u_dS * k32, 1))
    dk += n_L * u_dS
    store_rows(dk_ptr, dk, block, BC, tile)


@triton.jit
def load_before(G_ptr, block, start, BC: tl.constexpr):
    """G_sj of one block, s = start_t - 1, (BC, BC): zero where j > s and outside."""
    offs_t = tl.arange(0, BC)[:, None]
    offs_j = tl.arange(0, BC)[None, :]
    start = start[:, None]
    mask = (offs_t < block.length) & (offs_j < start)
    return tl.load(G_ptr + block.index * BC * BC + ((start - 1) * BC + offs_j), mask=mask, other=0.0)


@triton.jit
def load_before_transposed(G_ptr, block, start, BC: tl.constexpr):
    """What `load_before` loads, with j along the rows."""
    offs_j = tl.arange(0, BC)[:, None]
    offs_t = tl.arange(0, BC)[None, :]
    start = start[None, :]
    mask = (offs_t < block.length) & (offs_j < start)
    return tl.load(G_ptr + block.index * BC * BC + ((start - 1) * BC + offs_j), mask=mask, other=0.0)


@triton.jit
def final_anchor_vjp(dk, k32, u, danchor_ptr, rows, saved, block, C, tile: tl.constexpr):
    """An unfinished chunk leaves its anchor behind, as if its last token read it: dk, and its dG, dbeta and df."""
    dG = tl.zeros((tile.BC,), tl.float32)
    dbeta, df = 0.0, 0.0
    s = chunk_start(block.length - 1, block, C)
    sequence = block.sequence
    unfinished = (sequence.offset + sequence.length) % C != 0
    if (block.first + block.length == sequence.length) & (s > 0) & unfinished:
        danchor = load_square(danchor_ptr, sequence.n.to(tl.int64) * block.H + block.h, tile, tl.float32)
        u_danchor = -2 * tl.dot(u, tl.trans(danchor.to(tile.OP)), input_precision=tile.PREC)
        dG += tl.sum(u_danchor * k32, 1)
        dbeta += dot_square(danchor, load_square(saved.M0, block.index, tile, tile.OP))
        df += dot_square(danchor, load_square(saved.S0, block.index, tile, tile.OP))
        dk += load_column(rows.G, (block.index * tile.BC + s - 1) * tile.BC, 1, s, tile.BC) * u_danchor
    return dk, dG, dbeta, df


@triton.jit(do_not_specialize=["T", "H", "C"])
def anchor_vjp_kernel(
    k_ptr, v_ptr,  # (B, T, H, D)
    affine, rows, saved, where,
    danchor_ptr,  # (N, H, D, D): of the final one
    dy_k_ptr, dk_part_ptr,  # (B, T, H, D): dy of k A, and dk without the anchors' part
    dk_ptr,  # out: (B, T, H, D); it may be the memory of dk_part
    drows_k,  # out: of beta_t, f_t in the row of the token that reads; of G in its row, for j before its chunk
    T, H, C, tile: tl.constexpr,
):  # fmt: skip
    """Eq. (20): the reverse of (19), y_t = k_t M_s, for the chunks of a block that begin inside it.

    Grid: (K H,).
    Reads: k, v, w, b, coefficients, M0, S0, x and r of `state_kernel`, dy of k A.
    Writes: dk, and the cotangents of the rows of coefficients that end a chunk inside the block.
    """
    block = own_block(where, T, H, C, tile)
    if block.length <= 0:
        return
    BC: tl.constexpr = tile.BC
    OP: tl.constexpr = tile.OP
    PREC: tl.constexpr = tile.PREC
    offs_t = tl.arange(0, BC)
    start = chunk_start(offs_t, block, C)
    later = (offs_t < block.length) & (start > 0)
    last = offs_t == block.length - 1
    k = load_rows(k_ptr, block, BC, tile, OP)
    k32 = k.to(tl.float32)
    dk = load_rows(dk_part_ptr, block, BC, tile, tl.float32)
    w, b = load_affine(affine, block.h, tile)
    u, _, _ = load_inner_gradient(k, v_ptr, saved, w, b, block, tile)
    u = u.to(OP)
    dk, dG_last, dbeta_last, df_last = final_anchor_vjp(dk, k32, u, danchor_ptr, rows, saved, block, C, tile)

    dy = load_rows(dy_k_ptr, block, BC, tile, OP)
    # row s of beta and f
    at = block.index * 2 * BC + start - 1
    dy_M = tl.dot(dy, tl.trans(load_square(saved.M0, block.index, tile, OP)), input_precision=PREC)
    dbeta = tl.where(later, tl.sum(dy_M * k32, 1), 0.0) + tl.where(last, dbeta_last, 0.0)
    tl.store(drows_k.beta_f + block.index * 2 * BC + offs_t, dbeta)
    dk += tl.load(rows.beta_f + at, mask=later, other=0.0)[:, None] * dy_M
    dy_S = tl.dot(dy, tl.trans(load_square(saved.S0, block.index, tile, OP)), input_precision=PREC)
    df = tl.where(later, tl.sum(dy_S * k32, 1), 0.0) + tl.where(last, df_last, 0.0)
    tl.store(drows_k.beta_f + (block.index * 2 + 1) * BC + offs_t, df)
    dk += tl.load(rows.beta_f + BC + at, mask=later, other=0.0)[:, None] * dy_S

    before = offs_t[None, :] < start[:, None]
    scores = tl.where(before, tl.dot(k, tl.trans(k), input_precision=PREC), 0.0)
    dweights = tl.where(before, tl.dot(dy, tl.trans(u), input_precision=PREC), 0.0)
    dG = -2 * dweights * scores + tl.where(last[:, None], dG_last[None, :], 0.0)
    tl.store(drows_k.G + block.index * BC * BC + (offs_t[:, None] * BC + offs_t[None, :]), dG, mask=before)
    weights = -2 * load_before(rows.G, block, start, BC) * dweights
    dk = tl.dot(weights.to(OP), k, dk, input_precision=PREC)
    # with j along the rows, as in `output_vjp_kernel`
    before_T = offs_t[:, None] < start[None, :]
    dweights_T = tl.where(before_T, tl.dot(u, tl.trans(dy), input_precision=PREC), 0.0)
    weights_T = -2 * load_before_transposed(rows.G, block, start, BC) * dweights_T
    dk = tl.dot(weights_T.to(OP), k, dk, input_precision=PREC)
    store_rows(dk_ptr, dk, block, BC, tile)

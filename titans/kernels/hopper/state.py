"""The `state` stage in Gluon: the chain of steps, one program per sequence and head, its warps in three roles.

chain    4 or 8 warps   u = u(k A), M and S; both in the float32 accumulators of the tensor cores
saver    2 warps        M0, S0, u, and x and r if wanted, from shared memory; the count of the steps that are stored
loader   1 warp         k, v and the coefficients of the steps' ends to shared memory, STAGES steps ahead

The chain's warps touch global memory before and after the loop only: their fences would wait for it. Where a row fills
a tile, the copy engine moves k, v, M0 and S0, and x and u of whole chunks. Copies by warps took up to a fifth of a
step, since they share the way to shared memory with the chain. Loads and stores have warps of their own: each waits for
memory about as long as a step takes.

The roles meet at barriers in shared memory, each of which is completed once a step:

full[slot]   loader -> chain          the operands of a step have arrived; half of it is the copy engine's
done[slot]   chain -> loader, saver   a step is over: its slot is free; x, r, u and the next M0 and S0 can be saved
read         saver -> chain           they have been read, and can be overwritten
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from titans.kernels.block import own_step, sequence_of, span, step_count
from titans.kernels.hopper.common import (
    TILE,
    VECTOR,
    as_column,
    as_row,
    as_scalar,
    copy_rows,
    grid_of,
    less_mean,
    load_square,
    mean,
    store_square,
    store_width,
    two_means,
)
from titans.kernels.hopper.ends import BETA_L, ENDS, F_L, G_L, M_L, N_L, load_gates, store_end
from titans.kernels.hopper.handover import LINE, all_stored, release, role_barrier
from titans.kernels.hopper.state_vjp import WARP

# of the saver, and of four warps
PART = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [2, 1], [1, 0]))
PART_OF_FOUR = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
ONE_EACH = gl.constexpr(gl.BlockedLayout([1], [32], [2], [0]))


@gluon.jit
def load_step(
    k_ptr, v_ptr, k_engine, v_engine, k_s, v_s, full, slot, step, token, h, tile: gl.constexpr, COPY: gl.constexpr
):
    """Start copying k and v of a step to a slot; the engine copies the rows after its last as well."""
    if tile.D == tile.BD:
        at = [token.to(gl.int32), h * tile.D]
        mbarrier.expect(full.index(slot), 2 * tile.BS * tile.D * 2)
        tma.async_copy_global_to_shared(k_engine, at, full.index(slot), k_s.index(slot))
        tma.async_copy_global_to_shared(v_engine, at, full.index(slot), v_s.index(slot))
    else:
        copy_rows(k_s.index(slot), k_ptr, step.row, step.H, step.length, tile.D, COPY)
        copy_rows(v_s.index(slot), v_ptr, step.row, step.H, step.length, tile.D, COPY)


@gluon.jit
def save_tile(x_ptr, tile_s, row, H, length, tile: gl.constexpr, LAYOUT: gl.constexpr):
    """Store `length` rows, in global memory H rows apart, 16 of 64 columns at a time."""
    PER: gl.constexpr = tile_s.shape[0] // 16
    PARTS: gl.constexpr = PER * (tile.BD // 64)
    parts = tile_s._reinterpret(gl.bfloat16, [PARTS, 16, 64], TILE)
    offs_t, offs_d = grid_of(16, 64, LAYOUT)
    # a bound which the compilers do not know keeps the loop: unrolled, it takes registers that this role does not have
    for i in range(PARTS + H // 2**24):
        t = offs_t + i % PER * 16
        d = offs_d + i // PER * 64
        at = x_ptr + row * tile.D + (t * (H * tile.D) + d)
        gl.store(at, parts.index(i).load(LAYOUT), mask=(t < length) & (d < tile.D))


@gluon.jit
def save_squares(M0_engine, S0_engine, saved, A_s, S_s, row, wanted, tile: gl.constexpr):
    """Start storing M0 and S0, if there is a step that they enter."""
    if wanted:
        # the compiler must see neither where the engine is not used
        if tile.D == tile.BD:
            tma.async_copy_shared_to_global(M0_engine, [row.to(gl.int32), 0], A_s)
            tma.async_copy_shared_to_global(S0_engine, [row.to(gl.int32), 0], S_s)
        else:
            one = wanted.to(gl.int32)
            save_tile(saved.M0, A_s, row, one, tile.D, tile, PART)
            save_tile(saved.S0, S_s, row, one, tile.D, tile, PART)


@gluon.jit
def save_tokens(engine, x_ptr, x_s, step, token, h, tile: gl.constexpr):
    """Start storing x or u of a step; the engine would store rows after its last as well."""
    if tile.D == tile.BD:
        if step.length == tile.BS:
            tma.async_copy_shared_to_global(engine, [token.to(gl.int32), h * tile.D], x_s)
        else:
            save_tile(x_ptr, x_s, step.row, step.H, step.length, tile, PART)
    else:
        save_tile(x_ptr, x_s, step.row, step.H, step.length, tile, PART)


@gluon.jit
def save_r(saved, r_s, step, tile: gl.constexpr):
    """Store r of a step."""
    if tile.NORM:
        offs_t = gl.arange(0, tile.BS, layout=ONE_EACH)
        gl.store(saved.r + step.row + offs_t * step.H, r_s.load(ONE_EACH), mask=offs_t < step.length)


@gluon.jit
def announce(full, tile: gl.constexpr):
    """Wait for the copies of this role, and arrive."""
    if tile.D == tile.BD:
        mbarrier.arrive(full, count=1)
    else:
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        mbarrier.arrive(full, count=2)


@gluon.jit
def hand_over(count_ptr, pid, chunks, tile: gl.constexpr):
    """Release a count of chunks, when all stores of this role have been made: those of its engine, and its own."""
    if tile.D == tile.BD:
        all_stored(chunks)
    role_barrier()
    release(count_ptr + pid * LINE, chunks)


@gluon.jit
def load_part(
    pid, k_ptr, v_ptr, k_engine, v_engine, tokens, k_s, v_s, c_s, full, done, sequence, steps, H,
    tile: gl.constexpr, COPY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the slots, as they become free."""
    h = pid % H
    for i in range(steps):
        slot = i % STAGES
        step = own_step(i, sequence, h, H, tile.BS, tile)
        token = sequence.begin + span(i, sequence, tile.BS, tile.BS, tile)[0]
        gates = load_gates(tokens, step, WARP)
        if i >= STAGES:
            mbarrier.wait(done.index(slot), (i // STAGES - 1) & 1)
        load_step(k_ptr, v_ptr, k_engine, v_engine, k_s, v_s, full, slot, step, token, h, tile, COPY)
        store_end(c_s, ENDS * slot, gates, step.length, tile, WARP)
        announce(full.index(slot), tile)


@gluon.jit
def save_part(
    pid, x_engine, u_engine, M0_engine, S0_engine, tokens, saved, count_ptr, A_s, S_s, x_s, u_s, r_s,
    done, read, sequence, steps, recorded, H,
    tile: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """Save x, r and u of each step, and M0 and S0 of the next. To hand chunks over takes long: TOGETHER at once."""
    h = pid % H
    for i in range(steps):
        own = own_step(i, sequence, h, H, tile.BS, tile)
        token = sequence.begin + span(i, sequence, tile.BS, tile.BS, tile)[0]
        next_square = (own.index + H) * tile.D
        mbarrier.wait(done.index(i % STAGES), (i // STAGES) & 1)
        save_squares(M0_engine, S0_engine, saved, A_s, S_s, next_square, i + 1 < steps, tile)
        save_tokens(u_engine, tokens.u, u_s, own, token, h, tile)
        if recorded > 0:
            save_tokens(x_engine, saved.x, x_s, own, token, h, tile)
            save_r(saved, r_s, own, tile)
        if tile.D == tile.BD:
            tma.store_wait(0)
        mbarrier.arrive(read.index(0), count=1)
        if (i % TOGETHER == TOGETHER - 1) | (i + 1 == steps):
            hand_over(count_ptr, pid, i + 1, tile)


@gluon.jit
def clear_rows(x_s, length, tile: gl.constexpr, LAYOUT: gl.constexpr):
    """Put zeros in place of the rows from `length` on, whatever is there."""
    offs_t = gl.expand_dims(gl.arange(0, tile.BS, layout=gl.SliceLayout(1, LAYOUT)), 1)
    x = x_s.load(LAYOUT)
    x_s.store(gl.where(offs_t < length, x, gl.zeros_like(x)))


@gluon.jit
def load_target(k, v, tile: gl.constexpr, LAYOUT: gl.constexpr):
    """The target of (1) or (1'): v - k or v, (BS, BD) in float32."""
    target = v.load(LAYOUT).to(gl.float32)
    if tile.NORM:
        target -= k.load(LAYOUT).to(gl.float32)
    return target


@gluon.jit
def inner_gradient(y, target, w_s, length, eps, tile: gl.constexpr, LAYOUT: gl.constexpr):
    """Eq. (2) from y = k A: x, r and u; u = 0 in the rows from `length` on, whatever b, w and eps are."""
    offs_t = gl.arange(0, tile.BS, layout=gl.SliceLayout(1, LAYOUT))
    if tile.NORM:
        centred = less_mean(y, mean(y, tile.D), tile.D, LAYOUT)
        r = gl.rsqrt(mean(centred * centred, tile.D) + eps)
        r = gl.where(offs_t < length, r, 0.0)
        x = centred * gl.expand_dims(r, 1)
        w = as_row(w_s.index(0), LAYOUT)
        e = (x * w + (as_row(w_s.index(1), LAYOUT) - target)) * w
        mean_e, c = two_means(e, e * x, tile.D)
        u = gl.expand_dims(r, 1) * (less_mean(e, mean_e, tile.D, LAYOUT) - x * gl.expand_dims(c, 1))
    else:
        r = gl.zeros([tile.BS], gl.float32, gl.SliceLayout(1, LAYOUT))
        x = y
        u = y - target
    return x, r, u


@gluon.jit
def chain_part(
    pid, affine, initial, saved, final, k_s, v_s, c_s, A_s, S_s, uG_s, un_s, x_s, u_s, r_s, w_s,
    full, done, read, sequence, steps, recorded, H, eps,
    tile: gl.constexpr, TOKENS: gl.constexpr, SQUARE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The steps. A is the anchor of the first, then M rounded to bfloat16."""
    h = pid % H
    pid = pid.to(gl.int64)
    anchor = load_square(initial.anchor, pid, tile, SQUARE)
    store_square(final.anchor, anchor, pid, tile, SQUARE)
    A_s.store(anchor.to(gl.bfloat16))
    fence_async_shared()
    M = load_square(initial.M, pid, tile, SQUARE)
    S = load_square(initial.S, pid, tile, SQUARE)
    if steps > 0:
        store_square(saved.M0, M, sequence.slot * H + h, tile, SQUARE)
        store_square(saved.S0, S, sequence.slot * H + h, tile, SQUARE)
    if tile.NORM:
        store_width(w_s.index(0), affine.w, h, tile, TOKENS)
        store_width(w_s.index(1), affine.b, h, tile, TOKENS)
    zero = gl.zeros([tile.BS, tile.BD], gl.float32, TOKENS)
    # the step whose M is the final anchor: that a full last chunk leaves, or that the last one starts from
    last = steps - gl.where((sequence.offset + sequence.length) % tile.BS == 0, 1, 2)

    for i in range(steps):
        slot = i % STAGES
        length = own_step(i, sequence, h, H, tile.BS, tile).length
        mbarrier.wait(full.index(slot), i // STAGES & 1)
        k = k_s.index(slot)
        if length < tile.BS:
            clear_rows(v_s.index(slot), length, tile, TOKENS)
            # last: so the compiler puts a barrier between the fence and the product that reads k
            clear_rows(k, length, tile, TOKENS)
            fence_async_shared()
        y = warpgroup_mma(k, A_s, zero, use_acc=False, is_async=True)
        # beside the product: all that needs neither y nor u
        first = ENDS * slot
        M = as_scalar(c_s.index(first + BETA_L), 0, SQUARE) * M + as_scalar(c_s.index(first + F_L), 0, SQUARE) * S
        S = as_scalar(c_s.index(first + M_L), 0, SQUARE) * S
        if tile.BD <= 64:
            target = load_target(k, v_s.index(slot), tile, TOKENS)
        y = warpgroup_mma_wait(0, deps=[y])
        # wide tiles leave no registers for it before
        if tile.BD > 64:
            target = load_target(k, v_s.index(slot), tile, TOKENS)
        x, r, u = inner_gradient(y, target, w_s, length, eps, tile, TOKENS)
        uG_s.store((as_column(c_s.index(first + G_L), TOKENS) * -2 * u).to(gl.bfloat16))
        fence_async_shared()
        k_T = k.permute((1, 0))
        M = warpgroup_mma(k_T, uG_s, M, is_async=True)
        un_s.store((as_column(c_s.index(first + N_L), TOKENS) * -2 * u).to(gl.bfloat16))
        mbarrier.wait(read.index(0), (i & 1) ^ 1)
        u_s.store(u.to(gl.bfloat16))
        if recorded > 0:
            x_s.store(x.to(gl.bfloat16))
            if tile.NORM:
                r_s.store(r)
        fence_async_shared()
        S = warpgroup_mma(k_T, un_s, S, is_async=True)
        M = warpgroup_mma_wait(1, deps=[M, k, uG_s])[0]
        A_s.store(M.to(gl.bfloat16))
        S = warpgroup_mma_wait(0, deps=[S, k, un_s])[0]
        S_s.store(S.to(gl.bfloat16))
        fence_async_shared()
        mbarrier.arrive(done.index(slot), count=1)
        if i == last:
            store_square(final.anchor, M, pid, tile, SQUARE)
    store_square(final.M, M, pid, tile, SQUARE)
    store_square(final.S, S, pid, tile, SQUARE)


@gluon.jit
def run_chain(
    pid, k_ptr, v_ptr, k_engine, v_engine, x_engine, u_engine, M0_engine, S0_engine, tokens, affine, initial, where,
    saved, final, count_ptr, T, H, recorded, eps, tile: gl.constexpr,
    TOKENS: gl.constexpr, SQUARE: gl.constexpr, COPY: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Eq. (8)-(10), as `titans.kernels.state.state_kernel`, for chunks of BS tokens, of sequence and head `pid`.

    Reads: k, v, w, b, gates, the initial state.
    Writes: M0, S0 of each block, u, the final state; how many chunks; if `recorded`, x and r of (2), x = k A in the
    plain memory.
    """
    BS: gl.constexpr = tile.BS
    BD: gl.constexpr = tile.BD
    sequence = sequence_of(pid // H, where, T, BS, tile)
    steps = step_count(sequence, BS, tile)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BS, BD], TILE)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BS, BD], TILE)
    c_s = gl.allocate_shared_memory(gl.float32, [ENDS * STAGES, BS], VECTOR)
    A_s = gl.allocate_shared_memory(gl.bfloat16, [BD, BD], TILE)
    S_s = gl.allocate_shared_memory(gl.bfloat16, [BD, BD], TILE)
    uG_s = gl.allocate_shared_memory(gl.bfloat16, [BS, BD], TILE)
    un_s = gl.allocate_shared_memory(gl.bfloat16, [BS, BD], TILE)
    x_s = gl.allocate_shared_memory(gl.bfloat16, [BS, BD], TILE)
    u_s = gl.allocate_shared_memory(gl.bfloat16, [BS, BD], TILE)
    r_s = gl.allocate_shared_memory(gl.float32, [BS], VECTOR)
    w_s = gl.allocate_shared_memory(gl.float32, [2, BD], VECTOR)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(done.index(i), count=1)
    mbarrier.init(read.index(0), count=1)
    gl.warp_specialize(
        [
            (chain_part, (pid, affine, initial, saved, final, k_s, v_s, c_s, A_s, S_s, uG_s, un_s, x_s, u_s, r_s, w_s,
                          full, done, read, sequence, steps, recorded, H, eps, tile, TOKENS, SQUARE, STAGES)),
            (save_part, (pid, x_engine, u_engine, M0_engine, S0_engine, tokens, saved, count_ptr, A_s, S_s, x_s, u_s,
                         r_s, done, read, sequence, steps, recorded, H, tile, STAGES, TOGETHER)),
            (load_part, (pid, k_ptr, v_ptr, k_engine, v_engine, tokens, k_s, v_s, c_s, full, done, sequence, steps, H,
                         tile, COPY, STAGES)),
        ],
        [2, 1],
        [REGISTERS, REGISTERS],
    )  # fmt: skip

"""The whole forward of a sequence and head in one program, for narrow tiles: M0, S0 and u stay on the chip.

forward       4 warps   u = u(k A), M and S as in `state.py`; then o of the chunk as in `output.py`
coefficients  2 warps   as in `output.py`
loader        1 warp    q, k, v and the coefficients of the chunks' ends, up to STAGES chunks ahead
saver         1 warp    M0, S0, x and r, if they are to be saved

A chain leaves its warps idle for half of the time, since each operation waits for the one before. So its warps make the
outputs as well, and where there are many, two programs share a multiprocessor.

The roles meet at barriers in shared memory:

full[slot]    loader -> forward           the operands of a chunk have arrived
done[slot]    forward -> loader, saver    they have been read; x, r and the next M0 and S0 can be saved
read          saver -> forward            they have been read, and can be overwritten
G_full[slot], G_free[slot]                as in `output.py`
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
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
    Descriptor,
    as_column,
    as_scalar,
    grid_of,
    load_square,
    store_square,
    store_width,
)
from titans.kernels.hopper.ends import BETA_L, ENDS, F_L, G_L, M_L, N_L, load_gates, store_end
from titans.kernels.hopper.output import GRAM, C, coefficients_part, read_out
from titans.kernels.hopper.state import PART_OF_FOUR, inner_gradient, load_target, save_tile
from titans.kernels.hopper.state_vjp import WARP, flag_of, load_rows, rows_of, square_of, store_edge


class Engine(NamedTuple):
    """Tensors as the copy engine moves them, a tile at once."""

    q: Descriptor  # (B T, H, D)
    k: Descriptor
    v: Descriptor
    x: Descriptor
    o: Descriptor
    M0: Descriptor  # (K H, D, D)
    S0: Descriptor


class Slots(NamedTuple):
    """Shared memory."""

    q: Any  # (STAGES, 64, 64)
    k: Any
    v: Any  # then n_Lj u_j
    A: Any  # (2, 64, 64): M; and the anchor of the first chunk, then G_Lj u_j, then o
    S: Any  # (64, 64)
    u: Any
    x: Any
    G: Any  # (GRAMS, 64, 64): -2 G_tj
    beta_f: Any  # (4 GRAMS, 64): beta_t and f_t
    gates: Any  # (2, 64): a_t and eta_t
    c: Any  # (ENDS STAGES, 64)
    r: Any  # (64,)
    wb: Any  # (2, 64)


class Flags(NamedTuple):
    """Barriers."""

    full: Any
    done: Any
    read: Any
    G_full: Any
    G_free: Any


@gluon.jit
def load_part(pid, engine, tokens, v_ptr, slots, flags, sequence, steps, H, tile: gl.constexpr, STAGES: gl.constexpr):
    """Fill the slots, as they become free."""
    h = pid % H
    for i in range(steps):
        slot = i % STAGES
        full = flags.full.index(slot)
        step = own_step(i, sequence, h, H, C, tile)
        token = sequence.begin + span(i, sequence, C, C, tile)[0]
        gates = load_gates(tokens, step, WARP)
        if i >= STAGES:
            mbarrier.wait(flags.done.index(slot), (i // STAGES - 1) & 1)
        load_rows(engine.k, tokens.k, slots.k.index(slot), full, token, h, 0, step.length, H, tile)
        load_rows(engine.q, tokens.q, slots.q.index(slot), full, token, h, 0, step.length, H, tile)
        load_rows(engine.v, v_ptr, slots.v.index(slot), full, token, h, 0, step.length, H, tile)
        store_end(slots.c, ENDS * slot, gates, step.length, tile, WARP)
        mbarrier.arrive(full)


@gluon.jit
def save_part(pid, engine, saved, slots, flags, sequence, steps, H, tile: gl.constexpr, STAGES: gl.constexpr):
    """Save x and r of each chunk, and M0 and S0 of the next."""
    h = pid % H
    for i in range(steps):
        own = own_step(i, sequence, h, H, C, tile)
        token = sequence.begin + span(i, sequence, C, C, tile)[0]
        mbarrier.wait(flags.done.index(i % STAGES), (i // STAGES) & 1)
        if i + 1 < steps:
            at = [(own.index + H).to(gl.int32), 0, 0]
            tma.async_copy_shared_to_global(engine.M0, at, square_of(slots.A.index(0)))
            tma.async_copy_shared_to_global(engine.S0, at, square_of(slots.S))
        if own.length == C:
            tma.async_copy_shared_to_global(engine.x, [token.to(gl.int32), h, 0], rows_of(slots.x))
        else:
            store_edge(saved.x, slots.x, own.row, 0, own.length, H, tile)
        if tile.NORM:
            offs_t = gl.arange(0, C, layout=WARP)
            gl.store(saved.r + own.row + offs_t * H, slots.r.load(WARP), mask=offs_t < own.length)
        tma.store_wait(0)
        mbarrier.arrive(flags.read.index(0))


@gluon.jit
def here(x):
    """x, which the compiler cannot follow: so addresses are made where they are used, and take no registers before."""
    return gl.inline_asm_elementwise("mov.u64 $0, $1;", "=l,l", [x], dtype=gl.int64, is_pure=False, pack=1)


@gluon.jit
def forward_part(
    pid, engine, o_ptr, affine, initial, saved, final, slots, flags, sequence, steps, recorded, H, eps,
    tile: gl.constexpr, STAGES: gl.constexpr, GRAMS: gl.constexpr, Y: gl.constexpr,
):  # fmt: skip
    """Eq. (8)-(11) and (5), chunk by chunk. A is the anchor of the first, then M rounded to bfloat16."""
    h = pid % H
    pid = pid.to(gl.int64)
    M_s, uG_s, S_s = slots.A.index(0), slots.A.index(1), slots.S
    anchor = load_square(initial.anchor, pid, tile, Y)
    store_square(final.anchor, anchor, pid, tile, Y)
    uG_s.store(anchor.to(gl.bfloat16))
    M = load_square(initial.M, pid, tile, Y)
    S = load_square(initial.S, pid, tile, Y)
    M_s.store(M.to(gl.bfloat16))
    S_s.store(S.to(gl.bfloat16))
    fence_async_shared()
    if recorded * steps > 0:
        store_square(saved.M0, M, sequence.slot * H + h, tile, Y)
        store_square(saved.S0, S, sequence.slot * H + h, tile, Y)
    if tile.NORM:
        store_width(slots.wb.index(0), affine.w, h, tile, Y)
        store_width(slots.wb.index(1), affine.b, h, tile, Y)
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=Y, k_width=2)
    offs_t, offs_j = grid_of(C, C, Y)
    zero = gl.zeros([C, tile.BD], gl.float32, Y)
    # the step whose M is the final anchor: that a full last chunk leaves, or that the last one starts from
    last = steps - gl.where((sequence.offset + sequence.length) % C == 0, 1, 2)
    for i in range(steps):
        slot = i % STAGES
        gram = i % GRAMS
        step = own_step(i, sequence, h, H, C, tile)
        q, k, v = slots.q.index(slot), slots.k.index(slot), slots.v.index(slot)
        mbarrier.wait(flags.full.index(slot), (i // STAGES) & 1)
        mbarrier.wait(flags.G_full.index(gram), (i // GRAMS) & 1)
        y = warpgroup_mma(k, slots.A.index(gl.where(i > 0, 0, 1)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        # beside the products: all that needs neither y nor u
        first = ENDS * slot
        M = as_scalar(slots.c.index(first + BETA_L), 0, Y) * M + as_scalar(slots.c.index(first + F_L), 0, Y) * S
        S = as_scalar(slots.c.index(first + M_L), 0, Y) * S
        y, scores, _, _ = warpgroup_mma_wait(0, deps=[y, scores, q, k])
        G = slots.G.index(gram).load(Y)
        # what is above the diagonal may overflow, and must not meet the zeros of G there
        weights = gl.convert_layout(gl.where(offs_j <= offs_t, G * scores, 0.0).to(gl.bfloat16), LEFT)
        # early: the next coefficients take nearly as long as the rest of this step
        mbarrier.arrive(flags.G_free.index(gram))
        target = load_target(k, v, tile, Y)
        x, r, u = inner_gradient(y, target, slots.wb, step.length, eps, tile, Y)
        # o of the chunk before has been read
        tma.store_wait(0)
        uG_s.store((as_column(slots.c.index(first + G_L), Y) * -2 * u).to(gl.bfloat16))
        fence_async_shared()
        k_T = k.permute((1, 0))
        M = warpgroup_mma(k_T, uG_s, M, is_async=True)
        v.store((as_column(slots.c.index(first + N_L), Y) * -2 * u).to(gl.bfloat16))
        slots.u.store(u.to(gl.bfloat16))
        if recorded > 0:
            mbarrier.wait(flags.read.index(0), (i & 1) ^ 1)
            slots.x.store(x.to(gl.bfloat16))
            if tile.NORM:
                slots.r.store(r)
        fence_async_shared()
        S = warpgroup_mma(k_T, v, S, is_async=True)
        y_M = warpgroup_mma(q, M_s, zero, use_acc=False, is_async=True)
        y_S = warpgroup_mma(q, S_s, zero, use_acc=False, is_async=True)
        pair = 2 * (i % (2 * GRAMS))
        beta, f = as_column(slots.beta_f.index(pair), Y), as_column(slots.beta_f.index(pair + 1), Y)
        M, S, y_M, y_S, _, _, _ = warpgroup_mma_wait(0, deps=[M, S, y_M, y_S, q, k, v])
        y = warpgroup_mma(weights, slots.u, beta * y_M + f * y_S, is_async=True)
        M_s.store(M.to(gl.bfloat16))
        S_s.store(S.to(gl.bfloat16))
        fence_async_shared()
        mbarrier.arrive(flags.done.index(slot))
        if i == last:
            store_square(final.anchor, M, here(pid), tile, Y)
        y, _ = warpgroup_mma_wait(0, deps=[y, weights])
        o = read_out(y, slots.wb, eps, tile, Y)
        uG_s.store(o.to(gl.bfloat16))
        fence_async_shared()
        if step.length == C:
            token = sequence.begin + span(i, sequence, C, C, tile)[0]
            tma.async_copy_shared_to_global(engine.o, [token.to(gl.int32), h, 0], rows_of(uG_s))
        else:
            save_tile(o_ptr, uG_s, step.row, H, step.length, tile, PART_OF_FOUR)
    tma.store_wait(0)
    store_square(final.M, M, pid, tile, Y)
    store_square(final.S, S, pid, tile, Y)


@gluon.jit
def fused_slots(STAGES: gl.constexpr, GRAMS: gl.constexpr):
    """Allocate the slots."""
    return Slots(
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, C], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, C], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, C], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [2, C, C], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [C, C], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [C, C], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [C, C], TILE),
        gl.allocate_shared_memory(gl.float32, [GRAMS, C, C], GRAM),
        gl.allocate_shared_memory(gl.float32, [4 * GRAMS, C], VECTOR),
        gl.allocate_shared_memory(gl.float32, [2, C], VECTOR),
        gl.allocate_shared_memory(gl.float32, [ENDS * STAGES, C], VECTOR),
        gl.allocate_shared_memory(gl.float32, [C], VECTOR),
        gl.allocate_shared_memory(gl.float32, [2, C], VECTOR),
    )


@gluon.jit(do_not_specialize=["T", "H", "recorded"])
def hopper_fused_kernel(
    # tokens (B T, H, D), states (K H, D, D), as the copy engine moves them; one by one, as Triton 3.6 wants them
    q_rows, k_rows, v_rows, x_rows, o_rows, M0_square, S0_square,
    tokens, v_ptr, affine, initial, where,
    saved, final,  # out
    o_ptr,  # out: (B, T, H, D)
    T, H, recorded, eps, tile: gl.constexpr,
    Y: gl.constexpr, STAGES: gl.constexpr, GRAMS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Eq. (8)-(11) and (5), each program for a sequence and head.

    Grid: (N H,).
    Reads: q, k, v, w, b, gates, the initial state.
    Writes: o, the final state; if `recorded`, M0 and S0 of each chunk, x and r of (2).
    """
    pid = gl.program_id(0)
    sequence = sequence_of(pid // H, where, T, C, tile)
    steps = step_count(sequence, C, tile)
    slots = fused_slots(STAGES, GRAMS)
    # k, q and v; the ends
    flags = Flags(flag_of(4, STAGES), flag_of(1, STAGES), flag_of(1, 1), flag_of(1, GRAMS), flag_of(1, GRAMS))
    engine = Engine(q_rows, k_rows, v_rows, x_rows, o_rows, M0_square, S0_square)
    gl.warp_specialize(
        [
            (forward_part, (pid, engine, o_ptr, affine, initial, saved, final, slots, flags, sequence, steps, recorded,
                            H, eps, tile, STAGES, GRAMS, Y)),
            (coefficients_part, (pid, tokens, slots, flags, sequence, steps, H, tile, GRAMS)),
            (load_part, (pid, engine, tokens, v_ptr, slots, flags, sequence, steps, H, tile, STAGES)),
            (save_part, (pid, engine, saved, slots, flags, sequence, steps * recorded, H, tile, STAGES)),
        ],
        [2, 1, 1],
        [REGISTERS, REGISTERS, REGISTERS],
    )  # fmt: skip

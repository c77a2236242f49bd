"""The reverse of the `state` stage in Gluon: one program per sequence and head, chunks of 64 tokens, three roles.

chain   4 or 8 warps   dM and dS, in the float32 accumulators of the tensor cores
loader  1 warp         k, v, x, du, dM0, dS0 through the copy engine, coefficients and row statistics
saver   1 warp         dM_L, dS_L and du through the copy engine

The chain's warps touch global memory before and after the loop only: their fences would wait for it. Step s is for
chunk steps - 1 - s and uses slot s % STAGES of every ring; k and coefficients are needed until the next step begins,
so their rings have one slot more. The rows of a chunk of fewer than 64 tokens are copied by the warps, their edges
masked: the rows beside them may be those of another sequence.

Operands of products are rounded as in the portable kernel. Two sums are taken in another order: k^T dy is accumulated
onto beta_L dM + dM0, and r is factored out of (12). A last chunk that is not full has a launch of its own, whose
results the launch for the full ones before it takes for the cotangents of a final state. Its sums have the order that
they have where the chunk is full, so that tokens behind the loss change no bit.
"""

# Gluon takes no starred tuples, and mypy no tuple that grows
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from titans.arguments import Call
from titans.kernels.block import sequence_of
from titans.kernels.hopper.common import (
    TILE,
    VECTOR,
    Descriptor,
    add_two,
    aligned,
    as_column,
    as_row,
    as_scalar,
    grid_of,
    product,
    store_width,
)
from titans.kernels.launcher import Launcher
from titans.kernels.tile import Affine, BlockState, End, Saved, State, Tile, Where

C = gl.constexpr(64)
# dM and dS are held in parts of so many columns: the fewer at once, the fewer registers
WIDTH = gl.constexpr(64)
BOX = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))
WARP = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))
EDGE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0]))
# rows of a slot of coefficients
N_L, G_L, R2, MEAN_E, C_E, BETA_L, F_L, M_L = (gl.constexpr(i) for i in range(8))


@gluon.jit
def add_three(x, y, z, x_, y_, z_):
    """Add triples."""
    return x + x_, y + y_, z + z_


class Engine(NamedTuple):
    """Tensors as the copy engine moves them, a tile at once."""

    k: Descriptor  # (B T, H, D)
    v: Descriptor
    x: Descriptor
    du: Descriptor
    dM0: Descriptor  # (K H, D, D)
    dS0: Descriptor
    dM_L: Descriptor
    dS_L: Descriptor


class Slots(NamedTuple):
    """Shared memory."""

    k: Any  # (STAGES + 1, 64, BD)
    v: Any  # (STAGES, 64, BD)
    x: Any
    du: Any
    dM0: Any  # (STAGES, BD, BD)
    dS0: Any
    dM: Any  # (BD, BD)
    dS: Any
    c: Any  # ((STAGES + 1) 8, 64): coefficients and row statistics
    wb: Any  # (2, BD)


class Flags(NamedTuple):
    """Barriers, each completed once a step."""

    k_full: Any  # loader -> chain: k has arrived
    square_full: Any  # loader -> chain: dM0, dS0 and the coefficients have arrived
    rows_full: Any  # loader -> chain: v, x and du have arrived
    taken: Any  # chain -> loader, saver: dM0 and dS0 have been read, dM and dS can be saved, the step before is over
    mid: Any  # chain -> saver: the whole of du can be saved
    late: Any  # chain -> loader: v and x have been read
    saved: Any  # saver -> chain, loader: dM, dS and du have been read


@gluon.jit
def chunks_of(where, T, H, tail, tile: gl.constexpr):
    """The sequence of this program, and the first and the number of its chunks that the launch is for.

    These are the full ones, or only the `tail`: the unfinished one at the end.
    """
    sequence = sequence_of(gl.program_id(0) // H, where, T, C, tile)
    stop = sequence.offset + sequence.length
    full = stop // C
    unfinished = gl.where((stop % C > 0) & (sequence.length > 0), 1, 0)
    return sequence, gl.where(tail > 0, full, 0), gl.where(tail > 0, unfinished, full)


@gluon.jit
def rows_of(tile):
    """A (64, BD) tile as the copy engine sees it."""
    return tile._reinterpret(gl.bfloat16, [C, 1, tile.shape[1]], BOX)


@gluon.jit
def square_of(tile):
    """A (BD, BD) tile as the copy engine sees it."""
    return tile._reinterpret(gl.bfloat16, [1, tile.shape[0], tile.shape[1]], BOX)


@gluon.jit
def edge_of(tile_s, i, H, tile: gl.constexpr):
    """Block i of 8 rows and 64 columns of a tile; its rows and columns, and their offsets in global memory."""
    block = tile_s._reinterpret(gl.bfloat16, [tile.BD // 8, 8, WIDTH], TILE).index(i)
    offs_t, offs_d = grid_of(8, WIDTH, EDGE)
    offs_t += i % 8 * 8
    offs_d += i // 8 * WIDTH
    return block, offs_t, offs_d, offs_t * (H * tile.D) + offs_d


@gluon.jit
def load_edge(tile_s, x_ptr, row, first, last, H, tile: gl.constexpr):
    """Load rows first to last - 1 of a tile, and zeros; `row` = token * H + h of row 0."""
    # a bound which the compiler does not know keeps the loop
    for i in range(tile.BD // 8 + H // 2**24):
        block, offs_t, offs_d, at = edge_of(tile_s, i, H, tile)
        mask = (offs_t >= first) & (offs_t < last) & (offs_d < tile.D)
        block.store(gl.load(x_ptr + row * tile.D + at, mask=mask, other=0.0))


@gluon.jit
def store_edge(x_ptr, tile_s, row, first, last, H, tile: gl.constexpr):
    """Store what `load_edge` would load."""
    for i in range(tile.BD // 8 + H // 2**24):
        block, offs_t, offs_d, at = edge_of(tile_s, i, H, tile)
        mask = (offs_t >= first) & (offs_t < last) & (offs_d < tile.D)
        gl.store(x_ptr + row * tile.D + at, block.load(EDGE), mask=mask)


@gluon.jit
def load_rows(desc, x_ptr, tile_s, flag, token, h, first, last, H, tile: gl.constexpr):
    """Load rows first to last - 1 of a tile that begins at `token`: whole tiles through the copy engine."""
    if last - first == C:
        mbarrier.expect(flag, C * tile.BD * 2)
        tma.async_copy_global_to_shared(desc, [token.to(gl.int32), h, 0], flag, rows_of(tile_s))
    else:
        load_edge(tile_s, x_ptr, token * H + h, first, last, H, tile)
        fence_async_shared()
        mbarrier.arrive(flag)


@gluon.jit
def load_coefficients(c_s, c8, step_end, saved, index, row, H, first, last, tile: gl.constexpr):
    """Load the coefficients of a chunk's end, and what (12) needs of each row; zero outside rows first to last - 1."""
    offs = gl.arange(0, C, layout=WARP)
    mask = (offs >= first) & (offs < last)
    # a chunk's weights begin with its first token
    at = step_end.weights + index * (2 * C) + (offs - first)
    c_s.index(c8 + N_L).store(-2.0 * gl.load(at, mask=mask, other=0.0))
    c_s.index(c8 + G_L).store(-2.0 * gl.load(at + C, mask=mask, other=0.0))
    for i in gl.static_range(3):
        c_s.index(c8 + BETA_L + i).store(gl.load(step_end.transition + index * 3 + i + offs * 0))
    if tile.NORM:
        at = row + offs * H
        r = gl.load(saved.r + at, mask=mask, other=0.0)
        c_s.index(c8 + R2).store(r * r)
        c_s.index(c8 + MEAN_E).store(gl.load(saved.means + at * 2, mask=mask, other=0.0))
        c_s.index(c8 + C_E).store(gl.load(saved.means + at * 2 + 1, mask=mask, other=0.0))


@gluon.jit
def load_part(
    engine, k_ptr, v_ptr, du_ptr, step_end, saved, slots, flags, where, T, H, tail,
    tile: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the slots, as they become free."""
    h = gl.program_id(0) % H
    sequence, lowest, steps = chunks_of(where, T, H, tail, tile)
    for s in range(steps):
        i = lowest + steps - 1 - s
        slot = s % STAGES
        k_slot = s % (STAGES + 1)
        phase = (s // STAGES - 1) & 1
        start = i * C - sequence.offset
        token = sequence.begin + start
        first, last = gl.maximum(-start, 0), gl.minimum(sequence.length - start, C)
        index = (sequence.slot + i) * H + h
        if s >= STAGES:
            mbarrier.wait(flags.taken.index(slot), phase)
        load_rows(engine.k, k_ptr, slots.k.index(k_slot), flags.k_full.index(k_slot), token, h, first, last, H, tile)
        full = flags.square_full.index(slot)
        mbarrier.expect(full, 2 * tile.BD * tile.BD * 2)
        tma.async_copy_global_to_shared(engine.dM0, [index.to(gl.int32), 0, 0], full, square_of(slots.dM0.index(slot)))
        tma.async_copy_global_to_shared(engine.dS0, [index.to(gl.int32), 0, 0], full, square_of(slots.dS0.index(slot)))
        load_coefficients(slots.c, k_slot * 8, step_end, saved, index, token * H + h, H, first, last, tile)
        mbarrier.arrive(full)
        full = flags.rows_full.index(slot)
        if tile.NORM:
            if s >= STAGES:
                mbarrier.wait(flags.late.index(slot), phase)
            load_rows(engine.v, v_ptr, slots.v.index(slot), full, token, h, first, last, H, tile)
            load_rows(engine.x, saved.x, slots.x.index(slot), full, token, h, first, last, H, tile)
        if s >= STAGES:
            mbarrier.wait(flags.saved.index(slot), phase)
        load_rows(engine.du, du_ptr, slots.du.index(slot), full, token, h, first, last, H, tile)


@gluon.jit
def save_part(engine, du_ptr, slots, flags, where, T, H, tail, tile: gl.constexpr, STAGES: gl.constexpr):
    """Write the cotangents of what each chunk leaves, and the whole of du."""
    h = gl.program_id(0) % H
    sequence, lowest, steps = chunks_of(where, T, H, tail, tile)
    for s in range(steps):
        i = lowest + steps - 1 - s
        slot = s % STAGES
        phase = (s // STAGES) & 1
        start = i * C - sequence.offset
        token = sequence.begin + start
        first, last = gl.maximum(-start, 0), gl.minimum(sequence.length - start, C)
        index = ((sequence.slot + i) * H + h).to(gl.int32)
        # dM0 and dS0 have been read by now, whose memory this may be
        mbarrier.wait(flags.taken.index(slot), phase)
        tma.async_copy_shared_to_global(engine.dM_L, [index, 0, 0], square_of(slots.dM))
        tma.async_copy_shared_to_global(engine.dS_L, [index, 0, 0], square_of(slots.dS))
        mbarrier.wait(flags.mid.index(slot), phase)
        du_s = slots.du.index(slot)
        if last - first == C:
            tma.async_copy_shared_to_global(engine.du, [token.to(gl.int32), h, 0], rows_of(du_s))
        else:
            store_edge(du_ptr, du_s, token * H + h, first, last, H, tile)
        tma.store_wait(0)
        mbarrier.arrive(flags.saved.index(slot))


@gluon.jit
def columns(tile, part: gl.constexpr):
    """A part of a tile, 64 columns."""
    return tile.slice(part * WIDTH, WIDTH, dim=1)


@gluon.jit
def place(part: gl.constexpr, Q: gl.constexpr, tile: gl.constexpr):
    """Offsets of a part of this program's D x D matrix, and which of them are in use.

    The compiler does not know that it has computed them before: else it would keep them from the first use to the last.
    """
    pid = gl.program_id(0)
    pid = gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [pid], dtype=gl.int32, is_pure=False, pack=1)
    offs_i, offs_j = grid_of(tile.BD, WIDTH, Q)
    offs_j += part * WIDTH
    return pid.to(gl.int64) * (tile.D * tile.D) + (offs_i * tile.D + offs_j), (offs_i < tile.D) & (offs_j < tile.D)


@gluon.jit
def load_state(x_ptr, Q: gl.constexpr, tile: gl.constexpr):
    """D x D matrix of this program in parts, zero outside."""
    state = ()
    for part in gl.static_range(tile.BD // WIDTH):
        at, mask = place(part, Q, tile)
        state = state + (gl.load(x_ptr + at, mask=mask, other=0.0),)
    return state


@gluon.jit
def add_state(state, x_ptr, when, Q: gl.constexpr, tile: gl.constexpr):
    """`state`, plus what `load_state` loads if `when`."""
    total = ()
    for part in gl.static_range(tile.BD // WIDTH):
        at, mask = place(part, Q, tile)
        total = total + (state[part] + gl.load(x_ptr + at, mask=mask & when, other=0.0),)
    return total


@gluon.jit
def store_state(x_ptr, state, Q: gl.constexpr, tile: gl.constexpr):
    """Store what `load_state` would load."""
    for part in gl.static_range(tile.BD // WIDTH):
        at, mask = place(part, Q, tile)
        gl.store(x_ptr + at, state[part], mask=mask)


@gluon.jit
def put(tile, state):
    """Round a state to an operand in shared memory."""
    for part in gl.static_range(len(state)):
        columns(tile, part).store(state[part].to(gl.bfloat16))


@gluon.jit
def through_decays(dM, dS, dM0, dS0, c_s, c8, Q: gl.constexpr):
    """Eq. (17)."""
    beta_L, f_L, m_L = (
        as_scalar(c_s.index(c8 + BETA_L), 0, Q),
        as_scalar(c_s.index(c8 + F_L), 0, Q),
        as_scalar(c_s.index(c8 + M_L), 0, Q),
    )
    dM_ = ()
    dS_ = ()
    for part in gl.static_range(len(dM)):
        dS_ = dS_ + (f_L * dM[part] + m_L * dS[part] + columns(dS0, part).load(Q).to(gl.float32),)
        dM_ = dM_ + (beta_L * dM[part] + columns(dM0, part).load(Q).to(gl.float32),)
    return dM_, dS_


@gluon.jit
def through_product(dM, k, dy, add, BD: gl.constexpr):
    """Eq. (18): start k^T dy, added to dM, or alone if not `add`."""
    sums = ()
    for part in gl.static_range(BD // WIDTH):
        sums = sums + (warpgroup_mma(k.permute((1, 0)), columns(dy, part), dM[part], use_acc=add, is_async=True),)
    return sums


@gluon.jit
def finished(sums, k, dy, BD: gl.constexpr):
    """Wait for `through_product`."""
    if BD == WIDTH:
        done = (warpgroup_mma_wait(0, deps=[sums[0], k, dy])[0],)
    else:
        x, y, _, _ = warpgroup_mma_wait(0, deps=[sums[0], sums[1], k, dy])
        done = (x, y)
    return done


@gluon.jit
def inner_residual(x_s, v_s, k, wb_s, Y: gl.constexpr):
    """x and z of eq. (2), and w."""
    w, b = as_row(wb_s.index(0), Y), as_row(wb_s.index(1), Y)
    x = x_s.load(Y).to(gl.float32)
    target = v_s.load(Y).to(gl.float32) - k.load(Y).to(gl.float32)
    return x, x * w + b - target, w


@gluon.jit
def row_mean(x, D: gl.constexpr):
    """A sum of rows as their mean, (64, 1)."""
    return gl.expand_dims(x * (1.0 / D), 1)


@gluon.jit
def inner_gradient_vjp(du, k, slots, slot, c8, passed, phase, Y: gl.constexpr, tile: gl.constexpr):
    """Eq. (12): dy of du, with r factored out of dg, de and dx.

    x and z are made twice, rather than kept in registers, of which there are not enough; over a barrier, one that has
    been passed, the compiler moves no loads.
    """
    x_s, v_s, c_s = slots.x.index(slot), slots.v.index(slot), slots.c
    x, z, w = inner_residual(x_s, v_s, k, slots.wb, Y)
    c_e = as_column(c_s.index(c8 + C_E), Y)
    g = (z * w - as_column(c_s.index(c8 + MEAN_E), Y)) - x * c_e
    sum_du_g, sum_du, sum_du_x = gl.reduce((du * g, du, du * x), 1, add_three)
    dr, mean_du, mean_du_x = row_mean(sum_du_g, tile.D), row_mean(sum_du, tile.D), row_mean(sum_du_x, tile.D)
    mbarrier.wait(passed, phase)
    x, z, w = inner_residual(x_s, v_s, k, slots.wb, Y)
    dx = (((du - mean_du) - mean_du_x * x) * w - mean_du_x * z) * w - du * as_column(c_s.index(c8 + C_E), Y)
    sum_dx, sum_dx_x = gl.reduce((dx, dx * x), 1, add_two)
    mean_dx, mean_dx_x = row_mean(sum_dx, tile.D), row_mean(sum_dx_x, tile.D)
    mbarrier.wait(passed, phase)
    x = x_s.load(Y).to(gl.float32)
    dy = as_column(c_s.index(c8 + R2), Y) * ((dx - mean_dx) - x * (mean_dx_x + dr))
    if tile.D != tile.BD:
        offs_d = gl.arange(0, tile.BD, layout=gl.SliceLayout(0, Y))
        dy = gl.where(gl.expand_dims(offs_d < tile.D, 0), dy, 0.0)
    return dy


@gluon.jit
def chain_part(
    affine, dfinal, dinitial, slots, flags, where, T, H, tail,
    tile: gl.constexpr, STAGES: gl.constexpr, Y: gl.constexpr, Q: gl.constexpr,
):  # fmt: skip
    """Carry dM and dS from the last chunk to the first."""
    BD: gl.constexpr = tile.BD
    _, lowest, steps = chunks_of(where, T, H, tail, tile)
    if tile.NORM:
        store_width(slots.wb.index(0), affine.w, gl.program_id(0) % H, tile, Y)
        store_width(slots.wb.index(1), affine.b, gl.program_id(0) % H, tile, Y)
    # the final anchor is the memory that a full last chunk leaves
    dM = add_state(load_state(dfinal.M, Q, tile), dfinal.anchor, (steps > 0) & (tail == 0), Q, tile)
    dS = load_state(dfinal.S, Q, tile)
    put(slots.dM, dM)
    put(slots.dS, dS)
    fence_async_shared()
    # dy has the place of the first rows of dM, which is not read any more when dy is made
    dy_s = slots.dM._reinterpret(gl.bfloat16, [C, BD], TILE)
    zero = gl.zeros([C, BD], gl.float32, Y)
    for s in range(steps):
        slot = s % STAGES
        phase = (s // STAGES) & 1
        k_slot = s % (STAGES + 1)
        k = slots.k.index(k_slot)
        c8 = k_slot * 8
        mbarrier.wait(flags.k_full.index(k_slot), (s // (STAGES + 1)) & 1)
        k_dS = warpgroup_mma(k, slots.dS, zero, use_acc=False, is_async=True)
        mbarrier.wait(flags.square_full.index(slot), phase)
        dM, dS = through_decays(dM, dS, slots.dM0.index(slot), slots.dS0.index(slot), slots.c, c8, Q)
        mbarrier.arrive(flags.taken.index(slot))
        # (15)
        mbarrier.wait(flags.rows_full.index(slot), phase)
        k_dS = warpgroup_mma_wait(0, deps=[k_dS, k, slots.dS])[0]
        k_dM = warpgroup_mma(k, slots.dM, zero, use_acc=False, is_async=True)
        du_s = slots.du.index(slot)
        du = du_s.load(Y).to(gl.float32) + as_column(slots.c.index(c8 + N_L), Y) * k_dS
        k_dM = warpgroup_mma_wait(0, deps=[k_dM, k, slots.dM])[0]
        du += as_column(slots.c.index(c8 + G_L), Y) * k_dM
        du_s.store(du.to(gl.bfloat16))
        fence_async_shared()
        mbarrier.arrive(flags.mid.index(slot))
        if tile.NORM:
            dy = inner_gradient_vjp(du, k, slots, slot, c8, flags.rows_full.index(slot), phase, Y, tile)
        else:
            dy = du
        mbarrier.wait(flags.saved.index(slot), phase)
        dy_s.store(dy.to(gl.bfloat16))
        fence_async_shared()
        if tile.NORM:
            mbarrier.arrive(flags.late.index(slot))
        put(slots.dS, dS)
        # (18): the anchor of every chunk but the first is the memory it starts from
        if (s < steps - 1) | (lowest > 0):
            dM = finished(through_product(dM, k, dy_s, True, BD), k, dy_s, BD)
            put(slots.dM, dM)
        fence_async_shared()
    store_state(dinitial.M, dM, Q, tile)
    store_state(dinitial.S, dS, Q, tile)
    dA = ()
    for _ in gl.static_range(BD // WIDTH):
        dA = dA + (gl.zeros([BD, WIDTH], gl.float32, Q),)
    if (steps > 0) & (lowest == 0):
        k = slots.k.index((steps - 1) % (STAGES + 1))
        dA = finished(through_product(dA, k, dy_s, False, BD), k, dy_s, BD)
    dA = add_state(dA, dfinal.anchor, (steps == 0) | (tail > 0), Q, tile)
    store_state(dinitial.anchor, dA, Q, tile)


@gluon.jit
def slots_of(BD: gl.constexpr, STAGES: gl.constexpr):
    """Allocate the slots."""
    return Slots(
        gl.allocate_shared_memory(gl.bfloat16, [STAGES + 1, C, BD], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, BD], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, BD], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, BD], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, BD, BD], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, BD, BD], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [BD, BD], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [BD, BD], TILE),
        gl.allocate_shared_memory(gl.float32, [(STAGES + 1) * 8, C], VECTOR),
        gl.allocate_shared_memory(gl.float32, [2, BD], VECTOR),
    )


@gluon.jit
def flag_of(arrivals: gl.constexpr, STAGES: gl.constexpr):
    """Allocate a ring of barriers."""
    flag = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(flag.index(slot), count=arrivals)
    return flag


@gluon.jit(do_not_specialize=["T", "H", "tail"])
def hopper_state_vjp_kernel(
    k_ptr, v_ptr,  # (B, T, H, D)
    # one by one, as Triton 3.6 wants them
    k_engine, v_engine, x_engine, du_engine, dM0_engine, dS0_engine, dM_L_engine, dS_L_engine,
    affine, step_end, saved, where,
    dfinal,
    du_ptr,  # (B, T, H, D), in and out: the part through the outputs becomes the whole
    dinitial,  # out
    T, H, tail, tile: gl.constexpr,
    TOKENS: gl.constexpr, STATES: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Eq. (15), (12), (17), (18): the reverse of the chain, last chunk first, carrying dM and dS.

    Grid: (N H,).
    Reads: k, v, w, b, coefficients, x, r and the means of (2); du, dM0 and dS0 as far as they come from outputs.
    Writes: dM_L and dS_L of each chunk, du, and the cotangents of the initial state.
    """
    engine = Engine(
        k_engine, v_engine, x_engine, du_engine, dM0_engine, dS0_engine, dM_L_engine, dS_L_engine
    )  # fmt: skip
    slots = slots_of(tile.BD, STAGES)
    flags = Flags(
        flag_of(1, STAGES + 1),
        flag_of(2, STAGES),  # dM0 and dS0; the coefficients
        flag_of(3 if tile.NORM else 1, STAGES),  # v, x and du
        flag_of(1, STAGES),
        flag_of(1, STAGES),
        flag_of(1, STAGES),
        flag_of(1, STAGES),
    )
    gl.warp_specialize(
        [
            (chain_part, (affine, dfinal, dinitial, slots, flags, where, T, H, tail, tile, STAGES, TOKENS, STATES)),
            (load_part, (engine, k_ptr, v_ptr, du_ptr, step_end, saved, slots, flags, where, T, H, tail, tile, STAGES)),
            (save_part, (engine, du_ptr, slots, flags, where, T, H, tail, tile, STAGES)),
        ],
        [1, 1],
        [REGISTERS, REGISTERS],
    )


@functools.cache
def options(BD: int) -> dict[str, Any]:
    """Constants of the kernel that depend on the width of its tiles."""
    if BD == 64:
        layout = product([4, 1], 64)
        return {"TOKENS": layout, "STATES": layout, "STAGES": 2, "REGISTERS": 64, "num_warps": 4}
    # with 24 registers for the other warps there are 240 for those of the chain
    return {
        "TOKENS": product([4, 2], 64), "STATES": product([8, 1], 64), "STAGES": 1, "REGISTERS": 24, "num_warps": 8,
    }  # fmt: skip


run = Launcher(hopper_state_vjp_kernel)


def rows_of_heads(x: Tensor, BD: int) -> Descriptor:
    """Tiles (64, 1, BD) of x, shape (B, T, H, D)."""
    B, T, H, D = x.shape
    return Descriptor(x, [B * T, H, D], [H * D, D, 1], [C.value, 1, BD], BOX.value)


def squares(x: Tensor, BD: int) -> Descriptor:
    """Tiles (1, BD, BD) of x, shape (K, H, D, D)."""
    K, H, D, _ = x.shape
    return Descriptor(x, [K * H, D, D], [D * D, D, 1], [1, BD, BD], BOX.value)


def launch_state_vjp(
    call: Call, where: Where, tile: Tile, step_end: End, saved: Saved, dfinal: State, du: Tensor, dstate0: BlockState,
    dstate_L: BlockState, dinitial: State, key: Hashable,
) -> None:  # fmt: skip
    """Launch the kernel, as `titans.kernels.launch.state_vjp` does the portable one.

    Once, or twice where a sequence may end inside a chunk: first for that chunk, then for the full ones before it.
    """
    N, H = call.M.shape[:2]
    T, BD = call.q.shape[1], 64 if call.q.shape[-1] <= 64 else 128
    if T == 0:
        # there is nothing for the copy engine to move
        for new, old in zip(dinitial, dfinal, strict=True):
            new.copy_(old)
        return
    k, v = aligned(call.k), aligned(call.v)
    tensors = {"k": k, "v": v, "x": saved.x, "du": du}
    states = {"dM0": dstate0.M, "dS0": dstate0.S, "dM_L": dstate_L.M, "dS_L": dstate_L.S}
    engines = {f"{name}_engine": rows_of_heads(x, BD) for name, x in tensors.items()}
    engines |= {f"{name}_engine": squares(x, BD) for name, x in states.items()}
    ragged = where.cu_seqlens is not None or where.offset is not None or T % C.value > 0
    for tail in (1, 0) if ragged else (0,):
        reached = State(*(torch.empty_like(x) for x in dinitial)) if tail else dinitial
        run(
            N * H, key,
            k_ptr=k, v_ptr=v, **engines, affine=Affine(call.w, call.b), step_end=step_end, saved=saved, where=where,
            dfinal=dfinal, du_ptr=du, dinitial=reached, T=T, H=H, tail=tail, tile=tile, **options(BD),
        )  # fmt: skip
        dfinal = reached

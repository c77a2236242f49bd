"""The `output` stage in Gluon: one program per sequence and head, which follows that of the chain, chunk by chunk.

outputs       4 or 8 warps   o = y + norm(y) w + b
coefficients  2 warps        beta_t, f_t and G_tj of (7) from the gates: G is never stored
loader        1 warp         q, k, u, M0 and S0 through the copy engine

The chain counts the chunks whose u, M0 and S0 it has stored, and the loader waits for them: see `handover.py`.

The roles meet at barriers in shared memory:

rows_full[slot]     loader -> outputs         q, k and u of a chunk have arrived
square_full[slot]   loader -> outputs         M0 and S0 have arrived
done[slot]          outputs -> loader         all of a chunk's tiles have been read
G_full[slot]        coefficients -> outputs   the coefficients of a chunk are there
G_free[slot]        outputs -> coefficients   they have been read
"""

from __future__ import annotations

from typing import Any, NamedTuple

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

from titans.kernels.block import own_step, sequence_of, span, step_count
from titans.kernels.hopper.common import (
    TILE,
    VECTOR,
    Descriptor,
    as_column,
    as_row,
    grid_of,
    less_mean,
    mean,
    save_rows,
    store_width,
)
from titans.kernels.hopper.handover import LINE, wait_for
from titans.kernels.hopper.state_vjp import flag_of, load_rows, rows_of, square_of

C = gl.constexpr(64)
# so many rows of G are made, and stored, at once
BAND = gl.constexpr(8)
BANDS = gl.constexpr(8)
GRAM = gl.constexpr(gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0]))
# a thread makes one column of G
COLUMNS = gl.constexpr(gl.BlockedLayout([8, 1], [1, 32], [1, 2], [1, 0]))
COLUMN = gl.constexpr(gl.SliceLayout(0, COLUMNS.value))
# both warps scan alike
SCAN = gl.constexpr(gl.BlockedLayout([2], [32], [2], [0]))


class Engine(NamedTuple):
    """Tensors as the copy engine moves them, a tile at once."""

    q: Descriptor  # (B T, H, D)
    k: Descriptor
    u: Descriptor
    o: Descriptor
    M0: Descriptor  # (K H, D, D)
    S0: Descriptor


class Tokens(NamedTuple):
    """Tensors as the warps read them."""

    q: Tensor  # (B, T, H, D)
    k: Tensor
    u: Tensor
    theta: Tensor  # (B, T, H)
    alpha: Tensor
    eta: Tensor


class Slots(NamedTuple):
    """Shared memory."""

    q: Any  # (ROWS, 64, BD)
    k: Any
    u: Any
    M0: Any  # (SQUARES, BD, BD)
    S0: Any
    o: Any  # (64, BD)
    G: Any  # (GRAMS, 64, 64): -2 G_tj
    beta_f: Any  # (4 GRAMS, 64): beta_t and f_t, which may be read after G has been freed
    gates: Any  # (2, 64): a_t and eta_t
    wb: Any  # (2, BD)


class Flags(NamedTuple):
    """Barriers."""

    rows_full: Any
    square_full: Any
    done: Any
    G_full: Any
    G_free: Any


@gluon.jit
def load_part(
    pid, engine, tokens, count_ptr, slots, flags, sequence, steps, H,
    tile: gl.constexpr, ROWS: gl.constexpr, SQUARES: gl.constexpr,
):  # fmt: skip
    """Fill the slots, as they become free and as the chain goes on."""
    h = pid % H
    seen = steps * 0
    for i in range(steps):
        slot = i % ROWS
        full = flags.rows_full.index(slot)
        step = own_step(i, sequence, h, H, C, tile)
        token = sequence.begin + span(i, sequence, C, C, tile)[0]
        if i >= ROWS:
            mbarrier.wait(flags.done.index(slot), (i // ROWS - 1) & 1)
        load_rows(engine.q, tokens.q, slots.q.index(slot), full, token, h, 0, step.length, H, tile)
        load_rows(engine.k, tokens.k, slots.k.index(slot), full, token, h, 0, step.length, H, tile)
        seen = wait_for(count_ptr + pid * LINE, seen, i + 1)
        load_rows(engine.u, tokens.u, slots.u.index(slot), full, token, h, 0, step.length, H, tile)
        if i >= SQUARES:
            before = i - SQUARES
            mbarrier.wait(flags.done.index(before % ROWS), (before // ROWS) & 1)
        at = [step.index.to(gl.int32), 0, 0]
        full = flags.square_full.index(i % SQUARES)
        mbarrier.expect(full, 2 * tile.BD * tile.BD * 2)
        tma.async_copy_global_to_shared(engine.M0, at, full, square_of(slots.M0.index(i % SQUARES)))
        tma.async_copy_global_to_shared(engine.S0, at, full, square_of(slots.S0.index(i % SQUARES)))


@gluon.jit
def load_gates(tokens, i, sequence, h, H, tile: gl.constexpr):
    """The gates of chunk i, as they were passed, zero outside it."""
    step = own_step(i, sequence, h, H, C, tile)
    offs_t = gl.arange(0, C, layout=COLUMN)
    at = step.row + offs_t * H
    mask = offs_t < step.length
    theta = gl.load(tokens.theta + at, mask=mask, other=0.0)
    alpha = gl.load(tokens.alpha + at, mask=mask, other=0.0)
    eta = gl.load(tokens.eta + at, mask=mask, other=0.0)
    return theta.to(gl.float32), alpha.to(gl.float32), eta.to(gl.float32)


@gluon.jit
def add(x, y):
    """Add."""
    return x + y


@gluon.jit
def then(m, f, beta, later_m, later_f, later_beta):
    """Eq. (7) for two runs of tokens as one: what they make of S, and of S and M for M."""
    return later_m * m, later_f * m + later_beta * f, later_beta * beta


@gluon.jit
def beta_f(slots, alpha, tile: gl.constexpr):
    """beta_t and f_t of (7); as in `coefficients_kernel`, beta_t from the sum of the logs where that is little."""
    a, eta = slots.gates.index(0).load(SCAN), slots.gates.index(1).load(SCAN)
    _, f, beta = gl.associative_scan((eta, eta, a), 0, then)
    if tile.LOG:
        sums = gl.associative_scan(gl.convert_layout(alpha, SCAN), 0, add)
        beta = gl.where(sums > -1, gl.exp(sums), beta)
    return beta, f


@gluon.jit
def coefficients_part(pid, tokens, slots, flags, sequence, steps, H, tile: gl.constexpr, GRAMS: gl.constexpr):
    """Eq. (7): -2 G_tj, beta_t and f_t; a thread makes one column of G, row after row."""
    h = pid % H
    offs_j = gl.arange(0, C, layout=COLUMN)
    rows = gl.expand_dims(gl.arange(0, BAND, layout=gl.SliceLayout(1, COLUMNS)), 1)
    gates_s = slots.gates._reinterpret(gl.float32, [2 * BANDS, BAND], VECTOR)
    G_s = slots.G._reinterpret(gl.float32, [GRAMS * BANDS, BAND, C], GRAM)
    theta, alpha, eta = load_gates(tokens, 0, sequence, h, H, tile)
    for i in range(steps):
        slot = i % GRAMS
        log_a = alpha
        if tile.LOG:
            theta, alpha, eta = gl.exp(theta), gl.exp(alpha), gl.exp(eta)
        else:
            alpha = 1 - alpha
        slots.gates.index(0).store(alpha)
        slots.gates.index(1).store(eta)
        weight = -2 * theta
        theta, alpha, eta = load_gates(tokens, gl.minimum(i + 1, steps - 1), sequence, h, H, tile)
        beta, f = beta_f(slots, log_a, tile)
        # the outputs have read what is there
        mbarrier.wait(flags.G_free.index(slot), ((i // GRAMS) & 1) ^ 1)
        pair = 2 * (i % (2 * GRAMS))
        slots.beta_f.index(pair).store(beta)
        slots.beta_f.index(pair + 1).store(f)
        n = gl.zeros([C], gl.float32, COLUMN)
        G = n
        # the compilers do not know the bound, so they keep the loop: all roles share the instruction cache
        for band in range(BANDS + H // 2**24):
            a_s, eta_s = gates_s.index(band), gates_s.index(BANDS + band)
            offs = offs_j - band * BAND
            G_band = gl.zeros([BAND, C], gl.float32, COLUMNS)
            for t in gl.static_range(BAND):
                n = gl.where(offs == t, weight, eta_s.slice(t, 1).load(COLUMN) * n)
                G = a_s.slice(t, 1).load(COLUMN) * G + n
                G_band = gl.where(rows == t, gl.expand_dims(G, 0), G_band)
            G_s.index(slot * BANDS + band).store(G_band)
        mbarrier.arrive(flags.G_full.index(slot))


@gluon.jit
def read_out(y, wb_s, eps, tile: gl.constexpr, Y: gl.constexpr):
    """Eq. (5): o."""
    o = y
    if tile.NORM:
        centred = less_mean(y, mean(y, tile.D), tile.D, Y)
        r = gl.rsqrt(mean(centred * centred, tile.D) + eps)
        o += centred * gl.expand_dims(r, 1) * as_row(wb_s.index(0), Y) + as_row(wb_s.index(1), Y)
    return o


@gluon.jit
def output_part(
    pid, engine, o_ptr, affine, slots, flags, sequence, steps, H, eps,
    tile: gl.constexpr, ROWS: gl.constexpr, SQUARES: gl.constexpr, GRAMS: gl.constexpr, Y: gl.constexpr,
    COPY: gl.constexpr,
):  # fmt: skip
    """Eq. (11) and (5)."""
    h = pid % H
    if tile.NORM:
        store_width(slots.wb.index(0), affine.w, h, tile, Y)
        store_width(slots.wb.index(1), affine.b, h, tile, Y)
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=Y, k_width=2)
    offs_t, offs_j = grid_of(C, C, Y)
    zero = gl.zeros([C, tile.BD], gl.float32, Y)
    no_scores = gl.zeros([C, C], gl.float32, Y)
    for i in range(steps):
        slot = i % ROWS
        gram = i % GRAMS
        step = own_step(i, sequence, h, H, C, tile)
        q, k, u = slots.q.index(slot), slots.k.index(slot), slots.u.index(slot)
        M0, S0 = slots.M0.index(i % SQUARES), slots.S0.index(i % SQUARES)
        mbarrier.wait(flags.rows_full.index(slot), (i // ROWS) & 1)
        scores = warpgroup_mma(q, k.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        mbarrier.wait(flags.square_full.index(i % SQUARES), (i // SQUARES) & 1)
        y_M = warpgroup_mma(q, M0, zero, use_acc=False, is_async=True)
        y_S = warpgroup_mma(q, S0, zero, use_acc=False, is_async=True)
        mbarrier.wait(flags.G_full.index(gram), (i // GRAMS) & 1)
        G = slots.G.index(gram).load(Y)
        pair = 2 * (i % (2 * GRAMS))
        beta, f = as_column(slots.beta_f.index(pair), Y), as_column(slots.beta_f.index(pair + 1), Y)
        scores, _, _ = warpgroup_mma_wait(2, deps=[scores, q, k])
        # what is above the diagonal may overflow, and must not meet the zeros of G there
        weights = gl.convert_layout(gl.where(offs_j <= offs_t, G * scores, 0.0).to(gl.bfloat16), LEFT)
        mbarrier.arrive(flags.G_free.index(gram))
        y_M, y_S, _, _, _ = warpgroup_mma_wait(0, deps=[y_M, y_S, q, M0, S0])
        y = warpgroup_mma(weights, u, beta * y_M + f * y_S, is_async=True)
        y, _, _ = warpgroup_mma_wait(0, deps=[y, weights, u])
        mbarrier.arrive(flags.done.index(slot))
        o = read_out(y, slots.wb, eps, tile, Y)
        tma.store_wait(0)
        slots.o.store(o.to(gl.bfloat16))
        fence_async_shared()
        if step.length == C:
            token = sequence.begin + span(i, sequence, C, C, tile)[0]
            tma.async_copy_shared_to_global(engine.o, [token.to(gl.int32), h, 0], rows_of(slots.o))
        else:
            save_rows(o_ptr, slots.o, step.row, H, step.length, tile.D, COPY)
    tma.store_wait(0)


@gluon.jit
def output_slots(BD: gl.constexpr, ROWS: gl.constexpr, SQUARES: gl.constexpr, GRAMS: gl.constexpr):
    """Allocate the slots."""
    return Slots(
        gl.allocate_shared_memory(gl.bfloat16, [ROWS, C, BD], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [ROWS, C, BD], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [ROWS, C, BD], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [SQUARES, BD, BD], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [SQUARES, BD, BD], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [C, BD], TILE),
        gl.allocate_shared_memory(gl.float32, [GRAMS, C, C], GRAM),
        gl.allocate_shared_memory(gl.float32, [4 * GRAMS, C], VECTOR),
        gl.allocate_shared_memory(gl.float32, [2, C], VECTOR),
        gl.allocate_shared_memory(gl.float32, [2, BD], VECTOR),
    )


@gluon.jit
def run_outputs(
    pid, engine, tokens, affine, where, count_ptr, o_ptr, T, H, eps, tile: gl.constexpr,
    Y: gl.constexpr, COPY: gl.constexpr, ROWS: gl.constexpr, SQUARES: gl.constexpr, GRAMS: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Eq. (11) and (5), as `titans.kernels.output.output_kernel`, for chunks of 64 tokens, of sequence and head `pid`.

    Reads: q, k, w, b, gates; M0, S0 and u of the chain, which may be running.
    Writes: o.
    """
    sequence = sequence_of(pid // H, where, T, C, tile)
    steps = step_count(sequence, C, tile)
    slots = output_slots(tile.BD, ROWS, SQUARES, GRAMS)
    # q, k and u; M0 and S0 together
    flags = Flags(flag_of(3, ROWS), flag_of(1, SQUARES), flag_of(1, ROWS), flag_of(1, GRAMS), flag_of(1, GRAMS))
    gl.warp_specialize(
        [
            (output_part, (pid, engine, o_ptr, affine, slots, flags, sequence, steps, H, eps,
                           tile, ROWS, SQUARES, GRAMS, Y, COPY)),
            (coefficients_part, (pid, tokens, slots, flags, sequence, steps, H, tile, GRAMS)),
            (load_part, (pid, engine, tokens, count_ptr, slots, flags, sequence, steps, H, tile, ROWS, SQUARES)),
        ],
        [2, 1],
        [REGISTERS, REGISTERS],
    )  # fmt: skip

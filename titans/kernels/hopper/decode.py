"""One token in one launch, in Gluon: `titans.kernels.decode`, with the token as a column; the bits of the forward.

A product with a single row would fill a sixty-fourth of a tensor core's tile. Here the state is the left operand and
the token's k and q are columns of the right one, which has 8: y^T = M^T (k, q)^T. Every element is the same sum in the
same order. Sums along a row are taken as the forward takes them, 64 columns by four threads. The coefficients that the
forward makes by scans, `beta_f` and `end_of`, are made by the same scans over the gates of the block.

All warps of a program take part in all of its sums, so with one head they all do the same. Where there are many
programs, their instructions and not their bytes take the time: there each has four heads, one for each warp.
"""

# Triton has no `(*x, y)`
# ruff: noqa: RUF005

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from titans.arguments import Call
from titans.decoding import DecodeFields, DecodeState
from titans.kernels.coefficients import linear_gates
from titans.kernels.decode import DECAYS, GATES, Decay, decayed, load_decay, meet, place_of, store_decay
from titans.kernels.hopper.common import TILE, VECTOR, aligned, as_scalar, grid_of, product
from titans.kernels.hopper.ends import near_one
from titans.kernels.hopper.ends import then as end_then
from titans.kernels.hopper.output import add, then
from titans.kernels.hopper.state_vjp import WARP
from titans.kernels.tile import Affine, Tile

# of a product with tokens as columns
COLUMN = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 16]))
DOWN = gl.constexpr(gl.SliceLayout(1, COLUMN.value))
# the columns of a token
KEY, QUERY = gl.constexpr(0), gl.constexpr(1)
# 8 rows: k, q, and zeros; or those of a block among which the token's is
EIGHT = gl.constexpr(gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0]))
# a row for each head
FLAT = gl.constexpr(gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0]))
HEAD = gl.constexpr(gl.SliceLayout(1, FLAT.value))
# 64 rows or columns of tiles that move a state
PART = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
SQUARE = gl.constexpr(product([4, 1], 64))
# all warps scan alike
SCAN = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))
# programs of one narrow head that an H200 runs at once: four on each multiprocessor
AT_ONCE = 528
MATRIX = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0]))
HALVES = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[2, 1, 0]))


class Slots(NamedTuple):
    """Shared memory. Tiles of bfloat16 are one for each head, which the compiler knows to be apart."""

    M0: Any  # (BD, BD)
    S0: Any
    u: Any  # (64, BD), in the place of M0
    k: Any  # of wide heads in the place of M0, too
    weights: Any  # (8, 64), its row QUERY
    token: Any  # (HEADS, 8, BD), its rows KEY and QUERY
    y: Any  # (HEADS, BD): k A, then q M
    row: Any  # u, then o
    w: Any
    b: Any
    rest: Any  # b less the target, or the target; then k
    G: Any  # (HEADS, 64)
    beta_f: Any  # (2, HEADS)
    end: Any  # (5, 64): (7) at the end of a block


@gluon.jit
def tiles(HEADS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """A tile for each head."""
    found = ()
    for _ in gl.static_range(HEADS):
        found = found + (gl.allocate_shared_memory(gl.bfloat16, [ROWS, COLUMNS], TILE),)
    return found


@gluon.jit
def vectors(COUNT: gl.constexpr, SIZE: gl.constexpr):
    """Vectors of float32."""
    return gl.allocate_shared_memory(gl.float32, [COUNT, SIZE], VECTOR)


@gluon.jit
def allocate(HEADS: gl.constexpr, BD: gl.constexpr):
    """Allocate the slots."""
    M0, S0, weights = tiles(HEADS, BD, BD), tiles(HEADS, BD, BD), tiles(HEADS, 8, 64)
    u, k = (), ()
    for g in gl.static_range(HEADS):
        parts = M0[g]._reinterpret(gl.bfloat16, [BD // 64, 64, BD], TILE)
        u = u + (parts.index(0),)
        if BD > 64:
            k = k + (parts.index(1),)
    if BD == 64:
        k = tiles(HEADS, 64, BD)
    token = gl.allocate_shared_memory(gl.bfloat16, [HEADS, 8, BD], TILE)
    rows = vectors(HEADS, BD), vectors(HEADS, BD), vectors(HEADS, BD), vectors(HEADS, BD), vectors(HEADS, BD)
    return Slots(M0, S0, u, k, weights, token, *rows, vectors(HEADS, 64), vectors(2, HEADS), vectors(5, 64))


class Coefficients(NamedTuple):
    """Coefficients of a block, and gates of a token, as they are loaded or as they are made of them."""

    theta: Any  # (HEADS,)
    alpha: Any
    eta: Any
    n: Any  # (HEADS, 64)
    G: Any
    a_j: Any
    eta_j: Any
    log_a_j: Any
    decay: Any  # (HEADS,) each


@gluon.jit
def copy_rows(rows_s, x_ptr, index, t, tile: gl.constexpr, ROWS: gl.constexpr):
    """Start copying the rows of a block before row t, zero outside."""
    offs_t, offs_d = grid_of(64, tile.BD, ROWS)
    at = x_ptr + index * 64 * tile.D + (offs_t * tile.D + offs_d)
    async_copy.async_copy_global_to_shared(rows_s, at, mask=(offs_t < t) & (offs_d < tile.D))


@gluon.jit
def copy_square(square_s, x_ptr, index, tile: gl.constexpr, ROWS: gl.constexpr):
    """Start copying a D x D matrix, zero outside."""
    offs_i, offs_j = grid_of(tile.BD, tile.BD, ROWS)
    at = x_ptr + index * tile.D * tile.D + (offs_i * tile.D + offs_j)
    if tile.D == tile.BD:
        async_copy.async_copy_global_to_shared(square_s, at)
    else:
        async_copy.async_copy_global_to_shared(square_s, at, mask=(offs_i < tile.D) & (offs_j < tile.D))


@gluon.jit
def copy_blocks(blocks, x_ptr, first, t, tile: gl.constexpr, ROWS: gl.constexpr):
    """`copy_rows` for each head."""
    for g in gl.static_range(len(blocks)):
        copy_rows(blocks[g], x_ptr, first + g, t, tile, ROWS)


@gluon.jit
def copy_squares(squares, x_ptr, first, tile: gl.constexpr, ROWS: gl.constexpr):
    """`copy_square` for each head."""
    for g in gl.static_range(len(squares)):
        copy_square(squares[g], x_ptr, first + g, tile, ROWS)


@gluon.jit
def load_tokens(k_ptr, q_ptr, first, tile: gl.constexpr, HEADS: gl.constexpr):
    """k and q of each head as the first of 8 rows, the others zero."""
    offs_t, offs_d = grid_of(8 * HEADS, tile.BD, EIGHT)
    at = first * tile.D + (offs_t // 8 * tile.D + offs_d)
    at = gl.where(offs_t % 8 == KEY, k_ptr + at, q_ptr + at)
    return gl.load(at, mask=(offs_t % 8 <= QUERY) & (offs_d < tile.D), other=0)


@gluon.jit
def load_heads(x_ptr, first, tile: gl.constexpr, ROWS: gl.constexpr):
    """ROWS rows of width D from row `first` on, in float32, zero outside."""
    offs_h, offs_d = grid_of(ROWS, tile.BD, FLAT)
    return gl.load(x_ptr + first * tile.D + (offs_h * tile.D + offs_d), mask=offs_d < tile.D, other=0).to(gl.float32)


@gluon.jit
def store_heads(x_ptr, value, first, t, tile: gl.constexpr):
    """Store a row for each head as row t of its block."""
    offs_h, offs_d = grid_of(value.shape[0], tile.BD, FLAT)
    at = x_ptr + (first * 64 + t) * tile.D + (offs_h * (64 * tile.D) + offs_d)
    gl.store(at, value.to(x_ptr.dtype.element_ty), mask=offs_d < tile.D)


@gluon.jit
def flat(vectors):
    """Vectors in shared memory, one for each head, as one tile."""
    return vectors._reinterpret(gl.float32, [vectors.shape[0], vectors.shape[1]], MATRIX)


@gluon.jit
def halves(vectors, tile: gl.constexpr):
    """Vectors in shared memory, one for each head, in columns of 64 numbers."""
    return vectors._reinterpret(gl.float32, [vectors.shape[0], tile.BD // 64, 64], HALVES)


@gluon.jit
def eight_of(rows_s, i: gl.constexpr, t, tile: gl.constexpr):
    """64 columns of the 8 rows of a block among which row t is."""
    return rows_s._reinterpret(gl.bfloat16, [tile.BD // 8, 8, 64], TILE).index(8 * i + t // 8)


@gluon.jit
def inserted(blocks, rows, t, tile: gl.constexpr):
    """The eight rows of each block with a row in place of row t, 64 columns at a time."""
    offs_t, _ = grid_of(8, 64, EIGHT)
    eights = ()
    for g in gl.static_range(len(blocks)):
        columns = rows.index(g)._reinterpret(gl.float32, [tile.BD // 64, 64], VECTOR)
        for i in gl.static_range(tile.BD // 64):
            row = gl.expand_dims(columns.index(i).load(gl.SliceLayout(0, EIGHT)).to(gl.bfloat16), 0)
            eights = eights + (gl.where(offs_t == t % 8, row, eight_of(blocks[g], i, t, tile).load(EIGHT)),)
    return eights


@gluon.jit
def store_eights(blocks, eights, t, tile: gl.constexpr):
    """Put them where they were."""
    for g in gl.static_range(len(blocks)):
        for i in gl.static_range(tile.BD // 64):
            eight_of(blocks[g], i, t, tile).store(eights[g * (tile.BD // 64) + i])


@gluon.jit
def insert(k_s, k, u_s, u, t, tile: gl.constexpr):
    """Put k and u of the token in place of row t of each block."""
    # all are loaded before any is stored: a store after a load of the same tile makes a barrier
    keys, values = inserted(k_s, k, t, tile), inserted(u_s, u, t, tile)
    store_eights(k_s, keys, t, tile)
    store_eights(u_s, values, t, tile)


@gluon.jit
def times(square_s, token_s, tile: gl.constexpr):
    """Start x square for the rows x of a token, column by column, (BD, 8)."""
    zero = gl.zeros([tile.BD, 8], gl.float32, COLUMN)
    return warpgroup_mma(square_s.permute((1, 0)), token_s.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def waited(ys):
    """The products of the heads, which were started in their order."""
    done = ()
    for g in gl.static_range(len(ys)):
        done = done + (warpgroup_mma_wait(len(ys) - 1 - g, deps=[ys[g]]),)
    return done


@gluon.jit
def products(squares, token_s, tile: gl.constexpr):
    """`times` for each head."""
    ys = ()
    for g in gl.static_range(len(squares)):
        ys = ys + (times(squares[g], token_s.index(g), tile),)
    return waited(ys)


@gluon.jit
def column(y, which: gl.constexpr):
    """A column of a product, (BD,)."""
    offs = gl.expand_dims(gl.arange(0, 8, layout=gl.SliceLayout(0, COLUMN)), 0)
    return gl.sum(gl.where(offs == which, y, 0.0), 1)


@gluon.jit
def store_columns(y_s, ys, which: gl.constexpr, tile: gl.constexpr):
    """Keep a column of the product of each head, of one or of four."""
    if len(ys) == 4:
        first = gl.join(column(ys[0], which), column(ys[1], which))
        y = gl.join(first, gl.join(column(ys[2], which), column(ys[3], which)))
        flat(y_s).store(gl.reshape(gl.permute(y, (2, 1, 0)), [4, tile.BD]))
    else:
        y_s.index(0).store(column(ys[0], which))


@gluon.jit
def mean(x, tile: gl.constexpr):
    """Mean of each head over the D columns that are in use: first of 64 columns, then of these sums."""
    if tile.BD > 64:
        total = gl.expand_dims(gl.sum(gl.sum(x, 2), 1), 1)
    else:
        total = gl.sum(x, 2)
    return gl.expand_dims(total / tile.D, 2)


@gluon.jit
def less_mean(x, mean_x, tile: gl.constexpr, NORMS: gl.constexpr):
    """x - mean_x in the columns that are in use, else 0."""
    centred = x - mean_x
    if tile.D < tile.BD:
        half = gl.arange(0, tile.BD // 64, layout=gl.SliceLayout(0, gl.SliceLayout(2, NORMS)))
        offs_d = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(1, NORMS)))
        offs_d = gl.expand_dims(gl.expand_dims(offs_d, 0), 1) + gl.expand_dims(gl.expand_dims(half, 0), 2) * 64
        centred = gl.where(offs_d < tile.D, centred, 0.0)
    return centred


@gluon.jit
def learn(slots, eps, tile: gl.constexpr, NORMS: gl.constexpr):
    """Eq. (2) of a token of each head: u from k A."""
    y, rest = halves(slots.y, tile).load(NORMS), halves(slots.rest, tile).load(NORMS)
    if tile.NORM:
        centred = less_mean(y, mean(y, tile), tile, NORMS)
        r = gl.rsqrt(mean(centred * centred, tile) + eps)
        x = centred * r
        w = halves(slots.w, tile).load(NORMS)
        e = (x * w + rest) * w
        mean_e, c = mean(e, tile), mean(e * x, tile)
        u = r * (less_mean(e, mean_e, tile, NORMS) - x * c)
    else:
        u = y - rest
    halves(slots.row, tile).store(u)


@gluon.jit
def read_block(slots, y_M, t, tile: gl.constexpr):
    """Eq. (11): q M of each head."""
    offs_t = gl.expand_dims(gl.arange(0, 64, layout=DOWN), 1)
    no_scores = gl.zeros([64, 8], gl.float32, COLUMN)
    numbers = slots.beta_f._reinterpret(gl.float32, [2 * len(y_M), 1], VECTOR)
    y_S, scores, ys = (), (), ()
    for g in gl.static_range(len(y_M)):
        y_S = y_S + (times(slots.S0[g], slots.token.index(g), tile),)
        token = slots.token.index(g).permute((1, 0))
        scores = scores + (warpgroup_mma(slots.k[g], token, no_scores, use_acc=False, is_async=True),)
    for g in gl.static_range(len(y_M)):
        own_S, own_scores = warpgroup_mma_wait(2 * (len(y_M) - 1 - g), deps=[y_S[g], scores[g]])
        # the rows that are not there are zero, but a query may be infinite
        own_scores = gl.where(offs_t <= t, own_scores, 0.0)
        weights = gl.expand_dims(-2 * slots.G.index(g).load(DOWN), 1) * own_scores
        slots.weights[g].store(gl.permute(weights.to(gl.bfloat16), (1, 0)))
        y = scalar(numbers, g, COLUMN) * y_M[g]
        y += scalar(numbers, len(y_M) + g, COLUMN) * own_S
        ys = ys + (y,)
    fence_async_shared()
    meet()
    sums = ()
    for g in gl.static_range(len(y_M)):
        weights_T = slots.weights[g].permute((1, 0))
        sums = sums + (warpgroup_mma(slots.u[g].permute((1, 0)), weights_T, ys[g], is_async=True),)
    store_columns(slots.y, waited(sums), QUERY, tile)


@gluon.jit
def read(slots, eps, tile: gl.constexpr, NORMS: gl.constexpr):
    """Eq. (5) of each head: o from q M."""
    y = halves(slots.y, tile).load(NORMS)
    if tile.NORM:
        centred = less_mean(y, mean(y, tile), tile, NORMS)
        r = gl.rsqrt(mean(centred * centred, tile) + eps)
        y += centred * r * halves(slots.w, tile).load(NORMS) + halves(slots.b, tile).load(NORMS)
    halves(slots.row, tile).store(y)


@gluon.jit
def load_columns(x_ptr, index, first, tile: gl.constexpr):
    """64 columns of a D x D matrix from the first on, zero outside."""
    offs_i, offs_j = grid_of(tile.BD, 64, SQUARE)
    mask = (offs_i < tile.D) & (first + offs_j < tile.D)
    return gl.load(x_ptr + index * tile.D * tile.D + (offs_i * tile.D + first + offs_j), mask=mask, other=0)


@gluon.jit
def store_columns_of(x_ptr, value, index, first, tile: gl.constexpr):
    """Store what `load_columns` would load."""
    offs_i, offs_j = grid_of(tile.BD, 64, SQUARE)
    at = x_ptr + index * tile.D * tile.D + (offs_i * tile.D + first + offs_j)
    gl.store(at, value.to(x_ptr.dtype.element_ty), mask=(offs_i < tile.D) & (first + offs_j < tile.D))


@gluon.jit
def plus(square, u, weights, k_s, u_s):
    """square - 2 k^T (weights u), of the rows of a block."""
    weights = gl.expand_dims(weights.load(gl.SliceLayout(1, PART)), 1)
    u_s.store((weights * -2 * u).to(gl.bfloat16))
    fence_async_shared()
    meet()
    square = warpgroup_mma(k_s.permute((1, 0)), u_s, square, is_async=True)
    return warpgroup_mma_wait(0, deps=[square])


@gluon.jit
def scalar(numbers, i, LAYOUT: gl.constexpr):
    """A number in shared memory as a tile (1, 1)."""
    return gl.expand_dims(numbers.index(i).load(gl.SliceLayout(1, LAYOUT)), 1)


@gluon.jit
def load_coefficients(theta_ptr, alpha_ptr, eta_ptr, state, heads, t, tile: gl.constexpr):
    """Load the gates of a token, of which its coefficients are made."""
    _, offs_j = grid_of(heads.shape[0], 64, FLAT)
    filled = offs_j < t
    weights_ptr = state.weights + gl.expand_dims(heads, 1) * 128 + offs_j
    gates_ptr = state.gates + gl.expand_dims(heads, 1) * (64 * GATES) + offs_j
    a_j = gl.load(gates_ptr + 64, mask=filled, other=1.0)
    log_a_j = a_j
    if tile.LOG:
        log_a_j = gl.load(gates_ptr + 192, mask=filled, other=0.0)
    return Coefficients(
        gl.load(theta_ptr + heads).to(gl.float32), gl.load(alpha_ptr + heads).to(gl.float32),
        gl.load(eta_ptr + heads).to(gl.float32),
        gl.load(weights_ptr, mask=filled, other=0.0), gl.load(weights_ptr + 64, mask=filled, other=0.0),
        a_j, gl.load(gates_ptr + 128, mask=filled, other=0.0), log_a_j, load_decay(state.decay, heads * 2),
    )  # fmt: skip


@gluon.jit
def beta_f(a, eta, log_a, t, tile: gl.constexpr):
    """beta_t and f_t of (7) for each head, as `output.py` makes them, from the gates of a block up to row t."""
    _, f, beta = gl.associative_scan((eta, eta, a), 1, then)
    if tile.LOG:
        sums = gl.associative_scan(log_a, 1, add)
        beta = gl.where(sums > -1, gl.exp(sums), beta)
    _, offs_j = grid_of(a.shape[0], 64, FLAT)
    return gl.sum(gl.where(offs_j == t, beta, 0.0), 1), gl.sum(gl.where(offs_j == t, f, 0.0), 1)


@gluon.jit
def make_coefficients(c, slots, state, heads, t, tile: gl.constexpr):
    """Eq. (7) of one more token: keeps G, beta_t and f_t in shared memory, and the gates; n, G and the decay."""
    if tile.LOG:
        log_a, log_eta = c.alpha, c.eta
    else:
        log_a, log_eta = gl.full_like(c.alpha, float("-inf")), gl.full_like(c.alpha, float("-inf"))
    theta, a, eta = linear_gates(c.theta, c.alpha, c.eta, tile)
    _, offs_j = grid_of(heads.shape[0], 64, FLAT)
    own = offs_j == t
    beta, f = beta_f(
        gl.where(own, gl.expand_dims(a, 1), c.a_j), gl.where(own, gl.expand_dims(eta, 1), c.eta_j),
        gl.where(own, gl.expand_dims(log_a, 1), c.log_a_j), t, tile,
    )  # fmt: skip
    slots.beta_f.index(0).store(beta)
    slots.beta_f.index(1).store(f)
    gates_ptr = state.gates + heads * (64 * GATES) + t
    gl.store(gates_ptr, theta)
    gl.store(gates_ptr + 64, a)
    gl.store(gates_ptr + 128, eta)
    gl.store(gates_ptr + 192, log_a)
    gl.store(gates_ptr + 256, log_eta)
    n = gl.where(own, gl.expand_dims(theta, 1), gl.expand_dims(eta, 1) * c.n)
    G = gl.expand_dims(a, 1) * c.G + n
    flat(slots.G).store(G)
    # a block ends with its chunk: the decay over either is the same
    return n, G, decayed(c.decay, a, eta, log_a, log_eta)


@gluon.jit
def end_of(state, index, length, LAYOUT: gl.constexpr):
    """Eq. (7) after so many tokens of a block, as in `ends.py`: n_Lj, G_Lj; beta_L, f_L, m_L as first elements."""
    offs_j = gl.arange(0, 64, layout=LAYOUT)
    inside, has_next = offs_j < length, offs_j + 1 < length
    at = state.gates + index * (64 * GATES) + offs_j
    theta, a = gl.load(at, mask=inside, other=0.0), gl.load(at + 64, mask=inside, other=1.0)
    eta = gl.load(at + 128, mask=inside, other=0.0)
    a_next, eta_next = gl.load(at + 65, mask=has_next, other=1.0), gl.load(at + 129, mask=has_next, other=0.0)
    log_a, log_eta = gl.load(at + 192, mask=inside, other=0.0), gl.load(at + 256, mask=inside, other=0.0)
    m, f, beta = gl.associative_scan((gl.where(has_next, eta_next, 1.0), eta_next, a_next), 0, end_then, reverse=True)
    n, G = gl.where(inside, m * theta, 0.0), gl.where(inside, (f + beta) * theta, 0.0)
    m, f, beta = m * eta, (f + beta) * eta, beta * a
    return n, G, near_one(beta, log_a), f, near_one(m, log_eta)


@gluon.jit
def move(state, k_s, u_s, end_s, index, t, tile: gl.constexpr):
    """Eq. (9) and (10) for a head at the end of a block, as the chain computes them; 64 columns at a time."""
    end = end_of(state, index, t + 1, SCAN)
    for i in gl.static_range(len(end)):
        end_s.index(i).store(end[i])
    beta, f = as_scalar(end_s.index(2), 0, SQUARE), as_scalar(end_s.index(3), 0, SQUARE)
    m = as_scalar(end_s.index(4), 0, SQUARE)
    offs_t, offs_d = grid_of(64, 64, PART)
    # the compilers do not know the bound, so they keep the loop: unrolled, it takes more registers than there are
    for part in range(tile.BD // 64 + t // 64):
        first = part * 64
        at = state.u_chain + index * 64 * tile.D + (offs_t * tile.D + first + offs_d)
        u = gl.load(at, mask=(offs_t <= t) & (first + offs_d < tile.D), other=0)
        # S is loaded twice, for the sake of registers
        M = beta * load_columns(state.M, index, first, tile) + f * load_columns(state.S, index, first, tile)
        M = plus(M, u, end_s.index(1), k_s, u_s)
        store_columns_of(state.M, M, index, first, tile)
        store_columns_of(state.anchor, M, index, first, tile)
        store_columns_of(state.A, M, index, first, tile)
        store_columns_of(state.M0, M, index, first, tile)
        S = plus(m * load_columns(state.S, index, first, tile), u, end_s.index(0), k_s, u_s)
        store_columns_of(state.S, S, index, first, tile)
        store_columns_of(state.S0, S, index, first, tile)


@gluon.jit(do_not_specialize=["H"])
def hopper_decode_kernel(
    q_ptr, k_ptr, v_ptr,  # (N, H, D)
    affine,
    theta_ptr, alpha_ptr, eta_ptr,  # (N, H)
    state,  # in and out
    o_ptr,  # out: (N, H, D)
    H, eps, tile: gl.constexpr,
    HEADS: gl.constexpr, ROWS: gl.constexpr, NORMS: gl.constexpr,
):  # fmt: skip
    """Eq. (2), (7), (11), (5), (9) and (10), as `titans.kernels.decode.decode_kernel`, for chunks of 64 tokens.

    Grid: (N H / HEADS,), where HEADS divides H.
    Reads: the token; M0, S0 and the anchor; keys, u and coefficients of the block.
    Writes: o; the token's k and u, the coefficients; M, S, anchor, M0, S0 and A at the end of a block.
    """
    BD: gl.constexpr = tile.BD
    slots = allocate(HEADS, BD)
    first = gl.program_id(0).to(gl.int64) * HEADS
    heads = first + gl.arange(0, HEADS, layout=HEAD)
    # all heads of a sequence stand at the same place
    place = place_of(state.place, first, 64, tile)
    t = place.t
    # all that is loaded, before anything is waited for; first what does not depend on the place
    copy_squares(slots.M0, state.M0, first, tile, ROWS)
    async_copy.commit_group()
    copy_squares(slots.S0, state.S0, first, tile, ROWS)
    if BD == 64:
        copy_blocks(slots.k, state.keys, first, t, tile, ROWS)
    async_copy.commit_group()
    tokens = load_tokens(k_ptr, q_ptr, first, tile, HEADS)
    slots.token._reinterpret(gl.bfloat16, [8 * HEADS, BD], TILE).store(tokens)
    k = load_heads(k_ptr, first, tile, HEADS)
    rest = load_heads(v_ptr, first, tile, HEADS)
    c = load_coefficients(theta_ptr, alpha_ptr, eta_ptr, state, heads, t, tile)
    store_heads(state.keys, k, first, t, tile)
    if tile.NORM:
        h = gl.program_id(0) * HEADS % H
        w, b = load_heads(affine.w, h, tile, HEADS), load_heads(affine.b, h, tile, HEADS)
        rest = b - (rest - k)
        flat(slots.w).store(w)
        flat(slots.b).store(b)
    flat(slots.rest).store(rest)

    async_copy.wait_group(1)
    fence_async_shared()
    meet()
    y_M = products(slots.M0, slots.token, tile)
    store_columns(slots.y, y_M, KEY, tile)
    if place.own == 0:
        # the anchor takes the place of M0
        meet()
        copy_squares(slots.M0, state.A, first, tile, ROWS)
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        meet()
        store_columns(slots.y, products(slots.M0, slots.token, tile), KEY, tile)
    meet()
    if BD > 64:
        copy_blocks(slots.k, state.keys, first, t, tile, ROWS)
    copy_blocks(slots.u, state.u, first, t, tile, ROWS)
    async_copy.commit_group()
    learn(slots, eps, tile, NORMS)
    u = flat(slots.row).load(FLAT)
    store_heads(state.u_chain, u, first, t, tile)
    store_heads(state.u, u, first, t, tile)
    flat(slots.rest).store(k)
    n, G, decay = make_coefficients(c, slots, state, heads, t, tile)
    async_copy.wait_group(0)
    meet()
    insert(slots.k, slots.rest, slots.u, slots.row, t, tile)
    fence_async_shared()
    meet()
    read_block(slots, y_M, t, tile)
    read(slots, eps, tile, NORMS)
    offs_h, offs_d = grid_of(HEADS, BD, FLAT)
    at = o_ptr + first * tile.D + (offs_h * tile.D + offs_d)
    gl.store(at, flat(slots.row).load(FLAT).to(gl.bfloat16), mask=offs_d < tile.D)

    # in place: after every thread has loaded what was there
    meet()
    ends_block = place.position + 1 >= 64
    gl.store(state.place + heads * 3, gl.where(ends_block, 0, place.position - t))
    gl.store(state.place + heads * 3 + 1, gl.where(ends_block, 0, t + 1))
    gl.store(state.place + heads * 3 + 2, gl.where(ends_block, 1, place.own))
    if ends_block:
        u_s = slots.S0[0]._reinterpret(gl.bfloat16, [64, 64], TILE)
        for i in gl.static_range(HEADS):
            move(state, slots.k[i], u_s, slots.end, first + i, t, tile)
        nothing = Decay(1.0, 0.0, 1.0, 0.0, 0.0)
        store_decay(state.decay, heads * 2, nothing)
        store_decay(state.decay, heads * 2 + 1, nothing)
    else:
        _, offs_j = grid_of(HEADS, 64, FLAT)
        weights_ptr = state.weights + gl.expand_dims(heads, 1) * 128 + offs_j
        gl.store(weights_ptr, n)
        gl.store(weights_ptr + 64, G)
        store_decay(state.decay, heads * 2, decay)
        store_decay(state.decay, heads * 2 + 1, decay)


@functools.cache
def options(BD: int, HEADS: int) -> dict[str, Any]:
    """Constants of the kernel that depend on the width of its tiles and the number of its heads."""
    columns, lanes = [[0, 0, 1], [0, 0, 8], [0, 0, 16], [0, 0, 32]], [[0, 0, 2], [0, 0, 4]]
    half = [0, 1, 0] if BD == 128 else [0, 0, 0]
    warps = [[0, 0, 0] if HEADS <= i else [i, 0, 0] for i in (1, 2)]
    norms = gl.DistributedLinearLayout(
        reg_bases=columns, lane_bases=[*lanes, half, [0, 0, 0], [0, 0, 0]], warp_bases=warps, block_bases=[],
        shape=[HEADS, BD // 64, 64],
    )  # fmt: skip
    return {
        "HEADS": HEADS,
        "ROWS": gl.BlockedLayout([1, 8], [256 // BD, BD // 8], [4, 1], [1, 0]),
        "NORMS": norms,
        "num_warps": 4,
        **({"maxnreg": 168} if BD == 128 else {}),
    }


@gluon.jit
def hopper_end_kernel(
    state,
    weights_ptr, decay_ptr,  # out: as of the state
    tile: gl.constexpr,
):  # fmt: skip
    """Eq. (7) after the last token, as the forward makes it there.

    Grid: (N H,), one warp each.
    Reads: gates of the block.
    Writes: its last row; the decay over the chunk.
    """
    pid = gl.program_id(0).to(gl.int64)
    n, G, beta, f, m = end_of(state, pid, place_of(state.place, pid, 64, tile).t, WARP)
    offs_j = gl.arange(0, 64, layout=WARP)
    gl.store(weights_ptr + pid * 128 + offs_j, n)
    gl.store(weights_ptr + pid * 128 + 64 + offs_j, G)
    decay_ptr += (pid * 2 + 1) * DECAYS + offs_j
    first = offs_j == 0
    gl.store(decay_ptr, beta, mask=first)
    gl.store(decay_ptr + 1, f, mask=first)
    gl.store(decay_ptr + 2, m, mask=first)
    # the products count
    gl.store(decay_ptr + 3, gl.full_like(m, float("-inf")), mask=first)
    gl.store(decay_ptr + 4, gl.full_like(m, float("-inf")), mask=first)


def at_the_end(state: DecodeState, tile: Tile) -> DecodeState:
    """The state with the coefficients that the forward would have after the last token."""
    N, H = state.M.shape[:2]
    weights, decay = torch.empty_like(state.weights), torch.empty_like(state.decay)
    hopper_end_kernel[(N * H,)](
        state=DecodeFields(*state), weights_ptr=weights, decay_ptr=decay, tile=tile, num_warps=1
    )  # fmt: skip
    return state._replace(weights=weights, decay=decay)


def heads_of(N: int, H: int, D: int) -> int:
    """Heads of a program: four where more programs of one than run at once would wait for each other's instructions."""
    return 4 if D <= 64 and H % 4 == 0 and N * H > AT_ONCE else 1


def launch_decode(call: Call, state: DecodeState, tile: Tile, o: Tensor) -> None:
    """Launch the kernel, as `titans.kernels.decode.decode` does the portable one."""
    N, _, H, D = call.q.shape
    HEADS = heads_of(N, H, D)
    fields = DecodeFields(*map(aligned, state))
    hopper_decode_kernel[(N * H // HEADS,)](
        q_ptr=call.q, k_ptr=call.k, v_ptr=call.v, affine=Affine(call.w, call.b), theta_ptr=call.theta,
        alpha_ptr=call.alpha, eta_ptr=call.eta, state=fields, o_ptr=o, H=H, eps=call.eps, tile=tile,
        **options(64 if D <= 64 else 128, HEADS),
    )  # fmt: skip
    for x, own in zip(state, fields, strict=True):
        if own is not x:
            x.copy_(own)

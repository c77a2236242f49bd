"""One token in one launch, in Gluon: `titans.kernels.decode`, with the token as a column.

A product with a single row would fill a sixty-fourth of a tensor core's tile. Here the state is the left operand and
the token a column of the right one, which has 8: y^T = M^T q^T. Every element is the same sum in the same order. Sums
along a row are taken in the layout of the forward, CHAIN. So what differs from one call is that coefficients are made
token by token, and there by scans: a rounding or two of each.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from titans.arguments import Call
from titans.decoding import DecodeFields, DecodeState
from titans.kernels.coefficients import linear_gates, near_one
from titans.kernels.decode import Decay, decayed, load_decay, meet, place_of, store_decay
from titans.kernels.hopper.common import TILE, VECTOR, grid_of, product
from titans.kernels.tile import Affine, Tile

# of a product with a token as a column
COLUMN = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 16]))
DOWN = gl.constexpr(gl.SliceLayout(1, COLUMN.value))
# the chain's, of at most 64 columns at once: with wider tiles a warpgroup has half of the columns
CHAIN = gl.constexpr(gl.SliceLayout(0, product([4, 1], 64)))


@gluon.jit
def rows_of(x_ptr, new_ptr, t, tile: gl.constexpr, ROWS: gl.constexpr):
    """Pointers to the rows of a block and to that of the token, which is not there yet; and which of them there are."""
    offs_t, offs_d = grid_of(64, tile.BD, ROWS)
    at = gl.where(offs_t == t, new_ptr + offs_d, x_ptr + offs_t * tile.D + offs_d)
    return at, (offs_t <= t) & (offs_d < tile.D)


@gluon.jit
def copy_square(square_s, x_ptr, pid, tile: gl.constexpr, ROWS: gl.constexpr):
    """Start copying a D x D matrix, zero outside."""
    offs_i, offs_j = grid_of(tile.BD, tile.BD, ROWS)
    at = x_ptr + pid * tile.D * tile.D + offs_i * tile.D + offs_j
    if tile.D == tile.BD:
        async_copy.async_copy_global_to_shared(square_s, at)
    else:
        async_copy.async_copy_global_to_shared(square_s, at, mask=(offs_i < tile.D) & (offs_j < tile.D))


@gluon.jit
def load_column(x_ptr, pid, tile: gl.constexpr, ROW8: gl.constexpr):
    """A token as the first of 8 rows, the others zero."""
    offs_t, offs_d = grid_of(8, tile.BD, ROW8)
    return gl.load(x_ptr + pid * tile.D + offs_d + offs_t, mask=(offs_t == 0) & (offs_d < tile.D), other=0)


@gluon.jit
def times(square_s, column_s, y, use_acc: gl.constexpr):
    """Column by column, x square for the rows x, (BD, 8)."""
    y = warpgroup_mma(square_s.permute((1, 0)), column_s.permute((1, 0)), y, use_acc=use_acc, is_async=True)
    return warpgroup_mma_wait(0, deps=[y])


@gluon.jit
def first(y):
    """The token's column, (BD,)."""
    offs = gl.expand_dims(gl.arange(0, 8, layout=gl.SliceLayout(0, COLUMN)), 0)
    return gl.sum(gl.where(offs == 0, y, 0.0), 1)


@gluon.jit
def load_vector(x_ptr, at, first_: gl.constexpr, SIZE: gl.constexpr, tile: gl.constexpr, LAYOUT: gl.constexpr):
    """SIZE numbers of a row from number `first_` on, in float32, zero outside."""
    offs_d = first_ + gl.arange(0, SIZE, layout=LAYOUT)
    return gl.load(x_ptr + at * tile.D + offs_d, mask=offs_d < tile.D, other=0).to(gl.float32)


@gluon.jit
def store_vector(x_ptr, at, value, first_: gl.constexpr, tile: gl.constexpr, LAYOUT: gl.constexpr):
    """Store what `load_vector` would load."""
    offs_d = first_ + gl.arange(0, value.shape[0], layout=LAYOUT)
    gl.store(x_ptr + at * tile.D + offs_d, value.to(x_ptr.dtype.element_ty), mask=offs_d < tile.D)


@gluon.jit
def less(x, mean_x, first_: gl.constexpr, tile: gl.constexpr, LAYOUT: gl.constexpr):
    """x - mean_x in the columns that are in use, else 0."""
    centred = x - mean_x
    if tile.D < tile.BD:
        offs_d = first_ + gl.arange(0, x.shape[0], layout=LAYOUT)
        centred = gl.where(offs_d < tile.D, centred, 0.0)
    return centred


@gluon.jit
def residual(x, w_s, b_s, target_s):
    """e of (2) in up to 64 columns, in the order of the chain."""
    w = w_s.load(CHAIN)
    return (x * w + (b_s.load(CHAIN) - target_s.load(CHAIN))) * w


@gluon.jit
def learn_narrow(y_s, w_s, b_s, target_s, u_ptr, at, eps, tile: gl.constexpr):
    """Eq. (2) of a token from k A, up to 64 columns: stores u, which takes the place of k A."""
    y = y_s.load(CHAIN)
    if tile.NORM:
        centred = less(y, gl.sum(y, 0) / tile.D, 0, tile, CHAIN)
        r = gl.rsqrt(gl.sum(centred * centred, 0) / tile.D + eps)
        x = centred * r
        e = residual(x, w_s, b_s, target_s)
        mean_e, c = gl.sum(e, 0) / tile.D, gl.sum(e * x, 0) / tile.D
        u = r * (less(e, mean_e, 0, tile, CHAIN) - x * c)
    else:
        u = y - target_s.load(CHAIN)
    y_s.store(u)
    store_vector(u_ptr, at, u, 0, tile, CHAIN)


@gluon.jit
def learn_wide(y_s, w_s, b_s, target_s, u_ptr, at, eps, tile: gl.constexpr):
    """`learn_narrow` of two halves, of 64 columns each."""
    y0, y1 = y_s.slice(0, 64).load(CHAIN), y_s.slice(64, 64).load(CHAIN)
    if tile.NORM:
        mean_y = (gl.sum(y0, 0) + gl.sum(y1, 0)) / tile.D
        y0, y1 = less(y0, mean_y, 0, tile, CHAIN), less(y1, mean_y, 64, tile, CHAIN)
        r = gl.rsqrt((gl.sum(y0 * y0, 0) + gl.sum(y1 * y1, 0)) / tile.D + eps)
        x0, x1 = y0 * r, y1 * r
        e0 = residual(x0, w_s.slice(0, 64), b_s.slice(0, 64), target_s.slice(0, 64))
        e1 = residual(x1, w_s.slice(64, 64), b_s.slice(64, 64), target_s.slice(64, 64))
        mean_e = (gl.sum(e0, 0) + gl.sum(e1, 0)) / tile.D
        c = (gl.sum(e0 * x0, 0) + gl.sum(e1 * x1, 0)) / tile.D
        u0 = r * (less(e0, mean_e, 0, tile, CHAIN) - x0 * c)
        u1 = r * (less(e1, mean_e, 64, tile, CHAIN) - x1 * c)
    else:
        u0 = y0 - target_s.slice(0, 64).load(CHAIN)
        u1 = y1 - target_s.slice(64, 64).load(CHAIN)
    y_s.slice(0, 64).store(u0)
    y_s.slice(64, 64).store(u1)
    store_vector(u_ptr, at, u0, 0, tile, CHAIN)
    store_vector(u_ptr, at, u1, 64, tile, CHAIN)


@gluon.jit
def read_narrow(y_s, w_s, b_s, o_ptr, pid, eps, tile: gl.constexpr):
    """Eq. (5) from q M, up to 64 columns."""
    y = y_s.load(CHAIN)
    if tile.NORM:
        centred = less(y, gl.sum(y, 0) / tile.D, 0, tile, CHAIN)
        r = gl.rsqrt(gl.sum(centred * centred, 0) / tile.D + eps)
        y += centred * r * w_s.load(CHAIN) + b_s.load(CHAIN)
    store_vector(o_ptr, pid, y, 0, tile, CHAIN)


@gluon.jit
def read_wide(y_s, w_s, b_s, o_ptr, pid, eps, tile: gl.constexpr):
    """`read_narrow` of two halves, of 64 columns each."""
    y0, y1 = y_s.slice(0, 64).load(CHAIN), y_s.slice(64, 64).load(CHAIN)
    if tile.NORM:
        mean_y = (gl.sum(y0, 0) + gl.sum(y1, 0)) / tile.D
        c0, c1 = less(y0, mean_y, 0, tile, CHAIN), less(y1, mean_y, 64, tile, CHAIN)
        r = gl.rsqrt((gl.sum(c0 * c0, 0) + gl.sum(c1 * c1, 0)) / tile.D + eps)
        y0 += c0 * r * w_s.slice(0, 64).load(CHAIN) + b_s.slice(0, 64).load(CHAIN)
        y1 += c1 * r * w_s.slice(64, 64).load(CHAIN) + b_s.slice(64, 64).load(CHAIN)
    store_vector(o_ptr, pid, y0, 0, tile, CHAIN)
    store_vector(o_ptr, pid, y1, 64, tile, CHAIN)


@gluon.jit
def load_matrix(x_ptr, pid, tile: gl.constexpr, LAYOUT: gl.constexpr):
    """(BD, BD) tile of a D x D matrix, zero outside."""
    offs_i, offs_j = grid_of(tile.BD, tile.BD, LAYOUT)
    mask = (offs_i < tile.D) & (offs_j < tile.D)
    return gl.load(x_ptr + pid * tile.D * tile.D + offs_i * tile.D + offs_j, mask=mask, other=0)


@gluon.jit
def store_matrix(x_ptr, value, pid, tile: gl.constexpr, LAYOUT: gl.constexpr):
    """Store what `load_matrix` would load."""
    offs_i, offs_j = grid_of(tile.BD, tile.BD, LAYOUT)
    at = x_ptr + pid * tile.D * tile.D + offs_i * tile.D + offs_j
    gl.store(at, value.to(x_ptr.dtype.element_ty), mask=(offs_i < tile.D) & (offs_j < tile.D))


@gluon.jit
def plus(square, u_ptr, weights, k_s, u_s, pid, t, tile: gl.constexpr, ROWS: gl.constexpr):
    """square - 2 k^T (weights u), of the rows of a block."""
    offs_t, offs_d = grid_of(64, tile.BD, ROWS)
    mask = (offs_t <= t) & (offs_d < tile.D)
    u = gl.load(u_ptr + (pid * 64 + offs_t) * tile.D + offs_d, mask=mask, other=0)
    weights = gl.expand_dims(gl.convert_layout(weights, gl.SliceLayout(1, ROWS)), 1)
    u_s.store((weights * -2 * u).to(gl.bfloat16))
    fence_async_shared()
    meet()
    square = warpgroup_mma(k_s.permute((1, 0)), u_s, square, is_async=True)
    return warpgroup_mma_wait(0, deps=[square])


@gluon.jit
def move(state, chunk, n, G, k_s, u_s, pid, t, tile: gl.constexpr, ROWS: gl.constexpr, SQUARE: gl.constexpr):
    """Eq. (9) and (10) at the end of a block, as the chain computes them."""
    beta, f, m = near_one(chunk.beta, chunk.log_beta), chunk.f, near_one(chunk.m, chunk.log_m)
    # the rows that other threads have stored
    meet()
    # S is loaded twice, for the sake of registers
    M = beta * load_matrix(state.M, pid, tile, SQUARE) + f * load_matrix(state.S, pid, tile, SQUARE)
    M = plus(M, state.u_chain, G, k_s, u_s, pid, t, tile, ROWS)
    store_matrix(state.M, M, pid, tile, SQUARE)
    store_matrix(state.anchor, M, pid, tile, SQUARE)
    store_matrix(state.A, M, pid, tile, SQUARE)
    store_matrix(state.M0, M, pid, tile, SQUARE)
    S = m * load_matrix(state.S, pid, tile, SQUARE)
    S = plus(S, state.u_chain, n, k_s, u_s, pid, t, tile, ROWS)
    store_matrix(state.S, S, pid, tile, SQUARE)
    store_matrix(state.S0, S, pid, tile, SQUARE)
    nothing = Decay(1.0, 0.0, 1.0, 0.0, 0.0)
    store_decay(state.decay, pid * 2, nothing)
    store_decay(state.decay, pid * 2 + 1, nothing)


@gluon.jit(do_not_specialize=["H"])
def hopper_decode_kernel(
    q_ptr, k_ptr, v_ptr,  # (N, H, D)
    affine,
    theta_ptr, alpha_ptr, eta_ptr,  # (N, H)
    state,  # in and out
    o_ptr,  # out: (N, H, D)
    H, eps, tile: gl.constexpr,
    ROWS: gl.constexpr, ROW8: gl.constexpr, SQUARE: gl.constexpr,
):  # fmt: skip
    """Eq. (2), (7), (11), (5), (9) and (10), as `titans.kernels.decode.decode_kernel`, for chunks of 64 tokens.

    Grid: (N H,).
    Reads: the token; M0, S0 and the anchor; keys, u and coefficients of the block.
    Writes: o; the token's k and u, the coefficients; M, S, anchor, M0, S0 and A at the end of a block.
    """
    BD: gl.constexpr = tile.BD
    READ: gl.constexpr = gl.SliceLayout(0, ROWS)
    M0_s = gl.allocate_shared_memory(gl.bfloat16, [BD, BD], TILE)
    S0_s = gl.allocate_shared_memory(gl.bfloat16, [BD, BD], TILE)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [64, BD], TILE)
    u_s = gl.allocate_shared_memory(gl.bfloat16, [64, BD], TILE)
    key_s = gl.allocate_shared_memory(gl.bfloat16, [8, BD], TILE)
    query_s = gl.allocate_shared_memory(gl.bfloat16, [8, BD], TILE)
    weights_s = gl.allocate_shared_memory(gl.bfloat16, [8, 64], TILE)
    y_s = gl.allocate_shared_memory(gl.float32, [BD], VECTOR)
    w_s = gl.allocate_shared_memory(gl.float32, [BD], VECTOR)
    b_s = gl.allocate_shared_memory(gl.float32, [BD], VECTOR)
    target_s = gl.allocate_shared_memory(gl.float32, [BD], VECTOR)
    place = place_of(state.place, 64, tile)
    pid, t = place.pid, place.t
    h = gl.program_id(0) % H
    # all that is loaded, before anything is waited for; first what does not depend on the place
    copy_square(M0_s, state.M0, pid, tile, ROWS)
    copy_square(S0_s, state.S0, pid, tile, ROWS)
    k_row = load_vector(k_ptr, pid, 0, BD, tile, READ)
    target = load_vector(v_ptr, pid, 0, BD, tile, READ)
    key, query = load_column(k_ptr, pid, tile, ROW8), load_column(q_ptr, pid, tile, ROW8)
    if tile.NORM:
        w, b = load_vector(affine.w, h, 0, BD, tile, READ), load_vector(affine.b, h, 0, BD, tile, READ)
    alpha, eta = gl.load(alpha_ptr + pid), gl.load(eta_ptr + pid)
    if tile.LOG:
        log_a, log_eta = alpha.to(gl.float32), eta.to(gl.float32)
    else:
        log_a, log_eta = float("-inf"), float("-inf")
    theta, a, eta = linear_gates(gl.load(theta_ptr + pid), alpha, eta, tile)
    offs_j = gl.arange(0, 64, layout=DOWN)
    at, mask = rows_of(state.keys + pid * 64 * tile.D, k_ptr + pid * tile.D, t, tile, ROWS)
    async_copy.async_copy_global_to_shared(k_s, at, mask=mask)
    async_copy.commit_group()
    offs_t, offs_d = grid_of(64, BD, ROWS)
    u_at = state.u + (pid * 64 + offs_t) * tile.D + offs_d
    u = gl.load(u_at, mask=(offs_t < t) & (offs_d < tile.D), other=0)
    weights_ptr = state.weights + pid * 128 + offs_j
    n = gl.load(weights_ptr, mask=offs_j < t, other=0.0)
    G = gl.load(weights_ptr + 64, mask=offs_j < t, other=0.0)
    n = gl.where(offs_j == t, theta, eta * n)
    G = a * G + n
    whole = decayed(load_decay(state.decay, pid * 2), a, eta, log_a, log_eta)
    chunk = decayed(load_decay(state.decay, pid * 2 + 1), a, eta, log_a, log_eta)

    if tile.NORM:
        target -= k_row
        w_s.store(w)
        b_s.store(b)
    target_s.store(target)
    key_s.store(key)
    query_s.store(query)
    async_copy.wait_group(0)
    fence_async_shared()
    meet()
    zero = gl.zeros([BD, 8], gl.float32, COLUMN)
    y = near_one(whole.beta, whole.log_beta) * times(M0_s, query_s, zero, False)
    y += whole.f * times(S0_s, query_s, zero, False)
    if place.own == 0:
        # the anchor takes the place of M0
        meet()
        copy_square(M0_s, state.A, pid, tile, ROWS)
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        meet()
    y_s.store(first(times(M0_s, key_s, zero, False)))
    scores = gl.zeros([64, 8], gl.float32, COLUMN)
    scores = warpgroup_mma(k_s, query_s.permute((1, 0)), scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    scores = gl.where(gl.expand_dims(offs_j <= t, 1), scores, 0.0)
    weights = gl.expand_dims(-2 * G, 1) * scores
    weights_s.store(gl.permute(weights.to(gl.bfloat16), (1, 0)))

    row = pid * 64 + t
    if BD > 64:
        learn_wide(y_s, w_s, b_s, target_s, state.u_chain, row, eps, tile)
    else:
        learn_narrow(y_s, w_s, b_s, target_s, state.u_chain, row, eps, tile)
    u_row = y_s.load(READ).to(gl.bfloat16)
    u_s.store(gl.where(offs_t == t, gl.expand_dims(u_row, 0), u))
    fence_async_shared()
    meet()
    y_s.store(first(times(u_s, weights_s, y, True)))
    if BD > 64:
        read_wide(y_s, w_s, b_s, o_ptr, pid, eps, tile)
    else:
        read_narrow(y_s, w_s, b_s, o_ptr, pid, eps, tile)

    # in place: after every thread has loaded what was there
    meet()
    store_vector(state.u, row, u_row, 0, tile, READ)
    store_vector(state.keys, row, k_row, 0, tile, READ)
    ends_block = place.position + 1 >= 64
    gl.store(state.place + pid * 3, gl.where(ends_block, 0, place.position - t))
    gl.store(state.place + pid * 3 + 1, gl.where(ends_block, 0, t + 1))
    gl.store(state.place + pid * 3 + 2, gl.where(ends_block, 1, place.own))
    if ends_block:
        move(state, chunk, n, G, k_s, u_s, pid, t, tile, ROWS, SQUARE)
    else:
        gl.store(weights_ptr, n)
        gl.store(weights_ptr + 64, G)
        store_decay(state.decay, pid * 2, whole)
        store_decay(state.decay, pid * 2 + 1, chunk)


@functools.cache
def options(BD: int) -> dict[str, Any]:
    """Constants of the kernel that depend on the width of its tiles; with narrow ones four programs share registers."""
    return {
        "ROWS": gl.BlockedLayout([1, 8], [256 // BD, BD // 8], [4, 1], [1, 0]),
        "ROW8": gl.BlockedLayout([1, BD // 16], [2, 16], [4, 1], [1, 0]),
        "SQUARE": product([4, 1], BD),
        "num_warps": 4,
        **({"maxnreg": 128} if BD == 64 else {}),
    }


def launch_decode(call: Call, state: DecodeState, tile: Tile, o: Tensor) -> None:
    """Launch the kernel, as `titans.kernels.decode.decode` does the portable one."""
    N, _, H, D = call.q.shape
    hopper_decode_kernel[(N * H,)](
        q_ptr=call.q, k_ptr=call.k, v_ptr=call.v, affine=Affine(call.w, call.b), theta_ptr=call.theta,
        alpha_ptr=call.alpha, eta_ptr=call.eta, state=DecodeFields(*state), o_ptr=o, H=H, eps=call.eps, tile=tile,
        **options(64 if D <= 64 else 128),
    )  # fmt: skip

"""One token in one launch from a state that carries its block: the operations of the chunk form, in their order.

What a token needs of the chain, x, r and u of (2), is computed as `state_kernel` computes it, in a tile of BS rows of
which one is used; what it reads, as `output_kernel` does, in a tile of BC rows. A row of a product, or of a sum along
rows, does not depend on the other rows. So each result has the bits of the forward over the whole sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans import decoding
from titans.arguments import Call
from titans.decoding import DecodeFields, DecodeState
from titans.kernels import hopper
from titans.kernels.block import chunks_per_block
from titans.kernels.coefficients import linear_gates, near_one
from titans.kernels.inner import inner_gradient, norm
from titans.kernels.memory import (
    load_column,
    load_rows,
    load_square,
    load_width,
    store_square,
    store_width,
)
from titans.kernels.tile import Affine, State, Tile, block_rows, fused, tile_of
from titans.partition import layout_of


class Rows(NamedTuple):
    """Consecutive rows, as `titans.kernels.memory` takes them."""

    row: Any  # the first, int64
    H: Any  # rows from one to the next
    length: Any


class Decay(NamedTuple):
    """How a state has decayed: coefficients of (7), and the sums of the logs of beta and m, or -inf."""

    beta: Any
    f: Any
    m: Any
    log_beta: Any
    log_m: Any


class Place(NamedTuple):
    """Where a token stands."""

    pid: Any  # sequence * H + head, int64
    t: Any  # rows of the block before it
    skip: Any  # rows of the block before its step
    position: Any  # tokens before it, from the start of the chunk, or of the chunks, that the block is a part of
    own: Any  # whether the anchor is the memory that the block starts from


@triton.jit
def meet():
    """Wait for all threads of the program; Gluon has had two names for it."""
    tl.debug_barrier()


DECAYS = tl.constexpr(len(Decay._fields))
GATES = tl.constexpr(decoding.GATES)


@triton.jit
def place_of(place_ptr, pid, C, tile: tl.constexpr):
    """The place of a token. Numbers out of range, which nobody has read, lead nowhere outside."""
    width = C * chunks_per_block(C, tile)
    begin = tl.minimum(tl.maximum(tl.load(place_ptr + pid * 3), 0), width - 1)
    t = tl.minimum(tl.maximum(tl.load(place_ptr + pid * 3 + 1), 0), tile.BC - 1)
    own = tl.load(place_ptr + pid * 3 + 2)
    position = begin + t
    if tile.SPLIT:
        skip = tl.minimum(tl.maximum(position // C * C - begin, 0), t)
    else:
        skip = t * 0
    return Place(pid, t, skip, position, own)


@triton.jit
def ends(place, C, tile: tl.constexpr):
    """Whether the token completes its block, its step and its chunk."""
    width = C * chunks_per_block(C, tile)
    begin = place.position - place.t
    ends_block = place.position + 1 >= tl.minimum((begin // tile.BC + 1) * tile.BC, width)
    ends_chunk = (place.position + 1) % C == 0
    return ends_block, ends_block | ends_chunk, ends_chunk


@triton.jit
def load_decay(decay_ptr, at):
    """The decay of a block, or of its last chunk, so far."""
    decay_ptr += at * DECAYS
    beta, f, m = tl.load(decay_ptr), tl.load(decay_ptr + 1), tl.load(decay_ptr + 2)
    return Decay(beta, f, m, tl.load(decay_ptr + 3), tl.load(decay_ptr + 4))


@triton.jit
def store_decay(decay_ptr, at, decay):
    """Store what `load_decay` would load."""
    decay_ptr += at * DECAYS
    tl.store(decay_ptr, decay.beta)
    tl.store(decay_ptr + 1, decay.f)
    tl.store(decay_ptr + 2, decay.m)
    tl.store(decay_ptr + 3, decay.log_beta)
    tl.store(decay_ptr + 4, decay.log_m)


@triton.jit
def decayed(decay, a, eta, log_a, log_eta):
    """Eq. (7): the decay after one more token."""
    m = eta * decay.m
    f = a * decay.f + m
    beta = a * decay.beta
    return Decay(beta, f, m, decay.log_beta + log_a, decay.log_m + log_eta)


@triton.jit
def only_row(x):
    """The first row of a tile whose others do not count, (1, BD)."""
    offs_t = tl.arange(0, x.shape[0])[:, None]
    return tl.sum(tl.where(offs_t == 0, x, 0.0), 0)[None, :]


@triton.jit
def load_light(x_ptr, index, tile: tl.constexpr):
    """`load_width`, if wide by halves.

    The compiler takes a load of as many numbers as there are threads for a heavy one, and sums in its layout; the sums
    here must have the order of those along the rows of a product.
    """
    if tile.BD > 64:
        HALF: tl.constexpr = tile.BD // 2
        offs_d = tl.arange(0, HALF)
        low = tl.load(x_ptr + index * tile.D + offs_d)
        high = tl.load(x_ptr + index * tile.D + HALF + offs_d, mask=HALF + offs_d < tile.D, other=0)
        row = tl.reshape(tl.trans(tl.join(low, high)), (1, tile.BD)).to(tl.float32)
    else:
        row = load_width(x_ptr, index, tile)
    return row


@triton.jit
def learn_token(k_ptr, v_ptr, A, w, b, eps, token, tile: tl.constexpr):
    """Eq. (2) of a token, as the chain computes it: x, r and u."""
    k = load_rows(k_ptr, token, tile.BS, tile, tile.OP)
    y = only_row(tl.dot(k, A, input_precision=tile.PREC))
    target = load_light(v_ptr, token.row, tile)
    if tile.NORM:
        target -= load_light(k_ptr, token.row, tile)
        x, r = norm(y, eps, tile)
        u, _, _ = inner_gradient(x, r, target, w, b, tile)
    else:
        x, r, u = y, tl.zeros((1, 1), tl.float32), y - target
    return x, r, u


@triton.jit
def read_u(k_ptr, v_ptr, x, r, w, b, token, tile: tl.constexpr):
    """u of a token, as `output_kernel` computes it from the x that is stored, (1, BD)."""
    k = load_rows(k_ptr, token, tile.BC, tile, tile.OP)
    target = load_rows(v_ptr, token, tile.BC, tile, tl.float32)
    x = tl.broadcast_to(x, (tile.BC, tile.BD))
    if tile.NORM:
        target -= k.to(tl.float32)
        u, _, _ = inner_gradient(x, tl.broadcast_to(r, (tile.BC, 1)), target, w, b, tile)
    else:
        u = x - target
    return only_row(u)


@triton.jit
def read_token(q_ptr, k, u, state, beta, f, G, w, b, eps, token, t, tile: tl.constexpr):
    """Eq. (11) and (5) of a token, as `output_kernel` computes them, (1, BD)."""
    offs_j = tl.arange(0, tile.BC)[None, :]
    q = load_rows(q_ptr, token, tile.BC, tile, tile.OP)
    scores = tl.where(offs_j <= t, tl.dot(q, tl.trans(k), input_precision=tile.PREC), 0.0)
    weights = -2 * G[None, :] * scores
    y = beta * tl.dot(q, load_square(state.M0, token.row, tile, tile.OP), input_precision=tile.PREC)
    y += f * tl.dot(q, load_square(state.S0, token.row, tile, tile.OP), input_precision=tile.PREC)
    if tile.SPLIT:
        finite = tl.abs(u) < float("inf")
        wrong = tl.max(tl.max(tl.where(finite, 0, 1), 1), 0)
        u = tl.where(finite, u, 0.0)
        y = tl.where(wrong > 0, float("nan"), y)
    y = only_row(tl.dot(weights.to(tile.OP), u.to(tile.OP), y, input_precision=tile.PREC))
    if tile.NORM:
        x_y, _ = norm(y, eps, tile)
        y += x_y * w + b
    return y


@triton.jit
def learn_rows(state, place, length, M, S, tile: tl.constexpr):
    """Eq. (9) and (10): M and S after the rows of a step, as the chain computes them."""
    rows = Rows(place.pid * tile.BC + place.skip, 1, length)
    chunk = load_decay(state.decay, place.pid * 2 + 1)
    beta, f, m = near_one(chunk.beta, chunk.log_beta), chunk.f, near_one(chunk.m, chunk.log_m)
    # a loop, of one round or none: so the compiler keeps M and S laid out as products, as in the chain
    for _ in range(tl.minimum(length, 1)):
        n_L = load_column(state.weights, place.pid * 2 * tile.BC + place.skip, 1, length, tile.BS)
        G_L = load_column(state.weights, (place.pid * 2 + 1) * tile.BC + place.skip, 1, length, tile.BS)
        k_T = tl.trans(load_rows(state.keys, rows, tile.BS, tile, tile.OP))
        u = load_rows(state.u_chain, rows, tile.BS, tile, tl.float32)
        M = tl.dot(k_T, (-2 * G_L * u).to(tile.OP), beta * M + f * S, input_precision=tile.PREC)
        S = tl.dot(k_T, (-2 * n_L * u).to(tile.OP), m * S, input_precision=tile.PREC)
    # in place: after every thread has loaded what was there
    tl.debug_barrier()
    return M, S


@triton.jit
def coefficients_of(theta_ptr, alpha_ptr, eta_ptr, state, place, tile: tl.constexpr):
    """Eq. (7) of one more token, as in `coefficients_kernel`: n_tj and G_tj, (BC,); the decays of block and chunk."""
    pid, t = place.pid, place.t
    offs_j = tl.arange(0, tile.BC)
    alpha, eta = tl.load(alpha_ptr + pid), tl.load(eta_ptr + pid)
    if tile.LOG:
        log_a, log_eta = alpha.to(tl.float32), eta.to(tl.float32)
    else:
        # so that the products count
        log_a, log_eta = float("-inf"), float("-inf")
    theta, a, eta = linear_gates(tl.load(theta_ptr + pid), alpha, eta, tile)
    gates_ptr = state.gates + pid * GATES * tile.BC + t
    tl.store(gates_ptr, theta)
    tl.store(gates_ptr + tile.BC, a)
    tl.store(gates_ptr + 2 * tile.BC, eta)
    tl.store(gates_ptr + 3 * tile.BC, log_a)
    tl.store(gates_ptr + 4 * tile.BC, log_eta)
    weights_ptr = state.weights + pid * 2 * tile.BC + offs_j
    n = tl.load(weights_ptr, mask=offs_j < t, other=0.0)
    G = tl.load(weights_ptr + tile.BC, mask=offs_j < t, other=0.0)
    n = tl.where(offs_j == t, theta, eta * n)
    G = a * G + n
    whole = decayed(load_decay(state.decay, pid * 2), a, eta, log_a, log_eta)
    chunk = decayed(load_decay(state.decay, pid * 2 + 1), a, eta, log_a, log_eta)
    return n, G, whole, chunk


@triton.jit
def keep_token(state, place, k, u, u_chain, n, G, whole, chunk, tile: tl.constexpr):
    """Store the token's rows, and the coefficients."""
    # in place: after every thread has loaded what was there
    tl.debug_barrier()
    at = place.pid * tile.BC + place.t
    store_width(state.keys, k, at, tile)
    store_width(state.u, u, at, tile)
    store_width(state.u_chain, u_chain, at, tile)
    weights_ptr = state.weights + place.pid * 2 * tile.BC + tl.arange(0, tile.BC)
    tl.store(weights_ptr, n)
    tl.store(weights_ptr + tile.BC, G)
    store_decay(state.decay, place.pid * 2, whole)
    store_decay(state.decay, place.pid * 2 + 1, chunk)


@triton.jit
def move_on(state, place, C, tile: tl.constexpr):
    """After a token: where it completes a step, move the state; count it."""
    pid = place.pid
    ends_block, ends_step, ends_chunk = ends(place, C, tile)
    if ends_step:
        # rows and coefficients that other threads have stored
        tl.debug_barrier()
        M = load_square(state.M, pid, tile, tl.float32)
        S = load_square(state.S, pid, tile, tl.float32)
        M, S = learn_rows(state, place, place.t + 1 - place.skip, M, S, tile)
        store_square(state.M, M, pid, tile)
        store_square(state.S, S, pid, tile)
        nothing = Decay(1.0, 0.0, 1.0, 0.0, 0.0)
        store_decay(state.decay, pid * 2 + 1, nothing)
        if ends_chunk:
            store_square(state.anchor, M, pid, tile)
            store_square(state.A, M, pid, tile)
        if ends_block:
            store_square(state.M0, M, pid, tile)
            store_square(state.S0, S, pid, tile)
            store_decay(state.decay, pid * 2, nothing)
    width = C * chunks_per_block(C, tile)
    begin = tl.where(ends_block, (place.position + 1) % width, place.position - place.t)
    own = tl.where(ends_block, ends_chunk.to(tl.int32), tl.where(ends_chunk, 0, place.own))
    tl.store(state.place + pid * 3, begin)
    tl.store(state.place + pid * 3 + 1, tl.where(ends_block, 0, place.t + 1))
    tl.store(state.place + pid * 3 + 2, own)


@triton.jit(do_not_specialize=["H", "C"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr,  # (N, H, D)
    affine,
    theta_ptr, alpha_ptr, eta_ptr,  # (N, H)
    state,  # in and out
    o_ptr,  # out: (N, H, D)
    H, C, eps, tile: tl.constexpr,
):  # fmt: skip
    """Eq. (2), (7), (11) and (5) of one token of each sequence; (9) and (10) where it completes a step of the chain.

    Grid: (N H,).
    Reads: the token; M0, S0 and the anchor as products read them; k, u and coefficients of the block.
    Writes: o; the token's k and u, the coefficients; M, S, anchor, M0, S0, where they move.
    """
    place = place_of(state.place, tl.program_id(0).to(tl.int64), C, tile)
    pid, t = place.pid, place.t
    token, block = Rows(pid, 1, 1), Rows(pid * tile.BC, 1, t)
    h = tl.program_id(0) % H
    w = load_light(affine.w, h, tile) if tile.NORM else 1.0
    b = load_light(affine.b, h, tile) if tile.NORM else 0.0
    n, G, whole, chunk = coefficients_of(theta_ptr, alpha_ptr, eta_ptr, state, place, tile)
    A = load_square(tl.where(place.own > 0, state.M0, state.A), pid, tile, tile.OP)
    # a region of its own: the compiler lays out the products of a region alike, here as in the chain
    x, r, u_chain = tl.zeros((1, tile.BD), tl.float32), tl.zeros((1, 1), tl.float32), tl.zeros((1, tile.BD), tl.float32)
    if t >= 0:
        x, r, u_chain = learn_token(k_ptr, v_ptr, A, w, b, eps, token, tile)
    u_row = read_u(k_ptr, v_ptr, x.to(tile.OP).to(tl.float32), r, w, b, token, tile)
    k_row = load_width(k_ptr, pid, tile)
    keep_token(state, place, k_row, u_row, u_chain, n, G, whole, chunk, tile)

    offs_t = tl.arange(0, tile.BC)[:, None]
    k = tl.where(offs_t == t, k_row.to(tile.OP), load_rows(state.keys, block, tile.BC, tile, tile.OP))
    # only where chunks share a block are values looked at one by one
    U: tl.constexpr = tl.float32 if tile.SPLIT else tile.OP
    u = tl.where(offs_t == t, u_row.to(U), load_rows(state.u, block, tile.BC, tile, U))
    if tile.OP == tl.float32:
        # Zeros for zeros. The compiler orders the sums of a product by the narrowest numbers that operands are made of,
        # and in `output_kernel` u is made of k.
        u = tl.where(offs_t <= t, u, k)
    beta = near_one(whole.beta, whole.log_beta)
    o = read_token(q_ptr, k, u, state, beta, whole.f, G, w, b, eps, token, t, tile)
    store_width(o_ptr, o, pid, tile)
    move_on(state, place, C, tile)


@triton.jit(do_not_specialize=["C"])
def settle_kernel(
    state,
    final,  # out
    C, tile: tl.constexpr,
):  # fmt: skip
    """Eq. (9) and (10): the memory and the momentum after the last token, in the middle of a step or at its start.

    Grid: (N H,).
    Reads: M and S, k, u and coefficients of the running step.
    Writes: M and S.
    """
    # the place of the next token
    place = place_of(state.place, tl.program_id(0).to(tl.int64), C, tile)
    M = load_square(state.M, place.pid, tile, tl.float32)
    S = load_square(state.S, place.pid, tile, tl.float32)
    length = place.t - place.skip
    M, S = learn_rows(state, place, length, M, S, tile)
    store_square(final.M, M, place.pid, tile)
    store_square(final.S, S, place.pid, tile)


def _tile(call: Call) -> Tile:
    return tile_of(call._replace(offset=None), layout_of(call, block_rows(call.q)), call.log_gates)


def _warps(call: Call) -> int:
    """Those of `output_kernel`, on which the order of its sums depends."""
    return 4 if call.q.dtype == torch.bfloat16 else 8


def decode(call: Call, state: DecodeState) -> Tensor:
    """Decode the only token of every sequence: o; moves the state, in place."""
    N, _, H, _ = call.q.shape
    o = torch.empty_like(call.q)
    if N * H and hopper.stages_of(call).forward:
        # Gluon is experimental: it is imported where it is used
        from titans.kernels.hopper.decode import launch_decode

        launch_decode(call, state, _tile(call), o)
    elif N * H:
        decode_kernel[(N * H,)](
            q_ptr=call.q,
            k_ptr=call.k,
            v_ptr=call.v,
            affine=Affine(call.w, call.b),
            theta_ptr=call.theta,
            alpha_ptr=call.alpha,
            eta_ptr=call.eta,
            state=DecodeFields(*state),
            o_ptr=o,
            H=H,
            C=call.chunk_size,
            eps=call.eps,
            tile=_tile(call),
            num_warps=_warps(call),
            num_stages=1,
            enable_fp_fusion=fused(call.q.dtype),
        )
    return o


def settle(call: Call, state: DecodeState) -> tuple[Tensor, Tensor]:
    """M and S after the last token; `call` is one of a token like those of the state."""
    N, H = state.M.shape[:2]
    if N * H and hopper.stages_of(call).forward:
        # Gluon is experimental: it is imported where it is used
        from titans.kernels.hopper.decode import at_the_end

        state = at_the_end(state, _tile(call))
    final = State(torch.empty_like(state.M), torch.empty_like(state.S), state.anchor)
    if N * H:
        settle_kernel[(N * H,)](
            state=DecodeFields(*state),
            final=final,
            C=call.chunk_size,
            tile=_tile(call),
            num_warps=8,
            num_stages=1,
            enable_fp_fusion=fused(call.q.dtype),
        )
    return final.M, final.S

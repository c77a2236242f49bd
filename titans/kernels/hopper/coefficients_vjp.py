"""The reverse of the `coefficients` stage in Gluon: one warp per chunk of 64 tokens and head.

Rows are taken in bands of 8. A first pass over the gates keeps n and G before each band; the reverse makes the rows of
a band again, so that nothing but dG and gates is read, and nothing but their cotangents written.
"""

# Gluon takes no starred tuples, and mypy no tuple that grows
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from titans.arguments import Call
from titans.kernels.block import own_block
from titans.kernels.hopper.blocks import load_a, load_gate
from titans.kernels.hopper.common import VECTOR, add_two
from titans.kernels.hopper.output import then
from titans.kernels.launcher import Launcher
from titans.kernels.tile import End, Rows, Tile, Where

C = gl.constexpr(64)
BAND = gl.constexpr(8)
BANDS = gl.constexpr(8)
# a lane has all rows of a band
COLUMNS = gl.constexpr(gl.BlockedLayout([8, 2], [1, 32], [1, 1], [1, 0]))
COLUMN = gl.constexpr(gl.SliceLayout(0, COLUMNS.value))
LINE = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))


class Gates(NamedTuple):
    """Gates, or their cotangents; (B, T, H) each."""

    theta: Tensor
    alpha: Tensor
    eta: Tensor


@gluon.jit
def row_of_coefficients(n, G, theta, a_s, eta_s, offs_j, t: gl.constexpr):
    """Eq. (7): n_t and G_t from those of the token before."""
    n = gl.where(offs_j == t, theta, eta_s.slice(t, 1).load(COLUMN) * n)
    return n, a_s.slice(t, 1).load(COLUMN) * G + n


@gluon.jit
def sums_over_tokens(theta, gates_s, kept_s, sums_s, dG_ptr, dn_L, dG_L, block):
    """Eq. (13) for the columns of the tokens: puts their parts of da and deta into `sums_s`; returns dtheta."""
    offs_j = gl.arange(0, C, layout=COLUMN)
    rows = gl.expand_dims(gl.arange(0, BAND, layout=gl.SliceLayout(1, COLUMNS)), 1)
    # a_t and eta_t; a_{t + 1} and eta_{t + 1}, 1 after the last; whether t is in the block
    gates_s = gates_s._reinterpret(gl.float32, [5 * BANDS, BAND], VECTOR)
    sums_s = sums_s._reinterpret(gl.float32, [2 * BANDS, BAND], VECTOR)
    n = gl.zeros([C], gl.float32, COLUMN)
    G = n
    # the compilers do not know the bound, so they keep the loop
    for band in range(BANDS + block.H // 2**24):
        kept_s.index(band).store(n)
        kept_s.index(BANDS + band).store(G)
        a_s, eta_s, offs = gates_s.index(band), gates_s.index(BANDS + band), offs_j - band * BAND
        for t in gl.static_range(BAND):
            n, G = row_of_coefficients(n, G, theta, a_s, eta_s, offs, t)
    ln, lG, dtheta = dn_L, dG_L, gl.zeros([C], gl.float32, COLUMN)
    for back in range(BANDS + block.H // 2**24):
        band = BANDS - 1 - back
        offs, left = offs_j - band * BAND, block.length - band * BAND
        dG = ()
        for t in gl.static_range(BAND):
            at = dG_ptr + (band * BAND + t) * C + offs_j
            dG = dG + (gl.load(at, mask=(offs <= t) & (left > t), other=0.0),)
        a_s, eta_s = gates_s.index(band), gates_s.index(BANDS + band)
        n, G = kept_s.index(band).load(COLUMN), kept_s.index(BANDS + band).load(COLUMN)
        earlier = ()
        for t in gl.static_range(BAND):
            earlier = earlier + ((n, G),)
            n, G = row_of_coefficients(n, G, theta, a_s, eta_s, offs, t)
        a_s, eta_s = gates_s.index(2 * BANDS + band), gates_s.index(3 * BANDS + band)
        inside_s = gates_s.index(4 * BANDS + band)
        da, deta = gl.zeros([BAND, C], gl.float32, COLUMNS), gl.zeros([BAND, C], gl.float32, COLUMNS)
        for t in gl.static_range(BAND - 1, -1, -1):
            n, G = earlier[t]
            lG = a_s.slice(t, 1).load(COLUMN) * lG + dG[t]
            ln = eta_s.slice(t, 1).load(COLUMN) * ln + inside_s.slice(t, 1).load(COLUMN) * lG
            dtheta = gl.where(offs == t, ln, dtheta)
            # n and G are 0 for the tokens from t on, but what may not be finite must not meet them
            da = gl.where(rows == t, gl.expand_dims(gl.where(offs < t, lG * G, 0.0), 0), da)
            deta = gl.where(rows == t, gl.expand_dims(gl.where(offs < t, ln * n, 0.0), 0), deta)
        da, deta = gl.reduce((da, deta), 1, add_two)
        sums_s.index(band).store(da)
        sums_s.index(BANDS + band).store(deta)
    return dtheta


@gluon.jit
def before(later_decay, later_x, decay, x):
    """x_t + decay_t (x_{t + 1} + ...) for two runs of tokens as one."""
    return decay * later_decay, x + decay * later_x


@gluon.jit
def sums_over_states(gates, drows, dblock_end, block, tile: gl.constexpr):
    """Eq. (13) for the columns of M0 and S0: their parts of da and deta, (64,) each."""
    offs_t = gl.arange(0, C, layout=LINE)
    inside, last = offs_t < block.length, offs_t == block.length - 1
    has_next = offs_t + 1 < block.length
    a = load_a(gates.alpha, block, 1, tile, LINE)
    eta = gl.where(has_next, load_gate(gates.eta, block, 1, tile, LINE), 1.0)
    rows = drows.beta_f + block.index * 2 * C + offs_t
    transition = dblock_end.transition + block.index * 3
    lbeta = gl.load(rows, mask=inside, other=0.0) + gl.where(last, gl.load(transition), 0.0)
    lf = gl.load(rows + C, mask=inside, other=0.0) + gl.where(last, gl.load(transition + 1), 0.0)
    _, lbeta = gl.associative_scan((a, lbeta), 0, before, reverse=True)
    _, lf = gl.associative_scan((a, lf), 0, before, reverse=True)
    lm = gl.where(inside, lf, 0.0) + gl.where(last, gl.load(transition + 2), 0.0)
    _, lm = gl.associative_scan((eta, lm), 0, before, reverse=True)
    # of the row before
    a = load_a(gates.alpha, block, -1, tile, LINE)
    eta = load_gate(gates.eta, block, -1, tile, LINE)
    first = offs_t == 0
    m, f, beta = gl.associative_scan(
        (gl.where(first, 1.0, eta), gl.where(first, 0.0, eta), gl.where(first, 1.0, a)), 0, then
    )  # fmt: skip
    return lbeta * beta + lf * f, lm * m


@gluon.jit(do_not_specialize=["T", "H"])
def hopper_coefficients_vjp_kernel(
    gates,  # theta, alpha, eta: (B, T, H)
    dgates,  # out: of these
    drows, dblock_end, where,
    T, H, tile: gl.constexpr,
):  # fmt: skip
    """Eq. (13), as `titans.kernels.coefficients.coefficients_vjp_kernel`, for chunks of 64 gates.

    Grid: (K H,).
    Reads: gates, cotangents of the coefficients.
    Writes: dtheta, dalpha, deta.
    """
    block = own_block(where, T, H, C, tile)
    if block.length <= 0:
        return
    gates_s = gl.allocate_shared_memory(gl.float32, [5, C], VECTOR)
    kept_s = gl.allocate_shared_memory(gl.float32, [2 * BANDS, C], VECTOR)
    sums_s = gl.allocate_shared_memory(gl.float32, [2, C], VECTOR)
    offs_t = gl.arange(0, C, layout=LINE)
    gates_s.index(0).store(load_a(gates.alpha, block, 0, tile, LINE))
    gates_s.index(1).store(load_gate(gates.eta, block, 0, tile, LINE))
    has_next = offs_t + 1 < block.length
    gates_s.index(2).store(gl.where(has_next, load_a(gates.alpha, block, 1, tile, LINE), 1.0))
    gates_s.index(3).store(gl.where(has_next, load_gate(gates.eta, block, 1, tile, LINE), 1.0))
    gates_s.index(4).store(gl.where(offs_t < block.length, 1.0, 0.0))
    theta = load_gate(gates.theta, block, 0, tile, COLUMN)
    offs_j = gl.arange(0, C, layout=COLUMN)
    weights = dblock_end.weights + block.index * 2 * C + offs_j
    dn_L = gl.load(weights, mask=offs_j < block.length, other=0.0)
    dG_L = gl.load(weights + C, mask=offs_j < block.length, other=0.0)
    dtheta = sums_over_tokens(
        theta, gates_s, kept_s, sums_s, drows.G + block.index * C * C, dn_L, dG_L, block
    )  # fmt: skip
    da, deta = sums_over_states(gates, drows, dblock_end, block, tile)
    da += sums_s.index(0).load(LINE)
    deta += sums_s.index(1).load(LINE)
    if tile.LOG:
        dtheta = theta * dtheta
        da = load_a(gates.alpha, block, 0, tile, LINE) * da
        deta = load_gate(gates.eta, block, 0, tile, LINE) * deta
    else:
        da = -da
    at, mask = block.row + offs_t * H, offs_t < block.length
    gl.store(dgates.alpha + at, da, mask=mask)
    gl.store(dgates.eta + at, deta, mask=mask)
    gl.store(dgates.theta + block.row + offs_j * H, dtheta, mask=offs_j < block.length)


run = Launcher(hopper_coefficients_vjp_kernel)


def launch_coefficients_vjp(
    call: Call, where: Where, tile: Tile, blocks: int, drows: Rows, dblock_end: End, dgates: Gates, key: Hashable
) -> None:
    """Launch the kernel, as `titans.kernels.launch.coefficients_vjp` does the portable one."""
    T, H = call.q.shape[1:3]
    run(
        blocks, key,
        gates=Gates(call.theta, call.alpha, call.eta), dgates=dgates, drows=drows, dblock_end=dblock_end,
        where=where, T=T, H=H, tile=tile, num_warps=1,
    )  # fmt: skip

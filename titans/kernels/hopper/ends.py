"""The coefficients that the chain needs: those of the last row of each chunk, without the rows before it.

The forward makes them beside the chain, by warps that have the time; the backward in a launch of their own.
Every number is a sum of products of numbers that are not negative, as in `coefficients_kernel`, but by a scan. All
warps of a role scan alike, so the bits do not depend on their number.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from titans.arguments import Call
from titans.kernels.block import own_block
from titans.kernels.hopper.state_vjp import WARP
from titans.kernels.launcher import Launcher
from titans.kernels.tile import End, Tile, Where

# rows of a slot of coefficients: n_Lj and G_Lj; beta_L, f_L and m_L, of which the first elements count
N_L, G_L, BETA_L, F_L, M_L = (gl.constexpr(i) for i in range(5))
ENDS = gl.constexpr(5)


class Given(NamedTuple):
    """Gates, as they were passed; (B, T, H)."""

    theta: Tensor
    alpha: Tensor
    eta: Tensor


class Gates(NamedTuple):
    """Gates of a chunk, as they were passed, and those of the token after each; (64,) in float32, zero outside."""

    theta: Any
    alpha: Any
    eta: Any
    alpha_next: Any
    eta_next: Any


@gluon.jit
def load_gates(tokens, step, LAYOUT: gl.constexpr):
    """Load the gates of a step."""
    offs_j = gl.arange(0, 64, layout=LAYOUT)
    at = step.row + offs_j * step.H
    mask, has_next = offs_j < step.length, offs_j + 1 < step.length
    return Gates(
        gl.load(tokens.theta + at, mask=mask, other=0.0).to(gl.float32),
        gl.load(tokens.alpha + at, mask=mask, other=0.0).to(gl.float32),
        gl.load(tokens.eta + at, mask=mask, other=0.0).to(gl.float32),
        gl.load(tokens.alpha + at + step.H, mask=has_next, other=0.0).to(gl.float32),
        gl.load(tokens.eta + at + step.H, mask=has_next, other=0.0).to(gl.float32),
    )


@gluon.jit
def then(later_m, later_f, later_beta, m, f, beta):
    """Eq. (7) for two runs of tokens as one: what they make of S, and of S and M for M."""
    return later_m * m, later_f * m + later_beta * f, later_beta * beta


@gluon.jit
def near_one(product, log):
    """The product of decays from the sum of their logs where that is little: as in `coefficients_kernel`."""
    total = gl.sum(log, 0)
    return gl.where(total > -1, gl.exp(total), product)


@gluon.jit
def end_of(gates, length, tile: gl.constexpr, LAYOUT: gl.constexpr):
    """Eq. (7) at the end L of a chunk: n_Lj and G_Lj; beta_L, f_L and m_L, each as a first element."""
    theta, alpha, eta, alpha_next, eta_next = gates.theta, gates.alpha, gates.eta, gates.alpha_next, gates.eta_next
    log_a, log_eta = alpha, eta
    if tile.LOG:
        theta, a, eta = gl.exp(theta), gl.exp(alpha), gl.exp(eta)
        a_next, eta_next = gl.exp(alpha_next), gl.exp(eta_next)
    else:
        a, a_next = 1 - alpha, 1 - alpha_next
    offs_j = gl.arange(0, 64, layout=LAYOUT)
    inside, has_next = offs_j < length, offs_j + 1 < length
    # what the tokens after j make of the update of token j, which is in S and in M alike
    m, f, beta = gl.associative_scan(
        (gl.where(has_next, eta_next, 1.0), gl.where(has_next, eta_next, 0.0), gl.where(has_next, a_next, 1.0)),
        0, then, reverse=True,
    )  # fmt: skip
    n, G = gl.where(inside, m * theta, 0.0), gl.where(inside, (f + beta) * theta, 0.0)
    # what token 0 and those after it make of the state
    m, f, beta = m * eta, (f + beta) * eta, beta * a
    if tile.LOG:
        beta, m = near_one(beta, gl.where(inside, log_a, 0.0)), near_one(m, gl.where(inside, log_eta, 0.0))
    return n, G, beta, f, m


@gluon.jit
def store_end(c_s, first, gates, length, tile: gl.constexpr, LAYOUT: gl.constexpr):
    """Keep `end_of` in rows `first` to `first + ENDS - 1` of c_s, in shared memory."""
    n, G, beta, f, m = end_of(gates, length, tile, LAYOUT)
    c_s.index(first + N_L).store(n)
    c_s.index(first + G_L).store(G)
    c_s.index(first + BETA_L).store(beta)
    c_s.index(first + F_L).store(f)
    c_s.index(first + M_L).store(m)


@gluon.jit(do_not_specialize=["T", "H"])
def hopper_ends_kernel(
    gates,
    where,
    end,  # out
    T, H, tile: gl.constexpr,
):  # fmt: skip
    """Eq. (7) at the end of each chunk.

    Grid: (K H,), one warp each.
    Reads: gates.
    Writes: the ends.
    """
    block = own_block(where, T, H, 64, tile)
    if block.length > 0:
        n, G, beta, f, m = end_of(load_gates(gates, block, WARP), block.length, tile, WARP)
        offs_j = gl.arange(0, 64, layout=WARP)
        weights = end.weights + block.index * 128 + offs_j
        gl.store(weights, n)
        gl.store(weights + 64, G)
        first = offs_j == 0
        transition = end.transition + block.index * 3 + offs_j
        gl.store(transition, beta, mask=first)
        gl.store(transition + 1, f, mask=first)
        gl.store(transition + 2, m, mask=first)


run = Launcher(hopper_ends_kernel)


def launch_ends(call: Call, where: Where, tile: Tile, slots: int, key: Hashable) -> End:
    """Launch the kernel for so many slots: what the chain needs of (7)."""
    T, H = call.q.shape[1:3]
    end = End(call.M.new_empty(slots, H, 2, 64), call.M.new_empty(slots, H, 3))
    run(
        slots * H, key,
        gates=Given(call.theta, call.alpha, call.eta), where=where, end=end, T=T, H=H, tile=tile, num_warps=1,
    )  # fmt: skip
    return end

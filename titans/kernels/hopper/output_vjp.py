"""The reverse of the `output` stage in Gluon: one program per block of 64 tokens and head, all alike.

Tiles come and go through the copy engine, and G of (7) is made on the chip from the gates while they come. Two programs
of narrow tiles share a multiprocessor, so that one's copies are made beside another's products.

Operands of products are rounded as in the portable kernel, but for three: beta_t dy_t and f_t dy_t are rounded before
their products with M0 and S0, where dy_t is there; and dbeta_t and df_t are sums of dy_t and q_t M0, q_t S0, neither
rounded. What is stored for products lies in the memory of operands that have been used up.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
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

from titans.arguments import Call
from titans.kernels.block import own_block
from titans.kernels.hopper.blocks import (
    column,
    fetch_rows,
    fetch_square,
    load_a,
    load_gate,
    load_passed,
    load_row,
    load_vector,
    lower,
    put_rows,
    put_square,
    store_row,
    store_vector,
)
from titans.kernels.hopper.common import (
    TILE,
    VECTOR,
    add_two,
    aligned,
    as_column,
    copying,
    grid_of,
    less_mean,
    mean,
    product,
    two_means,
)
from titans.kernels.hopper.output import GRAM, add, then
from titans.kernels.hopper.state_vjp import flag_of, rows_of_heads, squares
from titans.kernels.launcher import Launcher
from titans.kernels.tile import Affine, BlockState, Rows, Saved, Tile, Where

C = gl.constexpr(64)


class Tokens(NamedTuple):
    """Tensors as the warps read and write them, (B, T, H, D), and the gates, (B, T, H)."""

    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor
    do: Tensor
    dq: Tensor
    du: Tensor
    dk: Tensor
    theta: Tensor
    alpha: Tensor
    eta: Tensor


@gluon.jit
def make_gram(G_s, tokens, block, tile: gl.constexpr, PAIRS: gl.constexpr):
    """Eq. (7): -2 G_tj, by a scan over t: what the tokens after j make of its update, which is in S and in M alike."""
    offs_t, offs_j = grid_of(C, C, PAIRS)
    ROW: gl.constexpr = gl.SliceLayout(1, PAIRS)
    a = column(load_a(tokens.alpha, block, 0, tile, ROW))
    eta = column(load_gate(tokens.eta, block, 0, tile, ROW))
    theta = gl.expand_dims(load_gate(tokens.theta, block, 0, tile, gl.SliceLayout(0, PAIRS)), 0)
    later = offs_t > offs_j
    m = gl.where(later, eta, 1.0)
    _, f, beta = gl.associative_scan((m, gl.where(later, eta, 0.0), gl.where(later, a, 1.0)), 0, then)
    G_s.store(gl.where((offs_j <= offs_t) & (offs_t < block.length), (f + beta) * (-2 * theta), 0.0))


@gluon.jit
def make_beta_f(beta_f_s, tokens, block, tile: gl.constexpr, LINE: gl.constexpr):
    """Eq. (7): beta_t and f_t; as in `coefficients_kernel`, beta_t from the sum of the logs where that is little."""
    a, eta = load_a(tokens.alpha, block, 0, tile, LINE), load_gate(tokens.eta, block, 0, tile, LINE)
    _, f, beta = gl.associative_scan((eta, eta, a), 0, then)
    if tile.LOG:
        sums = gl.associative_scan(load_passed(tokens.alpha, block, 0, LINE), 0, add)
        beta = gl.where(sums > -1, gl.exp(sums), beta)
    beta_f_s.index(0).store(beta)
    beta_f_s.index(1).store(f)


@gluon.jit
def make_inner_gradient(k_s, v_s, x_s, saved, affine, block, tile: gl.constexpr, Y: gl.constexpr):
    """Eq. (2): u, in place of v; stores the means."""
    x, target = x_s.load(Y).to(gl.float32), v_s.load(Y).to(gl.float32)
    if tile.NORM:
        target -= k_s.load(Y).to(gl.float32)
        FEATURES: gl.constexpr = gl.SliceLayout(0, Y)
        w = gl.expand_dims(load_row(affine.w, block.h, tile, FEATURES), 0)
        b = gl.expand_dims(load_row(affine.b, block.h, tile, FEATURES), 0)
        e = (x * w + (b - target)) * w
        mean_e, c = two_means(e, e * x, tile.D)
        store_vector(saved.means, mean_e, block.row * 2, block.H * 2, block.length, Y)
        store_vector(saved.means, c, block.row * 2 + 1, block.H * 2, block.length, Y)
        r = column(load_vector(saved.r, block.row, block.H, block.length, Y))
        u = r * (less_mean(e, mean_e, tile.D, Y) - x * column(c))
    else:
        u = x - target
    v_s.store(u.to(gl.bfloat16))


@gluon.jit
def readout_vjp(do, y, affine, daffine, block, eps, tile: gl.constexpr, Y: gl.constexpr):
    """The reverse of (5): dy; stores dw and db of the block."""
    if tile.NORM:
        centred = less_mean(y, mean(y, tile.D), tile.D, Y)
        r = column(gl.rsqrt(mean(centred * centred, tile.D) + eps))
        x = centred * r
        FEATURES: gl.constexpr = gl.SliceLayout(0, Y)
        store_row(daffine.w, gl.sum(do * x, 0), block.index, tile, FEATURES)
        store_row(daffine.b, gl.sum(do, 0), block.index, tile, FEATURES)
        dx = do * gl.expand_dims(load_row(affine.w, block.h, tile, FEATURES), 0)
        dcentred = r * (dx - x * column(mean(dx * x, tile.D)))
        do += less_mean(dcentred, mean(dcentred, tile.D), tile.D, Y)
    return do


@gluon.jit(do_not_specialize=["T", "H"])
def hopper_output_vjp_kernel(
    # one by one, as Triton 3.6 wants them
    q_rows, k_rows, v_rows, x_rows, do_rows, dq_rows, du_rows, dk_rows,  # (B T, H, D)
    M0_square, S0_square, dM0_square, dS0_square,  # (K H, D, D)
    tokens, affine, saved, where,
    drows, daffine,  # out
    T, H, eps, tile: gl.constexpr,
    TOKENS: gl.constexpr, STATES: gl.constexpr, PAIRS: gl.constexpr, LINE: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    """Eq. (14): the reverse of the outputs, as `titans.kernels.output.output_vjp_kernel`, for chunks of 64 tokens.

    Grid: (K H,).
    Reads: q, k, v, w, b, gates, M0, S0, x and r of the forward, do.
    Writes: mean e and mean e x of (2), dq, the parts of du, dk, dM0 and dS0 that come through the outputs, the
    cotangents of beta_t, f_t and G, dw and db of the block.
    """
    block = own_block(where, T, H, C, tile)
    if block.length <= 0:
        return
    Y: gl.constexpr = TOKENS
    BD: gl.constexpr = tile.BD
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=Y, k_width=2)
    q_s = gl.allocate_shared_memory(gl.bfloat16, [C, BD], TILE)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [C, BD], TILE)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [C, BD], TILE)
    x_s = gl.allocate_shared_memory(gl.bfloat16, [C, BD], TILE)
    do_s = gl.allocate_shared_memory(gl.bfloat16, [C, BD], TILE)
    fdy_s = gl.allocate_shared_memory(gl.bfloat16, [C, BD], TILE)
    M0_s = gl.allocate_shared_memory(gl.bfloat16, [BD, BD], TILE)
    S0_s = gl.allocate_shared_memory(gl.bfloat16, [BD, BD], TILE)
    weights_s = gl.allocate_shared_memory(gl.bfloat16, [C, C], TILE)
    dscores_s = gl.allocate_shared_memory(gl.bfloat16, [C, C], TILE)
    G_s = gl.allocate_shared_memory(gl.float32, [C, C], GRAM)
    beta_f_s = gl.allocate_shared_memory(gl.float32, [2, C], VECTOR)
    # k, v and x; q, M0 and S0; do
    inner_full, outer_full, do_full = flag_of(3, 1).index(0), flag_of(3, 1).index(0), flag_of(1, 1).index(0)
    token = (block.sequence.begin + block.first).to(gl.int32)
    index = block.index.to(gl.int32)
    fetch_rows(k_rows, tokens.k, k_s, inner_full, token, block, tile, COPY)
    fetch_rows(v_rows, tokens.v, v_s, inner_full, token, block, tile, COPY)
    fetch_rows(x_rows, tokens.x, x_s, inner_full, token, block, tile, COPY)
    fetch_rows(q_rows, tokens.q, q_s, outer_full, token, block, tile, COPY)
    fetch_square(M0_square, M0_s, outer_full, index, tile)
    fetch_square(S0_square, S0_s, outer_full, index, tile)
    fetch_rows(do_rows, tokens.do, do_s, do_full, token, block, tile, COPY)
    make_gram(G_s, tokens, block, tile, PAIRS)
    make_beta_f(beta_f_s, tokens, block, tile, LINE)

    # (5) and (11)
    mbarrier.wait(inner_full, 0)
    make_inner_gradient(k_s, v_s, x_s, saved, affine, block, tile, Y)
    u_s = v_s
    fence_async_shared()
    mbarrier.wait(outer_full, 0)
    no_tokens, no_scores = gl.zeros([C, BD], gl.float32, Y), gl.zeros([C, C], gl.float32, Y)
    scores = warpgroup_mma(q_s, k_s.permute((1, 0)), no_scores, use_acc=False, is_async=True)
    y_M = warpgroup_mma(q_s, M0_s, no_tokens, use_acc=False, is_async=True)
    y_S = warpgroup_mma(q_s, S0_s, no_tokens, use_acc=False, is_async=True)
    scores, _, _ = warpgroup_mma_wait(2, deps=[scores, q_s, k_s])
    # what is above the diagonal may overflow, and must not meet the zeros of G there
    scores = lower(scores, Y)
    weights = (G_s.load(Y) * scores).to(gl.bfloat16)
    weights_s.store(weights)
    beta, f = as_column(beta_f_s.index(0), Y), as_column(beta_f_s.index(1), Y)
    y_M, y_S, _, _, _ = warpgroup_mma_wait(0, deps=[y_M, y_S, q_s, M0_s, S0_s])
    dy = do_s
    if tile.NORM:
        weights = gl.convert_layout(weights, LEFT)
        y = warpgroup_mma(weights, u_s, beta * y_M + f * y_S, is_async=True)
        y, _, _ = warpgroup_mma_wait(0, deps=[y, weights, u_s])
        mbarrier.wait(do_full, 0)
        dy = readout_vjp(do_s.load(Y).to(gl.float32), y, affine, daffine, block, eps, tile, Y)
    else:
        mbarrier.wait(do_full, 0)
        dy = do_s.load(Y).to(gl.float32)

    # (14)
    dbeta, df = gl.reduce((dy * y_M, dy * y_S), 1, add_two)
    rows = block.index * 2 * C
    store_vector(drows.beta_f, dbeta, rows, 1, C, Y)
    store_vector(drows.beta_f, df, rows + C, 1, C, Y)
    dy_s, bdy_s = do_s, x_s
    dy_s.store(dy.to(gl.bfloat16))
    bdy_s.store((beta * dy).to(gl.bfloat16))
    fdy_s.store((f * dy).to(gl.bfloat16))
    fence_async_shared()
    dweights = warpgroup_mma(dy_s, u_s.permute((1, 0)), no_scores, use_acc=False, is_async=True)
    dq = warpgroup_mma(bdy_s, M0_s.permute((1, 0)), no_tokens, use_acc=False, is_async=True)
    dq = warpgroup_mma(fdy_s, S0_s.permute((1, 0)), dq, is_async=True)
    du = warpgroup_mma(weights_s.permute((1, 0)), dy_s, no_tokens, use_acc=False, is_async=True)
    dweights, _, _ = warpgroup_mma_wait(3, deps=[dweights, dy_s, u_s])
    dweights = lower(dweights, Y)
    dscores = (G_s.load(Y) * dweights).to(gl.bfloat16)
    dscores_s.store(dscores)
    fence_async_shared()
    dscores = gl.convert_layout(dscores, LEFT)
    dq = warpgroup_mma(dscores, k_s, dq, is_async=True)
    dk = warpgroup_mma(dscores_s.permute((1, 0)), q_s, no_tokens, use_acc=False, is_async=True)
    offs_t, offs_j = grid_of(C, C, Y)
    at = drows.G + block.index * C * C + (offs_t * C + offs_j)
    gl.store(at, -2 * dweights * scores, mask=offs_j <= offs_t)
    dq, du, dk, _, _, _, _, _, _, _, _, _, _, _ = warpgroup_mma_wait(
        0, deps=[dq, du, dk, bdy_s, M0_s, fdy_s, S0_s, weights_s, dy_s, dscores, dscores_s, k_s, q_s, u_s]
    )
    no_states = gl.zeros([BD, BD], gl.float32, STATES)
    q_T = q_s.permute((1, 0))
    dM0 = warpgroup_mma(q_T, bdy_s, no_states, use_acc=False, is_async=True)
    dq_s, du_s, dk_s = k_s, u_s, dy_s
    dq_s.store(dq.to(gl.bfloat16))
    du_s.store(du.to(gl.bfloat16))
    dk_s.store(dk.to(gl.bfloat16))
    fence_async_shared()
    put_rows(dq_rows, tokens.dq, dq_s, token, block, tile, COPY)
    put_rows(du_rows, tokens.du, du_s, token, block, tile, COPY)
    put_rows(dk_rows, tokens.dk, dk_s, token, block, tile, COPY)
    dM0, _, _ = warpgroup_mma_wait(0, deps=[dM0, q_s, bdy_s])
    dS0 = warpgroup_mma(q_T, fdy_s, no_states, use_acc=False, is_async=True)
    M0_s.store(dM0.to(gl.bfloat16))
    dS0, _, _ = warpgroup_mma_wait(0, deps=[dS0, q_s, fdy_s])
    S0_s.store(dS0.to(gl.bfloat16))
    fence_async_shared()
    put_square(dM0_square, M0_s, index)
    put_square(dS0_square, S0_s, index)
    tma.store_wait(0)


@functools.cache
def options(BD: int) -> dict[str, Any]:
    """Constants of the kernel that depend on the width of its tiles."""
    if BD == 64:
        layout = product([4, 1], 64)
        return {
            "TOKENS": layout, "STATES": layout, "PAIRS": gl.BlockedLayout([32, 1], [2, 16], [1, 4], [1, 0]),
            "LINE": gl.BlockedLayout([2], [32], [4], [0]), "COPY": copying(64, 4), "num_warps": 4,
        }  # fmt: skip
    return {
        "TOKENS": product([4, 2], 64), "STATES": product([8, 1], 128),
        "PAIRS": gl.BlockedLayout([16, 1], [4, 8], [1, 8], [1, 0]), "LINE": gl.BlockedLayout([2], [32], [8], [0]),
        "COPY": copying(128, 8), "num_warps": 8,
    }  # fmt: skip


run = Launcher(hopper_output_vjp_kernel)


def launch_output_vjp(
    call: Call, where: Where, tile: Tile, blocks: int, saved: Saved, do: Tensor, drows: Rows, dq: Tensor, du: Tensor,
    dk: Tensor, dstate0: BlockState, daffine: Affine, key: Hashable,
) -> None:  # fmt: skip
    """Launch the kernel, whose tile knows of log gates, as `titans.kernels.launch.output_vjp` does the portable one."""
    T, H, D = call.q.shape[1:]
    BD = 64 if D <= 64 else 128
    q, k, v, do = (aligned(x) for x in (call.q, call.k, call.v, do))
    tokens = Tokens(q, k, v, saved.x, do, dq, du, dk, call.theta, call.alpha, call.eta)
    states = {"M0": saved.M0, "S0": saved.S0, "dM0": dstate0.M, "dS0": dstate0.S}
    run(
        blocks, key,
        **{f"{name}_rows": rows_of_heads(getattr(tokens, name), BD) for name in Tokens._fields[:8]},
        **{f"{name}_square": squares(x, BD) for name, x in states.items()},
        tokens=tokens, affine=Affine(call.w, call.b), saved=saved, where=where, drows=drows, daffine=daffine,
        T=T, H=H, eps=call.eps, tile=tile, **options(BD),
    )  # fmt: skip

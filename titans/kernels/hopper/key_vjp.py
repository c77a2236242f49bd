"""What the cotangents along the chain make of keys and values, in Gluon: one program per block of 64 tokens and head.

As in `output_vjp.py`, tiles come and go through the copy engine, and two programs of narrow tiles share a
multiprocessor. Operands of products are rounded as in the portable kernel.
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
    add_row,
    column,
    fetch_rows,
    fetch_square,
    load_row,
    load_vector,
    put_rows,
    store_vector,
)
from titans.kernels.hopper.common import (
    TILE,
    add_two,
    aligned,
    copying,
    less_mean,
    load_square,
    product,
    two_means,
)
from titans.kernels.hopper.state_vjp import add_three, flag_of, rows_of_heads, squares
from titans.kernels.launcher import Launcher
from titans.kernels.tile import Affine, BlockState, End, Saved, Tile, Where

C = gl.constexpr(64)


class Tokens(NamedTuple):
    """Tensors as the warps read and write them, (B, T, H, D)."""

    k: Tensor
    v: Tensor
    x: Tensor
    du: Tensor
    dk: Tensor  # in and out
    dv: Tensor  # out; it may be the memory of du


@gluon.jit
def transition_vjp(dM_s, dS_s, M0_s, S0_s, transition_ptr, index, FLAT: gl.constexpr):
    """Eq. (16): cotangents of beta_L, f_L and m_L."""
    dM, dS = dM_s.load(FLAT).to(gl.float32), dS_s.load(FLAT).to(gl.float32)
    M0, S0 = M0_s.load(FLAT).to(gl.float32), S0_s.load(FLAT).to(gl.float32)
    dbeta, df, dm = gl.reduce(gl.reduce((dM * M0, dM * S0, dS * S0), 1, add_three), 0, add_three)
    gl.store(transition_ptr + index * 3, dbeta)
    gl.store(transition_ptr + index * 3 + 1, df)
    gl.store(transition_ptr + index * 3 + 2, dm)


@gluon.jit
def three_means(x, y, z, D: gl.constexpr):
    """Mean over the D columns that are in use, of three tiles at once."""
    x, y, z = gl.reduce((x, y, z), 1, add_three)
    return x / D, y / D, z / D


@gluon.jit
def inner_gradient_vjp(
    du, k_s, v_s, x_s, affine, saved, daffine, block, tile: gl.constexpr, Y: gl.constexpr
):  # fmt: skip
    """Eq. (2) and (12): u, dz and dy; adds dw and db of the block."""
    x = x_s.load(Y).to(gl.float32)
    if tile.NORM:
        w, b = load_row(affine.w, block.h, tile, Y), load_row(affine.b, block.h, tile, Y)
        r = column(load_vector(saved.r, block.row, block.H, block.length, Y))
        mean_e = load_vector(saved.means, block.row * 2, block.H * 2, block.length, Y)
        c = column(load_vector(saved.means, block.row * 2 + 1, block.H * 2, block.length, Y))
        z = x * w + b - (v_s.load(Y).to(gl.float32) - k_s.load(Y).to(gl.float32))
        e = z * w
        p = less_mean(e, mean_e, tile.D, Y) - x * c
        dp = du * r
        dr, mean_dp, mean_dp_x = three_means(du * p, dp, dp * x, tile.D)
        de = less_mean(dp, mean_dp, tile.D, Y) - column(mean_dp_x) * x
        dz = de * w
        add_row(daffine.w, gl.sum(de * (z + w * x), 0), block.index, tile, Y)
        add_row(daffine.b, gl.sum(dz, 0), block.index, tile, Y)
        dx = dz * w - column(mean_dp_x) * e - dp * c
        mean_dx, mean_dx_x = two_means(dx, dx * x, tile.D)
        # x has mean 0
        dy = r * (less_mean(dx, mean_dx, tile.D, Y) - x * column(mean_dx_x)) - x * (r * r * column(dr))
        u = r * p
    else:
        u = x - v_s.load(Y).to(gl.float32)
        dy, dz = du, du
    return u, dz, dy


@gluon.jit(do_not_specialize=["T", "H"])
def hopper_key_vjp_kernel(
    # one by one, as Triton 3.6 wants them
    k_rows, v_rows, x_rows, du_rows, dk_rows, dv_rows,  # (B T, H, D)
    M0_square, S0_square, dM_square, dS_square,  # (K H, D, D)
    tokens, affine, block_end, saved, where,
    anchor_ptr,  # (N, H, D, D): the initial one
    daffine,  # in and out: of each block, added to
    dblock_end,  # out
    T, H, tile: gl.constexpr,
    TOKENS: gl.constexpr, FLAT: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    """Eq. (16), as `titans.kernels.state_vjp.key_vjp_kernel`, for chunks of 64 tokens.

    Grid: (K H,).
    Reads: k, v, w, b, coefficients, M0, S0, dM and dS after the block, du, the rest of dk.
    Writes: dk, dv, dw and db of the block, and the cotangents of its last row of coefficients.
    """
    block = own_block(where, T, H, C, tile)
    if block.length <= 0:
        return
    Y: gl.constexpr = TOKENS
    BD: gl.constexpr = tile.BD
    k_s = gl.allocate_shared_memory(gl.bfloat16, [C, BD], TILE)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [C, BD], TILE)
    x_s = gl.allocate_shared_memory(gl.bfloat16, [C, BD], TILE)
    du_s = gl.allocate_shared_memory(gl.bfloat16, [C, BD], TILE)
    dk_s = gl.allocate_shared_memory(gl.bfloat16, [C, BD], TILE)
    M0_s = gl.allocate_shared_memory(gl.bfloat16, [BD, BD], TILE)
    S0_s = gl.allocate_shared_memory(gl.bfloat16, [BD, BD], TILE)
    dM_s = gl.allocate_shared_memory(gl.bfloat16, [BD, BD], TILE)
    dS_s = gl.allocate_shared_memory(gl.bfloat16, [BD, BD], TILE)
    rows_full, square_full = flag_of(5, 1).index(0), flag_of(4, 1).index(0)
    token = (block.sequence.begin + block.first).to(gl.int32)
    index = block.index.to(gl.int32)
    fetch_rows(x_rows, tokens.x, x_s, rows_full, token, block, tile, COPY)
    fetch_rows(v_rows, tokens.v, v_s, rows_full, token, block, tile, COPY)
    fetch_rows(k_rows, tokens.k, k_s, rows_full, token, block, tile, COPY)
    fetch_rows(du_rows, tokens.du, du_s, rows_full, token, block, tile, COPY)
    fetch_rows(dk_rows, tokens.dk, dk_s, rows_full, token, block, tile, COPY)
    fetch_square(M0_square, M0_s, square_full, index, tile)
    fetch_square(S0_square, S0_s, square_full, index, tile)
    fetch_square(dM_square, dM_s, square_full, index, tile)
    fetch_square(dS_square, dS_s, square_full, index, tile)
    weights = block.index * 2 * C
    n_L = column(load_vector(block_end.weights, weights, 1, block.length, Y))
    G_L = column(load_vector(block_end.weights, weights + C, 1, block.length, Y))

    mbarrier.wait(rows_full, 0)
    u, dz, dy = inner_gradient_vjp(
        du_s.load(Y).to(gl.float32), k_s, v_s, x_s, affine, saved, daffine, block, tile, Y
    )  # fmt: skip
    dk = dk_s.load(Y).to(gl.float32)
    if tile.NORM:
        dk += dz
    u_s, dy_s, dv_s = x_s, du_s, v_s
    u_s.store(u.to(gl.bfloat16))
    dy_s.store(dy.to(gl.bfloat16))
    dv_s.store((-dz).to(gl.bfloat16))
    fence_async_shared()
    put_rows(dv_rows, tokens.dv, dv_s, token, block, tile, COPY)
    mbarrier.wait(square_full, 0)
    nothing = gl.zeros([C, BD], gl.float32, Y)
    u_dM = warpgroup_mma(u_s, dM_s.permute((1, 0)), nothing, use_acc=False, is_async=True)
    u_dS = warpgroup_mma(u_s, dS_s.permute((1, 0)), nothing, use_acc=False, is_async=True)
    transition_vjp(dM_s, dS_s, M0_s, S0_s, dblock_end.transition, block.index, FLAT)
    A_s = M0_s
    if block.i == 0:
        # the chunk that a sequence begins in has an anchor of its own
        anchor = load_square(anchor_ptr, block.sequence.n.to(gl.int64) * H + block.h, tile, FLAT)
        A_s.store(anchor.to(gl.bfloat16))
        fence_async_shared()
    dk = warpgroup_mma(dy_s, A_s.permute((1, 0)), dk, is_async=True)
    u_dM, u_dS, _, _, _ = warpgroup_mma_wait(1, deps=[u_dM, u_dS, u_s, dM_s, dS_s])
    k = k_s.load(Y).to(gl.float32)
    dG_L, dn_L = gl.reduce((u_dM * k, u_dS * k), 1, add_two)
    store_vector(dblock_end.weights, -2 * dn_L, weights, 1, C, Y)
    store_vector(dblock_end.weights, -2 * dG_L, weights + C, 1, C, Y)
    dk, _, _ = warpgroup_mma_wait(0, deps=[dk, dy_s, A_s])
    dk += G_L * (-2 * u_dM) + n_L * (-2 * u_dS)
    dk_s.store(dk.to(gl.bfloat16))
    fence_async_shared()
    put_rows(dk_rows, tokens.dk, dk_s, token, block, tile, COPY)
    tma.store_wait(0)


@functools.cache
def options(BD: int) -> dict[str, Any]:
    """Constants of the kernel that depend on the width of its tiles."""
    warps = 4 if BD == 64 else 8
    return {
        "TOKENS": product([4, warps // 4], 64), "FLAT": copying(BD, warps), "COPY": copying(BD, warps),
        "num_warps": warps,
    }  # fmt: skip


run = Launcher(hopper_key_vjp_kernel)


def launch_key_vjp(
    call: Call, where: Where, tile: Tile, blocks: int, block_end: End, saved: Saved, dstate_L: BlockState, du: Tensor,
    dk: Tensor, daffine: Affine, dblock_end: End, key: Hashable,
) -> None:  # fmt: skip
    """Launch the kernel, as `titans.kernels.launch.key_vjp` does the portable one: dk becomes whole, and du dv."""
    T, H, D = call.q.shape[1:]
    BD = 64 if D <= 64 else 128
    tokens = Tokens(aligned(call.k), aligned(call.v), saved.x, du, dk, du)
    states = {"M0": saved.M0, "S0": saved.S0, "dM": dstate_L.M, "dS": dstate_L.S}
    run(
        blocks, key,
        **{f"{name}_rows": rows_of_heads(x, BD) for name, x in tokens._asdict().items()},
        **{f"{name}_square": squares(x, BD) for name, x in states.items()},
        tokens=tokens, affine=Affine(call.w, call.b), block_end=block_end, saved=saved, where=where,
        anchor_ptr=call.anchor, daffine=daffine, dblock_end=dblock_end, T=T, H=H, tile=tile, **options(BD),
    )  # fmt: skip

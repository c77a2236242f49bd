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
    column,
    fetch_rows,
    fetch_square,
    load_row,
    load_vector,
    put_rows,
    store_row,
    store_vector,
)
from titans.kernels.hopper.common import (
    TILE,
    VECTOR,
    add_two,
    aligned,
    as_row,
    copying,
    less_mean,
    load_square,
    product,
    store_width,
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
def transition_vjp(dM_s, dS_s, M0_s, S0_s, FLAT: gl.constexpr):
    """Eq. (16): cotangents of beta_L, f_L and m_L."""
    dM, dS = dM_s.load(FLAT).to(gl.float32), dS_s.load(FLAT).to(gl.float32)
    M0, S0 = M0_s.load(FLAT).to(gl.float32), S0_s.load(FLAT).to(gl.float32)
    return gl.reduce(gl.reduce((dM * M0, dM * S0, dS * S0), 1, add_three), 0, add_three)


@gluon.jit
def inner_residual(x_s, v_s, k_s, wb_s, Y: gl.constexpr):
    """x, z and e of eq. (2), and w."""
    w, b = as_row(wb_s.index(0), Y), as_row(wb_s.index(1), Y)
    x = x_s.load(Y).to(gl.float32)
    z = x * w + b - (v_s.load(Y).to(gl.float32) - k_s.load(Y).to(gl.float32))
    return x, z, z * w, w


@gluon.jit
def inner_gradient_vjp(
    k_s, v_s, x_s, du_s, dk_s, u_s, wb_s, r, mean_e, c, dw, db, passed, block,
    tile: gl.constexpr, Y: gl.constexpr, LINE: gl.constexpr,
):  # fmt: skip
    """Eq. (2) and (12), with r factored out of dp, de and dx: u; dy and dv, in place of du and v; dk, dw and db.

    As in `state_vjp.py`, x and z are made anew, rather than kept in registers, and over a
    barrier that has been passed the compiler moves no loads.
    """
    du = du_s.load(Y).to(gl.float32)
    if tile.NORM:
        r, c = column(r), column(c)
        x, z, e, w = inner_residual(x_s, v_s, k_s, wb_s, Y)
        p = less_mean(e, mean_e, tile.D, Y) - x * c
        u_s.store((r * p).to(gl.bfloat16))
        sum_du_p, sum_du, sum_du_x = gl.reduce((du * p, du, du * x), 1, add_three)
        dr, mean_du_x = column(sum_du_p / tile.D), column(sum_du_x / tile.D)
        mbarrier.wait(passed, 0)
        x, z, e, w = inner_residual(x_s, v_s, k_s, wb_s, Y)
        g = less_mean(du, sum_du / tile.D, tile.D, Y) - mean_du_x * x
        dz = r * (g * w)
        dw_too, db_too = gl.reduce((r * g * (z + w * x), dz), 0, add_two)
        dw, db = dw + gl.convert_layout(dw_too, LINE), db + gl.convert_layout(db_too, LINE)
        dx = g * w * w - mean_du_x * e - du * c
        mean_dx, mean_dx_x = two_means(dx, dx * x, tile.D)
        dk = dk_s.load(Y).to(gl.float32) + dz
        v_s.store((-dz).to(gl.bfloat16))
        mbarrier.wait(passed, 0)
        # x has mean 0
        x = x_s.load(Y).to(gl.float32)
        dy = r * r * (less_mean(dx, mean_dx, tile.D, Y) - x * (column(mean_dx_x) + dr))
        du_s.store(dy.to(gl.bfloat16))
    else:
        u_s.store((x_s.load(Y).to(gl.float32) - v_s.load(Y).to(gl.float32)).to(gl.bfloat16))
        v_s.store((-du).to(gl.bfloat16))
        dk = dk_s.load(Y).to(gl.float32)
    return dk, dw, db


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
    TOKENS: gl.constexpr, FLAT: gl.constexpr, LINE: gl.constexpr, COPY: gl.constexpr,
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
    wb_s = gl.allocate_shared_memory(gl.float32, [2, BD], VECTOR)
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
    n_L = load_vector(block_end.weights, weights, 1, block.length, Y)
    G_L = load_vector(block_end.weights, weights + C, 1, block.length, Y)
    r = gl.zeros([C], gl.float32, gl.SliceLayout(1, Y))
    mean_e, c = r, r
    dw = gl.zeros([BD], gl.float32, LINE)
    db = dw
    if tile.NORM:
        r = load_vector(saved.r, block.row, H, block.length, Y)
        mean_e = load_vector(saved.means, block.row * 2, H * 2, block.length, Y)
        c = load_vector(saved.means, block.row * 2 + 1, H * 2, block.length, Y)
        store_width(wb_s.index(0), affine.w, block.h, tile, Y)
        store_width(wb_s.index(1), affine.b, block.h, tile, Y)
        dw, db = load_row(daffine.w, block.index, tile, LINE), load_row(daffine.b, block.index, tile, LINE)

    mbarrier.wait(square_full, 0)
    dbeta_L, df_L, dm_L = transition_vjp(dM_s, dS_s, M0_s, S0_s, FLAT)
    A_s, u_s = M0_s, S0_s._reinterpret(gl.bfloat16, [C, BD], TILE)
    if block.i == 0:
        # the chunk that a sequence begins in has an anchor of its own
        anchor = load_square(anchor_ptr, block.sequence.n.to(gl.int64) * H + block.h, tile, FLAT)
        A_s.store(anchor.to(gl.bfloat16))
    mbarrier.wait(rows_full, 0)
    dk, dw, db = inner_gradient_vjp(
        k_s, v_s, x_s, du_s, dk_s, u_s, wb_s, r, mean_e, c, dw, db, rows_full, block, tile, Y, LINE
    )  # fmt: skip
    fence_async_shared()
    dy_s, dv_s = du_s, v_s
    put_rows(dv_rows, tokens.dv, dv_s, token, block, tile, COPY)
    nothing = gl.zeros([C, BD], gl.float32, Y)
    u_dM = warpgroup_mma(u_s, dM_s.permute((1, 0)), nothing, use_acc=False, is_async=True)
    u_dS = warpgroup_mma(u_s, dS_s.permute((1, 0)), nothing, use_acc=False, is_async=True)
    dk = warpgroup_mma(dy_s, A_s.permute((1, 0)), dk, is_async=True)
    u_dM, u_dS, _, _, _ = warpgroup_mma_wait(1, deps=[u_dM, u_dS, u_s, dM_s, dS_s])
    k = k_s.load(Y).to(gl.float32)
    dG_L, dn_L = gl.reduce((u_dM * k, u_dS * k), 1, add_two)
    dk, _, _ = warpgroup_mma_wait(0, deps=[dk, dy_s, A_s])
    dk += column(G_L) * (-2 * u_dM) + column(n_L) * (-2 * u_dS)
    dk_s.store(dk.to(gl.bfloat16))
    fence_async_shared()
    put_rows(dk_rows, tokens.dk, dk_s, token, block, tile, COPY)
    # a fence waits for the stores of its thread: so these are the last
    if tile.NORM:
        store_row(daffine.w, dw, block.index, tile, LINE)
        store_row(daffine.b, db, block.index, tile, LINE)
    store_vector(dblock_end.weights, -2 * dn_L, weights, 1, C, Y)
    store_vector(dblock_end.weights, -2 * dG_L, weights + C, 1, C, Y)
    transition = dblock_end.transition + block.index * 3
    gl.store(transition, dbeta_L)
    gl.store(transition + 1, df_L)
    gl.store(transition + 2, dm_L)
    tma.store_wait(0)


@functools.cache
def options(BD: int) -> dict[str, Any]:
    """Constants of the kernel that depend on the width of its tiles."""
    warps = 4 if BD == 64 else 8
    layouts = {
        "TOKENS": product([4, warps // 4], 64), "FLAT": copying(BD, warps),
        "LINE": gl.BlockedLayout([1], [32], [warps], [0]), "COPY": copying(BD, warps),
    }  # fmt: skip
    return layouts | {"num_warps": warps}


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

"""Tiles of one block of 64 tokens, which all warps of a program work on: fetched and stored by the copy engine.

The rows of a block of fewer tokens are copied by the warps, their edges masked: the rows beside them may be those of
another sequence.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from titans.kernels.hopper.common import copy_rows, grid_of, save_rows
from titans.kernels.hopper.state_vjp import rows_of, square_of

C = gl.constexpr(64)


@gluon.jit
def fetch_rows(desc, x_ptr, tile_s, flag, token, block, tile: gl.constexpr, COPY: gl.constexpr):
    """Fetch the rows of a block, zeros after its last; the barrier counts one arrival."""
    if block.length == C:
        mbarrier.expect(flag, C * tile.BD * 2)
        tma.async_copy_global_to_shared(desc, [token, block.h, 0], flag, rows_of(tile_s))
    else:
        copy_rows(tile_s, x_ptr, block.row, block.H, block.length, tile.D, COPY)
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        mbarrier.arrive(flag, count=1)


@gluon.jit
def put_rows(desc, x_ptr, tile_s, token, block, tile: gl.constexpr, COPY: gl.constexpr):
    """Store the rows of a block, which have been fenced."""
    if block.length == C:
        tma.async_copy_shared_to_global(desc, [token, block.h, 0], rows_of(tile_s))
    else:
        save_rows(x_ptr, tile_s, block.row, block.H, block.length, tile.D, COPY)


@gluon.jit
def fetch_square(desc, tile_s, flag, index, tile: gl.constexpr):
    """Fetch a D x D matrix, zeros outside; the barrier counts one arrival."""
    mbarrier.expect(flag, tile.BD * tile.BD * 2)
    tma.async_copy_global_to_shared(desc, [index, 0, 0], flag, square_of(tile_s))


@gluon.jit
def put_square(desc, tile_s, index):
    """Store a D x D matrix, which has been fenced."""
    tma.async_copy_shared_to_global(desc, [index, 0, 0], square_of(tile_s))


@gluon.jit
def load_passed(x_ptr, block, shift: gl.constexpr, LAYOUT: gl.constexpr):
    """A gate of the tokens of a block, or of those `shift` after them, as it was passed, zero outside, (64,)."""
    offs_t = gl.arange(0, C, layout=LAYOUT) + shift
    mask = (offs_t >= 0) & (offs_t < block.length)
    return gl.load(x_ptr + block.row + offs_t * block.H, mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def load_gate(x_ptr, block, shift: gl.constexpr, tile: gl.constexpr, LAYOUT: gl.constexpr):
    """`load_passed`, of theta or eta or their logs, as linear gates."""
    x = load_passed(x_ptr, block, shift, LAYOUT)
    if tile.LOG:
        x = gl.exp(x)
    return x


@gluon.jit
def load_a(alpha_ptr, block, shift: gl.constexpr, tile: gl.constexpr, LAYOUT: gl.constexpr):
    """a = 1 - alpha of the tokens of a block, or of those `shift` after them, 1 outside."""
    a = load_gate(alpha_ptr, block, shift, tile, LAYOUT)
    if tile.LOG == 0:
        a = 1 - a
    return a


@gluon.jit
def load_vector(x_ptr, at, stride, length, LAYOUT: gl.constexpr):
    """x[at], x[at + stride], ... in float32, one for each row of a tile, (64,); zero from `length` on."""
    offs_t = gl.arange(0, C, layout=gl.SliceLayout(1, LAYOUT))
    return gl.load(x_ptr + at + offs_t * stride, mask=offs_t < length, other=0.0)


@gluon.jit
def store_vector(x_ptr, value, at, stride, length, LAYOUT: gl.constexpr):
    """Store what `load_vector` would load."""
    offs_t = gl.arange(0, C, layout=gl.SliceLayout(1, LAYOUT))
    gl.store(x_ptr + at + offs_t * stride, value, mask=offs_t < length)


@gluon.jit
def load_row(x_ptr, index, tile: gl.constexpr, LINE: gl.constexpr):
    """Row number `index` of a matrix of width D in float32, (BD,), zero outside."""
    offs_d = gl.arange(0, tile.BD, layout=LINE)
    return gl.load(x_ptr + index * tile.D + offs_d, mask=offs_d < tile.D, other=0.0).to(gl.float32)


@gluon.jit
def store_row(x_ptr, value, index, tile: gl.constexpr, LINE: gl.constexpr):
    """Store a vector (BD,) where `load_row` would load it."""
    offs_d = gl.arange(0, tile.BD, layout=LINE)
    gl.store(x_ptr + index * tile.D + offs_d, value, mask=offs_d < tile.D)


@gluon.jit
def column(x):
    """A vector as a column of a tile."""
    return gl.expand_dims(x, 1)


@gluon.jit
def lower(x, LAYOUT: gl.constexpr):
    """The (64, 64) tile x_tj, zero where j > t."""
    offs_t, offs_j = grid_of(C, C, LAYOUT)
    return gl.where(offs_j <= offs_t, x, 0.0)

"""Helpers that the Gluon kernels share: layouts, tiles copied with their edges masked, and the norm of (2).

Tiles in shared memory are bfloat16, swizzled as the tensor cores read them. Before a `warpgroup_mma` reads a tile, the
threads that wrote it run `fence_async_shared` and meet at a barrier.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0]))


def product(warps: list[int], columns: int) -> gl.NVMMADistributedLayout:
    """Layout of a product that `warps` share, rows by columns; each warpgroup makes `columns` columns at once."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=warps, instr_shape=[16, columns, 16])


def copying(BD: int, warps: int) -> gl.BlockedLayout:
    """Layout in which `warps` warps copy rows of BD numbers of 2 bytes, 16 bytes a thread at once."""
    return gl.BlockedLayout([1, 8], [256 // BD, BD // 8], [warps, 1], [1, 0])


class Descriptor(TensorDescriptor):  # type: ignore[misc]
    """A tensor as the copy engine moves it, without the checks of it, which would be made at every launch.

    The tensor begins at a multiple of 16 bytes, see `aligned`, and so does each of its rows, see `choose`.
    """

    def __post_init__(self) -> None:
        """Check nothing."""


def aligned(x: Tensor) -> Tensor:
    """`x`, or a copy of it if it does not begin at a multiple of 16 bytes, which asynchronous copies need."""
    return x.clone() if x.data_ptr() % 16 else x


@gluon.jit
def grid_of(ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Row and column numbers of a tile, (ROWS, 1) and (1, COLUMNS)."""
    offs_i = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)), 1)
    offs_j = gl.expand_dims(gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT)), 0)
    return offs_i, offs_j


@gluon.jit
def copy_rows(tile, x_ptr, row, H, length, D: gl.constexpr, LAYOUT: gl.constexpr):
    """Start copying `length` rows, in global memory H rows apart, to `tile`, zero outside; 16 by 64 at a time."""
    PER: gl.constexpr = tile.shape[0] // 16
    PARTS: gl.constexpr = PER * (tile.shape[1] // 64)
    parts = tile._reinterpret(gl.bfloat16, [PARTS, 16, 64], TILE)
    offs_t, offs_d = grid_of(16, 64, LAYOUT)
    # a bound which the compilers do not know keeps the loop: unrolled, it takes registers
    for i in range(PARTS + H // 2**24):
        t = offs_t + i % PER * 16
        d = offs_d + i // PER * 64
        at = x_ptr + row * D + (t * (H * D) + d)
        async_copy.async_copy_global_to_shared(parts.index(i), at, mask=(t < length) & (d < D))


@gluon.jit
def save_rows(x_ptr, tile, row, H, length, D: gl.constexpr, LAYOUT: gl.constexpr):
    """Store what `copy_rows` would copy."""
    ROWS: gl.constexpr = tile.shape[0]
    offs_t, offs_d = grid_of(16, tile.shape[1], LAYOUT)
    for i in gl.static_range(0, ROWS, 16):
        mask = (offs_t < length - i) & (offs_d < D)
        at = x_ptr + (row + i * H) * D
        gl.store(at + offs_t * (H * D) + offs_d, tile.slice(i, 16).load(LAYOUT), mask=mask)


@gluon.jit
def load_square(x_ptr, index, tile: gl.constexpr, LAYOUT: gl.constexpr):
    """(BD, BD) tile of the D x D matrix number `index`, zero outside."""
    offs_i, offs_j = grid_of(tile.BD, tile.BD, LAYOUT)
    at = x_ptr + index * tile.D * tile.D + offs_i * tile.D + offs_j
    if tile.D == tile.BD:
        value = gl.load(at)
    else:
        value = gl.load(at, mask=(offs_i < tile.D) & (offs_j < tile.D), other=0)
    return value


@gluon.jit
def store_square(x_ptr, value, index, tile: gl.constexpr, LAYOUT: gl.constexpr):
    """Store `value` where `load_square` would load it."""
    offs_i, offs_j = grid_of(tile.BD, tile.BD, LAYOUT)
    at = x_ptr + index * tile.D * tile.D + offs_i * tile.D + offs_j
    if tile.D == tile.BD:
        gl.store(at, value)
    else:
        gl.store(at, value, mask=(offs_i < tile.D) & (offs_j < tile.D))


@gluon.jit
def store_width(vector, x_ptr, h, tile: gl.constexpr, LAYOUT: gl.constexpr):
    """Keep the row of a parameter (H, D) in shared memory, in float32, zero outside; `as_row` reads it."""
    offs_d = gl.arange(0, tile.BD, layout=gl.SliceLayout(0, LAYOUT))
    vector.store(gl.load(x_ptr + h * tile.D + offs_d, mask=offs_d < tile.D, other=0).to(gl.float32))


@gluon.jit
def as_row(vector, LAYOUT: gl.constexpr):
    """A vector in shared memory as a row (1, BD)."""
    return gl.expand_dims(vector.load(gl.SliceLayout(0, LAYOUT)), 0)


@gluon.jit
def as_column(vector, LAYOUT: gl.constexpr):
    """A vector in shared memory as a column (BS, 1)."""
    return gl.expand_dims(vector.load(gl.SliceLayout(1, LAYOUT)), 1)


@gluon.jit
def as_scalar(vector, i: gl.constexpr, LAYOUT: gl.constexpr):
    """Element i of a vector in shared memory as a tile (1, 1)."""
    return as_column(vector.slice(i, 1), LAYOUT)


@gluon.jit
def add_two(x, y, x_, y_):
    """Add pairs."""
    return x + x_, y + y_


@gluon.jit
def mean(x, D: gl.constexpr):
    """Mean over the D columns that are in use, (BS,)."""
    return gl.sum(x, 1) / D


@gluon.jit
def two_means(x, y, D: gl.constexpr):
    """`mean` of two tiles at once."""
    x, y = gl.reduce((x, y), 1, add_two)
    return x / D, y / D


@gluon.jit
def less_mean(x, mean_x, D: gl.constexpr, LAYOUT: gl.constexpr):
    """x - mean_x in the D columns that are in use, else 0."""
    centred = x - gl.expand_dims(mean_x, 1)
    if D < x.shape[1]:
        _, offs_d = grid_of(x.shape[0], x.shape[1], LAYOUT)
        centred = gl.where(offs_d < D, centred, 0.0)
    return centred

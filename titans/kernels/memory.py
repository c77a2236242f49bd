"""Loads and stores of tiles. `part` is the block or the step that a tile belongs to."""

import triton
import triton.language as tl


@triton.jit
def load_rows(x_ptr, part, ROWS: tl.constexpr, tile: tl.constexpr, OP: tl.constexpr):
    """(ROWS, BD) tile of the tokens of one head, zero outside."""
    offs_t = tl.arange(0, ROWS)[:, None]
    offs_d = tl.arange(0, tile.BD)[None, :]
    mask = (offs_t < part.length) & ((tile.D == tile.BD) | (offs_d < tile.D))
    return tl.load(x_ptr + part.row * tile.D + (offs_t * (part.H * tile.D) + offs_d), mask=mask, other=0).to(OP)


@triton.jit
def store_rows(x_ptr, value, part, ROWS: tl.constexpr, tile: tl.constexpr):
    """Store what `load_rows` would load."""
    offs_t = tl.arange(0, ROWS)[:, None]
    offs_d = tl.arange(0, tile.BD)[None, :]
    mask = (offs_t < part.length) & ((tile.D == tile.BD) | (offs_d < tile.D))
    at = x_ptr + part.row * tile.D + (offs_t * (part.H * tile.D) + offs_d)
    tl.store(at, value.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_square(x_ptr, index, tile: tl.constexpr, OP: tl.constexpr):
    """(BD, BD) tile of the D x D matrix number `index`, zero outside."""
    offs_i = tl.arange(0, tile.BD)[:, None]
    offs_j = tl.arange(0, tile.BD)[None, :]
    mask = (offs_i < tile.D) & (offs_j < tile.D)
    return tl.load(x_ptr + index * tile.D * tile.D + (offs_i * tile.D + offs_j), mask=mask, other=0).to(OP)


@triton.jit
def store_square(x_ptr, value, index, tile: tl.constexpr):
    """Store what `load_square` would load."""
    offs_i = tl.arange(0, tile.BD)[:, None]
    offs_j = tl.arange(0, tile.BD)[None, :]
    mask = (offs_i < tile.D) & (offs_j < tile.D)
    at = x_ptr + index * tile.D * tile.D + (offs_i * tile.D + offs_j)
    tl.store(at, value.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_width(x_ptr, index, tile: tl.constexpr):
    """(1, BD) row number `index` of a matrix of width D in float32, zero outside."""
    offs_d = tl.arange(0, tile.BD)[None, :]
    return tl.load(x_ptr + index * tile.D + offs_d, mask=offs_d < tile.D, other=0).to(tl.float32)


@triton.jit
def store_width(x_ptr, value, index, tile: tl.constexpr):
    """Store what `load_width` would load."""
    offs_d = tl.arange(0, tile.BD)[None, :]
    tl.store(x_ptr + index * tile.D + offs_d, value.to(x_ptr.dtype.element_ty), mask=offs_d < tile.D)


@triton.jit
def load_column(x_ptr, at, stride, length, ROWS: tl.constexpr):
    """x[at], x[at + stride], ... in float32, (ROWS, 1); zero from `length` on."""
    offs_t = tl.arange(0, ROWS)[:, None]
    return tl.load(x_ptr + at + offs_t * stride, mask=offs_t < length, other=0.0).to(tl.float32)


@triton.jit
def store_column(x_ptr, value, at, stride, length, ROWS: tl.constexpr):
    """Store what `load_column` would load."""
    offs_t = tl.arange(0, ROWS)[:, None]
    tl.store(x_ptr + at + offs_t * stride, value, mask=offs_t < length)


@triton.jit
def load_pairs(x_ptr, at, stride, length, ROWS: tl.constexpr):
    """What `load_column` loads from x[at] and from x[at + 1] on, together."""
    offs_t = tl.arange(0, ROWS)[:, None]
    pairs = x_ptr + at + (offs_t * stride + tl.arange(0, 2)[None, :])
    first, second = tl.split(tl.load(pairs, mask=offs_t < length, other=0.0))
    return first[:, None], second[:, None]


@triton.jit
def load_affine(affine, h, tile: tl.constexpr):
    """w and b of head h, (1, BD)."""
    w = load_width(affine.w, h, tile) if tile.NORM else 1.0
    b = load_width(affine.b, h, tile) if tile.NORM else 0.0
    return w, b


@triton.jit
def element(x, t, ROWS: tl.constexpr):
    """x[t], for a (ROWS,) tile."""
    return tl.sum(tl.gather(x, tl.full((1,), t, tl.int32), 0), 0)

"""The inner gradient on the device, eq. (2), and its reverse."""

import triton
import triton.language as tl

from titans.kernels.memory import load_column, load_rows

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def mean(x, tile: tl.constexpr):
    """Mean over the D columns that are in use, (ROWS, 1)."""
    return (tl.sum(x, 1) / tile.D)[:, None]


@triton.jit
def add_two(x, y, x_, y_):
    """Add pairs."""
    return x + x_, y + y_


@triton.jit
def add_three(x, y, z, x_, y_, z_):
    """Add triples."""
    return x + x_, y + y_, z + z_


@triton.jit
def two_means(x, y, tile: tl.constexpr):
    """`mean` of two tiles at once: warps that share a row meet once. The interpreter is slow at that."""
    if INTERPRETED:
        mean_x, mean_y = mean(x, tile), mean(y, tile)
    else:
        x, y = tl.reduce((x, y), 1, add_two)
        mean_x, mean_y = (x / tile.D)[:, None], (y / tile.D)[:, None]
    return mean_x, mean_y


@triton.jit
def three_means(x, y, z, tile: tl.constexpr):
    """`mean` of three tiles at once."""
    if INTERPRETED:
        mean_x, mean_y, mean_z = mean(x, tile), mean(y, tile), mean(z, tile)
    else:
        x, y, z = tl.reduce((x, y, z), 1, add_three)
        mean_x, mean_y, mean_z = (x / tile.D)[:, None], (y / tile.D)[:, None], (z / tile.D)[:, None]
    return mean_x, mean_y, mean_z


@triton.jit
def less_mean(x, mean_x, tile: tl.constexpr):
    """x - mean_x in the D columns in use, else 0, (ROWS, BD).

    For D = 1 nothing is left, exactly: an fma would leave the rounding error of the product that x may be, and
    r = 1/sqrt(eps) would magnify it.
    """
    if tile.D == 1:
        centred = tl.zeros_like(x)
    elif tile.D == tile.BD:
        centred = x - mean_x
    else:
        centred = tl.where(tl.arange(0, tile.BD)[None, :] < tile.D, x - mean_x, 0.0)
    return centred


@triton.jit
def norm(y, eps, tile: tl.constexpr):
    """x = (y - mean y) r and r = 1 / sqrt(var y + eps)."""
    centred = less_mean(y, mean(y, tile), tile)
    r = tl.rsqrt(mean(centred * centred, tile) + eps)
    return centred * r, r


@triton.jit
def norm_vjp(dx, x, r, tile: tl.constexpr):
    """The cotangent of y from that of x = norm(y)."""
    dcentred = r * (dx - x * mean(dx * x, tile))
    return less_mean(dcentred, mean(dcentred, tile), tile)


@triton.jit
def inner_residual(x, target, w, b):
    """Eq. (2): z = x w + b - target and e = z w."""
    z = x * w + b - target
    return z, z * w


@triton.jit
def inner_gradient(x, r, target, w, b, tile: tl.constexpr):
    """Eq. (2) from x, r = norm(k A): u, mean e and c = mean e x."""
    _, e = inner_residual(x, target, w, b)
    mean_e, c = two_means(e, e * x, tile)
    return r * (less_mean(e, mean_e, tile) - x * c), mean_e, c


@triton.jit
def load_inner_gradient(k, v_ptr, saved, w, b, block, tile: tl.constexpr):
    """u of a block, mean e and c from the x and r of the forward; the means are 0 in the plain memory."""
    target = load_rows(v_ptr, block, tile.BC, tile, tl.float32)
    if tile.NORM:
        target -= k.to(tl.float32)
    x = load_rows(saved.x, block, tile.BC, tile, tl.float32)
    if tile.NORM:
        r = load_column(saved.r, block.row, block.H, block.length, tile.BC)
        u, mean_e, c = inner_gradient(x, r, target, w, b, tile)
    else:
        u, mean_e, c = x - target, 0.0, 0.0
    return u, mean_e, c


@triton.jit
def inner_gradient_vjp(du, x, r, e, mean_e, c, w, tile: tl.constexpr):
    """Eq. (12): the cotangents de and dy, y = k A, of that of u."""
    dp = du * r
    dr, mean_dp, mean_dp_x = three_means(du * (less_mean(e, mean_e, tile) - x * c), dp, dp * x, tile)
    de = less_mean(dp, mean_dp, tile) - mean_dp_x * x
    dx = de * w * w - mean_dp_x * e - dp * c
    mean_dx, mean_dx_x = two_means(dx, dx * x, tile)
    # x has mean 0
    return de, r * (less_mean(dx, mean_dx, tile) - x * mean_dx_x) - x * (r * r * dr)

"""Helpers that the kernels share.

The parallel kernels cut sequences into *blocks*: at most BC tokens, NB blocks to a chunk of more than BC tokens, or PER
whole chunks to a block. Block i of a sequence covers the positions [i // NB * C PER + i % NB * BC, ...), counted from
the start of the chunk the sequence resumed in. The chain goes in *steps* of at most BS tokens, which are blocks, or the
chunks of one. Buffers with one entry per block are indexed by its *slot*.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def sequence_of(slot, sequence, S, PACKED: tl.constexpr):
    """Sequence that owns `slot`; -1 for none."""
    if PACKED:
        n = tl.load(sequence + slot)
    else:
        n = slot // S
    return n


@triton.jit
def sequence_span(n, cu_seqlens, offset, T, C, S, slack, NB: tl.constexpr, PACKED: tl.constexpr, RESUMED: tl.constexpr):
    """First token, length, tokens already consumed of the running chunk, and first slot of sequence n."""
    if PACKED:
        begin = tl.load(cu_seqlens + n).to(tl.int64)
        L = (tl.load(cu_seqlens + n + 1) - begin).to(tl.int32)
        # room for the most blocks that the sequences before n can have
        base = (begin + n * slack) // C * NB
    else:
        begin = n.to(tl.int64) * T
        L = T.to(tl.int32)
        base = n.to(tl.int64) * S
    if RESUMED:
        r = tl.load(offset + n).to(tl.int32)
    else:
        r = L * 0
    return begin, L, r, base


@triton.jit
def block_count(L, r, C, NB: tl.constexpr, BC: tl.constexpr):
    """Number of blocks of a sequence of L tokens that starts r tokens into a chunk."""
    last = r + L - 1
    return tl.where(L > 0, last // C * NB + last % C // BC - r // BC + 1, 0)


@triton.jit
def block_span(i, L, r, C, NB: tl.constexpr, BC: tl.constexpr):
    """First token, counted in the sequence, and number of tokens of block i."""
    chunk = i // NB * C
    inside = i % NB * BC
    first = tl.maximum(chunk + inside, r)
    last = tl.minimum(chunk + tl.minimum(inside + BC, C), r + L)
    return first - r, last - first


@triton.jit
def load_rows(x, row, H, length, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, OP: tl.constexpr):
    """(BC, BD) tile of `length` tokens of one head, zero outside; `row` = token * H + h."""
    offs_t = tl.arange(0, BC)[:, None]
    offs_d = tl.arange(0, BD)[None, :]
    mask = (offs_t < length) & ((D == BD) | (offs_d < D))
    return tl.load(x + row * D + (offs_t * (H * D) + offs_d), mask=mask, other=0).to(OP)


@triton.jit
def store_rows(x, value, row, H, length, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):
    """Store what `load_rows` would load."""
    offs_t = tl.arange(0, BC)[:, None]
    offs_d = tl.arange(0, BD)[None, :]
    mask = (offs_t < length) & ((D == BD) | (offs_d < D))
    tl.store(x + row * D + (offs_t * (H * D) + offs_d), value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_square(x, index, D: tl.constexpr, BD: tl.constexpr, OP: tl.constexpr):
    """(BD, BD) tile of the D x D matrix number `index`, zero outside."""
    offs_i = tl.arange(0, BD)[:, None]
    offs_j = tl.arange(0, BD)[None, :]
    mask = (offs_i < D) & (offs_j < D)
    return tl.load(x + index * D * D + (offs_i * D + offs_j), mask=mask, other=0).to(OP)


@triton.jit
def store_square(x, value, index, D: tl.constexpr, BD: tl.constexpr):
    """Store what `load_square` would load."""
    offs_i = tl.arange(0, BD)[:, None]
    offs_j = tl.arange(0, BD)[None, :]
    mask = (offs_i < D) & (offs_j < D)
    tl.store(x + index * D * D + (offs_i * D + offs_j), value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_width(x, h, D: tl.constexpr, BD: tl.constexpr):
    """(1, BD) row of a parameter (H, D) in float32, zero outside."""
    offs_d = tl.arange(0, BD)[None, :]
    return tl.load(x + h * D + offs_d, mask=offs_d < D, other=0).to(tl.float32)


@triton.jit
def mean(x, D: tl.constexpr):
    """Mean over the D columns that are in use, (BC, 1)."""
    return (tl.sum(x, 1) / D)[:, None]


@triton.jit
def add_two(x, y, x_, y_):
    """Add pairs."""
    return x + x_, y + y_


@triton.jit
def add_three(x, y, z, x_, y_, z_):
    """Add triples."""
    return x + x_, y + y_, z + z_


@triton.jit
def two_means(x, y, D: tl.constexpr):
    """`mean` of two tiles at once: warps that share a row meet once. The interpreter is slow at that."""
    if INTERPRETED:
        mean_x, mean_y = mean(x, D), mean(y, D)
    else:
        x, y = tl.reduce((x, y), 1, add_two)
        mean_x, mean_y = (x / D)[:, None], (y / D)[:, None]
    return mean_x, mean_y


@triton.jit
def three_means(x, y, z, D: tl.constexpr):
    """`mean` of three tiles at once."""
    if INTERPRETED:
        mean_x, mean_y, mean_z = mean(x, D), mean(y, D), mean(z, D)
    else:
        x, y, z = tl.reduce((x, y, z), 1, add_three)
        mean_x, mean_y, mean_z = (x / D)[:, None], (y / D)[:, None], (z / D)[:, None]
    return mean_x, mean_y, mean_z


@triton.jit
def less_mean(x, mean_x, D: tl.constexpr, BD: tl.constexpr):
    """x - mean_x in the D columns in use, else 0, (BC, BD).

    For D = 1 nothing is left, exactly: an fma would leave the rounding error of the product that x may be, and
    r = 1/sqrt(eps) would magnify it.
    """
    if D == 1:
        centred = tl.zeros_like(x)
    elif D == BD:
        centred = x - mean_x
    else:
        centred = tl.where(tl.arange(0, BD)[None, :] < D, x - mean_x, 0.0)
    return centred


@triton.jit
def norm(y, eps, D: tl.constexpr, BD: tl.constexpr):
    """x = (y - mean y) r and r = 1 / sqrt(var y + eps)."""
    centred = less_mean(y, mean(y, D), D, BD)
    r = tl.rsqrt(mean(centred * centred, D) + eps)
    return centred * r, r


@triton.jit
def inner_residual(x, target, w, b):
    """Eq. (2): z = x w + b - target and e = z w."""
    z = x * w + b - target
    return z, z * w


@triton.jit
def inner_gradient(x, r, target, w, b, D: tl.constexpr, BD: tl.constexpr):
    """Eq. (2) from x, r = norm(k A): u, mean e and c = mean e x."""
    _, e = inner_residual(x, target, w, b)
    mean_e, c = two_means(e, e * x, D)
    return r * (less_mean(e, mean_e, D, BD) - x * c), mean_e, c


@triton.jit
def inner_gradient_vjp(du, x, r, e, mean_e, c, w, D: tl.constexpr, BD: tl.constexpr):
    """Eq. (12): the cotangents de and dy, y = k A, of that of u."""
    dg = du * r
    dr, mean_dg, mean_dg_x = three_means(du * (less_mean(e, mean_e, D, BD) - x * c), dg, dg * x, D)
    de = less_mean(dg, mean_dg, D, BD) - mean_dg_x * x
    dx = de * w * w - mean_dg_x * e - dg * c
    mean_dx, mean_dx_x = two_means(dx, dx * x, D)
    # x has mean 0
    return de, r * (less_mean(dx, mean_dx, D, BD) - x * mean_dx_x) - x * (r * r * dr)


@triton.jit
def linear_gates(theta, alpha, eta, LOG: tl.constexpr):
    """theta, a and eta in float32, from what the caller passed."""
    theta = theta.to(tl.float32)
    alpha = alpha.to(tl.float32)
    eta = eta.to(tl.float32)
    if LOG:
        theta = tl.exp(theta)
        a = tl.exp(alpha)
        eta = tl.exp(eta)
    else:
        a = 1 - alpha
    return theta, a, eta


@triton.jit
def load_gates(theta, alpha, eta, row, H, length, BC: tl.constexpr, LOG: tl.constexpr):
    """The gates of a block, (BC,) each."""
    at = row + tl.arange(0, BC) * H
    mask_t = tl.arange(0, BC) < length
    theta_ = tl.load(theta + at, mask=mask_t, other=0.0)
    alpha_ = tl.load(alpha + at, mask=mask_t, other=0.0)
    eta_ = tl.load(eta + at, mask=mask_t, other=0.0)
    return linear_gates(theta_, alpha_, eta_, LOG)


@triton.jit
def element(x, t, BC: tl.constexpr):
    """x[t], for a (BC,) tile."""
    return tl.sum(tl.gather(x, tl.full((1,), t, tl.int32), 0), 0)


@triton.jit
def load_column(x, at, stride, length, BC: tl.constexpr):
    """x[at], x[at + stride], ... in float32, (BC, 1); zero from `length` on."""
    offs_t = tl.arange(0, BC)[:, None]
    return tl.load(x + at + offs_t * stride, mask=offs_t < length, other=0.0).to(tl.float32)


@triton.jit
def store_column(x, value, at, stride, length, BC: tl.constexpr):
    """Store what `load_column` would load."""
    offs_t = tl.arange(0, BC)[:, None]
    tl.store(x + at + offs_t * stride, value, mask=offs_t < length)


@triton.jit
def load_pairs(x, at, stride, length, BC: tl.constexpr):
    """What `load_column` loads from x[at] and from x[at + 1] on, together."""
    offs_t = tl.arange(0, BC)[:, None]
    first, second = tl.split(
        tl.load(x + at + (offs_t * stride + tl.arange(0, 2)[None, :]), mask=offs_t < length, other=0.0)
    )
    return first[:, None], second[:, None]


@triton.jit
def chunk_start(t, r, C, i):
    """First row, in block i, of the chunk that the block's row t is in."""
    # the first block of a resumed sequence begins r tokens into a chunk
    skipped = tl.where(i == 0, r, 0)
    return tl.maximum((skipped + t) // C * C - skipped, 0)

"""norm and eq. (2), forward and backward, segment by segment: (B5) and (B6) on a tape."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from oracle.bounds.posterior.polynomial import Polynomial, leaf
from oracle.bounds.posterior.tape import Tape

# 1 / sqrt: half of the roundings of eps and of its sum, a square root and a division, or an rsqrt (B4).
RSQRT = 6


@dataclass(frozen=True)
class NormSegments:
    """norm(y) = x: the centred y, r = 1 / sqrt(var y + eps), and x."""

    centred: Polynomial
    r: Polynomial
    x: Polynomial


@dataclass(frozen=True)
class InnerSegments:
    """The stations of eq. (2): norm of y, z = x w + b - (v - k), e = z w, c = mean(e x), p = u / r, and u."""

    norm: NormSegments
    z: Polynomial
    e: Polynomial
    c: Polynomial
    p: Polynomial
    u: Polynomial


def centre(x: Polynomial, tape: Tape) -> Polynomial:
    """Segment that ends in a centring and two more sums; where D = 1 it is 0 in every algorithm: x - x / 1 is."""
    D = x.value.shape[-1]
    return tape.local(x, D + 4) if D > 1 else tape.enter(x.value, torch.zeros_like(x.size))


def norm(y: Polynomial, eps: float, tape: Tape) -> NormSegments:
    """norm(y), bound (B5)."""
    D = y.value.shape[-1]
    centred = centre(y.centred(), tape)
    r = rsqrt(tape.local((centred * centred).mean(), D + 2), eps, tape)
    return NormSegments(centred, r, tape.local(centred * r, 1))


def rsqrt(variance: Polynomial, eps: float, tape: Tape) -> Polynomial:
    """1 / sqrt(variance + eps), bound (B14): how far the curve may be from its tangent, and six roundings."""
    radius, here = variance.first, variance.size + eps
    down = torch.minimum(radius, variance.size)
    # eps last: the rest of the variance may be 0
    near, far = (variance.size - down + eps).sqrt(), here.sqrt()
    below = down**2 * (1 + far / (far + near)) / (2 * here * far * near * (near + far))
    above = torch.minimum(0.375 * radius**2 / here, radius / 2) / (here * far)
    r = (variance.value + eps).rsqrt()
    largest = replace(leaf(r), size=1 / near, cap=(1 / near).clamp(min=1))
    size = tape.roundings(largest, RSQRT) + torch.maximum(below, above)
    return tape.enter(r, size + tape.reverse_unit * radius / (2 * here * far))


def norm_vjp(norm: NormSegments, dx: Polynomial, dr: Polynomial | None, tape: Tape) -> Polynomial:
    """Cotangent of y before its last rounding, given those of x = norm(y) and of r beyond x, bound (B6)."""
    D, r = dx.value.shape[-1], norm.r
    total = (dx * norm.centred).sum()
    total = tape.with_terms(total if dr is None else total + dr, D + 2)
    slope = tape.with_terms(total * (r * r * r), 6)
    through_x = tape.with_terms(dx * r, 5)
    through_r = tape.with_terms((norm.centred * slope).times(1 / D), 5)
    return through_x.centred() - tape.centred_or_not(through_r)


def inner_gradient(
    y: Polynomial, v_less_k: Polynomial, w: Polynomial, b: Polynomial, eps: float, tape: Tape
) -> InnerSegments:
    """Eq. (2) at y = k A for the normalised memory, bound (B5)."""
    D = y.value.shape[-1]
    normed = norm(y, eps, tape)
    z = tape.local(normed.x * w + b - v_less_k, 4)
    e = tape.local(z * w, 1)
    c = tape.local((e * normed.x).mean(), D + 2)
    p = centre(e.centred() - normed.x * c, tape)
    return InnerSegments(normed, z, e, c, p, tape.local(normed.r * p, 1))


def inner_gradient_vjp(
    inner: InnerSegments, w: Polynomial, du: Polynomial, tape: Tape
) -> tuple[Polynomial, Polynomial, Polynomial]:
    """Cotangents of y and of z, and that of w unsummed, by the reverse of `inner_gradient`, bound (B6)."""
    D, x = du.value.shape[-1], inner.norm.x
    dp = tape.local(du * inner.norm.r, 1)
    dc = -tape.local((dp * x).mean(), D + 2)
    de = centre(dp.centred() + dc * x, tape)
    dz = tape.local(de * w, 1)
    dx = tape.local(dc * inner.e - dp * inner.c + dz * w, 4)
    dy = centre(norm_vjp(inner.norm, dx, (du * inner.p).sum(), tape), tape)
    return dy, dz, de * inner.z + dz * x

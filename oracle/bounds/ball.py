"""Numbers with an error bound: midpoint, radius, and the majorants on which roundings act, bound (B1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ball:
    """A polynomial in quantities known up to an error, evaluated in any order.

    Attributes
    ----------
    mid : Array
        Its value in float64.
    rad : Array
        Distance from the exact value that the errors of the quantities can cause under exact evaluation.
    mag : Array
        Majorant: the same terms with absolute values. Relative errors act on it.
    cap : Array
        Majorant at max(1, absolute values). Absolute errors act on it, and it bounds every partial result.
    drift : Array
        Growth of `mag` if every quantity grows by the relative error that it may have anew in each use, (B8).
    """

    mid: Array
    rad: Array
    mag: Array
    cap: Array
    drift: Array

    @property
    def parts(self) -> tuple[Array, ...]:
        """Arrays in the order of the constructor."""
        return self.mid, self.rad, self.mag, self.cap, self.drift

    def map(self, function: Callable[[Array], Array]) -> Ball:
        """Apply a linear function with coefficients >= 0: a selection, a sum, a new shape."""
        return Ball(*(function(part) for part in self.parts))

    def with_terms_of(self, polynomial: Ball) -> Ball:
        """Let later relative errors act on the terms of the polynomial that has this value: bound (B6)."""
        return replace(self, mag=np.maximum(self.mag, polynomial.mag), drift=np.maximum(self.drift, polynomial.drift))

    def within(self, polynomial: Ball) -> Ball:
        """Let this value go on as part of the polynomial: no majorant is less than the polynomial's, bound (B11)."""
        return replace(self.with_terms_of(polynomial), cap=np.maximum(self.cap, polynomial.cap))

    def __getitem__(self, index: Any) -> Ball:
        return Ball(*(part[index] for part in self.parts))

    def __neg__(self) -> Ball:
        return replace(self, mid=-self.mid)

    def __add__(self, other: Ball) -> Ball:
        return Ball(*(x + y for x, y in zip(self.parts, other.parts, strict=True)))

    def __sub__(self, other: Ball) -> Ball:
        return self + -other

    def __mul__(self, other: Ball) -> Ball:
        return _product(np.multiply, self, other)

    def __matmul__(self, other: Ball) -> Ball:
        return _product(np.matmul, self, other)

    def times(self, factor: float) -> Ball:
        """Multiply by a number that is exact."""
        size = abs(factor)
        return Ball(factor * self.mid, size * self.rad, size * self.mag, max(1.0, size) * self.cap, size * self.drift)

    @property
    def mT(self) -> Ball:
        """Transpose of the last two axes."""
        return self.map(lambda x: x.swapaxes(-1, -2))

    def sum(self) -> Ball:
        """Sum over the last axis, kept."""
        return self.map(lambda x: x.sum(-1, keepdims=True))

    def mean(self) -> Ball:
        """Mean over the last axis, kept."""
        return self.sum().times(1 / self.mid.shape[-1])

    def centred(self) -> Ball:
        """x - mean x over the last axis: a projection with the coefficients 1 - 1/D and -1/D, which the radius uses."""
        D = self.mid.shape[-1]
        mean = self.mean()
        rad = (1 - 2 / D) * self.rad + mean.rad if D > 1 else np.zeros_like(self.mid)
        return Ball(self.mid - mean.mid, rad, self.mag + mean.mag, self.cap + mean.cap, self.drift + mean.drift)

    def centred_or_not(self) -> Ball:
        """Rows whose exact mean is 0, so that an implementation may centre them or not: bound (B6)."""
        centred = self.centred()
        return replace(centred, rad=np.maximum(centred.rad, self.rad))


def _product(multiply: Callable[[Array, Array], Array], x: Ball, y: Ball) -> Ball:
    """Any bilinear product. The midpoint itself may be a radius away from the exact value, hence `size`."""
    size_x, size_y = np.abs(x.mid) + x.rad, np.abs(y.mid) + y.rad
    rad = multiply(size_x, y.rad) + multiply(x.rad, size_y + y.rad)
    drift = multiply(x.drift, y.mag + y.drift) + multiply(x.mag, y.drift)
    return Ball(multiply(x.mid, y.mid), rad, multiply(x.mag, y.mag), multiply(x.cap, y.cap), drift)


def ball(mid: Array, rad: Array | None = None, drift: Array | float = 0.0) -> Ball:
    """A quantity known to be within `rad` of `mid`: exactly, and as it is computed. None: it is `mid`.

    `drift` is the logarithm of the relative error that it may have anew wherever it is used.
    """
    size = np.abs(mid)
    rad = np.zeros_like(mid) if rad is None else rad
    # the exact value is within one radius of the midpoint, the computed one within another
    mag = size + 2 * rad
    return Ball(mid, rad, mag, np.maximum(mag, 1), mag * np.expm1(drift))


def outer(x: Ball, y: Ball) -> Ball:
    """x^T y of rows x, y: (..., D) and (..., D) to (..., D, D)."""
    return x[..., :, None] * y[..., None, :]


def stack(balls: list[Ball], axis: int) -> Ball:
    """Stack along a new axis."""
    return Ball(*(np.stack(parts, axis) for parts in zip(*(x.parts for x in balls), strict=True)))

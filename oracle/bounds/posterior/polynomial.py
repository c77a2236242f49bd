"""Polynomials with what their inexact leaves and their roundings can do, as torch tensors: bounds (B12) and (B13)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Polynomial:
    """A polynomial in leaves that are known up to a radius, float64, all parts of one shape.

    Attributes
    ----------
    value : Tensor
        Its value at the midpoints of its leaves; the only part with a graph.
    size : Tensor
        Its majorant there: the same polynomial of absolute values.
    first, rest : Tensor
        By how much the majorant grows when every leaf grows by its radius: the part linear in the radii, and the rest.
    cap : Tensor
        The majorant of max(1, grown leaves): what underflows act on, and a bound on every partial result.
    drift : Tensor
        What the grown majorant gains by relative errors that a gate has anew wherever it is used, (B8).
    """

    value: Tensor
    size: Tensor
    first: Tensor
    rest: Tensor
    cap: Tensor
    drift: Tensor

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All its tensors, in the order of the constructor."""
        return self.value, self.size, self.first, self.rest, self.cap, self.drift

    @property
    def grown(self) -> Tensor:
        """The majorant of the leaves grown by their radii: no less than that of what an implementation computed."""
        return self.size + self.first + self.rest

    def map(self, function: Callable[[Tensor], Tensor]) -> Polynomial:
        """Apply a linear function with coefficients >= 0: a selection, a sum, a new shape."""
        return Polynomial(*(function(part) for part in self.parts))

    def __getitem__(self, index: Any) -> Polynomial:
        return self.map(lambda part: part[index])

    def __neg__(self) -> Polynomial:
        return replace(self, value=-self.value)

    def __add__(self, other: Polynomial) -> Polynomial:
        return Polynomial(*(x + y for x, y in zip(self.parts, other.parts, strict=True)))

    def __sub__(self, other: Polynomial) -> Polynomial:
        return self + -other

    def __mul__(self, other: Polynomial) -> Polynomial:
        return _product(torch.mul, self, other)

    def __matmul__(self, other: Polynomial) -> Polynomial:
        return _product(torch.matmul, self, other)

    def times(self, factor: float) -> Polynomial:
        """Multiply by a number that is exact."""
        size = abs(factor)
        x = self.map(lambda part: size * part)
        return replace(x, value=factor * self.value, cap=max(1.0, size) * self.cap)

    @property
    def mT(self) -> Polynomial:
        """Transpose of the last two axes."""
        return self.map(lambda part: part.mT)

    def sum(self) -> Polynomial:
        """Sum over the last axis, kept."""
        return self.map(lambda part: part.sum(-1, keepdim=True))

    def mean(self) -> Polynomial:
        """Mean over the last axis, kept."""
        return self.sum().times(1 / self.value.shape[-1])

    def centred(self) -> Polynomial:
        """x - mean x over the last axis."""
        return self - self.mean()


def _product(multiply: Callable[[Tensor, Tensor], Tensor], x: Polynomial, y: Polynomial) -> Polynomial:
    """Any bilinear product."""
    rest = multiply(x.size, y.rest) + multiply(x.first, y.first + y.rest) + multiply(x.rest, y.grown)
    return Polynomial(
        multiply(x.value, y.value),
        multiply(x.size, y.size),
        multiply(x.size, y.first) + multiply(x.first, y.size),
        rest,
        multiply(x.cap, y.cap),
        multiply(x.drift, y.grown + y.drift) + multiply(x.grown, y.drift),
    )


def leaf(value: Tensor, radius: Tensor | None = None, drift: Tensor | None = None) -> Polynomial:
    """A quantity known to be within `radius` of `value`; None: it is `value`."""
    size = value.detach().abs()
    zero = torch.zeros_like(size)
    radius = zero if radius is None else radius
    return Polynomial(value, size, radius, zero, (size + radius).clamp(min=1), zero if drift is None else drift)


def stack(polynomials: list[Polynomial], axis: int) -> Polynomial:
    """Stack along a new axis."""
    return Polynomial(*(torch.stack(parts, axis) for parts in zip(*(x.parts for x in polynomials), strict=True)))


def concatenate(polynomials: list[Polynomial], axis: int) -> Polynomial:
    """Concatenate along an axis."""
    return Polynomial(*(torch.cat(parts, axis) for parts in zip(*(x.parts for x in polynomials), strict=True)))

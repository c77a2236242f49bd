"""The errors of a computation as variables, and the radius of a result by their exact adjoints: (B12) to (B15)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oracle.bounds.error_model import FLOAT64, ErrorModel
from oracle.bounds.posterior.polynomial import Polynomial, leaf

# The float64 evaluation here pays for twice the roundings that the written counts grant to any algorithm.
OWN = 2.0
NONE = (0, 0)


@dataclass(frozen=True)
class Error:
    """The error of one segment.

    Attributes
    ----------
    at : Tensor
        The segment's value, where the error enters.
    size : Tensor
        Bound of the error that arises here.
    radius : Tensor
        Of a cut: bound of all errors that arrive there; else `size`.
    source : Tensor or None
        Of a cut: the tensor whose value `at` repeats, from which its errors come.
    """

    at: Tensor
    size: Tensor
    radius: Tensor
    source: Tensor | None = None


class Tape:
    """Segments in the order in which they are computed; shapes (N, L, D) or (N, L, 1) for those that are local."""

    def __init__(self, arithmetic: ErrorModel, reverse_roundings: float) -> None:
        self.arithmetic, self.errors = arithmetic, list[Error]()
        self.reverse_unit = reverse_roundings * FLOAT64.unit

    def size(self, x: Polynomial, count: float | Tensor, operands: tuple[int, int] = NONE) -> Tensor:
        """Injected error of a segment: its roundings, here and there, and all that is not linear, (B12) and (B13)."""
        return self.roundings(x, count, operands) + x.drift + x.rest + self.reverse_unit * x.first

    def roundings(self, x: Polynomial, count: float | Tensor, operands: tuple[int, int] = NONE) -> Tensor:
        """Roundings of the implementation and of the float64 values, (B12)."""
        return charge(x, count, operands, self.arithmetic) + charge(x, OWN * count, NONE, FLOAT64)

    def local(self, x: Polynomial, count: float | Tensor, operands: tuple[int, int] = NONE) -> Polynomial:
        """A segment whose rows depend on no other token's rows, except through cuts."""
        return self.enter(x.value, self.size(x, count, operands))

    def with_terms(self, x: Polynomial, count: float) -> Polynomial:
        """A local segment on whose terms later relative errors act, too, since these may cancel later: (B6)."""
        result = self.local(x, count)
        return replace(result, size=torch.maximum(result.size, x.grown), drift=torch.maximum(result.drift, x.drift))

    def centred_or_not(self, x: Polynomial) -> Polynomial:
        """x - mean x, where the mean is 0 in exact arithmetic, so that an implementation may leave it out: (B6)."""
        mean = x.mean()
        left_out = mean.value.detach().abs() + charge(mean, OWN * (x.value.shape[-1] + 2), NONE, FLOAT64)
        left_out = left_out + self.pulled(mean.value) + mean.rest + self.reverse_unit * mean.first
        centred = x.centred()
        return replace(centred, rest=centred.rest + left_out)

    def enter(self, value: Tensor, size: Tensor) -> Polynomial:
        """Add a local segment of a given injected error."""
        value = value if value.requires_grad else value.detach().requires_grad_()
        radius = size + self.pulled(value)
        self.errors.append(Error(value, size, size))
        return leaf(value, radius)

    def mixed(self, x: Polynomial, count: float | Tensor, operands: tuple[int, int] = NONE) -> Polynomial:
        """A segment that mixes tokens: known by its radius alone in later segments, (B15)."""
        size = self.size(x, count, operands)
        return self._cut(x.value, size, size + x.first)

    def cut(self, x: Polynomial) -> Polynomial:
        """The same quantity, known by its radius alone in later segments, (B15)."""
        return self._cut(x.value, torch.zeros_like(x.first), x.first)

    def _cut(self, source: Tensor, size: Tensor, radius: Tensor) -> Polynomial:
        at = source.detach().requires_grad_()
        self.errors.append(Error(at, size, radius, source))
        return leaf(at, radius)

    def pulled(self, value: Tensor) -> Tensor:
        """Bound on what all errors so far do to a local value, to first order; cuts by their radius."""
        total = torch.zeros_like(value.detach())
        if not self.errors:
            return total
        D = value.shape[-1]
        seeds = torch.eye(D, dtype=value.dtype, device=value.device)[:, None, None, :].expand(D, *value.shape)
        for adjoint, error in zip(self._vjp(value, seeds), self.errors, strict=True):
            if adjoint is not None:
                total += (adjoint.abs() * error.radius).sum(-1).movedim(0, -1)  # (D, N, L) to (N, L, D)
        return total

    def chained(self, value: Tensor, functionals: Tensor) -> Tensor:
        """Bound on what all errors do to functionals of a value, through all cuts.

        Parameters
        ----------
        value : Tensor, shape (N, ...)
        functionals : Tensor, shape (F, N, ...)
            Each is one functional for every one of the N problems.

        Returns
        -------
        Tensor, shape (F, N)
        """
        total = torch.zeros(functionals.shape[:2], dtype=functionals.dtype, device=functionals.device)
        for adjoint, error in zip(self.adjoints(value, functionals), self.errors, strict=True):
            if adjoint is not None:
                total += (adjoint.abs() * error.size).flatten(2).sum(-1)
        return total

    def adjoints(self, value: Tensor, functionals: Tensor) -> list[Tensor | None]:
        """The adjoint at every error, (F, N, ...); the one that reaches a cut goes on to what was cut."""
        found = self._vjp(value, functionals)
        for i in reversed(range(len(self.errors))):
            source, adjoint = self.errors[i].source, found[i]
            if source is not None and adjoint is not None:
                found = [_sum(x, y) for x, y in zip(found, self._vjp(source, adjoint), strict=True)]
        return found

    def _vjp(self, value: Tensor, seeds: Tensor) -> list[Tensor | None]:
        if not value.requires_grad or not self.errors:
            return [None] * len(self.errors)
        return list(
            torch.autograd.grad(
                value, [error.at for error in self.errors], seeds,
                retain_graph=True, allow_unused=True, is_grads_batched=True,
            )
        )  # fmt: skip


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x + y


def charge(x: Polynomial, count: float | Tensor, operands: tuple[int, int], arithmetic: ErrorModel) -> Tensor:
    """(B1): what the roundings of any algorithm can do to a polynomial, but for the drift of its gates."""
    arguments, computed = operands
    narrowed = arguments * arithmetic.argument_operand + computed * arithmetic.operand
    n = torch.as_tensor(count, dtype=x.size.dtype, device=x.size.device)
    size = torch.expm1(1.01 * (n * arithmetic.unit + narrowed)) * (x.grown + x.drift)
    size = size + (n * arithmetic.tiny + (arguments + computed) * arithmetic.operand_tiny) * x.cap
    return torch.where(x.cap < arithmetic.huge / 4, size, torch.inf)

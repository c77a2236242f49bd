"""Numbers with an error bound: midpoint, radius, and what the roundings of a polynomial can do (oracle/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Arithmetic:
    """The floating-point arithmetic that a backend computes in.

    Parameters
    ----------
    unit : float
        Unit roundoff: the relative error of one operation.
    tiny : float
        Smallest normal number: the absolute error of an operation that underflows, also where that flushes to zero.
    huge : float
        Largest finite number; where an intermediate result may come within a factor 4 of it the radius is infinite.
    operand, operand_tiny : float
        The same for the operands of dots, where these are rounded to a narrower format first; 0 where they are not.
    given_operand : float
        `operand` for those that are q or k: 0 where they come in that narrower format.
    log_space : bool
        Whether the chunk coefficients are computed as exp of sums of logs.
    block : int
        Tokens in a block of whole chunks that is evaluated as one polynomial of the state before it; 0: every chunk is
        a block of its own.
    """

    unit: float
    tiny: float
    huge: float
    operand: float = 0.0
    operand_tiny: float = 0.0
    given_operand: float = 0.0
    log_space: bool = False
    block: int = 0

    def chunks(self, chunk_size: int) -> int:
        """Number of chunks in a block."""
        return max(1, self.block // chunk_size)

    def rounded(self, x: Ball, count: float | Array, operands: tuple[int, int] = (0, 0)) -> Ball:
        """Charge a polynomial for its roundings, bound (B1), and start a new one from its value.

        Parameters
        ----------
        x : Ball
            The polynomial, with radius and majorants.
        count : float or Array, broadcastable to x
            The most roundings that any of its monomials meets.
        operands : tuple of int
            The most dot operands among its factors: that are q or k, and that are computed.
        """
        given, computed = operands
        # n factors 1 + d or 1 / (1 + d), |d| <= u <= 2^-8, differ from 1 by at most exp(1.01 n u) - 1
        narrowed = given * self.given_operand + computed * self.operand
        relative = np.expm1(1.01 * (count * self.unit + narrowed))
        rad = x.rad + relative * (x.mag + x.drift) + x.drift
        rad = rad + (count * self.tiny + (given + computed) * self.operand_tiny) * x.cap
        # false for NaN, which is 0 times infinity here: nothing is known then
        known = (x.cap < self.huge / 4) & (rad < np.inf)
        return ball(x.mid, np.where(known, rad, np.inf))


@dataclass(frozen=True, slots=True)
class Ball:
    """A polynomial in quantities known up to an error, evaluated in any order.

    Attributes
    ----------
    mid : Array
        Its value in float64.
    rad : Array
        How far exact evaluation from the inexact quantities can be from the exact value.
    mag : Array
        The same polynomial of the absolute values: what relative errors act on.
    cap : Array
        The same polynomial of max(1, absolute value): what absolute errors act on, and a bound on every partial result.
    drift : Array
        What `mag` gains when every leaf grows by the relative error that it may have anew wherever it is used, (B8).
    """

    mid: Array
    rad: Array
    mag: Array
    cap: Array
    drift: Array

    @property
    def parts(self) -> tuple[Array, ...]:
        """All its arrays, in the order of the constructor."""
        return self.mid, self.rad, self.mag, self.cap, self.drift

    def map(self, function: Callable[[Array], Array]) -> Ball:
        """Apply a linear function with coefficients >= 0: a selection, a sum, a new shape."""
        return Ball(*(function(part) for part in self.parts))

    def within(self, polynomial: Ball) -> Ball:
        """Let the majorants be no less than those of a polynomial that goes on: bound (B11)."""
        larger = {part: np.maximum(getattr(self, part), getattr(polynomial, part)) for part in ("mag", "cap", "drift")}
        return replace(self, **larger)

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
        """x - mean x over the last axis: a projection, whose coefficients 1 - 1/D and -1/D the radius uses."""
        D = self.mid.shape[-1]
        mean = self.mean()
        rad = (1 - 2 / D) * self.rad + mean.rad if D > 1 else np.zeros_like(self.mid)
        return Ball(self.mid - mean.mid, rad, self.mag + mean.mag, self.cap + mean.cap, self.drift + mean.drift)


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


def arithmetic_for(dtype: torch.dtype, *, log_space: bool = False, operand: torch.dtype | None = None) -> Arithmetic:
    """The arithmetic of a backend for inputs of `dtype`: float64 in itself, all others in float32 (SPEC section 3).

    Parameters
    ----------
    dtype : torch.dtype
        Of q, k and v.
    log_space : bool
        Whether the coefficients are computed in log space (backend "log").
    operand : torch.dtype or None
        The format that operands of dots are rounded to, if they are.
    """
    computed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    arithmetic = Arithmetic(computed.eps / 2, computed.tiny, computed.max, log_space=log_space)
    if operand is None:
        return arithmetic
    narrow = torch.finfo(operand)
    # A narrow format keeps its subnormals when a number is rounded to it.
    return replace(
        arithmetic,
        operand=narrow.eps / 2,
        operand_tiny=narrow.tiny * narrow.eps,
        given_operand=0.0 if dtype == operand else narrow.eps / 2,
    )


def kernel_arithmetic(dtype: torch.dtype, width: int, *, tensor_cores: bool) -> Arithmetic:
    """The arithmetic of the Triton kernels for inputs of `dtype`, float32, float16 or bfloat16, and of head width D.

    They work on blocks of 64 tokens in bfloat16, else of 32, or 16 where D > 64.

    Tensor cores truncate where they accumulate: twice the unit of float32. Operands are rounded as
    the error model in ``oracle/README.md`` says: float32 is split into two tf32, float16 is raised to tf32, bfloat16 is
    rounded once when stored between kernels and once more as an operand. Triton's interpreter has no tensor cores.
    """
    block = 64 if dtype == torch.bfloat16 else (32 if width <= 64 else 16)
    if not tensor_cores:
        return replace(arithmetic_for(dtype), block=block)
    float32 = torch.finfo(torch.float32)
    operand = {torch.float32: 1.5 * 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2 * 2.0**-8}[dtype]
    given = operand if dtype == torch.float32 else 0.0
    return Arithmetic(float32.eps, float32.tiny, float32.max, operand, float32.tiny, given, block=block)


FLOAT32 = arithmetic_for(torch.float32)
FLOAT64 = arithmetic_for(torch.float64)

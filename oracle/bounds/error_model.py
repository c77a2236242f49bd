"""Floating-point arithmetic of an implementation, and the charge for the roundings of a polynomial."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from oracle.bounds.ball import Array, Ball, ball
from oracle.precision import doubles


@dataclass(frozen=True)
class ErrorModel:
    """The floating-point arithmetic of an implementation, as the error model of oracle/README.md describes it.

    Parameters
    ----------
    unit : float
        Unit roundoff: the relative error of one operation.
    tiny : float
        Smallest normal number: the absolute error of an operation that underflows, to a subnormal or to zero.
    huge : float
        Largest finite number. The radius is infinite where an intermediate result may be more than a quarter of it.
    operand, operand_tiny : float
        Relative and absolute error of rounding an operand of a dot to a narrower format; 0 where none is rounded.
    argument_operand : float
        `operand` of q and k: 0 where q and k come in the narrower format.
    log_space : bool
        Whether the chunk coefficients are computed as exp of sums of logs.
    block : int
        Tokens in a block, the whole chunks that are evaluated as one polynomial of the state before them, bound (B11).
        0: every chunk is a block.
    """

    unit: float
    tiny: float
    huge: float
    operand: float = 0.0
    operand_tiny: float = 0.0
    argument_operand: float = 0.0
    log_space: bool = False
    block: int = 0

    def chunks(self, chunk_size: int) -> int:
        """Number of chunks in a block."""
        return max(1, self.block // chunk_size)

    def argument(self, x: Tensor) -> Ball:
        """An argument of the call: exact, unless its format has a wider range than the arithmetic."""
        mid = doubles(x)
        return ball(mid, self.unit * np.abs(mid) if torch.finfo(x.dtype).tiny < self.tiny else None)

    def rounded(self, x: Ball, count: float | Array, operands: tuple[int, int] = (0, 0)) -> Ball:
        """Charge a polynomial for its roundings, bound (B1), and start a new one from its value.

        Parameters
        ----------
        x : Ball
            The polynomial, with radius and majorants.
        count : float or Array, broadcastable to x
            The most roundings that any of its terms meets.
        operands : tuple of int
            The most operands of dots among the factors of a term: q or k, and computed ones.
        """
        arguments, computed = operands
        narrowed = arguments * self.argument_operand + computed * self.operand
        relative = np.expm1(1.01 * (count * self.unit + narrowed))
        rad = x.rad + relative * (x.mag + x.drift) + x.drift
        rad = rad + (count * self.tiny + (arguments + computed) * self.operand_tiny) * x.cap
        # a NaN is 0 times infinity here, and compares as false: nothing is known
        known = (x.cap < self.huge / 4) & (rad < np.inf)
        return ball(x.mid, np.where(known, rad, np.inf))


def arithmetic_for(dtype: torch.dtype, *, log_space: bool = False, operand: torch.dtype | None = None) -> ErrorModel:
    """The arithmetic of a backend for inputs of `dtype`: float64 in itself, all others in float32 (SPEC section 3).

    Parameters
    ----------
    dtype : torch.dtype
        Of q, k and v.
    log_space : bool
        Whether the coefficients are computed in log space (backend "log").
    operand : torch.dtype or None
        The format to which operands of dots are rounded; None: they are not.
    """
    computed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    arithmetic = ErrorModel(computed.eps / 2, computed.tiny, computed.max, log_space=log_space)
    if operand is None:
        return arithmetic
    narrow = torch.finfo(operand)
    # A narrow format keeps its subnormals when a number is rounded to it.
    return replace(
        arithmetic,
        operand=narrow.eps / 2,
        operand_tiny=narrow.tiny * narrow.eps,
        argument_operand=0.0 if dtype == operand else narrow.eps / 2,
    )


def kernel_arithmetic(dtype: torch.dtype, width: int, *, tensor_cores: bool) -> ErrorModel:
    """The arithmetic of the Triton kernels for inputs of `dtype`, float32, float16 or bfloat16, and of head width D.

    The kernels work on blocks of 64 tokens in bfloat16, else of 32, or 16 where D > 64. Number 4 of the error model in
    oracle/README.md says how tensor cores accumulate and round operands. Triton's interpreter has no tensor cores.
    """
    block = 64 if dtype == torch.bfloat16 else (32 if width <= 64 else 16)
    if not tensor_cores:
        return replace(arithmetic_for(dtype), block=block)
    float32 = torch.finfo(torch.float32)
    operand = {torch.float32: 1.5 * 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2 * 2.0**-8}[dtype]
    argument_operand = operand if dtype == torch.float32 else 0.0
    return ErrorModel(float32.eps, float32.tiny, float32.max, operand, float32.tiny, argument_operand, block=block)


FLOAT32 = arithmetic_for(torch.float32)
FLOAT64 = arithmetic_for(torch.float64)

"""Numbers of the oracle: exact conversion from the float formats, the engines, and a precision that is confirmed."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from mpmath import libmp
from mpmath.ctx_mp import MPContext
from numpy.typing import NDArray
from torch import Tensor

try:
    import gmpy2
except ImportError:
    gmpy2 = None

# A number of either engine: an mpf of `context`, or a gmpy2.mpfr. Neither library is typed.
Number = Any
Numbers = NDArray[np.object_]

FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The precision at rest, in which callers subtract, compare and print the oracle's values.
RESTING_DIGITS = 60
AGREED_DIGITS = 20
NOISE_GUARD_DIGITS = 10
MOST_DIGITS = 960

context = MPContext()
context.dps = RESTING_DIGITS


class Unsettled(ArithmeticError):
    """The values still change when the precision is doubled up to `MOST_DIGITS`: the oracle has no answer."""


def exact(x: Tensor | NDArray[Any] | float) -> Numbers:
    """Convert floats to the oracle's numbers without any rounding.

    Parameters
    ----------
    x : Tensor, NDArray or float
        float16, bfloat16, float32 or float64, on any device; subnormals, infinities and NaN included.

    Returns
    -------
    NDArray of mpf, shape of `x`
        Both signed zeros give the one zero that mpf has.

    Raises
    ------
    TypeError
        If the elements are in none of the four formats.
    """
    return elementwise(_mpf, doubles(x))


def doubles(x: Tensor | NDArray[Any] | float) -> NDArray[np.float64]:
    """Widen any of the four formats to float64, which holds each of them exactly."""
    tensor = x.detach() if isinstance(x, Tensor) else torch.from_numpy(np.array(x))
    if tensor.dtype not in FORMATS:
        raise TypeError(f"`x` must be in one of {FORMATS}, got {tensor.dtype}")
    return tensor.cpu().double().numpy()


def elementwise(function: Callable[[Any], Any], x: NDArray[Any]) -> Numbers:
    """Apply a function of one number to each element; the shape stays, also when it is () or empty."""
    result = np.empty(x.shape, dtype=object)
    # numpy looks at the processor's flags, which an infinity or NaN on its way into an mpf sets.
    with np.errstate(all="ignore"):
        result[...] = np.frompyfunc(function, 1, 1)(x)
    return result


@dataclass(frozen=True)
class Engine:
    """Arithmetic of one library at one precision. Inside `working()`, + - * / sqrt and exp round to that precision.

    `number` turns a float into a number, and `result` a number into an mpf, both exactly. `number` of an mpf may round.
    """

    working: Callable[[], AbstractContextManager[Any]]
    number: Callable[[Any], Number]
    sqrt: Callable[[Number], Number]
    exp: Callable[[Number], Number]
    result: Callable[[Number], Number]

    def numbers(self, x: Tensor) -> Numbers:
        """Elements of a tensor as numbers, exactly."""
        return elementwise(self.number, doubles(x))


def mpmath_engine(digits: int) -> Engine:
    """The reference: mpf of the oracle's own context, whose exponents have no limit."""
    return Engine(
        working=partial(context.workdps, digits),
        number=_mpf,
        sqrt=context.sqrt,
        exp=context.exp,
        result=_mpf,
    )


def mpfr_engine(digits: int) -> Engine:
    """The fast engine, gmpy2.mpfr. An exponent out of its range is an ArithmeticError, never a wrong zero."""
    return Engine(
        working=lambda: gmpy2.context(
            precision=libmp.dps_to_prec(digits),
            emin=gmpy2.get_emin_min(),
            emax=gmpy2.get_emax_max(),
            trap_underflow=True,
            trap_overflow=True,
            trap_divzero=True,
        ),
        number=_mpfr,
        sqrt=gmpy2.sqrt,
        exp=gmpy2.exp,
        result=_from_mpfr,
    )


def _mpf(x: Any) -> Number:
    return x if isinstance(x, context.mpf) else context.make_mpf(libmp.from_float(float(x)))


def _mpfr(x: Any) -> Number:
    if not isinstance(x, context.mpf):
        # Precision 1 is gmpy2's way to say: as many bits as the argument needs.
        return gmpy2.mpfr(float(x), 1)
    sign, man, exp, _ = x._mpf_
    man = gmpy2.mpfr(-man if sign else man, 1)
    return gmpy2.mul_2exp(man, exp) if exp >= 0 else gmpy2.div_2exp(man, -exp)


def _from_mpfr(x: Number) -> Number:
    man, exp = x.as_mantissa_exp()
    # float(mpf) insists on an int exponent.
    return context.make_mpf(libmp.from_man_exp(man, int(exp)))


# The fastest first; the last one is the reference. mpmath's own choice (its backend, MPMATH_NOGMPY) decides for both.
ENGINES: tuple[Callable[[int], Engine], ...] = (
    (mpfr_engine, mpmath_engine) if gmpy2 is not None and libmp.BACKEND == "gmpy" else (mpmath_engine,)
)


def evaluate(compute: Callable[[Engine], Mapping[str, Numbers]], start: int, digits: int | None) -> dict[str, Numbers]:
    """Compute at one precision, or at doubled ones until the results settle (oracle/README.md has the rule).

    Parameters
    ----------
    compute : callable
        Takes an `Engine`, returns arrays of its numbers by name.
    start : int
        Decimal digits of the first run, where `digits` is None.
    digits : int or None
        One run at exactly this precision, unconfirmed.

    Returns
    -------
    dict of NDArray of mpf
        From the run with the most digits.

    Raises
    ------
    Unsettled
        If some element still changes at `MOST_DIGITS`.
    """
    *fast, reference = ENGINES
    for engine_of in fast:
        try:
            return _evaluate(engine_of, compute, start, digits)
        except Unsettled:
            raise
        except ArithmeticError:
            # An exponent left the engine's range, or something was divided by 0: the reference engine answers.
            continue
    return _evaluate(reference, compute, start, digits)


def _evaluate(
    engine_of: Callable[[int], Engine],
    compute: Callable[[Engine], Mapping[str, Numbers]],
    start: int,
    digits: int | None,
) -> dict[str, Numbers]:
    low_digits = start if digits is None else digits
    engine = engine_of(low_digits)
    with engine.working():
        low = compute(engine)
    if digits is not None:
        return {name: elementwise(engine.result, x) for name, x in low.items()}
    unsettled = [(name, index) for name, x in low.items() for index in np.ndindex(x.shape)]
    while 2 * low_digits <= MOST_DIGITS:
        engine = engine_of(2 * low_digits)
        with engine.working():
            high = compute(engine)
            unsettled = [
                (name, index)
                for name, index in unsettled
                if not _settled(low[name][index], high[name][index], low_digits, engine)
            ]
        if not unsettled:
            return {name: elementwise(engine.result, x) for name, x in high.items()}
        low, low_digits = high, 2 * low_digits
    name, index = unsettled[0]
    raise Unsettled(
        f"{len(unsettled)} values still change at {low_digits} digits, the first is {name}{list(index)}, "
        f"now {context.nstr(engine.result(low[name][index]), AGREED_DIGITS)}"
    )


def _settled(low: Number, high: Number, low_digits: int, engine: Engine) -> bool:
    """Agree in the leading digits, or be a zero: a value that shrinks with the precision as rounding noise does."""
    if low == high:
        return True
    ten = engine.number(10.0)
    if abs(high - low) <= abs(high) * ten**-AGREED_DIGITS:
        return True
    return bool(abs(high) <= abs(low) * ten ** (NOISE_GUARD_DIGITS - low_digits))

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch

from oracle import Unsettled, exact, precision
from oracle.precision import AGREED_DIGITS, MOST_DIGITS, context, evaluate

# Of each format: the integer type of its bits, how many of them are the fraction, and the exponent bias.
LAYOUTS = {
    torch.float16: (torch.int16, 10, 15),
    torch.bfloat16: (torch.int16, 7, 127),
    torch.float32: (torch.int32, 23, 127),
    torch.float64: (torch.int64, 52, 1023),
}


def decoded(bits: int, fraction_bits: int, bias: int) -> Fraction:
    """The value that IEEE 754 gives to a bit pattern, as a rational number."""
    exponent = bits >> fraction_bits & 2 * bias + 1
    fraction = bits & 2**fraction_bits - 1
    significand = fraction if exponent == 0 else fraction + 2**fraction_bits
    return (-1 if bits < 0 else 1) * significand * Fraction(2) ** (max(exponent, 1) - bias - fraction_bits)


def rational(x: object) -> Fraction:
    sign, man, exp, _ = x._mpf_
    return (-1) ** sign * int(man) * Fraction(2) ** int(exp)


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """All finite ones of a 16-bit format; of the others the edges of every kind and a thousand random ones."""
    integer, fraction_bits, bias = LAYOUTS[dtype]
    size = torch.iinfo(integer).bits
    if size == 16:
        bits = torch.arange(-(2**15), 2**15).to(integer)
    else:
        edges = [e * 2**fraction_bits + f for e in (0, 1, bias, 2 * bias) for f in (0, 1, 2**fraction_bits - 1)]
        low, high = torch.iinfo(integer).min, torch.iinfo(integer).max
        random = torch.randint(low, high, (1000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
        bits = torch.cat([torch.tensor(edges), torch.tensor(edges) + low, random]).to(integer)
    return bits[bits.view(dtype).isfinite()]


@pytest.mark.parametrize("dtype", LAYOUTS, ids=str)
def test_every_finite_float_is_converted_exactly(dtype):
    bits = patterns(dtype)
    with context.workprec(2):
        converted = exact(bits.view(dtype))
    assert [rational(x) for x in converted] == [decoded(int(i), *LAYOUTS[dtype][1:]) for i in bits]


@pytest.mark.parametrize("dtype", LAYOUTS, ids=str)
def test_infinities_and_nan_stay_what_they_are(dtype):
    plus, minus, nan = exact(torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype))
    assert (plus, minus) == (context.inf, context.ninf)
    assert context.isnan(nan)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3)])
def test_the_shape_stays(shape):
    x = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    for given in (x, x.numpy(), torch.stack([x, -x], dim=-1)[..., 0], x.clone().requires_grad_()):
        converted = exact(given)
        assert converted.shape == shape
        assert converted.dtype == object
        assert (converted == x.numpy()).all()


def test_numpy_and_python_floats_are_exact_too():
    assert [rational(exact(x)[()]) for x in (0.1, np.float32(0.1), np.float16(0.1))] == [
        Fraction(float(x)) for x in (0.1, np.float32(0.1), np.float16(0.1))
    ]


@pytest.mark.parametrize("x", [torch.tensor([1]), np.array([1]), 1, torch.tensor([1j]), torch.tensor([True])])
def test_what_is_no_float_is_refused(x):
    with pytest.raises(TypeError, match="must be in one of"):
        exact(x)


def test_the_global_mpmath_context_is_left_alone():
    assert context is not mpmath.mp
    with mpmath.workdps(7):
        assert isinstance(exact(0.1)[()], context.mpf)
        assert mpmath.mp.dps == 7
        assert context.dps == precision.RESTING_DIGITS


@pytest.fixture(params=precision.ENGINES, ids=lambda engine: engine.__name__)
def engine(request, monkeypatch):
    monkeypatch.setattr(precision, "ENGINES", (request.param,))
    return request.param


@pytest.mark.parametrize("x", [0.0, 1.0, -5e-324, 1.7976931348623157e308, 0.1])
def test_an_engine_takes_numbers_in_and_gives_them_out_exactly(engine, x):
    numbers = engine(5)
    with numbers.working():
        assert numbers.result(numbers.number(x)) == exact(x)[()]


@pytest.mark.parametrize("x", [0.0, 7.0, -5e-324, -1.7976931348623157e308])
def test_an_engine_takes_its_own_results_in_again(engine, x):
    numbers = engine(50)
    with numbers.working():
        third = numbers.result(numbers.number(x) / 3)
        assert rational(numbers.result(numbers.number(third))) == rational(third)


# The noise of 120 digits where terms of about 1 cancel, with the guard of the rule.
NOISE = context.mpf(10) ** (precision.NOISE_GUARD_DIGITS - 120)


def one(value):
    """A computation with one result, and the precisions at which it ran."""
    asked = []

    def run(numbers):
        asked.append(len(asked))
        return {"value": np.array([value(numbers)], dtype=object)}

    return run, asked


@pytest.mark.parametrize("start", [10, 60])
def test_a_value_that_agrees_is_returned_from_the_higher_precision(engine, start):
    run, asked = one(lambda numbers: numbers.sqrt(numbers.number(2.0)))
    root = evaluate(run, start, None)["value"][0]
    with context.workdps(4 * start + 20):
        # The relative rounding error of one square root, from the doubled digits.
        assert abs(root * root - 2) <= 4 * context.mpf(10) ** -(max(2 * start, 40))
    # 10 digits cannot show the 20 that have to agree, 20 can just.
    assert len(asked) >= (3 if start == 10 else 2)


def test_given_digits_run_once_and_unconfirmed(engine):
    run, asked = one(lambda numbers: numbers.number(1.0) / 3)
    third = evaluate(run, 60, 5)["value"][0]
    assert 0 < abs(third * 3 - 1) <= 3 * context.mpf(10) ** -5
    assert len(asked) == 1


@pytest.mark.parametrize("exponent", [30, 70, 105, 130, 210])
def test_a_tiny_difference_is_found_at_higher_precision(engine, exponent):
    """(1 + d) - 1 where d is below the first precision, but above the noise of the second."""
    run, asked = one(lambda numbers: (1 + numbers.number(10.0) ** -exponent) - 1)
    found = evaluate(run, 60 if exponent < 110 else 120, None)["value"][0]
    assert abs(found * context.mpf(10) ** exponent - 1) <= context.mpf(10) ** -AGREED_DIGITS
    assert len(asked) >= 2


@pytest.mark.parametrize("divisor", range(2, 50))
def test_rounding_noise_is_seen_to_be_a_zero(engine, divisor):
    """(1 / d) d - 1 and its like are noise, or by luck exactly 0, at each precision."""
    run, _ = one(lambda numbers: (numbers.number(1.0) / divisor) * divisor - 1)
    assert abs(evaluate(run, 60, None)["value"][0]) <= NOISE


def test_noise_in_many_elements_settles_although_some_are_zero_by_luck(engine):
    def run(numbers):
        return {"value": np.array([(numbers.number(1.0) / d) * d - 1 for d in range(2, 200)], dtype=object)}

    assert all(abs(x) <= NOISE for x in evaluate(run, 60, None)["value"])


def test_what_changes_with_every_precision_is_unsettled(engine):
    run, asked = one(lambda numbers: numbers.number(1.0 + len(asked)))
    with pytest.raises(Unsettled, match=rf"1 values still change at {MOST_DIGITS} digits, the first is value\[0\]"):
        evaluate(run, 60, None)
    assert len(asked) == math.log2(MOST_DIGITS / 60) + 1


def test_an_exponent_out_of_range_goes_to_the_reference_engine():
    """exp(-10^30) ... is a number for mpmath; nothing may flush it to 0."""
    run, _ = one(lambda numbers: numbers.exp(numbers.number(-1e30)))
    smallest = evaluate(run, 60, None)["value"][0]
    assert 0 < smallest
    assert abs(context.log(smallest) + context.mpf(1e30)) <= context.mpf(10) ** (30 - AGREED_DIGITS)

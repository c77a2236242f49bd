import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from mpmath.ctx_iv import MPIntervalContext

import oracle
from oracle import Unsettled, exact, precision
from oracle.precision import AGREED_DIGITS, context
from tests.oracle.transcriptions import (
    HALF_OF_FLOAT64,
    PROBLEMS,
    cotangents,
    in_pytorch,
    numbers,
    over_numbers,
    problem,
    tensors,
)

interval = MPIntervalContext()
interval.dps = 80

each_problem = pytest.mark.parametrize("inputs", PROBLEMS.values(), ids=PROBLEMS)


def arrays(output):
    return {"o": output.o, "M": output.state.M, "S": output.state.S, "anchor": output.state.anchor}


def enclosed(inputs):
    """The definition in interval arithmetic: each result is certain to lie between two mpf."""

    def enclose(x):
        return interval.make_mpf((x._mpf_, x._mpf_))

    results = over_numbers(
        inputs, numbers(inputs, enclose), interval.mpf(0), interval.mpf(inputs.eps), interval.sqrt, interval.exp
    )
    return {
        name: [tuple(context.make_mpf(end) for end in x._mpi_) for x in array.flat] for name, array in results.items()
    }


@each_problem
def test_values_lie_in_the_enclosure_of_the_definition(inputs):
    """To the digits that the oracle promises; the enclosure itself is narrower than that, and so hides nothing."""
    digit = context.mpf(10) ** -AGREED_DIGITS
    found = arrays(oracle.forward(inputs))
    for name, bounds in enclosed(inputs).items():
        assert len(bounds) == found[name].size
        for (low, high), value in zip(bounds, found[name].flat, strict=True):
            slack = digit * abs(value)
            assert high - low <= slack
            assert low - slack <= value <= high + slack, name


@each_problem
def test_values_are_those_of_the_pytorch_definition(inputs):
    found = arrays(oracle.forward(inputs))
    for name, x in in_pytorch(inputs).items():
        error = np.abs(exact(x.detach()) - found[name])
        assert found[name].shape == tuple(x.shape)
        assert (error <= HALF_OF_FLOAT64 * max((abs(value) for value in found[name].flat), default=0)).all(), name


@pytest.mark.parametrize("seed", range(3))
def test_small_integers_and_power_of_two_gates_give_the_rational_answer(seed):
    """Plain memory on dyadic numbers: every value is rational with few bits, so the oracle has it exactly."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape):
        return torch.randint(-4, 5, shape, generator=generator).float()

    def halves(*shape):
        return torch.randint(0, 5, shape, generator=generator).float() / 4

    T, H, D = 6, 2, 3
    inputs = oracle.Inputs(
        *(integers(1, T, H, D) for _ in "qkv"), None, None, *(halves(1, T, H) for _ in range(3)),
        chunk_size=2, M=integers(1, H, D, D), S=integers(1, H, D, D), anchor=integers(1, H, D, D), offset=(1,),
    )  # fmt: skip
    given = numbers(inputs, lambda x: Fraction(float(x)))
    expected = over_numbers(inputs, given, Fraction(0), Fraction(0), None, None)
    for name, found in arrays(oracle.forward(inputs)).items():
        assert [Fraction(int(x * 2**200)) / 2**200 for x in found.flat] == list(expected[name].flat)


def test_offset_and_anchor_follow_the_chunks():
    inputs = PROBLEMS["packed"]
    state = oracle.forward(inputs).state
    # Lengths 0, 3, 1, 0, 2 from offset 1 with chunks of 3.
    assert state.offset == (1, 1, 2, 1, 0)
    assert (state.anchor[0] == exact(inputs.anchor[0])).all()
    assert (state.M[3] == exact(inputs.M[3])).all()
    assert (state.anchor[4] == state.M[4]).all()
    assert not (state.anchor[1] == state.M[1]).any()


def test_splitting_a_sequence_changes_nothing():
    """The second half resumes from the float64 state only where that is exact: plain memory on integers."""
    inputs = replace(problem(20, plain=True, C=4, state="MS"), eps=1e-6)
    inputs = replace(inputs, **{name: (4 * x).round() / 4 for name, x in tensors(inputs).items()})
    whole = arrays(oracle.forward(inputs))
    first = oracle.forward(cut(inputs, slice(0, 3)))
    state = {name: torch.from_numpy(getattr(first.state, name).astype(np.float64)) for name in ("M", "S", "anchor")}
    assert all((exact(x) == getattr(first.state, name)).all() for name, x in state.items())
    rest = arrays(oracle.forward(replace(cut(inputs, slice(3, None)), **state, offset=first.state.offset)))
    assert (np.concatenate([first.o, rest["o"]], axis=1) == whole["o"]).all()
    assert all((rest[name] == whole[name]).all() for name in ("M", "S", "anchor"))


def cut(inputs, tokens):
    return replace(
        inputs, **{name: getattr(inputs, name)[:, tokens] for name in ("q", "k", "v", "theta", "alpha", "eta")}
    )


def test_a_log_gate_of_minus_infinity_is_the_exact_zero():
    inputs = PROBLEMS["log gates"]
    zeros = torch.full_like(inputs.theta, -torch.inf)
    state = oracle.forward(replace(inputs, theta=zeros, alpha=zeros, eta=zeros)).state
    assert (state.M == 0).all()
    assert (state.S == 0).all()


def test_log_gates_far_below_any_float_are_not_zero():
    inputs = replace(PROBLEMS["plain, no state"], log_gates=True)
    tiny = torch.full_like(inputs.theta, -1e30)
    assert (oracle.forward(replace(inputs, theta=tiny, alpha=tiny, eta=tiny)).state.S != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_dtype_gives_the_values_of_the_same_numbers_in_float64(dtype):
    inputs = PROBLEMS["normalised"]
    rounded = replace(inputs, **{name: x.to(dtype) for name, x in tensors(inputs).items()})
    wide = replace(inputs, **{name: x.to(dtype).double() for name, x in tensors(inputs).items()})
    ours, theirs = arrays(oracle.forward(rounded)), arrays(oracle.forward(wide))
    assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.parametrize("D", [1, 2, 3, 7])
def test_constant_rows_settle(D):
    """y is constant and var y = 0, but thirds, sevenths and 0.1 do not cancel in binary digits."""
    inputs = problem(30, D=D, state="")
    constant = torch.full_like(inputs.v, 0.1)
    M = torch.full((1, 1, D, D), 0.7, dtype=torch.float64)
    inputs = replace(inputs, v=constant, k=constant, w=torch.ones_like(inputs.w), b=torch.zeros_like(inputs.b), M=M)
    # u = 0 exactly: k_t A and the target are constant. M only decays.
    output = oracle.forward(inputs)
    decay = np.prod(1 - exact(inputs.alpha))
    noise = context.mpf(10) ** (precision.NOISE_GUARD_DIGITS - 2 * inputs.start_digits)
    assert (np.abs(output.state.S) <= noise).all()
    assert (np.abs(output.state.M - exact(M) * decay) <= context.mpf(10) ** -AGREED_DIGITS * decay).all()


def test_a_wide_range_of_inputs_starts_with_more_digits():
    inputs = PROBLEMS["plain"]
    assert inputs.start_digits == precision.RESTING_DIGITS
    inputs = replace(inputs, q=inputs.q * 1e-70)
    assert 90 <= inputs.start_digits < 100
    assert replace(inputs, q=inputs.q * 1e-200).start_digits == precision.MOST_DIGITS // 8


def test_chaos_is_unsettled(monkeypatch):
    """The normalised memory loses about one digit in eight tokens here: after 600 of them none of 60 are left."""
    monkeypatch.setattr(precision, "MOST_DIGITS", 120)
    inputs = problem(40, lengths=(600,), C=1, state="M")
    gates = {"theta": torch.full_like(inputs.theta, 3), "alpha": torch.full_like(inputs.alpha, 0.5)}
    inputs = replace(inputs, w=10 * inputs.w, eta=0 * inputs.eta, **gates)
    with pytest.raises(Unsettled, match="still change at 120 digits"):
        oracle.forward(inputs)


@pytest.mark.parametrize("name", ["q", "k", "v", "w", "b", "theta", "alpha", "eta", "M", "S", "anchor"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_refused_by_name(name, value):
    for inputs in (PROBLEMS["normalised"], PROBLEMS["log gates"]):
        tensor = getattr(inputs, name).clone()
        tensor.view(-1)[1] = value
        inputs = replace(inputs, **{name: tensor})
        if inputs.log_gates and name in ("theta", "alpha", "eta") and value == -torch.inf:
            oracle.forward(inputs, digits=20)
            continue
        with pytest.raises(ValueError, match=rf"`{name}` must be finite.*, got {value}"):
            oracle.forward(inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": None}, "`w` and `b`"),
        ({"chunk_size": 0}, "`chunk_size`"),
        ({"eps": float("nan")}, "`eps`"),
        ({"eps": -1.0}, "`eps`"),
        ({"cu_seqlens": (0, 4)}, "`cu_seqlens`"),
        ({"cu_seqlens": (0, 4, 3, 5)}, "`cu_seqlens`"),
        ({"offset": (2,)}, "`offset`"),
        ({"offset": (0, 0)}, "`offset`"),
        ({"theta": torch.zeros(1, 5)}, r"`theta` must have shape \(1, 5, 1\), got \(1, 5\)"),
        ({"M": torch.zeros(1, 1, 3, 2)}, "`M` must have shape"),
    ],
)
def test_contradictory_inputs_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        oracle.forward(replace(PROBLEMS["normalised"], **change))


@pytest.mark.skipif(len(precision.ENGINES) == 1, reason="gmpy2 is not installed")
@each_problem
def test_both_engines_agree(inputs, monkeypatch):
    """To the digits that the oracle promises, values and gradients."""
    fast = everything(inputs)
    monkeypatch.setattr(precision, "ENGINES", precision.ENGINES[1:])
    for x, y in zip(fast, everything(inputs), strict=True):
        assert abs(x - y) <= context.mpf(10) ** -AGREED_DIGITS * abs(y)


def everything(inputs):
    output, gradient = oracle.gradient(inputs, cotangents(inputs))
    parts = [*arrays(output).values(), *(x for x in vars(gradient).values() if x is not None)]
    return [x for part in parts for x in part.flat]


WITHOUT_GMPY2 = """
import sys
sys.modules["gmpy2"] = None
from mpmath import libmp
from tests.oracle.transcriptions import PROBLEMS
from tests.oracle.test_definition import everything
from oracle.precision import ENGINES, context, mpmath_engine
assert libmp.BACKEND == "python" and ENGINES == (mpmath_engine,)
print(*(context.nstr(x, 18) for x in everything(PROBLEMS["packed"])))
"""


def test_everything_works_without_gmpy2():
    command = [sys.executable, "-c", WITHOUT_GMPY2]
    environment = os.environ | {"MPMATH_NOGMPY": "1"}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert printed == [context.nstr(x, 18) for x in everything(PROBLEMS["packed"])]

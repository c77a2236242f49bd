from dataclasses import replace

import numpy as np
import pytest
import torch

import oracle
from oracle import exact, precision
from oracle.precision import AGREED_DIGITS, context
from tests.oracle.transcriptions import (
    GATES,
    HALF_OF_FLOAT64,
    PROBLEMS,
    cotangents,
    in_pytorch,
    numbers,
    over_numbers,
    problem,
    tensors,
    with_gates,
)

each_problem = pytest.mark.parametrize("inputs", PROBLEMS.values(), ids=PROBLEMS)

DIGITS = 200
STEP_DIGITS = 30


def difference(given, inputs, cotangent, name, index, step):
    """Central difference of <cotangents, results> in one input element, and the size of the two terms."""
    results = []
    for moved in (step, -step):
        changed = {key: array.copy() if key == name else array for key, array in given.items()}
        changed[name][index] += moved
        found = over_numbers(inputs, changed, context.zero, exact(inputs.eps)[()], context.sqrt, context.exp)
        terms = [x * y for key, array in cotangent.items() for x, y in zip(array.flat, found[key].flat, strict=True)]
        results.append((sum(terms), sum(abs(term) for term in terms)))
    (after, size), (before, _) = results
    return (after - before) / (2 * step), size


@each_problem
def test_gradients_are_the_central_differences_of_the_recurrence(inputs):
    """
    In 200 digits with steps h = 1e-30 and 2 h. A central difference is off by h^2 f'''/6 + O(h^4), so the one at 2 h is
    off by four times as much, and the distance of the two bounds the error of the better one three times over.
    Rounding: at most half of the digits of f are lost, and it is divided by h. Then come the digits that the oracle
    promises.
    """
    _, gradient = oracle.gradient(inputs, cotangents(inputs))
    given, step = numbers(inputs), context.mpf(10) ** -STEP_DIGITS
    cotangent = {name: exact(x) for name, x in vars(cotangents(inputs)).items()}
    with context.workdps(DIGITS):
        for name, array in given.items():
            found = getattr(gradient, name)
            assert found.shape == array.shape
            for index in np.ndindex(array.shape):
                once, size = difference(given, inputs, cotangent, name, index, step)
                twice, _ = difference(given, inputs, cotangent, name, index, 2 * step)
                rounding = size * context.mpf(10) ** -(DIGITS // 2) / step
                bound = abs(twice - once) + rounding + context.mpf(10) ** -AGREED_DIGITS * abs(once)
                assert abs(found[index] - once) <= bound, (name, index)
                # A bound that is too wide must not make this pass.
                assert bound <= 2 * context.mpf(10) ** -AGREED_DIGITS * (abs(once) + size), (name, index)


def by_autograd(inputs, cotangent):
    """Gradients of the PyTorch definition, for the tensors that were passed."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors(inputs).items()}
    results = in_pytorch(replace(inputs, **leaves))
    pairs = [(results[name], x) for name, x in vars(cotangent).items() if x is not None and results[name].requires_grad]
    gradients = torch.autograd.grad(
        [result for result, _ in pairs], list(leaves.values()), [x for _, x in pairs],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return dict(zip(leaves, gradients, strict=True))


def agrees_with_autograd(inputs, cotangent):
    _, gradient = oracle.gradient(inputs, cotangent)
    for name, expected in by_autograd(inputs, cotangent).items():
        found = getattr(gradient, name)
        largest = max((abs(x) for x in found.flat), default=0)
        assert (np.abs(exact(expected) - found) <= HALF_OF_FLOAT64 * largest).all(), name


@each_problem
def test_gradients_are_those_of_autograd(inputs):
    agrees_with_autograd(inputs, cotangents(inputs))


@pytest.mark.parametrize("name", ["normalised", "plain", "packed", "mid-chunk"])
@pytest.mark.parametrize("part", ["o", "M", "S", "anchor"])
def test_each_cotangent_alone_gives_its_gradient(name, part):
    every = cotangents(PROBLEMS[name])
    alone = oracle.Cotangents(torch.zeros_like(every.o))
    agrees_with_autograd(PROBLEMS[name], replace(alone, **{part: getattr(every, part)}))


@pytest.mark.parametrize(
    "gates",
    [
        {"alpha": 1.0},
        {"eta": 0.0},
        {"theta": 0.0},
        {"alpha": 1.0, "eta": 0.0},
        {"alpha": 0.0, "eta": 1.0, "theta": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("plain", [True, False])
def test_gates_at_the_ends_of_their_ranges_have_gradients(gates, plain):
    """The derivative with respect to a gate that is 0 is a product of the others, not 0: autograd of a loop knows."""
    inputs = with_gates(problem(50, lengths=(4,), C=3, plain=plain), **gates)
    agrees_with_autograd(inputs, cotangents(inputs))
    _, gradient = oracle.gradient(inputs, cotangents(inputs))
    assert all((getattr(gradient, name) != 0).any() for name in gates)


@pytest.mark.parametrize("name", GATES)
def test_a_log_gate_of_minus_infinity_has_derivative_zero(name):
    inputs = with_gates(PROBLEMS["log gates"], **{name: -torch.inf})
    _, gradient = oracle.gradient(inputs, cotangents(inputs))
    assert (getattr(gradient, name) == 0).all()
    agrees_with_autograd(inputs, cotangents(inputs))


def test_log_gates_have_the_linear_gradients_times_the_gates():
    """The gates of the two differ by the rounding of a float64 log."""
    linear = problem(1)
    logs = {"theta": linear.theta.log(), "alpha": torch.log1p(-linear.alpha), "eta": linear.eta.log()}
    _, by_gate = oracle.gradient(linear, cotangents(linear))
    _, by_log = oracle.gradient(replace(linear, log_gates=True, **logs), cotangents(linear))
    for name, factor in (("theta", linear.theta), ("alpha", linear.alpha - 1), ("eta", linear.eta)):
        expected = getattr(by_gate, name) * exact(factor)
        assert (np.abs(getattr(by_log, name) - expected) <= HALF_OF_FLOAT64 * np.abs(expected).max()).all()


def test_an_anchor_that_was_not_passed_counts_as_the_memory():
    """dM is then the sum of the gradients of M and of an anchor equal to M; the values are the same."""
    shared = PROBLEMS["anchor is M"]
    apart = replace(shared, anchor=shared.M)
    output, together = oracle.gradient(shared, cotangents(shared))
    same, separate = oracle.gradient(apart, cotangents(shared))
    promised = 2 * context.mpf(10) ** -AGREED_DIGITS
    assert (output.o == same.o).all()
    assert (together.anchor == 0).all()
    error = np.abs(together.M - (separate.M + separate.anchor))
    assert (error <= promised * (np.abs(separate.M) + np.abs(separate.anchor))).all()


def test_states_that_were_not_passed_have_gradients_all_the_same():
    inputs = PROBLEMS["plain, no state"]
    _, absent = oracle.gradient(inputs, cotangents(inputs))
    zeros = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    _, given = oracle.gradient(replace(inputs, M=zeros, S=zeros), cotangents(inputs))
    assert (absent.M != 0).all()
    assert all((getattr(absent, name) == getattr(given, name)).all() for name in ("q", "theta", "M", "S"))
    assert absent.w is None
    assert absent.b is None


def test_no_tokens_hand_the_cotangents_through():
    inputs = PROBLEMS["T = 0"]
    given = cotangents(inputs)
    _, gradient = oracle.gradient(inputs, given)
    assert all((getattr(gradient, name) == exact(getattr(given, name))).all() for name in ("M", "S", "anchor"))
    assert (gradient.w == 0).all()
    assert gradient.theta.shape == (1, 0, 1)
    _, shared = oracle.gradient(replace(inputs, anchor=None), given)
    assert (shared.M == exact(given.M) + exact(given.anchor)).all()


def test_values_come_with_the_gradient():
    inputs = PROBLEMS["packed"]
    output, alone = oracle.gradient(inputs, cotangents(inputs))[0], oracle.forward(inputs)
    assert (output.o == alone.o).all()
    assert output.state.offset == alone.state.offset
    assert all((getattr(output.state, name) == getattr(alone.state, name)).all() for name in ("M", "S", "anchor"))


@pytest.mark.parametrize("D", [1, 2, 3, 7])
def test_constant_rows_settle(D):
    """Where var y = 0 and the target is constant, u = 0, and theta and eta do nothing: zeros by cancellation."""
    inputs = problem(60, D=D, state="")
    constant = torch.full_like(inputs.k, 0.1)
    M = torch.full((1, 1, D, D), 0.7, dtype=torch.float64)
    inputs = replace(inputs, k=constant, v=constant * 3, w=torch.ones_like(inputs.w), b=0 * inputs.b, M=M)
    _, gradient = oracle.gradient(inputs, cotangents(inputs))
    noise = context.mpf(10) ** (precision.NOISE_GUARD_DIGITS - 2 * inputs.start_digits)
    assert (np.abs(gradient.theta) <= noise).all()
    assert (np.abs(gradient.eta) <= noise).all()
    agrees_with_autograd(replace(inputs, k=problem(60, D=D).k), cotangents(inputs))


def test_genuine_gradients_far_below_what_cancels_are_right():
    """Huge keys, one huge weight, a constant output cotangent: dq is 1e-69, and 60 digits give noise of 1e-35."""
    q = 1e6 * torch.tensor([-3.4, -3.5, -16, 17]).view(1, 1, 1, 4)
    k = 1e6 * torch.tensor([-6.7, -4.7, -9.6, -5.9]).view(1, 1, 1, 4)
    w = torch.tensor([[1e10, 0.0864, -1.5, 1.4]])
    one = torch.ones(1, 1, 1)
    inputs = oracle.Inputs(q, k, torch.full_like(q, -1.5), w, 0 * w, one, 0.1 * one, one)
    do = oracle.Cotangents(torch.ones_like(q))
    settled = oracle.gradient(inputs, do)[1].q
    reference = oracle.gradient(inputs, do, digits=precision.MOST_DIGITS)[1].q
    coarse = oracle.gradient(inputs, do, digits=inputs.start_digits)[1].q
    promised = context.mpf(10) ** -AGREED_DIGITS * np.abs(reference)
    assert (np.abs(settled - reference) <= promised).all()
    assert (np.abs(coarse - reference) >= np.abs(reference)).all()


@pytest.mark.parametrize("name", ["o", "M", "S", "anchor"])
def test_a_bad_cotangent_is_refused_by_name(name):
    inputs, given = PROBLEMS["normalised"], cotangents(PROBLEMS["normalised"])
    x = getattr(given, name).clone()
    x.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=rf"`cotangents.{name}` must be finite, got nan"):
        oracle.gradient(inputs, replace(given, **{name: x}))
    with pytest.raises(ValueError, match=rf"`cotangents.{name}` must have shape"):
        oracle.gradient(inputs, replace(given, **{name: x[..., :1]}))
    with pytest.raises(ValueError, match="`q` must be finite"):
        oracle.gradient(replace(inputs, q=inputs.q / 0), given)

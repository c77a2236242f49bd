"""Problems are deterministic, and travel as text."""

import json

import pytest
import torch
from hypothesis import given, settings

from properties.harness.implementations import CLAIMS
from properties.harness.running import tensors
from properties.problems.gate_kinds import read_gate
from properties.problems.problem import Problem
from properties.problems.strategies import explicit, problems, split
from properties.problems.value_kinds import read_value

QUICK = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@QUICK
@given(problem=split(problems(packed=False)) | problems() | explicit())
def test_a_problem_survives_json_and_its_own_repr(problem: Problem) -> None:
    assert Problem.from_json(problem.to_json()) == problem
    assert eval(repr(problem), {"Problem": Problem}) == problem


@QUICK
@given(problem=problems())
def test_a_problem_builds_the_same_tensors_every_time(problem: Problem) -> None:
    first, second = tensors(problem.inputs()), tensors(problem.inputs())
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    assert torch.equal(problem.cotangents().o, problem.cotangents().o)


@QUICK
@given(problem=problems())
def test_gates_are_in_their_range(problem: Problem) -> None:
    inputs = problem.inputs()
    low, high = (-torch.inf, 0) if problem.log_gates else (0, 1)
    for gate in (inputs.alpha, inputs.eta):
        assert bool(((gate >= low) & (gate <= high)).all())
    assert not inputs.theta.isnan().any()
    assert problem.log_gates or bool((inputs.theta >= 0).all())


@QUICK
@given(problem=problems())
def test_a_restricted_problem_needs_only_what_is_claimed(problem: Problem) -> None:
    for missing in (
        "varlen",
        "resume",
        "offset",
        "log_gates",
        "half",
        "bfloat16",
        "float64",
        "plain",
        "normalised",
        "large",
    ):
        assert missing not in problem.restricted(CLAIMS - {missing}).features
    assert problem.restricted(CLAIMS) == problem


@QUICK
@given(problem=problems())
def test_a_kind_is_written_as_it_is_read(problem: Problem) -> None:
    for name in ("theta", "alpha", "eta"):
        assert str(read_gate(name, getattr(problem, name))) == getattr(problem, name)
    for name in ("q", "k", "v", "w", "b", "state"):
        assert str(read_value(name, getattr(problem, name))) == getattr(problem, name)


def test_floats_are_written_in_hexadecimal() -> None:
    problem = Problem(eps=0.1, explicit=(("alpha", (0.1,)),))
    assert json.loads(problem.to_json()) == {"eps": (0.1).hex(), "explicit": [["alpha", [(0.1).hex()]]]}


def test_the_streams_never_change() -> None:
    assert Problem(D=2, seed=5).inputs().q.tolist() == [[[[float.fromhex(x) for x in EXPECTED]]]]


EXPECTED = ("0x1.f28a5e0000000p-1", "0x1.2ce9220000000p-4")


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"lengths": (1, 2)}, "sequences of one length"),
        ({"C": 0}, "C >= 1"),
        ({"initial": "some"}, "initial must be one of"),
        ({"memory": "deep"}, "memory must be"),
        ({"initial": "full"}, "one offset"),
        ({"gate_dtype": "float64"}, "not wider"),
        ({"cotangent": "o M T"}, "cotangent must name"),
        ({"explicit": (("p", (1.0,)),)}, "explicit must name"),
        ({"theta": ""}, "the kind of `theta` must be one of constant, .*, got ''"),
        ({"theta": "bogus 2^-1"}, "the kind of `theta` must be one of constant, .*, got 'bogus 2\\^-1'"),
        (
            {"theta": "ramp 2^-1"},
            r"`theta` is 'ramp 2\^-1': `ramp` takes 2 parameters \(x y\), got 1; the form is `ramp",
        ),
        ({"eta": "spike 2^-1 2^-2"}, "`spike` takes 3 parameters"),
        ({"alpha": "spike 2^-1 2^-2 first"}, "invalid literal for int"),
        ({"alpha": "constant 3"}, "a level must be 0, 1, 2.n or 1-2.-n, got '3'"),
        ({"alpha": "constant 1-2^0"}, "a level must be"),
        ({"alpha": "random 0 1"}, "neither x nor y may be 0 or 1"),
        ({"alpha": "constant 2^1"}, "a level of `alpha` must be 0, 1, 2.n with n <= 0, or 1-2.-n"),
        ({"theta": "constant 1"}, "a level of `theta` must be 0 or 2.n"),
        ({"q": "random"}, "`random` takes 1 parameters"),
        ({"q": "random 2000"}, "n must be from -1022 to 1023"),
        ({"q": "integers -1"}, "n must not be negative"),
        ({"do": "randoms 0"}, "the kind of `do` must be one of unit"),
        ({"w": "spike 4 0"}, "`w` has no tokens"),
    ],
)
def test_what_is_no_problem_is_refused(fields: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Problem(**fields)

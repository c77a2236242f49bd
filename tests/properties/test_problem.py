"""Problems are deterministic, and travel as text."""

import json

import pytest
import torch
from hypothesis import given, settings

from properties.checks import CLAIMS, tensors
from properties.problem import Problem
from properties.strategies import explicit, problems, split

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
    ],
)
def test_what_is_no_problem_is_refused(fields: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Problem(**fields)

"""What a law counts, it checks: a single element that is NaN, or wrong by ten radii, breaks every law."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings

from properties import test_conventions, test_invariance, test_real_sizes
from properties.harness.comparing import radii as radii_of
from properties.harness.implementations import Implementation, implementation
from properties.harness.laws import PROPERTIES
from properties.harness.running import LawBroken
from properties.problems.problem import Problem
from tests.properties import test_laws  # noqa: F401 (it imports the laws)
from tests.properties.tampered import Tampered
from tests.properties.wrong import stepper

CHUNK = implementation("chunk", "cpu")
# The coefficients are read off these results.
READ_OFF = {"coefficients": "o", "momentum": "S"}
# In radii.
WRONG = 10
# What is not finite is what this one looks for.
NOT_FINITE = "test_what_is_not_finite_is_not_hidden"
# These ask for finite numbers and compare with nothing.
FINITE = ("test_finite_inputs_give_finite_results", "test_gates_of_zero_give_finite_gradients")
# These compare the mean squares of heads, which one element may leave as they were.
BY_HEADS = (
    "test_errors_of_real_size_are_at_most_twice_those_of_the_definition",
    "test_many_chunks_sequences_and_heads_are_as_accurate_as_the_definition",
)
# These compare ways of calling with each other, and the plain one with the oracle.
CONVENTIONS = [name for name in vars(test_conventions) if name.startswith("test_")]
# `chunk` does not claim these; for each of them, too, there is a wrong implementation.
INVARIANCE = {name for name in vars(test_invariance) if name.startswith("test_")}
LAWS = [law for law in PROPERTIES if law != NOT_FINITE and law not in INVARIANCE]


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the law of many sequences and heads have fewer: the one that is tampered with needs their radii."""
    monkeypatch.setattr(test_real_sizes, "MANY", ((14, 10),))


def broken_by(law: str, radii: float, in_one_call: bool = False) -> None:
    """Put an implementation with one wrong element before a law, in a result that the law counts.

    In every call that the law makes, or in the last one alone, in a result that the law compares between calls.
    """
    found = PROPERTIES[law]

    @settings(
        max_examples=3 if found.share > 0.3 else 1, phases=[Phase.generate], database=None, derandomize=True,
        deadline=None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(problem=found.problems)
    def tried(problem: Problem) -> None:
        assume(found.about(CHUNK, problem))
        # The first head and sequence are those that this law looks away from, in some problems.
        assume("stays_in_its_sequence" not in law or problem.seed % problem.H)
        plain = Tampered(CHUNK, "nothing", radii)
        counted = found.check(with_step(plain), problem)
        assume(counted and is_bounded(problem))
        # A law without an oracle notices a call that differs, but in every call a number that is none.
        last = in_one_call or (radii == WRONG and not any(one.oracle for one in counted))
        compared = [one for one in counted if one.elements and not (in_one_call and one.oracle)]
        names = sorted({READ_OFF.get(one.result, one.result) for one in compared} - {"offset"})
        assume(names)
        name = names[problem.seed % len(names)]
        call = plain.calls - 1 if last else None
        tampered = Tampered(CHUNK, name, radii, call)
        # The oracle refuses to start from a state that is not finite.
        with pytest.raises((LawBroken, ValueError)):
            found.check(with_step(tampered), problem)

    tried()


def is_bounded(problem: Problem) -> bool:
    """Whether no radius of its call is infinite."""
    radius = radii_of(CHUNK, problem.inputs(), problem.cotangents())
    return all(np.isfinite(x).all() for x in radius.values() if x is not None)


def with_step(tampered: Tampered) -> Implementation:
    """Return it as an implementation whose step is tampered with, too."""
    return replace(tampered.implementation(), step=stepper(tampered))


@pytest.mark.parametrize("law", LAWS)
def test_a_law_notices_a_single_nan(law: str) -> None:
    broken_by(law, math.nan)


@pytest.mark.parametrize("law", [law for law in LAWS if law not in (*FINITE, *BY_HEADS)])
def test_a_law_notices_a_single_error_of_ten_radii(law: str) -> None:
    broken_by(law, WRONG)


@pytest.mark.parametrize("law", CONVENTIONS)
def test_a_law_of_conventions_notices_an_error_of_ten_radii_in_one_call(law: str) -> None:
    broken_by(law, WRONG, in_one_call=True)

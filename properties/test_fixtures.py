"""Failures that were found once, replayed against every implementation: the oracle supplies the answer."""

import json
from pathlib import Path

import pytest

# Importing the laws registers them.
from properties import (  # noqa: F401
    test_accuracy,
    test_closed_forms,
    test_coefficients,
    test_conventions,
    test_invariance,
    test_oracle,
    test_plain_memory,
    test_real_sizes,
    test_same_bits,
    test_sequences,
    test_splitting,
)
from properties.harness.facts import Recorder
from properties.harness.implementations import Implementation
from properties.harness.laws import PROPERTIES
from properties.problems.problem import Problem

FILES = sorted((Path(__file__).parent / "fixtures").glob("*.json"))
# Every fixture is a problem for these; it names the laws that it broke besides.
ALWAYS = ("test_values_are_the_oracles", "test_gradients_are_the_oracles")


@pytest.mark.parametrize("fixture", FILES, ids=lambda path: path.stem)
def test_fixture(fixture: Path, implementation: Implementation, recorder: Recorder) -> None:
    problem, laws = read(fixture)
    for name in laws:
        if PROPERTIES[name].needs <= implementation.claims:
            PROPERTIES[name].check(implementation, problem, recorder)


def read(fixture: Path) -> tuple[Problem, tuple[str, ...]]:
    """Return the problem of a fixture, and the laws that are asked about it."""
    fields = json.loads(fixture.read_text())
    return Problem.from_json(json.dumps(fields["problem"])), tuple(dict.fromkeys((*ALWAYS, *fields["laws"])))

"""The worst errors that were ever seen, and how they are now: section 4.4."""

import pytest

# Importing the fixtures registers all laws.
from properties import report, test_fixtures  # noqa: F401
from properties.checks import PROPERTIES, TALLY, Implementation, LawBroken
from properties.problem import Problem

# What "no longer as accurate" means, in SPEC.md.
WORSE = 4
# A result that is rounded once may be so far off, in ulps, and on another machine will be.
ONE_ROUNDING = 0.5


@pytest.mark.law("4.4", needs=frozenset())
def test_ratchet(implementation: Implementation) -> None:
    stored = report.read_ratchet().get(report.subject(implementation.name, implementation.device), {})
    if not stored:
        pytest.skip("worst cases in ratchet.json")
    for key, (error, problem) in stored.items():
        law = key.partition(" ")[0]
        PROPERTIES[law].law(implementation, Problem.from_json(problem))
        now = TALLY.last.error
        TALLY.tightness[f"ratchet {key}"] = now / error
        if now > WORSE * max(error, ONE_ROUNDING):
            raise LawBroken(f"{key}: the error was {error:.6g} ulp and is {now:.6g} ulp, of {problem}")

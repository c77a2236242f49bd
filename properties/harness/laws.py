"""The laws: functions of an implementation and a problem that return their comparisons, or raise."""

import functools
import math
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import currently_in_test_context, given, reject, settings, target
from hypothesis.strategies import SearchStrategy

import oracle
from properties.harness.comparing import Found, has_narrow_operands
from properties.harness.containment import answering, contained
from properties.harness.crash_isolation import DeviceLost, is_fatal
from properties.harness.envelope import counted
from properties.harness.facts import Recorder, unsettled
from properties.harness.implementations import Implementation
from properties.harness.waiting import Hanging, limited
from properties.harness.workarounds import with_room
from properties.problems.domain import OutsideDomain
from properties.problems.problem import HALF, Problem

Law = Callable[[Implementation, Problem], Found]
About = Callable[[Implementation, Problem], bool]
Test = Callable[[Implementation], None]
# After so many problems for none of which a law can be stated, there is none inside a domain.
REFUSALS = 40


@dataclass(frozen=True)
class Property:
    """A law.

    Parameters
    ----------
    law : callable
        Compares all that an implementation returns for a problem, and returns the comparisons.
    problems : strategy of Problem
    needs : frozenset of str
        The claims without which the law says nothing.
    share, fewest : float
        Of the profile's number of examples, for a fast implementation; for one that gets a part of those, at least.
    about : callable
        Whether a problem exercises the law: one that Hypothesis invents and that does not is rejected.
    any_size : bool
        Whether it is made for large problems: where a domain has no others, it has its examples all the same.
    cheap : bool
        Whether its problems are as they are for those, too, that do not claim `large`: no law costs less than this one.
    sections : tuple of str
        Of `SPEC.md`.
    """

    law: Law
    problems: SearchStrategy[Problem]
    needs: frozenset[str]
    share: float
    about: About = lambda implementation, problem: True
    any_size: bool = False
    cheap: bool = False
    sections: tuple[str, ...] = ()
    fewest: float = 0.0

    @property
    def name(self) -> str:
        """The name of its test."""
        return self.law.__name__

    @property
    def file(self) -> str:
        """The file of its test, without its ending."""
        return self.law.__module__.rpartition(".")[2]

    def check(self, implementation: Implementation, problem: Problem, recorder: Recorder | None = None) -> Found:
        """Put a problem before an implementation, and return the comparisons: none, if there is nothing to compare.

        Parameters
        ----------
        implementation : Implementation
        problem : Problem
            The parts that the implementation does not claim are left out. Nothing is compared where the law cannot be
            stated inside its domain.
        recorder : Recorder or None
            Counts the example.
        """
        recorder = recorder or Recorder()
        problem = self.restricted(problem, implementation)
        found: Found = []
        try:
            with limited(recorder.seconds), answering():
                found = with_room(self.law)(counted(contained(implementation), recorder.envelope), problem)
            if not isinstance(found, list):
                raise TypeError(f"a law must return its comparisons, got {found!r} of {self.name}")
        except OutsideDomain as refused:
            found = []
            recorder.outside(str(refused))
        except oracle.Unsettled as error:
            found = unsettled(error)
        except (Exception, Hanging) as error:
            found = list(getattr(error, "found", ()))
            recorder.failure(problem, error)
            error.add_note(explanation(implementation, problem, recorder))
            if is_fatal(error):
                raise DeviceLost from error
            raise
        finally:
            half = problem.dtype in HALF and has_narrow_operands(implementation, problem.inputs())
            recorder.example(self.name, problem, found, half)
        return found

    def restricted(self, problem: Problem, implementation: Implementation) -> Problem:
        """Return the nearest problem that an implementation with its claims takes."""
        return problem.restricted(implementation.claims | ({"large"} if self.cheap else set()))

    def posed(self, implementation: Implementation, problem: Problem) -> Problem | None:
        """Return the most similar problem of an implementation's claims and domain; None if it exercises nothing."""
        nearest = implementation.domain.nearest(self.restricted(problem, implementation))
        return nearest if self.about(implementation, nearest) else None

    def test(self, recorder: Recorder | None = None, share: float = 1.0, **options: Any) -> Test:
        """Return the law as a test of problems that Hypothesis invents, with these settings.

        A problem that the law is not about is rejected, and Hypothesis draws another.
        """
        recorder, refused = recorder or Recorder(), 0

        @functools.wraps(self.law)
        def checked(implementation: Implementation, problem: Problem) -> None:
            nonlocal refused
            posed = self.posed(implementation, problem)
            found = self.check(implementation, posed, recorder) if posed else []
            if not found:
                refused += 1
                give_up(implementation, recorder, refused)
                reject()
            drive_to_the_worst(found)

        return self.drawn(checked, share, **options)

    def drawn(self, function: Callable[[Implementation, Problem], None], share: float, **options: Any) -> Test:
        """Return a function of the law's problems as a test of those that Hypothesis invents."""
        examples = max(1, math.ceil(max(self.share * share, self.fewest) * settings().max_examples))
        test: Test = settings(max_examples=examples, **options)(given(problem=self.problems)(function))
        return test

    def replay(self, problem: Problem, recorder: Recorder | None = None) -> Test:
        """Return the law as a test of one problem."""

        def replayed(implementation: Implementation) -> None:
            self.check(implementation, problem, recorder)

        return replayed


# Every property by its test's name, so that fixtures and meta-tests can check any problem.
PROPERTIES: dict[str, Property] = {}


def law(
    *numbers: str,
    problems: SearchStrategy[Problem],
    needs: Iterable[str] = (),
    share: float = 1.0,
    about: About = Property.about,
    any_size: bool = False,
    cheap: bool = False,
    fewest: float = 0.0,
) -> Callable[[Law], Test]:
    """Make a property of a function of an implementation and a problem.

    Parameters
    ----------
    *numbers : str
        The sections of `SPEC.md` it comes from: "5.2" is law 2.
    problems : strategy of Problem
    needs : iterable of str
        Claims without which the law says nothing.
    share, about, any_size, cheap, fewest
        See `Property`.
    """

    def decorate(function: Law) -> Test:
        found = Property(function, problems, frozenset(needs), share, about, any_size, cheap, numbers, fewest)
        PROPERTIES[found.name] = found
        return pytest.mark.law(*numbers, needs=found.needs)(found.test())

    return decorate


def has_wide_range(implementation: Implementation, problem: Problem) -> bool:
    """Whether the format of the inputs has the range of float32 or more."""
    return problem.dtype != "float16"


def give_up(implementation: Implementation, recorder: Recorder, refused: int) -> None:
    """Skip a law for which no problem was found inside the domain of an implementation."""
    if refused >= REFUSALS and str(implementation.domain) and not recorder.facts.compared:
        if not recorder.unclaimed:
            recorder.outside(f"no problem inside {implementation.domain} exercises it, or none small enough")
        pytest.skip(recorder.unclaimed)


def drive_to_the_worst(found: Found) -> None:
    """Let a deep search look for the largest error / bound; in a short search that would only narrow the problems."""
    ratio = max((one.ratio for one in found if not one.narrow), default=0.0)
    deep = settings.get_current_profile_name() == "deep"
    if deep and currently_in_test_context() and math.isfinite(ratio):
        target(ratio, label="error / bound")


def explanation(implementation: Implementation, problem: Problem, recorder: Recorder) -> str:
    """Describe a failed example, and how to run it again."""
    versions = f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    lines = [f"implementation: {implementation.name} on {implementation.device}; {versions}", f"problem: {problem!r}"]
    if problem.tokens * problem.H <= 8:
        inputs = problem.inputs()
        lines += [f"    {name} = {getattr(inputs, name).tolist()}" for name in ("theta", "alpha", "eta")]
    lines.append(f"replay: {recorder.replay(problem)}")
    return "\n".join(lines)

"""The facts of a test, summed over its examples, and the verdict that has them."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import oracle
from properties.harness.comparing import Comparison, Found
from properties.problems.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts of one test of one implementation.

    Parameters
    ----------
    calls : int
        Problems put before the law, also while Hypothesis shrinks.
    compared : int
        How many of them had something to compare, with the oracle or with another run.
    examples, ill_conditioned, half, half_ill_conditioned, finite, exact : int
        How many of them were compared with the oracle; where the bound says nothing; both with products whose operands
        have half precision; where every number had to be finite; where every bit had to be right.
    error, ratio : float
        The worst error in ulps of the largest number of its result, and the worst error / bound.
    heads : float
        The largest share of heads, of one result, that are more than twice as far off as the definition.
    result, problem : str
        The result that has the worst ratio, and the problem, as JSON.
    tightness : dict
        The worst error / bound of each result, by "memory stage result"; in the ratchet, error / stored error.
    worst : dict
        The worst error in ulps with its problem, by "law dtype"; ill-conditioned examples left out.
    said : dict
        By result: the comparisons with the oracle; those with some radius above the largest exact value, and those with
        exact values that are all 0; the elements, and those without a verdict.
    failing_call : int
        Which call failed first; 0: none.
    failing_problem, message, replay : str
        The smallest problem that fails, its error, and the command that replays it.
    refused, outside : int, str
        The calls for which the law cannot be stated inside the implementation's domain, and the reason for the last.
    sizes : dict
        The calls in which something was compared, by "D C".
    envelope : dict
        The calls of the implementation, several in most examples, by size and by the way of calling: see `envelope`.
    """

    calls: int = 0
    compared: int = 0
    examples: int = 0
    ill_conditioned: int = 0
    half: int = 0
    half_ill_conditioned: int = 0
    finite: int = 0
    exact: int = 0
    error: float = 0.0
    ratio: float = 0.0
    heads: float = 0.0
    result: str = ""
    problem: str = ""
    tightness: Mapping[str, float] = field(default_factory=dict)
    worst: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    said: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    failing_call: int = 0
    failing_problem: str = ""
    message: str = ""
    replay: str = ""
    refused: int = 0
    outside: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    envelope: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the facts by name."""
        return {f.name: getattr(self, f.name) for f in fields(Facts)}

    def with_example(self, law: str, problem: Problem, found: Found, half: bool) -> "Facts":
        """Return the facts with one more example.

        Parameters
        ----------
        law : str
        problem : Problem
        found : list of Comparison
        half : bool
            Whether the operands of its products have half precision.
        """
        judged = [one for one in found if one.oracle]
        seen, unsure = bool(judged), any(one.ill_conditioned for one in judged)
        measured = [one for one in judged if not one.narrow]
        error, widest = worst_error(found), max(measured, key=lambda one: one.ratio, default=None)
        compared, size = any(one.elements for one in found), f"{problem.D} {problem.C}"
        now = replace(
            self,
            sizes={**self.sizes, size: self.sizes.get(size, 0) + 1} if compared else self.sizes,
            calls=self.calls + 1,
            compared=self.compared + compared,
            examples=self.examples + seen,
            ill_conditioned=self.ill_conditioned + unsure,
            half=self.half + (seen and half),
            half_ill_conditioned=self.half_ill_conditioned + (unsure and half),
            finite=self.finite + (seen and all(one.finite for one in judged)),
            exact=self.exact + any(one.exact for one in judged),
            error=max(self.error, error),
            heads=max(self.heads, *(one.heads for one in found), 0.0),
        )
        if widest and widest.ratio > now.ratio:
            now = replace(now, ratio=widest.ratio, result=widest.result, problem=problem.to_json())
        key = f"{law} {problem.dtype}"
        if not unsure and error > self.worst.get(key, (0.0, ""))[0]:
            now = replace(now, worst={**self.worst, key: (error, problem.to_json())})
        ratios = dict(self.tightness)
        for one in (one for one in measured if one.stage):
            name = f"{one.stage} {one.result}"
            ratios[name] = max(one.ratio, ratios.get(name, 0.0))
        return replace(now, tightness=ratios, said=added(self.said, judged))


def added(said: Mapping[str, tuple[int, ...]], judged: Found) -> dict[str, tuple[int, ...]]:
    """Return how much some comparisons with the oracle say, added to the same of others; see `Facts.said`."""
    total = dict(said)
    for one in judged:
        now = 1, int(one.empty), int(one.zero), one.elements, one.unjudged
        total[one.result] = tuple(x + y for x, y in zip(total.get(one.result, (0,) * len(now)), now, strict=True))
    return total


def worst_error(found: Found) -> float:
    """Return the worst error of an example, in ulps."""
    return max((one.ulps for one in found if not one.narrow), default=0.0)


def unsettled(error: oracle.Unsettled) -> Found:
    """Return the comparison with an oracle that has no answer: it says nothing."""
    return [Comparison(str(error), 0, ill_conditioned=True, finite=True)]


class Recorder:
    """Sums the facts of one running test.

    Parameters
    ----------
    test : str
        Its node id, for the command that replays a failure.
    options : sequence of (name, value)
        The options of the run that this command repeats.
    seconds : float
        The time that an example may take; 0: any.
    """

    def __init__(self, test: str = "TEST", options: Sequence[tuple[str, str]] = (), seconds: float = 0) -> None:
        self.test, self.options, self.seconds, self.facts = test, options, seconds, Facts()
        self.envelope = Counter[str]()

    def example(self, law: str, problem: Problem, found: Found, half: bool) -> None:
        """Count an example."""
        self.facts = replace(self.facts.with_example(law, problem, found, half), envelope=dict(self.envelope))

    def failure(self, problem: Problem, error: BaseException) -> None:
        """Note that the next example fails; Hypothesis shows the smallest one last."""
        self.facts = replace(
            self.facts,
            failing_call=self.facts.failing_call or self.facts.calls + 1,
            failing_problem=problem.to_json(),
            message=f"{type(error).__name__}: {error}",
            replay=self.replay(problem),
        )

    def outside(self, reason: str) -> None:
        """Note that the next example asks for a call outside the implementation's domain."""
        self.facts = replace(self.facts, refused=self.facts.refused + 1, outside=reason)

    @property
    def unclaimed(self) -> str:
        """The reason why the law cannot be stated inside the implementation's domain, where it never was."""
        return "" if self.facts.compared or self.facts.failing_call else self.facts.outside

    def ended(self, error: BaseException) -> None:
        """Note how a test ended, unless a law has said so."""
        self.facts = replace(self.facts, message=self.facts.message or f"{type(error).__name__}: {error}")

    def ratio(self, name: str, ratio: float) -> None:
        """Note an error over the size that it may have."""
        self.facts = replace(self.facts, tightness={**self.facts.tightness, name: ratio})

    def replay(self, problem: Problem) -> str:
        """Return the command that runs the test on this problem."""
        return f"{self.command} --replay {shlex.quote(problem.to_json())}"

    @property
    def command(self) -> str:
        """The command that runs the test."""
        options = "".join(f" {name} {shlex.quote(value)}" for name, value in self.options)
        return f"pytest {shlex.quote(self.test)}{options}"


@dataclass(frozen=True)
class Verdict(Facts):
    """The verdict on one law and one implementation; its fields are those of `--verdicts FILE`.

    Parameters
    ----------
    test : str
        Its node id.
    law, implementation, device : str
    verdict : {"pass", "pass (quick)", "fail", "not claimed", "error"}
        "pass (quick)": no example of a run that ended with its time failed. "error": the test has no result, since it
        did not get as far as its law, its process died or the time was up.
    sections : tuple of str
        Of `SPEC.md`.
    lacking : tuple of str
        The claims without which the law says nothing.
    domain : str
        Where the implementation is defined, if not everywhere.
    """

    test: str
    law: str
    implementation: str
    verdict: str
    device: str = "cpu"
    sections: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    domain: str = ""

    @property
    def passed(self) -> bool:
        """Whether no example failed."""
        return self.verdict in ("pass", "pass (quick)")

    @property
    def went_wrong(self) -> bool:
        """Whether an example failed, or the test has no result."""
        return self.verdict in ("fail", "error")

"""What a run says in the end: a verdict of each law on each implementation, as text, as JSON and in JUnit's XML."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# What a property of a test's report begins with; JUnit's XML has them too.
PREFIX = "titans."
REPLAYED = ("test_fixture",)


@dataclass(frozen=True)
class Verdict:
    """What one test of one implementation came to; the fields of `--verdicts FILE`.

    Parameters
    ----------
    test : str
        Its node id.
    law, implementation : str
    verdict : {"pass", "fail", "not claimed", "error"}
        "error": the test did not get as far as its law.
    sections : tuple of str
        Of `SPEC.md`.
    lacking : tuple of str
        The claims without which the law says nothing.
    calls : int
        Problems put before the law.
    examples, ill_conditioned, finite, exact : int
        How many of them were compared with the oracle; where the bound says nothing; where every number had to be
        finite; where every bit had to be right.
    error, ratio : float
        The worst error in ulps of the largest number of its result, and the worst error / bound.
    result, problem : str
        The result that has the worst ratio, and the problem, as JSON.
    tightness : dict
        The worst error / bound of each stage and result, by "stage result".
    failing_call : int
        Which call failed first; 0: none.
    failing_problem, message, replay : str
        The smallest problem that fails, what is wrong with it, and the command that shows it again.
    """

    test: str
    law: str
    implementation: str
    verdict: str
    sections: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    calls: int = 0
    examples: int = 0
    ill_conditioned: int = 0
    finite: int = 0
    exact: int = 0
    error: float = 0.0
    ratio: float = 0.0
    result: str = ""
    problem: str = ""
    tightness: dict[str, float] = field(default_factory=dict)
    failing_call: int = 0
    failing_problem: str = ""
    message: str = ""
    replay: str = ""


def properties(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return facts as they travel in a report, from a worker and into JUnit's XML."""
    return [(PREFIX + name, fact) for name, fact in facts.items()]


def read(test: str, outcome: str, user_properties: Iterable[tuple[str, Any]]) -> Verdict | None:
    """Return the verdict in a report, if it is one on an implementation."""
    facts = {name.removeprefix(PREFIX): fact for name, fact in user_properties if name.startswith(PREFIX)}
    if not facts.get("implementation"):
        return None
    lists = {name: tuple(facts.get(name, ())) for name in ("sections", "lacking")}
    return Verdict(**facts | lists | {"test": test, "verdict": outcome})


def write_json(path: Path, verdicts: list[Verdict], about: dict[str, Any]) -> None:
    """Write what the run was about and all verdicts; a ratio that is not finite is a text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = about | {"verdicts": [asdict(verdict) for verdict in verdicts]}
    path.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _finite(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def table(verdicts: list[Verdict]) -> list[str]:
    """Return a line for each law that all implementations obey, and one for each implementation otherwise."""
    head = f"  {'law':70} {'verdict':12} {'examples':>8} {'error (ulp)':>11} {'error/bound':>11}  worst in"
    lines = [head]
    for law in dict.fromkeys(verdict.law for verdict in verdicts):
        rows = [verdict for verdict in verdicts if verdict.law == law]
        failed = [row for row in rows if row.verdict in ("fail", "error")]
        unclaimed = [row for row in rows if row.verdict == "not claimed"]
        passed = [row for row in rows if row.verdict == "pass"]
        if passed:
            lines.append(line(law, "pass", passed))
        for implementation in dict.fromkeys(row.implementation for row in unclaimed):
            lacking = next(row.lacking for row in unclaimed if row.implementation == implementation)
            lines.append(f"  {shown(law):70} not claimed  {implementation} lacks {', '.join(lacking)}")
        for row in failed:
            lines.append(line(law, row.verdict.upper(), [row]))
    return lines


def shown(law: str) -> str:
    """Return the name of a law without what they all begin with."""
    return law.removeprefix("test_")


def line(law: str, verdict: str, rows: list[Verdict]) -> str:
    """Show what some implementations made of a law."""
    # A law that compares bits has no error.
    compared = any(row.examples for row in rows)
    worst = max(rows, key=lambda row: row.ratio)
    error, ratio = (f"{max(row.error for row in rows):.3g}", f"{worst.ratio:.3f}") if compared else ("", "bits")
    names = ",".join(dict.fromkeys(row.implementation for row in rows))
    where = f"{worst.result} {worst.implementation}" if compared else names
    return f"  {shown(law):70} {verdict:12} {sum(row.calls for row in rows):8} {error:>11} {ratio:>11}  {where}"


def failures(verdicts: list[Verdict]) -> list[str]:
    """Return all there is to say of each failure."""
    lines = []
    for row in verdicts:
        if row.verdict not in ("fail", "error"):
            continue
        lines += [
            f"  {row.law}[{row.implementation}] fails, first at example {row.failing_call}",
            *(f"    {text}" for text in row.message.splitlines()[:8]),
            f"    smallest failing problem: {row.failing_problem}",
            f"    replay: {row.replay}",
        ]
    return lines


def summary(verdicts: list[Verdict]) -> list[str]:
    """Return how much was checked."""
    generated = [verdict for verdict in verdicts if verdict.law not in REPLAYED]
    examples, unsure = (sum(getattr(row, name) for row in generated) for name in ("examples", "ill_conditioned"))
    return [
        f"{examples} generated examples checked against the oracle, {unsure} of them ill-conditioned "
        f"(some radius above half of the largest exact value); {len(verdicts) - len(generated)} replays of fixtures"
    ]

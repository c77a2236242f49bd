"""The summary of a run: a verdict on each law and implementation, as text, as JSON and in JUnit's XML."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from properties.harness import corpus, files
from properties.harness.facts import Verdict
from properties.harness.sections import REPLAYED, SECTIONS

# The first part of the names of a report's properties, which JUnit's XML has, too.
PREFIX = "titans."
# The version of the JSON: `properties/verdicts.schema.json`.
SCHEMA = 1
# The share of examples that may be ill-conditioned, where there are enough: the problems are difficult.
ILL_CONDITIONED, ENOUGH = 0.1, 1000
# The width of a law in a table; longer names have a line of their own.
LABEL = 58


def properties(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return facts as they travel in a report, from a worker and into JUnit's XML."""
    return [(PREFIX + name, fact) for name, fact in facts.items()]


def read(
    test: str, outcome: str, lacking: tuple[str, ...], user_properties: Iterable[tuple[str, Any]]
) -> Verdict | None:
    """Return the verdict in a report, if it is one on an implementation."""
    facts = {name.removeprefix(PREFIX): fact for name, fact in user_properties if name.startswith(PREFIX)}
    if not facts.get("implementation"):
        return None
    lists = {name: tuple(facts.get(name, ())) for name in ("sections", "lacking")}
    lists["lacking"] = lists["lacking"] or (() if facts.get("outside") else lacking)
    return Verdict(**facts | lists | {"test": test, "verdict": outcome})


def write_json(path: Path, verdicts: Sequence[Verdict], about: dict[str, Any]) -> None:
    """Write the header of the run and all verdicts; a ratio that is not finite is a text."""
    content = {"schema": SCHEMA} | about | {"verdicts": [asdict(verdict) for verdict in verdicts]}
    files.write(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _finite(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def table(verdicts: Sequence[Verdict]) -> list[str]:
    """Return a line for each law that all implementations obey, and one for each implementation otherwise."""
    several = len({row.implementation for row in verdicts}) > 1
    lines = [labelled("law", f" {'verdict':12}{'examples':>8} {'of bound':>8} in")]
    for law in dict.fromkeys(verdict.law for verdict in verdicts):
        rows = [verdict for verdict in verdicts if verdict.law == law]
        unclaimed = [row for row in rows if row.verdict == "not claimed"]
        if passed := [row for row in rows if row.passed]:
            lines.append(line(law, passed[0].verdict, passed, several))
        for implementation in dict.fromkeys(row.implementation for row in unclaimed):
            row = next(row for row in unclaimed if row.implementation == implementation)
            reason = f": {row.outside}" if row.outside else f" lacks {', '.join(row.lacking)}"
            lines.append(labelled(shown(law), f" not claimed  {implementation}{reason}"))
        errors = [row for row in rows if row.verdict == "error"]
        for row in rows if len(errors) == 1 else [x for x in rows if x.verdict != "error"]:
            if row.went_wrong:
                lines.append(line(law + fixture(row), row.verdict.upper(), [row], several))
        if len(errors) > 1:
            lines.append(line(f"{law} ({len(errors)} tests)", "ERROR", errors, several))
    return lines


def labelled(label: str, cells: str, width: int = LABEL) -> str:
    """Return a line of a table: its cells stand on a line of their own where the label is long."""
    return f"  {label:{width}}{cells}" if len(label) <= width else f"  {label}\n  {'':{width}}{cells}"


def shown(law: str) -> str:
    """Return the name of a law without its first word, `test`."""
    return law.removeprefix("test_")


def fixture(row: Verdict) -> str:
    """Return which fixture a verdict is on, if it is on one: the rest of the test's name."""
    return row.test.partition(f"[{row.implementation}")[2].removesuffix("]").replace("-", " ", 1)


def brief(x: float) -> str:
    """Show a ratio: to three places, or to three digits where it is huge."""
    return f"{x:.3f}" if x < 1000 else f"{x:.3g}"


def line(law: str, verdict: str, rows: Sequence[Verdict], several: bool) -> str:
    """Show one line for a law and some implementations, of which there are several in the run or just one."""
    # A law that compares bits has no error.
    compared = any(row.examples for row in rows)
    worst = max(rows, key=lambda row: row.ratio)
    ratio, where = (brief(worst.ratio), worst.result) if compared else ("bits", "")
    where = worst.implementation if several and worst.went_wrong else where
    cells = f" {verdict:12}{sum(row.compared for row in rows):8} {ratio:>8} {where}"
    return labelled(shown(law), cells).rstrip()


def failures(verdicts: Sequence[Verdict]) -> list[str]:
    """Return all there is to say of each failure; laws that lack a result for the same reason are listed together."""
    lines = []
    for row in verdicts:
        alike = [other for other in verdicts if other.verdict == "error" and other.message == row.message]
        if not row.went_wrong or (len(alike) > 1 and row.verdict == "error"):
            continue
        lines += [
            f"  {row.law}{fixture(row)}[{row.implementation}] {ending(row)}",
            *(f"    {text}" for text in row.message.splitlines()[:8]),
            *([f"    smallest failing problem: {row.failing_problem}"] if row.failing_problem else []),
            f"    replay: {row.replay}",
        ]
    for message, count in Counter(row.message for row in verdicts if row.verdict == "error").items():
        if count > 1:
            lines += [f"  {count} tests have no result", *(f"    {text}" for text in message.splitlines()[:8])]
    return lines


def ending(row: Verdict) -> str:
    """Say how a test went wrong."""
    if row.failing_problem:
        return f"fails, first at example {row.failing_call}"
    return "fails" if row.verdict == "fail" else "has no result"


def too_many_ill_conditioned(verdicts: Sequence[Verdict]) -> str:
    """Say so where the bounds say nothing of too many examples of an implementation.

    The share is that of all laws together: of a few it may be larger.
    """
    for name in dict.fromkeys(row.implementation for row in verdicts):
        rows = [row for row in verdicts if row.implementation == name and row.law not in REPLAYED]
        if corpus.left_out([(row.law, name) for row in verdicts if row.implementation == name], [name]):
            continue
        examples, unsure = sum(row.examples for row in rows), sum(row.ill_conditioned for row in rows)
        if examples >= ENOUGH and unsure > ILL_CONDITIONED * examples:
            return f"{unsure} of the {examples} examples of {name} are ill-conditioned: the run says too little"
    return ""


def summary(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the verdicts of section 4 of `SPEC.md`, with numbers, and how much was checked."""
    generated = [row for row in verdicts if row.law not in REPLAYED]
    examples, unsure = (sum(getattr(row, name) for row in generated) for name in ("examples", "ill_conditioned"))
    return [
        *(f"  {line}" for section in SECTIONS for line in section(verdicts)),
        f"{examples} generated examples checked against the oracle; {len(verdicts) - len(generated)} replays",
        f"{unsure} of the examples are ill-conditioned: some radius is above half of the largest exact value",
        *how_much(generated),
        *inside(verdicts),
    ]


def how_much(verdicts: Sequence[Verdict]) -> list[str]:
    """Return for each result how much its comparisons say."""
    said: dict[str, list[int]] = {}
    for name, counts in ((name, counts) for row in verdicts for name, counts in row.said.items()):
        said[name] = [x + y for x, y in zip(said.get(name, [0] * len(counts)), counts, strict=True)]
    titles = ("comparisons", "radius > size", "exact all 0", "elements", "without verdict")
    lines = [f"  {'of each result':14}" + "".join(f"{title:>16}" for title in titles)] if said else []
    return lines + [f"    {name:12}" + "".join(f"{x:16}" for x in counts) for name, counts in sorted(said.items())]


def inside(verdicts: Sequence[Verdict]) -> list[str]:
    """Return how many calls were compared at which width and chunk length, where a domain was declared."""
    lines = []
    for name in dict.fromkeys(row.implementation for row in verdicts if row.domain):
        rows = [row for row in verdicts if row.implementation == name]
        counts = Counter[str]()
        for row in rows:
            counts.update(row.sizes)
        sizes = sorted((*map(int, size.split()), count) for size, count in counts.items())
        lines += [
            f"{name} is defined for {rows[0].domain}; outside that, {sum(row.refused for row in rows)} calls not made",
            *(f"    D = {D:<4} C = {C:<4} {count:6} examples" for D, C, count in sizes),
        ]
    return lines

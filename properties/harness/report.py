"""The summary of a run: a verdict on each law and implementation, as text, as JSON and in JUnit's XML."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from properties.harness import files, ratchet
from properties.harness.facts import Verdict

# The first part of the names of a report's properties, which JUnit's XML has, too.
PREFIX = "titans."
REPLAYED = ("test_fixture", "test_ratchet")
# The share of examples that may be ill-conditioned, where there are enough: the problems are difficult.
ILL_CONDITIONED, ENOUGH = 0.1, 1000
GATES = ("theta", "alpha", "eta")


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


def write_json(path: Path, verdicts: list[Verdict], about: dict[str, Any]) -> None:
    """Write the header of the run and all verdicts; a ratio that is not finite is a text."""
    content = about | {"verdicts": [asdict(verdict) for verdict in verdicts]}
    files.write(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


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
            row = next(row for row in unclaimed if row.implementation == implementation)
            reason = f": {row.outside}" if row.outside else f" lacks {', '.join(row.lacking)}"
            lines.append(f"  {shown(law):70} not claimed  {implementation}{reason}")
        for row in failed:
            lines.append(line(law + fixture(row), row.verdict.upper(), [row]))
    return lines


def shown(law: str) -> str:
    """Return the name of a law without its first word, `test`."""
    return law.removeprefix("test_")


def fixture(row: Verdict) -> str:
    """Return which fixture a verdict is on, if it is on one: the rest of the test's name."""
    return row.test.partition(f"[{row.implementation}")[2].removesuffix("]").replace("-", " ", 1)


def brief(x: float) -> str:
    """Show a ratio: to three places, or to three digits where it is huge."""
    return f"{x:.3f}" if x < 1000 else f"{x:.3g}"


def line(law: str, verdict: str, rows: list[Verdict]) -> str:
    """Show one line for a law and some implementations."""
    # A law that compares bits has no error.
    compared = any(row.examples for row in rows)
    worst = max(rows, key=lambda row: row.ratio)
    error, ratio = (f"{max(row.error for row in rows):.3g}", brief(worst.ratio)) if compared else ("", "bits")
    names = ",".join(dict.fromkeys(row.implementation for row in rows))
    where = f"{worst.result} {worst.implementation}" if compared else names
    return f"  {shown(law):70} {verdict:12} {sum(row.compared for row in rows):8} {error:>11} {ratio:>11}  {where}"


def failures(verdicts: list[Verdict]) -> list[str]:
    """Return all there is to say of each failure."""
    lines = []
    for row in verdicts:
        if row.verdict not in ("fail", "error"):
            continue
        lines += [
            f"  {row.law}{fixture(row)}[{row.implementation}] {ending(row)}",
            *(f"    {text}" for text in row.message.splitlines()[:8]),
            *([f"    smallest failing problem: {row.failing_problem}"] if row.failing_problem else []),
            f"    replay: {row.replay}",
        ]
    return lines


def ending(row: Verdict) -> str:
    """Say how a test went wrong."""
    if row.failing_problem:
        return f"fails, first at example {row.failing_call}"
    return "fails" if row.verdict == "fail" else "has no result"


def too_many_ill_conditioned(verdicts: list[Verdict]) -> str:
    """Say so where the bounds say nothing of too many examples of an implementation."""
    for name in dict.fromkeys(row.implementation for row in verdicts):
        rows = [row for row in verdicts if row.implementation == name and row.law not in REPLAYED]
        examples, unsure = sum(row.examples for row in rows), sum(row.ill_conditioned for row in rows)
        if examples >= ENOUGH and unsure > ILL_CONDITIONED * examples:
            return f"{unsure} of the {examples} examples of {name} are ill-conditioned: the run says too little"
    return ""


def summary(verdicts: list[Verdict]) -> list[str]:
    """Return the verdicts of section 4 of `SPEC.md`, with numbers, and how much was checked."""
    generated = [row for row in verdicts if row.law not in REPLAYED]
    examples, unsure = (sum(getattr(row, name) for row in generated) for name in ("examples", "ill_conditioned"))
    return [
        *(f"  {line}" for section in SECTIONS for line in section(verdicts)),
        f"{examples} generated examples checked against the oracle, {unsure} of them ill-conditioned "
        f"(some radius above half of the largest exact value); {len(verdicts) - len(generated)} replays",
        *how_much(generated),
        *inside(verdicts),
    ]


def how_much(verdicts: list[Verdict]) -> list[str]:
    """Return for each result how much its comparisons say."""
    said: dict[str, list[int]] = {}
    for name, counts in ((name, counts) for row in verdicts for name, counts in row.said.items()):
        said[name] = [x + y for x, y in zip(said.get(name, [0] * len(counts)), counts, strict=True)]
    titles = ("comparisons", "radius > size", "exact all 0", "elements", "without verdict")
    lines = [f"  {'of each result':20}" + "".join(f"{title:>17}" for title in titles)]
    return lines + [f"    {name:18}" + "".join(f"{x:17}" for x in counts) for name, counts in sorted(said.items())]


def inside(verdicts: list[Verdict]) -> list[str]:
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


def outcome(verdicts: list[Verdict], of: list[Verdict]) -> str:
    """Return one word for some verdicts of a run: none passes where a law of the run has no result."""
    given = {row.verdict for row in verdicts}
    if "fail" in given:
        return "FAIL"
    if any(row.verdict == "error" for row in of):
        return "not complete"
    return "pass" if "pass" in given else "not checked"


def of_section(verdicts: list[Verdict], section: str) -> list[Verdict]:
    """Return the verdicts on the laws of a section."""
    return [row for row in verdicts if section in row.sections]


def finite(verdicts: list[Verdict]) -> list[str]:
    """Section 4.1."""
    laws, numbers = of_section(verdicts, "4.1"), sum(row.finite for row in verdicts)
    return [f"4.1 finite: {outcome(laws, verdicts)}; {numbers} examples had to be finite in every number"]


def bound(verdicts: list[Verdict]) -> list[str]:
    """Section 4.2: never exceeded, and how far above the errors seen."""
    compared = [row for row in verdicts if row.examples or row.verdict in ("fail", "error")]
    lines = [
        f"4.2 bound: {outcome(compared, verdicts)}; bound / worst error seen is that of each stage's loosest result"
    ]
    names = list(dict.fromkeys(row.implementation for row in compared))
    lines.append(f"    {'':38}" + "".join(f"{name:>20}" for name in names))
    rows = {name: [row for row in compared if row.implementation == name] for name in names}
    for title, fact in (
        ("examples", "examples"),
        ("ill-conditioned", "ill_conditioned"),
        ("examples, half", "half"),
        ("ill-conditioned, half", "half_ill_conditioned"),
    ):
        counts = [sum(getattr(row, fact) for row in rows[name] if row.law not in REPLAYED) for name in names]
        if any(counts) or fact in ("examples", "ill_conditioned"):
            lines.append(f"    {title:38}" + "".join(f"{count:20}" for count in counts))
    for title, (stage, results, aim) in STAGES.items():
        loosest = [slack(rows[name], stage, results) for name in names]
        if any(loosest):
            cells = "".join(f"{f'{found[0]:.1f} {found[1]}' if found else '':>20}" for found in loosest)
            missed = [name for name, found in zip(names, loosest, strict=True) if found and found[0] > aim]
            lines.append(f"    {title:38}{cells}   aim {aim}" + (f", MISSED by {', '.join(missed)}" if missed else ""))
    return lines


# By the name of a row: the stage and the results in it, and how many times the errors seen a bound may be.
GRADIENTS = tuple(f"d{x}" for x in ("q", "k", "v", "w", "b", *GATES, "M", "S"))
STAGES: dict[str, tuple[str, tuple[str, ...], int]] = {
    "coefficients": ("coefficients", ("coefficients", "momentum"), 30),
} | {
    f"{title}, {memory}": (f"{memory} {stage}", results, aim)
    for memory in ("plain", "normalised", "plain half", "normalised half")
    for title, stage, results, aim in (
        ("state of a piece", "piece", ("M", "S"), 30),
        ("output of a piece", "piece", ("o",), 30),
        ("gradients of a piece", "piece", GRADIENTS, 30),
        ("values, end to end", "end to end", ("o", "M", "S"), 1000),
        ("gradients, end to end", "end to end", GRADIENTS, 1000),
    )
}


def slack(rows: list[Verdict], stage: str, results: tuple[str, ...]) -> tuple[float, str] | None:
    """Return how many times the worst error the bound is, for the loosest result of a stage, and which that is."""
    worst: dict[str, float] = {}
    for row in rows:
        for name in results:
            if (ratio := row.tightness.get(f"{stage} {name}", 0.0)) > 0:
                worst[name] = max(ratio, worst.get(name, 0.0))
    return max((1 / ratio, name) for name, ratio in worst.items()) if worst else None


def definition(verdicts: list[Verdict]) -> list[str]:
    """Section 4.3."""
    laws = of_section(verdicts, "4.3")
    said = outcome(laws, verdicts)
    shares = ", ".join(f"{row.implementation} {row.heads:.0%}" for row in laws if row.examples)
    return [f"4.3 not worse than 2x the definition: {said}; heads that were, at most: {shares or 'none seen'}"]


def worst_cases(verdicts: list[Verdict]) -> list[str]:
    """Section 4.4."""
    laws = of_section(verdicts, "4.4")
    now = [ratio for row in laws for name, ratio in row.tightness.items() if name.startswith("ratchet ")]
    stored = ratchet.read()
    worse = sum(
        error > stored.get(ratchet.subject(row.implementation, row.device), {}).get(key, (math.inf, ""))[0]
        for row in verdicts
        for key, (error, _) in ratchet.measured(row).items()
    )
    better = sum(ratio < 1 for ratio in now)
    return [
        f"4.4 ratchet: {outcome(laws, verdicts)}; {len(now)} worst cases replayed, "
        f"at most {max(now, default=0):.2f}x the stored error; {better} better, {worse} worse cases seen elsewhere "
        "(--raise-ratchet stores them)"
    ]


def exact_regime(verdicts: list[Verdict]) -> list[str]:
    """Section 4.5."""
    laws = of_section(verdicts, "4.5")
    numbers = (f"{row.implementation} {row.exact}" for row in laws if row.verdict != "not claimed")
    return [f"4.5 exact regime: {outcome(laws, verdicts)}; examples right in every bit: {', '.join(numbers)}"]


# Of section 4 of `SPEC.md`.
SECTIONS: tuple[Callable[[list[Verdict]], list[str]], ...] = (finite, bound, definition, worst_cases, exact_regime)

"""The verdicts of section 4 of `SPEC.md`, accuracy, each with its numbers."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from properties.harness import ratchet
from properties.harness.facts import Verdict

REPLAYED = ("test_fixture", "test_ratchet")
GATES = ("theta", "alpha", "eta")
# The width of a column: there is one for each implementation.
CELL = 13


def outcome(verdicts: Sequence[Verdict], of: Sequence[Verdict]) -> str:
    """Return one word for some verdicts of a run: none passes where a law of the run has no result."""
    given = {row.verdict for row in verdicts}
    if "fail" in given:
        return "FAIL"
    if any(row.verdict == "error" for row in of):
        return "not complete"
    return min((row.verdict for row in verdicts if row.passed), key=len, default="not checked")


def of_section(verdicts: Sequence[Verdict], section: str) -> Sequence[Verdict]:
    """Return the verdicts on the laws of a section."""
    return [row for row in verdicts if section in row.sections]


def finite(verdicts: Sequence[Verdict]) -> list[str]:
    """Section 4.1."""
    laws, numbers = of_section(verdicts, "4.1"), sum(row.finite for row in verdicts)
    return [f"4.1 finite: {outcome(laws, verdicts)}; {numbers} examples had to be finite in every number"]


def bound(verdicts: Sequence[Verdict]) -> list[str]:
    """Section 4.2: never exceeded, and how far above the errors seen."""
    compared = [row for row in verdicts if row.examples or row.went_wrong]
    lines = [f"4.2 bound: {outcome(compared, verdicts)}"]
    names = list(dict.fromkeys(row.implementation for row in compared))
    rows = {name: [row for row in compared if row.implementation == name] for name in names}
    lines.append(f"    {'':37}" + "".join(f"{short(name):>{CELL}}" for name in names))
    for title, fact in (
        ("examples", "examples"),
        ("ill-conditioned", "ill_conditioned"),
        ("examples, half", "half"),
        ("ill-conditioned, half", "half_ill_conditioned"),
    ):
        counts = [sum(getattr(row, fact) for row in rows[name] if row.law not in REPLAYED) for name in names]
        if any(counts) or fact in ("examples", "ill_conditioned"):
            lines.append(f"    {title:37}" + "".join(f"{count:{CELL}}" for count in counts))
    return lines + looseness(names, rows)


def looseness(names: Sequence[str], rows: Mapping[str, Sequence[Verdict]]) -> list[str]:
    """Return how many times the errors seen the bounds are: for each stage that of the loosest result."""
    lines = []
    for title, (stage, results, aim) in STAGES.items():
        found = [slack(rows[name], stage, results) for name in names]
        if any(found):
            cells = (f"{brief(x[0])}{'*' if x[0] > aim else ' '}{x[1]}" if x else "" for x in found)
            lines.append(f"    {title:37}" + "".join(f"{cell:>{CELL}}" for cell in cells) + f"{aim:5}")
    if lines:
        lines.insert(0, f"    {'bound / worst error, loosest result':37}{'':{CELL * len(names) - 2}}  aim")
    if any("*" in line for line in lines):
        lines.append("    * above the aim: these few examples came less near to the bound. It is no failure.")
    return lines


def brief(x: float) -> str:
    """Show how loose a bound is: to one place, or to three digits where it is huge."""
    return f"{x:.1f}" if x < 1000 else f"{x:.3g}"


def short(name: str) -> str:
    """Return the end of a name, as much of it as a column has room for."""
    return name if len(name) < CELL else f"..{name[3 - CELL :]}"


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


def slack(rows: Sequence[Verdict], stage: str, results: tuple[str, ...]) -> tuple[float, str] | None:
    """Return how many times the worst error the bound is, for the loosest result of a stage, and which that is."""
    worst: dict[str, float] = {}
    for row in rows:
        for name in results:
            if (ratio := row.tightness.get(f"{stage} {name}", 0.0)) > 0:
                worst[name] = max(ratio, worst.get(name, 0.0))
    return max((1 / ratio, name) for name, ratio in worst.items()) if worst else None


def definition(verdicts: Sequence[Verdict]) -> list[str]:
    """Section 4.3."""
    laws = of_section(verdicts, "4.3")
    said = outcome(laws, verdicts)
    laws = [row for row in laws if row.examples]
    seen = {row.implementation: [x.heads for x in laws if x.implementation == row.implementation] for row in laws}
    shares = ", ".join(f"{name} {max(heads):.0%}" for name, heads in seen.items())
    return [f"4.3 not worse than 2x the definition: {said}", f"    heads that were, at most: {shares or 'none seen'}"]


def worst_cases(verdicts: Sequence[Verdict]) -> list[str]:
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
    said = f"; {worse} worse ones among new examples (--raise-ratchet stores them)" if worse else ""
    return [
        f"4.4 ratchet: {outcome(laws, verdicts)}; {len(now)} worst cases replayed",
        f"    at most {max(now, default=0):.2f}x the stored error; {better} better{said}",
    ]


def exact_regime(verdicts: Sequence[Verdict]) -> list[str]:
    """Section 4.5."""
    laws = of_section(verdicts, "4.5")
    counts = Counter[str]()
    for row in laws:
        if row.verdict != "not claimed":
            counts[row.implementation] += row.exact
    numbers = [f"{name} {count}" for name, count in counts.items()]
    return [
        f"4.5 exact regime: {outcome(laws, verdicts)}",
        f"    examples right in every bit: {', '.join(numbers) or 'none seen'}",
    ]


# Of section 4 of `SPEC.md`.
SECTIONS: tuple[Callable[[Sequence[Verdict]], list[str]], ...] = (finite, bound, definition, worst_cases, exact_regime)

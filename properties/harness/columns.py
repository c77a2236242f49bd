"""Several implementations side by side: a line for each law, a column for each implementation."""

from collections.abc import Sequence

from properties.harness.facts import Verdict
from properties.harness.ledger import ORDER
from properties.harness.report import labelled, shown

WIDTH = 12


def columns(verdicts: Sequence[Verdict]) -> list[str]:
    """Return a table with the verdict of each implementation on each law, and how many examples it had."""
    names = list(dict.fromkeys(row.implementation for row in verdicts))
    label = max(30, 98 - WIDTH * len(names))
    lines = [f"  [{i}] {name}" for i, name in enumerate(names, 1)]
    lines.append(labelled("law", "".join(f"{f'[{i}]':>{WIDTH}}" for i in range(1, len(names) + 1)), label))
    for law in dict.fromkeys(row.law for row in verdicts):
        of = [[row for row in verdicts if (row.law, row.implementation) == (law, name)] for name in names]
        lines.append(labelled(shown(law), "".join(f"{cell(rows):>{WIDTH}}" for rows in of), label))
    return lines


def cell(rows: Sequence[Verdict]) -> str:
    """Return the worst of some verdicts in a few letters, with its number."""
    if not rows:
        return "-"
    worst = min(rows, key=lambda row: ORDER.index(row.verdict))
    if worst.verdict == "error":
        return "no result"
    if worst.verdict == "fail":
        return f"FAIL at {worst.failing_call}" if worst.failing_call else "FAIL"
    return f"pass {sum(row.compared for row in rows)}" if worst.passed else "not claimed"

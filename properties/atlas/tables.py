"""The tables of the atlas: verdicts, worst cases, worst cells and faults, as HTML."""

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from properties.atlas.collect import ABSENT, JUDGED, NOT_FINITE, RAISED, UNDERFLOW, UNSURE
from properties.atlas.data import Group, Judged, Measured, short
from properties.atlas.grids import GRIDS
from properties.atlas.spec import sentence
from properties.harness.facts import Verdict
from properties.harness.implementations import BACKENDS
from properties.harness.report import brief, ending

LAW = "properties/test_oracle.py::test_{}_are_the_oracles"


def text(x: object) -> str:
    """Return a text as HTML."""
    return escape(str(x), quote=False)


def table(name: str, title: str, head: Sequence[str], rows: Iterable[str], more: str = "") -> str:
    """Return a table; a head that begins with # is that of numbers. It scrolls by itself, also from the keyboard."""
    cells = "".join(
        f'<th scope="col"{" class=number" if title.startswith("#") else ""}>{text(title.lstrip("#"))}</th>'
        for title in head
    )
    return (
        f'<div class="table {more}" role="region" tabindex="0" aria-label="{escape(title)}">'
        f'<table id="{name}" class="stack"><caption>{text(title)}</caption><thead><tr>{cells}</tr></thead>\n'
        f"<tbody>\n{''.join(rows)}</tbody></table></div>\n"
    )


def cell(of: str, content: object, kind: str = "") -> str:
    """Return a cell of a row; `of` names its column where the screen is too narrow for a head."""
    return f'<td data-of="{of}"{f" class={kind}" if kind else ""}>{text(content)}</td>'


def command(of: str, line: str) -> str:
    """Return a cell with a command to copy."""
    return f'<td data-of="{of}" class=problem>{copied(line)}</td>'


def copied(line: str) -> str:
    """Return a command with a button that copies it."""
    return f'<code>{text(line)}</code> <button type="button" class="copy">copy</button>'


def verdicts(runs: Sequence[Judged]) -> str:
    """Return the table of all verdicts, a row for each law and implementation of each run, what went wrong first."""
    found = [(number, row) for number, run in enumerate(runs, 1) for row in run.verdicts]
    rows = (verdict(number, row) for number, row in sorted(found, key=lambda x: not x[1].went_wrong))
    head = ("law", "SPEC", "implementation", "verdict", "#examples", "#error / bound", "worst in", "run")
    return table("verdicts", "Every law, with its verdict on every implementation", head, rows, "long")


def verdict(run: int, row: Verdict) -> str:
    """Return the row of a verdict; one that went wrong can be unfolded."""
    who = short(row.implementation, row.device)
    kind = "pass" if row.passed else row.verdict if row.went_wrong else "open"
    more = ""
    if row.went_wrong:
        more = (
            f"<details><summary>{text(ending(row))}</summary><pre>{text(row.message)}</pre>"
            f"<p class=problem>{text(row.failing_problem)}</p><div>{copied(row.replay)}</div></details>"
        )
    elif not row.passed:
        more = f"<br><span class=source>{text(row.outside or 'lacks ' + ', '.join(row.lacking))}</span>"
    links = " ".join(f'<a href="#spec-{number}">{number}</a>' for number in row.sections)
    compared = row.examples > 0
    return (
        f'<tr data-implementation="{escape(who)}" data-verdict="{row.verdict}" data-run="{run}">'
        f'<th scope="row">{text(sentence(row))}{more}</th><td data-of="SPEC">{links}</td>'
        + cell("", who)
        + cell("", row.verdict, kind)
        + cell("examples", row.compared, "number")
        + cell("error / bound", brief(row.ratio) if compared else "bits" if row.compared else "", "number")
        + cell("worst in", row.result)
        + cell("run", run)
        + "</tr>\n"
    )


def worst_cases(runs: Sequence[Judged]) -> str:
    """Return the worst error of each implementation, law and dtype, with the command that runs its problem again."""
    worst: dict[tuple[str, str, str, str], tuple[float, str]] = {}
    tests = {(row.implementation, row.device, row.law): row.test for run in runs for row in run.verdicts}
    for row in (row for run in runs for row in run.verdicts):
        for key, case in row.worst.items():
            law, _, dtype = key.rpartition(" ")
            place = row.implementation, row.device, law, dtype
            if place[:3] in tests and math.isfinite(case[0]):
                worst[place] = max(worst.get(place, case), case)
    cases: dict[tuple[str, str, str], list[tuple[str, str, str]]] = {}
    for (implementation, device, law, dtype), (error, problem) in sorted(worst.items()):
        cases.setdefault((implementation, device, law), []).append((dtype, f"{error:.3g}", problem))
    rows = [
        {
            "law": law.removeprefix("test_").replace("_", " "),
            "implementation": short(implementation, device),
            "line": replay(tests[implementation, device, law], implementation, device, ""),
            "cases": found,
        }
        for (implementation, device, law), found in cases.items()
    ]
    head = ("law", "implementation", "dtype", "#error (ulp)", "replay")
    shell = table("worst", "The worst error of each law, implementation and dtype", head, (), "long")
    # Written out, they would be a third of the page.
    return f'{shell}<script type="application/json" data-rows="worst">{embedded(rows)}</script>\n'


def replay(test: str, implementation: str, device: str, problem: str) -> str:
    """Return the command that runs a test on a problem again."""
    options = [] if implementation in BACKENDS else ["--impl", implementation]
    options += [] if device == "cpu" else ["--device", device]
    return shlex.join([".venv/bin/pytest", test, *options, "--replay", problem])


def worst_cells(groups: Iterable[Group]) -> str:
    """Return a row for each small map, with its counts and the command that runs its worst cell again."""
    head = ("map", "implementation", "#cells", "#beyond", "#not finite", "#underflow", "#ill-conditioned",
            "#error / bound", "replay of the worst")  # fmt: skip
    return table("cells", "What the maps show, in numbers", head, map(worst_cell, groups), "long")


def worst_cell(group: Group) -> str:
    """Return the row of a small map."""
    seen = [number for number, cell in enumerate(group.cells) if cell.state != ABSENT]
    counts = {state: sum(group.cells[n].state == state for n in seen) for state in (*"xrui.",)}
    assert set(counts) == {NOT_FINITE, RAISED, UNDERFLOW, UNSURE, JUDGED}
    broken = counts[NOT_FINITE] + counts[RAISED]
    beyond = sum(group.cells[n].ratio > 1 for n in seen) - broken
    at = max(seen, key=lambda n: (group.cells[n].state in (NOT_FINITE, RAISED), group.cells[n].ratio), default=0)
    problem = list(GRIDS[group.grid].problems(group.memory))[at]
    line = replay(f"{LAW.format(group.part)}[{group.implementation}]", group.implementation, group.device,
                  problem.to_json())  # fmt: skip
    worst = group.cells[at].ratio
    return (
        f'<tr><th scope="row">{text(GRIDS[group.grid].title)}, {group.part}, {group.memory}</th>'
        + cell("", group.title)
        + cell("cells", len(seen), "number")
        + cell("beyond the bound", max(beyond, 0), "number")
        + cell("not finite", broken, "number")
        + cell("underflow", counts[UNDERFLOW], "number")
        + cell("ill-conditioned", counts[UNSURE], "number")
        + cell("error / bound", brief(worst) if math.isfinite(worst) else "not finite", "number")
        + command("replay", line)
        + "</tr>\n"
    )


def faults(number: int, measured: Measured) -> str:
    """Return a row for each planted fault: the laws that kill it and the smallest problem."""
    head = ("fault", "verdict", "must be noticed by", "smallest problem")
    return table(f"faults-{number}-table", "Planted faults", head, map(fault, measured.rows), "long")


def fault(row: Mapping[str, Any]) -> str:
    """Return the row of a planted fault."""
    kills, must = len(row["caught"]), ", ".join(name.replace("_", " ") for name in row["must"])
    return (
        f'<tr><th scope="row">{text(row["fault"])}</th>'
        + cell("", f"killed by {kills} law{'s' * (kills > 1)}" if kills else "survives", "pass" if kills else "fail")
        + cell("must be noticed by", must)
        + f'<td data-of="smallest problem" class=problem>{text(row["problem"])}</td></tr>\n'
    )


def compact(values: Sequence[dict[str, object]]) -> dict[str, object]:
    """Return rows with the same fields as one list of names and lists of values, which is shorter."""
    names = list(dict.fromkeys(name for row in values for name in row))
    return {"names": names, "rows": [[row.get(name) for name in names] for row in values]}


def embedded(content: object) -> str:
    """Return JSON that may stand in a script element."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")

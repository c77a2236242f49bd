"""What a quick run checks, and in which order: what has shown mistakes before comes first."""

import importlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from properties.harness import ratchet
from properties.harness.laws import PROPERTIES
from properties.problems.problem import Problem

PROPERTIES_FOLDER = Path(__file__).parents[1]
KILLERS = PROPERTIES_FOLDER / "killers.json"
FIXTURES = PROPERTIES_FOLDER / "fixtures"


@dataclass(frozen=True)
class Row:
    """A line of the table: what one test of the suite checks.

    Parameters
    ----------
    law : str
        The function of the test.
    file : str
        Where it is.
    fixture : str
        The fixture that it is about, or nothing.
    sections : tuple of str
        Of `SPEC.md`.
    """

    law: str
    file: str
    fixture: str = ""
    sections: tuple[str, ...] = ()

    def test(self, implementation: str) -> str:
        """Return the node id of the test."""
        parameters = "-".join(filter(None, (implementation, self.fixture)))
        return f"properties/{self.file}.py::{self.law}[{parameters}]"


@dataclass(frozen=True)
class Task:
    """What one process checks at a time.

    Parameters
    ----------
    row : Row
    problem : Problem or None
        None: fresh ones, or those that the row itself has.
    case : str
        The stored worst case, by "law dtype".
    seed, count : int
        Of the fresh problems: how they are drawn, and how many. Seed 0 gives the plainest problem alone.
    shrink : int
        Whether to look for the smallest problem that fails, and how many times as long as at first; 0: no.
    brief : bool
        Whether problems have a part of a chunk where a whole one would cost too much.
    """

    row: Row
    problem: Problem | None = None
    case: str = ""
    seed: int = 0
    count: int = 0
    shrink: int = 0
    brief: bool = False


RATCHET = Row("test_ratchet", "test_ratchet", sections=("4.4",))


def import_laws() -> None:
    """Import all laws, which registers them: pytest does it by itself."""
    for path in sorted(PROPERTIES_FOLDER.glob("test_*.py")):
        importlib.import_module(f"properties.{path.stem}")


def rows() -> dict[str, Row]:
    """Return a row for each law, by its name."""
    return {name: Row(name, law.file, sections=law.sections) for name, law in PROPERTIES.items()}


def killers(first: str = "") -> list[tuple[str, Problem]]:
    """Return the problems by which planted faults were noticed, each with its law; those of one backend first."""
    stored = json.loads(KILLERS.read_text()) if KILLERS.exists() else []
    stored.sort(key=lambda entry: entry["backend"] != first)
    found = ((entry["law"], Problem.from_json(json.dumps(entry["problem"]))) for entry in stored)
    # The same problem may stand there for several backends.
    return list(dict.fromkeys(found))


def fixtures() -> list[Row]:
    """Return a row for each fixture."""
    return [Row("test_fixture", "test_fixtures", path.stem) for path in sorted(FIXTURES.glob("*.json"))]


def left_out(tests: Iterable[tuple[str, str]], implementations: Iterable[str], parts: int = 1) -> list[str]:
    """Return a line that says how many tests a run leaves out, if it does.

    Parameters
    ----------
    tests : iterable of (law, implementation)
        One for each test of the run.
    implementations : iterable of str
        Their names.
    parts : int
        How many tests replay the worst cases of one of them.
    """
    import_laws()
    every = (*rows().values(), *fixtures(), *[RATCHET] * parts)
    missing = Counter((row.law, name) for row in every for name in implementations)
    of = missing.total()
    missing -= Counter(tests)
    return [f"not complete: {missing.total()} of {of} tests were not selected"] if missing else []


def known(name: str, device: str, claims: frozenset[str], killing: Sequence[tuple[str, Problem]]) -> list[Task]:
    """Return what is checked before anything new: killers, a plain problem of each law, fixtures, worst cases.

    Parameters
    ----------
    name, device : str
        Of the implementation.
    claims : frozenset of str
        The claims that it makes.
    killing : sequence of (law, Problem)
    """
    of = {law: row for law, row in rows().items() if PROPERTIES[law].needs <= claims}
    tasks = [Task(of[law], problem) for law, problem in killing if law in of]
    # Laws with a small share have expensive examples.
    tasks += [Task(row, count=1) for row in sorted(of.values(), key=lambda row: -PROPERTIES[row.law].share)]
    tasks += [Task(row) for row in fixtures()]
    stored = ratchet.read()
    own = stored.get(ratchet.subject(name, device), {})
    if own:
        return tasks + [Task(RATCHET, case=case) for case in own]
    # Of an implementation without a history those of a backend are new problems.
    others = ((case.partition(" ")[0], text) for case, (_, text) in stored.get("chunk", {}).items())
    return tasks + [Task(of[law], Problem.from_json(text)) for law, text in others if law in of]

"""Mutants of the suite itself, `python -m faults --suite`: its unit tests must notice each of them."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from faults.plant import ROOT, Changes, changed, read

MUTANTS = Path(__file__).parent / "suite_mutants"
# What a copy of the repository needs.
FOLDERS = ("faults", "oracle", "properties", "tests", "titans")
# Seconds; a test that does not end has noticed, too.
LIMIT = 300


@dataclass(frozen=True)
class SuiteFault:
    """A mutant of the suite: a small change by which it would let a wrong implementation pass.

    Parameters
    ----------
    name : str
        Names the mistake.
    tests : tuple of str
        The unit tests, one of which must fail, as pytest's node ids.
    changes : dict of str: tuple of Hunk
        See `faults.plant.Changes`.
    """

    name: str
    tests: tuple[str, ...]
    changes: Changes

    @classmethod
    def parse(cls, text: str) -> "SuiteFault":
        """Read a patch: lines `fault:` and `test:`, then a unified diff."""
        fields, changes = read(text, ("fault", "test"))
        (name,) = fields["fault"]
        return cls(name, tuple(fields["test"]), changes)


@dataclass
class SuiteKill:
    """What became of a mutant of the suite: the test that failed, or nothing, and the seconds it took."""

    fault: str
    test: str
    seconds: float


def load() -> tuple[SuiteFault, ...]:
    """Return all mutants of the suite."""
    return tuple(SuiteFault.parse(path.read_text()) for path in sorted(MUTANTS.glob("*.patch")))


def examine(fault: SuiteFault) -> SuiteKill:
    """Run the tests that must notice a mutant, in a copy of the repository that has it.

    Raises
    ------
    RuntimeError
        If the tests cannot be run.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in FOLDERS:
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ROOT.glob("*.*"):
            if file.is_file():
                shutil.copy(file, folder)
        for path, source in changed(fault.changes).items():
            (Path(folder) / path).write_text(source)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *fault.tests]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            return SuiteKill(fault.name, f"no end after {LIMIT} s", time.monotonic() - begin)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"the tests of {fault.name!r} could not be run:\n{done.stdout}{done.stderr}")
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    return SuiteKill(fault.name, failed[0] if failed else "", time.monotonic() - begin)


def measure(faults: Sequence[SuiteFault], processes: int) -> list[SuiteKill]:
    """Examine mutants of the suite, print what became of each, and return it."""
    kills = []
    with ThreadPoolExecutor(processes) as pool:
        for kill in pool.map(examine, faults):
            kills.append(kill)
            print(f"{'killed  ' if kill.test else 'SURVIVED'}  {kill.fault}  [{kill.seconds:.0f} s]", flush=True)
            print(f"          {kill.test}" if kill.test else "          no test noticed", flush=True)
    print(f"{sum(bool(kill.test) for kill in kills)} of {len(kills)} mutants of the suite killed")
    return kills

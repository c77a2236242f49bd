"""Planted faults and the quick run: how soon it kills them, and the problems that it begins with."""

import contextlib
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from faults.plant import Fault, plant
from properties.harness import corpus, files
from properties.harness.facts import Recorder
from properties.harness.implementations import Implementation, implementation
from properties.harness.laws import PROPERTIES
from properties.harness.quick import Quick, prepare_environment
from properties.harness.subjects import Subject
from properties.harness.worker import failing, quietly, size
from properties.problems.problem import Problem

# The seconds in which the smallest problem of a fault is looked for.
SEARCH = 40


@dataclass(frozen=True)
class Kill:
    """What the quick run says of a fault.

    Parameters
    ----------
    fault, backend : str
    law : str
        The first law that noticed; empty: none did.
    problem : str
        The problem with which it did.
    seconds, computing : float
        How long that took, and how much of it the processes were computing: the rest was the machine's other work.
    examples : int
        Problems put before the laws until then.
    """

    fault: str
    backend: str
    law: str
    problem: str
    seconds: float
    computing: float
    examples: int


def measure(faults: Sequence[Fault], budget: float, workers: int) -> list[Kill]:
    """Let the quick run look at each fault until it notices, and print its verdict."""
    kills = []
    for fault in faults:
        kills.append(quick(fault, budget, workers))
        print(line(kills[-1]), flush=True)
    for backend in dict.fromkeys(kill.backend for kill in kills):
        of = [kill for kill in kills if kill.backend == backend]
        killed = [kill for kill in of if kill.law]
        print(f"{backend}: {len(killed)} of {len(of)} faults killed; {workers} processes, {budget:g} s")
        if killed:
            times, work = (sorted(getattr(kill, x) for kill in killed) for x in ("seconds", "computing"))
            median = len(killed) // 2
            print(f"    after {times[median]:.1f} s in the median, {times[-1]:.1f} s at most", end="")
            print(f"; computing {work[median]:.1f} s in the median, {work[-1]:.1f} s at most")
    return kills


def line(kill: Kill) -> str:
    """Show the verdict of the quick run on a fault."""
    time = f"{kill.seconds:.1f} s, computing {kill.computing:.1f} s"
    said = f"{kill.fault}  [{kill.backend}, {time}, {kill.examples} examples]"
    return f"killed    {said}\n          {kill.law}" if kill.law else f"SURVIVED  {said}"


def quick(fault: Fault, budget: float, workers: int) -> Kill:
    """Let the quick run look at a fault until it notices."""
    with tempfile.TemporaryDirectory() as folder:

        def prepare() -> None:
            own = Path(folder) / str(os.getpid())
            own.mkdir()
            plant(fault, own)

        begin, before = time.monotonic(), computed()
        run = Quick(Subject(fault.backend), begin, begin + budget, workers=workers, prepare=prepare, first_failure=True)
        rows = run.run()
        seconds, computing = time.monotonic() - begin, computed() - before
    assert run.schedule
    broken = {row.test(fault.backend) for row, now in run.schedule.standing.items() if now.failed or now.trouble}
    first = next((row for row in rows if row.test in broken), None)
    calls = sum(now.total("calls") for now in run.schedule.standing.values())
    law, problem = (first.law, first.failing_problem) if first else ("", "")
    return Kill(fault.name, fault.backend, law, problem, seconds, computing, calls)


def computed() -> float:
    """Return the seconds that processes which this one started, and that have ended, were computing."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def collect(faults: Sequence[Fault]) -> int:
    """Store a problem for each fault that no stored one kills; return how many faults have none.

    A fault that a stored problem of its backend kills is noted with that one. The problems that kill most come first.
    """
    stored = json.loads(corpus.KILLERS.read_text()) if corpus.KILLERS.exists() else []
    noted = {name for entry in stored for name in entry["kills"]}
    without = 0
    # A fresh child for each: a fault is planted where the op has never been imported.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for fault in faults:
            if fault.name in noted:
                continue
            candidates = [entry for entry in stored if entry["backend"] == fault.backend]
            number, entry = pool.apply(killer, (fault, candidates))
            if number is not None:
                candidates[number]["kills"].append(fault.name)
            elif entry:
                stored.append(entry)
            without += number is None and entry is None
            said = (
                "known" if number is not None else f"{entry['law']} {json.dumps(entry['problem'])}" if entry else "NONE"
            )
            print(f"{fault.name}: {said}", flush=True)
            store(stored)
    return without


def store(entries: list[dict[str, Any]]) -> None:
    """Write the problems, those that kill most first."""
    entries.sort(key=lambda entry: (-len(entry["kills"]), entry["law"], json.dumps(entry["problem"])))
    lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in entries)
    files.write(corpus.KILLERS, f"[\n{lines}\n]\n")


def killer(fault: Fault, candidates: Sequence[dict[str, Any]]) -> tuple[int | None, dict[str, Any] | None]:
    """Plant a fault in this process; return the number of the first problem that kills it, or else a small new one."""
    torch.set_num_threads(1)
    prepare_environment("cpu")
    with tempfile.TemporaryDirectory() as folder:
        plant(fault, Path(folder))
        subject = implementation(fault.backend, "cpu")
        quietly()
        for i, entry in enumerate(candidates):
            if breaks(entry["law"], subject, Problem.from_json(json.dumps(entry["problem"]))):
                return i, None
        for law in fault.laws:
            if problem := smallest(f"test_{law}", subject):
                fields = json.loads(problem)
                return None, {
                    "law": f"test_{law}", "backend": fault.backend, "kills": [fault.name], "problem": fields,
                }  # fmt: skip
    return None, None


def breaks(law: str, subject: Implementation, problem: Problem) -> bool:
    """Whether an implementation breaks a law with a problem."""
    recorder = Recorder()
    if posed := PROPERTIES[law].posed(subject, problem):
        with contextlib.suppress(Exception):
            PROPERTIES[law].check(subject, posed, recorder)
    return bool(recorder.facts.failing_call)


def smallest(law: str, subject: Implementation) -> str:
    """Return the smallest problem that was found with which an implementation breaks a law, or nothing."""
    found = failing(PROPERTIES[law], subject, Recorder(), time.monotonic() + SEARCH)
    problems = [facts.failing_problem for facts in found]
    # It must fail alone, too.
    alone = (x for x in sorted(problems, key=size) if breaks(law, subject, Problem.from_json(x)))
    return next(alone, "")

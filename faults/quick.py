"""Planted faults and the quick run: how soon it kills them, and the problems that it begins with."""

import contextlib
import functools
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
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
from properties.harness.worker import quietly
from properties.problems.problem import Problem

# Of a quick run: it is meant for a machine with two cores.
PROCESSES = 2


@dataclass(frozen=True)
class Kill:
    """What the quick run says of a fault.

    Parameters
    ----------
    fault, backend : str
    law : str
        The first law that noticed, and that the op obeys with the same problem without the fault; empty: none did.
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


def measure(faults: Sequence[Fault], budget: float, processes: int) -> Iterator[Kill]:
    """Let a quick run of at most two processes look at each fault until it notices, several runs at a time."""
    each = min(PROCESSES, processes)
    # Not daemons, so that they may have processes themselves. None of them imports the op.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes // each, mp_context=context) as pool:
        yield from pool.map(functools.partial(quick, budget=budget, workers=each), faults)


def summary(kills: Sequence[Kill], budget: float) -> list[str]:
    """Say of each backend how many faults were killed, and how soon."""
    lines = []
    for backend in dict.fromkeys(kill.backend for kill in kills):
        of = [kill for kill in kills if kill.backend == backend]
        killed = [kill for kill in of if kill.law]
        lines.append(f"{backend}: {len(killed)} of {len(of)} faults killed within {budget:g} s")
        if killed:
            times, work = (sorted(getattr(kill, x) for kill in killed) for x in ("seconds", "computing"))
            median = len(killed) // 2
            lines.append(
                f"    after {times[median]:.1f} s in the median, {times[-1]:.1f} s at most; "
                f"computing {work[median]:.1f} s in the median, {work[-1]:.1f} s at most"
            )
    return lines


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
    if law in PROPERTIES and problem and not apart(obeyed, (fault.backend, [(law, problem)])):
        # An alarm, and no kill: something is wrong with the op as it is, or with this machine.
        law = ""
    return Kill(fault.name, fault.backend, law, problem, seconds, computing, calls)


def apart(function: Callable[[Any], Any], argument: Any) -> Any:
    """Return the result of a function in a fresh process, which has imported no fault."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, (argument,))


def computed() -> float:
    """Return the seconds that processes which this one started, and that have ended, were computing."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# A law, and a problem as JSON.
Pair = tuple[str, str]


def collect(outcomes: Sequence[Mapping[str, Any]], faults: Sequence[Fault], workers: int) -> int:
    """Store a problem for each fault that no stored one kills; return how many faults have none.

    A fault that a stored problem kills is noted with that one. The file is written after each fault.

    Parameters
    ----------
    outcomes : sequence of mapping
        The rows that `python -m faults --json` has written: what killed each fault.
    faults : sequence of Fault
    workers : int
        Processes.
    """
    found = {row["fault"]: (f"test_{row['law']}", row["problem"]) for row in outcomes if row["problem"]}
    stored = json.loads(corpus.KILLERS.read_text()) if corpus.KILLERS.exists() else []
    noted = {name for entry in stored for name in entry["kills"]}
    missing = [fault for fault in faults if fault.name not in noted]
    without = 0
    # A fresh child for each: a fault is planted where the op has never been imported.
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=1) as pool:
        candidates = {
            fault.name: [*known(fault.backend, stored), *filter(None, [found.get(fault.name)])] for fault in missing
        }
        asked = {(fault.backend, pair) for fault in missing for pair in candidates[fault.name]}
        sound = {pair for part in pool.map(obeyed, parts(sorted(asked), workers)) for pair in part}
        for backend, pair in sorted(asked - sound):
            print(f"not taken, since {backend} breaks it without a fault: {' '.join(pair)}", flush=True)
        jobs = [(fault, [x for x in candidates[fault.name] if (fault.backend, x) in sound]) for fault in missing]
        for name, backend, killer in pool.imap_unordered(killing, jobs):
            without += killer is None
            print(f"{name}: {' '.join(killer) if killer else 'NONE'}", flush=True)
            if killer:
                note(stored, name, backend, *killer)
                store(stored)
    return without


def known(backend: str, stored: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Return the stored problems of a backend with their laws, those that kill most first."""
    return [(entry["law"], json.dumps(entry["problem"])) for entry in stored if entry["backend"] == backend]


def parts(asked: Sequence[tuple[str, Pair]], number: int) -> list[tuple[str, list[Pair]]]:
    """Cut the questions about each backend into parts."""
    of = {backend: [pair for x, pair in asked if x == backend] for backend, _ in asked}
    return [(backend, part) for backend, pairs in of.items() for i in range(number) if (part := pairs[i::number])]


def obeyed(asked: tuple[str, Sequence[Pair]]) -> list[tuple[str, Pair]]:
    """Return the laws that a backend without a fault obeys with their problems, or does not claim."""
    backend, pairs = asked
    subject = judged(backend)
    return [(backend, pair) for pair in pairs if not breaks(*pair, subject)]


def killing(job: tuple[Fault, Sequence[Pair]]) -> tuple[str, str, Pair | None]:
    """Plant a fault in this process; return it, and the first of the laws with problems that kills it."""
    fault, candidates = job
    with tempfile.TemporaryDirectory() as folder:
        plant(fault, Path(folder))
        subject = judged(fault.backend)
        return fault.name, fault.backend, next((pair for pair in candidates if breaks(*pair, subject)), None)


def judged(backend: str) -> Implementation:
    """Return a backend as this process has it, and prepare the process as a quick run does."""
    torch.set_num_threads(1)
    prepare_environment("cpu")
    subject = implementation(backend, "cpu")
    quietly()
    return subject


def note(entries: list[dict[str, Any]], fault: str, backend: str, law: str, problem: str) -> None:
    """Add a fault to the entry of its backend that has this problem, or add an entry."""
    fields = json.loads(problem)
    for entry in entries:
        if (entry["law"], entry["backend"], entry["problem"]) == (law, backend, fields):
            entry["kills"].append(fault)
            return
    entries.append({"law": law, "backend": backend, "kills": [fault], "problem": fields})


def store(entries: list[dict[str, Any]]) -> None:
    """Write the problems, those that kill most first."""
    entries.sort(key=lambda entry: (-len(entry["kills"]), entry["law"], json.dumps(entry["problem"])))
    lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in entries)
    files.write(corpus.KILLERS, f"[\n{lines}\n]\n")


def breaks(law: str, problem: str, subject: Implementation) -> bool:
    """Whether an implementation breaks a law that it has to obey, with a problem."""
    recorder, asked = Recorder(), PROPERTIES[law]
    if asked.needs <= subject.claims and (posed := asked.posed(subject, Problem.from_json(problem))):
        with contextlib.suppress(Exception):
            asked.check(subject, posed, recorder)
    return bool(recorder.facts.failing_call)

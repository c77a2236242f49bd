"""Run the laws against every fault and print which of them notice: `python -m faults`."""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Triton looks at this when its kernels are imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import torch
from hypothesis import Phase, settings

from faults import suite
from faults.answers import keep_answers
from faults.plant import ROOT, Fault, load, plant
from faults.quick import Kill, collect, line, measure, summary
from properties.atlas.provenance import provenance
from properties.harness import files
from properties.harness.draws import COMMON
from properties.harness.facts import Recorder
from properties.harness.implementations import Implementation, implementation, share_of
from properties.harness.laws import PROPERTIES
from properties.problems.problem import Problem

# No database may know the answer from the last run.
settings.register_profile("faults", max_examples=50, database=None, **COMMON)
for path in sorted((ROOT / "properties").glob("test_*.py")):
    importlib.import_module(f"properties.{path.stem}")


@dataclass
class Outcome:
    """The verdicts of the laws on one fault.

    Attributes
    ----------
    caught : dict of str: int
        The laws that noticed, each with the examples it needed.
    law, problem : str
        The first of them, and a problem with which it did, shrunken unless that was not wanted, as JSON.
    """

    fault: str
    must: Sequence[str]
    caught: dict[str, int] = field(default_factory=dict)
    law: str = ""
    problem: str = ""
    seconds: float = 0.0

    @property
    def missing(self) -> list[str]:
        """The laws that should have noticed."""
        return [law for law in self.must if law not in self.caught]


def questions(fault: Fault, named: bool) -> list[tuple[str, float]]:
    """Return the laws to ask about a fault, those that must notice first, each with its share of the examples."""
    first = [f"test_{law}" for law in fault.laws]
    others = [] if named else [name for name in PROPERTIES if name not in first]
    return [(name, share_of(fault.backend, "cpu")) for name in first + others]


def draw(name: str, share: float, seed: int) -> list[Problem]:
    """Return the problems that a law would be asked about, in their order; they depend on nothing that is verified."""
    drawn: list[Problem] = []

    def collect(implementation: Implementation | None, problem: Problem) -> None:
        drawn.append(problem)

    settings.load_profile("faults")
    test: Any = hypothesis.seed(seed)(PROPERTIES[name].drawn(collect, share, phases=[Phase.generate]))
    test(None)
    return drawn


def examples_needed(name: str, subject: Implementation, problems: Sequence[Problem]) -> tuple[int, str]:
    """Put an implementation before a law; return how many problems it took to fail, or 0, and the last of them."""
    recorder = Recorder()
    for problem in problems:
        try:
            PROPERTIES[name].check(subject, problem, recorder)
        except Exception:
            # Only a law may fail here, not the harness.
            if not recorder.facts.failing_call:
                raise
            break
    return recorder.facts.failing_call, recorder.facts.failing_problem


def smallest_problem(name: str, subject: Implementation, seed: int) -> str:
    """Let Hypothesis look for the smallest problem with which an implementation breaks a law."""
    phases, recorder = [Phase.generate, Phase.shrink], Recorder()
    test = PROPERTIES[name].test(recorder, subject.share, phases=phases, report_multiple_bugs=False)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        hypothesis.seed(seed)(test)(subject)
    return recorder.facts.failing_problem


def examine(fault: Fault, asked: Mapping[str, Sequence[Problem]], seed: int, shrink: bool) -> Outcome:
    """Plant a fault in this process and ask the laws, each about its problems."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # A fault may be random; its verdicts should be the same tomorrow.
    random.seed(seed)
    settings.load_profile("faults")
    begin, outcome = time.monotonic(), Outcome(fault.name, fault.laws)
    with tempfile.TemporaryDirectory() as folder:
        plant(fault, Path(folder))
        subject = implementation(fault.backend, "cpu")
        failing: dict[str, str] = {}
        for name, problems in asked.items():
            if PROPERTIES[name].needs <= subject.claims:
                calls, failing[name] = examples_needed(name, subject, problems)
                outcome.caught |= {name.removeprefix("test_"): calls} if calls else {}
        if outcome.caught:
            outcome.law = min(outcome.caught, key=lambda law: (law not in fault.laws, outcome.caught[law]))
            name = f"test_{outcome.law}"
            outcome.problem = (smallest_problem(name, subject, seed) if shrink else "") or failing[name]
    outcome.seconds = time.monotonic() - begin
    return outcome


def report(outcome: Outcome) -> str:
    """Lay out one fault: its name, the laws that noticed with the examples they needed, the smallest problem."""
    verdict = "caught" if outcome.caught and not outcome.missing else "MISSED"
    named = [f"{law} ({calls})" for law, calls in outcome.caught.items()]
    lines = [f"{verdict}  {outcome.fault}  [{len(named)} laws, {outcome.seconds:.0f} s]"]
    lines += [f"          {text}" for text in named]
    lines += [f"          NOT by {law}" for law in outcome.missing]
    lines += [f"          {Problem.from_json(outcome.problem)}"] if outcome.problem else []
    return "\n".join(lines)


def main() -> int:
    """Run as a command; the exit status is 1 if a law missed a fault that it must notice."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--select", default="", help="only faults whose name contains this")
    parser.add_argument("--named", action="store_true", help="ask only the laws that must notice")
    parser.add_argument("--no-shrink", action="store_true", help="do not look for the smallest problem")
    parser.add_argument("--seed", type=int, default=0, help="of the generated examples (0)")
    parser.add_argument("-n", type=int, default=len(os.sched_getaffinity(0)), help="processes (one per core)")
    parser.add_argument("--json", type=Path, help="write the outcomes here, too")
    parser.add_argument(
        "--quick", action="store_true", help="see how soon `properties verify --quick` kills each fault"
    )
    parser.add_argument("--budget", type=float, default=60, help="the seconds of such a run (60)")
    parser.add_argument(
        "--collect", type=Path, metavar="FILE", help="store the problems of --json's file: a quick run begins with them"
    )
    parser.add_argument("--backend", help="only the faults of this backend")
    parser.add_argument("--suite", action="store_true", help="mutants of the suite itself, and its unit tests")
    options = parser.parse_args()
    if options.suite:
        killed = suite.measure([fault for fault in suite.load() if options.select in fault.name], options.n)
        return not all(kill.test for kill in killed)
    faults = [fault for fault in load() if options.select in fault.name and options.backend in (None, fault.backend)]
    if options.collect:
        return bool(collect(json.loads(options.collect.read_text())["rows"], faults, options.n))
    if options.quick:
        kills: list[Kill] = []
        for kill in measure(faults, options.budget, options.n):
            kills.append(kill)
            print(line(kill), flush=True)
            write(options.json, kills)
        print(*summary(kills, options.budget), sep="\n")
        return not all(kill.law for kill in kills)
    outcomes = []
    # A fresh child for each: a fault is planted where the op has never been imported.
    assert "titans" not in sys.modules
    with contextlib.ExitStack() as stack:
        keep_answers(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        pool = stack.enter_context(multiprocessing.get_context("fork").Pool(options.n, maxtasksperchild=1))
        jobs = sorted({job for fault in faults for job in questions(fault, options.named)})
        drawn = dict(zip(jobs, pool.starmap(draw, [(*job, options.seed) for job in jobs]), strict=True))
        waiting = []
        for fault in faults:
            asked = {job[0]: drawn[job] for job in questions(fault, options.named)}
            waiting.append(pool.apply_async(examine, (fault, asked, options.seed, not options.no_shrink)))
        for result in waiting:
            outcomes.append(result.get())
            print(report(outcomes[-1]), flush=True)
            # A run that is cut off has measured something.
            write(options.json, outcomes)
    missed = [x.fault for x in outcomes if x.missing or not x.caught]
    print(f"{len(outcomes) - len(missed)} of {len(outcomes)} faults caught by every law that must; seed {options.seed}")
    return bool(missed)


def write(path: Path | None, outcomes: Sequence[Outcome | Kill]) -> None:
    """Write the outcomes, where a file was asked for: `python -m properties atlas` draws outcomes as a matrix."""
    if path:
        kind = "titans quick faults" if any(isinstance(x, Kill) for x in outcomes) else "titans faults"
        about = provenance(["python", "-m", "faults", *sys.argv[1:]], "cpu")
        content = {"kind": kind, "about": about, "rows": [asdict(x) for x in outcomes]}
        files.write(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

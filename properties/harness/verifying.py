"""`verify`: the laws on any callable, as a function that returns a report."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from properties.harness import containment, files, headers, report
from properties.harness.columns import columns
from properties.harness.facts import Verdict
from properties.harness.merging import Run
from properties.harness.page import page
from properties.harness.subjects import Subject, name_of
from properties.problems.problem import Problem

ROOT = Path(__file__).parents[2]
# The header of a run, but for its verdicts.
Header = Mapping[str, Any]


@dataclass(frozen=True)
class Failure:
    """A law that an implementation breaks, or that has no result.

    Parameters
    ----------
    law, implementation : str
    problem : Problem or None
        The smallest problem that was found; None where the law has no result.
    message : str
        What is wrong there.
    replay : str
        The command that shows it again, from the root of this repository.
    """

    law: str
    implementation: str
    problem: Problem | None
    message: str
    replay: str


@dataclass(frozen=True)
class Report:
    """The verdicts on some implementations.

    Parameters
    ----------
    verdicts : tuple of Verdict
        One for each law, fixture and implementation.
    header : dict
        Of the run: see `verdicts.schema.json`.
    """

    verdicts: tuple[Verdict, ...]
    header: Header

    @property
    def trouble(self) -> str:
        """Why the verdicts say too little, if they do."""
        if not any(row.passed or row.went_wrong for row in self.verdicts):
            return "no law was checked: the run says nothing"
        return report.too_many_ill_conditioned(self.verdicts)

    @property
    def ok(self) -> bool:
        """Whether every claimed law passed, and nothing is missing."""
        return not (self.trouble or any(row.went_wrong for row in self.verdicts))

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The laws that were broken, then those without a result."""
        wrong = [row for row in self.verdicts if row.went_wrong]
        return tuple(
            Failure(
                law=row.law,
                implementation=row.implementation,
                problem=Problem.from_json(row.failing_problem) if row.failing_problem else None,
                message=row.message,
                replay=row.replay,
            )
            for row in sorted(wrong, key=lambda row: row.verdict == "error")
        )

    def to_json(self, path: str | Path) -> None:
        """Write the verdicts as `verdicts.schema.json` describes."""
        report.write_json(Path(path), self.verdicts, dict(self.header))

    def to_html(self, path: str | Path) -> None:
        """Write a page for people, in one file."""
        files.write(Path(path), page(self.verdicts, self.header, self.trouble))

    def __str__(self) -> str:
        """Show the table, the failures in full, and how much was checked."""
        several = len({row.implementation for row in self.verdicts}) > 1
        lines = [*self.header["about"], *(columns if several else report.table)(self.verdicts)]
        lines += [*report.failures(self.verdicts), *report.summary(self.verdicts)]
        lines += [f"FAIL: {self.trouble}"] if self.trouble else []
        return "\n".join(lines)


def verify(
    *targets: str | Callable[..., Any],
    domain: str | None = None,
    lacks: str | None = None,
    claims: str | None = None,
    operands: str | None = None,
    device: str = "cpu",
    select: str = "",
    seed: int = 0,
    profile: str = "dev",
    budget: str | float | None = None,
    first_failure: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> Report:
    """Check the laws on one or more callables with the signature of `titans.chunk_titans_linear`.

    Parameters
    ----------
    *targets : str or callable
        `package.module:callable`, a backend of this repository, or a callable that has a name in its module: other
        processes import it.
    domain, lacks, claims, operands : str or None
        Where they are defined, such as "D=64,128 C=64"; their missing claims, such as "resume,varlen"; their claims of
        law 18; and "inputs" if they round operands of products to the dtype of q. Instead of their own attributes.
    device : {"cpu", "cuda"}
    select : str
        Only the laws, fixtures and worst cases with this in their name.
    seed : int
        Of the examples.
    profile : {"dev", "smoke", "ci", "deep"}
        How many examples each law has.
    budget : str, float or None
        The time for each implementation, everything included: "60s", "2m" or a number of seconds. The problems that
        have shown mistakes before come first, then fresh ones until the time is up. None: the whole suite.
    first_failure : bool
        Whether the first failure ends a run with a budget.
    workers : int or None
        Processes; None: one for each core.
    progress : bool
        Whether a line on standard error says how far the run has come.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        If a target cannot be imported, or an argument is wrong.
    KeyboardInterrupt
        If it is interrupted before it has a verdict.
    """
    if not targets:
        raise ValueError("verify needs an implementation, such as 'my_kernel:memory'")
    begin, workers = time.monotonic(), workers or len(os.sched_getaffinity(0))
    subjects = [Subject(name_of(x), device, lacks, claims, domain, operands) for x in targets]
    if budget is None:
        runs = [suite(subject, select, seed, profile, workers, progress) for subject in subjects]
    else:
        time_each = seconds(budget)
        runs = [apart(time_each, subject, select, seed, first_failure, workers, progress) for subject in subjects]
    return together(runs, begin)


def together(reports: Sequence[Report], begin: float) -> Report:
    """Return the reports on several implementations as one."""
    about = dict.fromkeys(line for one in reports for line in one.header["about"])
    header = {**reports[0].header, "about": list(about), "seconds": round(time.monotonic() - begin, 1)}
    return Report(tuple(row for one in reports for row in one.verdicts), header)


def side_by_side(runs: Sequence[Run]) -> Report:
    """Return the verdicts of several runs as those of different implementations: the file tells them apart."""
    names = [{row.implementation for row in run.verdicts} for run in runs]
    twice = {name for i, of in enumerate(names) for name in of if any(name in other for other in names[:i])}
    reports = [
        Report(
            tuple(
                replace(row, implementation=f"{row.implementation} ({run.path.stem})")
                if row.implementation in twice
                else row
                for row in run.verdicts
            ),
            run.header,
        )
        for run in runs
    ]
    return together(reports, time.monotonic())


def seconds(budget: str | float) -> float:
    """Read a time, such as "60s" or "2m", or raise ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?) *(s|m|min|)", str(budget))
    if not found:
        raise ValueError(f"a budget must be a time such as 60s or 2m, got {budget!r}")
    return float(found[1]) * (1 if found[2] in ("s", "") else 60)


def within(budget: float, subject: Subject, begin: float, **options: Any) -> Report:
    """Check an implementation until the time since `begin` is up, in processes that this one forks.

    No tensor may have been differentiated in this process, and no GPU used: see `apart`. The options are those of
    `quick.Quick`.
    """
    # Importing these imports all laws, and pytest would do that by itself.
    from properties.harness import corpus
    from properties.harness.quick import Quick

    run = Quick(subject, begin, begin + budget, **options)
    verdicts = run.run()
    tests = [(row.law, row.implementation) for row in verdicts]
    left_out = corpus.left_out(tests, {name for _, name in tests})
    about = [*run.about(budget), *left_out]
    header = headers.header("", begin, about, profile="quick", seed=str(run.seed), device=run.devices)
    return Report(tuple(verdicts), header)


def apart(
    budget: float, subject: Subject, select: str, seed: int, first_failure: bool, workers: int, progress: bool
) -> Report:
    """Check an implementation until the time is up, in a fresh process: PyTorch cannot be forked after a backward."""
    options = {
        "--lacks": subject.lacks,
        "--claims": subject.claims,
        "--domain": subject.domain,
        "--operands": subject.operands,
        "--device": subject.device,
        "--select": select or None,
        "--budget": str(budget),
        "--seed": str(seed),
        "-n": str(workers),
    }
    command = [sys.executable, "-m", "properties", "verify", subject.target]
    command += ["--first-failure"] if first_failure else []
    return asked(
        command + [x for name, text in options.items() if text is not None for x in (name, text)], "--json", progress
    )


def suite(subject: Subject, select: str, seed: int, profile: str, workers: int, progress: bool) -> Report:
    """Run the whole suite on one implementation, in processes of pytest's."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(ROOT / "properties")]
    command += ["-n", str(workers)] if workers > 1 else []
    command += ["-k", select] if select else []
    command += [word for option in subject.options for word in option]
    command += [f"--hypothesis-seed={seed}", f"--hypothesis-profile={profile}"]
    return asked(command, "--verdicts", progress)


def asked(command: Sequence[str], option: str, progress: bool) -> Report:
    """Run a command that writes verdicts into the file that an option names, and return them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "verdicts.json"
        printed, interrupted = ended([*command, option, str(file)], progress)
        try:
            run = Run.read(file)
        except ValueError as error:
            raise KeyboardInterrupt if interrupted else ValueError(mistake(printed)) from error
    return Report(run.verdicts, run.header)


def ended(command: Sequence[str], progress: bool) -> tuple[str, bool]:
    """Run a command to its end; return what it printed, and whether it was interrupted: that is handed on to it."""
    interrupted = False
    shown = [os.dup(2)] if progress else []
    options = [word for descriptor in shown for word in ("--progress-to", str(descriptor))]
    try:
        with tempfile.TemporaryFile("w+") as output, containment.terminated_as_interrupted():
            process = subprocess.Popen(
                [*command, *options],
                cwd=ROOT,
                env=surroundings(),
                stdout=output,
                stderr=output,
                pass_fds=shown,
                # The terminal interrupts this process alone.
                start_new_session=True,
            )
            while process.poll() is None:
                try:
                    process.wait()
                except KeyboardInterrupt:
                    interrupted = True
                    process.terminate()
            output.seek(0)
            return output.read(), interrupted
    finally:
        for descriptor in shown:
            os.close(descriptor)


def surroundings() -> dict[str, str]:
    """Return the environment of another process that imports what this one can import."""
    folders = [os.getcwd(), *(folder for folder in sys.path if folder)]
    # Options of a run of pytest in which this one may be.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return inherited | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(folders)), "OMP_NUM_THREADS": "1"}


def mistake(printed: str) -> str:
    """Return why a run did not begin."""
    said = re.findall(r"^(?:ERROR|python -m properties verify): (.*)", printed, re.M)
    return said[-1] if said else f"the run has no verdicts:\n{printed}"

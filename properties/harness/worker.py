"""A process that checks the tasks of a quick run, one by one, and says after each of them what it has found."""

import contextlib
import math
import os
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import Phase, given, settings

from properties import test_fixtures, test_ratchet
from properties.harness import command_line, crash_isolation, ratchet, waiting
from properties.harness.compiling import Compiling
from properties.harness.corpus import FIXTURES, Row, Task
from properties.harness.draws import COMMON
from properties.harness.facts import Facts, Recorder
from properties.harness.implementations import Implementation, devices
from properties.harness.laws import PROPERTIES, REFUSALS, Property
from properties.harness.subjects import Subject
from properties.harness.waiting import Hanging
from properties.problems.problem import Problem
from properties.problems.shapes import FEWEST


@dataclass(frozen=True)
class Ready:
    """What a process says of an implementation before the first task."""

    name: str
    claims: frozenset[str]
    domain: str
    devices: str


@dataclass(frozen=True)
class Answer:
    """What a process says of a task.

    Parameters
    ----------
    facts : Facts
        Of all tasks of the row that this process has had.
    trouble : str
        Why the row has no result.
    slow, lost, unfinished : bool
        Whether an example did not end in the time that it has in a quick run; whether the process has lost its GPU;
        whether the search for a smaller problem ended with its time.
    outside : str
        Why the law cannot be stated inside the implementation's domain, as far as this process knows.
    seconds : float
        How long the task took.
    kernels, compiling : int, float
        How many kernels were compiled meanwhile, and for how long.
    """

    facts: Facts
    trouble: str = ""
    slow: bool = False
    lost: bool = False
    outside: str = ""
    seconds: float = 0.0
    kernels: int = 0
    compiling: float = 0.0
    unfinished: bool = False


class TimeIsUp(BaseException):
    """The search for a smaller problem has had its time: no Exception, since Hypothesis would go on."""


def serve(
    connection: Connection, subject: Subject, prepare: Callable[[], None], log: Path, number: int, patience: float
) -> None:
    """Answer tasks until there are no more.

    Parameters
    ----------
    connection : Connection
        First says what is verified, or why that is impossible; from then on a task comes, and an answer goes.
    subject : Subject
    prepare : callable
        Is called before anything of the implementation is imported.
    log : Path
        Where all that is printed goes.
    number : int
        Of this process.
    patience : float
        The seconds that an example may take.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    waiting.STDERR = 2
    torch.set_num_threads(1)
    os.environ["PYTEST_XDIST_WORKER"] = f"gw{number}"
    try:
        command_line.check_device(subject.device, trying=True)
        prepare()
        implementation = subject.load()
        crash_isolation.spread(subject.device)
    except ValueError as error:
        connection.send(str(error))
        return
    x = with_fewest_shapes(implementation)
    connection.send(Ready(x.name, x.claims, str(x.domain), devices()))
    judge = Judge(x, subject, patience)
    if subject.device == "cuda":
        judge.compiling.watch()
    with contextlib.suppress(EOFError):
        while True:
            connection.send(judge.answer(connection.recv()))


def with_fewest_shapes(implementation: Implementation) -> Implementation:
    """Return an implementation whose problems have the fewest shapes, where they have few of them at all."""
    domain = implementation.domain
    return replace(implementation, domain=replace(domain, few_shapes=FEWEST)) if domain.few_shapes else implementation


def quietly() -> None:
    """Let warnings be errors, as in pytest's run, but for those of Triton's interpreter."""
    warnings.simplefilter("error")
    for module in ("triton.runtime.interpreter", "numpy._core.fromnumeric"):
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=module)
    warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)


class Judge:
    """Puts an implementation before the laws.

    Parameters
    ----------
    implementation : Implementation
    subject : Subject
        Its name and options, for the commands that replay failures.
    patience : float
        The seconds that an example may take.
    """

    def __init__(self, implementation: Implementation, subject: Subject, patience: float) -> None:
        self.implementation, self.subject, self.patience = implementation, subject, patience
        self.recorders: dict[Row, Recorder] = {}
        self.refused: dict[Row, int] = {}
        self.compiling = Compiling()

    def answer(self, task: Task) -> Answer:
        """Do a task."""
        begin, recorder = time.monotonic(), self.recorder(task.row)
        kernels, compiling = self.compiling.kernels, self.compiling.seconds
        before, trouble, slow, lost = recorder.facts, "", False, False
        with warnings.catch_warnings():
            quietly()
            try:
                self.check(task, recorder)
            except Hanging:
                # It may be slow and right.
                recorder.facts, slow = before, True
            except BaseException as error:
                lost = crash_isolation.is_fatal(error)
                if not recorder.facts.failing_call:
                    trouble = f"{type(error).__name__}: {error}"
        return Answer(
            recorder.facts, trouble, slow, lost, recorder.unclaimed, time.monotonic() - begin,
            self.compiling.kernels - kernels, self.compiling.seconds - compiling,
            time.monotonic() - begin > self.time_of(task),
        )  # fmt: skip

    def recorder(self, row: Row) -> Recorder:
        """Return the recorder of a row."""
        if row not in self.recorders:
            test = row.test(self.implementation.name)
            self.recorders[row] = Recorder(test, self.subject.options, self.patience)
        return self.recorders[row]

    def check(self, task: Task, recorder: Recorder) -> None:
        """Check what a task says, or raise an error."""
        if task.row.fixture:
            problem, laws = test_fixtures.read(FIXTURES / f"{task.row.fixture}.json")
            shapes = self.implementation.domain.few_shapes
            for law in (PROPERTIES[name] for name in laws if PROPERTIES[name].needs <= self.implementation.claims):
                law.check(self.implementation, shapes.nearest(problem) if shapes else problem, recorder)
        elif task.case:
            stored = ratchet.read()[ratchet.subject(self.implementation.name, self.implementation.device)]
            test_ratchet.replay_a_case(self.implementation, task.case, stored[task.case], recorder)
        elif task.shrink:
            self.shrink(PROPERTIES[task.row.law], recorder, time.monotonic() + self.time_of(task))
        else:
            drawn = [task.problem] if task.problem else fresh(PROPERTIES[task.row.law], task.seed, task.count)
            for problem in drawn:
                self.pose(task, problem, recorder)
            # The plainest problem may exercise nothing.
            if task.count and not recorder.facts.compared:
                for problem in fresh(PROPERTIES[task.row.law], task.seed + 1, REFUSALS):
                    if not recorder.facts.compared:
                        self.pose(task, problem, recorder)

    def pose(self, task: Task, problem: Problem, recorder: Recorder) -> None:
        """Check a law on the problem nearest to this one; count the ones that do not exercise it."""
        row, law = task.row, PROPERTIES[task.row.law]
        subject = self.implementation
        subject = replace(subject, domain=replace(subject.domain, brief=task.brief))
        posed = law.posed(subject, problem)
        found = law.check(subject, posed, recorder) if posed else []
        self.refused[row] = self.refused.get(row, 0) + (not found)
        nowhere = self.refused[row] >= REFUSALS and str(self.implementation.domain)
        if nowhere and not recorder.facts.compared and not recorder.unclaimed:
            nothing = f"no problem inside {self.implementation.domain} exercises it"
            recorder.outside(f"{nothing}, or none small enough for a quick run")

    def time_of(self, task: Task) -> float:
        """Return the seconds of a search for a smaller problem: at first a third of those that an example may take."""
        return task.shrink * self.patience / 3 if task.shrink else math.inf

    def shrink(self, law: Property, recorder: Recorder, until: float) -> None:
        """Look for a smaller problem that breaks a law, until a time by `time.monotonic`."""
        facts = recorder.facts
        found = [facts, *failing(law, self.implementation, recorder, until)]
        # It may be another process that found the failure.
        smallest = min(found, key=lambda x: size(x.failing_problem) if x.failing_problem else (math.inf, 0))
        names = ("failing_problem", "message", "replay")
        first = facts.failing_call or smallest.failing_call
        recorder.facts = replace(facts, failing_call=first, **{name: getattr(smallest, name) for name in names})


def failing(law: Property, implementation: Implementation, recorder: Recorder, until: float) -> list[Facts]:
    """Let Hypothesis look for the smallest problem that breaks a law; return what is known of each that does.

    Parameters
    ----------
    law : Property
    implementation : Implementation
    recorder : Recorder
    until : float
        When the search ends, by `time.monotonic`.
    """
    found: list[Facts] = []

    def checked(implementation: Implementation, problem: Problem) -> None:
        if time.monotonic() > until:
            raise TimeIsUp
        if posed := law.posed(implementation, problem):
            try:
                law.check(implementation, posed, recorder)
            except BaseException:
                found.append(recorder.facts)
                raise

    phases = [Phase.generate, Phase.shrink]
    test: Any = law.drawn(checked, implementation.share, phases=phases, report_multiple_bugs=False, database=None)
    with contextlib.suppress(Exception, TimeIsUp, Hanging):
        hypothesis.seed(0)(test)(implementation)
    return found


def size(problem: str) -> tuple[int, int]:
    """Return how large a problem is: by its tokens in heads times their width, and by its text."""
    given = Problem.from_json(problem)
    return given.tokens * given.H * given.D, len(problem)


def fresh(law: Property, seed: int, count: int) -> list[Problem]:
    """Return some problems of a law; with seed 0 the plainest, which every draw begins with, and otherwise the rest."""
    drawn: list[Problem] = []
    examples = 1 if seed == 0 else count + 1
    options = settings(max_examples=examples, phases=[Phase.generate], database=None, **COMMON)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hypothesis.seed(seed)(options(given(problem=law.problems)(lambda problem: drawn.append(problem))))()
    return drawn[:1] if seed == 0 else drawn[1:]

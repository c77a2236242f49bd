"""A run that ends with its time: some processes check what a schedule gives them."""

import itertools
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from properties.harness import containment, corpus, headers
from properties.harness.corpus import Task
from properties.harness.facts import Verdict
from properties.harness.implementations import CLAIMS
from properties.harness.progress import Progress
from properties.harness.schedule import Schedule
from properties.harness.subjects import Subject
from properties.harness.worker import Answer, Ready, serve

# Seconds before the end in which nothing runs any more, and results are written; a busy machine needs more, as it did
# for the start.
RESERVE, OF_THE_START = 1.5, 0.7
# The share of the time that an example may take; on a GPU it may have to wait for its kernels.
PATIENCE = {"cpu": 0.25, "cuda": 0.5}
CONTEXT = multiprocessing.get_context("fork")


@dataclass
class Process:
    """A process that answers tasks."""

    process: Any
    connection: Connection
    number: int
    task: Task | None = None
    begin: float = 0.0

    def receive(self) -> Any:
        """Return what it says; None: it died."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def end(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class Quick:
    """A run on one implementation.

    Parameters
    ----------
    subject : Subject
    begin, end : float
        When all began and must be over, by `time.monotonic`.
    select : str
        Only the laws, fixtures and worst cases with this in their name.
    workers, seed : int
        Processes, and the seed of the fresh examples.
    prepare : callable
        Is called in each process before the implementation is imported.
    first_failure : bool
        Whether the first failure ends the run.
    progress : Progress
    """

    def __init__(
        self,
        subject: Subject,
        begin: float,
        end: float,
        select: str = "",
        workers: int = 2,
        seed: int = 0,
        prepare: Callable[[], None] = lambda: None,
        first_failure: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.subject, self.select, self.size, self.seed = subject, select, workers, seed
        self.prepare, self.first_failure, self.progress = prepare, first_failure, progress or Progress()
        self.end = end - max(RESERVE, OF_THE_START * (time.monotonic() - begin))
        self.patience = PATIENCE[subject.device] * (end - begin)
        self.numbers, self.processes = itertools.count(), list[Process]()
        self.schedule: Schedule | None = None
        self.interrupted = False

    def run(self) -> list[Verdict]:
        """Return the verdicts, or raise ValueError where the implementation cannot be imported."""
        prepare_environment(self.subject.device)
        corpus.import_laws()
        with tempfile.TemporaryDirectory() as folder, containment.terminated_as_interrupted():
            self.log = Path(folder) / "log"
            try:
                self.schedule = self.started()
                self.go_on(self.schedule)
            except KeyboardInterrupt:
                self.interrupted = True
                if self.schedule is None:
                    raise
            finally:
                for process in self.processes:
                    process.end()
                self.progress.end()
        early = "was interrupted" if self.interrupted else "ended with its first failure"
        late = "ended with its time; a longer --budget reaches more"
        ending = early if self.interrupted or (self.first_failure and self.schedule.broken) else late
        return self.schedule.verdicts(f"not reached: the run {ending}")

    @property
    def devices(self) -> str:
        """The devices of the machine."""
        return self.schedule.ready.devices if self.schedule else ""

    def about(self, budget: float) -> list[str]:
        """Return the header that is printed."""
        if self.schedule is None:
            return []
        ready, device = self.schedule.ready, self.subject.device
        lacking, callable_ = CLAIMS - ready.claims, ":" in self.subject.target
        return [
            headers.line_of_versions(),
            f"titans: {ready.name} on {device} ({ready.devices}), quick: {budget:g} s, seed {self.seed}",
            *([f"titans: not claimed: {', '.join(sorted(lacking))}"] if lacking and callable_ else []),
            *([f"titans: defined for {ready.domain}"] if ready.domain else []),
            *self.schedule.said(self.interrupted),
        ]

    def started(self) -> Schedule:
        """Start the processes; the first says what is verified."""
        first = self.spawn()
        if not first.connection.poll(max(0, self.end - time.monotonic())):
            raise ValueError(f"{self.subject.target!r} could not be imported in time")
        ready = first.receive()
        if not isinstance(ready, Ready):
            first.process.join(1)
            raise ValueError(ready or f"{self.subject.target!r} ended the process that imported it: {self.said()}")
        schedule = Schedule(self.subject, ready, self.seed, self.end, self.select, self.first_failure)
        self.give(first, schedule)
        for _ in range(self.size - 1):
            self.spawn()
        return schedule

    def spawn(self) -> Process:
        """Start a process."""
        number = next(self.numbers)
        mine, other = CONTEXT.Pipe()
        arguments = (other, self.subject, self.prepare, self.log, number, self.patience)
        process = CONTEXT.Process(target=serve, args=arguments, daemon=True)
        process.start()
        other.close()
        self.processes.append(Process(process, mine, number))
        return self.processes[-1]

    def go_on(self, schedule: Schedule) -> None:
        """Hand out tasks and take answers until the time is up or nothing is left to do."""
        while schedule.left > 0 and self.processes and not (self.first_failure and schedule.decided):
            for connection in wait([x.connection for x in self.processes], timeout=min(schedule.left, 0.5)):
                self.take(next(x for x in self.processes if x.connection is connection), schedule)
            for process in list(self.processes):
                if process.task and time.monotonic() - process.begin > 2 * self.patience:
                    # It does not return to Python, or it would have said that it is slow.
                    schedule.standing[process.task.row].slow = True
                    self.replace(process)
            judged = sum(bool(now.facts or now.trouble) for now in schedule.standing.values())
            examples = sum(now.total("compared") for now in schedule.standing.values())
            if judged:
                self.progress.show(judged, len(schedule.standing), examples, schedule.broken, schedule.left)

    def take(self, process: Process, schedule: Schedule) -> None:
        """Take what a process says, and give it another task; replace one that died."""
        answer = process.receive()
        if isinstance(answer, Answer) and process.task:
            schedule.note(process.number, process.task, answer)
        if answer is None or (isinstance(answer, Answer) and answer.lost):
            process.process.join(1)
            if answer is None and process.task:
                schedule.mourn(process.task, f"{ending(process.process.exitcode)}\n{self.said()}".strip())
            self.replace(process)
        elif isinstance(answer, Answer | Ready):
            self.give(process, schedule)
        else:
            # It cannot import what the first process could.
            self.remove(process)

    def replace(self, process: Process) -> None:
        """End a process, and start another if it has been of use."""
        self.remove(process)
        if process.task:
            self.spawn()

    def remove(self, process: Process) -> None:
        """End a process."""
        self.processes.remove(process)
        process.end()

    def give(self, process: Process, schedule: Schedule) -> None:
        """Hand out the next task; end a process for which there is none."""
        process.task, process.begin = schedule.next(process.number), time.monotonic()
        if process.task:
            process.connection.send(process.task)
        else:
            self.remove(process)

    def said(self) -> str:
        """Return the last lines that the processes have printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-4:]) if self.log.exists() else ""


def ending(code: int | None) -> str:
    """Say how a process ended."""
    if code is None or code >= 0:
        return f"the process that checked this law ended with exit status {code}"
    return f"the process that checked this law was ended by {signal.Signals(-code).name}"


def prepare_environment(device: str) -> None:
    """Set what the libraries look at when they are imported, as the plugin of pytest does."""
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

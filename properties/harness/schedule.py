"""What a quick run does next, and how each law stands."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from properties.harness import corpus
from properties.harness.corpus import RATCHET, Row, Task
from properties.harness.facts import Facts, Recorder, Verdict
from properties.harness.kernels import Kernels, Shape
from properties.harness.laws import PROPERTIES
from properties.harness.merging import together
from properties.harness.subjects import Subject
from properties.harness.worker import Answer, Ready, size
from properties.problems.problem import Problem

# The seconds that some fresh problems should take together, and how many they are at most.
BATCH, MOST = 0.4, 20
# A problem of this size is shown as it is: see `worker.size`.
SMALL = 4
# The examples of a law with share 1 in a full run: the profile `dev`.
FULL = 50
# The share of the time that may go into looking for smaller problems, while there is something else to do.
SHRINKING = 0.5


@dataclass
class Standing:
    """How a row stands.

    Attributes
    ----------
    facts : dict of int: Facts
        By the process that found them.
    trouble, outside : str
        Why it has no result; why it cannot be stated inside the domain.
    waiting : int
        Tasks that were handed out and not answered.
    seconds : float
        The time that its tasks have taken.
    drawn : int
        How many times fresh problems were drawn.
    slow : bool
        Whether an example did not end in time.
    search : int
        How many times as long as the first the next search for a smaller problem that fails may take; 0: none is due.
    """

    facts: dict[int, Facts] = field(default_factory=dict)
    trouble: str = ""
    outside: str = ""
    waiting: int = 0
    seconds: float = 0.0
    drawn: int = 0
    slow: bool = False
    search: int = 1

    def total(self, name: str) -> int:
        """Return a count of all processes."""
        return sum(getattr(facts, name) for facts in self.facts.values())

    @property
    def pace(self) -> float:
        """The seconds that an example takes."""
        return self.seconds / max(1, self.total("calls"))

    @property
    def failed(self) -> bool:
        """Whether an example failed."""
        return any(facts.failing_call for facts in self.facts.values())

    @property
    def open(self) -> bool:
        """Whether more examples may say more."""
        nowhere = self.outside and not self.total("compared")
        return not (self.failed or self.trouble or self.slow or nowhere)

    @property
    def large(self) -> bool:
        """Whether the problem that fails may be larger than it must be, or has numbers that may be simpler."""
        problems = [facts.failing_problem for facts in self.facts.values() if facts.failing_call]
        return any(size(problem)[0] > SMALL or Problem.from_json(problem).explicit for problem in problems)


class Schedule:
    """The tasks of a quick run, and the verdicts that follow from the answers.

    Parameters
    ----------
    subject : Subject
    ready : Ready
        What is verified.
    seed : int
        Of the fresh examples.
    end : float
        When no task may run any more, by `time.monotonic`.
    select : str
        Only the laws, fixtures and worst cases with this in their name.
    first_failure : bool
        Whether a failure is made smaller before anything else is checked, since it ends the run.
    """

    def __init__(
        self, subject: Subject, ready: Ready, seed: int, end: float, select: str = "", first_failure: bool = False
    ) -> None:
        self.subject, self.ready, self.seed, self.end, self.select = subject, ready, seed, end, select
        self.first_failure = first_failure
        self.begin, self.shrinking = time.monotonic(), 0.0
        self.rows = {name: row for name, row in corpus.rows().items() if select in row.test(ready.name)}
        self.of = {name: row for name, row in self.rows.items() if PROPERTIES[name].needs <= ready.claims}
        known = corpus.known(ready.name, subject.device, ready.claims, corpus.killers(subject.target))
        self.known = [task for task in known if select in task.row.test(ready.name)]
        rows = dict.fromkeys((*self.of.values(), *(task.row for task in self.known)))
        self.standing = {row: Standing() for row in rows}
        self.kernels = Kernels(ready) if subject.device == "cuda" else None
        self.compiled, self.compiling = 0, 0.0

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.end - time.monotonic()

    @property
    def decided(self) -> bool:
        """Whether something went wrong, and is known as well as it will be."""
        larger = self.to_shrink()
        settled = [row for row, now in self.standing.items() if row not in larger and not now.waiting]
        return any(self.standing[row].failed or self.standing[row].trouble for row in settled)

    @property
    def broken(self) -> int:
        """How many rows went wrong."""
        return sum(now.failed or bool(now.trouble) for now in self.standing.values())

    def next(self, process: int = 0) -> Task | None:
        """Return the next task of a process: a known problem, then a smaller one for a failure, then fresh ones."""
        due = self.shrinking <= SHRINKING * (time.monotonic() - self.begin)
        task = self.shrink() if due and self.first_failure else None
        task = task or self.stored(process) or (self.shrink() if due else None) or self.fresh() or self.shrink()
        if task:
            self.standing[task.row].waiting += 1
        return task

    def stored(self, process: int) -> Task | None:
        """Return the first task with a known problem; on a GPU the first of those that cost least and say most."""
        self.known = [task for task in self.known if self.standing[task.row].open]
        if not self.known:
            return None
        task = self.known[0]
        if self.kernels:
            wanted = Counter(
                shape for _, shape in {(x.row, self.kernels.shape(x)) for x in self.known if self.unseen(x.row)}
            )
            task = min(self.known, key=lambda task: self.cost(task, process, wanted))
        elif self.ready.domain:
            # Examples inside may take seconds.
            task = next((task for task in self.known if self.unseen(task.row)), task)
        self.known.remove(task)
        if self.kernels:
            self.kernels.begin(task, process)
        return replace(task, brief=self.brief(task.row))

    def unseen(self, row: Row) -> bool:
        """Whether a row has no example, and none under way."""
        return self.brief(row) and not self.standing[row].waiting

    def brief(self, row: Row) -> bool:
        """Whether a row has no example: a short one says most for its time."""
        return not self.standing[row].total("compared")

    def cost(self, task: Task, process: int, wanted: Mapping[Shape, int]) -> tuple[int, int]:
        """Return how late a task comes on a GPU; `wanted` says how many laws without an example have a shape.

        First come laws without an example, small problems before large ones, where the kernels are there; then a shape
        that no process has begun, since two processes would compile the same kernels, and that many laws have.
        """
        assert self.kernels
        ready, unseen = self.kernels.ready(task, process), self.unseen(task.row)
        if self.kernels.begun(task) and not ready:
            return 4, 0
        if ready and unseen:
            return 0, self.kernels.size(task)
        return (1, -wanted[self.kernels.shape(task)]) if unseen else (2 if ready else 3, 0)

    def shrink(self) -> Task | None:
        """Return the search for a smaller problem, where there is a failure that needs one."""
        for row in self.to_shrink():
            if not self.standing[row].waiting:
                longer, self.standing[row].search = self.standing[row].search, 0
                return Task(row, shrink=longer)
        return None

    def to_shrink(self) -> list[Row]:
        """Return the laws that failed with a problem which may be larger than it must be."""
        standing = ((row, self.standing[row]) for row in self.of.values())
        return [row for row, now in standing if now.failed and now.search and (now.large or now.search > 1)]

    def fresh(self) -> Task | None:
        """Return fresh problems of the law that has had the smallest part of its share, if one still fits in."""
        rows = [x for x in self.of.values() if self.standing[x].open and self.standing[x].pace < self.left]
        if not rows:
            return None
        row = min(rows, key=lambda x: (self.standing[x].total("calls") + self.standing[x].waiting) / share(x))
        now = self.standing[row]
        now.drawn += 1
        count = round(min(BATCH, self.left) / max(now.pace, 1e-3))
        return Task(row, seed=self.seed * 10**6 + now.drawn, count=min(MOST, max(1, count)), brief=self.brief(row))

    def note(self, process: int, task: Task, answer: Answer) -> None:
        """Keep an answer of a process."""
        now = self.standing[task.row]
        now.facts[process] = answer.facts
        now.trouble, now.outside = now.trouble or answer.trouble, now.outside or answer.outside
        now.slow |= answer.slow
        now.waiting -= 1
        self.compiled, self.compiling = self.compiled + answer.kernels, self.compiling + answer.compiling
        if self.kernels:
            self.kernels.end(replace(task, brief=False))
        if task.shrink:
            self.shrinking += answer.seconds
            # It begins anew: on a busy machine it may need more time.
            now.search = 2 * task.shrink if answer.unfinished and not self.first_failure else 0
        else:
            now.seconds += answer.seconds - answer.compiling

    def mourn(self, task: Task, why: str) -> None:
        """Note that a process died of a task."""
        now = self.standing[task.row]
        now.trouble = now.trouble or why
        now.waiting -= 1

    def verdicts(self, why: str) -> list[Verdict]:
        """Return the verdict on each row; `why` says why some may have none."""
        found = [self.standing_of(row, why) for row in dict.fromkeys((*self.rows.values(), *self.standing))]
        if RATCHET in self.standing or self.select not in RATCHET.law:
            return found
        return [*found, self.unclaimed(RATCHET, ("worst cases in ratchet.json",))]

    def said(self, interrupted: bool) -> list[str]:
        """Return how much was checked, and how much less than in a full run that is."""
        seen = {row: self.standing[row].total("compared") for row in self.of.values()}
        open_ = [row for row in seen if self.standing[row].open]
        fewer = [row for row in open_ if seen[row] < FULL * share(row)]
        never = sum(not (now.facts or now.trouble) for now in self.standing.values())
        lines = [f"titans: interrupted: {never} of {len(self.standing)} laws and fixtures not judged"]
        return lines * interrupted + [
            f"titans: quick: {sum(seen.values())} examples of {len(seen)} laws; {len(fewer)} laws without a failure "
            "have had fewer than in a full run",
            *self.compilation(),
        ]

    def compilation(self) -> list[str]:
        """Return how much of the time went into compiling."""
        if not self.compiled:
            return []
        spent = sum(now.seconds for now in self.standing.values()) + self.shrinking + self.compiling
        return [
            f"titans: quick: {self.compiled} kernels compiled in {self.compiling / spent:.0%} of the processes' time: "
            "a longer --budget has more examples"
        ]

    def standing_of(self, row: Row, why: str) -> Verdict:
        """Return the verdict on a row."""
        if row not in self.standing:
            return self.unclaimed(row, tuple(sorted(PROPERTIES[row.law].needs - self.ready.claims)))
        now = self.standing[row]
        # Of several processes that saw it fail, the one with the smallest problem comes first.
        parts = sorted(now.facts.values() or [Facts()], key=lambda x: size(x.failing_problem) if x.failing_call else ())
        found = together([self.verdict(row, facts) for facts in parts], replayed=())
        if now.failed:
            return replace(found, verdict="fail")
        if now.trouble or not (now.total("compared") or (row.fixture and now.facts)):
            if now.outside and not now.trouble:
                return replace(found, verdict="not claimed", outside=now.outside)
            slow = "an example takes too long for a quick run: the whole suite judges this law" if now.slow else ""
            again = Recorder(row.test(self.ready.name), self.subject.options).command
            return replace(found, verdict="error", message=now.trouble or slow or why, replay=again)
        return found

    def unclaimed(self, row: Row, lacking: tuple[str, ...]) -> Verdict:
        """Return the verdict on a law that needs more than is claimed."""
        return replace(self.verdict(row, Facts()), verdict="not claimed", lacking=lacking)

    def verdict(self, row: Row, facts: Facts) -> Verdict:
        """Return the verdict on a row as one process sees it."""
        return Verdict(
            test=row.test(self.ready.name),
            law=row.law,
            implementation=self.ready.name,
            verdict="fail" if facts.failing_call else "pass (quick)",
            device=self.subject.device,
            sections=row.sections,
            domain=self.ready.domain,
            **facts.as_dict(),
        )


def share(row: Row) -> float:
    """Return the share of the examples that a law has in a full run."""
    return PROPERTIES[row.law].share

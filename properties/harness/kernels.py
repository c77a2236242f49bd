"""For which shapes a quick run has compiled kernels on a GPU: a process that needs others waits for them."""

from dataclasses import replace

from properties import test_fixtures
from properties.harness.corpus import FIXTURES, Task
from properties.harness.laws import PROPERTIES
from properties.harness.worker import Ready, fresh
from properties.problems.domain import Domain, cells
from properties.problems.problem import Problem
from properties.problems.shapes import FEWEST

# dtype, memory, D and C; packed, resumed, with log gates.
Shape = tuple[str, str, int, int, bool, bool, bool]


class Kernels:
    """The shapes for which kernels are compiled: Triton keeps them on disk, for all processes.

    Parameters
    ----------
    ready : Ready
        What is verified: it may map several shapes to one.
    """

    def __init__(self, ready: Ready) -> None:
        self.claims, self.domain = ready.claims, replace(Domain.parse(ready.domain), few_shapes=FEWEST, brief=True)
        self.problems: dict[Task, Problem | None] = {}
        self.by: dict[Shape, set[int]] = {}
        self.ended = set[Shape]()

    def problem(self, task: Task) -> Problem | None:
        """Return the first problem of a task, as the implementation gets it; None for a stored worst case."""
        if task not in self.problems:
            problem = task.problem
            if task.row.fixture:
                problem, _ = test_fixtures.read(FIXTURES / f"{task.row.fixture}.json")
            elif task.count:
                (problem,) = fresh(PROPERTIES[task.row.law], 0, 1)
            self.problems[task] = self.domain.nearest(problem.restricted(self.claims)) if problem else None
        return self.problems[task]

    def shape(self, task: Task) -> Shape:
        """Return what kernels are compiled for, as far as it is known before the call."""
        problem = self.problem(task)
        if problem is None:
            # A stored worst case has its own.
            return task.case, "", 0, 0, False, False, False
        ways = problem.packed, problem.initial == "full", problem.log_gates
        return problem.dtype, problem.memory, problem.D, problem.C, *ways

    def size(self, task: Task) -> int:
        """Return the cost of a task's problem in brief to the oracle."""
        problem = self.problem(task)
        return cells(problem) if problem else 0

    def begin(self, task: Task, process: int) -> None:
        """Note that a process has been given a task."""
        self.by.setdefault(self.shape(task), set()).add(process)

    def end(self, task: Task) -> None:
        """Note that a task has ended."""
        if task in self.problems:
            self.ended.add(self.shape(task))

    def begun(self, task: Task) -> bool:
        """Whether some process has begun with the shape of a task."""
        return self.shape(task) in self.by

    def ready(self, task: Task, process: int) -> bool:
        """Whether kernels for the shape of a task are compiled, or this process has begun with them."""
        shape = self.shape(task)
        return shape in self.ended or process in self.by.get(shape, ())

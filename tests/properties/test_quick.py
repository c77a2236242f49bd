"""Does a quick run end with its time, begin with what has shown mistakes, and say what it has not judged?"""

import contextlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from properties import verify
from properties.harness import corpus, progress, schedule, waiting
from properties.harness.compiling import Compiling
from properties.harness.corpus import RATCHET, Row, Task
from properties.harness.facts import Facts
from properties.harness.implementations import CLAIMS, implementation
from properties.harness.laws import PROPERTIES
from properties.harness.progress import Progress, duration
from properties.harness.quick import RESERVE, Process, Quick
from properties.harness.schedule import Schedule
from properties.harness.subjects import Subject
from properties.harness.worker import Answer, Judge, Ready, fresh, serve
from properties.problems.domain import Domain, Sizes
from properties.problems.problem import Problem
from tests.properties import wrong

corpus.import_laws()
ROOT = Path(__file__).parents[2]
VALUES, GRADIENTS = "test_values_are_the_oracles", "test_gradients_are_the_oracles"
FAILED = Facts(calls=1, compared=1, failing_call=1, failing_problem=Problem(lengths=(9,)).to_json(), message="wrong")


def scheduled(*lacking: str, target: str = "m:f", select: str = "", seconds: float = 60.0) -> Schedule:
    """What a quick run is going to do with an implementation."""
    ready = Ready(target, CLAIMS - set(lacking), "", "cpu only")
    return Schedule(Subject(target), ready, seed=0, end=time.monotonic() + seconds, select=select)


def passed(count: int = 1, seconds: float = 0.1) -> Answer:
    """An answer without a failure."""
    return Answer(Facts(calls=count, compared=count), seconds=seconds)


def test_what_is_known_comes_first_and_every_law_comes_once() -> None:
    plan = scheduled(target="chunk")
    tasks: list[Task] = []
    while plan.known:
        task = plan.next()
        assert task is not None
        tasks.append(task)
        plan.note(0, task, passed())
    killing = corpus.killers("chunk")
    assert [(task.row.law, task.problem) for task in tasks[: len(killing)]] == killing
    plain = [task.row.law for task in tasks if task.count == 1]
    assert sorted(plain) == sorted(law for law, x in PROPERTIES.items() if x.needs <= plan.ready.claims)
    assert len([task for task in tasks if task.row.fixture]) == len(corpus.fixtures())
    assert [task.row for task in tasks if task.case] == [RATCHET] * len([task for task in tasks if task.case])
    # Then fresh ones, of the law that has had the smallest part of its share.
    later = plan.next()
    assert later is not None
    assert (later.problem, later.case, later.row.fixture) == (None, "", "")
    assert later.count > 1


def on_a_gpu(*lacking: str, domain: str = "") -> Schedule:
    """What a quick run is going to do with a kernel on a GPU."""
    ready = Ready("m:f", CLAIMS - set(lacking), domain, "a GPU")
    return Schedule(Subject("m:f", device="cuda"), ready, seed=0, end=time.monotonic() + 60)


def test_processes_begin_with_different_shapes_on_a_gpu_so_that_none_is_compiled_twice() -> None:
    plan = on_a_gpu()
    assert plan.kernels
    first = [task for process in range(8) if (task := plan.next(process))]
    shapes = [plan.kernels.shape(task) for task in first]
    assert len({*shapes}) == 8
    # The process goes on with its shape, and with laws that have no example, until others may have its kernels.
    for _ in range(3):
        more = plan.next(3)
        assert more
        assert plan.kernels.shape(more) == shapes[3]
        assert more.row not in [task.row for task in first]
        first.append(more)
    other = plan.next(8)
    assert other
    assert plan.kernels.shape(other) not in shapes
    plan.note(3, first[3], passed())
    ready = plan.next(9)
    assert ready
    assert plan.kernels.shape(ready) == shapes[3]


def test_every_law_has_an_example_on_a_gpu_before_any_has_two() -> None:
    plan = on_a_gpu(domain="D=64 C=64 dtype=bfloat16 memory=normalised")
    first: dict[Task, Row] = {}
    while len(first) < len(plan.standing):
        task = plan.next()
        assert task
        assert task.row not in first.values()
        first[task] = task.row
        plan.note(0, task, passed())
    assert plan.kernels
    # Once there are kernels, laws with small problems come first.
    begin, *others = first
    sizes = [plan.kernels.size(task) for task in others if plan.kernels.shape(task) == plan.kernels.shape(begin)]
    assert len(sizes) > len(first) / 2
    assert sizes == sorted(sizes)
    assert {plan.kernels.shape(task)[0] for task in plan.known} == {"bfloat16"}


def test_every_law_of_a_domain_has_an_example_in_brief_before_any_has_two() -> None:
    ready = Ready("m:f", CLAIMS, "D=64 C=64", "cpu only")
    plan = Schedule(Subject("m:f"), ready, seed=0, end=time.monotonic() + 60)
    seen: list[Row] = []
    while len(seen) < len(plan.standing):
        task = plan.next()
        assert task
        assert task.brief
        seen.append(task.row)
        plan.note(0, task, passed())
    assert len({*seen}) == len(seen)
    later = plan.next()
    assert later
    assert not later.brief


def test_the_time_of_compilers_is_said_and_is_not_taken_for_that_of_an_example() -> None:
    plan = scheduled(select=f"{VALUES}[")
    row = plan.of[VALUES]
    plan.note(0, Task(row, count=1), replace(passed(2, seconds=10.0), kernels=7, compiling=9.0))
    assert plan.standing[row].pace == 0.5
    assert plan.said(interrupted=False)[-1] == (
        "titans: quick: 7 kernels compiled in 90% of the processes' time: a longer --budget has more examples"
    )


def test_kernels_that_are_compiled_are_counted_and_those_of_the_cache_are_not() -> None:
    counted = Compiling()
    for hit in (False, True, False):
        counted.note(src=None, metadata={}, metadata_group={}, times=Namespace(total=1_500_000), cache_hit=hit)
    assert (counted.kernels, counted.seconds) == (2, 3.0)
    judge = Judge(implementation("chunk", "cpu"), Subject("chunk"), patience=30)
    judge.compiling = counted
    answer = judge.answer(Task(row(VALUES), count=1))
    assert (answer.kernels, answer.compiling) == (0, 0.0)


def test_triton_tells_of_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton").knobs.compilation
    monkeypatch.setattr(knobs, "listener", None)
    counted = Compiling()
    counted.watch()
    assert knobs.listener == counted.note


def test_an_implementation_without_a_history_has_the_worst_cases_of_a_backend_as_problems() -> None:
    plan = scheduled()
    assert not [task for task in plan.known if task.case]
    assert len([task for task in plan.known if task.problem]) > len(corpus.killers())
    verdicts = {row.law: row for row in plan.verdicts("the time was up")}
    assert verdicts["test_ratchet"].verdict == "not claimed"


def test_only_what_was_claimed_and_not_judged_is_missing() -> None:
    plan = scheduled("backward", target="chunk", select="_are_the_oracles")
    by_law = {row.law: row for row in plan.verdicts("the time was up")}
    assert by_law[VALUES].verdict == "error"
    assert by_law[VALUES].message == "the time was up"
    assert by_law[VALUES].replay == f"pytest 'properties/test_oracle.py::{VALUES}[chunk]' --backends chunk"
    assert (by_law[GRADIENTS].verdict, by_law[GRADIENTS].lacking) == ("not claimed", ("backward",))
    plan.note(0, Task(plan.of[VALUES], count=1), passed(3))
    plan.note(1, Task(plan.of[VALUES], count=1), passed(4))
    (row,) = (row for row in plan.verdicts("the time was up") if row.law == VALUES)
    assert (row.verdict, row.compared, row.sections) == ("pass (quick)", 7, ("5.1", "5.8"))


@pytest.mark.parametrize(
    ("answer", "verdict", "said"),
    [
        (Answer(FAILED), "fail", "wrong"),
        (Answer(Facts(), trouble="TypeError: a law must return"), "error", "TypeError"),
        (Answer(Facts(), slow=True), "error", "too long for a quick run"),
        (Answer(Facts(refused=40), outside="D = 1 is outside"), "not claimed", ""),
        # What was judged before an example took too long counts.
        (Answer(Facts(calls=1, compared=1), slow=True), "pass (quick)", ""),
    ],
)
def test_each_answer_has_its_verdict_and_ends_its_law(answer: Answer, verdict: str, said: str) -> None:
    plan = scheduled(select=f"{VALUES}[")
    plan.known.clear()
    plan.standing[plan.of[VALUES]].waiting = 1
    plan.note(0, Task(plan.of[VALUES], count=1), answer)
    (row,) = plan.verdicts("the time was up")
    assert (row.verdict, row.outside) == (verdict, answer.outside)
    assert said in row.message
    # A failure may become smaller; nothing else comes of this law.
    assert plan.next() == (Task(plan.of[VALUES], shrink=1) if verdict == "fail" else None)
    assert plan.broken == (verdict == "fail" or "TypeError" in said)


def test_the_first_failure_decides_when_it_is_as_small_as_it_will_be() -> None:
    plan = scheduled(select="_are_the_oracles[")
    task = plan.next()
    assert task is not None
    assert not plan.decided
    plan.note(0, task, Answer(FAILED))
    # Nine tokens are many.
    assert not plan.decided
    assert plan.known
    plan.first_failure = True
    smaller = plan.next()
    assert smaller == Task(task.row, shrink=1)
    assert not plan.decided
    plan.note(0, smaller, Answer(FAILED))
    assert plan.decided
    # Another failure that may become smaller delays nothing.
    (other,) = {plan.of[VALUES], plan.of[GRADIENTS]} - {task.row}
    plan.standing[other].waiting = 1
    plan.note(0, Task(other, count=1), Answer(FAILED))
    assert plan.decided


def test_a_search_for_a_smaller_problem_that_ended_with_its_time_is_repeated_and_takes_longer() -> None:
    plan = scheduled(select=f"{VALUES}[")
    plan.known.clear()
    task = plan.of[VALUES]
    plan.standing[task].waiting = 1
    plan.note(0, Task(task, count=1), Answer(FAILED))
    for longer in (1, 2, 4):
        assert plan.next() == Task(task, shrink=longer)
        assert plan.next() is None
        plan.note(0, Task(task, shrink=longer), Answer(FAILED, unfinished=longer < 4, seconds=10.0 * longer))
    assert plan.next() is None
    one, large = judge(wrong.Half()), Problem(lengths=(6,), H=2, D=3, C=4, memory="normalised")
    one.answer(Task(row(VALUES), large))
    one.patience = 0.0
    assert one.answer(Task(row(VALUES), shrink=1)).unfinished


def test_the_smallest_problem_that_any_process_found_is_shown() -> None:
    plan = scheduled(select=f"{VALUES}[")
    for process, tokens in enumerate((9, 1, 3)):
        found = replace(FAILED, failing_problem=Problem(lengths=(tokens,)).to_json())
        plan.note(process, Task(plan.of[VALUES], count=1), Answer(found))
    (verdict,) = plan.verdicts("the time was up")
    assert verdict.failing_problem == Problem(lengths=(1,)).to_json()
    # A process that has not seen the failure may be the one that looks for a smaller problem.
    facts = judge(wrong.Half()).answer(Task(row(VALUES), shrink=1)).facts
    assert facts.failing_call
    assert Problem.from_json(facts.failing_problem).tokens == 1


def test_a_process_that_dies_is_mourned() -> None:
    plan = scheduled(select=f"{VALUES}[")
    plan.mourn(Task(plan.of[VALUES], count=1), "ended by SIGSEGV")
    (row,) = plan.verdicts("the time was up")
    assert (row.verdict, row.message) == ("error", "ended by SIGSEGV")


def test_nothing_is_begun_that_does_not_fit_in() -> None:
    plan = scheduled(select=f"{VALUES}[", seconds=1.0)
    plan.known.clear()
    plan.note(0, Task(plan.of[VALUES], count=1), passed(seconds=5.0))
    assert plan.next() is None


def test_what_was_not_covered_is_said() -> None:
    plan = scheduled(select="_are_the_oracles[")
    whole = int(schedule.FULL * PROPERTIES[VALUES].share)
    plan.note(0, Task(plan.of[VALUES], count=1), passed(whole))
    (line,) = plan.said(interrupted=False)
    assert f"quick: {whole} examples of 2 laws; 1 laws without a failure have had fewer than in a full run" in line
    assert plan.said(interrupted=True)[0] == "titans: interrupted: 1 of 2 laws and fixtures not judged"


def test_every_draw_gives_other_problems_and_the_same_again() -> None:
    law = PROPERTIES[VALUES]
    (plainest,) = fresh(law, 0, 5)
    one, other = fresh(law, 1, 5), fresh(law, 2, 5)
    assert len(one) == len(other) == 5
    assert plainest not in (*one, *other)
    assert not {*one} & {*other}
    assert fresh(law, 1, 5) == one


def judge(definition: Any, **changes: Any) -> Judge:
    """What puts a definition before the laws."""
    return Judge(replace(wrong.implementation(definition), **changes), Subject("m:f"), patience=30)


def row(law: str) -> Row:
    """The row of a law."""
    return corpus.rows()[law]


def test_a_failure_is_found_made_smaller_and_can_be_seen_again() -> None:
    one, large = judge(wrong.Half()), Problem(lengths=(6,), H=2, D=3, C=4, memory="normalised")
    answer = one.answer(Task(row(VALUES), large))
    assert Problem.from_json(answer.facts.failing_problem) == large
    smaller = one.answer(Task(row(VALUES), shrink=1)).facts
    problem = Problem.from_json(smaller.failing_problem)
    assert problem.tokens * problem.H * problem.D == 1
    assert (
        smaller.replay
        == f"pytest 'properties/test_oracle.py::{VALUES}[Half]' --impl m:f --replay '{problem.to_json()}'"
    )
    assert not judge(wrong.Definition()).answer(Task(row(VALUES), problem)).facts.failing_call


def test_fixtures_and_worst_cases_are_judged_as_in_the_suite() -> None:
    fixture = next(row for row in corpus.fixtures() if row.fixture.startswith("002"))
    assert judge(wrong.TailRunsOn()).answer(Task(fixture)).facts.failing_call
    found = judge(wrong.Definition()).answer(Task(fixture))
    assert (found.facts.failing_call, found.trouble) == (0, "")
    case = f"{VALUES} float32"
    one = Judge(implementation("chunk", "cpu"), Subject("chunk"), patience=30)
    facts = one.answer(Task(RATCHET, case=case)).facts
    assert list(facts.tightness)[-1] == f"ratchet {case}"


def test_a_law_that_the_plainest_problem_does_not_exercise_is_judged_all_the_same() -> None:
    law = "test_what_is_not_finite_stays_in_its_sequence_and_head"
    assert judge(wrong.Definition()).answer(Task(row(law), count=1)).facts.compared == 1


def test_what_a_domain_excludes_is_not_claimed() -> None:
    one = judge(wrong.Definition(), domain=Domain(T=Sizes(values=(0,))))
    task = Task(row("test_later_tokens_change_no_earlier_output"), seed=1, count=40)
    assert "no problem inside T=0 exercises it, or none small enough for a quick run" in one.answer(task).outside


def test_an_example_that_takes_too_long_is_no_failure() -> None:
    def sleeps(*arguments: Any, **options: Any) -> Any:
        time.sleep(5)

    one = Judge(replace(wrong.implementation(wrong.Definition()), call=sleeps), Subject("m:f"), patience=0.2)
    answer = one.answer(Task(row(VALUES), Problem()))
    assert answer.slow
    assert answer.facts == Facts()


def test_a_gpu_that_is_not_there_is_a_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # The process has its own standard output and signals.
    for module, name in ((os, "open"), (os, "dup2"), (signal, "signal"), (torch, "set_num_threads")):
        monkeypatch.setattr(module, name, lambda *given: 0)
    monkeypatch.setattr(waiting, "STDERR", waiting.STDERR)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    mine, other = Pipe()
    serve(other, Subject("chunk", device="cuda"), lambda: None, tmp_path / "log", 0, 10.0)
    assert mine.recv().startswith("--device cuda needs a GPU that PyTorch can use (torch.cuda.is_available() is False)")


class Terminal(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_progress_is_one_line_on_a_terminal_and_lines_elsewhere(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ON_A_TERMINAL", "ELSEWHERE"):
        monkeypatch.setattr(progress, name, 0.0)
    shown = Progress(stream)
    shown.show(1, 61, 10, 1, 100.0)
    shown.show(2, 61, 20, 2, 7.4)
    shown.end()
    lines = ("1/61 laws, 10 examples, 1 failure, 1 min 40 s left", "2/61 laws, 20 examples, 2 failures, 7 s left")
    wanted = f"\r{lines[0]}\r{lines[1]:50}\r{'':{len(lines[1])}}\r" if stream.isatty() else "\n".join((*lines, ""))
    assert stream.getvalue() == wanted


def test_a_time_that_is_left_is_never_negative() -> None:
    assert [duration(x) for x in (-3.0, 99.4, 100.0, 605.0)] == ["0 s", "99 s", "1 min 40 s", "10 min 05 s"]


def command(*arguments: str) -> list[str]:
    """The command `verify`."""
    return [sys.executable, "-m", "properties", "verify", *arguments]


def test_a_quick_run_judges_a_wrong_kernel_and_survives_one_that_dies(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    targets = ("tests.properties.mistaken:without_factor", "tests.properties.misbehaving:dies")
    words = (*targets, "--budget", "4m", "-n", "2", "--select", "any_small", "--json", str(path))
    done = subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    document = json.loads(path.read_text())
    assert document["profile"] == "quick"
    # Both end before their time, which a busy machine may need to shrink in: nothing is left to do.
    assert document["seconds"] < 400
    failed, died = document["verdicts"]
    assert (failed["verdict"], died["verdict"]) == ("fail", "error")
    assert Problem.from_json(failed["failing_problem"]).tokens == 1
    assert "ended by SIGKILL" in died["message"]


class Thread:
    """A process of a quick run that is none: every example passes."""

    exitcode = None

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        """Answer."""
        self.connection.send(Ready("m:f", CLAIMS, "", "cpu only"))
        with contextlib.suppress(EOFError, OSError):
            for count in itertools.count(1):
                self.connection.recv()
                time.sleep(0.01)
                self.connection.send(passed(count, seconds=0.01))

    def kill(self) -> None:
        """End."""

    def join(self, seconds: float = 0) -> None:
        """End."""


class Threaded(Quick):
    """A quick run without processes."""

    def spawn(self) -> Process:
        mine, other = Pipe()
        self.processes.append(Process(Thread(other), mine, len(self.processes)))
        return self.processes[-1]


def test_a_quick_run_ends_with_its_time() -> None:
    begin = time.monotonic()
    run = Threaded(Subject("m:f"), begin, begin + 3, select=f"{VALUES}[", workers=1)
    (verdict,) = run.run()
    assert verdict.verdict == "pass (quick)"
    # A busy machine may be late.
    assert 3 - 1.5 * RESERVE < time.monotonic() - begin < 60
    assert run.about(3)[1] == "titans: m:f on cpu (cpu only), quick: 3 s, seed 0"


def test_a_quick_run_is_a_function_too() -> None:
    found = verify("tests.properties.mistaken:without_factor", budget="2m", select="any_small", workers=1)
    (failure,) = found.failures
    assert failure.problem
    assert failure.problem.tokens == 1
    with pytest.raises(ValueError, match="'nowhere:f' cannot be imported"):
        verify("nowhere:f", budget="2m", workers=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_shows_what_it_has_judged(number: int, tmp_path: Path) -> None:
    words = command("chunk", "--budget", "10m", "-n", "1", "--json", str(tmp_path / "x.json"))
    # In the background of a script Ctrl-C is ignored, by children too; a handler is not inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        signal.signal(signal.SIGINT, before)
        try:
            assert process.stderr
            # The first line of progress.
            assert "laws" in process.stderr.readline()
            os.kill(process.pid, number)
            output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 1
    assert re.search(r"titans: interrupted: \d+ of \d+ laws and fixtures not judged", output), output
    assert re.search(r"ERROR|tests have no result", output)
    document = json.loads((tmp_path / "x.json").read_text())
    assert {row["verdict"] for row in document["verdicts"]} >= {"pass (quick)", "error"}

"""A verdict on every law and implementation that was collected, whatever becomes of the process that checks it."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from properties.harness import corpus, ratchet, report
from properties.harness.containment import interrupted
from properties.harness.facts import Recorder, Verdict
from properties.harness.implementations import Implementation

# Seconds between two calls of a function that `now_and_then` returned.
PAUSE = 5.0
# The worst comes first: of several verdicts on one test the first of these holds.
ORDER = ("error", "fail", "pass (quick)", "pass", "not claimed")


class Ledger:
    """A pytest plugin: gathers the verdicts of all workers, and says which tests have none.

    Parameters
    ----------
    implementations : collection of Implementation
        The implementations of the run.
    options : sequence of (name, value)
        The options of the run that the command of a test repeats.
    """

    def __init__(self, implementations: Collection[Implementation], options: Sequence[tuple[str, str]] = ()) -> None:
        self.implementations, self.options = implementations, tuple(options)
        self.collected: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, Verdict] = {}
        # The reports that pytest-xdist made of tests in which a worker died.
        self.crashes: dict[str, pytest.TestReport] = {}
        # Why the results could not be stored.
        self.trouble = ""
        # How many tests the run did not come to.
        self.unjudged = 0
        # Called with every new verdict.
        self.changed: Callable[[], None] = lambda: None

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdicts in the order of the collection."""
        return [self.rows[test] for test in dict.fromkeys((*self.collected, *self.rows)) if test in self.rows]

    @property
    def left_out(self) -> list[str]:
        """The line that says how many tests the run leaves out, if it does."""
        tests = [(about["law"], about["implementation"]) for about in self.collected.values()]
        return corpus.left_out(tests, [x.name for x in self.implementations], ratchet.PARTS)

    @property
    def exit_status(self) -> pytest.ExitCode:
        """The exit status that the verdicts amount to, whatever pytest's own is."""
        wrong = any(row.went_wrong for row in self.verdicts)
        wrong = wrong or bool(report.too_many_ill_conditioned(self.verdicts))
        return pytest.ExitCode.TESTS_FAILED if wrong else pytest.ExitCode.OK

    def expect(self, tests: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Note the tests that were collected, by node id, each with what it is about."""
        self.collected |= {test: about for test, about in tests if about["implementation"]}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        """Note the tests that a worker collected: the process that controls it collects nothing."""
        self.expect((test, self.named(test)) for test in ids if test not in self.collected)

    def named(self, test: str) -> dict[str, Any]:
        """Return what a test is about by its node id, as far as that says."""
        law, _, parameters = test.rpartition("::")[2].partition("[")
        # The implementation is the first parameter; the name of a fixture may end with that of another.
        first = parameters.removesuffix("]") + "-"
        found = [x for x in self.implementations if first.startswith(f"{x.name}-")]
        subject = max(found, key=lambda x: len(x.name), default=None)
        device = subject.device if subject else ""
        return {"law": law, "implementation": subject.name if subject else "", "device": device}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Where a file of laws cannot be collected, none of the implementations has a verdict on them."""
        if report.failed:
            for x in self.implementations:
                said = {"law": report.nodeid, "implementation": x.name, "device": x.device}
                self.enter(report.nodeid + f"[{x.name}]", "error", said, reason(report))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the verdict of a test that ran, or could not."""
        if interrupted.is_set() and (report.when, report.outcome) == ("call", "failed"):
            # The interrupt may be what failed.
            return
        if outcome := verdict(report):
            self.enter(report.nodeid, outcome, report.user_properties, reason(report))
            if report.when not in ("setup", "call", "teardown"):
                self.crashes[report.nodeid] = report

    def enter(self, test: str, outcome: str, said: Any, why: str) -> None:
        """Keep a verdict, unless there is a worse one on the same test, as where a plugin runs it again."""
        said = report.properties(said) if isinstance(said, dict) else said
        known = report.properties(self.collected.get(test, {}))
        row = report.read(test, outcome, (why,) if outcome == "not claimed" else (), [*known, *said])
        if row is None:
            return
        if outcome in ("pass", "not claimed") and (row.failing_call or row.message):
            # The law was broken, even if its exception did not arrive.
            outcome = "fail"
            row = replace(row, verdict=outcome)
        if outcome in ("fail", "error"):
            again = Recorder(test, self.options).command
            row = replace(row, message=row.message or why, replay=row.replay or again)
        if test not in self.rows or ORDER.index(outcome) < ORDER.index(self.rows[test].verdict):
            self.rows[test] = row
            self.changed()

    def complete(self, config: pytest.Config) -> None:
        """Report an error for each test without a verdict, to pytest's other plugins too."""
        for test, about in self.collected.items():
            if crash := self.crashes.get(test):
                ended = synthetic(test, about, "passed", None, "teardown")
                ended.node = getattr(crash, "node", None)  # type: ignore[attr-defined]
                config.hook.pytest_runtest_logreport(report=ended)
            elif test not in self.rows:
                self.unjudged += 1
                why = "the run ended before this test had a verdict"
                config.hook.pytest_runtest_logreport(report=synthetic(test, about, "failed", why, "setup"))
                config.hook.pytest_runtest_logreport(report=synthetic(test, about, "passed", None, "teardown"))


def synthetic(test: str, about: dict[str, Any], outcome: Any, why: str | None, when: Any) -> pytest.TestReport:
    """Return a report of a test that made none."""
    path = test.partition("::")[0]
    facts = report.properties(about)
    return pytest.TestReport(test, (path, None, test), {}, outcome, why, when, user_properties=facts)


def verdict(given: pytest.TestReport) -> str | None:
    """Return the verdict in a report of pytest's, or of a plugin's with outcomes of its own; None: not the last word.

    A test that is run again after a failure (outcome "rerun") has failed.
    """
    if given.when == "call":
        expected = {"passed": "pass", "skipped": "fail" if hasattr(given, "wasxfail") else "not claimed"}
        return expected.get(given.outcome, "fail")
    if given.outcome == "passed":
        return None
    return "not claimed" if (given.when, given.outcome) == ("setup", "skipped") else "error"


def reason(given: pytest.TestReport | pytest.CollectReport) -> str:
    """Return why a test was skipped, or how it ended."""
    if isinstance(given.longrepr, tuple):
        return given.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(given.longrepr, "reprcrash", None)
    return str(crash.message if crash else given.longrepr or "")


def now_and_then(function: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls another one, unless it has just done so."""
    last = -math.inf

    def called() -> None:
        nonlocal last
        if time.monotonic() - last > PAUSE:
            function()
            last = time.monotonic()

    return called

"""How far a run has come, in one line."""

import functools
import hashlib
import math
import os
import time
from collections.abc import Callable
from typing import Any, TextIO

import pytest

from properties.harness.report import PREFIX

# Seconds between two lines, on a terminal and elsewhere.
ON_A_TERMINAL, ELSEWHERE = 0.2, 10.0


class Progress:
    """Shows on a terminal one line that changes, and elsewhere a new line now and then.

    Parameters
    ----------
    stream : TextIO or None
        None: nothing is shown.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream, self.shown, self.width = stream, -math.inf, 0
        self.terminal = stream is not None and stream.isatty()

    def show(self, laws: int, of: int, examples: int, failures: int, left: float | None) -> None:
        """Show how many laws have been judged, how many examples were checked, and the seconds that are left."""
        now = time.monotonic()
        if self.stream is None or now - self.shown < (ON_A_TERMINAL if self.terminal else ELSEWHERE):
            return
        self.shown = now
        text = f"{laws}/{of} laws, {examples} examples, {failures} {'failure' if failures == 1 else 'failures'}"
        text += "" if left is None else f", {duration(left)} left"
        if self.terminal:
            print(f"\r{text:{self.width}}", end="", file=self.stream, flush=True)
            self.width = len(text)
        else:
            print(text, file=self.stream, flush=True)

    def end(self) -> None:
        """Leave the terminal as it was."""
        if self.terminal and self.width:
            print(f"\r{'':{self.width}}\r", end="", file=self.stream, flush=True)


def duration(seconds: float) -> str:
    """Show a time that is left."""
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60:02} s"


class Watcher:
    """A pytest plugin: shows how far a run has come, in place of pytest's letters.

    Parameters
    ----------
    progress : Progress
    before : callable
        Returns the seconds that the last run with the same options took, if there was one.
    """

    def __init__(self, progress: Progress, before: Callable[[], float | None]) -> None:
        self.progress, self.before, self.begin = progress, before, time.monotonic()
        self.usual: float | None = None
        self.tests, self.done, self.examples, self.failures = 0, 0, 0, 0

    def pytest_sessionstart(self) -> None:
        """Look how long such a run takes."""
        self.usual = self.before()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note how many tests there are."""
        self.tests = self.tests or len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Note how many tests a worker has found."""
        self.tests = len(ids)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Print no letter."""
        plain = report.outcome in ("passed", "failed", "skipped") and not hasattr(report, "wasxfail")
        ran = report.when == "call" or report.outcome != "passed"
        return (report.outcome if ran else "", "", report.outcome) if plain else None

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test."""
        if report.when != "call" and report.outcome == "passed":
            return
        facts: dict[str, Any] = dict(report.user_properties)
        self.done += 1
        self.failures += report.outcome == "failed"
        self.examples += facts.get(PREFIX + "compared", 0)
        spent = time.monotonic() - self.begin
        left = self.usual - spent if self.usual else spent * (self.tests - self.done) / max(1, self.done)
        self.progress.show(self.done, self.tests, self.examples, self.failures, left)

    def pytest_sessionfinish(self) -> None:
        """Leave the terminal as it was."""
        self.progress.end()


def watch(config: pytest.Config, terminal: int) -> None:
    """Show how far the run has come, where that is asked for; a worker leaves it to the controller."""
    descriptor = config.getoption("--progress-to")
    if hasattr(config, "workerinput") or not (config.getoption("--progress") or descriptor is not None):
        return
    stream = os.fdopen(terminal if descriptor is None else descriptor, "w", closefd=False)
    watcher = Watcher(Progress(stream), functools.partial(duration_before, config))
    config.pluginmanager.register(watcher, "titans-progress")


def takes(config: pytest.Config) -> str:
    """Say how long the run will take."""
    if (before := duration_before(config)) is None:
        return "the first run with these options here; all backends take about 15 minutes on two cores"
    return f"the last run with these options took {duration(before)} here"


def key_of(config: pytest.Config) -> str:
    """Return under which name the time of a run is kept: that of its options."""
    return "titans/seconds/" + hashlib.sha256(repr(config.invocation_params.args).encode()).hexdigest()[:16]


def duration_before(config: pytest.Config) -> float | None:
    """Return the seconds that the last run with the same options took, if there was one."""
    cache = getattr(config, "cache", None)
    return cache.get(key_of(config), None) if cache else None


def keep_duration(config: pytest.Config, seconds: float) -> None:
    """Keep the time of a run that came to its end."""
    if cache := getattr(config, "cache", None):
        cache.set(key_of(config), round(seconds, 1))

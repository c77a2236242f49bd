"""Several GPUs, and GPUs that fail: a CUDA error ruins its process for good, and must ruin no other test's verdict."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

# A sticky error is one of these; running out of memory or of shared memory leaves the process as it was.
MESSAGES = ("CUDA error", "Triton Error [CUDA]", "CUBLAS_STATUS_EXECUTION_FAILED", "device-side assert")
MENDED = ("out of memory", "out of resource")


class DeviceLost(BaseException):
    """A CUDA error in a law: no Exception, since Hypothesis would look for smaller problems where all of them fail."""


def is_fatal(error: BaseException) -> bool:
    """Whether nothing can run on the GPU in this process any more."""
    fatal = isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES)
    return isinstance(error, DeviceLost) or (fatal and not any(text in str(error) for text in MENDED))


def spread(device: str) -> None:
    """Give the workers of pytest-xdist one GPU each, in turn."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if device == "cuda" and worker.isdecimal():
        torch.cuda.set_device(int(worker) % torch.cuda.device_count())


class Isolation:
    """A pytest plugin: after a CUDA error that test and all that follow run in fresh processes.

    Parameters
    ----------
    options : sequence of str
        With which a fresh process does what this one does.
    """

    def __init__(self, options: list[str]) -> None:
        self.options = options
        self.lost = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
        """Let a CUDA error fail its test, and say whether it comes again."""
        report = yield
        if call.excinfo is not None and is_fatal(call.excinfo.value):
            self.lost = True
            again = [
                f"{x.when}: {x.outcome}\n{x.longreprtext}" for x in self.fresh(item) if x.when == "call" or x.failed
            ]
            report.sections.append(("the same test in a fresh process", "\n".join(again)))
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Run a test elsewhere once this process has lost its device."""
        if not self.lost:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.fresh(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def fresh(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Run a test in a process of its own, and return its reports."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "reports"
            command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", *self.options]
            command += ["--reports-to", str(file), item.nodeid]
            done = subprocess.run(command, cwd=item.config.rootpath, capture_output=True, text=True)
            lines = file.read_text().splitlines() if file.exists() else []
        hook = item.config.hook
        found = [hook.pytest_report_from_serializable(config=item.config, data=json.loads(line)) for line in lines]
        if any(report.when == "teardown" for report in found):
            return found
        said = f"the fresh process ended with {done.returncode}\n{done.stdout}{done.stderr}"
        return [pytest.TestReport(item.nodeid, item.location, {}, "failed", said, "call")]


class Reporter:
    """A pytest plugin: write the reports of a fresh process for the one that started it."""

    def __init__(self, config: pytest.Config, file: str) -> None:
        self.config = config
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write one line."""
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(self.file, "a") as file:
            print(json.dumps(data), file=file)

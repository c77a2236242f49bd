"""A pytest plugin (`-p tests.properties.ended`): the process is ended from outside after its first test."""

import itertools
import os
import signal
from typing import Any

tests = itertools.count()


def pytest_runtest_setup(item: Any) -> None:
    """End it, as `timeout` and those who run out of patience do."""
    if next(tests):
        os.kill(os.getpid(), signal.SIGKILL)

"""A pytest plugin (`-p tests.properties.full`): a disk on which no verdict and no failure can be stored."""

import errno
from typing import Any

import hypothesis.database

from properties.harness import plugin


def store(*arguments: Any) -> None:
    """Find no space left."""
    raise OSError(errno.ENOSPC, "No space left on device")


hypothesis.database._usable_dir = lambda path: False  # type: ignore[attr-defined]


def pytest_sessionstart(session: Any) -> None:
    """Wait until the options have been checked."""
    if session.config.getoption("--verdicts"):
        plugin.store = store

"""Files that are there as a whole or not at all: a disk may be full."""

import os
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Write a file in place of the one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        # A terminal or a pipe: one that nobody reads is an error, and not waited for.
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        os.set_blocking(descriptor, True)
        with open(descriptor, "w") as file:
            file.write(text)
        return
    with complete(path, text) as other:
        os.replace(other, path)


def create(path: Path, text: str) -> None:
    """Write a file, or raise FileExistsError where there is one."""
    with complete(path, text) as other:
        os.link(other, path)


@contextmanager
def complete(path: Path, text: str) -> Generator[str]:
    """Write a text beside a file, and remove it in the end."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        mode = os.umask(0)
        os.umask(mode)
        os.chmod(name, 0o666 & ~mode)
        yield name
    finally:
        Path(name).unlink(missing_ok=True)


def is_pipe(path: Path) -> bool:
    """Whether a file is a pipe, whose reader takes one text alone."""
    return path.exists() and stat.S_ISFIFO(path.stat().st_mode)


def check(path: Path) -> None:
    """Raise OSError where a file cannot be written; a pipe is left alone until there is something to read."""
    if is_pipe(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        # A full device says so once it is written to.
        path.write_text("\n")
        return
    there = path.exists()
    with path.open("a"):
        pass
    if not there:
        path.unlink()

"""A run of somebody's implementation in a child process: no implementation decides the exit status of the run."""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable

import pytest

# From before an implementation may replace it.
LEAVE = os._exit
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else ()
# Seconds between two looks at the child; its end is noticed at once.
PAUSE = 1.0
# Of prctl(2).
PR_SET_PDEATHSIG = 1


def is_possible() -> bool:
    """Whether a child can go on for this process: on Linux, where no other thread holds a lock."""
    return hasattr(signal, "sigtimedwait") and sys.platform == "linux" and threading.active_count() == 1


def in_a_child(run: Callable[[], int]) -> int:
    """Return the exit status of a run that a child process does.

    The child says its status before it ends, and ends at once, whatever threads an implementation has left. If it ends
    without a word, it was ended by the implementation, and the status is not 0.
    """
    sys.stdout.flush(), sys.stderr.flush()
    reading, writing = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent, child = os.getpid(), os.fork()
    if not child:
        os.close(reading)
        # Where this process is killed, so is its child.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            LEAVE(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        status = status_of(run)
        flush()
        os.write(writing, bytes([status]))
        LEAVE(status)
    os.close(writing)
    try:
        code = waited_for(child)
        told = os.read(reading, 1)
    finally:
        os.close(reading)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return told[0] if told else silent(code)


def status_of(run: Callable[[], int]) -> int:
    """Return the exit status of a run, and say why it is what it is, as pytest does, where it raises an error."""
    try:
        return int(run())
    except pytest.UsageError as error:
        print(*(f"ERROR: {message}" for message in error.args), sep="\n", file=sys.stderr)
        return pytest.ExitCode.USAGE_ERROR
    except BaseException:
        traceback.print_exc()
        return pytest.ExitCode.INTERNAL_ERROR


def flush() -> None:
    """Write what was printed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue


def waited_for(child: int) -> int:
    """Return the exit code of a child once it has ended; hand on the signals that others send to this process alone."""
    while True:
        got = signal.sigtimedwait(SIGNALS, PAUSE)
        # A terminal interrupts both; si_code says that a process sent it.
        if got and got.si_signo != signal.SIGCHLD and got.si_code <= 0:
            os.kill(child, got.si_signo)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)


def silent(code: int) -> int:
    """Return the exit status for a child that ended without a word; end this process by the same signal."""
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    print(f"\nERROR: not complete: the process that checked the implementation ended with {how}", file=sys.stderr)
    if code < 0:
        faulthandler.disable()
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code or pytest.ExitCode.TESTS_FAILED

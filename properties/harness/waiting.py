"""The time that an example may take."""

import faulthandler
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

# Of the process's standard error, from before pytest captures it.
STDERR = 2
# Seconds, so that a busy machine has time to raise an exception.
MERCY = 60


class Hanging(BaseException):
    """An example that does not end: no Exception, since Hypothesis would look for smaller problems that hang, too."""


@contextmanager
def limited(seconds: float, rule: str = "the example must end") -> Generator[None]:
    """Raise Hanging after some seconds, every second from then on; after as many and a minute more, end the process.

    Parameters
    ----------
    seconds : float
        0: no limit. An earlier alarm of somebody else's, such as pytest-timeout's, stays as it is, and a later one
        comes when it should.
    rule : str
        The beginning of the message.
    """
    if not seconds or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def late(number: int, frame: Any) -> None:
        raise Hanging(f"{rule} within --example-timeout {seconds:g} seconds")

    start, (left, interval) = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)
    others_is_first = 0 < left <= seconds
    if not others_is_first:
        handler = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    # What never returns to Python, or catches everything, is ended from a thread of C.
    faulthandler.dump_traceback_later(2 * seconds + MERCY, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        if not others_is_first:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            if left:
                signal.setitimer(signal.ITIMER_REAL, max(left - time.monotonic() + start, 1e-3), interval)

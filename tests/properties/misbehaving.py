"""Implementations that interfere with their verification; most compute nothing wrong."""

import os
import signal
from pathlib import Path
from typing import Any

import titans


def dies(*arguments: Any, **options: Any) -> Any:
    """End the process as the kernel does where memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def fails_once(*arguments: Any, **options: Any) -> Any:
    """Return twice the outputs in the first call alone, as the file that the environment names remembers."""
    o, state = titans.chunk_titans_linear(*arguments, **options)
    once = Path(os.environ["ONCE"])
    if once.exists():
        return o, state
    once.touch()
    return 2 * o + 1, state


dies.state = fails_once.state = titans.TitansState  # type: ignore[attr-defined]

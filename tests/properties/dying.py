"""Implementations that lose their device."""

import os
import signal
from pathlib import Path
from typing import Any

import torch

import titans

dead = False


def memory(*arguments: Any, **options: Any) -> Any:
    """Meet a CUDA error once, as the file that the environment names remembers, and from then on in every call."""
    global dead
    once = Path(os.environ["DIES"])
    if not once.exists():
        once.touch()
        dead = True
    if dead:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")
    return titans.chunk_titans_linear(*arguments, **options)


def asserts(*arguments: Any, **options: Any) -> Any:
    """Let the GPU meet an assertion once; what comes of it is left to CUDA."""
    once, q = Path(os.environ["DIES"]), arguments[0]
    if not once.exists():
        once.touch()
        q = q + torch.zeros(1, device=q.device)[torch.tensor([1], device=q.device)].to(q.dtype)
    return titans.chunk_titans_linear(q, *arguments[1:], **options)


def always(*arguments: Any, **options: Any) -> Any:
    """End the process, as a segmentation fault does."""
    if not Path(os.environ["DIES"]).exists():
        return memory(*arguments, **options)
    if dead:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    os.kill(os.getpid(), signal.SIGSEGV)


memory.state = asserts.state = always.state = titans.TitansState  # type: ignore[attr-defined]

"""Implementations that interfere with their verification; most compute nothing wrong."""

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

import oracle
import titans
from properties.problems.domain import OutsideDomain


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


def skips(*arguments: Any, **options: Any) -> Any:
    """Let pytest skip its test."""
    pytest.skip("it is not my day")


def exits(*arguments: Any, **options: Any) -> Any:
    """End the process as if all were well."""
    sys.exit(0)


def leaves(*arguments: Any, **options: Any) -> Any:
    """End the process at once as if all were well, after a fork that ends in the same way."""
    warnings.simplefilter("ignore")
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        os._exit(0)
    os._exit(3)


def rejects(*arguments: Any, **options: Any) -> Any:
    """Have Hypothesis draw another example."""
    hypothesis.assume(False)


def is_unsettled(*arguments: Any, **options: Any) -> Any:
    """Say that the oracle has no answer."""
    raise oracle.Unsettled("who knows")


def is_outside(*arguments: Any, **options: Any) -> Any:
    """Say that every call is outside its domain, which it does not declare."""
    raise OutsideDomain("not here")


def interrupts(*arguments: Any, **options: Any) -> Any:
    """End the run as Ctrl-C does."""
    raise KeyboardInterrupt


def groups(*arguments: Any, **options: Any) -> Any:
    """Hide a rejection where Hypothesis finds it."""
    raise ExceptionGroup("two", [hypothesis.errors.UnsatisfiedAssumption()])


def skips_backward(*arguments: Any, **options: Any) -> Any:
    """Skip once gradients are asked for."""
    o, state = titans.chunk_titans_linear(*arguments, **options)
    if o.requires_grad:
        o.register_hook(skips)
    return o, state


def patches(*arguments: Any, **options: Any) -> Any:
    """Let the suite find nothing."""
    torch.isfinite = torch.ones_like
    return titans.chunk_titans_linear(*arguments, **options)


def compiles(*arguments: Any, **options: Any) -> Any:
    """Use `torch.compile`, which replaces functions of PyTorch."""
    torch.compile(torch.add, backend="eager")(torch.ones(1), 1)
    torch.manual_seed = torch._dynamo.disable(torch.manual_seed)
    return titans.chunk_titans_linear(*arguments, **options)


def settles_in(*arguments: Any, **options: Any) -> Any:
    """Compute what it should, and leave the process as it likes it."""
    o, state = titans.chunk_titans_linear(*arguments, **options)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_flush_denormal(True)
    os.chdir("/")
    return o, state


def hangs(*arguments: Any, **options: Any) -> Any:
    """Never return."""
    while True:
        try:
            time.sleep(0.1)
        except Exception:
            continue


skips_backward.state = compiles.state = patches.state = settles_in.state = titans.TitansState  # type: ignore[attr-defined]


def returns_nothing(*arguments: Any, **options: Any) -> Any:
    """Forget the return statement."""


def returns_text(*arguments: Any, **options: Any) -> Any:
    """Return a sentence."""
    return "o and state"


def returns_no_state(*arguments: Any, **options: Any) -> Any:
    """Return o alone."""
    return titans.chunk_titans_linear(*arguments, **options)[0]


def returns_half_a_state(*arguments: Any, **options: Any) -> Any:
    """Return M and S."""
    o, state = titans.chunk_titans_linear(*arguments, **options)
    return o, (state.M, state.S)


def returns_an_early_offset(*arguments: Any, **options: Any) -> Any:
    """Return the right numbers, and an offset that is one too small."""
    o, state = titans.chunk_titans_linear(*arguments, **options)
    return o, state._replace(offset=state.offset - 1)


def returns_wide_outputs(*arguments: Any, **options: Any) -> Any:
    """Return the right numbers in float64."""
    o, state = titans.chunk_titans_linear(*arguments, **options)
    return o.double(), state


def returns_heads_first(*arguments: Any, **options: Any) -> Any:
    """Return o as (B, H, T, D)."""
    o, state = titans.chunk_titans_linear(*arguments, **options)
    return o.transpose(1, 2), state


class Module(torch.nn.Module):
    """A module with a parameter and with attributes of its own whose names mean something else to the suite."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("step", torch.zeros(2))
        self.state = None

    def forward(self, q: Any, *arguments: Any, **options: Any) -> Any:
        """Compute what it should."""
        return titans.chunk_titans_linear(q * self.scale.to(q.dtype), *arguments, **options)


module = Module()

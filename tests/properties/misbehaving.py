"""Implementations that interfere with their verification; most compute nothing wrong."""

import ctypes
import os
import random
import signal
import sys
import threading
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
from properties.harness import running
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


def rewrites_its_report(*arguments: Any, **options: Any) -> Any:
    """Return twice the outputs, and let pytest report that nothing was raised."""
    made = pytest.TestReport.from_item_and_call.__func__  # type: ignore[attr-defined]

    def without_an_exception(kind: Any, item: Any, call: Any) -> Any:
        call.excinfo = None
        return made(kind, item, call)

    pytest.TestReport.from_item_and_call = classmethod(without_an_exception)  # type: ignore[method-assign, assignment]
    o, state = titans.chunk_titans_linear(*arguments, **options)
    return 2 * o + 1, state


def has_states_forgotten(*arguments: Any, **options: Any) -> Any:
    """Let the suite look at no state."""
    running.STATE = ()  # type: ignore[assignment]
    return titans.chunk_titans_linear(*arguments, **options)


class Unshown(Exception):
    """An error without a text."""

    def __str__(self) -> str:
        raise RuntimeError("there is none")


def fails_without_a_word(*arguments: Any, **options: Any) -> Any:
    """Raise an error that cannot be shown."""
    raise Unshown


def uses_its_memory_again(*arguments: Any, **options: Any) -> Any:
    """Compute the right results, and empty the outputs of the call before."""
    o, state = titans.chunk_titans_linear(*arguments, **options)
    for earlier in EARLIER:
        earlier.data.zero_()
    EARLIER[:] = [o]
    return o, state


EARLIER = list[torch.Tensor]()


def leaves_by_the_back_door(*arguments: Any, **options: Any) -> Any:
    """End the process at once as if all were well, by the module behind `os`."""
    sys.modules[os.name]._exit(0)


def leaves_later(*arguments: Any, **options: Any) -> Any:
    """End the process as if all were well, in a thread that outlives the call."""

    def leave() -> None:
        # Until the call is over.
        while sys.modules[os.name]._exit.__qualname__.startswith("kept_alive"):
            time.sleep(0.01)
        sys.modules[os.name]._exit(0)

    threading.Thread(target=leave, daemon=True).start()
    return titans.chunk_titans_linear(*arguments, **options)


def leaves_through_c(*arguments: Any, **options: Any) -> Any:
    """End the process as if all were well, past all that Python knows."""
    ctypes.CDLL(None)._exit(0)


def closes_its_streams(*arguments: Any, **options: Any) -> Any:
    """Compute the right results, and close the standard streams."""
    print("the last word", flush=True)
    sys.stdout.close()
    sys.stderr.close()
    os.close(1)
    os.close(2)
    return titans.chunk_titans_linear(*arguments, **options)


def stays_in_a_thread(*arguments: Any, **options: Any) -> Any:
    """Compute the right results, and start a thread that never ends."""
    threading.Thread(target=lambda: time.sleep(10**6)).start()
    return titans.chunk_titans_linear(*arguments, **options)


def stops_the_clock(*arguments: Any, **options: Any) -> Any:
    """Let no time pass."""
    time.monotonic = lambda: 0.0
    return titans.chunk_titans_linear(*arguments, **options)


def loads_the_dice(*arguments: Any, **options: Any) -> Any:
    """Let every draw be the same."""
    random.random = lambda: 0.5
    return titans.chunk_titans_linear(*arguments, **options)


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


def hides(*arguments: Any, **options: Any) -> Any:
    """Return twice the results, and let the suite see halves of them: by a method that tensors inherit."""
    o, state = titans.chunk_titans_linear(*arguments, **options)
    o, state = 2 * o, titans.TitansState(*(2 * x for x in state[:3]), state.offset)
    ours, inherited = {x.data_ptr() for x in (o, *state[:3])}, torch._C.TensorBase.cpu
    torch.Tensor.cpu = lambda x: inherited(x) / (2 if x.data_ptr() in ours else 1)  # type: ignore[assignment, method-assign]
    return o, state


class Half(torch.Tensor):
    """A tensor that shows half of its numbers."""

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        """Show half of its numbers."""
        return self.as_subclass(torch.Tensor) / 2


def shows_halves(*arguments: Any, **options: Any) -> Any:
    """Return twice the outputs in a class of its own."""
    o, state = titans.chunk_titans_linear(*arguments, **options)
    return (2 * o).as_subclass(Half), state


class Halved(torch.overrides.TorchFunctionMode):
    """A mode in which tensors show half of their numbers."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        """Show half of the numbers that come to the CPU."""
        shown = function(*arguments, **(options or {}))
        return shown / 2 if function is torch.Tensor.cpu else shown


def stays_in_a_mode(*arguments: Any, **options: Any) -> Any:
    """Compute the right results, and leave a mode on, and the oracle with 5 bits."""
    o, state = titans.chunk_titans_linear(*arguments, **options)
    Halved().__enter__()
    oracle.precision.context.prec = 5
    return o, state


def returns_sparse_outputs(*arguments: Any, **options: Any) -> Any:
    """Return the right numbers in another layout."""
    o, state = titans.chunk_titans_linear(*arguments, **options)
    return o.to_sparse(), state


def returns_no_numbers(*arguments: Any, **options: Any) -> Any:
    """Return the shapes alone."""
    o, state = titans.chunk_titans_linear(*arguments, **options)
    return o.to("meta"), state


def returns_offsets_in_floats(*arguments: Any, **options: Any) -> Any:
    """Return the right numbers, and offsets that no call takes."""
    o, state = titans.chunk_titans_linear(*arguments, **options)
    return o, state._replace(offset=state.offset.double())


def compiles(*arguments: Any, **options: Any) -> Any:
    """Use `torch.compile`, which replaces functions of PyTorch."""
    torch.compile(torch.add, backend="eager")(torch.ones(1), 1)
    torch.manual_seed = torch._dynamo.disable(torch.manual_seed)
    return titans.chunk_titans_linear(*arguments, **options)


def settles_in(*arguments: Any, **options: Any) -> Any:
    """Compute the right results, and leave the process as it likes it."""
    o, state = titans.chunk_titans_linear(*arguments, **options)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_flush_denormal(True)
    os.chdir("/")
    sys.setrecursionlimit(10**6)
    torch.autograd.set_detect_anomaly(True)  # type: ignore[no-untyped-call]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return o, state


def hangs(*arguments: Any, **options: Any) -> Any:
    """Never return."""
    while True:
        try:
            time.sleep(0.1)
        except Exception:
            continue


rewrites_its_report.state = titans.TitansState  # type: ignore[attr-defined]
leaves_later.state = stops_the_clock.state = loads_the_dice.state = titans.TitansState  # type: ignore[attr-defined]
uses_its_memory_again.state = has_states_forgotten.state = titans.TitansState  # type: ignore[attr-defined]
stays_in_a_thread.state = closes_its_streams.state = titans.TitansState  # type: ignore[attr-defined]
shows_halves.state = stays_in_a_mode.state = titans.TitansState  # type: ignore[attr-defined]
skips_backward.state = hides.state = compiles.state = patches.state = settles_in.state = titans.TitansState  # type: ignore[attr-defined]


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
        """Compute the right results."""
        return titans.chunk_titans_linear(q * self.scale.to(q.dtype), *arguments, **options)


module = Module()

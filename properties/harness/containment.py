"""Calls of an implementation: it returns or raises. It decides no verdict, and leaves nothing behind."""

import builtins
import functools
import math
import operator
import os
import random
import signal
import sys
import threading
import time
import traceback
import unittest
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any, TypeVar

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis.errors import HypothesisException
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _pop_mode

import oracle
from oracle.precision import context
from properties.harness.implementations import Implementation
from properties.harness.waiting import Hanging
from properties.problems.domain import OutsideDomain

Result = TypeVar("Result")
# Everything that a verdict is made with.
PACKAGES = ("oracle", "properties")
LENT = (
    torch, torch.Tensor, torch.autograd, torch.linalg, np, np.linalg, math, builtins, time, random, os,
    pytest, pytest.TestReport, hypothesis, hypothesis.core,
)  # fmt: skip
SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (lambda: torch.is_autocast_enabled("cpu"), lambda on: torch.set_autocast_enabled("cpu", on)),
    (np.geterr, lambda how: np.seterr(**how)),
    (os.getcwd, os.chdir),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (lambda: context.prec, lambda bits: setattr(context, "prec", bits)),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (lambda: handlers(), lambda known: set_handlers(*known)),
)


# Whether a thread is one of `at_once`, which contains all of them together.
THREAD = threading.local()
# The descriptors of standard output and of standard error.
STREAMS = (1, 2)
# Seconds between two switches of threads: as many as possible.
RESTLESS = 1e-6


class Misconduct(AssertionError):
    """An implementation does not return, and raises no error either: it interferes with its verification."""


interrupted = threading.Event()


def heed_interrupts() -> Callable[[], Any]:
    """Tell Ctrl-C and SIGTERM from a KeyboardInterrupt of an implementation; return the function that ends this."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    before, stack = signal.getsignal(signal.SIGINT), ExitStack()
    stack.enter_context(terminated_as_interrupted())

    def handle(number: int, frame: Any) -> Any:
        interrupted.set()
        return before(number, frame) if callable(before) else None

    if callable(before):
        signal.signal(signal.SIGINT, handle)
        stack.callback(signal.signal, signal.SIGINT, before)
    return stack.close


@contextmanager
def terminated_as_interrupted() -> Generator[None]:
    """Take SIGTERM for Ctrl-C, in the main thread: what was judged until then is shown."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        # SIGINT itself may be ignored, as in the background of a script.
        interrupted.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def handlers() -> tuple[Any, Any, Any]:
    """Return what handles Ctrl-C, SIGTERM and the time limit of an example."""
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)


def set_handlers(interrupt: Any, terminate: Any, alarm: Any) -> None:
    """Let these handle what `handlers` names."""
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGALRM, alarm)


def is_ordinary(error: BaseException) -> bool:
    """Whether pytest and Hypothesis take an exception for a failure, and nothing else."""
    special = isinstance(error, HypothesisException | unittest.SkipTest | BaseExceptionGroup)
    return isinstance(error, Exception) and not special


def shown(error: BaseException) -> str:
    """Return an exception as text; nothing where it cannot be shown."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return ""


def is_from_outside(error: BaseException) -> bool:
    """Whether an exception comes from the user or from a time limit, and not from an implementation."""
    frames = traceback.walk_tb(error.__traceback__)
    limit = any(frame.f_globals.get("__name__") == "pytest_timeout" for frame, _ in frames)
    return limit or isinstance(error, Hanging) or (isinstance(error, KeyboardInterrupt) and interrupted.is_set())


@contextmanager
def answering() -> Generator[None]:
    """Make an ordinary failure of whatever an implementation raises to be skipped, rejected or let off."""
    try:
        yield
    except BaseException as error:
        if is_from_outside(error):
            raise error if isinstance(error, Hanging | KeyboardInterrupt) else Hanging(str(error)) from error
        said = shown(error)
        if is_ordinary(error) and said:
            raise
        said = said or f"{type(error).__name__}, which has no text"
        raise Misconduct(f"the implementation must return or fail, and raised {said}") from error


@contextmanager
def undisturbed() -> Generator[None]:
    """Undo all that an implementation changes in this process, and refuse that it changes functions of others."""
    if getattr(THREAD, "contained", False):
        yield
        return
    with kept_open():
        settings, functions = [get() for get, _ in SETTINGS], [(x, dict(vars(x))) for x in lent(len(sys.modules))]
        modes = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
        try:
            with answering(), warnings.catch_warnings(), kept_alive(), kept_importable():
                try:
                    yield
                except (oracle.Unsettled, OutsideDomain) as error:
                    raise Misconduct(f"the implementation raised {type(error).__name__}: {error}") from error
        finally:
            torch.set_flush_denormal(False)
            leave_modes(*modes)
            for (get, put), value in zip(SETTINGS, settings, strict=True):
                if get() != value:
                    put(value)
            replaced = restore(functions)
        if replaced:
            raise Misconduct(f"the implementation must not replace {', '.join(replaced[:3])}")


def leave_modes(functions: int, dispatches: int) -> None:
    """Leave the modes of PyTorch above so many; that of the default device lies below all others, and is a setting."""
    while torch._C._len_torch_dispatch_stack() > dispatches:
        _pop_mode()
    while (depth := torch._C._len_torch_function_stack()) > functions:
        if isinstance(torch._C._get_function_stack_at(depth - 1), DeviceContext):
            break
        torch._C._pop_torch_function_stack()


class Unclosed:
    """A stream that is written to as ever, and that nobody closes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def close(self) -> None:
        """Leave it open."""


@contextmanager
def kept_open() -> Generator[None]:
    """Let an implementation close or replace the standard streams for itself alone."""
    streams, copies = (sys.stdout, sys.stderr), [(i, os.dup(i)) for i in STREAMS if is_open(i)]
    sys.stdout, sys.stderr = (x and Unclosed(x) for x in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for i, copy in copies:
            os.dup2(copy, i)
            os.close(copy)


def is_open(descriptor: int) -> bool:
    """Whether a file descriptor is open."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


@contextmanager
def kept_alive() -> Generator[None]:
    """Let no implementation end this process with a status of its own choice; processes that it forks end as ever."""
    leave, process, system = os._exit, os.getpid(), sys.modules[os.name]

    def refuse(status: int) -> None:
        if os.getpid() != process:
            leave(status)
        raise Misconduct(f"the implementation must not end the process, called os._exit({status})")

    os._exit = system._exit = refuse  # type: ignore[assignment, attr-defined]
    try:
        yield
    finally:
        os._exit = system._exit = leave  # type: ignore[attr-defined]


@contextmanager
def kept_importable() -> Generator[None]:
    """Leave every module that was imported so, and every place where imports look; an implementation may add some."""
    modules, known = sys.modules, dict(sys.modules)
    places: list[tuple[list[Any], list[Any]]] = [(x, [*x]) for x in (sys.path, sys.meta_path, sys.path_hooks)]
    try:
        yield
    finally:
        sys.modules = modules
        modules.update(known)
        for now, before in places:
            now += [x for x in before if x not in now]


@functools.lru_cache(maxsize=1)
def lent(modules: int) -> list[Any]:
    """Return the modules and classes that a verdict is made with; `modules` is how many there are of all kinds."""
    own = [x for name, x in list(sys.modules.items()) if name.partition(".")[0] in PACKAGES and is_ours(name)]
    classes = [x for module in own for x in vars(module).values() if isinstance(x, type) and is_ours(x.__module__)]
    return [*LENT, *own, *dict.fromkeys(classes)]


def is_ours(name: str) -> bool:
    """Whether a module is the suite's, and no adapter."""
    return name.partition(".")[0] in PACKAGES and not name.startswith("properties.adapters")


def restore(functions: list[tuple[Any, dict[str, Any]]]) -> list[str]:
    """Put back every function and class that is another one now, or is hidden by a new one, and return their names.

    Of the suite's own modules all values.
    """
    replaced = []
    for owner, before in functions:
        now = vars(owner)
        # Nearly always all of them are the same.
        if now.keys() == before.keys() and all(map(operator.is_, now.values(), before.values())):
            continue
        for name, value in before.items():
            if not (callable(value) or owner.__name__.partition(".")[0] in PACKAGES):
                continue
            if now.get(name) is not value and not is_its_own(owner, name, now.get(name)):
                setattr(owner, name, value)
                replaced.append(f"{owner.__name__}.{name}")
        for name in [name for name in now if name not in before and hides(owner, name)]:
            if callable(now[name]) and not is_its_own(owner, name, now[name]):
                replaced.append(f"{owner.__name__}.{name}")
                delattr(owner, name)
    return replaced


def hides(owner: Any, name: str) -> bool:
    """Whether a new name hides one that a class inherits, or that a module has from the language."""
    if isinstance(owner, ModuleType):
        return hasattr(builtins, name)
    return any(name in vars(base) for base in owner.__mro__[1:])


def is_its_own(owner: Any, name: str, function: Any) -> bool:
    """Whether a package itself has replaced a function of its own, as `torch.compile` does at its first use."""
    module = sys.modules.get(owner.__name__ if isinstance(owner, ModuleType) else owner.__module__)
    folder = getattr(sys.modules.get(module.__name__.partition(".")[0]), "__path__", [None])[0] if module else None
    code = getattr(function, "__code__", None)
    named = getattr(function, "__name__", None) == name
    return named and folder is not None and code is not None and code.co_filename.startswith(folder + os.sep)


def at_once(functions: Sequence[Callable[[], Result]]) -> list[Result]:
    """Call some functions of an implementation at the same time, in a thread each, and return their results."""
    start, results = threading.Barrier(len(functions)), dict[int, Result]()
    errors: list[BaseException] = []

    def one(i: int) -> None:
        THREAD.contained = True
        try:
            start.wait()
            results[i] = functions[i]()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    with undisturbed():
        threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(len(functions))]
        sys.setswitchinterval(RESTLESS)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        if errors:
            raise errors[0]
    return [results[i] for i in range(len(functions))]


def contained(implementation: Implementation) -> Implementation:
    """Return an implementation whose calls leave nothing behind."""
    step = implementation.step
    return replace(implementation, call=alone(implementation.call), step=step and alone(step))


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose calls leave nothing behind."""

    def call(*arguments: Any, **options: Any) -> Any:
        with undisturbed():
            return function(*arguments, **options)

    return call

"""The private interfaces that the suite leans on are as it found them; where one is not, this says which."""

import inspect
import platform
import subprocess
import sys
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from hypothesis.internal.conjecture import engine, providers

from properties.harness import workarounds
from properties.harness.comparing import same_bits
from properties.harness.implementations import implementation
from properties.harness.plugin import pytest_keyboard_interrupt
from properties.harness.running import run
from properties.problems.problem import Problem


def test_hypothesis_has_its_registry_of_providers() -> None:
    assert providers.AVAILABLE_PROVIDERS.get(workarounds.INDEPENDENT) is workarounds.Independent, (
        "Hypothesis no longer takes providers from AVAILABLE_PROVIDERS: find out how to register one, and how to draw "
        "every example afresh (tests/properties/test_strategies.py counts whether it does)"
    )
    assert issubclass(workarounds.Independent, providers.HypothesisProvider), "HypothesisProvider is another class now"
    assert '== "hypothesis"' in inspect.getsource(engine) or '!= "hypothesis"' in inspect.getsource(engine), (
        "Hypothesis's engine no longer asks whether a backend is its own before it varies an example"
    )


def test_pytest_shows_an_interrupt_at_an_instruction_without_a_line() -> None:
    kept = 1

    def inner() -> tuple[FrameType, int]:
        return sys._getframe(), kept

    frame, _ = inner()
    start = next((start for start, _, line in frame.f_code.co_lines() if line is None), None)
    assert start is not None, "CPython gives every instruction a line now: the workaround can go"
    lost = TracebackType(None, frame, start, -1)
    excinfo = pytest.ExceptionInfo.from_exception(KeyboardInterrupt().with_traceback(lost))
    assert lost.tb_lineno is None
    with pytest.raises(TypeError):
        excinfo.getrepr()
    pytest_keyboard_interrupt(excinfo)
    assert "KeyboardInterrupt" in str(excinfo.getrepr(funcargs=True))


# Ten blocks of 64 MB are allocated, written and freed one after the other: how many pages did the system have to give?
FAULTS = """
import resource, sys
from properties.harness.workarounds import keep_freed_memory
if len(sys.argv) > 1:
    keep_freed_memory()
for i in range(11):
    if i == 1:
        first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(2**26)
    block[::4096] = block[::4096]
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_kept() -> None:
    faults = [
        int(subprocess.run([sys.executable, "-c", FAULTS, *kept], capture_output=True, check=True, text=True).stdout)
        for kept in ([], ["kept"])
    ]
    assert faults[1] < 2**26 // 4096 < faults[0]


def test_a_function_has_a_size_of_its_stack() -> None:
    code = test_a_function_has_a_size_of_its_stack.__code__
    assert hasattr(code, "co_stacksize"), f"code objects of Python {sys.version} have no co_stacksize to replace"
    assert workarounds.with_room(lambda x: x + 1)(2) == 3


def test_the_interpreter_has_the_parts_that_are_patched() -> None:
    from triton.runtime import interpreter

    for owner, name in (
        (interpreter, "_patch_lang"),
        (interpreter, "_get_np_dtype"),
        (interpreter.interpreter_builder.options, "sanitize_overflow"),
        (interpreter.InterpretedFunction, "run"),
        (interpreter.InterpretedFunction, "rewrite"),
        (interpreter.InterpretedFunction, "__call__"),
        (interpreter.InterpreterBuilder, "create_dot"),
    ):
        assert hasattr(owner, name), f"Triton's interpreter has no {name}: {workarounds.__name__} must follow it, or go"


def test_a_row_of_an_interpreted_product_has_the_bits_of_the_row_alone() -> None:
    from triton.runtime import interpreter

    workarounds.sum_in_order()
    numbers = np.random.default_rng(0)
    x, y = (numbers.standard_normal(shape).astype(np.float32) for shape in ((64, 64), (64, 32)))

    def product(x: Any, y: Any) -> Any:
        tiles = (interpreter.TensorHandle(tile, tl.float32) for tile in (x, y, np.zeros((len(x), y.shape[1]), "f4")))
        return interpreter.InterpreterBuilder().create_dot(*tiles, None, None).data

    for row in range(64):
        for columns in (slice(1), slice(None)):
            assert (product(x[row : row + 1], y[:, columns]) == product(x, y)[row, columns]).all()


def test_the_interpreter_patches_the_language_once_in_a_launch_and_computes_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.runtime import interpreter

    function, original = interpreter.InterpretedFunction, interpreter._patch_lang
    calls: list[int] = []

    def count(fn: object) -> object:
        calls.append(id(fn))
        return original(fn)

    def anew(self: object, *arguments: object) -> object:
        interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments)

    monkeypatch.setattr(interpreter, "_patch_lang", count)
    problem = Problem(
        lengths=(5, 0, 3), packed=True, H=2, D=3, C=2, memory="normalised", initial="full", offsets=(1, 0, 1)
    )
    subject = implementation("triton", "cpu")
    results = run(subject, problem.inputs(), problem.cotangents())
    few = len(calls)
    monkeypatch.setattr(function, "__call__", anew)
    same_bits(results, run(subject, problem.inputs(), problem.cotangents()))
    assert 0 < few < len(calls) - few

"""All that leans on private interfaces of Hypothesis, pytest, Triton's interpreter and CPython's frames, or on glibc.

Tried on Hypothesis 6.170.15, Triton 3.7.1 and CPython 3.11. Where one of the interfaces has changed,
`tests/properties/test_workarounds.py` fails with a sentence.
"""

import ctypes
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider

INDEPENDENT = "independent"


class Independent(HypothesisProvider):
    """Hypothesis's own draws, under another name.

    Of its own accord Hypothesis lets up to five variations follow an example, in which one choice repeats another. So
    150 examples come from some 30 draws, and now and then hardly one of those exercises a law. For a backend
    that is not its own it draws every example afresh, and shrinks failures as ever.
    """


AVAILABLE_PROVIDERS[INDEPENDENT] = Independent

# Parameters of glibc's `mallopt`, see mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, where the C library is glibc.

    By default glibc gives large blocks back to the system and asks for them anew. The tensors of real sizes come and go
    by the thousand, and their fresh pages took a third of the time of these laws; in one example four fifths.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def drop_entries_without_a_line(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    """Let pytest show where it was interrupted.

    A signal may come at an instruction of CPython that belongs to no line of source, where a comprehension begins. The
    entry of the traceback has None for a line, pytest subtracts 1 from it, and ends with an internal error.
    """
    excinfo.traceback = excinfo.traceback.filter(lambda entry: entry._rawentry.tb_lineno is not None)


def patch_once() -> None:
    """Let Triton's interpreter patch `triton.language` once in a launch, not in every call of a helper.

    Every call looks through all that the language has: that takes 2/5 of the time of these kernels. Of the rest, a
    third is taken by a check that no sum or product of small integers overflows, and a tenth by a table of formats
    that is made anew each time it is looked at.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    function, patched = interpreter.InterpretedFunction, set[int]()
    if function.__call__.__module__ == __name__:
        return
    launch = function.run

    def run(self: Any, *arguments: Any, **options: Any) -> None:
        patched.clear()
        launch(self, *arguments, **options)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        # The patched modules of the language are those that the helper's own module knows.
        if (module := id(self.fn.__globals__)) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*arguments, **options)

    function.run, function.__call__ = run, call
    builder, format_of = interpreter.interpreter_builder, functools.cache(interpreter._get_np_dtype)
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    # Types of blocks and pointers cannot be looked up.
    interpreter._get_np_dtype = lambda kind: format_of(tl.uint64 if kind.scalar.is_ptr() else kind.scalar)


def sum_in_order() -> None:
    """Let a product of Triton's interpreter sum from the first term to the last.

    NumPy leaves its products to a library, whose order depends on the shape and on the processor: on some, a row of a
    product has other bits than the same row alone.
    """
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        x, y = (np.asarray(tile.data, d.data.dtype) for tile in (a, b))
        with np.errstate(all="ignore"):
            total = x[..., :, :1] * y[..., :1, :]
            for i in range(1, x.shape[-1]):
                total += x[..., :, i : i + 1] * y[..., i : i + 1, :]
            return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def with_room(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with room on CPython's stack of frames for its calls.

    That stack grows by 16 KiB and gives them back at once: where a busy call sits on the edge of such a block, as some
    call of Triton's interpreter often does, every single one maps and unmaps memory, and that takes half of the time.
    """

    def caller(*arguments: Any) -> Any:
        return function(*arguments)

    caller.__code__ = caller.__code__.replace(co_stacksize=100_000)
    return caller

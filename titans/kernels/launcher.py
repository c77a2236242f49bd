"""Launches that look a compiled kernel up once, and not at every call.

`kernel[grid](...)` of Triton asks each argument for its type and writes types and options into a string, by which it
finds the compiled kernel. That takes the host longer than the launch itself. The types follow from few facts of a call,
so a `Launcher` keeps the compiled kernel under these facts.

A compiled kernel is launched as Triton's tutorial on softmax does, `compiled[grid](*arguments)`, with every parameter
of the kernel in its order; or, in versions of Triton that were tried, by the one call that this comes to, which takes
the host less time. That call is Triton's own affair: tests/titans/test_launcher.py says where it changes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

# versions that were tried
KNOWN = triton.__version__.startswith(("3.6.", "3.7."))
HOOKS = triton.knobs.runtime


def types_of(tensors: Iterable[Tensor | None]) -> Hashable:
    """All that Triton asks of tensors: dtypes, and which of them do not begin at a multiple of 16 bytes."""
    dtypes: list[torch.dtype | None] = []
    unaligned = 0
    for x in tensors:
        unaligned <<= 1
        if x is None:
            dtypes.append(None)
            continue
        dtypes.append(x.dtype)
        if x.data_ptr() & 15:
            unaligned |= 1
    return (unaligned, *dtypes)


def watched() -> bool:
    """Whether somebody wants to be told of launches, as profilers do."""
    enter, leave = HOOKS.launch_enter_hook, HOOKS.launch_exit_hook
    return bool(getattr(enter, "calls", True) or getattr(leave, "calls", True))


def launch(compiled: Any, programs: int, arguments: list[Any]) -> None:
    """Launch a compiled kernel on the current stream of the current device."""
    if not KNOWN or watched():
        compiled[programs, 1, 1](*arguments)
        return
    active = driver.active
    stream = active.get_current_stream(active.get_current_device())
    compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


class Launcher:
    """A kernel, and its compiled forms.

    The device of the arguments must be the current one.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[Hashable, CompiledKernel] = {}

    def __call__(self, programs: int, key: Hashable, **arguments: Any) -> None:
        """Launch the kernel.

        Parameters
        ----------
        programs : int
            The grid.
        key : Hashable
            Determines the device, the types of the arguments, the values of constants, and the options.
        **arguments
            Every parameter of the kernel, in its order; then options of the compiler.
        """
        names: list[str] = self.kernel.arg_names
        compiled = self.compiled.get(key)
        if compiled is not None:
            launch(compiled, programs, [*arguments.values()][: len(names)])
            return
        if [*arguments][: len(names)] != names:
            raise TypeError(f"`arguments` must begin with {names} in this order, got {[*arguments]}")
        compiled = self.kernel[(programs,)](**arguments)
        # nothing is compiled where kernels are interpreted
        if isinstance(compiled, CompiledKernel):
            self.compiled[key] = compiled

"""Compile every kernel of a call for a GPU as far as its shared memory is known, and print the bytes as JSON.

    python -m tests.titans.allocate_kernels 86 bfloat16 float32    # compute capability, dtypes

Neither LLVM nor ptxas runs, so that a table of many sizes takes a minute. A call that the GPU is too small for is
compiled all the same, with one step of the chain in flight.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import ir, make_backend
from triton.runtime import JITFunction, driver

from tests.titans import compile_kernels
from titans.autograd import chunked, chunked_backward
from titans.kernels import launch
from titans.kernels.fit import least, needs_of
from titans.partition import step_rows

# bytes of shared memory that a program may have
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# D and C; chunks of 128 differ from those of 64 in the chain only, and narrow heads are no larger than wide ones
SIZES = ((32, 64), (64, 16), (64, 32), (64, 64), (64, 128), (128, 16), (128, 64))


class GPU(compile_kernels.NoGPU):
    """A GPU of some compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """Return what the kernels are compiled for."""
        return GPUTarget("cuda", self.capability, 32)


class Allocation(Exception):
    """The passes up to the allocation of shared memory are known."""


class Stop:
    """An instrumentation of the backend, which Triton asks right before the passes that leave its own dialect."""

    def load_dialects(self, context: Any) -> None:
        """Need none."""

    def patch(self, stage: str, passes: Any, context: Any) -> None:
        """Leave the compiler with the passes so far."""
        raise Allocation(passes)


def allocate(source: Any, target: GPUTarget, options: dict[str, Any]) -> int:
    """Compile a kernel until its shared memory is allocated: bytes."""
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    context, stages = ir.context(), {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    backend.add_stages(stages, parsed, source.language)
    metadata = {"target": target, **parsed.__dict__}
    code = source.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)
    code = stages["ttgir"](stages["ttir"](code, metadata), metadata)
    try:
        stages["llir"](code, metadata)
    except Allocation as at:
        at.args[0].run(code, "allocation")
        return int(code.get_int_attr("ttg.shared"))
    raise RuntimeError("the compiler did not stop")


def record(capability: int) -> dict[str, int]:
    """Let launches compile for a GPU, in the same process from now on: the bytes of the kernels, as they come."""
    bytes_: dict[str, int] = {}

    def compile_(source: Any, target: GPUTarget, options: dict[str, Any], **_: Any) -> Any:
        bytes_[source.name] = allocate(source, target, options)
        return SimpleNamespace()

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if kwargs["C"] <= 64 or kernel.__name__.startswith("state"):
            run(kernel, *args, grid=grid, warmup=True, **kwargs)

    run, JITFunction.run = JITFunction.run, compile_only
    triton.compiler.compile = compile_
    CUDABackend.instrumentation = Stop()
    driver.set_active(GPU(capability))  # type: ignore[arg-type]
    launch.shared_memory = lambda device: SHARED[capability]  # type: ignore[assignment]
    return bytes_


def allocated(bytes_: dict[str, int], capability: int, dtype: torch.dtype, D: int, C: int) -> dict[str, Any]:
    """Bytes of every kernel of one size, and what is said about them."""
    bytes_.clear()
    call = compile_kernels.call_of(dtype, C, D)
    o, M, S, anchor, *residuals = chunked(*call, "triton")
    chunked_backward(*call, "triton", *residuals, o, M, S, anchor)
    needs = needs_of(call.q, step_rows(C, launch.block_rows(call.q)))
    return {"D": D, "C": C, "refused": least(needs) > SHARED[capability], "needs": needs, "kernels": dict(bytes_)}


if __name__ == "__main__":
    capability, *dtypes = sys.argv[1:]
    bytes_ = record(int(capability))
    tables = {
        dtype: [allocated(bytes_, int(capability), getattr(torch, dtype), D, C) for D, C in SIZES] for dtype in dtypes
    }
    print(json.dumps(tables))

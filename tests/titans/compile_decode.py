"""Compile the Hopper kernel of a decoded token for sm_90a, on a machine without a GPU; print as JSON its resources.

python -m tests.titans.compile_decode
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction, driver

from tests.titans.compile_kernels import NoGPU
from titans import DecodeState, TitansState
from titans.arguments import Call
from titans.kernels import hopper
from titans.kernels.decode import decode


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack: what did not fit the registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", printed)[1]) for name in ("REG", "STACK")}


def compiled(N: int, D: int, change: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Any]:
    """Compile what decodes N sequences of 16 heads."""
    found: list[Any] = []

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append((run(kernel, *args, grid=grid, warmup=True, **kwargs), kwargs["HEADS"]))

    q, k, v = (change(torch.zeros(N, 1, 16, D, dtype=torch.bfloat16)) for _ in range(3))
    gates = [torch.zeros(N, 1, 16) for _ in range(3)]
    # an expanded state is small, and what is launched is only compiled
    square = torch.zeros(1, 1, D, D).expand(N, 16, D, D)
    state = DecodeState.begin(TitansState(square, square, square, torch.zeros(N, dtype=torch.int64)), q.dtype, 64)
    w = torch.zeros(16, D, dtype=torch.bfloat16)
    call = Call(q, k, v, w, w, *gates, square, square, square, None, None, 1e-6, 64, False)
    run, JITFunction.run = JITFunction.run, compile_only
    try:
        decode(call, DecodeState(*map(change, state), chunk_size=64))
    finally:
        JITFunction.run = run
    [(kernel, heads)] = found
    return {"D": D, "heads": heads, "shared": kernel.metadata.shared, **resources(kernel.asm["cubin"])}


def odd(x: Tensor) -> Tensor:
    """The same numbers, not at a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


if __name__ == "__main__":
    driver.set_active(NoGPU())  # type: ignore[arg-type]
    hopper.stages_of = lambda call: hopper.Stages(forward=True, backward=True)
    print(json.dumps([compiled(1, 64), compiled(34, 64), compiled(1, 128), compiled(1, 40, odd)]))

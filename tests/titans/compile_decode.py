"""Compile the Hopper kernel of a decoded token for sm_90a, on a machine without a GPU; print as JSON its resources.

python -m tests.titans.compile_decode
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction, driver

from tests.titans.compile_kernels import NoGPU, resources
from titans import DecodeState, TitansState
from titans.arguments import Call
from titans.kernels import hopper
from titans.kernels.decode import decode


def compiled(N: int, D: int, change: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Any]:
    """Compile the kernel that decodes N sequences of 16 heads."""
    found: list[Any] = []

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append((run(kernel, *args, grid=grid, warmup=True, **kwargs), kwargs["HEADS"]))

    q, k, v = (change(torch.zeros(N, 1, 16, D, dtype=torch.bfloat16)) for _ in range(3))
    gates = [torch.zeros(N, 1, 16) for _ in range(3)]
    # an expanded state is small, and its kernel is only compiled
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
    return {
        "D": D,
        "heads": heads,
        "shared": kernel.metadata.shared,
        **resources(kernel.asm["cubin"], ("REG", "STACK")),
    }


def odd(x: Tensor) -> Tensor:
    """The same numbers, not at a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


if __name__ == "__main__":
    driver.set_active(NoGPU())  # type: ignore[arg-type]
    hopper.stages_of = lambda call: hopper.Stages(forward=True, backward=True)
    print(json.dumps([compiled(1, 64), compiled(34, 64), compiled(1, 128), compiled(1, 40, odd)]))

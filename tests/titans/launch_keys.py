"""Draw calls, and print as JSON where the key of a launch does not say for what its kernel is compiled.

    python -m tests.titans.launch_keys 200    # so many calls

Nothing is compiled and no GPU is needed: Triton is asked for its own key of every launch of a forward, a backward and
a step.
"""

import json
import random
import sys
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction, driver
from triton.runtime.jit import compute_cache_key

from tests.titans.compile_kernels import TOKENS, NoGPU
from titans import kernels
from titans.arguments import Call
from titans.kernels import hopper
from titans.kernels.launcher import Launcher
from titans.kernels.step import step

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)


def call_of(facts: random.Random, others: random.Random) -> Call:
    """Draw a call: dtypes and what there is from `facts`; all else from `others`."""

    # tensors that do not begin at a multiple of 16 bytes
    skewed = others.choice((0, 0, 1 / 8))

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        size, first = torch.Size(shape).numel(), 1 if others.random() < skewed else 0
        return torch.zeros(size + first, dtype=dtype)[first:].view(shape)

    dtype, D, C = facts.choice(FLOATS), others.choice((3, 64, 128)), others.choice((5, 64, 70))
    packed, normalised, resumed = facts.random() < 0.3, facts.random() < 0.7, facts.random() < 0.3
    H, T, N = others.choice((1, 2, 16)), others.choice((1, 16, 40, 130)), others.choice((1, 3))
    B = 1 if packed else N
    q, k, v = (draw(B, T, H, D, dtype=dtype) for _ in range(3))
    w, b = (draw(H, D, dtype=facts.choice(FLOATS)) for _ in range(2)) if normalised else (None, None)
    gates = (draw(B, T, H, dtype=facts.choice(FLOATS)) for _ in range(3))
    states = (draw(N, H, D, D, dtype=torch.float32) for _ in range(3))
    offset = draw(N, dtype=facts.choice(INTEGERS)) if resumed else None
    cu_seqlens = draw(N + 1, dtype=facts.choice(INTEGERS)) if packed else None
    if cu_seqlens is not None:
        cu_seqlens[-1] = T
    return Call(q, k, v, w, b, *gates, *states, offset, cu_seqlens, 1e-6, C, others.random() < 0.2)


def compiled_for(kernel: Any, arguments: dict[str, Any]) -> str:
    """Triton's own key."""
    bind = kernel.device_caches[0][-1]
    _, types, options = bind(**arguments)
    # constants by value
    constants = sorted((name, repr(x)) for name, x in arguments.items() if hasattr(x, "BD"))
    return compute_cache_key({}, types, options) + str(constants)


def run(call: Call) -> None:
    """Launch a forward, a backward and a step, on a GPU of compute capability 9.0."""
    D = call.q.shape[-1]
    taken = hopper.choose(call.q.dtype, (9, 0), call.chunk_size, D, packed=False, resumed=False, plain=False)
    hopper.stages_of = lambda call: taken
    o, *final, M0, S0, x, r = kernels.forward(call)
    kernels.backward(call, M0, S0, x, r, *(torch.zeros_like(y) for y in (o, *final)))
    if call.cu_seqlens is None:
        step(call._replace(**{name: getattr(call, name)[:, :1].contiguous() for name in TOKENS}))


if __name__ == "__main__":
    seen: dict[tuple[str, Hashable], list[str]] = defaultdict(list)
    launched: list[tuple[str, Hashable]] = []
    launch = Launcher.__call__

    def noted(self: Launcher, programs: int, key: Hashable, **arguments: Any) -> None:
        """Note the key of a launch."""
        launched.append((self.kernel.__name__, key))
        launch(self, programs, key, **arguments)

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **arguments: Any) -> None:
        """Note what the kernel would be compiled for."""
        seen[launched.pop()].append(compiled_for(kernel, arguments))

    Launcher.__call__ = noted  # type: ignore[method-assign]
    JITFunction.run = record
    driver.set_active(NoGPU())  # type: ignore[arg-type]
    others = random.Random(0)
    for i in range(int(sys.argv[1])):
        for _ in range(25):
            torch.set_float32_matmul_precision(others.choice(("high", "highest", "highest")))
            run(call_of(random.Random(i), others))
    print(json.dumps({
        "kernels": sorted({name for name, _ in seen}),
        "again": sum(len(found) - 1 for found in seen.values()),
        "ambiguous": sorted({name for (name, _), found in seen.items() if len(set(found)) > 1}),
    }))  # fmt: skip

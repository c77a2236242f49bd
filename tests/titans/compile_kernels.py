"""Compile every kernel of a call for sm_90, on a machine without a GPU, and print as JSON what became of it.

    python -m tests.titans.compile_kernels float32 highest 64       # dtype, precision of float32 products, chunk length
    python -m tests.titans.compile_kernels float32 highest 64 128   # of heads so wide, the forward and decoding alone

The launches are those of a real forward, backward, step and decoded token, intercepted: so are their specialisations,
sizes and warps.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from titans import DecodeState, TitansState
from titans.arguments import Call
from titans.autograd import chunked, step
from titans.kernels.decode import decode, settle

D = 64
TOKENS = ("q", "k", "v", "theta", "alpha", "eta")


class NoGPU:
    """As much of a driver as compiling needs."""

    def get_current_target(self) -> GPUTarget:
        """Return what the kernels are compiled for."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Return a number."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return a number."""
        return 0


def compiled(call: Call, everything: bool) -> list[Any]:
    """Compile what a forward, a backward and steps would launch, or a forward and a decoded token alone."""
    kernels: list[Any] = []

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(run(kernel, *args, grid=grid, warmup=True, **kwargs))

    run, JITFunction.run = JITFunction.run, compile_only
    driver.set_active(NoGPU())  # type: ignore[arg-type]
    leaves = [x.requires_grad_() for x in call[:11] if x is not None]
    o = chunked(*call, "triton")[0]
    token = {name: getattr(call, name)[:, :1] for name in TOKENS}
    if everything:
        torch.autograd.grad(o, leaves, torch.zeros_like(o))
        step(*call._replace(**token, offset=torch.zeros(len(call.M), dtype=torch.int64)))
    place = torch.zeros(len(call.M), dtype=torch.int64)
    state = DecodeState.begin(TitansState(call.M.detach(), call.S, call.anchor, place), call.q.dtype, call.chunk_size)
    one = call._replace(**{name: x.contiguous() for name, x in token.items()})
    decode(one, state)
    settle(one, state)
    return kernels


def sums(ttgir: str) -> list[str]:
    """Return the layout of each sum along rows: which numbers a thread adds up, and in which order."""
    layouts = dict(re.findall(r"^(#\w+) = (#\S+<.*>)$", ttgir, re.MULTILINE))
    pattern = r'"tt.reduce"\([^)]*\) <\{axis = 1 : i32\}> .*?\}\) : \(tensor<\d+x(\d+xf32), (#\w+)>'
    return [f"{shape} {layouts[name]}" for shape, name in re.findall(pattern, ttgir, re.DOTALL)]


def call_of(dtype: torch.dtype, C: int, D: int = D) -> Call:
    """Make a call of the normalised memory."""
    B, T, H = 1, 2 * C, 2
    q, k, v = (torch.zeros(B, T, H, D, dtype=dtype) for _ in range(3))
    w, b = (torch.zeros(H, D, dtype=dtype) for _ in range(2))
    theta, alpha, eta = (torch.zeros(B, T, H, dtype=dtype) for _ in range(3))
    M, S, anchor = (torch.zeros(B, H, D, D) for _ in range(3))
    return Call(q, k, v, w, b, theta, alpha, eta, M, S, anchor, None, None, 1e-6, C, False)


def resources(cubin: bytes, names: Iterable[str] = ("STACK", "LOCAL")) -> dict[str, int]:
    """Resources of each thread: bytes of local memory, spills and arrays alike, or registers (REG)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", printed)[1]) for name in names}


def facts(kernel: Any) -> dict[str, Any]:
    """Return what the error model and the tests ask about."""
    ttir, ttgir, ptx = (kernel.asm[stage] for stage in ("ttir", "ttgir", "ptx"))
    mma = re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)\S*", ptx)
    return {
        "name": kernel.name,
        "dots": re.findall(r"tt\.dot .*?, inputPrecision = (\w+) :", ttir),
        "products": len(re.findall(r"(?:tt\.dot|ttng\.warp_group_dot) ", ttgir)),
        "mma": mma,
        "rounded": len(re.findall(r"\bcvt\.rna\.tf32\.f32\b", ptx)),
        "sums": sums(ttgir),
        "atomics": re.findall(r"\b(?:atom|red)\.\S+", ptx),
        "flushing": sorted(set(re.findall(r"\b\w\S*\.ftz\S*", ptx))),
        **resources(kernel.asm["cubin"]),
    }


if __name__ == "__main__":
    dtype, precision, C, *wide = sys.argv[1:]
    torch.set_float32_matmul_precision(precision)
    call = call_of(getattr(torch, dtype), int(C), int(wide[0]) if wide else D)
    print(json.dumps([facts(kernel) for kernel in compiled(call, everything=not wide)]))

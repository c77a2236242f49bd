"""Compile the Hopper kernels for sm_90a, on a machine without a GPU, and print as JSON what became of them.

python -m tests.titans.compile_hopper
"""

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.runtime import JITFunction, driver

from tests.titans.compile_kernels import NoGPU, resources
from titans import kernels
from titans.arguments import Call
from titans.kernels import hopper
from titans.kernels.hopper import forward

H, C = 2, 64


@dataclass(frozen=True)
class Variant:
    """A kernel's specialisation."""

    D: int
    plain: bool = False
    packed: bool = False
    resumed: bool = False
    log_gates: bool = False


VARIANTS = [
    Variant(D, plain=plain, packed=both, resumed=both)
    for D in (64, 128)
    for plain in (False, True)
    for both in (False, True)
] + [Variant(40), Variant(72), Variant(64, log_gates=True)]
# of which narrow tiles have other forms where there are many programs
MANY = [Variant(64), Variant(64, plain=True, packed=True, resumed=True), Variant(40), Variant(64, log_gates=True)]
# multiprocessors: enough for chains and outputs, for either, and for half of them
ENOUGH, ONE_EACH, SHARED = 132, H, 1


def call_of(variant: Variant) -> Call:
    """Make a call."""
    D, T = variant.D, 100
    q, k, v = (torch.zeros(1, T, H, D, dtype=torch.bfloat16) for _ in range(3))
    w, b = (None if variant.plain else torch.zeros(H, D, dtype=torch.bfloat16) for _ in range(2))
    theta, alpha, eta = (torch.zeros(1, T, H, dtype=torch.bfloat16) for _ in range(3))
    M, S, anchor = (torch.zeros(1, H, D, D) for _ in range(3))
    offset = torch.zeros(1, dtype=torch.int64) if variant.resumed else None
    cu_seqlens = torch.tensor([0, T]) if variant.packed else None
    return Call(q, k, v, w, b, theta, alpha, eta, M, S, anchor, offset, cu_seqlens, 1e-6, C, variant.log_gates)


def compiled(variant: Variant, places: int) -> list[Any]:
    """Compile the Hopper kernels among those that a forward and a backward would launch, with so many multiprocessors.

    Those of the backward only once.
    """
    forward.multiprocessors = lambda device: places
    found: list[Any] = []

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if kernel.fn.__name__.startswith("hopper"):
            found.append(run(kernel, *args, grid=grid, warmup=True, **kwargs))

    run, JITFunction.run = JITFunction.run, compile_only
    call = call_of(variant)
    try:
        o, *final, M0, S0, x, r = kernels.forward(call)
        if places == ENOUGH:
            kernels.backward(call, M0, S0, x, r, o, *final)
    finally:
        JITFunction.run = run
    return found


def spilled(cubin: bytes) -> int:
    """Return how often memory is touched for want of registers where the products are: in a chain that is its loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loop = code[code.index("HGMMA") : code.rindex("HGMMA")] if "HGMMA" in code else code
    return len(re.findall(r"\b(?:LDL|STL)\b", loop))


def facts(variant: Variant, places: int, kernel: Any) -> dict[str, Any]:
    """Return what the tests ask about."""
    ptx = kernel.asm["ptx"]
    return {
        "name": f"{kernel.name} {variant}",
        "D": variant.D,
        "shares": places == SHARED,
        "log_gates": variant.log_gates,
        "exponentials": len(re.findall(r"\bex2\.", ptx)),
        "shared": kernel.metadata.shared,
        "products": len(re.findall(r"ttng\.warp_group_dot ", kernel.asm["ttgir"])),
        "mma": sorted(set(re.findall(r"wgmma\.mma_async\S*\.f32\.(\w+\.\w+)", ptx))),
        "atomics": re.findall(r"\b(?:atom|red)\.\S+", ptx),
        "spilled": spilled(kernel.asm["cubin"]),
        **resources(kernel.asm["cubin"]),
    }


if __name__ == "__main__":
    driver.set_active(NoGPU())  # type: ignore[arg-type]
    hopper.stages_of = lambda call: hopper.Stages(forward=True, backward=True)
    cases = [(variant, ENOUGH) for variant in VARIANTS]
    cases += [(variant, places) for variant in MANY for places in (ONE_EACH, SHARED)]
    print(json.dumps([facts(*case, kernel) for case in cases for kernel in compiled(*case)]))

"""`python -m titans` prints versions, devices, and which kernels run there and why."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

import titans
from titans.arguments import Call
from titans.backend import choose


def kernels_on(device: torch.device, dtype: torch.dtype, D: int = 64, chunk_size: int = 64) -> str:
    """Name what runs a call of this dtype on a device, and why nothing faster does."""
    q, gate, M = torch.empty(1, 1, 1, D, dtype=dtype), torch.empty(1, 1, 1), torch.empty(1, 1, D, D)
    q, gate, M = q.to(device), gate.to(device), M.to(device)
    call = Call(q, q, q, None, None, gate, gate, gate, M, M, M, None, None, 1e-6, chunk_size, False)
    backend, against = choose(call, None, "chunk")
    if backend != "triton":
        return f"{backend} (triton {against})"
    from titans.kernels import hopper

    found = [name for name, own in hopper.stages_of(call)._asdict().items() if own]
    return f"triton, with Hopper kernels for {' and '.join(found)}" if found else "triton"


def others() -> list[str]:
    """Return other installed distributions that bring a package `titans`."""
    owners = importlib.metadata.packages_distributions().get("titans", [])
    return sorted(set(owners) - {"titans-linear"})


def lines() -> list[str]:
    """Return the report."""
    found = [
        f"titans {titans.__version__} in {Path(titans.__file__).parent}",
        f"python {platform.python_version()}, torch {torch.__version__}, triton {_version('triton')}",
    ]
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
        found.append(f"{device} ({name}), D = 64, chunk_size = 64:")
        found += [f"    {str(dtype)[6:]}: {kernels_on(device, dtype)}" for dtype in (torch.float32, torch.bfloat16)]
    found += [f"warning: the distribution {name!r} brings another package `titans`" for name in others()]
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print("\n".join(lines()))

"""Where a measurement comes from: date, device, versions, command."""

import platform
import re
import shlex
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "numpy", "fla-core", "titans-pytorch")


def provenance(command: Sequence[str], device: str) -> dict[str, str]:
    """Return what the caption of a picture says of its data."""
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "versions": ", ".join([f"Python {platform.python_version()}", *versions(PACKAGES)]),
        "command": shlex.join(command),
    }


def versions(packages: Sequence[str]) -> list[str]:
    """Return the packages that are installed, with their versions."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Name the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return model[1] if model else platform.processor() or platform.machine()

"""What to do where a package that the suite needs is not installed."""

import shlex
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def advice(package: str | None) -> str:
    """Say what to install, and how: one command that any pip understands."""
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["suite"]
    # The op has these itself.
    needed = [str(ROOT), *group] if package in ("torch", "triton") else group
    return (
        f"the suite needs {package}, which is not installed here; run\n    "
        f"{shlex.join([sys.executable, '-m', 'pip', 'install', *needed])}\n"
        "or use .venv/bin/python, which `make .venv/.ready` makes"
    )

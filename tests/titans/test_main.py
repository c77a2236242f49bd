"""`python -m titans` says what runs."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import titans
from titans.__main__ import lines


def test_it_names_versions_devices_and_kernels() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "titans"], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"titans {titans.__version__} in ")
    assert torch.__version__ in done.stdout
    assert "    bfloat16: chunk (triton takes CUDA tensors)" in done.stdout


def test_another_package_of_the_name_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("warning" in line for line in lines())
    owners = {"titans": ["titans-linear", "titans"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    assert lines()[-1] == "warning: the distribution 'titans' brings another package `titans`"

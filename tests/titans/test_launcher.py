"""Launches by compiled kernels that are kept: for what their keys stand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from titans.kernels import launcher
from titans.kernels.launcher import Launcher, types_of

ROOT = Path(__file__).parents[2]


def test_calls_of_one_key_are_compiled_for_the_same() -> None:
    """By Triton's own key, which names types, alignment, constants and options; another process does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.titans.launch_keys", "12"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["kernels"]) == 11
    # as many launches as this met a key a second time
    assert found["again"] > 400
    assert not found["ambiguous"]


class Compiled:
    """What Triton returns from a launch."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.launches.append((grid, *arguments))


class Kernel:
    """A kernel that counts its compilations."""

    arg_names = ("x", "n")

    def __init__(self) -> None:
        self.arg_names = ["x", "n"]
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        def first(**arguments: Any) -> Compiled:
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return first


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launcher, "CompiledKernel", Compiled)
    return Kernel()


def test_a_key_is_compiled_once_and_launched_with_the_arguments_of_the_call(kernel: Kernel) -> None:
    run = Launcher(kernel)
    for i, key in enumerate(("cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0")):
        run(i, key, x=f"x{i}", n=i, num_warps=4)
    first, second = kernel.compiled
    # options are not among the arguments
    assert first.launches == [((2, 1, 1), "x2", 2), ((4, 1, 1), "x4", 4)]
    assert second.launches == [((3, 1, 1), "x3", 3)]


@pytest.mark.parametrize("arguments", [{"n": 1, "x": 0}, {"x": 0, "num_warps": 4, "n": 1}, {"x": 0}])
def test_arguments_in_another_order_are_refused(kernel: Kernel, arguments: dict[str, Any]) -> None:
    """Later launches would mix them up."""
    with pytest.raises(TypeError, match="must begin with"):
        Launcher(kernel)(1, None, **arguments)


def test_what_is_interpreted_is_not_kept() -> None:
    kernel = SimpleNamespace(arg_names=["x"], calls=0)

    class Interpreted:
        arg_names = ("x",)

        def __getitem__(self, grid: tuple[int]) -> Any:
            def call(x: Any) -> None:
                kernel.calls += 1

            return call

    interpreted: Any = Interpreted()
    interpreted.arg_names = ["x"]
    run = Launcher(interpreted)
    run(1, None, x=0)
    run(1, None, x=0)
    assert kernel.calls == 2


def test_types_tell_dtypes_and_alignment_apart() -> None:
    x = torch.zeros(9)
    halves = [x[1:], x[4:], x.double(), x.half(), None]
    assert len({types_of([y]) for y in halves}) == len(halves)
    assert types_of([x]) == types_of([x[4:]])
    assert types_of([x, x[1:]]) != types_of([x[1:], x])

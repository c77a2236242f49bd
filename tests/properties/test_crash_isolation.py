"""A CUDA error fails its own test, is tried again in a fresh process, and touches no other test."""

import re
from pathlib import Path

import pytest
import torch

from properties.harness.crash_isolation import DeviceLost, is_fatal, spread
from tests.properties.test_laws import run_suite

LAWS = ("properties/test_plain_memory.py", "--hypothesis-profile=smoke")


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_a_lost_device_fails_one_test(workers: tuple[str, ...], tmp_path: Path) -> None:
    output = run_suite(*LAWS, *workers, "--impl", "tests.properties.dying:memory", fails=1, DIES=str(tmp_path / "died"))
    assert re.search(r"1 failed, 2 passed", output), output
    assert re.search(r"AcceleratorError: CUDA error: device-side assert triggered", output)
    assert re.search(r"- the same test in a fresh process -+\ncall: passed", output)


def test_a_process_that_dies_is_said_to_have_died(tmp_path: Path) -> None:
    output = run_suite(*LAWS, "--impl", "tests.properties.dying:always", fails=1, DIES=str(tmp_path / "died"))
    assert re.search(r"3 failed", output), output
    assert re.search(r"the fresh process ended with -11", output)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_an_assertion_on_the_device_fails_one_test(tmp_path: Path) -> None:
    target = ("--device", "cuda", "--impl", "tests.properties.dying:asserts")
    output = run_suite(*LAWS, *target, fails=1, DIES=str(tmp_path / "died"))
    assert re.search(r"1 failed, 2 passed", output), output
    assert re.search(r"device-side assert triggered", output)
    assert re.search(r"- the same test in a fresh process -+\ncall: passed", output)


def test_only_what_cannot_be_mended_is_fatal() -> None:
    assert is_fatal(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    assert is_fatal(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
    assert is_fatal(DeviceLost())
    assert not is_fatal(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_fatal(RuntimeError("shape '[2]' is invalid"))
    assert not is_fatal(AssertionError("CUDA error"))


@pytest.mark.parametrize(("worker", "gpu"), [("gw0", 0), ("gw1", 1), ("gw2", 2), ("gw3", 0), ("gw10", 1)])
def test_workers_take_the_gpus_in_turn(worker: str, gpu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    spread("cpu")
    spread("cuda")
    assert taken == [gpu]

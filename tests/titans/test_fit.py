"""Shared memory: every kernel fits every GPU, or the chooser says that it does not. Compiles, but needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.titans.test_backend import call
from titans.backend import choose
from titans.kernels import fit, launch
from titans.kernels.fit import HOPPER, NEEDS, Needs, needs_of, steps_in_flight
from titans.partition import step_rows

ROOT = Path(__file__).parents[2]
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
DTYPES = ("bfloat16", "float16", "float32")


@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_fits_or_is_refused(capability: int) -> None:
    command = [sys.executable, "-m", "tests.titans.allocate_kernels", str(capability), *DTYPES]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for dtype, table in json.loads(done.stdout).items():
        for size in table:
            assert {"state_kernel", "state_vjp_kernel"} <= set(size["kernels"])
            parallel, chain = size["needs"]
            steps = steps_in_flight(Needs(parallel, tuple(chain)), SHARED[capability])
            for name, bytes_ in size["kernels"].items():
                case = f"{name} for {dtype}, D = {size['D']}, C = {size['C']}: {bytes_}"
                assert bytes_ <= (chain[steps - 1] if name.startswith("state") else parallel), case
                assert size["refused"] or bytes_ <= SHARED[capability], case
            # none is refused for nothing
            assert size["refused"] == (max(size["kernels"].values()) > SHARED[capability]), size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("C", [1, 16, 32, 64, 1000])
@pytest.mark.parametrize("D", [1, 64, 65, 128])
def test_a_hopper_gpu_has_as_many_steps_in_flight_as_were_fastest(dtype: torch.dtype, D: int, C: int) -> None:
    q = torch.empty(1, 1, 1, D, dtype=dtype)
    rows = step_rows(C, launch.block_rows(q))
    assert steps_in_flight(needs_of(q, rows), HOPPER) == (3 if D <= 64 else 2 if rows == 64 else 1)


def test_fewer_steps_are_in_flight_where_less_fits() -> None:
    for needs in NEEDS.values():
        for steps, bytes_ in enumerate(needs.chain, 1):
            assert steps_in_flight(needs, bytes_) == steps
            assert steps_in_flight(needs, bytes_ - 1) == max(1, steps - 1)


def test_a_call_that_does_not_fit_runs_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "shared_memory", lambda device: SHARED[89])
    assert choose(call("cuda", D=64), None, "chunk") == ("triton", None)
    with pytest.warns(UserWarning, match="shared memory"):
        backend, against = choose(call("cuda", D=128), None, "chunk")
    assert backend == "chunk"
    assert against == "takes a GPU with 147456 bytes of shared memory for D = 128, got 101376"


def test_a_compiled_call_may_ask_for_the_size_of_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # like a question to the driver, this is nothing that Dynamo traces
    monkeypatch.setattr(fit, "_shared_memory", lambda device: SHARED[80] + 0 * os.stat(ROOT).st_size)
    asked = torch.compile(lambda x: x + fit.shared_memory(torch.device("cpu")), fullgraph=True, backend="eager")
    assert asked(torch.zeros(1)).item() == SHARED[80]

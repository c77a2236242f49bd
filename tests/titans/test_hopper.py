"""Which calls the Hopper kernels take, and what they become when they are compiled for sm_90a; needs no GPU."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from titans.kernels import hopper

ROOT = Path(__file__).parents[2]
# bytes of a thread's stack: the warps that copy leave their registers to the chain
COPIES = 96
# where rows fill no tile their masks take registers, too
EDGES = 160
# how often a step touches memory for want of registers where two programs share those of a multiprocessor
SHARING = 32
# bytes that a thread of a wide chain keeps in memory over its loop: four numbers
KEPT = 16
SHARED = 232448  # bytes of shared memory that a program can have on compute capability 9.0
RESERVED = 1024  # bytes that each program has beside its own


def chosen(**changes: Any) -> hopper.Stages:
    """Choose for a call that the kernels take, but for the changes."""
    call = {
        "dtype": torch.bfloat16, "capability": (9, 0), "chunk_size": 64, "D": 64,
        "packed": False, "resumed": False, "plain": False, "version": "3.7.1",
    }  # fmt: skip
    return hopper.choose(**call | changes)


@pytest.mark.parametrize("D", [40, 64, 72, 128])
@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
def test_the_chain_is_taken_however_the_sequences_are_passed(D: int, version: str) -> None:
    """Or the bits of a sequence would depend on it."""
    for bits in range(8):
        packed, resumed, plain = (bool(bits >> i & 1) for i in range(3))
        assert chosen(D=D, version=version, packed=packed, resumed=resumed, plain=plain).forward


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float16},
        {"dtype": torch.float32},
        {"capability": None},
        {"capability": (8, 0)},
        {"capability": (10, 0)},
        {"chunk_size": 16},
        {"chunk_size": 63},
        {"chunk_size": 128},
        {"D": 32},
        {"D": 60},
        {"D": 136},
        {"version": "3.5.1"},
        {"version": "3.8.0"},
    ],
    ids=str,
)
def test_all_else_stays_with_the_portable_kernels(changes: dict[str, Any]) -> None:
    assert chosen(**changes) == hopper.Stages()


@functools.cache
def compiled() -> list[dict[str, Any]]:
    """Compile every variant, in a process in which Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.titans.compile_hopper"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_forward_fits_a_multiprocessor_and_spills_next_to_nothing() -> None:
    kernels = [kernel for kernel in compiled() if kernel["name"].startswith("hopper_forward_kernel")]
    assert len(kernels) == 11
    for kernel in kernels:
        assert kernel["shared"] <= SHARED, kernel
        assert kernel["STACK"] <= {40: 0, 64: 0, 72: EDGES, 128: COPIES}[kernel["D"]], kernel
        assert not kernel["LOCAL"], kernel
        # of the seven hundred instructions of a step
        assert kernel["spilled"] <= (0 if kernel["D"] <= 64 else 24), kernel
        # of gates that are logs, and of nothing else
        assert (kernel["exponentials"] > 0) == kernel["log_gates"], kernel
        # roles, and chunks that are handed over
        assert {*kernel["atomics"]} == {"atom.global.gpu.relaxed.add.u32", "atom.global.gpu.release.exch.b32"}, kernel
        # of the chain y, M and S; of the outputs the scores, q M0, q S0 and the weighted u
        assert kernel["products"] == 7, kernel
        assert set(kernel["mma"]) == {"bf16.bf16"}, kernel


def test_the_ends_of_the_chunks_spill_nothing() -> None:
    kernels = [kernel for kernel in compiled() if kernel["name"].startswith("hopper_ends_kernel")]
    assert len(kernels) == 11
    for kernel in kernels:
        assert not kernel["STACK"] + kernel["LOCAL"] + kernel["shared"], kernel
        assert (kernel["exponentials"] > 0) == kernel["log_gates"], kernel


def test_the_fused_forward_fits_half_a_multiprocessor_and_spills_little() -> None:
    kernels = [kernel for kernel in compiled() if kernel["name"].startswith("hopper_fused_kernel")]
    assert len(kernels) == 8
    for kernel in kernels:
        # where there are many, two programs share a multiprocessor
        assert kernel["shared"] <= (SHARED // 2 - RESERVED if kernel["shares"] else SHARED), kernel
        assert not kernel["LOCAL"], kernel
        # of the sixteen hundred instructions of a step
        assert kernel["spilled"] <= (SHARING if kernel["shares"] else 4), kernel
        assert (kernel["exponentials"] > 0) == kernel["log_gates"], kernel
        assert not kernel["atomics"], kernel
        assert kernel["products"] == 7, kernel
        assert set(kernel["mma"]) == {"bf16.bf16"}, kernel


def test_the_reverse_chain_fits_a_multiprocessor_and_spills_next_to_nothing() -> None:
    kernels = [kernel for kernel in compiled() if kernel["name"].startswith("hopper_state_vjp_kernel")]
    # the calls end inside a chunk, which has a launch of its own
    assert len(kernels) == 22
    for kernel in kernels:
        assert kernel["shared"] <= SHARED, kernel
        assert kernel["STACK"] <= KEPT, kernel
        assert kernel["LOCAL"] == 0, kernel
        assert not kernel["atomics"], kernel
        # k dS, k dM, and k^T dy in parts of 64 columns: inside the loop and after it
        assert kernel["products"] in (4, 6), kernel
        assert set(kernel["mma"]) == {"bf16.bf16"}, kernel


def test_the_parallel_kernels_of_the_backward_share_a_multiprocessor_and_spill_nothing() -> None:
    for name, products in (("output_vjp", {True: 11, False: 12}), ("key_vjp", {True: 3, False: 3})):
        kernels = [kernel for kernel in compiled() if kernel["name"].startswith(f"hopper_{name}_kernel")]
        assert len(kernels) == 11
        for kernel in kernels:
            # two programs of narrow tiles at once
            assert kernel["shared"] <= (SHARED // 2 - RESERVED if kernel["D"] <= 64 else SHARED), kernel
            assert not kernel["STACK"], kernel
            assert not kernel["LOCAL"], kernel
            assert not kernel["atomics"], kernel
            # the plain memory has no y to make again
            assert kernel["products"] == products["plain=True" in kernel["name"]], kernel
            assert set(kernel["mma"]) == {"bf16.bf16"}, kernel


def test_the_reverse_of_the_coefficients_stays_in_registers() -> None:
    kernels = [kernel for kernel in compiled() if kernel["name"].startswith("hopper_coefficients_vjp_kernel")]
    assert len(kernels) == 11
    for kernel in kernels:
        assert not kernel["STACK"], kernel
        assert not kernel["LOCAL"], kernel
        assert not kernel["mma"], kernel
        assert (kernel["exponentials"] > 0) == kernel["log_gates"], kernel

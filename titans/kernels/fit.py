"""Shared memory: which calls fit a GPU, and how many steps of the chain are in flight."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

# bytes that a program may have on an H100 or H200
HOPPER = 232_448


class Needs(NamedTuple):
    """Bytes of a program, at most over the architectures.

    Attributes
    ----------
    parallel : int
        Of the kernels that work on blocks.
    chain : tuple of int
        Of the chain with 1, 2, ... steps in flight, up to as many as were fastest on an H200.
    """

    parallel: int
    chain: tuple[int, ...]


BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# By dtype, D > 64, and rows of a step. Read off the compiled kernels; tests/titans/test_fit.py compiles them again.
NEEDS = {
    (BFLOAT16, False, 16): Needs(65_536, (16_896, 21_156, 25_384)),
    (BFLOAT16, False, 32): Needs(65_536, (18_432, 26_916, 42_280)),
    (BFLOAT16, False, 64): Needs(65_536, (32_768, 66_852, 117_288)),
    (BFLOAT16, True, 16): Needs(155_648, (65_536,)),
    (BFLOAT16, True, 32): Needs(155_648, (65_536,)),
    (BFLOAT16, True, 64): Needs(155_648, (81_920, 198_436)),
    (FLOAT16, False, 16): Needs(65_536, (32_768, 49_700, 66_600)),
    (FLOAT16, False, 32): Needs(65_536, (32_768, 99_364, 165_928)),
    (FLOAT16, True, 16): Needs(212_992, (131_072,)),
    (FLOAT32, False, 16): Needs(49_152, (32_768, 49_700, 66_600)),
    (FLOAT32, False, 32): Needs(49_152, (32_768, 99_364, 165_928)),
    (FLOAT32, True, 16): Needs(147_456, (131_072,)),
}


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have on a device, asked once; where there is no GPU, those of the GPU tuned for."""
    return _shared_memory(device)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return HOPPER
    return int(driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


# a compiled call asks while it is traced; this is `torch.compiler.assume_constant_result` without the import of Dynamo
shared_memory._dynamo_marked_constant = True  # type: ignore[attr-defined]


def needs_of(q: Tensor, BS: int) -> Needs:
    """Find the needs of the kernels for queries like `q` and steps of BS rows."""
    return NEEDS[q.dtype, q.shape[-1] > 64, BS]


def least(needs: Needs) -> int:
    """Bytes that a program of every kernel fits in."""
    return max(needs.parallel, needs.chain[0])


def steps_in_flight(needs: Needs, shared: int) -> int:
    """As many steps of the chain as fit `shared` bytes, at least one."""
    return max(1, sum(bytes_ <= shared for bytes_ in needs.chain))

"""The Hopper kernel of a decoded token, interpreted on the CPU, against the same token in PyTorch."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.titans import gluon_interpreter as gluon
from titans import DecodeState, TitansState
from titans.arguments import Call
from titans.decoding import DecodeFields, decode
from titans.kernels.decode import _tile
from titans.kernels.tile import Affine

H, C = 4, 64


class Either:
    """Addresses in one tensor or another."""

    def __init__(self, condition: Any, one: Any, other: Any) -> None:
        self.condition, self.one, self.other = torch.as_tensor(condition), one, other

    def load(self, mask: Any) -> Tensor:
        """Read where each address leads, zero elsewhere."""
        one, other = (
            gluon.load(pointer, mask & chosen)
            for pointer, chosen in ((self.one, self.condition), (self.other, ~self.condition))
        )
        return torch.where(self.condition, one, other)


class Address(gluon.Pointer):
    """A pointer that knows the dtype of what it points at."""

    @property
    def dtype(self) -> Any:
        """As Gluon has it."""
        return type("Pointed", (), {"element_ty": self.flat.dtype})

    def __add__(self, offset: Any) -> Address:
        return Address(self.flat, self.at + offset)


def where(condition: Any, x: Any, y: Any) -> Any:
    """Choose between values or addresses."""
    if isinstance(x, gluon.Pointer) and torch.as_tensor(condition).ndim == 0:
        return x if condition else y
    if isinstance(x, gluon.Pointer):
        return Either(condition, x, y)
    return torch.where(torch.as_tensor(condition), torch.as_tensor(x), torch.as_tensor(y))


def load(pointer: Any, mask: Any = None, other: Any = 0) -> Tensor:
    """Load from a tensor, or from one or another."""
    return pointer.load(mask) if isinstance(pointer, Either) else gluon.load(pointer, mask, other)


def store(pointer: gluon.Pointer, value: Any, mask: Any = None) -> None:
    """Store numbers, too."""
    gluon.store(pointer, torch.as_tensor(value), mask)


class Memory:
    """All shared memory of a program, so that a fence is one of all of it."""

    def __init__(self) -> None:
        self.tiles: list[Any] = []
        self.copies: list[Any] = []
        self.groups: list[list[Any]] = []

    def allocate(self, *arguments: Any) -> Any:
        """Allocate a tile, which holds NaN."""
        self.tiles.append(gluon.allocate_shared_memory(*arguments))
        return self.tiles[-1]

    def fence(self) -> None:
        """Let the tensor cores see what was written."""
        for tile in self.tiles:
            tile.dirty[:] = 0

    def copy(self, tile: Any, at: Any, mask: Any = None) -> None:
        """Start a copy, which is made when it is waited for."""
        mask = torch.ones((), dtype=torch.bool) if mask is None else mask
        tile.memory[tile.at] = torch.nan
        values = gluon.load(at, mask)
        self.copies.append(lambda: tile.store(torch.broadcast_to(values, tile.shape)))

    def commit(self) -> None:
        """Make a group of the copies since the last one."""
        self.groups.append(self.copies)
        self.copies = []

    def wait(self, outstanding: int) -> None:
        """Make the copies of all groups but the last ones."""
        while len(self.groups) > outstanding:
            for copy in self.groups.pop(0):
                copy()


@contextmanager
def interpreted() -> Iterator[Any]:
    """Load the module for the interpreter, and the Triton functions that it calls."""
    modules, memory = gluon._modules(), Memory()
    language = modules["triton.language"]
    language.__dict__.update(
        where=where, load=load, store=store, exp=torch.exp, debug_barrier=lambda: None, permute=torch.permute,
        reshape=torch.reshape, join=lambda x, y: torch.stack((x, y), -1), allocate_shared_memory=memory.allocate,
        DistributedLinearLayout=gluon.Layout, full_like=torch.full_like,
    )  # fmt: skip
    asynchronous: Any = modules[f"{gluon.GLUON}.language.nvidia.ampere"].async_copy
    asynchronous.__dict__.update(
        async_copy_global_to_shared=memory.copy, commit_group=memory.commit, wait_group=memory.wait
    )
    modules[f"{gluon.GLUON}.language.nvidia.hopper"].__dict__.update(fence_async_shared=memory.fence)
    with patch.dict(sys.modules, modules):
        module: ModuleType | None = None
        for part in ("coefficients", *gluon.PARTS["output"], "decode", "hopper.decode"):
            full = f"titans.kernels.{part}"
            spec = importlib.util.spec_from_file_location(full, gluon.KERNELS / f"{part.replace('.', '/')}.py")
            assert spec is not None
            assert spec.loader is not None
            module = sys.modules[full] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        yield module


def pointers(x: Any) -> Any:
    """Tensors as addresses, also those of a tuple."""
    if isinstance(x, tuple):
        return type(x)(*map(pointers, x))
    return Address(x.view(-1)) if isinstance(x, Tensor) else x


def run(module: Any, call: Call, state: DecodeState, heads: int) -> Tensor:
    """Decode a token, so many heads to a program."""
    o, D = torch.empty_like(call.q), call.q.shape[-1]
    tensors = (
        call.q,
        call.k,
        call.v,
        Affine(call.w, call.b),
        call.theta,
        call.alpha,
        call.eta,
        DecodeFields(*state),
        o,
    )
    for pid in range(call.q.shape[0] * H // heads):
        gluon.current[:] = [gluon.Program(pid, 0)]
        arguments = (*map(pointers, tensors), H, call.eps, _tile(call), heads, None, None)
        gluon.current[0].run([(module.hopper_decode_kernel, arguments)])
    assert o.shape[-1] == D
    return o


def end_of(module: Any, call: Call, state: DecodeState) -> tuple[Tensor, Tensor]:
    """Weights and decay after the last token, as the forward makes them."""
    weights, decay = (torch.full_like(x, torch.nan) for x in (state.weights, state.decay))
    for pid in range(len(state.M) * H):
        gluon.current[:] = [gluon.Program(pid, 0)]
        arguments = (*map(pointers, (DecodeFields(*state), weights, decay)), _tile(call))
        gluon.current[0].run([(module.hopper_end_kernel, arguments)])
    return weights, decay


def drawn(D: int, plain: bool, log_gates: bool) -> tuple[list[Call], TitansState]:
    """Draw tokens of three sequences at different places; small integers and powers of two in the plain memory."""
    generator = torch.Generator().manual_seed(D)

    def number(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator)
        # few, so that all sums are short
        return (x.sign() * (x.abs() > 2) if plain else x).bfloat16()

    M, S = (number(3, H, D, D).float() for _ in range(2))
    start = TitansState(M, S, number(3, H, D, D).float(), torch.tensor([0, 61, 5]), C)
    calls = []
    for t in range(5):
        q, k, v = (number(3, 1, H, D) for _ in range(3))
        theta, alpha, eta = (torch.full((3, 1, H), x) for x in (0.5, 1.0 - t % 2, 0.5))
        gates = (theta.log(), (1 - alpha).log(), eta.log()) if log_gates else (theta, alpha, eta)
        w, b = (None, None) if plain else (number(H, D), number(H, D))
        calls.append(Call(q, k / (1 if plain else D**0.5), v, w, b, *gates, *start[:3], None, None, 1e-6, C, log_gates))
    return calls, start


@pytest.mark.parametrize(
    ("D", "heads", "plain", "log_gates"),
    [
        (40, 4, False, True),
        (40, 1, True, False),
        (64, 4, True, False),
        (64, 1, False, False),
        (72, 1, True, True),
        (128, 1, True, False),
        (128, 1, False, True),
    ],
)
def test_a_token_is_that_of_pytorch(D: int, heads: int, plain: bool, log_gates: bool) -> None:
    """In the plain memory every number is exact."""
    calls, start = drawn(D, plain, log_gates)
    state, expected = (DecodeState.begin(start, torch.bfloat16) for _ in range(2))
    with interpreted() as module:
        for call in calls:
            o, wanted = run(module, call, state, heads), decode(call, expected)
            if plain:
                assert torch.equal(o, wanted)
            else:
                assert (o - wanted).abs().max() <= 8 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()
        weights, decay = end_of(module, calls[0], state)
    assert torch.equal(state.place[..., :2], expected.place[..., :2])
    if plain:
        for name in ("M", "S", "anchor", "M0", "S0", "keys", "gates", "decay"):
            assert torch.equal(getattr(state, name), getattr(expected, name)), name
        # where there are tokens
        assert torch.equal(weights[..., :2], expected.weights[..., :2])
        assert torch.equal(decay[:, :, 1, :3], expected.decay[:, :, 1, :3])


# of a multiprocessor of an H100 or H200: bytes, of which each program takes 1024 more than it asks for; registers
SHARED, REGISTERS = 233_472, 65_536


def test_as_many_programs_run_at_once_as_the_kernel_was_made_for() -> None:
    """Also where tokens and state do not begin at a multiple of 16 bytes, the kernel compiles."""
    command = [sys.executable, "-m", "tests.titans.compile_decode"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    found = json.loads(printed.splitlines()[-1])
    assert [(kernel["D"], kernel["heads"]) for kernel in found] == [(64, 1), (64, 4), (128, 1), (40, 1)]
    for kernel, programs in zip(found, (4, 2, 3, 4), strict=True):
        assert programs * (kernel["shared"] + 1024) <= SHARED, kernel
        assert programs * 128 * kernel["REG"] <= REGISTERS, kernel
        # at the end of a block a wide state does not fit the registers
        assert kernel["STACK"] == 0 or kernel["D"] == 128, kernel

"""Copies that a role's own threads make asynchronously, `cp.async`, for `gluon_interpreter`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.titans import gluon_interpreter as base


def _copy(tile: base.Shared, pointer: base.Pointer, mask: Any = None) -> None:
    """Start a copy: ordinary writes of this role, zero where masked, so that the tensor cores need a fence."""
    at, inside = base._valid(pointer, mask)
    role, mine = base.here(), 1 + base.current[0].roles.index(base.here())
    tile.memory[tile.at] = torch.nan

    def copy() -> None:
        zero = torch.zeros((), dtype=tile.memory.dtype)
        tile.memory[tile.at] = torch.where(inside, pointer.flat[at], zero)
        tile.dirty[tile.at] = mine
        role.copying -= 1  # type: ignore[attr-defined]

    role.copying = getattr(role, "copying", 0) + 1  # type: ignore[attr-defined]
    base.current[0].copies.append(copy)


def _wait_group(outstanding: int) -> None:
    assert outstanding == 0, "groups are not told apart"
    role = base.here()
    role.wait(lambda: getattr(role, "copying", 0) == 0)


def _arrive(barrier: base.Barrier, count: int = 1) -> None:
    barrier.change(count, 0)
    base.here().wait(lambda: True)


def _from_tensor(x: Tensor, block: list[int], layout: Any) -> base.TensorDescriptor:
    return base.TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


class Jit(base.Jit):
    """A launch, which may limit registers."""

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        launch = super().__getitem__(grid)
        return lambda maxnreg=None, **arguments: launch(**arguments)


def _modules() -> dict[str, ModuleType]:
    modules = _others()
    modules[f"{base.GLUON}.language.nvidia.ampere"].async_copy.__dict__.update(
        async_copy_global_to_shared=_copy, commit_group=lambda: None, wait_group=_wait_group
    )
    modules[f"{base.GLUON}.language.nvidia.hopper"].mbarrier.arrive = _arrive
    modules[f"{base.GLUON}.nvidia.hopper"].TensorDescriptor.from_tensor = staticmethod(_from_tensor)
    modules[f"{base.GLUON}.language"].zeros_like = torch.zeros_like  # type: ignore[attr-defined]
    return modules


_others = base._modules


@contextmanager
def interpreted(name: str, change: Callable[[str], str] = lambda text: text, changed: str = "") -> Iterator[Any]:
    """`gluon_interpreter.interpreted`, with these copies."""
    with (
        patch.object(base, "_modules", _modules),
        patch.object(base, "Jit", Jit),
        base.interpreted(name, change, changed) as module,
    ):
        yield module

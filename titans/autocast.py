"""Autocast rounds the operands of the products, q, k and v, as it does for attention, and nothing else."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def _is_on(device: str) -> bool:
    # some kinds of devices have no autocast to be asked about; Dynamo of torch 2.11 cannot trace which
    known = device in ("cuda", "cpu") or (
        device != "meta" and (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device))
    )
    return known and torch.is_autocast_enabled(device)


def follow_autocast(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """Round q, k and v to the dtype of autocast where it is on; float64 is left alone."""
    if not isinstance(q, Tensor) or not _is_on(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)

    def follow(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x

    return follow(q), follow(k), follow(v)


def without_autocast(q: Tensor) -> AbstractContextManager[Any]:
    """Leave autocast on the device of `q` outside."""
    return torch.autocast(q.device.type, enabled=False) if _is_on(q.device.type) else nullcontext()

"""The stages of the chain in Gluon, for compute capability 9.0; `choose` says which calls they take.

The forward is one kernel, `forward.py`: its chain lies in `state.py`, its outputs in `output.py`; both in one, for many
narrow heads, in `fused.py`; `ends.py` makes the coefficients of the chain, beside it. The backward is `output_vjp.py`,
the reverse of the chain in `state_vjp.py`, `key_vjp.py` and `coefficients_vjp.py`. Each writes the buffers of the
portable kernels, so either direction may run with the portable kernels of the other.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from titans.arguments import Call

__all__ = ["Stages", "choose", "stages_of"]

# Gluon is experimental: only versions that were tried.
TRIED = ("3.6.", "3.7.")
CHUNK = 64


class Stages(NamedTuple):
    """Which directions of a call run as Hopper kernels; all others are the portable Triton kernels."""

    forward: bool = False
    backward: bool = False


def choose(
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    chunk_size: int,
    D: int,
    *,
    packed: bool,
    resumed: bool,
    plain: bool,
    version: str = triton.__version__,
) -> Stages:
    """Choose the kernels of a call, forward and backward alike, from facts that both directions know.

    Parameters
    ----------
    dtype : torch.dtype
        Of q, k and v.
    capability : tuple of int, or None
        Compute capability of the device; None for no CUDA device.
    chunk_size, D : int
    packed, resumed, plain : bool
        Whether the call has `cu_seqlens`, an `offset`, and no `w` and `b`. All are taken: the bits of a sequence must
        not depend on how it is passed.
    version : str
        Of Triton.
    """
    if capability != (9, 0) or dtype != torch.bfloat16 or chunk_size != CHUNK or not version.startswith(TRIED):
        return Stages()
    # rows are copied 16 bytes at a time
    if not 32 < D <= 128 or D % 8:
        return Stages()
    return Stages(forward=True, backward=True)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def stages_of(call: Call) -> Stages:
    """`choose` for a call, on the device that it is on."""
    device = call.q.device
    return choose(
        call.q.dtype,
        _capability(device.index) if device.type == "cuda" else None,
        call.chunk_size,
        call.q.shape[-1],
        packed=call.cu_seqlens is not None,
        resumed=call.offset is not None,
        plain=call.w is None,
    )

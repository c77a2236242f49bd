"""Prefill: read prompts and leave a state that carries its block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from titans.api import InitialState, checked_call, decode_token, run
from titans.arguments import Call, TitansState
from titans.backend import Backend
from titans.decoding import DecodeState
from titans.partition import block_rows, chunks_per_block, final_offset
from titans.validation import has_values

TOKENS, STATE = ("q", "k", "v", "theta", "alpha", "eta"), ("M", "S", "anchor", "offset")


@torch.no_grad()
def titans_linear_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    theta: Tensor,
    alpha: Tensor,
    eta: Tensor,
    eps: float = 1e-6,
    chunk_size: int = 16,
    initial_state: InitialState = None,
    *,
    log_gates: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, DecodeState]:
    """Read a prompt, and leave a `DecodeState` whose outputs go on as those of one call over prompt and answer would.

    The prompt is read by `chunk_titans_linear` up to its last full block, and token by token from there. Nothing is
    recorded for a derivative. Prompts of other lengths take calls of their own; `torch.cat` puts the fields of their
    states together.

    Parameters
    ----------
    q, k, v, w, b, theta, alpha, eta, eps, chunk_size, log_gates, backend
        As in `chunk_titans_linear`.
    initial_state : TitansState, or Tensor of shape (N, H, D, D) or (H, D, D), or None
        As in `chunk_titans_linear`. The offsets of a state are read, which synchronises a GPU; a compiled call does not
        read them, and may round differently.

    Returns
    -------
    o : Tensor, shape (B, T, H, D)
    state : DecodeState

    Raises
    ------
    TypeError, ValueError
        As `chunk_titans_linear`.
    """
    call = checked_call(
        q, k, v, w, b, theta, alpha, eta, eps, chunk_size, initial_state, True, None, log_gates, backend
    )  # fmt: skip
    # wherever the cuts are, the numbers are the same up to roundings
    if call.offset is None or not has_values(call.offset) or not call.offset.numel():
        return _read(call, 0, backend)
    order, parts = [], []
    for value in sorted(set(call.offset.tolist())):
        rows = (call.offset == value).nonzero()[:, 0]
        parts.append(_read(_part(call, (*TOKENS, *STATE), rows), value, backend))
        order.append(rows)
    back = torch.cat(order).argsort()
    outputs, states = zip(*parts, strict=True)
    fields = (torch.cat(field)[back] for field in zip(*states, strict=True))
    return torch.cat(outputs)[back], DecodeState(*fields, chunk_size=call.chunk_size)


def _part(call: Call, names: Iterable[str], rows: Any) -> Call:
    return call._replace(**{name: getattr(call, name)[rows] for name in names})


def _read(call: Call, offset: int, backend: Backend | None) -> tuple[Tensor, DecodeState]:
    """Read prompts that begin at an offset: whole blocks at once, and token by token from there."""
    n = _whole(offset, call.q, call.chunk_size)
    whole = _part(call, TOKENS, (slice(None), slice(n)))
    o, M, S, anchor = run(whole, backend)
    reached = TitansState(M, S, anchor, final_offset(whole), call.chunk_size)
    state = DecodeState.begin(reached, call.q.dtype)
    outputs = [o]
    for t in range(n, call.q.shape[1]):
        outputs.append(decode_token(_part(call, TOKENS, (slice(None), slice(t, t + 1))), state, backend))
    return torch.cat(outputs, 1), state


def _whole(offset: int, q: Tensor, C: int) -> int:
    """Tokens of a prompt that begins at an offset, up to the end of its last full block."""
    R = block_rows(q.dtype, q.shape[-1])
    end, width = offset + q.shape[1], C * chunks_per_block(C, R)
    return max(0, end // width * width + end % width // R * R - offset)

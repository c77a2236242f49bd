"""Prefill: read prompts and leave a state that carries its block."""

from __future__ import annotations

import torch
from torch import Tensor

from titans import validation
from titans.api import InitialState, chunk_titans_linear, titans_linear_step
from titans.autocast import follow_autocast
from titans.backend import Backend
from titans.decoding import DecodeState
from titans.partition import block_rows, chunks_per_block


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
        As in `chunk_titans_linear`. The offsets of a state are read, which synchronises a GPU.

    Returns
    -------
    o : Tensor, shape (B, T, H, D)
    state : DecodeState

    Raises
    ------
    TypeError, ValueError
        As `chunk_titans_linear`.
    """
    q, k, v = follow_autocast(q, k, v)
    validation.check_tokens(q, k, v, "(B, T, H, D)")
    eps, chunk_size = validation.check_options(eps, chunk_size, backend, q, log_gates=log_gates)
    validation.check_parameters(w, b, q)
    theta, alpha, eta = (
        validation.check_gate(name, gate, q, "(B, T, H)")
        for name, gate in (("theta", theta), ("alpha", alpha), ("eta", eta))
    )
    validation.check_state("initial_state", initial_state, q.shape[0], q, chunk_size)
    tokens = q, k, v, theta, alpha, eta

    def read(rows: slice | Tensor, start: InitialState, offset: int) -> tuple[Tensor, DecodeState]:
        n = _whole(offset, q, chunk_size)
        q_n, k_n, v_n, theta_n, alpha_n, eta_n = (x[rows, :n] for x in tokens)
        o, reached = chunk_titans_linear(
            q_n, k_n, v_n, w, b, theta_n, alpha_n, eta_n, eps, chunk_size, start, True,
            log_gates=log_gates, backend=backend,
        )  # fmt: skip
        assert reached is not None
        state, outputs = DecodeState.begin(reached, q.dtype), [o]
        for t in range(n, q.shape[1]):
            q_t, k_t, v_t, theta_t, alpha_t, eta_t = (x[rows, t] for x in tokens)
            o_t, state = titans_linear_step(
                q_t, k_t, v_t, w, b, theta_t, alpha_t, eta_t, state, eps, chunk_size,
                log_gates=log_gates, backend=backend, in_place=True,
            )  # fmt: skip
            outputs.append(o_t[:, None])
        return torch.cat(outputs, 1), state

    if not isinstance(initial_state, tuple):
        return read(slice(None), initial_state, 0)
    M, S, anchor, offset = initial_state
    # wherever the cuts are, the numbers are the same up to roundings
    if not validation.has_values(offset):
        return read(slice(None), initial_state, 0)
    order, parts = [], []
    for value in sorted(set(offset.tolist())):
        rows = (offset == value).nonzero()[:, 0]
        parts.append(read(rows, (M[rows], S[rows], anchor[rows], offset[rows]), value))
        order.append(rows)
    if not parts:
        return read(slice(None), initial_state, 0)
    back = torch.cat(order).argsort()
    outputs, states = zip(*parts, strict=True)
    fields = (torch.cat(field)[back] for field in zip(*states, strict=True))
    return torch.cat(outputs)[back], DecodeState(*fields, chunk_size=chunk_size)


def _whole(offset: int, q: Tensor, C: int) -> int:
    """Tokens of a prompt that begins at an offset, up to the end of its last full block."""
    R = block_rows(q.dtype, q.shape[-1])
    end, width = offset + q.shape[1], C * chunks_per_block(C, R)
    return max(0, end // width * width + end % width // R * R - offset)

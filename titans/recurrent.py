"""The definition, one token at a time: the form to read, and the form the others are measured against.

Differentiable by autograd. Slow, and its backward keeps a D x D state per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans.inner import inner_gradient, readout, target


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, b: Tensor | None,
    theta: Tensor, a: Tensor, eta: Tensor,
    M: Tensor, S: Tensor, anchor: Tensor, offset: Tensor,
    eps: float, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Equations (2)-(6) for a batch of sequences.

    Parameters
    ----------
    q, k, v : Tensor, shape (B, T, H, D)
    w, b : Tensor, shape (H, D), or both None
    theta, a, eta : Tensor, shape (B, T, H)
        Inner learning rate, 1 - alpha, momentum decay.
    M, S, anchor : Tensor, shape (B, H, D, D)
    offset : Tensor, shape (B,)
        Tokens already consumed of each running chunk.

    Returns
    -------
    o : Tensor, shape (B, T, H, D)
    M, S, anchor : Tensor, shape (B, H, D, D)
        The final state.
    """
    o = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t = (x[:, t, :, None, :] for x in (q, k, v))  # (B, H, 1, D)
        theta_t, a_t, eta_t = (x[:, t, :, None, None] for x in (theta, a, eta))  # (B, H, 1, 1)
        w_row, b_row = (None, None) if w is None or b is None else (w[:, None, :], b[:, None, :])  # (H, 1, D)

        u_t = inner_gradient(k_t @ anchor, target(k_t, v_t, w), w_row, b_row, eps)  # (2)
        S = eta_t * S - theta_t * (2 * k_t.mT @ u_t)  # (3)
        M = a_t * M + S  # (4)
        o.append(readout(q_t @ M, w_row, b_row, eps)[:, :, 0, :])  # (5)
        completes = (offset + t + 1) % chunk_size == 0
        anchor = torch.where(completes[:, None, None, None], M, anchor)  # (6)
    return torch.stack(o, 1) if o else q.clone(), M, S, anchor

"""The chunk form with its coefficients as ratios of cumulative products, as it is often written.

It is equation (7) of `titans/README.md`, and differentiable; but the products underflow within a chunk, and then it
divides by zero. Everything else is as in the backend `chunk`. Its gradients miss exact zeros: that of the first eta is
0 where there is no momentum to begin with, and the quotients leave a rounding error of it.
"""

from typing import Any

import torch
from torch import Tensor

from titans.inner import inner_gradient, readout, target


def ratios(x: Tensor) -> Tensor:
    """Return x_t / x_j for j <= t, else 0; shape (..., C, C)."""
    return (x[..., :, None] / x[..., None, :]).tril()


def chunk_titans_linear(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, b: Tensor | None, theta: Tensor, alpha: Tensor, eta: Tensor, *,
    eps: float, chunk_size: int, initial_state: Any, output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Run chunk by chunk on (B, T, H, D), from M alone."""
    B, T, H, D = q.shape
    M = q.new_zeros(B, H, D, D) if initial_state is None else getattr(initial_state, "M", initial_state)
    S = torch.zeros_like(M)
    w, b = (None if x is None else x[:, None] for x in (w, b))
    if not T:
        return q.clone(), M if output_final_state else None
    o = []
    for qc, kc, vc, *gates in zip(*(torch.split(x, chunk_size, 1) for x in (q, k, v, theta, alpha, eta)), strict=True):
        qc, kc, vc = (x.transpose(1, 2) for x in (qc, kc, vc))  # (B, H, C, D)
        th, al, et = (x.reshape(*x.shape[:3]).transpose(1, 2) for x in gates)  # (B, H, C)
        beta, m = (1 - al).cumprod(-1), et.cumprod(-1)
        n = ratios(m) * th[..., None, :]  # (B, H, C, C)
        G, f = ratios(beta) @ n, (ratios(beta) @ m[..., None])  # (B, H, C, C), (B, H, C, 1)
        u = inner_gradient(kc @ M, target(kc, vc, w), w, b, eps)
        y = beta[..., None] * (qc @ M) + f * (qc @ S) - 2 * (G * (qc @ kc.mT)) @ u
        o.append(readout(y, w, b, eps))
        learnt, moved = (kc.mT @ (x[..., -1, :, None] * u) for x in (G, n))
        M = beta[..., -1, None, None] * M + f[..., -1:, :] * S - 2 * learnt
        S = m[..., -1, None, None] * S - 2 * moved
    return torch.cat(o, 2).transpose(1, 2), M if output_final_state else None


# No momentum is passed on.
chunk_titans_linear.lacks = {"varlen", "resume", "log_gates", "half", "exact"}  # type: ignore[attr-defined]

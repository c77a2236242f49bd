"""The definition, one token at a time: the form to read, and the form the others are measured against.

Differentiable by autograd. Slow, and its backward keeps a D x D state per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans.arguments import Call, compute_dtype
from titans.gates import linear_gates
from titans.inner import inner_gradient, readout, target
from titans.validation import check_bounds


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


def copied(x: Tensor) -> Tensor:
    """Copy a tensor to contiguous memory of its own, which no result shares with an argument."""
    return x.clone(memory_format=torch.contiguous_format)


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition in the compute dtype: o, and the final M, S and anchor; packed sequences are run one by one."""
    dtype = compute_dtype(call.q.dtype)
    w, b = (None if x is None else x.to(dtype) for x in (call.w, call.b))
    theta, a, eta = linear_gates((call.theta.to(dtype), call.alpha.to(dtype), call.eta.to(dtype)), call.log_gates)
    offset = call.M.new_zeros(call.M.shape[0], dtype=torch.int64) if call.offset is None else call.offset

    def run(tokens: slice, n: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # copies: by strides and address a library chooses the order of its sums
        q, k, v = (copied(x[:, tokens].to(dtype)) for x in (call.q, call.k, call.v))
        gates = (x[:, tokens] for x in (theta, a, eta))
        states = (copied(x[n]) for x in (call.M, call.S, call.anchor, offset))
        return recurrent(q, k, v, w, b, *gates, *states, call.eps, call.chunk_size)  # type: ignore[call-arg, arg-type]

    if call.cu_seqlens is None:
        o, M, S, anchor = run(slice(None), slice(None))
    else:
        bounds = _bounds(call)
        runs = [run(slice(*bounds[n : n + 2]), slice(n, n + 1)) for n in range(len(bounds) - 1)]
        # the empty slice stands for no sequence at all
        runs.append(run(slice(0, 0), slice(0, 0)))
        o, M, S, anchor = (
            torch.cat(parts, dim) for parts, dim in zip(zip(*runs, strict=True), (1, 0, 0, 0), strict=True)
        )
    return o.to(call.q.dtype), M, S, anchor


def _bounds(call: Call) -> list[int]:
    assert call.cu_seqlens is not None
    T, N = call.q.shape[1], call.cu_seqlens.shape[0] - 1
    if call.cu_seqlens.is_meta:
        # no values, and all of them lead to the same shapes
        return [0] * N + [T]
    bounds = call.cu_seqlens.tolist()
    check_bounds(bounds, T)
    return bounds

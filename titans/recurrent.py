"""The definition, one token at a time: the form to read, and the form the others are measured against.

Differentiable by autograd. Slow, and its backward keeps a D x D state per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans.arguments import Call, compute_dtype
from titans.gates import Gates, linear_gates
from titans.inner import inner_gradient, readout, target
from titans.validation import check_bounds, has_values

NO_FULL_GRAPH = (
    "the definition reads `cu_seqlens` where it is compiled: call torch.compile without fullgraph=True, or call "
    'chunk_titans_linear with backend="chunk", which is one node of the graph'
)


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
    # where Dynamo compiles a call, the graph breaks here, and wrong bounds are refused; the flag and not the public
    # `is_exporting`, which Dynamo of torch 2.11 takes for true
    elif has_values(call.cu_seqlens) or (torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag):
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break(msg=NO_FULL_GRAPH)
        bounds = call.cu_seqlens.tolist()
        check_bounds(bounds, call.q.shape[1])
        runs = [run(slice(*bounds[n : n + 2]), slice(n, n + 1)) for n in range(len(bounds) - 1)]
        # the empty slice stands for no sequence at all
        runs.append(run(slice(0, 0), slice(0, 0)))
        o, M, S, anchor = (
            torch.cat(parts, dim) for parts, dim in zip(zip(*runs, strict=True), (1, 0, 0, 0), strict=True)
        )
    else:
        gates = theta, a, eta
        o, M, S, anchor = _packed(call, w, b, gates, call.M, call.S, call.anchor, offset)
    return o.to(call.q.dtype), M, S, anchor


def _packed(
    call: Call, w: Tensor | None, b: Tensor | None, gates: Gates, M: Tensor, S: Tensor, anchor: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed sequences whose bounds cannot be read: each token moves the state of the sequence that it belongs to."""
    assert call.cu_seqlens is not None
    cu_seqlens, T = call.cu_seqlens.to(M.device), call.q.shape[1]
    tokens, sequences = torch.arange(T, device=M.device), torch.arange(M.shape[0], device=M.device)
    owner = (cu_seqlens[1:, None] <= tokens).sum(0)  # (T,)
    place = offset[owner] + tokens - cu_seqlens[owner]
    o = [copied(call.q[:, :0].to(M.dtype))]
    for t in range(T):
        at, n = slice(t, t + 1), owner[t : t + 1]
        q, k, v = (copied(x[:, at].to(M.dtype)) for x in (call.q, call.k, call.v))
        theta, a, eta = (x[:, at] for x in gates)
        o_t, *moved = recurrent(
            q, k, v, w, b, theta, a, eta, M[n], S[n], anchor[n], place[at], call.eps, call.chunk_size
        )
        own = (sequences == n)[:, None, None, None]
        M, S, anchor = (torch.where(own, x, y) for x, y in zip(moved, (M, S, anchor), strict=True))
        o.append(o_t)
    return torch.cat(o, 1), copied(M), copied(S), copied(anchor)

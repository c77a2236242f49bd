"""The public functions: check the arguments, fill in the defaults, choose the backend."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from titans import recurrent, validation
from titans.arguments import Call, TitansState, compute_dtype
from titans.autograd import chunked, step
from titans.backend import Backend, choose
from titans.partition import final_offset


def chunk_titans_linear(
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
    initial_state: TitansState | Tensor | None = None,
    output_final_state: bool = False,
    *,
    cu_seqlens: Tensor | None = None,
    log_gates: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, TitansState | None]:
    """Titans linear memory, chunk by chunk.

    The memory M, with momentum S, learns inside the sequence to map keys to values; its inner gradient is taken
    at the memory as it was when the running chunk began. Equations (1)-(6) of ``titans/README.md``; with
    ``chunk_size=1``, equations 13-14 of arXiv 2501.00663.

    Parameters
    ----------
    q, k, v : Tensor, shape (B, T, H, D)
        Queries, keys, values: float32, float16 or bfloat16, computed in float32; or float64 (PyTorch backends).
    w, b : Tensor, shape (H, D), or both None
        Weight and bias of the inner LayerNorm; None: plain memory, without it.
    theta : Tensor, shape (B, T, H) or (B, T, H, 1)
        Inner learning rate, >= 0.
    alpha : Tensor, shape (B, T, H) or (B, T, H, 1)
        Forgetting, in [0, 1].
    eta : Tensor, shape (B, T, H) or (B, T, H, 1)
        Momentum decay, in [0, 1]. Gate values are not inspected: see `check_gates`.
    eps : float, default 1e-6
        Added to the variance, > 0. The inner gradient at M = 0 is scaled by 1/sqrt(eps): start from a learned or
        small random M where that is too much.
    chunk_size : int, default 16
        Tokens per chunk, C >= 1. Part of the model, not a tiling knob.
    initial_state : TitansState, or Tensor of shape (N, H, D, D), or None
        Where the sequences stand; a tensor is M alone, with S = 0, at the start of a chunk; None: M = S = 0.
        N is B, or the number of packed sequences.
    output_final_state : bool, default False
    cu_seqlens : Tensor, shape (N + 1,), int32 or int64, optional
        Bounds of sequences packed along T, from 0 to T; B must be 1. Empty sequences are allowed.
    log_gates : bool, default False
        `theta`, `alpha` and `eta` hold log theta, log(1 - alpha) and log eta; -inf is legal.
    backend : {"triton", "chunk", "log", "recurrent"}, optional
        None: "triton" on CUDA where it covers the call, else "chunk" for linear and "log" for log gates.

    Returns
    -------
    o : Tensor, shape (B, T, H, D)
        In the dtype of `q`.
    state : TitansState or None
        The final state, if `output_final_state`.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks a rule above; the message gives the argument, the rule and the value.
    """
    validation.check_options(eps, chunk_size, backend, output_final_state=output_final_state, log_gates=log_gates)
    validation.check_tokens(q, k, v, "(B, T, H, D)")
    validation.check_parameters(w, b, q)
    theta, alpha, eta = (
        validation.check_gate(name, gate, q, "(B, T, H)")
        for name, gate in (("theta", theta), ("alpha", alpha), ("eta", eta))
    )
    validation.check_cu_seqlens(cu_seqlens, q)
    N = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    validation.check_state("initial_state", initial_state, N, q, chunk_size)
    M, S, anchor, offset = _initial_state(initial_state, N, q)
    call = Call(q, k, v, w, b, theta, alpha, eta, M, S, anchor, offset, cu_seqlens, float(eps), chunk_size, log_gates)
    call = _follow_autocast(call)
    o, M, S, anchor = _run(call, _chosen(call, backend, "log" if log_gates else "chunk"))
    return o, TitansState(M, S, anchor, final_offset(call)) if output_final_state else None


def _chosen(call: Call, wanted: Backend | None, otherwise: Backend) -> Backend:
    backend, against = choose(call, wanted, otherwise)
    if backend == "triton" and against:
        raise ValueError(f"`backend` 'triton' {against}")
    return backend


def _run(call: Call, backend: Backend) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call the backend: o, and the final M, S and anchor."""
    _know_dtensor()
    if backend == "recurrent":
        with torch.autocast(call.q.device.type, enabled=False):
            return recurrent.forward(call)
    o, M, S, anchor, *_ = chunked(*call, backend)
    return o, M, S, anchor


def _know_dtensor() -> None:
    """Register the sharding rules once DTensor is in use."""
    if "torch.distributed.tensor" in sys.modules:
        from titans import sharding

        sharding.register()


def _follow_autocast(call: Call) -> Call:
    """As for attention: the operands of the products follow autocast; gates, parameters and states do not."""
    device = call.q.device.type
    if not torch.is_autocast_enabled(device) or call.q.dtype == torch.float64:
        return call
    dtype = torch.get_autocast_dtype(device)
    return call._replace(q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))


def titans_linear(*args: Any, **kwargs: Any) -> tuple[Tensor, TitansState | None]:
    """Titans linear memory, token by token: the definition, slow, differentiable any number of times.

    Takes the arguments of `chunk_titans_linear`, but for `backend`, and returns what it returns.
    """
    if "backend" in kwargs:
        raise TypeError(f"`titans_linear` takes no `backend`, got backend={kwargs['backend']!r}")
    return chunk_titans_linear(*args, **kwargs, backend="recurrent")


def titans_linear_step(
    q_t: Tensor,
    k_t: Tensor,
    v_t: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    theta_t: Tensor,
    alpha_t: Tensor,
    eta_t: Tensor,
    state: TitansState | Tensor | None,
    eps: float = 1e-6,
    chunk_size: int = 16,
    *,
    log_gates: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, TitansState]:
    """Decode one token of each of B sequences.

    Parameters
    ----------
    q_t, k_t, v_t : Tensor, shape (B, H, D)
    w, b : Tensor, shape (H, D), or both None
    theta_t, alpha_t, eta_t : Tensor, shape (B, H) or (B, H, 1)
    state : TitansState, or Tensor of shape (B, H, D, D), or None
        Where the sequences stand, each at its own offset; None: at their start, with M = S = 0.
    eps, chunk_size, log_gates
        As in `chunk_titans_linear`.
    backend : {"triton", "chunk", "log", "recurrent"}, optional
        None: "triton" on CUDA where it covers the call, else "recurrent".

    Returns
    -------
    o_t : Tensor, shape (B, H, D)
    state : TitansState

    Raises
    ------
    TypeError, ValueError
        As `chunk_titans_linear`.
    """
    validation.check_options(eps, chunk_size, backend, log_gates=log_gates)
    validation.check_tokens(q_t, k_t, v_t, "(B, H, D)", "_t")
    validation.check_parameters(w, b, q_t)
    theta_t, alpha_t, eta_t = (
        validation.check_gate(name, gate, q_t, "(B, H)")
        for name, gate in (("theta_t", theta_t), ("alpha_t", alpha_t), ("eta_t", eta_t))
    )
    validation.check_state("state", state, q_t.shape[0], q_t, chunk_size)
    q, k, v, theta, alpha, eta = (x.unsqueeze(1) for x in (q_t, k_t, v_t, theta_t, alpha_t, eta_t))
    M, S, anchor, offset = _initial_state(state, q_t.shape[0], q_t)
    call = Call(q, k, v, w, b, theta, alpha, eta, M, S, anchor, offset, None, float(eps), chunk_size, log_gates)
    call = _follow_autocast(call)
    backend = _chosen(call, backend, "recurrent")
    if backend == "triton":
        _know_dtensor()
        o, M, S, anchor, offset = step(*call)
    else:
        o, M, S, anchor = _run(call, backend)
        offset = final_offset(call)
    return o[:, 0], TitansState(M, S, anchor, offset)


def _initial_state(
    state: TitansState | Tensor | None, N: int, q: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """M, S, anchor and offset of the start; an offset of None stands for zeros."""
    dtype = compute_dtype(q.dtype)
    if isinstance(state, TitansState):
        return state.M, state.S, state.anchor, state.offset
    H, D = q.shape[-2:]
    M = q.new_zeros(N, H, D, D, dtype=dtype) if state is None else state.to(dtype)
    return M, torch.zeros_like(M), M, None

"""The public functions: check the arguments, fill in the defaults, choose the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titans import validation
from titans.arguments import Call, TitansState, compute_dtype
from titans.autograd import chunked, step
from titans.gates import linear_gates
from titans.recurrent import recurrent


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
    backend: str | None = None,
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
    o, M, S, anchor = _run(call, backend)
    return o, TitansState(M, S, anchor, _final_offset(call)) if output_final_state else None


def _run(call: Call, backend: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the backend and call it: o, and the final M, S and anchor."""
    call = _follow_autocast(call)
    backend = backend or _default_backend(call)
    _check_backend(call, backend)
    if backend == "recurrent":
        with torch.autocast(call.q.device.type, enabled=False):
            return _recurrent(call)
    o, M, S, anchor, *_ = chunked(*call, backend)
    return o, M, S, anchor


def _follow_autocast(call: Call) -> Call:
    """As for attention: the operands of the products follow autocast; gates, parameters and states do not."""
    device = call.q.device.type
    if not torch.is_autocast_enabled(device) or call.q.dtype == torch.float64:
        return call
    dtype = torch.get_autocast_dtype(device)
    return call._replace(q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))


def _check_backend(call: Call, backend: str) -> None:
    if backend == "triton" and (against := _reason_against_kernels(call)):
        raise ValueError(f"`backend` 'triton' {against}")


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
    backend: str | None = None,
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
    backend = backend or ("triton" if _kernels_take(call) else "recurrent")
    if backend == "triton":
        _check_backend(call, backend)
        o, M, S, anchor, offset = step(*call)
    else:
        o, M, S, anchor = _run(call, backend)
        offset = _final_offset(call)
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


def _final_offset(call: Call) -> Tensor:
    """Tokens consumed of the chunk that runs at the end, shape (N,)."""
    B, T = call.q.shape[:2]
    begun = call.offset
    if call.cu_seqlens is None:
        if begun is None:
            return torch.full((B,), T % call.chunk_size, dtype=torch.int64, device=call.q.device)
        return (begun + T) % call.chunk_size
    lengths = call.cu_seqlens.to(call.q.device).diff().long()
    return (lengths if begun is None else begun + lengths) % call.chunk_size


def _default_backend(call: Call) -> str:
    if _kernels_take(call):
        return "triton"
    return "log" if call.log_gates else "chunk"


def _kernels_take(call: Call) -> bool:
    return call.q.is_cuda and _reason_against_kernels(call) is None


def _reason_against_kernels(call: Call) -> str | None:
    try:
        from titans import kernels
    except ModuleNotFoundError:
        return "needs the package triton, which is not installed"
    return kernels.reason_against(call)


def _recurrent(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition in the compute dtype; packed sequences are run one by one."""
    dtype = compute_dtype(call.q.dtype)
    w, b = (None if x is None else x.to(dtype) for x in (call.w, call.b))
    theta, a, eta = linear_gates((call.theta.to(dtype), call.alpha.to(dtype), call.eta.to(dtype)), call.log_gates)
    offset = call.M.new_zeros(len(call.M), dtype=torch.int64) if call.offset is None else call.offset

    def run(tokens: slice, n: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = (x[:, tokens].to(dtype) for x in (call.q, call.k, call.v))
        gates = (x[:, tokens] for x in (theta, a, eta))
        states = (x[n] for x in (call.M, call.S, call.anchor, offset))
        return recurrent(q, k, v, w, b, *gates, *states, call.eps, call.chunk_size)  # type: ignore[call-arg, arg-type]

    if call.cu_seqlens is None:
        o, M, S, anchor = run(slice(None), slice(None))
    else:
        bounds = call.cu_seqlens.tolist()
        runs = [run(slice(*bounds[n : n + 2]), slice(n, n + 1)) for n in range(len(bounds) - 1)]
        # the empty slice stands for no sequence at all
        runs.append(run(slice(0, 0), slice(0, 0)))
        o, M, S, anchor = (
            torch.cat(parts, dim) for parts, dim in zip(zip(*runs, strict=True), (1, 0, 0, 0), strict=True)
        )
    return o.to(call.q.dtype), M, S, anchor

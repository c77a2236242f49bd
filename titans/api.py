"""The public functions: check the arguments, fill in the defaults, choose the backend."""

from __future__ import annotations

import sys
from typing import overload

import torch
from torch import Tensor

from titans import recurrent, validation
from titans.arguments import Call, TitansState, compute_dtype
from titans.autocast import follow_autocast, without_autocast
from titans.autograd import decode, step, unrecorded
from titans.backend import Backend, chosen
from titans.decoding import DecodeState, check_decode_state, check_not_recorded
from titans.partition import final_offset

InitialState = TitansState | tuple[Tensor, Tensor, Tensor, Tensor] | Tensor | None


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
    initial_state: InitialState = None,
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
        (B, H, T, D), the layout of attention, is taken for H tokens of T heads: see `check_layout`.
    w, b : Tensor, shape (H, D), or both None
        Weight and bias of the inner LayerNorm; None: plain memory, without it.
    theta : Tensor, shape (B, T, H) or (B, T, H, 1)
        Inner learning rate, >= 0.
    alpha : Tensor, shape (B, T, H) or (B, T, H, 1)
        Forgetting, in [0, 1].
    eta : Tensor, shape (B, T, H) or (B, T, H, 1)
        Momentum decay, in [0, 1]. Gate values are not inspected: see `check_gates`.
    eps : float, default 1e-6
        Added to the variance; > 0 and finite in the compute dtype. The inner gradient at M = 0 is scaled by
        1/sqrt(eps): start from a learned or small random M where that is too much.
    chunk_size : int, default 16
        Tokens per chunk, 1 <= C < 2**63. Part of the model, not a tiling knob.
    initial_state : TitansState, or Tensor of shape (N, H, D, D) or (H, D, D), or None
        Where the sequences stand: a state, or any tuple (M, S, anchor, offset). A tensor is M alone, with S = 0, at the
        start of a chunk; without N it is the same for all sequences. None: M = S = 0. Other float dtypes are converted.
        N is B, or the number of packed sequences. A `TitansState` must be continued with its own `chunk_size`.
    output_final_state : bool, default False
    cu_seqlens : Tensor, shape (N + 1,), int32 or int64, optional
        Bounds of sequences packed along T, from 0 to T; B must be 1. Empty sequences are allowed. The values are
        checked where they are on the CPU, and by the PyTorch backends, which read them.
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
    call = checked_call(
        q, k, v, w, b, theta, alpha, eta, eps, chunk_size, initial_state, output_final_state, cu_seqlens, log_gates,
        backend,
    )  # fmt: skip
    o, M, S, anchor = run(call, backend)
    return o, TitansState(M, S, anchor, final_offset(call), call.chunk_size) if output_final_state else None


def checked_call(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, b: Tensor | None, theta: Tensor, alpha: Tensor, eta: Tensor,
    eps: float, chunk_size: int, initial_state: InitialState, output_final_state: bool, cu_seqlens: Tensor | None,
    log_gates: bool, backend: Backend | None,
) -> Call:  # fmt: skip
    """Check the arguments of `chunk_titans_linear` and fill in the defaults."""
    q, k, v = follow_autocast(q, k, v)
    validation.check_tokens(q, k, v, "(B, T, H, D)")
    flags = {"output_final_state": output_final_state, "log_gates": log_gates}
    eps, chunk_size = validation.check_options(eps, chunk_size, backend, q, **flags)
    validation.check_parameters(w, b, q)
    w, b = _widened(w, q), _widened(b, q)
    theta, alpha, eta = (
        validation.check_gate(name, gate, q, "(B, T, H)")
        for name, gate in (("theta", theta), ("alpha", alpha), ("eta", eta))
    )
    validation.check_cu_seqlens(cu_seqlens, q)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    validation.check_state("initial_state", initial_state, N, q, chunk_size)
    M, S, anchor, offset = _initial_state(initial_state, N, q)
    return Call(q, k, v, w, b, theta, alpha, eta, M, S, anchor, offset, cu_seqlens, eps, chunk_size, log_gates)


def run(call: Call, backend: Backend | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a checked call: o, and the final M, S and anchor."""
    return _run(call, chosen(call, backend, "log" if call.log_gates else "chunk"))


def decode_token(call: Call, state: DecodeState, backend: Backend | None) -> Tensor:
    """Run a checked call of one token, whatever its state: o, (B, 1, H, D); moves `state`, in place."""
    backend = chosen(call, backend, "recurrent")
    call = call._replace(M=None, S=None, anchor=None)  # type: ignore[arg-type]
    given = (x for name, x in call._asdict().items() if name not in ("M", "S", "anchor", "offset", "cu_seqlens"))
    return decode(*given, *state, backend == "triton")  # type: ignore[no-any-return]


def _run(call: Call, backend: Backend) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call the backend: o, and the final M, S and anchor."""
    _know_dtensor()
    if backend == "recurrent":
        with without_autocast(call.q):
            return recurrent.forward(call)
    return unrecorded(*call, backend)  # type: ignore[no-any-return]


def _know_dtensor() -> None:
    """Register the sharding rules once DTensor is in use."""
    if "torch.distributed.tensor" in sys.modules:
        from titans import sharding

        sharding.register()


# `torch.compiler.assume_constant_result`, by the one line of it that does not import all of Dynamo: a compiled call
# registers the rules while it is traced
_know_dtensor._dynamo_marked_constant = True  # type: ignore[attr-defined]


def titans_linear(
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
    output_final_state: bool = False,
    *,
    cu_seqlens: Tensor | None = None,
    log_gates: bool = False,
) -> tuple[Tensor, TitansState | None]:
    """Titans linear memory, token by token: the definition, slow, differentiable any number of times.

    Takes the arguments of `chunk_titans_linear`, but for `backend`, and returns what it returns.
    """
    return chunk_titans_linear(
        q, k, v, w, b, theta, alpha, eta, eps, chunk_size, initial_state, output_final_state,
        cu_seqlens=cu_seqlens, log_gates=log_gates, backend="recurrent",
    )  # fmt: skip


@overload
def titans_linear_step(
    q_t: Tensor, k_t: Tensor, v_t: Tensor, w: Tensor | None, b: Tensor | None,
    theta_t: Tensor, alpha_t: Tensor, eta_t: Tensor, state: DecodeState, eps: float = ..., chunk_size: int = ...,
    *, log_gates: bool = ..., backend: Backend | None = ..., in_place: bool = ...,
) -> tuple[Tensor, DecodeState]: ...  # fmt: skip


@overload
def titans_linear_step(
    q_t: Tensor, k_t: Tensor, v_t: Tensor, w: Tensor | None, b: Tensor | None,
    theta_t: Tensor, alpha_t: Tensor, eta_t: Tensor, state: InitialState, eps: float = ..., chunk_size: int = ...,
    *, log_gates: bool = ..., backend: Backend | None = ..., in_place: bool = ...,
) -> tuple[Tensor, TitansState]: ...  # fmt: skip


def titans_linear_step(
    q_t: Tensor,
    k_t: Tensor,
    v_t: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    theta_t: Tensor,
    alpha_t: Tensor,
    eta_t: Tensor,
    state: InitialState | DecodeState,
    eps: float = 1e-6,
    chunk_size: int = 16,
    *,
    log_gates: bool = False,
    backend: Backend | None = None,
    in_place: bool = False,
) -> tuple[Tensor, TitansState | DecodeState]:
    """Decode one token of each of B sequences.

    Parameters
    ----------
    q_t, k_t, v_t : Tensor, shape (B, H, D)
    w, b : Tensor, shape (H, D), or both None
    theta_t, alpha_t, eta_t : Tensor, shape (B, H) or (B, H, 1)
    state : TitansState, or Tensor of shape (B, H, D, D) or (H, D, D), or None; or DecodeState
        As `initial_state` of `chunk_titans_linear`, each sequence at its own offset. A `DecodeState` makes a step read
        and write less, but has no derivative.
    eps, chunk_size, log_gates
        As in `chunk_titans_linear`.
    backend : {"triton", "chunk", "log", "recurrent"}, optional
        None: "triton" on CUDA where it covers the call, else "recurrent". With a `DecodeState` the PyTorch backends are
        one.
    in_place : bool, default False
        Move a `DecodeState` itself, in one launch, as a CUDA graph needs it; else a copy of it is moved.

    Returns
    -------
    o_t : Tensor, shape (B, H, D)
    state : TitansState, or DecodeState if such a state was given

    Raises
    ------
    TypeError, ValueError
        As `chunk_titans_linear`.
    """
    q_t, k_t, v_t = follow_autocast(q_t, k_t, v_t)
    validation.check_tokens(q_t, k_t, v_t, "(B, H, D)", "_t")
    eps, chunk_size = validation.check_options(eps, chunk_size, backend, q_t, log_gates=log_gates, in_place=in_place)
    validation.check_parameters(w, b, q_t)
    w, b = _widened(w, q_t), _widened(b, q_t)
    theta_t, alpha_t, eta_t = (
        validation.check_gate(name, gate, q_t, "(B, H)")
        for name, gate in (("theta_t", theta_t), ("alpha_t", alpha_t), ("eta_t", eta_t))
    )
    q, k, v, theta, alpha, eta = (x.unsqueeze(1) for x in (q_t, k_t, v_t, theta_t, alpha_t, eta_t))
    if isinstance(state, DecodeState):
        check_decode_state("state", state, q_t, chunk_size, in_place)
        M, S, anchor = state.M, state.S, state.anchor
        call = Call(q, k, v, w, b, theta, alpha, eta, M, S, anchor, None, None, eps, chunk_size, log_gates)
        check_not_recorded("state", (*call.differentiable, *state))
        state = state if in_place else state.clone()
        return decode_token(call, state, backend)[:, 0], state
    if in_place:
        raise TypeError(f"`in_place` needs a DecodeState as `state`, got {type(state).__name__}")
    validation.check_state("state", state, q_t.shape[0], q_t, chunk_size)
    M, S, anchor, offset = _initial_state(state, q_t.shape[0], q_t)
    call = Call(q, k, v, w, b, theta, alpha, eta, M, S, anchor, offset, None, eps, chunk_size, log_gates)
    backend = chosen(call, backend, "recurrent")
    if backend == "triton":
        _know_dtensor()
        o, M, S, anchor, offset = step(*call)
    else:
        o, M, S, anchor = _run(call, backend)
        offset = final_offset(call)
    return o[:, 0], TitansState(M, S, anchor, offset, chunk_size)


def _widened(x: Tensor | None, q: Tensor) -> Tensor | None:
    """w or b in a dtype that holds those of q, too.

    Triton lays a product out by the narrowest dtype that its operands come from, and so its bits would depend on it.
    """
    return None if x is None else x.to(torch.promote_types(x.dtype, q.dtype))


def _initial_state(state: InitialState, N: int, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """M, S, anchor and offset of the start, in the compute dtype; an offset of None stands for zeros."""
    dtype, (H, D) = compute_dtype(q.dtype), q.shape[-2:]
    if isinstance(state, tuple):
        M, S, anchor, offset = state
        if not M.dtype == S.dtype == anchor.dtype == dtype:
            M, S, anchor = M.to(dtype), S.to(dtype), anchor.to(dtype)
        return M, S, anchor, offset
    if state is None:
        zeros = q.new_zeros(N, H, D, D, dtype=dtype)
        return zeros, zeros, zeros, None
    M = state if state.dtype == dtype else state.to(dtype)
    M = M if M.ndim == 4 else M.expand(N, H, D, D)
    return M, torch.zeros_like(M), M, None

"""One token in one launch, for decoding: the definition itself, in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans.arguments import Call
from titans.kernels.device import inner_gradient, linear_gates, load_square, load_width, norm, store_square


@triton.jit
def times(x, square):
    """x square for a row x (1, BD): full float32, without tensor cores, which a single row would leave idle."""
    return tl.expand_dims(tl.sum(tl.trans(x) * square, 0), 0)


@triton.jit(do_not_specialize=["H", "C"])
def step_kernel(
    q, k, v, w, b, theta, alpha, eta,  # (N, H, D) thrice, (H, D) twice, (N, H) thrice
    M_in, S_in, anchor_in, offset,  # (N, H, D, D) thrice, (N,)
    o, M_out, S_out, anchor_out, offset_out,  # out: (N, H, D), (N, H, D, D) thrice, (N,)
    H, C, eps,
    D: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr, LOG: tl.constexpr, RESUMED: tl.constexpr,
):  # fmt: skip
    """Eq. (2)-(6): u = u(k A);  S <- eta S - 2 theta k^T u;  M <- a M + S;  o from q M;  A <- M at the end of a chunk.

    Grid: (N H,).
    Reads: the token, the state.
    Writes: o, the state after it.
    """
    pid = tl.program_id(0)
    n_seq, h = pid // H, pid % H
    pid = pid.to(tl.int64)
    r = tl.load(offset + n_seq).to(tl.int32) if RESUMED else pid.to(tl.int32) * 0
    theta_, a, eta_ = linear_gates(tl.load(theta + pid), tl.load(alpha + pid), tl.load(eta + pid), LOG)
    q_ = load_width(q, pid, D, BD)
    k_ = load_width(k, pid, D, BD)
    target = load_width(v, pid, D, BD)
    w_ = load_width(w, h, D, BD) if NORM else 1.0
    b_ = load_width(b, h, D, BD) if NORM else 0.0

    A = load_square(anchor_in, pid, D, BD, tl.float32)
    y_k = times(k_, A)
    if NORM:
        x, r_norm = norm(y_k, eps, D, BD)
        u, _, _ = inner_gradient(x, r_norm, target - k_, w_, b_, D, BD)
    else:
        u = y_k - target
    S = eta_ * load_square(S_in, pid, D, BD, tl.float32) - theta_ * (2 * tl.trans(k_) * u)
    store_square(S_out, S, pid, D, BD)
    M = a * load_square(M_in, pid, D, BD, tl.float32) + S
    store_square(M_out, M, pid, D, BD)
    store_square(anchor_out, tl.where((r + 1) % C == 0, M, A), pid, D, BD)
    y = times(q_, M)
    if NORM:
        x, _ = norm(y, eps, D, BD)
        y += x * w_ + b_
    offs_d = tl.arange(0, BD)[None, :]
    tl.store(o + pid * D + offs_d, y.to(o.dtype.element_ty), mask=offs_d < D)
    if h == 0:
        tl.store(offset_out + n_seq, (r + 1) % C)


def step(call: Call) -> tuple[Tensor, ...]:
    """Decode the only token of every sequence: o, and the state after it."""
    N, _, H, D = call.q.shape
    offset = call.M.new_empty(N, dtype=torch.int64) if call.offset is None else torch.empty_like(call.offset)
    outputs = (torch.empty_like(call.q), *(torch.empty_like(call.M) for _ in range(3)), offset)
    BD = triton.next_power_of_2(D)
    if N * H:
        step_kernel[(N * H,)](
            *call[:12], *outputs, H, call.chunk_size, call.eps,
            D=D, BD=BD, NORM=call.w is not None, LOG=call.log_gates, RESUMED=call.offset is not None,
            num_warps=4 if BD <= 64 else 8, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return outputs

"""One token in one launch, for decoding: the definition itself, in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans.arguments import Call
from titans.kernels.coefficients import linear_gates
from titans.kernels.inner import inner_gradient, norm
from titans.kernels.launcher import Launcher, types_of
from titans.kernels.memory import load_affine, load_square, load_width, store_square, store_width
from titans.kernels.tile import Affine, State, step_tile


@triton.jit
def times(x, square):
    """x square for a row x (1, BD): full float32, without tensor cores, which a single row would leave idle."""
    return tl.expand_dims(tl.sum(tl.trans(x) * square, 0), 0)


@triton.jit(do_not_specialize=["H", "C"])
def step_kernel(
    q_ptr, k_ptr, v_ptr,  # (N, H, D)
    affine,
    theta_ptr, alpha_ptr, eta_ptr,  # (N, H)
    initial,
    offset_ptr,  # (N,)
    o_ptr,  # out: (N, H, D)
    final,  # out
    offset_out_ptr,  # out: (N,)
    H, C, eps, tile: tl.constexpr,
):  # fmt: skip
    """Eq. (2)-(6): u = u(k A);  S <- eta S - 2 theta k^T u;  M <- a M + S;  o from q M;  A <- M at the end of a chunk.

    Grid: (N H,).
    Reads: the token, the state.
    Writes: o, the state after it.
    """
    pid = tl.program_id(0)
    n_seq, h = pid // H, pid % H
    pid = pid.to(tl.int64)
    offset = tl.load(offset_ptr + n_seq).to(tl.int32) if tile.RESUMED else pid.to(tl.int32) * 0
    theta, a, eta = linear_gates(tl.load(theta_ptr + pid), tl.load(alpha_ptr + pid), tl.load(eta_ptr + pid), tile)
    q = load_width(q_ptr, pid, tile)
    k = load_width(k_ptr, pid, tile)
    target = load_width(v_ptr, pid, tile)
    w, b = load_affine(affine, h, tile)

    A = load_square(initial.anchor, pid, tile, tl.float32)
    y_k = times(k, A)
    if tile.NORM:
        x, r = norm(y_k, eps, tile)
        u, _, _ = inner_gradient(x, r, target - k, w, b, tile)
    else:
        u = y_k - target
    S = eta * load_square(initial.S, pid, tile, tl.float32) - theta * (2 * tl.trans(k) * u)
    store_square(final.S, S, pid, tile)
    M = a * load_square(initial.M, pid, tile, tl.float32) + S
    store_square(final.M, M, pid, tile)
    store_square(final.anchor, tl.where((offset + 1) % C == 0, M, A), pid, tile)
    y = times(q, M)
    if tile.NORM:
        x, _ = norm(y, eps, tile)
        y += x * w + b
    store_width(o_ptr, y, pid, tile)
    if h == 0:
        tl.store(offset_out_ptr + n_seq, (offset + 1) % C)


run_step = Launcher(step_kernel)


def step(call: Call) -> tuple[Tensor, ...]:
    """Decode the only token of every sequence: o, and the state after it."""
    N, _, H, _ = call.q.shape
    offset = call.M.new_empty(N, dtype=torch.int64) if call.offset is None else torch.empty_like(call.offset)
    o, final, tile = torch.empty_like(call.q), State(*(torch.empty_like(call.M) for _ in range(3))), step_tile(call)
    if N * H:
        run_step(
            N * H,
            (call.q.device, tile, types_of(call.tensors)),
            q_ptr=call.q,
            k_ptr=call.k,
            v_ptr=call.v,
            affine=Affine(call.w, call.b),
            theta_ptr=call.theta,
            alpha_ptr=call.alpha,
            eta_ptr=call.eta,
            initial=State(call.M, call.S, call.anchor),
            offset_ptr=call.offset,
            o_ptr=o,
            final=final,
            offset_out_ptr=offset,
            H=H,
            C=call.chunk_size,
            eps=call.eps,
            tile=tile,
            num_warps=4 if call.q.shape[-1] <= 64 else 8,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return o, *final, offset

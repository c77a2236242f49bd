"""The chunk form in Triton: the launches, stage by stage."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from titans.arguments import Call
from titans.kernels.coefficients import coefficients_kernel, coefficients_vjp_kernel
from titans.kernels.keys import anchor_vjp_kernel, key_vjp_kernel
from titans.kernels.output import output_kernel, output_vjp_kernel
from titans.kernels.state import state_kernel, state_vjp_kernel
from titans.kernels.tile import Layout, layout_of, max_slots, places, sizes, stages, storage, tiles

__all__ = ["backward", "forward", "kept", "max_slots", "reason_against", "storage"]

INTERPRETED = triton.knobs.runtime.interpret
LARGEST = 128
# inside a block of 64 tokens, offsets are 32 bits wide
WIDEST = 2**31 // 64


def reason_against(call: Call) -> str | None:
    """Why the kernels cannot take this call, as the end of an error message; None if they can."""
    q, D = call.q, call.q.shape[-1]
    if q.dtype == torch.float64:
        return "takes float32, float16 or bfloat16, got `q` in float64"
    if D > LARGEST:
        return f"takes D <= {LARGEST}, got D = {D}"
    if call.chunk_size > LARGEST:
        return f"takes `chunk_size` <= {LARGEST}, got {call.chunk_size}"
    if call.q.shape[2] * D >= WIDEST:
        return f"takes H * D < {WIDEST}, got {call.q.shape[2] * D}"
    if INTERPRETED:
        return "cannot interpret bfloat16, got `q` in bfloat16" if q.dtype == torch.bfloat16 else None
    if q.device.type != "cuda":
        return f"takes CUDA tensors (or TRITON_INTERPRET=1), got `q` on {q.device}"
    return None


class _Coefficients(NamedTuple):
    """What `coefficients_kernel` writes; float32."""

    rows: Tensor  # (K, H, 2, BC)
    G: Tensor  # (K, H, BC, BC)
    block_ends: Tensor  # (K, H, 2, BC)
    block_end: Tensor  # (K, H, 3)
    ends: Tensor  # (K, H, 2, BC)
    end: Tensor  # (K, H, PER, 3)


def _coefficients(call: Call, layout: Layout) -> _Coefficients:
    K, H, BC = layout.slots, call.q.shape[2], layout.BC
    per_block = tuple(call.M.new_empty(K, H, *s) for s in ((2, BC), (BC, BC), (2, BC), (3,)))
    per_chunk = per_block[2:]
    if layout.PER > 1:
        per_chunk = tuple(call.M.new_empty(K, H, *s) for s in ((2, BC), (layout.PER, 3)))
    c = _Coefficients(*per_block, *per_chunk)
    coefficients_kernel[(K * H,)](
        call.theta, call.alpha, call.eta, *places(call, layout), *c, **sizes(call, layout), LOG=call.log_gates,
        num_warps=1,
    )  # fmt: skip
    return c


def kept(call: Call) -> tuple[Tensor, Tensor]:
    """Room for what the backward needs of the inner gradients beside v and k: x of eq. (2), and r."""
    return torch.empty_like(call.q, dtype=storage(call)), call.M.new_empty(0 if call.w is None else call.q.shape[:3])


def forward(call: Call) -> tuple[Tensor, ...]:
    """The op: o, the final M, S and anchor, and for the backward the M0 and S0 of every block, x and r."""
    layout = layout_of(call)
    (N, H, D, _), K = call.M.shape, layout.slots
    o, (x, r) = torch.empty_like(call.q), kept(call)
    # slots that no block uses are defined all the same
    all_used = layout.NB == 1 and call.cu_seqlens is None and call.offset is None
    new = x.new_empty if all_used else x.new_zeros
    M0, S0 = new(K, H, D, D), new(K, H, D, D)
    M, S, anchor = (torch.empty_like(call.M) for _ in range(3))
    if K * H == 0:
        return o, call.M.clone(), call.S.clone(), call.anchor.clone(), M0, S0, x, r
    at, c = places(call, layout), _coefficients(call, layout)
    tile, flat = tiles(call, layout), tiles(call, layout, square=False)
    state_kernel[(N * H,)](
        call.k, call.v, call.w, call.b, c.ends, c.end, call.M, call.S, call.anchor, *at[:2],
        M0, S0, x, r, M, S, anchor, **tile, BS=layout.BS, STAGES=stages(layout), eps=call.eps,
    )  # fmt: skip
    output_kernel[(K * H,)](
        call.q, call.k, call.v, call.w, call.b, c.rows, c.G, M0, S0, x, r, *at, o, **flat, eps=call.eps,
    )  # fmt: skip
    return o, M, S, anchor, M0, S0, x, r


def backward(
    call: Call, M0: Tensor, S0: Tensor, x: Tensor, r: Tensor, do: Tensor, dM: Tensor, dS: Tensor, danchor: Tensor
) -> tuple[Tensor | None, ...]:
    """Cotangents of q, k, v, w, b, theta, alpha, eta and of the initial M, S and anchor."""
    layout = layout_of(call)
    (N, H, D, _), K = call.M.shape, layout.slots
    if K * H == 0:
        zeros = [None if given is None else torch.zeros_like(given) for given in call[:8]]
        return *zeros, dM.clone(), dS.clone(), danchor.clone()
    at, c = places(call, layout), _coefficients(call, layout)
    tile, flat = tiles(call, layout), tiles(call, layout, square=False)
    du, dk_part = (torch.empty_like(x) for _ in range(2))
    means = dM.new_empty(*call.q.shape[:3], 2)
    dq, drows = torch.empty_like(call.q), torch.empty_like(c.rows)
    # only chunks that share a block need G once more
    dG = c.G if layout.PER == 1 else torch.empty_like(c.G)
    dM0, dS0 = torch.empty_like(M0), torch.empty_like(S0)
    # slots that no block uses stay zero; they are summed with the others
    dwb = dM.new_zeros(2, K, H, D)
    output_vjp_kernel[(K * H,)](
        call.q, call.k, call.v, call.w, call.b, c.rows, c.G, M0, S0, x, r, *at, do,
        dG, means, dq, du, dk_part, dM0, dS0, drows, *dwb, **flat, eps=call.eps,
    )  # fmt: skip
    dM_L, dS_L = (dM0, dS0) if layout.PER == 1 else (torch.empty_like(M0), torch.empty_like(S0))
    dM_in, dS_in, danchor_in = (torch.empty_like(call.M) for _ in range(3))
    state_vjp_kernel[(N * H,)](
        call.k, call.v, call.w, call.b, c.ends, c.end, x, r, means, *at[:2], dM, dS, danchor,
        du, dM0, dS0, dM_L, dS_L, dM_in, dS_in, danchor_in, **tile, BS=layout.BS, STAGES=stages(layout),
    )  # fmt: skip
    del dM0, dS0
    dk, dv = (part if part.dtype == call.k.dtype else torch.empty_like(call.k) for part in (dk_part, du))
    shared = layout.PER > 1
    dy_k = torch.empty_like(x) if shared else None
    dends, dend = torch.empty_like(c.block_ends), torch.empty_like(c.block_end)
    key_vjp_kernel[(K * H,)](
        call.k, call.v, call.w, call.b, c.block_ends, call.anchor, *at, M0, S0, x, r, means,
        dM_L, dS_L, du, dk_part, dk_part if shared else dk, dv, dy_k, *dwb, dends, dend, **tile,
    )  # fmt: skip
    # of the rows that keys read; where no chunks share a block there are none, and nobody looks
    drows_k, dG_k = drows, dG
    if shared:
        drows_k, dG_k = torch.empty_like(drows), torch.empty_like(dG)
        anchor_vjp_kernel[(K * H,)](
            call.k, call.v, call.w, call.b, c.rows, c.G, *at, M0, S0, x, r, danchor, dy_k, dk_part, dk, drows_k, dG_k,
            **tile,
        )  # fmt: skip
    # make room for what the next kernel needs
    del dM_L, dS_L, dy_k
    dtheta, dalpha, deta = (torch.empty_like(gate) for gate in (call.theta, call.alpha, call.eta))
    coefficients_vjp_kernel[(K * H,)](
        call.theta, call.alpha, call.eta, *at, drows, dG, drows_k, dG_k, dends, dend, torch.empty_like(dG),
        dtheta, dalpha, deta, **sizes(call, layout), LOG=call.log_gates, num_warps=1,
    )  # fmt: skip
    dw, db = (None, None) if call.w is None else dwb.sum(1)
    return dq, dk, dv, dw, db, dtheta, dalpha, deta, dM_in, dS_in, danchor_in

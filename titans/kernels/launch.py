"""The launches of the kernels, one function to a stage."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titans.arguments import Call
from titans.kernels import hopper
from titans.kernels.coefficients import coefficients_kernel, coefficients_vjp_kernel
from titans.kernels.fit import least, needs_of, shared_memory, steps_in_flight
from titans.kernels.output import output_kernel, output_vjp_kernel
from titans.kernels.state import state_kernel
from titans.kernels.state_vjp import anchor_vjp_kernel, key_vjp_kernel, state_vjp_kernel
from titans.kernels.tile import (
    INTERPRETED,
    Affine,
    BlockState,
    Coefficients,
    End,
    Rows,
    Saved,
    State,
    Tile,
    Where,
    block_rows,
    gates_tile,
    storage,
    tile_of,
    where_of,
)
from titans.partition import LARGEST, Layout, layout_of, step_rows

# inside a block of 64 tokens, offsets are 32 bits wide
WIDEST = 2**31 // 64
FARTHEST = 2**31


def reason_against(call: Call) -> str | None:
    """Why the kernels cannot take this call, as the end of an error message; None if they can."""
    q, D = call.q, call.q.shape[-1]
    if q.dtype == torch.float64:
        return "takes float32, float16 or bfloat16, got `q` in float64"
    if D > LARGEST:
        return f"takes D <= {LARGEST}, got D = {D}"
    # positions are counted from the start of the chunk in which a sequence resumes
    if q.shape[1] + 2 * call.chunk_size >= FARTHEST:
        return f"takes T + 2 `chunk_size` < {FARTHEST}, got {q.shape[1]} + 2 * {call.chunk_size}"
    if call.q.shape[2] * D >= WIDEST:
        return f"takes H * D < {WIDEST}, got {call.q.shape[2] * D}"
    # of both directions: a forward without its backward would fail too late
    needed, shared = least(needs_of(q, step_rows(call.chunk_size, block_rows(q)))), shared_memory(q.device)
    if needed > shared:
        return f"takes a GPU with {needed} bytes of shared memory for D = {D}, got {shared}"
    if INTERPRETED:
        return "cannot interpret bfloat16, got `q` in bfloat16" if q.dtype == torch.bfloat16 else None
    if q.device.type != "cuda":
        return f"takes CUDA tensors (or TRITON_INTERPRET=1), got `q` on {q.device}"
    return None


@dataclass(frozen=True)
class Plan:
    """What the launches of a call share."""

    call: Call
    layout: Layout
    tile: Tile
    where: Where

    @property
    def blocks(self) -> tuple[int]:
        """The grid of the parallel kernels."""
        return (self.layout.slots * self.call.q.shape[2],)

    @property
    def chains(self) -> tuple[int]:
        """The grid of the chain."""
        N, H = self.call.M.shape[:2]
        return (N * H,)

    @property
    def common(self) -> dict[str, Any]:
        """Arguments of every kernel."""
        _, T, H, _ = self.call.q.shape
        return {
            "where": self.where, "T": T, "H": H, "C": self.call.chunk_size, "tile": self.tile,
            "num_stages": 1, "enable_fp_fusion": True,
        }  # fmt: skip

    @property
    def flat(self) -> dict[str, Any]:
        """Arguments of the kernels that work on (BC, BD) tiles."""
        return {**self.common, "num_warps": 4 if self.call.q.dtype == torch.bfloat16 else 8}

    @property
    def gates(self) -> dict[str, Any]:
        """Arguments of the kernels of `coefficients`, one warp each."""
        return {**self.common, "tile": gates_tile(self.call, self.layout), "num_warps": 1}

    @property
    def square(self) -> dict[str, Any]:
        """Arguments of the kernels that work on (BD, BD) tiles, which take more warps."""
        few = self.call.q.dtype == torch.bfloat16 and self.call.q.shape[-1] <= 64
        return {**self.common, "num_warps": 4 if few else 8}


def plan_of(call: Call) -> Plan:
    """Prepare the launches of a call."""
    layout = layout_of(call, block_rows(call.q))
    return Plan(call, layout, tile_of(call, layout), where_of(call, layout))


def stages(plan: Plan) -> int:
    """How many steps are in flight along the chain."""
    q = plan.call.q
    return steps_in_flight(needs_of(q, plan.layout.BS), shared_memory(q.device))


def coefficients(plan: Plan) -> Coefficients:
    """Eq. (7)."""
    call, layout = plan.call, plan.layout
    K, H, BC, PER = layout.slots, call.q.shape[2], layout.BC, layout.PER
    new = functools.partial(call.M.new_empty, K, H)
    rows, block_end = Rows(new(2, BC), new(BC, BC)), End(new(2, BC), new(3))
    # where steps are blocks, so are their ends
    c = Coefficients(rows, block_end, block_end if PER == 1 else End(new(2, BC), new(PER, 3)))
    coefficients_kernel[plan.blocks](
        theta_ptr=call.theta, alpha_ptr=call.alpha, eta_ptr=call.eta, rows=c.rows, block_end=c.block_end,
        step_end=c.step_end, **plan.gates,
    )  # fmt: skip
    return c


def state(plan: Plan, step_end: End, saved: Saved) -> State:
    """Eq. (8)-(10): the final state; writes `saved`."""
    call = plan.call
    final = State(*(torch.empty_like(call.M) for _ in range(3)))
    if hopper.stages_of(call).state:
        # Gluon is experimental: it is imported where it is used
        from titans.kernels.hopper.state import launch_state

        launch_state(call, plan.where, plan.tile, step_end, saved, final)
        return final
    state_kernel[plan.chains](
        k_ptr=call.k, v_ptr=call.v, affine=Affine(call.w, call.b), step_end=step_end,
        initial=State(call.M, call.S, call.anchor), saved=saved, final=final, eps=call.eps,
        STAGES=stages(plan), **plan.square,
    )  # fmt: skip
    return final


def output(plan: Plan, rows: Rows, saved: Saved) -> Tensor:
    """Eq. (11) and (5): o."""
    call = plan.call
    o = torch.empty_like(call.q)
    output_kernel[plan.blocks](
        q_ptr=call.q, k_ptr=call.k, v_ptr=call.v, affine=Affine(call.w, call.b), rows=rows, saved=saved,
        o_ptr=o, eps=call.eps, **plan.flat,
    )  # fmt: skip
    return o


def kept(call: Call) -> tuple[Tensor, Tensor]:
    """Room for what the backward needs of the inner gradients beside v and k: x of eq. (2), and r."""
    return torch.empty_like(call.q, dtype=storage(call)), call.M.new_empty(0 if call.w is None else call.q.shape[:3])


def forward(call: Call) -> tuple[Tensor, ...]:
    """The op: o, the final M, S and anchor, and for the backward the M0 and S0 of every block, x and r."""
    plan = plan_of(call)
    (_, H, D, _), K = call.M.shape, plan.layout.slots
    x, r = kept(call)
    # slots that no block uses are defined all the same
    all_used = plan.layout.NB == 1 and call.cu_seqlens is None and call.offset is None
    new = x.new_empty if all_used else x.new_zeros
    saved = Saved(new(K, H, D, D), new(K, H, D, D), x, r)
    if K * H == 0:
        return torch.empty_like(call.q), call.M.clone(), call.S.clone(), call.anchor.clone(), *saved[:4]
    c = coefficients(plan)
    final = state(plan, c.step_end, saved)
    return output(plan, c.rows, saved), *final, *saved[:4]


def output_vjp(
    plan: Plan, rows: Rows, saved: Saved, do: Tensor, daffine: Affine
) -> tuple[Rows, Tensor, Tensor, Tensor, BlockState]:
    """Eq. (14): cotangents of the rows, dq, and the parts of du, dk, and of M0 and S0; writes `daffine`."""
    call = plan.call
    # only chunks that share a block need G once more
    dG = rows.G if plan.layout.PER == 1 else torch.empty_like(rows.G)
    drows = Rows(torch.empty_like(rows.beta_f), dG)
    dq, du, dk = torch.empty_like(call.q), torch.empty_like(saved.x), torch.empty_like(saved.x)
    dstate0 = BlockState(torch.empty_like(saved.M0), torch.empty_like(saved.S0))
    output_vjp_kernel[plan.blocks](
        q_ptr=call.q, k_ptr=call.k, v_ptr=call.v, affine=Affine(call.w, call.b), rows=rows, saved=saved,
        do_ptr=do, drows=drows, dq_ptr=dq, du_ptr=du, dk_ptr=dk, dstate0=dstate0, daffine=daffine,
        eps=call.eps, **plan.flat,
    )  # fmt: skip
    return drows, dq, du, dk, dstate0


def state_vjp(
    plan: Plan, step_end: End, saved: Saved, dfinal: State, du: Tensor, dstate0: BlockState
) -> tuple[BlockState, State]:
    """Eq. (15), (17), (18): cotangents of M and S after each block, and of the initial state; completes `du`."""
    call = plan.call
    dstate_L = dstate0 if plan.layout.PER == 1 else BlockState(*(torch.empty_like(x) for x in dstate0))
    dinitial = State(*(torch.empty_like(call.M) for _ in range(3)))
    if hopper.stages_of(call).state_vjp:
        from titans.kernels.hopper.state_vjp import launch_state_vjp

        launch_state_vjp(call, plan.where, plan.tile, step_end, saved, dfinal, du, dstate0, dstate_L, dinitial)
        return dstate_L, dinitial
    state_vjp_kernel[plan.chains](
        k_ptr=call.k, v_ptr=call.v, affine=Affine(call.w, call.b), step_end=step_end, saved=saved,
        dfinal=dfinal, du_ptr=du, dstate0=dstate0, dstate_L=dstate_L, dinitial=dinitial,
        STAGES=stages(plan), **plan.square,
    )  # fmt: skip
    return dstate_L, dinitial


def key_vjp(
    plan: Plan, block_end: End, saved: Saved, dstate_L: BlockState, du: Tensor, dk: Tensor, daffine: Affine
) -> tuple[Tensor, Tensor, Tensor | None, End]:
    """Eq. (16): dk, dv, dy of k A for (20) where chunks share blocks, and cotangents of the blocks' ends."""
    call, shared = plan.call, plan.layout.PER > 1
    dk_out = dk if shared or dk.dtype == call.k.dtype else torch.empty_like(call.k)
    dv = du if du.dtype == call.v.dtype else torch.empty_like(call.v)
    dy_k = torch.empty_like(saved.x) if shared else None
    dblock_end = End(*(torch.empty_like(x) for x in block_end))
    key_vjp_kernel[plan.blocks](
        k_ptr=call.k, v_ptr=call.v, affine=Affine(call.w, call.b), block_end=block_end, saved=saved,
        anchor_ptr=call.anchor, dstate_L=dstate_L, du_ptr=du, dk_part_ptr=dk, dk_ptr=dk_out, dv_ptr=dv, dy_k_ptr=dy_k,
        daffine=daffine, dblock_end=dblock_end, **plan.square,
    )  # fmt: skip
    return dk_out, dv, dy_k, dblock_end


def anchor_vjp(plan: Plan, rows: Rows, saved: Saved, danchor: Tensor, dy_k: Tensor, dk: Tensor) -> tuple[Tensor, Rows]:
    """Eq. (20): the whole of dk, and cotangents of the rows that keys read."""
    call = plan.call
    dk_out = dk if dk.dtype == call.k.dtype else torch.empty_like(call.k)
    drows_k = Rows(*(torch.empty_like(x) for x in rows))
    anchor_vjp_kernel[plan.blocks](
        k_ptr=call.k, v_ptr=call.v, affine=Affine(call.w, call.b), rows=rows, saved=saved, danchor_ptr=danchor,
        dy_k_ptr=dy_k, dk_part_ptr=dk, dk_ptr=dk_out, drows_k=drows_k, **plan.square,
    )  # fmt: skip
    return dk_out, drows_k


def coefficients_vjp(plan: Plan, drows: Rows, drows_k: Rows | None, dblock_end: End) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (13): dtheta, dalpha, deta; overwrites the G of `drows`."""
    call = plan.call
    dtheta, dalpha, deta = (torch.empty_like(gate) for gate in (call.theta, call.alpha, call.eta))
    coefficients_vjp_kernel[plan.blocks](
        theta_ptr=call.theta, alpha_ptr=call.alpha, eta_ptr=call.eta, drows=drows, drows_k=drows_k,
        dblock_end=dblock_end, ln_ptr=torch.empty_like(drows.G), dtheta_ptr=dtheta, dalpha_ptr=dalpha, deta_ptr=deta,
        **plan.gates,
    )  # fmt: skip
    return dtheta, dalpha, deta


def backward(
    call: Call, M0: Tensor, S0: Tensor, x: Tensor, r: Tensor, do: Tensor, dM: Tensor, dS: Tensor, danchor: Tensor
) -> tuple[Tensor | None, ...]:
    """Cotangents of q, k, v, w, b, theta, alpha, eta and of the initial M, S and anchor."""
    plan = plan_of(call)
    (_, H, D, _), K = call.M.shape, plan.layout.slots
    if K * H == 0:
        inputs = (call.q, call.k, call.v, call.w, call.b, call.theta, call.alpha, call.eta)
        return *(None if x is None else torch.zeros_like(x) for x in inputs), dM.clone(), dS.clone(), danchor.clone()
    c, saved = coefficients(plan), Saved(M0, S0, x, r, dM.new_empty(*call.q.shape[:3], 2))
    # slots that no block uses stay zero; they are summed with the others. Of so many both tensors begin at multiples of
    # 16 bytes: where one does not, Triton compiles a kernel of its own
    dwb = dM.new_zeros(2, K + -K % 4, H, D)
    daffine = Affine(*dwb)
    drows, dq, du, dk, dstate0 = output_vjp(plan, c.rows, saved, do, daffine)
    dstate_L, dinitial = state_vjp(plan, c.step_end, saved, State(dM, dS, danchor), du, dstate0)
    del dstate0
    dk, dv, dy_k, dblock_end = key_vjp(plan, c.block_end, saved, dstate_L, du, dk, daffine)
    drows_k = None
    if dy_k is not None:
        dk, drows_k = anchor_vjp(plan, c.rows, saved, danchor, dy_k, dk)
    # make room for what the next kernel needs
    del dstate_L, dy_k
    gates = coefficients_vjp(plan, drows, drows_k, dblock_end)
    # of their own storage each
    dw, db = (None, None) if call.w is None else (total.clone() for total in dwb.sum(1))
    return dq, dk, dv, dw, db, *gates, *dinitial

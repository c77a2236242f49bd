"""The launches of the kernels, one function to a stage."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans.arguments import Call
from titans.kernels import hopper
from titans.kernels.coefficients import coefficients_kernel, coefficients_vjp_kernel
from titans.kernels.fit import least, needs_of, shared_memory, steps_in_flight
from titans.kernels.launcher import Launcher, types_of
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
    fused,
    gates_tile,
    storage,
    tile_of,
    where_of,
)
from titans.partition import LARGEST, Layout, layout_of, shortened, step_rows

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


run_coefficients = Launcher(coefficients_kernel)
run_coefficients_vjp = Launcher(coefficients_vjp_kernel)
run_output = Launcher(output_kernel)
run_output_vjp = Launcher(output_vjp_kernel)
run_state = Launcher(state_kernel)
run_state_vjp = Launcher(state_vjp_kernel)
run_key_vjp = Launcher(key_vjp_kernel)
run_anchor_vjp = Launcher(anchor_vjp_kernel)
# options of the compiler, by the number of warps and whether products and sums are fused
OPTIONS: dict[tuple[int, bool], dict[str, Any]] = {
    (warps, fuse): {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": fuse}
    for warps in (1, 4, 8)
    for fuse in (False, True)
}


class Form(NamedTuple):
    """What follows from the sizes and flags of a call.

    Attributes
    ----------
    layout : Layout
    tile, gate_tile : Tile
    sizes : dict
        T, H and C.
    blocks, chains : int
        Programs of the parallel kernels, and of the chain.
    gates, flat, square : dict
        Options of the kernels that work on gates, on (BC, BD) tiles, and on (BD, BD) tiles, which take more warps.
    """

    layout: Layout
    tile: Tile
    gate_tile: Tile
    sizes: dict[str, int]
    blocks: int
    chains: int
    gates: dict[str, Any]
    flat: dict[str, Any]
    square: dict[str, Any]


class Plan(NamedTuple):
    """What the launches of a call share.

    Attributes
    ----------
    call : Call
    where : Where
    affine : Affine
    key : Hashable
        All that the compiled forms of the kernels depend on, see `Launcher`.
    layout, tile, gate_tile, sizes, blocks, chains, gates, flat, square
        As in `Form`.
    """

    call: Call
    where: Where
    affine: Affine
    key: Hashable
    layout: Layout
    tile: Tile
    gate_tile: Tile
    sizes: dict[str, int]
    blocks: int
    chains: int
    gates: dict[str, Any]
    flat: dict[str, Any]
    square: dict[str, Any]


# of calls seen lately, since their sizes repeat
forms: dict[Hashable, Form] = {}
FORMS = 256


def form_of(call: Call) -> Form:
    """Lay a call out."""
    q, flags = call.q, (call.w is None, call.offset is None, call.cu_seqlens is None, call.log_gates)
    given = (q.shape, q.dtype, call.M.shape[0], call.chunk_size, flags, torch.get_float32_matmul_precision())
    form = forms.get(given)
    if form is None:
        _, T, H, D = q.shape
        layout, bfloat16, fuse = layout_of(call, block_rows(q)), q.dtype == torch.bfloat16, fused(q.dtype)
        form = Form(
            layout, tile_of(call, layout), gates_tile(call, layout), {"T": T, "H": H, "C": call.chunk_size},
            layout.slots * H, call.M.shape[0] * H,
            OPTIONS[1, fuse], OPTIONS[4 if bfloat16 else 8, fuse], OPTIONS[4 if bfloat16 and D <= 64 else 8, fuse],
        )  # fmt: skip
        if len(forms) >= FORMS:
            forms.clear()
        forms[given] = form
    return form


def plan_of(call: Call, *others: Tensor) -> Plan:
    """Prepare the launches of a call, whose kernels take its tensors and others."""
    form = form_of(call)
    where = where_of(call, form.layout)
    types = types_of((*call.differentiable, *where, *others))
    # the numbers of blocks and heads decide where a part of a buffer begins
    key = (call.q.device, form.tile, form.gate_tile, types, form.blocks * call.q.shape[-1] % 4)
    return Plan(call, where, Affine(call.w, call.b), key, *form)


def stages(plan: Plan) -> int:
    """How many steps are in flight along the chain."""
    q = plan.call.q
    return steps_in_flight(needs_of(q, plan.layout.BS), shared_memory(q.device))


def room(plan: Plan, *sizes: int) -> tuple[Tensor, ...]:
    """Parts of one buffer, float32, of so many numbers for each block; one allocation takes less time than many."""
    # every part begins at a multiple of 16 bytes
    total = [-(-plan.blocks * size // 4) * 4 for size in sizes]
    return plan.call.M.new_empty(sum(total)).split_with_sizes(total)


def coefficients(plan: Plan) -> Coefficients:
    """Eq. (7)."""
    call, BC, PER = plan.call, plan.layout.BC, plan.layout.PER
    # where steps are blocks, so are their ends
    if PER == 1:
        beta_f, G, *end = room(plan, 2 * BC, BC * BC, 2 * BC, 3)
        c = Coefficients(Rows(beta_f, G), End(*end), End(*end))
    else:
        beta_f, G, *ends = room(plan, 2 * BC, BC * BC, 2 * BC, 3, 2 * BC, PER * 3)
        c = Coefficients(Rows(beta_f, G), End(*ends[:2]), End(*ends[2:]))
    run_coefficients(
        plan.blocks, plan.key,
        theta_ptr=call.theta, alpha_ptr=call.alpha, eta_ptr=call.eta, where=plan.where, rows=c.rows,
        block_end=c.block_end, step_end=c.step_end, **plan.sizes, tile=plan.gate_tile, **plan.gates,
    )  # fmt: skip
    return c


def state(plan: Plan, step_end: End, saved: Saved) -> State:
    """Eq. (8)-(10): the final state; writes `saved`."""
    call = plan.call
    final = State(*(torch.empty_like(call.M) for _ in range(3)))
    run_state(
        plan.chains, plan.key,
        k_ptr=call.k, v_ptr=call.v, affine=plan.affine, step_end=step_end,
        initial=State(call.M, call.S, call.anchor), where=plan.where, saved=saved, final=final,
        **plan.sizes, eps=call.eps, tile=plan.tile, STAGES=stages(plan), **plan.square,
    )  # fmt: skip
    return final


def output(plan: Plan, rows: Rows, saved: Saved) -> Tensor:
    """Eq. (11) and (5): o."""
    call = plan.call
    o = torch.empty_like(call.q)
    run_output(
        plan.blocks, plan.key,
        q_ptr=call.q, k_ptr=call.k, v_ptr=call.v, affine=plan.affine, rows=rows, saved=saved, where=plan.where,
        o_ptr=o, **plan.sizes, eps=call.eps, tile=plan.tile, **plan.flat,
    )  # fmt: skip
    return o


def kept(call: Call) -> tuple[Tensor, Tensor]:
    """Room for what the backward needs of the inner gradients beside v and k: x of eq. (2), and r."""
    return torch.empty_like(call.q, dtype=storage(call)), call.M.new_empty(0 if call.w is None else call.q.shape[:3])


def all_used(plan: Plan) -> bool:
    """Whether there is a block for every slot."""
    return plan.layout.NB == 1 and plan.where.cu_seqlens is None and plan.where.offset is None


def room_for_saved(plan: Plan) -> Saved:
    """Room for what the backward needs of the forward."""
    call = plan.call
    (_, H, D, _), K = call.M.shape, plan.layout.slots
    x, r = kept(call)
    # slots that no block uses are defined all the same
    new, like = (x.new_empty, torch.empty_like) if all_used(plan) else (x.new_zeros, torch.zeros_like)
    M0 = new(K, H, D, D)
    return Saved(M0, like(M0), x, r)


def hopper_forward(plan: Plan, saved: Saved | None) -> tuple[Tensor, ...]:
    """The forward for compute capability 9.0: o and the final state; writes `saved`, if it is recorded."""
    # Gluon is experimental: it is imported where it is used
    from titans.kernels.hopper.forward import launch_forward

    call = plan.call
    o, final = torch.empty_like(call.q), State(*(torch.empty_like(call.M) for _ in range(3)))
    # it sees the gates
    tile = tile_of(call, plan.layout, log_gates=True) if call.log_gates else plan.tile
    launch_forward(call, plan.where, tile, plan.layout.slots, saved, final, o, plan.key)
    return o, *final


def forward(call: Call, recorded: bool = True) -> tuple[Tensor, ...]:
    """The op: o, the final M, S and anchor, and if `recorded`, for the backward, M0 and S0 of every block, x and r."""
    call = shortened(call, block_rows(call.q))
    plan = plan_of(call)
    if plan.blocks == 0:
        return torch.empty_like(call.q), call.M.clone(), call.S.clone(), call.anchor.clone(), *room_for_saved(plan)[:4]
    on_hopper = hopper.stages_of(call).forward
    if on_hopper and not recorded:
        return hopper_forward(plan, None)
    saved = room_for_saved(plan)
    if on_hopper:
        return *hopper_forward(plan, saved), *saved[:4]
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
    run_output_vjp(
        plan.blocks, plan.key,
        q_ptr=call.q, k_ptr=call.k, v_ptr=call.v, affine=plan.affine, rows=rows, saved=saved, where=plan.where,
        do_ptr=do, drows=drows, dq_ptr=dq, du_ptr=du, dk_ptr=dk, dstate0=dstate0, daffine=daffine,
        **plan.sizes, eps=call.eps, tile=plan.tile, **plan.flat,
    )  # fmt: skip
    return drows, dq, du, dk, dstate0


def state_vjp(
    plan: Plan, step_end: End, saved: Saved, dfinal: State, du: Tensor, dstate0: BlockState
) -> tuple[BlockState, State]:
    """Eq. (15), (17), (18): cotangents of M and S after each block, and of the initial state; completes `du`."""
    call = plan.call
    dstate_L = dstate0 if plan.layout.PER == 1 else BlockState(*(torch.empty_like(x) for x in dstate0))
    dinitial = State(*(torch.empty_like(call.M) for _ in range(3)))
    run_state_vjp(
        plan.chains, plan.key,
        k_ptr=call.k, v_ptr=call.v, affine=plan.affine, step_end=step_end, saved=saved, where=plan.where,
        dfinal=dfinal, du_ptr=du, dstate0=dstate0, dstate_L=dstate_L, dinitial=dinitial,
        **plan.sizes, tile=plan.tile, STAGES=stages(plan), **plan.square,
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
    run_key_vjp(
        plan.blocks, plan.key,
        k_ptr=call.k, v_ptr=call.v, affine=plan.affine, block_end=block_end, saved=saved, where=plan.where,
        anchor_ptr=call.anchor, dstate_L=dstate_L, du_ptr=du, dk_part_ptr=dk, dk_ptr=dk_out, dv_ptr=dv, dy_k_ptr=dy_k,
        daffine=daffine, dblock_end=dblock_end, **plan.sizes, tile=plan.tile, **plan.square,
    )  # fmt: skip
    return dk_out, dv, dy_k, dblock_end


def anchor_vjp(plan: Plan, rows: Rows, saved: Saved, danchor: Tensor, dy_k: Tensor, dk: Tensor) -> tuple[Tensor, Rows]:
    """Eq. (20): the whole of dk, and cotangents of the rows that keys read."""
    call = plan.call
    dk_out = dk if dk.dtype == call.k.dtype else torch.empty_like(call.k)
    drows_k = Rows(*(torch.empty_like(x) for x in rows))
    run_anchor_vjp(
        plan.blocks, plan.key,
        k_ptr=call.k, v_ptr=call.v, affine=plan.affine, rows=rows, saved=saved, where=plan.where, danchor_ptr=danchor,
        dy_k_ptr=dy_k, dk_part_ptr=dk, dk_ptr=dk_out, drows_k=drows_k, **plan.sizes, tile=plan.tile, **plan.square,
    )  # fmt: skip
    return dk_out, drows_k


def coefficients_vjp(plan: Plan, drows: Rows, drows_k: Rows | None, dblock_end: End) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (13): dtheta, dalpha, deta; overwrites the G of `drows`."""
    call = plan.call
    dtheta, dalpha, deta = (torch.empty_like(gate) for gate in (call.theta, call.alpha, call.eta))
    run_coefficients_vjp(
        plan.blocks, plan.key,
        theta_ptr=call.theta, alpha_ptr=call.alpha, eta_ptr=call.eta, where=plan.where, drows=drows, drows_k=drows_k,
        dblock_end=dblock_end, ln_ptr=torch.empty_like(drows.G), dtheta_ptr=dtheta, dalpha_ptr=dalpha, deta_ptr=deta,
        **plan.sizes, tile=plan.gate_tile, **plan.gates,
    )  # fmt: skip
    return dtheta, dalpha, deta


def portable_backward(plan: Plan, saved: Saved, do: Tensor, dfinal: State, daffine: Affine) -> tuple[Tensor, ...]:
    """The backward by the portable kernels: dq, dk, dv, the gates' cotangents and those of the initial state."""
    c = coefficients(plan)
    drows, dq, du, dk, dstate0 = output_vjp(plan, c.rows, saved, do, daffine)
    dstate_L, dinitial = state_vjp(plan, c.step_end, saved, dfinal, du, dstate0)
    del dstate0
    dk, dv, dy_k, dblock_end = key_vjp(plan, c.block_end, saved, dstate_L, du, dk, daffine)
    drows_k = None
    if dy_k is not None:
        dk, drows_k = anchor_vjp(plan, c.rows, saved, dfinal.anchor, dy_k, dk)
    # make room for what the next kernel needs
    del dstate_L, dy_k
    return dq, dk, dv, *coefficients_vjp(plan, drows, drows_k, dblock_end), *dinitial


def hopper_backward(plan: Plan, saved: Saved, do: Tensor, dfinal: State, daffine: Affine) -> tuple[Tensor, ...]:
    """The backward for compute capability 9.0: dq, dk, dv, the gates' cotangents and those of the initial state."""
    # Gluon is experimental: it is imported where it is used
    from titans.kernels.hopper.coefficients_vjp import Gates, launch_coefficients_vjp
    from titans.kernels.hopper.ends import launch_ends
    from titans.kernels.hopper.key_vjp import launch_key_vjp
    from titans.kernels.hopper.output_vjp import launch_output_vjp
    from titans.kernels.hopper.state_vjp import launch_state_vjp

    call, where, blocks, key = plan.call, plan.where, plan.blocks, plan.key
    dq, du, dk = (torch.empty_like(call.q) for _ in range(3))
    dgates = Gates(*(torch.empty_like(gate) for gate in (call.theta, call.alpha, call.eta)))
    dinitial = State(*(torch.empty_like(call.M) for _ in range(3)))
    if call.q.shape[1] == 0:
        # there is nothing for the copy engine to move
        for new, old in zip(dinitial, dfinal, strict=True):
            new.copy_(old)
        return dq, dk, du, *dgates, *dinitial
    # these see the gates
    tile = tile_of(call, plan.layout, log_gates=True) if call.log_gates else plan.tile
    end = launch_ends(call, where, tile, plan.layout.slots, key)
    drows, dend = Rows(*room(plan, 2 * 64, 64 * 64)), End(*(torch.empty_like(x) for x in end))
    dstate = BlockState(torch.empty_like(saved.M0), torch.empty_like(saved.S0))
    launch_output_vjp(call, where, tile, blocks, saved, do, drows, dq, du, dk, dstate, daffine, key)
    launch_state_vjp(call, where, plan.tile, end, saved, dfinal, du, dstate, dstate, dinitial, key)
    launch_key_vjp(call, where, plan.tile, blocks, end, saved, dstate, du, dk, daffine, dend, key)
    # make room for the next ones
    del dstate
    launch_coefficients_vjp(call, where, plan.gate_tile, blocks, drows, dend, dgates, key)
    return dq, dk, du, *dgates, *dinitial


def backward(
    call: Call, M0: Tensor, S0: Tensor, x: Tensor, r: Tensor, do: Tensor, dM: Tensor, dS: Tensor, danchor: Tensor
) -> tuple[Tensor | None, ...]:
    """Cotangents of q, k, v, w, b, theta, alpha, eta and of the initial M, S and anchor."""
    call = shortened(call, block_rows(call.q))
    plan = plan_of(call, M0, S0, x, r, do, dM, dS, danchor)
    (_, H, D, _), K = call.M.shape, plan.layout.slots
    if K * H == 0:
        inputs = (call.q, call.k, call.v, call.w, call.b, call.theta, call.alpha, call.eta)
        return *(None if x is None else torch.zeros_like(x) for x in inputs), dM.clone(), dS.clone(), danchor.clone()
    saved, dfinal = Saved(M0, S0, x, r, dM.new_empty(*call.q.shape[:3], 2)), State(dM, dS, danchor)
    # slots that no block uses stay zero; they are summed with the others
    dwb = (dM.new_empty if all_used(plan) else dM.new_zeros)(2, K, H, D)
    daffine = Affine(*dwb)
    make = hopper_backward if hopper.stages_of(call).backward else portable_backward
    dq, dk, dv, *dothers = make(plan, saved, do, dfinal, daffine)
    dw, db = None, None
    if call.w is not None and call.b is not None:
        sum_dw, sum_db = dwb.sum(1)
        # of their own storage each
        dw, db = sum_dw.to(call.w.dtype, copy=True), sum_db.to(call.b.dtype, copy=True)
    return dq, dk, dv, dw, db, *dothers

"""The Hopper kernel of the reverse chain, interpreted on the CPU with its events in many orders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.titans import gluon_interpreter
from titans.arguments import Call
from titans.kernels.tile import BlockState, End, Saved, State, block_rows, tile_of, where_of
from titans.partition import layout_of

C = 64
# copies at once, at some time, as late as can be, and at another time
ORDERS = (0, 1, 2, 4)
PACKED = (0, 0, 70, 71, 199, 263, 263, 300)


@dataclass(frozen=True)
class Case:
    """What the kernel is launched for."""

    D: int
    T: int
    B: int = 1
    plain: bool = False
    cu_seqlens: tuple[int, ...] | None = None
    offset: tuple[int, ...] | None = None


CASES = [
    Case(64, 320),
    Case(128, 192),
    Case(128, 64, B=2),
    Case(128, 100),
    Case(40, 133, B=2),
    Case(96, 5),
    Case(128, 130, B=2, offset=(63, 56)),
    Case(64, 300, cu_seqlens=PACKED, offset=(3, 0, 63, 0, 0, 0, 9)),
    Case(128, 300, cu_seqlens=PACKED),
]


class Given(NamedTuple):
    """Arguments of the launch."""

    call: Call
    step_end: End
    saved: Saved
    dfinal: State
    du: Tensor
    dstate0: BlockState


class Made(NamedTuple):
    """What the launch writes."""

    du: Tensor
    dM_L: Tensor
    dS_L: Tensor
    dM: Tensor
    dS: Tensor
    danchor: Tensor


def given(case: Case, draw: Callable[..., Tensor]) -> Given:
    """Draw the arguments; `draw` takes a shape and the name of what is drawn."""
    B, T, D, H = case.B, case.T, case.D, 2
    N = B if case.cu_seqlens is None else len(case.cu_seqlens) - 1
    q, k, v = (draw("k", B, T, H, D).bfloat16() for _ in range(3))
    w, b = (None if case.plain else draw("w", H, D).bfloat16() for _ in range(2))
    gates = [torch.zeros(B, T, H).bfloat16()] * 3
    offset = None if case.offset is None else torch.tensor(case.offset)
    cu_seqlens = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens)
    M = torch.zeros(N, H, D, D)
    call = Call(q, k, v, w, b, *gates, M, M, M, offset, cu_seqlens, 1e-6, C, False)
    K = layout_of(call, block_rows(q)).slots
    unused = torch.zeros(0)
    x, r, means = draw("x", B, T, H, D).bfloat16(), draw("r", B, T, H).abs() + 1, draw("means", B, T, H, 2)
    return Given(
        call,
        End(draw("weights", K, H, 2, C).abs(), draw("transition", K, H, 3).abs()),
        Saved(unused, unused, x, r, means),
        State(*(draw("state", N, H, D, D) for _ in range(3))),
        draw("du", B, T, H, D).bfloat16(),
        BlockState(*(draw("state", K, H, D, D).bfloat16() for _ in range(2))),
    )


def run(args: Given, order: int, in_place: bool = False, change: Callable[[str], str] = lambda text: text) -> Made:
    """Launch the kernel on poisoned outputs."""
    call = args.call
    layout = layout_of(call, block_rows(call.q))
    du, dstate0 = args.du.clone(), BlockState(*(x.clone() for x in args.dstate0))
    dstate_L = dstate0 if in_place else BlockState(*(torch.full_like(x, torch.nan) for x in dstate0))
    dinitial = State(*(torch.full_like(x, torch.nan) for x in args.dfinal))
    gluon_interpreter.seeds[0] = order
    with gluon_interpreter.interpreted("state_vjp", change) as module:
        module.launch_state_vjp(
            call, where_of(call, layout), tile_of(call, layout), args.step_end, args.saved, args.dfinal, du, dstate0,
            dstate_L, dinitial, None,
        )  # fmt: skip
    return Made(du, *dstate_L, *dinitial)


def inner_gradient_vjp(du: Tensor, x: Tensor, r: Tensor, target: Tensor, means: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Eq. (12), for rows (H, L, D): dy."""

    def mean(x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True)

    mean_e, c = means[..., :1], means[..., 1:]
    e = (x * w + b - target) * w
    dg, dr = r * du, mean(du * (e - mean_e - x * c))
    dc = -mean(dg * x)
    de = dg - mean(dg) + dc * x
    dx = dc * e - c * dg + de * w * w
    return r * (dx - mean(dx) - x * mean(dx * x)) - x * r * r * dr


def reverse(args: Given, dtype: torch.dtype, rounded: Callable[[Tensor], Tensor]) -> tuple[Made, Tensor]:
    """Eq. (15), (12), (17), (18), and which slots are used; operands of products and what is stored are `rounded`."""
    call, (weights, transition), saved = args.call, args.step_end, args.saved
    layout = layout_of(call, block_rows(call.q))
    w, b = (None if x is None else x.to(dtype)[:, None] for x in (call.w, call.b))
    made = Made(*(x.to(dtype, copy=True) for x in (args.du, *args.dstate0, *args.dfinal)))
    used = torch.zeros(layout.slots, dtype=torch.bool)
    cu = call.cu_seqlens
    slack = C - 1 + (C - 1) * (call.offset is not None)
    for n in range(len(call.M)):
        B, begin, L = (n, 0, call.q.shape[1]) if cu is None else (0, int(cu[n]), int(cu[n + 1] - cu[n]))
        first_slot = n * layout.slots // len(call.M) if cu is None else (begin + n * slack) // C
        offset = 0 if call.offset is None else int(call.offset[n])
        full = (offset + L) % C == 0
        last = (offset + L - 1) // C
        dM, dS, danchor = made.dM[n].clone(), made.dS[n].clone(), made.danchor[n].clone()
        dA = torch.zeros_like(danchor) if L else danchor
        if L and full:
            dM += danchor
        for i in range(last, -1, -1) if L else ():
            rows = slice(begin + max(i * C - offset, 0), begin + min((i + 1) * C - offset, L))
            k, v, x, du = (t[B, rows].to(dtype).transpose(0, 1) for t in (call.k, call.v, saved.x, made.du))
            slot, length = first_slot + i, rows.stop - rows.start
            used[slot] = True
            n_L, G_L = weights[slot, :, :, :length].to(dtype)[..., None].unbind(1)
            beta, f, m = transition[slot].to(dtype)[:, :, None, None].unbind(1)
            dM0, dS0 = made.dM_L[slot].clone(), made.dS_L[slot].clone()
            made.dM_L[slot], made.dS_L[slot] = rounded(dM), rounded(dS)
            du = du - 2 * n_L * (k @ rounded(dS)) - 2 * G_L * (k @ rounded(dM))
            made.du[B, rows] = rounded(du).transpose(0, 1)
            dy = du
            if w is not None and b is not None and saved.means is not None:
                r, means = (t[B, rows].to(dtype).transpose(0, 1) for t in (saved.r[..., None], saved.means))
                dy = inner_gradient_vjp(du, x, r, v - k, means, w, b)
            dM, dS = beta * dM + dM0, f * dM + m * dS + dS0
            dA = dA + k.mT @ rounded(dy)
            if i == last and not full:
                dA = dA + danchor
            if i > 0:
                dM, dA = dM + dA, torch.zeros_like(dA)
        made.dM[n], made.dS[n], made.danchor[n] = dM, dS, dA
    return made, used


def parts(made: Made, used: Tensor) -> list[Tensor]:
    """What a launch has to write."""
    return [made.du, made.dM_L[used], made.dS_L[used], *made[3:]]


def integers(seed: int) -> Callable[..., Tensor]:
    """Numbers so small and so few that every result of the plain memory fits bfloat16."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, *shape: int) -> Tensor:
        if name == "k":
            # one entry of a row is not zero
            sign = torch.randint(0, 2, (*shape[:-1], 1), generator=generator) * 2.0 - 1
            return sign * torch.nn.functional.one_hot(
                torch.randint(shape[-1], shape[:-1], generator=generator), shape[-1]
            )
        if name == "weights":
            return torch.randint(0, 2, shape, generator=generator) / 2
        return torch.randint(0 if name == "transition" else -1, 2, shape, generator=generator).float()

    return draw


def normal(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda name, *shape: torch.randn(shape, generator=generator) * (1 if name in "wx" else 0.1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_integers_of_the_plain_memory_are_exact(case: Case) -> None:
    args = given(Case(**vars(case) | {"plain": True}), integers(0))
    exact, used = reverse(args, torch.float64, lambda x: x)
    assert all(torch.equal(x, x.bfloat16().double()) for x in parts(exact, used))
    for order in ORDERS[:3]:
        made = run(args, order, in_place=order == 2)
        for name, value, expected in zip(Made._fields, parts(made, used), parts(exact, used), strict=True):
            assert torch.equal(value.double(), expected), (name, order)
        if order != 2:
            assert made.dM_L[~used].isnan().all()
            assert made.dS_L[~used].isnan().all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_order_of_events_changes_no_bit_and_errors_are_those_of_the_portable_kernel(case: Case) -> None:
    """At most twice those of its arithmetic, which rounds the same operands."""
    args = given(case, normal(0))
    exact, used = reverse(args, torch.float64, lambda x: x)
    portable, _ = reverse(args, torch.float32, lambda x: x.bfloat16().float())
    made = parts(run(args, 0), used)
    for name, value, same, true in zip(Made._fields, made, parts(portable, used), parts(exact, used), strict=True):
        assert (value - true).norm() <= 2 * (same - true).norm(), name
    for order in ORDERS[1:]:
        again = parts(run(args, order, in_place=order % 2 == 0), used)
        assert all(torch.equal(x, y) for x, y in zip(made, again, strict=True)), order


WHOLE = Case(128, 256)
PLAIN = Case(128, 256, plain=True)
RAGGED = Case(40, 560, cu_seqlens=(0, 245, 560))
FAULTS = {
    "dM0 is released before it is read": (
        WHOLE,
        "        dM, dS = through_decays(dM, dS, slots.dM0.index(slot), slots.dS0.index(slot), slots.c, c8, Q)\n"
        "        mbarrier.arrive(flags.taken.index(slot))\n",
        "        mbarrier.arrive(flags.taken.index(slot))\n"
        "        dM, dS = through_decays(dM, dS, slots.dM0.index(slot), slots.dS0.index(slot), slots.c, c8, Q)\n",
    ),
    "v and x are released before they are read": (
        WHOLE,
        "        mbarrier.arrive(flags.mid.index(slot))\n",
        "        mbarrier.arrive(flags.mid.index(slot))\n        mbarrier.arrive(flags.late.index(slot))\n",
    ),
    "dy overwrites dM before it is saved": (
        WHOLE,
        "        mbarrier.wait(flags.saved.index(slot), phase)\n        dy_s.store",
        "        dy_s.store",
    ),
    "du is loaded over what is being saved": (
        PLAIN,
        "        if s >= STAGES:\n            mbarrier.wait(flags.saved.index(slot), phase)\n",
        "",
    ),
    "dM is saved before it is there": (
        WHOLE,
        "        mbarrier.wait(flags.taken.index(slot), phase)\n        tma",
        "        tma",
    ),
    "the loader waits for the wrong parity": (WHOLE, "(s // STAGES - 1) & 1", "(s // STAGES) & 1"),
    "the chain waits for the wrong parity": (WHOLE, "(s // (STAGES + 1)) & 1", "(s // STAGES) & 1"),
    "k has too few slots": (RAGGED, "        k_slot = s % (STAGES + 1)\n", "        k_slot = s % STAGES\n"),
    "the chain reads another slot of v": (RAGGED, "slots.v.index(slot), slots.c", "slots.v.index(1 - slot), slots.c"),
    "du is not fenced": (
        WHOLE,
        "        fence_async_shared()\n        mbarrier.arrive(flags.mid",
        "        mbarrier.arrive(flags.mid",
    ),
    "dy is not fenced": (
        WHOLE,
        "        dy_s.store(dy.to(gl.bfloat16))\n        fence_async_shared()\n",
        "        dy_s.store(dy.to(gl.bfloat16))\n",
    ),
    "nobody waits for the coefficients": (WHOLE, "        flag_of(2, STAGES),", "        flag_of(1, STAGES),"),
    "rows after the last are loaded": (
        RAGGED,
        "(offs_t < last) & (offs_d < tile.D)\n        block.store",
        "(offs_d < tile.D)\n        block.store",
    ),
    "rows after the last are stored": (
        RAGGED,
        "(offs_t < last) & (offs_d < tile.D)\n        gl.store",
        "(offs_d < tile.D)\n        gl.store",
    ),
    "the copy engine reads a neighbour's rows": (
        RAGGED,
        "    if last - first == C:\n        mbarrier",
        "    if True:\n        mbarrier",
    ),
    "columns that are not in use are not zero": (RAGGED, "    if tile.D != tile.BD:", "    if False:"),
    "the first chunk's anchor is its memory": (WHOLE, "        if (s < steps - 1)", "        if (s < steps)"),
    "a tail's anchor is left out": (RAGGED, "(s < steps - 1) | (lowest > 0)", "s < steps - 1"),
    "the final anchor counts twice": (RAGGED, "(steps > 0) & (tail == 0)", "(steps > 0)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault: str) -> None:
    case, right, wrong = FAULTS[fault]

    def plant(text: str) -> str:
        assert right in text
        return text.replace(right, wrong)

    args = given(case, normal(0))
    expected = run(args, 0)
    for order in ORDERS:
        try:
            made = run(args, order, in_place=True, change=plant)
        except (AssertionError, gluon_interpreter.Deadlock):
            return
        if not all(torch.equal(x, y) for x, y in zip(made, expected, strict=True)):
            return
    pytest.fail(f"{fault}: nothing shows")

"""The Hopper forward of many narrow heads, interpreted on the CPU in many orders; its chain: `test_hopper_state`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.titans import gluon_copies, gluon_interpreter
from tests.titans.test_hopper_state import ORDERS, PACKED, PLACES, Case, given, integers, normal
from titans import chunk
from titans.arguments import Call
from titans.kernels.tile import Saved, State, block_rows, tile_of, where_of
from titans.partition import layout_of

CASES = [
    Case(64, 320),
    Case(64, 133, B=2),
    Case(40, 70, offset=(63,)),
    Case(64, 300, cu_seqlens=PACKED, offset=(3, 0, 63, 0, 0, 0, 9)),
]
FUSED = [places for places in PLACES if places != "apart"]


def run(call: Call, order: int, places: str, change: Callable[[str], str] = lambda text: text) -> tuple[Tensor, ...]:
    """Launch the kernel on poisoned outputs: o, the final state, and what the backward keeps."""
    layout, (H, D) = layout_of(call, block_rows(call.q)), call.q.shape[2:]
    squares = (torch.full((layout.slots, H, D, D), torch.nan, dtype=torch.bfloat16) for _ in range(2))
    saved = Saved(*squares, torch.full_like(call.q, torch.nan), torch.full(call.q.shape[:3], torch.nan))
    final, o = State(*(torch.full_like(call.M, torch.nan) for _ in range(3))), torch.full_like(call.q, torch.nan)
    gluon_interpreter.seeds[0] = order
    with gluon_copies.interpreted("forward", change, "fused") as module:
        module.multiprocessors = lambda device: PLACES[places]
        where, tile = where_of(call, layout), tile_of(call, layout, call.log_gates)
        module.launch_forward(call, where, tile, layout.slots, saved, final, o, None)
    return o, *final, *saved[:4]


@pytest.mark.parametrize("places", FUSED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_integers_of_the_plain_memory_are_exact(case: Case, places: str) -> None:
    call = given(Case(**vars(case) | {"plain": True}), integers(0))
    raised = Call(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in call))
    exact = chunk.forward(raised, log_space=False)[:4]
    for value, true in zip(run(call, 1, places), exact, strict=False):
        assert torch.equal(true, true.bfloat16().double())
        assert torch.equal(value.double(), true)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_form_and_the_order_of_events_change_no_bit(case: Case) -> None:
    call = given(case, normal(0))
    first = run(call, 0, "apart")
    for places in FUSED:
        for order in ORDERS:
            again = run(call, order, places)
            assert all(torch.equal(x, y) for x, y in zip(first[:4], again[:4], strict=True)), (places, order)
            saved = zip(first[4:], again[4:], strict=True)
            assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in saved), (places, order)


WHOLE = Case(64, 320)
RAGGED = Case(40, 200, cu_seqlens=(0, 100, 200), offset=(7, 0))
DONE = "            mbarrier.wait(flags.done.index(slot), (i // STAGES - 1) & 1)\n"
U = "        slots.u.store(u.to(gl.bfloat16))\n"
FENCED = "        fence_async_shared()\n        S = warpgroup"
STATES = "        fence_async_shared()\n        mbarrier.arrive(flags.done"
FREE = "        mbarrier.arrive(flags.G_free.index(gram))\n"
UNREAD = "        # o of the chunk before has been read\n        tma.store_wait(0)\n"
O_FENCED = "        fence_async_shared()\n        if step.length == C:"
FAULTS = {
    "slots refilled before they have been read": (WHOLE, DONE, "            pass\n"),
    "the loader waits for the wrong parity": (WHOLE, "(i // STAGES - 1) & 1", "(i // STAGES) & 1"),
    "the forward waits for the wrong parity": (WHOLE, "mbarrier.wait(flags.full.index(slot), (i // STAGES) & 1)",
                                               "mbarrier.wait(flags.full.index(slot), (i // STAGES + 1) & 1)"),
    "the first chunk reads M in the place of the anchor": (RAGGED, "gl.where(i > 0, 0, 1)", "0 * i"),
    "every chunk reads the anchor's slot": (WHOLE, "gl.where(i > 0, 0, 1)", "1 + 0 * i"),
    "u not fenced": (WHOLE, FENCED, "        S = warpgroup"),
    "M not fenced": (WHOLE, STATES, "        mbarrier.arrive(flags.done"),
    "o not fenced": (WHOLE, O_FENCED, "        if step.length == C:"),
    "o overwritten before the engine has read it": (WHOLE, UNREAD, ""),
    "n in the place of G": (WHOLE, "first + G_L), Y) * -2", "first + N_L), Y) * -2"),
    "coefficients freed before they have been read": (
        WHOLE, "        y = warpgroup_mma(k, slots.A", f"{FREE}        y = warpgroup_mma(k, slots.A"),
    "x saved before it is there": (WHOLE, "flags.done.index(i % STAGES), (i", "flags.done.index(i % STAGES), 1 ^ (i"),
    "x overwritten before it is saved": (WHOLE, "            mbarrier.wait(flags.read.index(0), (i & 1) ^ 1)\n", ""),
    "M0 of the step before": (WHOLE, "(own.index + H).to", "(own.index + 0).to"),
    "rows after a sequence written": (RAGGED, "H, step.length, tile, PART", "H, step.length + 1, tile, PART"),
    "the final anchor of an unfinished chunk is M": (RAGGED, "== 0, 1, 2)", "== 0, 1, 1)"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_noticed(name: str) -> None:
    """By wrong results, a deadlock or a read of what is not fenced, in some order."""
    case, old, new = FAULTS[name]
    assert (gluon_interpreter.KERNELS / "hopper" / "fused.py").read_text().count(old) == 1
    call = given(case, normal(0))
    right = run(call, 0, "shared")
    for order in range(4 * len(ORDERS)):
        try:
            wrong = run(call, order, "shared", lambda text: text.replace(old, new))
        except (gluon_interpreter.Deadlock, AssertionError):
            return
        if not all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(right, wrong, strict=True)):
            return
    pytest.fail("not noticed")

"""The outputs of the Hopper forward, interpreted on the CPU in many orders, and the ends of its chunks."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.titans import gluon_copies, gluon_interpreter
from tests.titans.test_hopper_state import LINE, PACKED, Case, ends, integers, norm, normal, pieces
from tests.titans.test_hopper_state import given as chain_given
from titans import chunk
from titans.arguments import Call
from titans.kernels.block import Step
from titans.kernels.tile import Affine, Saved, State, block_rows, tile_of, where_of
from titans.partition import layout_of

C, H = 64, 2
ORDERS = range(4)
# of the rings: narrow tiles, those of few programs, and wide tiles
SIZES = ((2, 2, 1), (4, 3, 2), (2, 1, 2))
CASES = [
    Case(64, 320),
    Case(128, 192),
    Case(64, 133),
    Case(40, 100),
    Case(96, 5),
    Case(128, 70, offset=(63,)),
    Case(40, 300, cu_seqlens=PACKED, offset=(3, 0, 63, 0, 0, 0, 9)),
]


class Given(NamedTuple):
    """What the outputs are made of."""

    call: Call
    M0: Tensor
    S0: Tensor
    u: Tensor


def given(case: Case, draw: Callable[..., Tensor], log_gates: bool = False) -> Given:
    """Draw the arguments; the chain has finished."""
    call = chain_given(case, draw, log_gates)
    B, T, D = case.B, case.T, case.D
    K = layout_of(call, block_rows(call.q)).slots
    call = call._replace(q=draw("k", B, T, H, D).bfloat16())
    M0, S0 = (draw("state", K, H, D, D).bfloat16() for _ in range(2))
    return Given(call, M0, S0, draw("k", B, T, H, D).bfloat16())


def run(
    args: Given, order: int, sizes: tuple[int, ...] = (2, 2, 1), change: Callable[[str], str] = lambda text: text
) -> Tensor:
    """Run the programs on a poisoned output, with rings of some sizes; the chain has finished."""
    call = args.call
    layout, o = layout_of(call, block_rows(call.q)), torch.full_like(call.q, torch.nan)
    T, H, D = call.q.shape[1:]
    BD, programs = 64 if D <= 64 else 128, len(call.M) * H
    count = torch.full((programs, LINE), 2**30, dtype=torch.int32)
    with gluon_copies.interpreted("forward", change, "output") as module:
        rows = (module.rows_of_heads(x, BD) for x in (call.q, call.k, args.u, o))
        engine = module.Engine(*rows, *(module.squares(x, BD) for x in (args.M0, args.S0)))
        tokens = module.Tokens(call.q, call.k, args.u, call.theta, call.alpha, call.eta)
        given = (tokens, Affine(call.w, call.b), where_of(call, layout), count, o)
        # what a program writes beside its own, another one would write again
        for pid in reversed(range(programs)) if order % 2 else range(programs):
            gluon_interpreter.current[:] = [gluon_interpreter.Program(pid, order)]
            module.run_outputs(
                torch.tensor(pid), engine, *map(gluon_interpreter.pointers, given), torch.tensor(T), torch.tensor(H),
                call.eps, tile_of(call, layout, call.log_gates), None, None, *sizes, None,
            )  # fmt: skip
    return o


def all_pieces(call: Call) -> Iterator[tuple[int, int, slice]]:
    """Slot, row of the batch, and tokens of each piece."""
    return chain.from_iterable(pieces(call, n) for n in range(len(call.M)))


def outputs(args: Given, dtype: torch.dtype, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Eq. (7), (11) and (5); the weights and the result are `rounded`."""
    call = args.call
    o = torch.full(call.q.shape, torch.nan, dtype=dtype)
    w, b = (None if x is None else x.to(dtype)[:, None] for x in (call.w, call.b))
    for slot, B, rows in all_pieces(call):
        q, k, u = (t[B, rows].to(dtype).transpose(0, 1) for t in (call.q, call.k, args.u))
        theta, alpha, eta = (g[B, rows].to(dtype).T for g in (call.theta, call.alpha, call.eta))
        if call.log_gates:
            theta, a, eta = theta.exp(), alpha.exp(), eta.exp()
        else:
            a = 1 - alpha
        n, f, beta, m = torch.zeros_like(theta), 0 * theta[:, :1], 0 * theta[:, :1] + 1, 0 * theta[:, :1] + 1
        G, betas, fs, Gs = n, [], [], []
        for t in range(rows.stop - rows.start):
            now = torch.arange(rows.stop - rows.start) == t
            n = torch.where(now, theta, eta[:, t, None] * n)
            G, m, beta = a[:, t, None] * G + n, eta[:, t, None] * m, a[:, t, None] * beta
            f = a[:, t, None] * f + m
            betas, fs, Gs = [*betas, beta], [*fs, f], [*Gs, G]
        weights = rounded(-2 * torch.stack(Gs, 1).tril() * (q @ k.mT))
        y = torch.stack(betas, 1) * (q @ args.M0[slot].to(dtype)) + torch.stack(fs, 1) * (q @ args.S0[slot].to(dtype))
        y = y + weights @ u
        if w is not None and b is not None:
            y = y + norm(y, call.eps)[0] * w + b
        o[B, rows] = rounded(y).transpose(0, 1)
    return o


def logs(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Draw logs of gates that forget little."""

    def drawn(name: str, *shape: int) -> Tensor:
        x = draw(name, *shape)
        return x.log() / 4 if name in ("theta", "alpha", "eta") else x

    return drawn


@pytest.mark.parametrize("case", CASES, ids=str)
def test_integers_of_the_plain_memory_are_exact(case: Case) -> None:
    args = given(Case(**vars(case) | {"plain": True}), integers(0))
    exact = outputs(args, torch.float64, lambda x: x)
    assert torch.equal(exact, exact.bfloat16().double())
    assert torch.equal(run(args, 1).double(), exact)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_order_of_events_changes_no_bit_and_errors_are_those_of_the_portable_kernel(case: Case) -> None:
    """At most twice those of its arithmetic, which rounds the same operands."""
    log = case.T == 133
    args = given(case, logs(normal(0)) if log else normal(0), log_gates=log)
    exact = outputs(args, torch.float64, lambda x: x)
    portable = outputs(args, torch.float32, lambda x: x.bfloat16().float())
    made = run(args, 0)
    assert (made - exact).norm() <= 2 * (portable - exact).norm()
    for order in ORDERS[1:3]:
        assert torch.equal(run(args, order, SIZES[order % 3]), made), order


def test_what_is_not_finite_stays_in_its_sequence_and_head() -> None:
    """The row after a tail is another sequence's."""
    args = given(Case(64, 200, cu_seqlens=(0, 100, 200)), normal(0))
    clean = run(args, 0)
    args.call.k[0, 100, 1], args.u[0, 101, 1], args.call.theta[0, 103, 1] = torch.nan, torch.inf, torch.nan
    made = run(args, 0)
    assert made[0, 100:164, 1].isnan().all()
    assert torch.equal(made[0, :100], clean[0, :100])
    assert torch.equal(made[0, :, 0], clean[0, :, 0])


WHOLE, RAGGED = Case(64, 320), Case(40, 200, cu_seqlens=(0, 100, 200), offset=(7, 0))
FREE = "            mbarrier.wait(flags.done.index(slot), (i // ROWS - 1) & 1)\n"
BEFORE = "            mbarrier.wait(flags.done.index(before % ROWS), (before // ROWS) & 1)\n"
G_FREE = "        mbarrier.wait(flags.G_free.index(slot), ((i // GRAMS) & 1) ^ 1)\n"
LAST = "length, H, tile)\n        if i >= SQUARES"
PHASE = "(i // GRAMS) & 1"
STORE_O = "        slots.o.store(o.to(gl.bfloat16))\n"
FAULTS = {
    "slots refilled before they have been read": (WHOLE, FREE, "            pass\n"),
    "M0 refilled before it has been read": (WHOLE, BEFORE, ""),
    "the slots of M0 waited for with the parity of the rows": (WHOLE, "(before // ROWS) & 1)", "(i // ROWS) & 1)"),
    "coefficients overwritten before they have been read": (WHOLE, G_FREE, ""),
    "the outputs wait for the wrong parity": (WHOLE, f"{PHASE})\n        G =", f"{PHASE} ^ 1)\n        G ="),
    "u of another slot": (WHOLE, "slots.u.index(slot)\n", "slots.u.index((slot + 1) % ROWS)\n"),
    "rows of G one too far": (WHOLE, "offs = offs_j - band * BAND", "offs = offs_j - band * BAND - 1"),
    "n in the place of G": (WHOLE, "gl.expand_dims(G, 0), G_band", "gl.expand_dims(n, 0), G_band"),
    "f without the decay of S": (WHOLE, "(eta, eta, a), 0, then", "(eta * 0 + 1, eta, a), 0, then"),
    "gates of the chunk after the next": (WHOLE, "gl.minimum(i + 1, steps - 1)", "gl.minimum(i + 2, steps - 1)"),
    "o overwritten before the engine has read it": (WHOLE, f"        tma.store_wait(0)\n{STORE_O}", STORE_O),
    "o not fenced": (WHOLE, f"{STORE_O}        fence_async_shared()\n", STORE_O),
    "rows after a sequence written": (RAGGED, "if step.length == C:", "if step.length > 0:"),
    "rows after a sequence read": (RAGGED, f"step.{LAST}", LAST.replace("length", "C")),
    "mean over the padded width": (RAGGED, "mean(y, tile.D)", "mean(y, tile.BD)"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_noticed(name: str) -> None:
    """By wrong results, a deadlock or a read of what is not fenced, in some order."""
    case, old, new = FAULTS[name]
    assert (gluon_interpreter.KERNELS / "hopper" / "output.py").read_text().count(old) == 1
    args = given(case, normal(0))
    if case.cu_seqlens:
        args.u[0, case.cu_seqlens[1]] = torch.inf
    right = run(args, 0)
    for order in range(4 * len(ORDERS)):
        try:
            wrong = run(args, order, SIZES[order % 3], lambda text: text.replace(old, new))
        except (gluon_interpreter.Deadlock, AssertionError):
            return
        if not torch.equal(right.nan_to_num(), wrong.nan_to_num()):
            return
    pytest.fail("not noticed")


@pytest.mark.parametrize("places", [132, 6, 1])
@pytest.mark.parametrize("case", [Case(64, 133), Case(40, 150, cu_seqlens=(0, 0, 70, 150), offset=(3, 0, 63))], ids=str)
def test_the_whole_forward_is_exact_for_integers(case: Case, places: int) -> None:
    """With the chain that hands over, and few or many programs."""
    call = given(Case(**vars(case) | {"plain": True}), integers(0)).call
    layout = layout_of(call, block_rows(call.q))
    where, tile, D = where_of(call, layout), tile_of(call, layout), case.D
    squares = (torch.full((layout.slots, H, D, D), torch.nan, dtype=torch.bfloat16) for _ in range(2))
    saved = Saved(*squares, torch.full_like(call.q, torch.nan), torch.empty(0))
    final, o = State(*(torch.full_like(call.M, torch.nan) for _ in range(3))), torch.full_like(call.q, torch.nan)
    with gluon_copies.interpreted("forward") as module:
        module.multiprocessors = lambda device: places
        module.launch_forward(call, where, tile, layout.slots, saved, final, o, None)
    exact = chunk.forward(Call(*(x.double() if is_float(x) else x for x in call)), log_space=False)[:4]
    for value, true in zip((o, *final), exact, strict=True):
        assert torch.equal(true, true.bfloat16().double())
        assert torch.equal(value.double(), true)


def is_float(x: object) -> bool:
    """Whether to convert it."""
    return isinstance(x, Tensor) and x.is_floating_point()


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("case", [Case(64, 133), Case(64, 150, cu_seqlens=(0, 0, 70, 150), offset=(3, 0, 63))], ids=str)
def test_ends_of_the_chunks_are_the_last_rows(case: Case, log: bool) -> None:
    """Up to 2 C roundings, each to half a unit."""
    call = given(case, logs(normal(0)) if log else normal(0), log_gates=log).call
    exact, layout = ends(call, torch.float64), layout_of(call, block_rows(call.q))
    tile = tile_of(call, layout, log)
    with gluon_copies.interpreted("forward") as module:
        made = sys.modules["titans.kernels.hopper.ends"]
        tokens = gluon_interpreter.pointers(module.Tokens(*call[:3], call.theta, call.alpha, call.eta))
        for (slot, B, rows), h in itertools.product(all_pieces(call), range(H)):
            length = rows.stop - rows.start
            step = Step(H, (B * call.q.shape[1] + rows.start) * H + h, length, None, None, None)
            c_s = gluon_interpreter.allocate_shared_memory(torch.float32, [5, C], gluon_interpreter.Layout())
            gluon_interpreter.current[:] = [gluon_interpreter.Program(0, 0)]
            gates = made.load_gates(tokens, step, None)
            gluon_interpreter.current[0].run([(made.store_end, (c_s, 0, gates, length, tile, None))])
            found = c_s.load(None)
            # and one for 1 - alpha, and two for an exp
            for value, true in (
                (found[:2, :length], exact.weights[slot, h, :, :length]), (found[2:, 0], exact.transition[slot, h])
            ):  # fmt: skip
                assert torch.all((value - true).abs() <= (2 * C + 3 * C) * torch.finfo(torch.float32).eps / 2 * true)
            assert not found[:2, length:].any()


@pytest.mark.parametrize("order", range(50))
def test_every_chain_has_one_follower_which_begins_after_it(order: int) -> None:
    """Programs begin on any multiprocessors, and take turns at every atomic operation."""
    chains = 1 + order % 7
    numbers = torch.zeros(LINE, dtype=torch.int32)
    tickets = gluon_interpreter.pointers(numbers)
    chosen: dict[bool, list[int]] = {True: [], False: []}

    def begin(role_of_pair: Callable[..., tuple[Tensor, Tensor]]) -> None:
        is_chain, pid = role_of_pair(tickets, chains)
        # there is a program that has taken this number for its chain
        assert pid < numbers[0]
        chosen[bool(is_chain)].append(int(pid))

    with gluon_copies.interpreted("output"):
        handover = sys.modules["titans.kernels.hopper.handover"]
        add = handover.gl.atomic_add

        def add_in_turn(*args: Any, **options: Any) -> Tensor:
            gluon_interpreter.here().wait(lambda: True)
            return add(*args, **options)

        gluon_interpreter.current[:] = [gluon_interpreter.Program(0, order)]
        with patch.object(handover.gl, "atomic_add", add_in_turn):
            gluon_interpreter.current[0].run([(begin, (handover.role_of_pair,))] * (2 * chains))
    assert sorted(chosen[True]) == sorted(chosen[False]) == [*range(chains)]

"""The Hopper kernel of the chain, interpreted on the CPU with its events in many orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.titans import gluon_copies, gluon_interpreter
from titans.arguments import Call
from titans.kernels.tile import End, Saved, State, block_rows, tile_of, where_of
from titans.partition import layout_of

C, H = 64, 2
LINE = 32
# each policy of the interpreter, and another order of one
ORDERS = range(4)
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
    Case(64, 133, B=2),
    Case(40, 133, B=2),
    Case(96, 5),
    Case(128, 130, B=3, offset=(5, 63, 56)),
    Case(64, 300, cu_seqlens=PACKED, offset=(3, 0, 63, 0, 0, 0, 9)),
    Case(40, 300, cu_seqlens=PACKED, offset=(3, 0, 63, 0, 0, 0, 9)),
    Case(128, 300, cu_seqlens=PACKED),
]


class Made(NamedTuple):
    """What the launch writes."""

    M0: Tensor
    S0: Tensor
    x: Tensor
    r: Tensor
    M: Tensor
    S: Tensor
    anchor: Tensor


Draw = Callable[..., Tensor]


def given(case: Case, draw: Draw, log_gates: bool = False) -> Call:
    """Draw the arguments; `draw` takes the name of what is drawn and a shape."""
    B, T, D = case.B, case.T, case.D
    N = B if case.cu_seqlens is None else len(case.cu_seqlens) - 1
    q, k, v = (draw("k", B, T, H, D).bfloat16() for _ in range(3))
    w, b = (None if case.plain else draw("w", H, D).bfloat16() for _ in range(2))
    gates = [draw(name, B, T, H) for name in ("theta", "alpha", "eta")]
    offset = None if case.offset is None else torch.tensor(case.offset)
    cu_seqlens = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens)
    M, S, anchor = (draw("state", N, H, D, D) for _ in range(3))
    return Call(q, k, v, w, b, *gates, M, S, anchor, offset, cu_seqlens, 1e-6, C, log_gates)


def run(
    call: Call, order: int, change: Callable[[str], str] = lambda text: text, places: int = 2**20,
    changed: str = "state", recorded: bool = True,
) -> Made:  # fmt: skip
    """Launch the kernel on poisoned outputs, without the programs of the outputs where they are others."""
    layout, D = layout_of(call, block_rows(call.q)), call.q.shape[-1]
    squares = (torch.full((layout.slots, H, D, D), torch.nan, dtype=torch.bfloat16) for _ in range(2))
    saved = Saved(*squares, torch.full_like(call.q, torch.nan), torch.full(call.q.shape[:3], torch.nan))
    final = State(*(torch.full_like(call.M, torch.nan) for _ in range(3)))
    o, counts = torch.full_like(call.q, torch.nan), []
    chains: list[int] = []
    followed: list[int] = []

    def see(chunks: int) -> None:
        """What is handed over has been stored."""
        n, h = divmod(chains[-1], H)
        for slot, B, rows in list(pieces(call, n))[:chunks]:
            stored = [saved.M0[slot, h], saved.S0[slot, h], saved.x[B, rows, h]]
            assert not any(x.isnan().any() for x in stored)

    gluon_interpreter.seeds[0] = order
    released = [see] if recorded and bool(call.k.isfinite().all()) else []
    with (
        patch.object(gluon_interpreter, "released", released),
        gluon_copies.interpreted("forward", change, changed) as module,
    ):
        run_chain = module.run_chain

        def run_numbered(pid: Tensor, *arguments: Any) -> None:
            chains.append(int(pid))
            run_chain(pid, *arguments)

        def follow(pid: Tensor, *arguments: Any) -> None:
            """The programs of the outputs have tests of their own."""
            assert int(pid) in chains
            followed.append(int(pid))
            counts[:] = arguments[4].flat.view(-1, LINE)[:-1, 0].tolist()

        module.run_chain, module.run_outputs = run_numbered, follow
        module.multiprocessors = lambda device: places
        tile = tile_of(call, layout, call.log_gates)
        given = (call, where_of(call, layout), tile, layout.slots, saved if recorded else None)
        module.launch_forward(*given, final, o, None)
    if counts:
        assert counts == [len(list(pieces(call, n))) for n in range(len(call.M)) for _ in range(H)]
    assert sorted(chains) == sorted(followed) == [*range(len(counts))]
    return Made(*saved[:4], *final)


def pieces(call: Call, n: int) -> Iterator[tuple[int, int, slice]]:
    """Slot, row of the batch, and tokens of each piece of sequence n."""
    cu, slack, slots = call.cu_seqlens, C - 1 + (C - 1) * (call.offset is not None), layout_of(call, C).slots
    B, begin, L = (n, 0, call.q.shape[1]) if cu is None else (0, int(cu[n]), int(cu[n + 1] - cu[n]))
    first = n * slots // len(call.M) if cu is None else (begin + n * slack) // C
    offset = 0 if call.offset is None else int(call.offset[n])
    for i in range((offset + L - 1) // C + 1) if L else ():
        yield first + i, B, slice(begin + max(i * C - offset, 0), begin + min((i + 1) * C - offset, L))


def norm(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Eq. (2): x and r."""
    y = y - y.mean(-1, keepdim=True)
    r = ((y * y).mean(-1, keepdim=True) + eps).rsqrt()
    return y * r, r


def ends(call: Call, dtype: torch.dtype) -> End:
    """Eq. (7) at the end of each piece, token by token."""
    K = layout_of(call, block_rows(call.q)).slots
    end = End(torch.full((K, H, 2, C), torch.nan, dtype=dtype), torch.full((K, H, 3), torch.nan, dtype=dtype))
    for n in range(len(call.M)):
        for slot, B, rows in pieces(call, n):
            theta, alpha, eta = (g[B, rows].to(dtype).T for g in (call.theta, call.alpha, call.eta))
            theta, a, eta = (theta.exp(), alpha.exp(), eta.exp()) if call.log_gates else (theta, 1 - alpha, eta)
            n_L, G_L, f = torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros(H, dtype=dtype)
            beta, m = torch.ones(2, H, dtype=dtype)
            for t in range(rows.stop - rows.start):
                n_L = torch.where(torch.arange(rows.stop - rows.start) == t, theta, eta[:, t, None] * n_L)
                G_L, m, beta = a[:, t, None] * G_L + n_L, eta[:, t] * m, a[:, t] * beta
                f = a[:, t] * f + m
            end.weights[slot, :, :, : rows.stop - rows.start] = torch.stack((n_L, G_L), 1)
            end.transition[slot] = torch.stack((beta, f, m), 1)
    return end


def forward(call: Call, dtype: torch.dtype, rounded: Callable[[Tensor], Tensor]) -> tuple[Made, Tensor]:
    """Eq. (7)-(10), and which slots are used; operands of products and what is stored are `rounded`."""
    end = ends(call, dtype)
    layout, D = layout_of(call, block_rows(call.q)), call.q.shape[-1]
    w, b = (None if x is None else x.to(dtype)[:, None] for x in (call.w, call.b))
    squares = (torch.full((layout.slots, H, D, D), torch.nan, dtype=dtype) for _ in range(2))
    made = Made(
        *squares, *(torch.full(shape, torch.nan, dtype=dtype) for shape in (call.q.shape, call.q.shape[:3])),
        *(x.to(dtype, copy=True) for x in (call.M, call.S, call.anchor)),
    )  # fmt: skip
    used = torch.zeros(layout.slots, dtype=torch.bool)
    for n in range(len(call.M)):
        M, S, A = made.M[n].clone(), made.S[n].clone(), made.anchor[n].clone()
        offset = 0 if call.offset is None else int(call.offset[n])
        done = offset
        for slot, B, rows in pieces(call, n):
            k, v = (t[B, rows].to(dtype).transpose(0, 1) for t in (call.k, call.v))
            length = rows.stop - rows.start
            done += length
            used[slot] = True
            n_L, G_L = end.weights[slot, :, :, :length][..., None].unbind(1)
            beta, f, m = end.transition[slot][:, :, None, None].unbind(1)
            made.M0[slot], made.S0[slot] = rounded(M), rounded(S)
            x = k @ rounded(A)
            u = x - v
            if w is not None and b is not None:
                x, r = norm(x, call.eps)
                e = (x * w + b - (v - k)) * w
                u = r * (e - e.mean(-1, keepdim=True) - x * (e * x).mean(-1, keepdim=True))
                made.r[B, rows] = r[..., 0].T
            made.x[B, rows] = rounded(x).transpose(0, 1)
            M = beta * M + f * S - k.mT @ rounded(2 * G_L * u)
            S = m * S - k.mT @ rounded(2 * n_L * u)
            if done % C == 0:
                A = M.clone()
        made.M[n], made.S[n], made.anchor[n] = M, S, A
    return made, used


def parts(made: Made, used: Tensor, plain: bool) -> dict[str, Tensor]:
    """What a launch has to write."""
    named = {"M0": made.M0[used], "S0": made.S0[used]} | made._asdict() | {"M0": made.M0[used], "S0": made.S0[used]}
    return {name: x for name, x in named.items() if name != "r" or not plain}


def integers(seed: int) -> Draw:
    """Numbers so small and so few that every result of the plain memory fits bfloat16."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, *shape: int) -> Tensor:
        if name == "k":
            # one entry of a row is not zero
            sign = torch.randint(0, 2, (*shape[:-1], 1), generator=generator) * 2.0 - 1
            at = torch.randint(shape[-1], shape[:-1], generator=generator)
            return sign * torch.nn.functional.one_hot(at, shape[-1])
        if name == "theta":
            return (torch.rand(shape, generator=generator) < 0.2) / 2
        gate = name in ("alpha", "eta")
        return torch.randint(0 if gate else -1, 2, shape, generator=generator).float()

    return draw


def normal(seed: int) -> Draw:
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator)
        return x.sigmoid() if name in ("theta", "alpha", "eta") else x * (1 if name in "wk" else 0.1)

    return draw


# chain and outputs in programs of their own, and in one with a multiprocessor of its own, or half of one
PLACES = {"apart": 2**20, "fused": 13, "shared": 1}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_integers_of_the_plain_memory_are_exact(case: Case, places: str) -> None:
    call = given(Case(**vars(case) | {"plain": True}), integers(0))
    made, used = forward(call, torch.float64, lambda x: x)
    exact = parts(made, used, plain=True)
    for name, x in exact.items():
        assert torch.equal(x, x.bfloat16().double()), name
    for order in ORDERS[1:3]:
        again = run(call, order, places=PLACES[places])
        for name, value in parts(again, used, plain=True).items():
            assert torch.equal(value.double(), exact[name]), (name, order)
        assert again.M0[~used].isnan().all()
        assert again.S0[~used].isnan().all()


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_order_of_events_changes_no_bit_and_errors_are_those_of_the_portable_kernel(
    case: Case, places: str
) -> None:
    """At most twice those of its arithmetic, which rounds the same operands; recorded or not."""
    call = given(case, normal(0))
    exact, used = forward(call, torch.float64, lambda x: x)
    portable, _ = forward(call, torch.float32, lambda x: x.bfloat16().float())
    first = run(call, 0, places=PLACES[places])
    made, same, true = (parts(x, used, plain=False) for x in (first, portable, exact))
    for name in true:
        assert (made[name] - true[name]).norm() <= 2 * (same[name] - true[name]).norm(), name
    for order in ORDERS[1:]:
        again = parts(run(call, order, places=PLACES[places]), used, plain=False)
        assert all(torch.equal(made[name], again[name]) for name in made), order
    plain = run(call, 3, places=PLACES[places], recorded=False)
    assert all(torch.equal(x, y) for x, y in zip(plain[4:], first[4:], strict=True))


def test_what_is_not_finite_stays_in_its_sequence_and_head() -> None:
    """The row after a tail is another sequence's."""
    call = given(Case(64, 200, cu_seqlens=(0, 100, 200)), normal(0))
    clean = run(call, 0)
    call.k[0, 100, 1], call.v[0, 101, 1], call.theta[0, 102, 1] = torch.nan, torch.inf, torch.nan
    for places in PLACES.values():
        made = run(call, 0, places=places)
        assert made.M[1, 1].isnan().all()
        for value, before in ((made.M, clean.M), (made.S, clean.S)):
            assert torch.equal(value[0], before[0])
            assert torch.equal(value[1, 0], before[1, 0])
        assert torch.equal(made.x[0, :100], clean.x[0, :100])


WHOLE, RAGGED = Case(64, 256), Case(40, 200, cu_seqlens=(0, 100, 200), offset=(7, 0))
# more chunks than slots
LONG = Case(64, 448)
ENGINE_RAGGED = Case(64, 200, cu_seqlens=(0, 100, 200), offset=(7, 0))
HANDED = "hand_over(count_ptr, pid, i + 1"
COUNTED = "        all_stored(chunks)\n"
READ = "        mbarrier.wait(read.index(0), (i & 1) ^ 1)\n"
FULL = "mbarrier.wait(full.index(slot), i // STAGES & 1"
PARITY = "mbarrier.wait(done.index(i % STAGES), (i // STAGES) & 1"
UNFENCED = "        mbarrier.arrive(full, count=2)"
WEIGHT = "uG_s.store((as_column(c_s.index(first + "
LAST_STORE = "        S_s.store(S.to(gl.bfloat16))\n"
FAULTS = {
    "rows after the end of a sequence not cleared": (ENGINE_RAGGED, "if length < tile.BS:", "if length < 0:"),
    "M0 of the step before": (WHOLE, "(M0_engine, [row.to(gl.int32)", "(M0_engine, [row.to(gl.int32) - tile.D"),
    "the chain waits for the wrong parity": (WHOLE, f"{FULL})", f"{FULL} ^ 1)"),
    "the copies wait for the wrong parity": (WHOLE, f"{PARITY})", f"{PARITY} ^ 1)"),
    "the chain reads another slot of v": (
        WHOLE,
        "        if tile.BD <= 64:\n            target = load_target(k, v_s.index(slot)",
        "        if tile.BD <= 64:\n            target = load_target(k, v_s.index((slot + 1) % STAGES)",
    ),
    "operands asked for before their slot is free": (LONG, "if i >= STAGES:", "if i >= 2 * STAGES:"),
    "the loader waits for the wrong parity": (LONG, "(i // STAGES - 1) & 1", "(i // STAGES) & 1"),
    "the final anchor of an unfinished chunk is M": (ENGINE_RAGGED, "== 0, 1, 2)", "== 0, 1, 1)"),
    "the anchor of a resumed chunk is M": (ENGINE_RAGGED, "load_square(initial.anchor", "load_square(initial.M"),
    "n in the place of G": (WHOLE, f"{WEIGHT}G_L", f"{WEIGHT}N_L"),
    "u not fenced": (WHOLE, "        fence_async_shared()\n        k_T", "        k_T"),
    "A not fenced": (WHOLE, f"{LAST_STORE}        fence_async_shared()\n", LAST_STORE),
    "k not fenced": (RAGGED, f"        fence_async_shared()\n{UNFENCED}", UNFENCED),
    "operands announced before they have arrived": (RAGGED, "        async_copy.wait_group(0)\n", ""),
    "x and M0 overwritten before they are saved": (WHOLE, READ, ""),
    "M0 released before the engine has read it": (WHOLE, "tma.store_wait(0)\n", "pass\n"),
    "rows after a sequence written": (RAGGED, "mask=(t < length) &", "mask=(t < tile.BS) &"),
    "u handed over before it has been stored": (WHOLE, COUNTED, "        pass\n"),
    "a chunk handed over too early": (WHOLE, HANDED, f"{HANDED} + 1"),
    "the last chunk never handed over": (LONG, " | (i + 1 == steps)", ""),
    "mean over the padded width": (RAGGED, "mean(y, tile.D)", "mean(y, tile.BD)"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_noticed(name: str) -> None:
    """By wrong results, a deadlock, an access outside a tensor or a read of what is not fenced, in some order."""
    case, old, new = FAULTS[name]
    source = (gluon_interpreter.KERNELS / "hopper" / "state.py").read_text()
    assert source.count(old) == 1
    call = given(case, normal(0))
    if case.cu_seqlens:
        call.k[0, case.cu_seqlens[1]] = torch.inf
    right = run(call, 0)
    for order in ORDERS:
        try:
            wrong = run(call, order, lambda text: text.replace(old, new))
        except (gluon_interpreter.Deadlock, AssertionError):
            return
        if not all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(right, wrong, strict=True)):
            return
    pytest.fail("not noticed")

"""Law 18 on a GPU at real sizes: the bits of a sequence do not depend on how it is passed. `make test-gpu`

That a compiled call and one captured in a CUDA graph give the eager bits is tested in `test_gpu`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.titans.test_gpu import BF16, DEVICE, FP16, FP32, Case, compute, cotangents, leaves, mapped, names, same
from titans import TitansState, chunk_titans_linear, grid
from titans.arguments import Call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CASES = [
    # a batch of these fills the GPU, one of its sequences does not
    Case(BF16, D=64, C=64, H=32),
    Case(BF16, D=128, C=64, H=32),
    Case(BF16, D=96, C=64, plain=True),
    Case(BF16, D=64, C=16),
    Case(BF16, D=128, C=16, log_gates=True),
    Case(BF16, D=64, C=1, plain=True),
    Case(BF16, D=60, C=33, log_gates=True),
    Case(BF16, D=64, C=256),
    Case(BF16, D=64, C=200, log_gates=True),
    Case(BF16, D=128, C=1024),
    Case(FP16, D=64, C=64),
    Case(FP16, D=128, C=16),
    Case(FP32, D=64, C=16),
    Case(FP32, D=64, C=64, plain=True),
    Case(FP32, D=128, C=48),
    Case(FP32, D=32, C=512, log_gates=True),
]
# Both directions take longer to compile.
BACKWARD = [CASES[i] for i in (0, 1, 3, 7, 10, 12, 14)]
TOKENS = ("q", "k", "v", "theta", "alpha", "eta")
STATES = ("M", "S", "anchor")


def forward(call: Call, state: TitansState | Tensor | None) -> tuple[Tensor, TitansState]:
    """Outputs and final state of the tokens of a call, from a state."""
    with torch.no_grad():
        o, final = chunk_titans_linear(
            *call[:8], call.eps, call.chunk_size, state, True, cu_seqlens=call.cu_seqlens, log_gates=call.log_gates,
            backend="triton",
        )  # fmt: skip
    assert final is not None
    return o, final


def tokens(call: Call, begin: int, end: int | None = None) -> Call:
    """Some tokens of every sequence of a batch."""
    return call._replace(**{name: getattr(call, name)[:, begin:end] for name in TOKENS})


def grid_of(case: Case) -> int:
    return grid(case.dtype, case.D, case.C)


def long(case: Case) -> Call:
    """A call of more than two grids and three chunks, and some tokens."""
    return replace(case, B=3, T=max(500, 2 * grid_of(case) + 77, 3 * case.C + 77)).call()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_outputs_of_a_prefix_are_the_prefix_of_the_outputs(case: Case) -> None:
    call, g = long(case), grid_of(case)
    whole, _ = forward(call, call.M)
    for T in sorted({1, 15, 16, 63, 64, 65, g - 1, g, g + 1, 2 * g, 333, call.q.shape[1] - 1} - {0}):
        assert torch.equal(forward(tokens(call, 0, T), call.M)[0], whole[:, :T]), T


@pytest.mark.parametrize("case", CASES, ids=str)
def test_resuming_on_the_grid_gives_the_bits_of_one_call(case: Case) -> None:
    call, g = long(case), grid_of(case)
    T = call.q.shape[1]
    whole, final = forward(call, call.M)
    for cuts in ([g], [2 * g], [g, 2 * g], range(g, T, g)):
        # in many calls, a few hundred of them at most
        ends, state, o = [0, *[*cuts][:20], T], call.M, []
        for begin, end in pairwise(ends):
            part, state = forward(tokens(call, begin, end), state)
            o.append(part)
        assert same([torch.cat(o, 1), *state], [whole, *final]), ends


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_initial_state_is_one_of_zeros(case: Case) -> None:
    call = long(case)
    M = torch.zeros_like(call.M)
    o, final = forward(call, None)
    for zeros in (M, TitansState(M, M, M, torch.zeros(len(M), dtype=torch.int64, device=DEVICE))):
        o_too, final_too = forward(call, zeros)
        assert same([o, *final], [o_too, *final_too])


def among(call: Call, n: int, lengths: Sequence[int], number: float) -> tuple[Call, list[slice]]:
    """Sequence n of a batch, packed with others cut to these lengths, in which every value is this number."""
    parts = [call._replace(**{name: getattr(call, name)[i : i + 1] for name in (*TOKENS, *STATES)}) for i in range(3)]
    for i, part in enumerate(parts):
        if i != n:
            spoiled = {name: torch.full_like(getattr(part, name), number) for name in (*TOKENS[:3], *STATES)}
            parts[i] = tokens(part._replace(**spoiled), 0, lengths[i])
    sizes = [part.q.shape[1] for part in parts]
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    joined = {name: torch.cat([getattr(part, name) for part in parts], 1) for name in TOKENS}
    joined |= {name: torch.cat([getattr(part, name) for part in parts]) for name in STATES}
    packed = call._replace(**joined, cu_seqlens=bounds.int().to(DEVICE))
    return packed, [slice(*span) for span in pairwise(bounds.tolist())]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_in_a_batch_and_alone_give_the_same_bits(case: Case) -> None:
    call = long(case)
    whole, final = forward(call, call.M)
    for n, number in ((0, math.nan), (1, 2.0**10), (2, math.inf)):
        wanted = [whole[n : n + 1], *(x[n : n + 1] for x in final[:3])]
        one = call._replace(**{name: getattr(call, name)[n : n + 1] for name in (*TOKENS, "M")})
        o, alone = forward(one, one.M)
        assert same([o, *alone[:3]], wanted)
        packed, spans = among(call, n, (17, 0, 300), number)
        o, finals = forward(packed, packed.M)
        assert same([o[:, spans[n]], *(x[n : n + 1] for x in finals[:3])], wanted)


def gradients(call: Call, inflow: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradients of a call by name, without those that are sums over all sequences."""
    call = mapped(call, lambda x: x.detach().requires_grad_())
    found = dict(zip(names(call), compute(call, inflow), strict=True))
    return {name: x for name, x in found.items() if name[0] == "d" and name not in ("dw", "db")}


@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_packed_in_a_batch_and_alone_give_the_same_gradients(case: Case) -> None:
    call, n = long(case), 1
    inflow = cotangents(call)
    whole = gradients(call, inflow)
    packed, spans = among(call, n, (17, 0, 300), 2.0**10)
    do = [inflow[0][i : i + 1, : span.stop - span.start] for i, span in enumerate(spans)]
    packed_too = gradients(packed, [torch.cat(do, 1), *inflow[1:]])
    one = call._replace(**{name: getattr(call, name)[n : n + 1] for name in (*TOKENS, *STATES)})
    alone = gradients(one, [x[n : n + 1] for x in inflow])
    for name, x in alone.items():
        assert torch.equal(whole[name][n : n + 1], x), name
        own = packed_too[name][:, spans[n]] if name[1:] in TOKENS else packed_too[name][n : n + 1]
        assert torch.equal(own, x), name


@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_tokens_behind_the_loss_change_no_gradient(case: Case) -> None:
    call = long(case)
    do, *rest = cotangents(call)
    nothing = [torch.zeros_like(x) for x in rest]
    for T in (grid_of(case) + 5, call.q.shape[1] - 64):
        cut = torch.where(torch.arange(call.q.shape[1], device=DEVICE)[:, None, None] < T, do, 0)
        whole, prefix = gradients(call, [cut, *nothing]), gradients(tokens(call, 0, T), [do[:, :T], *nothing])
        for name, x in prefix.items():
            assert torch.equal(whole[name][:, :T] if name[1:] in TOKENS else whole[name], x), name


@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_a_recorded_call_gives_the_bits_of_a_plain_one(case: Case) -> None:
    call = long(case)
    o, final = forward(call, TitansState(*call[8:11], torch.zeros(3, dtype=torch.int64, device=DEVICE)))
    recorded = compute(mapped(call, lambda x: x.detach().requires_grad_()), cotangents(call))
    assert same(recorded[:4], [o, *final[:3]])


def shifted(x: Tensor) -> Tensor:
    """The same numbers, one element behind a multiple of 16 bytes."""
    room = x.new_empty(x.numel() + 1)
    room[1:] = x.flatten()
    return room[1:].view(x.shape)


@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_the_addresses_of_tensors_change_nothing(case: Case) -> None:
    """Triton compiles a kernel of its own for addresses that are no multiples of 16 bytes."""
    call = long(case)
    inflow = cotangents(call)
    wanted = compute(mapped(call, lambda x: x.detach().clone().requires_grad_()), inflow)
    moved = mapped(call, lambda x: shifted(x.detach()).requires_grad_())
    assert any(x.data_ptr() % 16 for x in leaves(moved))
    found = compute(moved, [shifted(x) for x in inflow])
    for name, x, y in zip(names(call), found, wanted, strict=True):
        assert torch.equal(x, y), name

"""Decoding with a state that carries its block: the bits of one call, from any place, in any company."""

import io
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from titans import (
    DecodeState,
    TitansState,
    chunk_titans_linear,
    titans_linear,
    titans_linear_prefill,
    titans_linear_step,
    validation,
)

# heads where there is no need for two
H = 1


@dataclass(frozen=True)
class Case:
    """A call with sequences that resume at `offsets`, one for each."""

    T: int
    D: int
    C: int
    offsets: tuple[int, ...] = (0,)
    plain: bool = False
    log_gates: bool = False
    dtype: torch.dtype = torch.float32
    backend: str = "triton"

    def arguments(self) -> dict[str, Any]:
        """Draw the arguments of one call."""
        generator = torch.Generator().manual_seed(self.T)
        B, T, D = len(self.offsets), self.T, self.D

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        theta, a, eta = (normal(B, T, H).sigmoid() for _ in range(3))
        gates = [0.1 * theta, 0.1 * a, eta]
        if self.log_gates:
            # some decays so close to 1 that their logs are summed
            gates = [theta.log(), torch.where(a > 0.5, -1e-3 * a, a.log()), eta.log()]
        q, k, v = (normal(B, T, H, D).to(self.dtype) for _ in range(3))
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        w, b = (None, None) if self.plain else (1 + normal(H, D).to(wide) / 8, normal(H, D).to(wide) / 8)
        gates = [x.to(wide) for x in gates]
        given = dict(
            zip(("q", "k", "v", "w", "b", "theta", "alpha", "eta"), (q, k / D**0.5, v, w, b, *gates), strict=True)
        )
        return given | {"chunk_size": self.C, "log_gates": self.log_gates, "backend": self.backend}

    def start(self) -> TitansState:
        """Where the sequences stand before the call."""
        generator = torch.Generator().manual_seed(1)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        shape = len(self.offsets), H, self.D, self.D
        M, S, anchor = (torch.randn(shape, generator=generator).to(wide) / 4 for _ in range(3))
        offset = torch.tensor(self.offsets)
        return TitansState(M, S, torch.where(offset[:, None, None, None] > 0, anchor, M), offset, self.C)

    def one_call(self, tokens: slice = slice(None)) -> tuple[Tensor, TitansState]:
        """Outputs and final state of one call over some tokens."""
        o, state = chunk_titans_linear(
            **segment(self.arguments(), tokens), initial_state=self.start(), output_final_state=True
        )
        assert state is not None
        return o, state


def segment(given: dict[str, Any], tokens: slice) -> dict[str, Any]:
    return given | {name: given[name][:, tokens] for name in ("q", "k", "v", "theta", "alpha", "eta")}


def step(given: dict[str, Any], t: int, state: DecodeState, rows: Any = slice(None), **options: Any) -> Any:
    token = {f"{name}_t": given[name][rows, t] for name in ("q", "k", "v", "theta", "alpha", "eta")}
    rest = {name: given[name] for name in ("w", "b", "chunk_size", "log_gates", "backend")}
    return titans_linear_step(**token, **rest, state=state, **options)


def decoded(given: dict[str, Any], state: DecodeState, tokens: range) -> tuple[Tensor, DecodeState]:
    outputs = []
    for t in tokens:
        o_t, state = step(given, t, state, in_place=True)
        outputs.append(o_t)
    return torch.stack(outputs, 1), state


def same(one: Any, other: Any) -> bool:
    """Whether the bits are the same."""
    views = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return all(
        x.shape == y.shape and x.dtype == y.dtype
        and torch.equal(x.contiguous().view(views[x.itemsize]), y.contiguous().view(views[y.itemsize]))
        for x, y in zip(one, other, strict=True)
    )  # fmt: skip


# rows of a block: 32, for D > 64 16
SHORT = Case(T=35, D=3, C=5, offsets=(2,))
CASES = {
    "chunks of a block": SHORT,
    "plain, float16": Case(T=34, D=3, C=5, plain=True, dtype=torch.float16),
    "log gates": Case(T=33, D=17, C=5, offsets=(3,), log_gates=True),
    "a chunk is a block": Case(T=33, D=3, C=32, offsets=(9,), dtype=torch.float16),
    "a chunk of two blocks": Case(T=34, D=3, C=40, offsets=(20,), log_gates=True),
    "a wide head": Case(T=18, D=65, C=64, plain=True),
    "C = 1": Case(T=33, D=3, C=1, plain=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_decoding_gives_the_bits_of_one_call(case: Case) -> None:
    o, final = case.one_call()
    outputs, state = decoded(case.arguments(), DecodeState.begin(case.start(), case.dtype), range(case.T))
    assert same([outputs], [o])
    reached = state.state(backend="triton")
    assert same(reached[:3], final[:3])
    assert torch.equal(reached.offset, final.offset)
    assert reached.chunk_size == case.C


def test_sequences_at_any_offset_are_decoded_together_as_alone() -> None:
    many = Case(T=8, D=3, C=5, offsets=(0, 1, 4))
    outputs, _ = decoded(many.arguments(), DecodeState.begin(many.start(), many.dtype), range(many.T))
    assert same([outputs], [many.one_call()[0]])


def test_the_state_after_any_token_is_that_of_one_call_and_goes_on() -> None:
    case = Case(T=7, D=3, C=5, offsets=(2,))
    given, state = case.arguments(), DecodeState.begin(case.start(), case.dtype)
    for t in range(case.T):
        _, state = step(given, t, state)
        reached, (_, final) = state.state(backend="triton"), case.one_call(slice(t + 1))
        assert same(reached[:3], final[:3])
        assert torch.equal(reached.offset, final.offset)
        again = DecodeState.begin(reached, case.dtype)
        assert same(again.state(backend="triton")[:3], final[:3])


@pytest.mark.parametrize("backend", ["chunk", "triton"])
def test_a_prefill_goes_on_as_one_call(backend: str) -> None:
    case = Case(T=36, D=3, C=5, offsets=(2, 0), backend=backend, plain=True)
    given, length = case.arguments(), 33
    prompt = segment(given, slice(length))
    o, state = titans_linear_prefill(**prompt, initial_state=case.start())
    rest, state = decoded(given, state, range(length, case.T))
    whole, final = case.one_call()
    if backend == "triton":
        assert same([o, rest], [whole[:, :length], whole[:, length:]])
        assert same(state.state(backend=backend)[:3], final[:3])
    assert torch.equal(state.state(backend=backend).offset, final.offset)


def test_a_prefill_without_a_state_begins_with_nothing() -> None:
    case = Case(T=3, D=3, C=5, backend="chunk")
    given = case.arguments()
    o, state = titans_linear_prefill(**given)
    expected, _ = titans_linear_prefill(**given, initial_state=torch.zeros(1, H, 3, 3))
    assert torch.equal(o, expected)
    assert state.place[0, 0].tolist() == [0, 3, 0]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"q": None}, TypeError, "`q` must be a torch.Tensor, got NoneType"),
        ({"v": torch.zeros(1, 4, H, 3)}, ValueError, r"`v` must have shape \(B, T, H, D\)"),
        ({"theta": torch.zeros(1, 4, H)}, ValueError, r"`theta` must have shape \(B, T, H\)"),
        ({"eta": torch.zeros(2, 3, H)}, ValueError, r"`eta` must have shape \(B, T, H\)"),
        ({"alpha": 0.5}, TypeError, "`alpha` must be a torch.Tensor, got float"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1"),
        ({"backend": "fast"}, ValueError, "`backend` must be None or one of"),
    ],
)
@pytest.mark.parametrize("start", [None, torch.zeros(1, H, 3, 3), Case(T=3, D=3, C=5).start()])
def test_a_prefill_takes_no_more_than_its_tokens(start: Any, change: Any, error: type[Exception], match: str) -> None:
    """Neither a gate nor a value is cut to the tokens of q."""
    given = Case(T=3, D=3, C=5, backend="chunk").arguments()
    with pytest.raises(error, match=match):
        titans_linear_prefill(**given | change, initial_state=start)


def test_a_prefill_checks_its_arguments_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again for each part and each token."""
    checked: list[int] = []

    def check(*arguments: Any) -> None:
        checked.append(1)
        check_tokens(*arguments)

    check_tokens = validation.check_tokens
    monkeypatch.setattr(validation, "check_tokens", check)
    case = Case(T=7, D=3, C=5, offsets=(2, 0), backend="chunk")
    titans_linear_prefill(**case.arguments(), initial_state=case.start())
    assert checked == [1]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_prefill_follows_autocast(resumed: bool) -> None:
    case = Case(T=70, D=3, C=5, offsets=(2, 0), backend="chunk")
    given, start = case.arguments(), case.start() if resumed else None
    rounded = given | {name: given[name].bfloat16() for name in "qkv"}
    expected, _ = titans_linear_prefill(**rounded, initial_state=start)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = titans_linear_prefill(**given, initial_state=start)
        inside = state.state()
    assert torch.equal(o, expected)
    # the products of a state are no operands of autocast
    assert same(inside[:3], state.state()[:3])


def test_a_prefill_without_values_gives_the_shapes() -> None:
    case = Case(T=3, D=3, C=2, offsets=(1, 0), backend="chunk")
    given = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in case.arguments().items()}
    o, state = titans_linear_prefill(**given, initial_state=case.start().to("meta"))
    assert (o.shape, o.device.type, state.state().M.shape) == ((2, 3, H, 3), "meta", (2, H, 3, 3))


def exact(dtype: torch.dtype, C: int, T: int = 70) -> tuple[dict[str, Any], TitansState]:
    """Small integers and powers of two, of which every order of operations makes the same numbers."""
    generator = torch.Generator().manual_seed(C)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator).to(dtype)

    q, k, v = (integers(2, T, 2, 2) for _ in range(3))
    theta = torch.where(torch.rand(2, T, 2, generator=generator) > 0.8, 0.5, 0.0).to(dtype)
    alpha, eta = torch.ones(2, T, 2, dtype=dtype), torch.zeros(2, T, 2, dtype=dtype)
    alpha[:, 1::2] = 0
    given = {"q": q, "k": k, "v": v, "w": None, "b": None, "theta": theta, "alpha": alpha, "eta": eta}
    M = integers(2, 2, 2, 2)
    given |= {"chunk_size": C, "log_gates": False, "backend": None}
    return given, TitansState(M, integers(2, 2, 2, 2), M, torch.zeros(2, dtype=torch.int64), C)


@pytest.mark.parametrize("C", [1, 5, 16, 33, 40])
def test_in_pytorch_decoding_is_the_definition(C: int) -> None:
    given, start = exact(torch.float64, C)
    arguments = {name: x for name, x in given.items() if name != "backend"}
    o, final = titans_linear(**arguments, initial_state=start, output_final_state=True)
    assert final is not None
    outputs, state = decoded(given, DecodeState.begin(start, torch.float64), range(o.shape[1]))
    assert torch.equal(outputs, o)
    reached = state.state()
    assert all(torch.equal(x, y) for x, y in zip(reached, final, strict=True))


@pytest.mark.parametrize("log_gates", [False, True])
@pytest.mark.parametrize("backend", ["recurrent", "triton"])
def test_a_state_serves_the_kernels_and_pytorch_alike(backend: str, log_gates: bool) -> None:
    """Begun by one and continued by the other: integers, so that both make the same numbers."""
    given, start = exact(torch.float32, 5, T=9)
    if log_gates:
        logs = {"theta": given["theta"].log(), "alpha": (1 - given["alpha"]).log(), "eta": given["eta"].log()}
        given |= logs | {"log_gates": True}
    other = {"recurrent": "triton", "triton": "recurrent"}[backend]
    _, state = decoded(given | {"backend": backend}, DecodeState.begin(start, torch.float32), range(4))
    one, _ = decoded(given | {"backend": backend}, state.clone(), range(4, 9))
    two, _ = decoded(given | {"backend": other}, state.clone(), range(4, 9))
    assert torch.equal(one, two)


def test_sequences_of_a_state_can_be_chosen_and_put_together() -> None:
    given, start = exact(torch.float32, 5, T=9)
    state = decoded(given, DecodeState.begin(start, torch.float32), range(3))[1]
    o, _ = decoded(given, state.clone(), range(3, 9))
    turned = {name: x.flip(0) if isinstance(x, Tensor) else x for name, x in given.items()}
    assert torch.equal(decoded(turned, state.select([1, 0]), range(3, 9))[0], o.flip(0))
    parts = [state.select(n) for n in (0, 1)]
    assert not {x.data_ptr() for x in parts[0]} & {x.data_ptr() for x in state}
    again = DecodeState(*map(torch.cat, zip(*parts, strict=True)), chunk_size=5)
    assert torch.equal(decoded(given, again, range(3, 9))[0], o)


@pytest.mark.parametrize("backend", ["recurrent", "triton"])
def test_a_step_moves_a_copy_unless_it_is_told_to_move_the_state(backend: str) -> None:
    given, start = exact(torch.float32, 2, T=9)
    given["backend"] = backend
    state = DecodeState.begin(start, torch.float32)
    before, places = state.clone(), [x.data_ptr() for x in state]
    # of two tokens the second moves the memory
    _, moved = step(given, 1, step(given, 0, state)[1])
    assert same(state, before)
    assert not {x.data_ptr() for x in moved} & set(places)
    for t in range(2):
        _, own = step(given, t, state, in_place=True)
        assert own is state
    assert [x.data_ptr() for x in state] == places
    assert same(state, moved)
    assert not same(state, before)


def test_a_state_survives_saving_and_trees() -> None:
    given, start = exact(torch.float32, 5, T=4)
    state = decoded(given, DecodeState.begin(start, torch.float32), range(3))[1]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, DecodeState)
    assert loaded.chunk_size == 5
    assert same(loaded, state)
    mapped = tree_map(lambda x: x + 0, state)
    assert isinstance(mapped, DecodeState)
    assert same(mapped, state)
    with pytest.raises(ValueError, match="`chunk_size` must be given"):
        mapped.state()
    assert same(mapped.state(5)[:3], state.state()[:3])
    assert {x.device.type for x in state.to("meta", non_blocking=True)} == {"meta"}
    assert same(state.to("cpu", copy=True), state)
    assert state.to("cpu", copy=True).M.data_ptr() != state.M.data_ptr()


def test_a_state_shares_no_memory_with_the_one_it_is_begun_from() -> None:
    _, start = exact(torch.float32, 5, T=4)
    state = DecodeState.begin(start, torch.float32)
    pointers = [x.data_ptr() for x in state]
    assert len(set(pointers)) == len(pointers)
    assert not set(pointers) & {x.data_ptr() for x in start}


class Step(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: DecodeState) -> Any:
        return titans_linear_step(q, k, v, None, None, gate, gate, gate, state, chunk_size=5, in_place=True)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_step_takes_the_states_of_any_number_of_sequences(strict: bool) -> None:
    """Also a test of the order of the fields: `torch.export` replaces names that others begin with."""

    def arguments(N: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(N)
        q, k, v = torch.randn(3, N, H, 3, generator=generator)
        M, S, anchor = torch.randn(3, N, H, 3, 3, generator=generator)
        begun = DecodeState.begin(TitansState(M, S, anchor, torch.arange(N) % 5), torch.float32, 5)
        return q, k, v, torch.rand(N, H, generator=generator), begun

    any_size: Any = {0: torch.export.Dim("N", min=2)}
    fields = DecodeState(*[any_size] * len(DecodeState._fields))
    program = torch.export.export(Step(), arguments(2), strict=strict, dynamic_shapes=(*[any_size] * 4, fields))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    *token, moved = arguments(3)
    *_, expected = arguments(3)
    o, state = torch.export.load(file).module()(*token, moved)
    assert same([o], [Step()(*token, expected)[0]])
    assert same(state, expected)
    assert same(moved, expected)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_prefill_goes_on_from_a_state(fullgraph: bool) -> None:
    given, start = exact(torch.float64, 5, T=4)
    options = {"chunk_size": 5, "initial_state": start, "backend": "chunk"}
    tokens = [given[name] for name in ("q", "k", "v", "w", "b", "theta", "alpha", "eta")]
    torch._dynamo.reset()
    compiled: Any = torch.compile(titans_linear_prefill, backend="eager", fullgraph=fullgraph)
    (o, state), (expected, final) = compiled(*tokens, **options), titans_linear_prefill(*tokens, **options)
    assert torch.equal(o, expected)
    assert same(state.state(5)[:3], final.state(5)[:3])


def test_a_compiled_step_moves_the_state_in_place() -> None:
    given, start = exact(torch.float32, 2, T=4)
    state, own = (DecodeState.begin(start, torch.float32) for _ in range(2))
    compiled: Any = torch.compile(lambda t, x: step(given, t, x, in_place=True)[0], backend="aot_eager", fullgraph=True)
    for t in range(2):
        assert torch.equal(compiled(t, state), step(given, t, own, in_place=True)[0])
    assert same(state, own)


def test_mistakes_are_named() -> None:
    given, start = exact(torch.float32, 5, T=4)
    state = DecodeState.begin(start, torch.float32)
    wrong = [
        (state._replace(keys=state.keys[:, :, :3]), ValueError, r"`state.keys` must have shape \(B, H, R, D\)"),
        (state._replace(M=state.M.double()), TypeError, "`state.M` must have dtype float32 for tokens in float32"),
        (state._replace(u=None), TypeError, "`state.u` must be a torch.Tensor, got NoneType"),
        (state._replace(place=state.place + 40), ValueError, r"`state.place\[..., 0\]`, begin, must lie in"),
        (state.select([0]), ValueError, r"`state.M0` must have shape \(B, H, D, D\)"),
    ]
    for mistaken, error, match in wrong:
        with pytest.raises(error, match=match):
            step(given, 0, mistaken)
    with pytest.raises(ValueError, match="`chunk_size` must be that of the state, 5, got 4"):
        step(given | {"chunk_size": 4}, 0, state)
    with pytest.raises(ValueError, match=r"`state\.S` must be contiguous"):
        step(given, 0, DecodeState(*state._replace(S=state.S.mT), chunk_size=5), in_place=True)
    with pytest.raises(ValueError, match=r"`backend` must be None or one of .*'recurrent', got 'torch'"):
        state.state(backend="torch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`backend` 'triton' takes"):
        DecodeState.begin(TitansState(*(x.double() for x in start[:3]), start.offset), torch.float64, 5).state(
            backend="triton"
        )
    with pytest.raises(TypeError, match="`device` must be a device, got the dtype float64"):
        state.to(torch.float64)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`in_place` needs a DecodeState as `state`, got TitansState"):
        step(given, 0, start, in_place=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`state` must be a TitansState or a tuple of its 4 fields, got Tensor"):
        DecodeState.begin(start.M, torch.float32, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must satisfy 0 <= offset < chunk_size = 5"):
        DecodeState.begin(start._replace(offset=start.offset + 5), torch.float32, 5)
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1"):
        DecodeState.begin(TitansState(*start), torch.float32, 0)
    given["q"].requires_grad_()
    with pytest.raises(ValueError, match="`state` must be a TitansState where gradients are recorded"):
        step(given, 0, state)
    with torch.no_grad():
        step(given, 0, state)

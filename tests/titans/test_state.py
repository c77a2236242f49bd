"""States: what they are made of, how they travel, and every form in which a call takes one."""

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.titans.test_op import BACKENDS, B, C, D, H, arguments, packed, results, same, state
from titans import DecodeState, TitansState, chunk_titans_linear, titans_linear_step


def final(**options: Any) -> TitansState:
    _, reached = chunk_titans_linear(**arguments(**options))
    assert reached is not None
    return reached


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_the_same_state(copied: Any) -> None:
    one = final()
    other = copied(one)
    assert isinstance(other, TitansState)
    assert same([*other], [*one])
    assert other.chunk_size == C


def test_a_saved_and_loaded_state_resumes_the_sequence() -> None:
    """`torch.load` with `weights_only`, its default."""
    one, file = final(), io.BytesIO()
    torch.save(one, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, TitansState)
    assert same([*loaded], [*one])
    assert loaded.chunk_size == C
    resumed, again = (results(chunk_titans_linear, arguments(initial_state=x)) for x in (loaded, one))
    assert same(resumed, again)


def test_a_detached_state_ends_the_graph() -> None:
    given = arguments()
    given["k"].requires_grad_()
    _, one = chunk_titans_linear(**given)
    assert one is not None
    assert one.M.requires_grad
    cut = one.detach()
    assert not any(x.requires_grad for x in cut)
    assert same([*cut], [x.detach() for x in one])
    assert cut.chunk_size == C


def test_a_state_moves_as_a_whole() -> None:
    one = TitansState(*state(), chunk_size=C)
    for moved in (one.to("meta"), one.to(torch.device("meta")), one.to(torch.empty(0, device="meta"))):
        assert isinstance(moved, TitansState)
        assert {x.device.type for x in moved} == {"meta"}
        assert [x.dtype for x in moved] == [x.dtype for x in one]
        assert moved.chunk_size == C
    assert same([*one.cpu()], [*one])


def test_the_offset_of_a_state_in_another_dtype_is_an_integer() -> None:
    one = TitansState(*state(), chunk_size=C)
    half = one.to(torch.bfloat16)
    assert [x.dtype for x in half] == [torch.bfloat16] * 3 + [torch.int64]
    assert same([*half], [*(x.bfloat16() for x in one[:3]), one.offset])
    both = one.to("meta", torch.float64)
    assert [(x.device.type, x.dtype) for x in both] == [("meta", torch.float64)] * 3 + [("meta", torch.int64)]


def test_a_state_with_another_field_keeps_its_chunk_length() -> None:
    one = TitansState(*state(), chunk_size=C)
    assert one._replace().chunk_size == DecodeState.begin(one, torch.float32)._replace().chunk_size == C
    other = one._replace(M=one.S)
    assert isinstance(other, TitansState)
    assert same([*other], [one.S, *one[1:]])


def test_a_clone_shares_no_memory() -> None:
    one = final()
    clone = one.clone()
    assert same([*clone], [*one])
    assert not {x.data_ptr() for x in clone} & {x.data_ptr() for x in one}
    assert clone.chunk_size == C
    assert not {x.data_ptr() for x in one.to(copy=True)} & {x.data_ptr() for x in one}


@pytest.mark.parametrize("rows", [slice(1, 3), [2, 0, 2], torch.tensor([1, 1]), torch.tensor([True, False, True])])
def test_some_sequences_of_a_state(rows: Any) -> None:
    one = TitansState(*state(), chunk_size=C)
    some = one.select(rows)
    assert same([*some], [x[rows] for x in one])
    assert some.chunk_size == C


@pytest.mark.parametrize("n", [0, 2, -1, np.int64(1), torch.tensor(1)])
def test_one_sequence_of_a_state_goes_on_alone(n: Any) -> None:
    alone = state().select(n)
    n = int(n)
    assert same([*alone], [x[[n]] for x in state()])
    given = arguments(initial_state=state(), backend="recurrent")
    o, _ = chunk_titans_linear(**given)
    sequences = {name: given[name][[n]] for name in ("q", "k", "v", "theta", "alpha", "eta")}
    assert torch.equal(chunk_titans_linear(**given | sequences | {"initial_state": alone})[0], o[[n]])


def test_there_is_no_sequence_behind_the_last() -> None:
    with pytest.raises(IndexError):
        state().select(B)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_tuple_of_its_fields_is_a_state(backend: str) -> None:
    expected = results(chunk_titans_linear, arguments(initial_state=state(), backend=backend))
    o, _ = chunk_titans_linear(**arguments(initial_state=tuple(state()), backend=backend))
    assert torch.equal(o, expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_memory_starts_every_sequence(backend: str) -> None:
    M = state().M[0]
    for given in (arguments(backend=backend), packed(backend=backend)):
        shared, every = M.clone().requires_grad_(), M.expand(B, H, D, D).clone().requires_grad_()
        (o, one), (o_too, other) = (chunk_titans_linear(**given | {"initial_state": x}) for x in (shared, every))
        assert one is not None
        assert other is not None
        assert same([o, *one], [o_too, *other])
        o.sum().backward()
        o_too.sum().backward()
        assert shared.grad is not None
        assert every.grad is not None
        assert torch.equal(shared.grad, every.grad.sum(0))
    token = {f"{name}_t": given[name][:, 0] for name in ("q", "k", "v", "theta", "alpha", "eta")}
    o_t, _ = titans_linear_step(**token, w=None, b=None, state=M, backend=backend)
    assert torch.equal(o_t, titans_linear_step(**token, w=None, b=None, state=M[None], backend=backend)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_in_another_dtype_is_converted_like_a_memory_alone(dtype: torch.dtype, backend: str) -> None:
    """As mixed precision of FSDP passes it."""
    given = arguments(backend=backend)
    cast = TitansState(*(x.to(dtype) for x in state()[:3]), state().offset)
    back = TitansState(*(x.to(dtype).float() for x in state()[:3]), state().offset)
    (o, one), (o_too, other) = (chunk_titans_linear(**given | {"initial_state": x}) for x in (cast, back))
    assert one is not None
    assert other is not None
    assert same([o, *one], [o_too, *other])
    assert one.M.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_knows_its_chunk_length(backend: str) -> None:
    """Without a look at its tensors: a CUDA device need not be waited for."""
    one = final(backend=backend)
    assert one.chunk_size == C
    chunk_titans_linear(**arguments(initial_state=one))
    with pytest.raises(ValueError, match=f"`initial_state`.*{C}.*{C + 1}"):
        chunk_titans_linear(**arguments(initial_state=one, chunk_size=C + 1))
    given = arguments(T=1)
    token = {f"{name}_t": given[name][:, 0] for name in ("q", "k", "v", "theta", "alpha", "eta")}
    _, stepped = titans_linear_step(**token, w=None, b=None, state=one, chunk_size=C, backend=backend)
    assert stepped.chunk_size == C
    with pytest.raises(ValueError, match=f"`state`.*{C}.*16"):
        titans_linear_step(**token, w=None, b=None, state=one, backend=backend)


def test_a_compiled_call_returns_a_state_that_knows_its_chunk_length() -> None:
    given = arguments(initial_state=final())
    _, one = torch.compile(chunk_titans_linear, fullgraph=True, backend="aot_eager")(**given)
    assert isinstance(one, TitansState)
    assert one.chunk_size == C


class Module(torch.nn.Module):
    def forward(self, tokens: list[Tensor], gates: list[Tensor], start: TitansState, cu_seqlens: Tensor) -> Any:
        return chunk_titans_linear(*tokens, None, None, *gates, 0.25, C, start, True, cu_seqlens=cu_seqlens)


def test_an_exported_call_is_saved_with_its_state_and_takes_any_number_of_sequences() -> None:
    given, any_size = arguments(B=1), {0: torch.export.Dim.DYNAMIC}
    tokens, gates = [given[name] for name in "qkv"], [given[name] for name in ("theta", "alpha", "eta")]
    fixed: Any = ([None] * 3, [None] * 3)
    program = torch.export.export(
        Module(), (tokens, gates, state(), torch.tensor([0, 2, 3, 7])), strict=False,
        dynamic_shapes=(*fixed, TitansState(*[any_size] * 4), any_size),  # type: ignore[list-item]
    )  # fmt: skip
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for bounds in ([0, 2, 3, 7], [0, 3, 7], [0, 0, 2, 2, 7]):
        inputs = (tokens, gates, state(len(bounds) - 1), torch.tensor(bounds))
        (o, one), (o_too, other) = loaded(*inputs), Module()(*inputs)
        assert isinstance(one, TitansState)
        assert same([o, *one], [o_too, *other])

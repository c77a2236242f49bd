"""What the public functions add to the stages: states, autocast, autograd, compilation, and the choice of a backend."""

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

import titans.api
from titans import TitansState, check_gates, check_layout, chunk_titans_linear, titans_linear, titans_linear_step
from titans.arguments import Call

B, T, H, D, C = 3, 7, 2, 4, 3
NAMES = ("q", "k", "v", "w", "b", "theta", "alpha", "eta")
BACKENDS = ("recurrent", "chunk", "log")

Arguments = dict[str, Any]


def arguments(T: int = T, B: int = B, **options: Any) -> Arguments:
    """Everything that is differentiable, and `options`."""
    generator = torch.Generator().manual_seed(0)
    tokens = {name: torch.randn(B, T, H, D, generator=generator) for name in "qkv"}
    parameters = {name: torch.randn(H, D, generator=generator) for name in "wb"}
    gates = {name: torch.rand(B, T, H, generator=generator) for name in ("theta", "alpha", "eta")}
    # an eps that is not small tames the first chunk
    return tokens | parameters | gates | {"eps": 0.25, "chunk_size": C, "output_final_state": True} | options


def state(N: int = B, offset: bool = True) -> TitansState:
    generator = torch.Generator().manual_seed(1)
    M, S, anchor = torch.randn(3, N, H, D, D, generator=generator)
    return TitansState(M, S, anchor, torch.arange(N) % C if offset else torch.zeros(N, dtype=torch.int64))


def packed(**options: Any) -> Arguments:
    """A packed call of B sequences, one of them empty."""
    return arguments(B=1, cu_seqlens=torch.tensor([0, 3, 3, T]), **options)


def results(call: Callable[..., Any], given: Arguments) -> list[Tensor]:
    """o, the final state, and the gradients of everything that is differentiable."""
    leaves = {name: given[name].detach().clone().requires_grad_() for name in NAMES}
    start = given.get("initial_state")
    inner = [x.detach().clone().requires_grad_() for x in start[:3]] if isinstance(start, TitansState) else []
    if isinstance(start, TitansState):
        leaves["initial_state"] = TitansState(*inner, start.offset)
    o, final = call(**given | leaves)
    ends = [o, *final[:3]]
    generator = torch.Generator().manual_seed(2)
    inflow = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in ends]
    grads = torch.autograd.grad(ends, [leaves[name] for name in NAMES] + inner, inflow)
    return [x.detach() for x in (*ends, final.offset, *grads)]


def same(x: list[Tensor], y: list[Tensor]) -> bool:
    return len(x) == len(y) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(x, y, strict=True))


def test_titans_linear_is_the_recurrent_backend() -> None:
    given = arguments(initial_state=state())
    assert same(results(titans_linear, given), results(chunk_titans_linear, given | {"backend": "recurrent"}))


@pytest.mark.parametrize(("log_gates", "backend"), [(False, "chunk"), (True, "log")])
def test_the_default_on_a_cpu_follows_the_kind_of_gates(log_gates: bool, backend: str) -> None:
    given = arguments(log_gates=log_gates)
    if log_gates:
        given |= {name: given[name].log() for name in ("theta", "alpha", "eta")}
    found = results(chunk_titans_linear, given)
    same_as = {name: same(found, results(chunk_titans_linear, given | {"backend": name})) for name in BACKENDS}
    assert [name for name, equal in same_as.items() if equal] == [backend]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_last_axis_of_one_on_the_gates_changes_nothing(backend: str) -> None:
    given = arguments(backend=backend)
    with_axis = given | {name: given[name][..., None] for name in ("theta", "alpha", "eta")}
    o, final = chunk_titans_linear(**given)
    o_too, final_too = chunk_titans_linear(**with_axis)
    assert same([o, *final], [o_too, *final_too])


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("start", [state(), state().M, None], ids=["state", "M", "none"])
def test_a_step_is_a_call_of_one_token(start: TitansState | Tensor | None, backend: str | None) -> None:
    given = arguments(T=1, initial_state=start, backend=backend)
    o, final = chunk_titans_linear(**given | {"backend": backend or "recurrent"})
    token = {f"{name}_t": given.pop(name)[:, 0] for name in ("q", "k", "v", "theta", "alpha", "eta")}
    del given["output_final_state"]
    o_t, final_t = titans_linear_step(**token, **given | {"state": given.pop("initial_state")})
    assert final is not None
    assert same([o_t, *final_t], [o[:, 0], *final])


def test_a_state_is_returned_on_request() -> None:
    assert chunk_titans_linear(**arguments(output_final_state=False))[1] is None


def test_no_offset_is_computed_for_a_state_that_nobody_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it is a launch or several, in every call of a training."""
    monkeypatch.delattr(titans.api, "final_offset")
    chunk_titans_linear(**arguments(output_final_state=False))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do_is_no_error(backend: str) -> None:
    for given in (arguments(T=0), arguments(B=0), arguments(B=1, T=0, cu_seqlens=torch.tensor([0]))):
        o, final = chunk_titans_linear(**given, backend=backend)
        assert o.shape == given["q"].shape
        assert final is not None
        N = len(given["cu_seqlens"]) - 1 if "cu_seqlens" in given else len(o)
        assert final.M.shape == final.S.shape == final.anchor.shape == (N, H, D, D)
        assert final.offset.shape == (N,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_offset_counts_the_tokens_of_the_running_chunk(backend: str) -> None:
    """T = 7 tokens, C = 3, from offsets 0, 1 and 2; packed, of 3, 0 and 4 tokens."""
    for given, ends in (
        (arguments(), [1, 1, 1]),
        (arguments(initial_state=state()), [1, 2, 0]),
        (packed(), [0, 0, 1]),
        (packed(initial_state=state()), [0, 1, 0]),
    ):
        _, final = chunk_titans_linear(**given, backend=backend)
        assert final is not None
        assert final.offset.tolist() == ends


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
def test_kernels_see_w_and_b_in_no_narrower_dtype_than_the_tokens(
    narrow: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = titans.api.unrecorded
    monkeypatch.setattr(titans.api, "unrecorded", lambda *call: seen.append(Call(*call[:-1])) or real(*call))
    given = arguments()
    w, b = (given[name].to(narrow).requires_grad_() for name in "wb")
    o, _ = chunk_titans_linear(**given | {"w": w, "b": b}, backend="chunk")
    assert seen[0].w.dtype == seen[0].b.dtype == torch.float32
    assert {x.dtype for x in torch.autograd.grad(o.sum(), (w, b))} == {narrow}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_the_results(dtype: torch.dtype, backend: str) -> None:
    given = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in arguments().items()}
    found = results(chunk_titans_linear, given | {"backend": backend})
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    assert [x.dtype for x in found] == [dtype, inner, inner, inner, torch.int64, *[dtype] * len(NAMES)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_gates_are_raised_before_anything_else(backend: str) -> None:
    """So alpha near 1 keeps the bits that 1 - alpha has in float32."""
    given = arguments(backend=backend)
    half = {name: given[name].bfloat16() for name in ("theta", "alpha", "eta")}
    raised = {name: x.float() for name, x in half.items()}
    o, final = chunk_titans_linear(**given | half)
    o_too, final_too = chunk_titans_linear(**given | raised)
    assert same([o, *final], [o_too, *final_too])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_rounds_the_tokens_alone(backend: str) -> None:
    """Forward and backward: gates, parameters and states stay as they are, in float32."""
    given = arguments(initial_state=state(), backend=backend)

    def autocast(**given: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return chunk_titans_linear(**given)

    def by_hand(**given: Any) -> Any:
        return chunk_titans_linear(**given | {name: given[name].bfloat16() for name in "qkv"})

    found = results(autocast, given)
    assert same(found, results(by_hand, given))
    assert [x.dtype for x in found[:4]] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    assert {x.dtype for x in found[5:]} == {torch.float32}
    rounded = given | {name: given[name].bfloat16() for name in ("theta", "alpha", "eta", "w", "b")}
    assert not torch.equal(found[0], by_hand(**rounded)[0])


def test_autocast_leaves_float64_alone() -> None:
    given = {name: x.double() if isinstance(x, Tensor) else x for name, x in arguments().items()}
    with torch.autocast("cpu", torch.bfloat16):
        o, _ = chunk_titans_linear(**given)
    assert torch.equal(o, chunk_titans_linear(**given)[0])


@pytest.mark.parametrize(("kind", "backend"), [(arguments, "chunk"), (packed, "chunk"), (packed, "log")])
def test_a_compiled_call_gives_the_eager_bits(kind: Callable[..., Arguments], backend: str) -> None:
    """In one graph, forward and backward. Inductor does the same, but takes 20 s."""
    compiled = torch.compile(chunk_titans_linear, fullgraph=True, backend="aot_eager")
    given = kind(initial_state=state(), backend=backend)
    assert same(results(compiled, given), results(chunk_titans_linear, given))


def test_a_compiled_step_gives_the_eager_bits() -> None:
    given = arguments(T=1)
    token = [given[name][:, 0] for name in ("q", "k", "v")]
    gates = [given[name][:, 0] for name in ("theta", "alpha", "eta")]
    step = (*token, given["w"], given["b"], *gates, state(), 0.25, C)
    o, final = torch.compile(titans_linear_step, fullgraph=True, backend="aot_eager")(*step)
    o_too, final_too = titans_linear_step(*step)
    assert same([o, *final], [o_too, *final_too])


@pytest.mark.parametrize("backend", ["triton"])
def test_a_step_gives_the_same_bits_with_and_without_gradients(backend: str) -> None:
    """It is the same kernel: only the backward is that of the chunk form."""
    given = arguments(T=1)
    token = [given[name][:, 0] for name in ("q", "k", "v")]
    gates = [given[name][:, 0] for name in ("theta", "alpha", "eta")]

    def decode(start: TitansState) -> list[Tensor]:
        o, final = titans_linear_step(*token, given["w"], given["b"], *gates, start, 0.25, C, backend=backend)
        return [o, *final]

    recorded = decode(TitansState(*(x.clone().requires_grad_() for x in state()[:3]), state().offset))
    assert recorded[0].requires_grad
    assert same([x.detach() for x in recorded], decode(state()))


def saved(given: Arguments) -> int:
    """Number of elements that the backward keeps."""
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        sizes[x.data_ptr()] = x.numel()
        return x

    leaves = {name: given[name].clone().requires_grad_() for name in NAMES}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o, _ = chunk_titans_linear(**given | leaves)
    assert o.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("backend", ["chunk", "log"])
@pytest.mark.parametrize("chunks", [4, 32])
def test_the_backward_keeps_two_states_per_chunk(chunks: int, backend: str) -> None:
    """Beside the inputs and the initial state: linear in T, and no state per token."""
    given = arguments(T=chunks * C, backend=backend)
    inputs = sum(given[name].numel() for name in NAMES)
    assert saved(given) <= inputs + B * H * D * D * (3 + 2 * chunks)


def test_the_definition_can_be_differentiated_twice() -> None:
    given = arguments(T=2, B=1)
    q, k = (given.pop(name).double().requires_grad_() for name in "qk")
    given = {name: x.double() if isinstance(x, Tensor) else x for name, x in given.items()}
    assert torch.autograd.gradgradcheck(lambda q, k: titans_linear(q, k, **given)[0], (q, k))


@pytest.mark.parametrize("backend", ["chunk", "log"])
def test_the_chunk_form_refuses_to_be_differentiated_twice(backend: str) -> None:
    given = arguments(backend=backend)
    q, k = (given[name].requires_grad_() for name in "qk")
    (dq,) = torch.autograd.grad(chunk_titans_linear(**given)[0].sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="chunked_backward"):
        torch.autograd.grad(dq.sum(), k)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gates_may_take_every_value_of_their_closed_ranges(dtype: torch.dtype) -> None:
    ends = torch.tensor([0, torch.finfo(dtype).tiny, 0.5, 1], dtype=dtype)
    check_gates(torch.tensor([0, 1, 7, torch.finfo(dtype).max], dtype=dtype), ends, ends)
    logs = torch.tensor([-torch.inf, torch.finfo(dtype).min, -0.5, 0], dtype=dtype)
    check_gates(torch.tensor([-torch.inf, 0, 3, 80], dtype=dtype), logs, logs, log_gates=True)
    check_gates(*torch.empty(3, 2, 0, 4))


@pytest.mark.parametrize("name", ["theta", "alpha", "eta"])
@pytest.mark.parametrize("log_gates", [False, True])
def test_the_first_value_out_of_range_is_found(name: str, log_gates: bool) -> None:
    bad = [torch.nan, torch.inf, *([] if log_gates else [-(2.0**-149), -torch.inf])]
    if name != "theta":
        bad.append(2.0**-149 if log_gates else 1 + 2.0**-23)
    for value in bad:
        gates = {gate: torch.zeros(2, 3) for gate in ("theta", "alpha", "eta")}
        gates[name][1, 2] = value
        with pytest.raises(ValueError, match=rf"`{name}` .*\(1, 2\)"):
            check_gates(**gates, log_gates=log_gates)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_rounds_before_dtypes_are_compared(backend: str) -> None:
    """As attention does: under autocast one of three may be float32, as that of `torch.nn.functional.normalize` is."""
    given = arguments(backend=backend)
    by_hand = given | {name: given[name].bfloat16() for name in "qkv"}
    mixed = by_hand | {"k": given["k"]}
    with pytest.raises(TypeError, match="`k`"):
        chunk_titans_linear(**mixed)
    with torch.autocast("cpu", torch.bfloat16):
        o, final = chunk_titans_linear(**mixed)
        token = {f"{name}_t": mixed[name][:, 0] for name in ("q", "k", "v", "theta", "alpha", "eta")}
        assert titans_linear_step(**token, w=None, b=None, state=None)[0].dtype == torch.bfloat16
        half = state().to(torch.bfloat16)
        chunk_titans_linear(**mixed | {name: given[name].half() for name in ("w", "b", "theta")}, initial_state=half)
    assert final is not None
    o_too, final_too = chunk_titans_linear(**by_hand)
    assert same([o, *final], [o_too, *final_too])


@pytest.mark.parametrize("backend", BACKENDS)
def test_options_are_numbers_of_any_library(backend: str) -> None:
    given = arguments(backend=backend)
    numbers = {"eps": np.float32(0.25), "chunk_size": np.int64(C)}
    numbers |= {"output_final_state": np.True_, "log_gates": np.False_}
    (o, final), (o_too, final_too) = (chunk_titans_linear(**given | options) for options in ({}, numbers))
    assert final is not None
    assert final_too is not None
    assert same([o, *final], [o_too, *final_too])
    assert final.chunk_size == final_too.chunk_size
    assert type(final_too.chunk_size) is int


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [2.0**-149, 2.0**-126, 2.0**100])
def test_an_eps_that_float32_holds_gives_finite_results(eps: float, backend: str) -> None:
    given = arguments(eps=eps, backend=backend, T=2)
    assert all(x.isfinite().all() for x in results(chunk_titans_linear, given)[:4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_size", [2**31, 2**62, 2**63 - 1])
@pytest.mark.parametrize("make", [arguments, packed])
def test_one_chunk_for_everything(make: Callable[..., Arguments], chunk_size: int, backend: str) -> None:
    """Is a chunk of T + C tokens, for a sequence that is no longer, from wherever it resumes."""
    given = make(backend=backend)
    ends = [chunk_titans_linear(**given | {"chunk_size": size}) for size in (chunk_size, 2 * T)]
    assert same(*([o, *final] for o, final in ends))
    resumed = make(backend=backend, initial_state=state()._replace(offset=torch.tensor([0, 5, 2])))
    (o, final), (o_too, final_too) = (
        chunk_titans_linear(**resumed | {"chunk_size": size}) for size in (chunk_size, 32)
    )
    assert same([o, *final], [o_too, *final_too])


def test_the_definition_has_the_signature_of_the_op_but_for_the_backend() -> None:
    ours, all_ = (inspect.signature(function).parameters for function in (titans_linear, chunk_titans_linear))
    assert list(ours.values()) == [parameter for name, parameter in all_.items() if name != "backend"]
    assert "Literal" in str(get_type_hints(chunk_titans_linear)["backend"])


def test_the_layout_is_checked_on_request() -> None:
    q = torch.empty(B, T, H, D)
    check_layout(q)
    check_layout(q, heads=H)
    check_layout(q.transpose(1, 2), heads=T)
    for heads, hint in ((None, "transpose"), (H, "transpose"), (H + 1, str(H + 1))):
        with pytest.raises(ValueError, match=f"`q`.*{hint}"):
            check_layout(q.transpose(1, 2), heads)
    with pytest.raises(ValueError, match="`q`"):
        check_layout(q[0])
    with pytest.raises(TypeError, match=r"`q`.*list"):
        check_layout([1.0])  # type: ignore[arg-type]


def test_a_compiled_call_does_not_mind_that_dtensor_is_in_use() -> None:
    import torch.distributed.tensor

    given = arguments(backend="chunk")
    torch._dynamo.reset()
    compiled = torch.compile(chunk_titans_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given)[0], chunk_titans_linear(**given)[0])

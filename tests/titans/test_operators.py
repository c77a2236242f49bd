"""The registered operators: what PyTorch is promised of them, and what a call of one of them may hold."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.titans.test_op import BACKENDS, NAMES, Arguments, B, C, D, H, T, arguments, packed, state
from titans import chunk_titans_linear, titans_linear, titans_linear_step
from titans.arguments import Call
from titans.autograd import chunked, chunked_backward, step, unrecorded

PLAIN: Arguments = {"w": None, "b": None}
CALLS = {
    "a batch": arguments(B=2, T=2),
    "plain": arguments(B=2, T=2) | PLAIN,
    "packed": packed(),
    "resumed": arguments(B=2, T=2, initial_state=state(2)),
    "packed and resumed": packed(initial_state=state()) | PLAIN,
    "no tokens": arguments(T=0),
    "no sequences": arguments(B=0, T=2),
    "none packed": arguments(B=1, T=0, cu_seqlens=torch.tensor([0])),
}
OPERATORS = ["chunk", "log", "triton"]


def operands(given: Arguments, grad: bool = True) -> Call:
    """Arguments of the operators."""
    leaves = [None if given[name] is None else given[name].clone().requires_grad_(grad) for name in NAMES]
    N = given["cu_seqlens"].shape[0] - 1 if given.get("cu_seqlens") is not None else given["q"].shape[0]
    M, S, anchor = (x.clone().requires_grad_(grad) for x in state(N)[:3])
    offset = state(N).offset if given.get("initial_state") else None
    return Call(*leaves, M, S, anchor, offset, given.get("cu_seqlens"), 0.25, C, False)


def decoded(given: Arguments, grad: bool = True) -> Call:
    one = {name: given[name][:, :1] for name in ("q", "k", "v", "theta", "alpha", "eta")}
    return operands(given | one, grad)


@pytest.mark.parametrize("given", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("backend", OPERATORS)
def test_the_operator_keeps_its_promises_to_pytorch(given: Arguments, backend: str) -> None:
    """Schema, autograd and fake tensors, whose shapes must not depend on values."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    call = operands(given)
    # as compiled by AOT autograd, too; the interpreter is too slow for it
    torch.library.opcheck(chunked, (*call, backend), test_utils=tests if backend == "triton" else "ALL")
    with torch.no_grad():
        o, M, S, anchor, *residuals = chunked(*call, backend)
    for cotangents in ((None, M, None, None), (o, M, S, anchor))[: 1 if backend == "triton" else 2]:
        torch.library.opcheck(
            chunked_backward, (*operands(given, False), backend, *residuals, *cotangents), test_utils=tests
        )


@pytest.mark.parametrize("given", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("backend", OPERATORS)
def test_the_operator_without_residuals_keeps_its_promises_to_pytorch(given: Arguments, backend: str) -> None:
    """And gives the same bits, recorded or not."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    call = operands(given)
    torch.library.opcheck(unrecorded, (*call, backend), test_utils=tests if backend == "triton" else "ALL")
    recorded = unrecorded(*call, backend)
    assert recorded[0].requires_grad
    with torch.no_grad():
        for results in (unrecorded(*call, backend), chunked(*call, backend)[:4]):
            assert all(torch.equal(x, y) for x, y in zip(recorded, results, strict=True))


@pytest.mark.parametrize("given", [CALLS[name] for name in ("a batch", "plain", "resumed", "no sequences")])
@pytest.mark.parametrize("backend", ["triton"])
def test_the_step_keeps_its_promises_to_pytorch(given: Arguments, backend: str) -> None:
    torch.library.opcheck(step, tuple(decoded(given)))


def storages(*tensors: Any) -> list[int]:
    return [x.untyped_storage().data_ptr() for x in tensors if isinstance(x, Tensor) and x.numel()]


def apart(results: list[Any], inputs: list[Any]) -> bool:
    """No result shares memory with another or with an input."""
    mine = storages(*results)
    return len(set(mine)) == len(mine) and not set(mine) & set(storages(*inputs))


@pytest.mark.parametrize("given", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("backend", ["recurrent", *OPERATORS])
def test_no_result_shares_memory(given: Arguments, backend: str) -> None:
    """With another result or with an argument, whether it is a result of the op, of an operator or of a backward."""
    for start in (given.get("initial_state"), state(2).M if len(given["q"]) == 2 else None):
        o, final = chunk_titans_linear(**given | {"initial_state": start, "backend": backend})
        assert final is not None
        assert apart([o, *final], [*given.values(), *(start if isinstance(start, tuple) else [start])])
    if backend == "recurrent":
        return
    call = operands(given, False)
    results = chunked(*call, backend)
    assert apart(list(results), list(call))
    o, M, S, anchor, *residuals = results
    cotangents = [torch.ones_like(x) for x in (o, M, S, anchor)]
    for inflow in (cotangents, [None, cotangents[1], None, None]):
        grads = chunked_backward(*call, backend, *residuals, *inflow)
        assert apart(list(grads), [*call, *residuals, *inflow])


@pytest.mark.parametrize("backend", ["triton"])
def test_no_result_of_a_step_shares_memory(backend: str) -> None:
    for given in (CALLS["a batch"], CALLS["resumed"]):
        call = decoded(given, False)
        assert apart(list(step(*call)), list(call))


def bad_values() -> Iterator[tuple[Call, str]]:
    """Calls whose shapes are right."""
    call = operands(packed(), False)
    for bounds in ([0, 3, 3, T + 900], [0, 3, 3, 1], [1, 3, 3, T], [0, 900, 3, T], [0, -900, 3, T]):
        yield call._replace(cu_seqlens=torch.tensor(bounds)), "`cu_seqlens`"
    for offset in ([0, C, 0], [0, -1, 0], [2**40, 0, 0]):
        yield call._replace(offset=torch.tensor(offset)), "`offset`"


@pytest.mark.parametrize(("call", "name"), list(bad_values()))
@pytest.mark.parametrize("backend", OPERATORS)
def test_an_operator_refuses_values_that_lead_outside(call: Call, name: str, backend: str) -> None:
    with pytest.raises(ValueError, match=name):
        chunked(*call, backend)
    _, M, S, anchor, *residuals = chunked(*operands(packed(), False), backend)
    with pytest.raises(ValueError, match=name):
        chunked_backward(*call, backend, *residuals, call.q, M, S, anchor)


@pytest.mark.parametrize("backend", ["triton"])
def test_a_step_refuses_offsets_that_lead_outside(backend: str) -> None:
    call = decoded(CALLS["resumed"], False)._replace(offset=torch.tensor([0, C]))
    with pytest.raises(ValueError, match="`offset`"):
        step(*call)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_call_refuses_bad_bounds(backend: str) -> None:
    """Where they are not known until it runs."""
    compiled = torch.compile(chunk_titans_linear, backend="aot_eager", fullgraph=backend != "recurrent")
    with pytest.raises(ValueError, match="`cu_seqlens` must run from 0 to T"):
        compiled(**packed(backend=backend) | {"cu_seqlens": torch.tensor([0, 1])})


def test_a_full_graph_of_packed_sequences_names_the_backend_that_has_one() -> None:
    compiled = torch.compile(titans_linear, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r'without fullgraph=True, or call chunk_titans_linear with backend="chunk"'):
        compiled(**packed())


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("name", CALLS)
def test_a_device_without_values_gives_the_shapes(name: str, backend: str | None) -> None:
    """Nor has "meta" an autocast, or kernels."""
    given = CALLS[name]
    start = given.get("initial_state")
    there = {key: x.to("meta") if isinstance(x, Tensor) else x for key, x in given.items()}
    there["initial_state"] = start and start.to("meta")
    o, final = chunk_titans_linear(**there | {"backend": backend})
    o_too, final_too = chunk_titans_linear(**given)
    assert final is not None
    assert final_too is not None
    for x, y in zip((o, *final), (o_too, *final_too), strict=True):
        assert (x.device.type, x.shape, x.dtype) == ("meta", y.shape, y.dtype)


def test_a_step_on_a_device_without_values_gives_the_shapes() -> None:
    x = {name: torch.empty(B, H, D, device="meta") for name in ("q_t", "k_t", "v_t")}
    gates = {name: torch.empty(B, H, device="meta") for name in ("theta_t", "alpha_t", "eta_t")}
    o, final = titans_linear_step(**x, w=None, b=None, **gates, state=None)
    assert (o.shape, final.M.shape, final.offset.shape) == ((B, H, D), (B, H, D, D), (B,))


def test_loading_the_modules_again_leaves_the_operators_in_order() -> None:
    """As a notebook's autoreload does; in a process of its own, for the sake of the other tests."""
    code = """if True:
        import importlib, sys
        import torch, titans

        def works(function):
            q, k, v = (torch.randn(1, 5, 1, 2, requires_grad=True) for _ in range(3))
            gates = [torch.rand(1, 5, 1) for _ in range(3)]
            _, state = function(q, k, v, None, None, *gates, output_final_state=True)
            o, _ = function(q, k, v, None, None, *gates, initial_state=state)
            o.sum().backward()
            return bool(q.grad.any())

        first = titans.chunk_titans_linear
        for name in ("arguments", "autograd", "api"):
            importlib.reload(sys.modules[f"titans.{name}"])
        second = importlib.reload(titans).chunk_titans_linear
        for name in [name for name in sys.modules if name.partition(".")[0] == "titans"]:
            del sys.modules[name]
        import titans
        print(works(first), works(second), works(titans.chunk_titans_linear))
    """
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["True"] * 3, run.stderr

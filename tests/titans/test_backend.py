"""The choice of the backend, which needs no GPU: fake tensors say that they are on one."""

import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from titans.arguments import Call
from titans.backend import BACKENDS, Backend, choose


def call(device: str, dtype: torch.dtype = torch.float32, D: int = 4) -> Call:
    with FakeTensorMode():
        q, gate, M = (torch.empty(size, device=device, dtype=dtype) for size in ((1, 2, 1, D), (1, 2, 1), (1, 1, D, D)))
    return Call(q, q, q, None, None, gate, gate, gate, M, M, M, None, None, 1.0, 16, False)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_pytorch_backend_is_what_was_asked_for(backend: Backend, device: str) -> None:
    assert choose(call(device), backend, "chunk") == (backend, None)


@pytest.mark.parametrize("otherwise", ["chunk", "log", "recurrent"])
def test_the_kernels_are_for_cuda_where_they_take_the_call(otherwise: Backend) -> None:
    assert choose(call("cuda"), None, otherwise) == ("triton", None)
    assert choose(call("cpu"), None, otherwise)[0] == otherwise
    backend, against = choose(call("cuda", torch.float64), None, otherwise)
    assert backend == otherwise
    assert "float64" in str(against)


@pytest.mark.parametrize("otherwise", ["chunk", "log", "recurrent"])
def test_another_backend_on_cuda_comes_with_a_warning(otherwise: Backend) -> None:
    for refused, reason in (
        (call("cuda", D=129), "129"),
        (call("cuda")._replace(chunk_size=2**30), str(2**30)),
    ):
        with pytest.warns(UserWarning, match=f"'{otherwise}' runs.*{reason}"):
            backend, against = choose(refused, None, otherwise)
        assert backend == otherwise
        assert reason in str(against)


def test_the_callers_choice_of_the_kernels_stands_with_the_reason_against_it() -> None:
    backend, against = choose(call("cuda", torch.float64), "triton", "chunk")
    assert backend == "triton"
    assert against is not None
    assert choose(call("cuda"), "triton", "chunk") == ("triton", None)


def test_without_triton_the_reason_is_that_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    # to Python this is a module that does not exist
    monkeypatch.setitem(sys.modules, "titans.kernels", None)
    monkeypatch.delattr("titans.kernels", raising=False)
    with pytest.warns(UserWarning, match="not installed"):
        backend, against = choose(call("cuda"), None, "chunk")
    assert backend == "chunk"
    assert "not installed" in str(against)

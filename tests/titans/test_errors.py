"""Bad calls: each is a ValueError or TypeError that names argument, rule and value, and nothing is modified."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from titans import TitansState, check_gates, chunk_titans_linear, titans_linear, titans_linear_step

# kinds of tensors that the op refuses are under construction in PyTorch
pytestmark = pytest.mark.filterwarnings("ignore:.*(nested tensors is in prototype|is in beta state):UserWarning")

B, T, H, D, C = 2, 7, 3, 4, 5
ROOT = Path(__file__).parents[2]
META = torch.device("meta")  # a second device that every machine has
NAN, INF = float("nan"), float("inf")

Arguments = dict[str, Any]


def state(N: int = B) -> TitansState:
    M = torch.zeros(N, H, D, D)
    return TitansState(M, M.clone(), M.clone(), torch.zeros(N, dtype=torch.int64))


def gates() -> Arguments:
    """A good call of `check_gates`."""
    return {name: torch.rand(B, T, H) for name in ("theta", "alpha", "eta")}


def sequence() -> Arguments:
    """A good call of the op."""
    tokens = {name: torch.randn(B, T, H, D) for name in "qkv"}
    options = {"cu_seqlens": None, "chunk_size": C, "initial_state": state()}
    return tokens | gates() | {"w": torch.ones(H, D), "b": torch.zeros(H, D)} | options


def packed() -> Arguments:
    """A good call of the op with two packed sequences."""
    good = sequence()
    first = {name: good[name][:1] for name in ("q", "k", "v", "theta", "alpha", "eta")}
    return good | first | {"cu_seqlens": torch.tensor([0, 3, T])}


def step() -> Arguments:
    """A good call for one decoded token."""
    good = sequence()
    token = {f"{name}_t": good[name][:, 0] for name in ("q", "k", "v", "theta", "alpha", "eta")}
    return token | {"w": good["w"], "b": good["b"], "state": state(), "chunk_size": C}


class Bad(NamedTuple):
    """What is wrong with a call, and how its error must describe it."""

    law: str
    error: type[Exception]
    argument: str  # or a field of it: "state.M"
    change: Any  # the bad value, or a function of the good one
    says: str  # the value found, as a regular expression; the rule may stand before it

    def spoil(self, good: Arguments) -> Arguments:
        """Return the arguments with the bad value among them."""
        name, _, field = self.argument.partition(".")
        value = getattr(good[name], field) if field else good.get(name)
        value = self.change(value) if callable(self.change) else self.change
        return good | {name: good[name]._replace(**{field: value}) if field else value}


def shape(*sizes: int) -> str:
    return re.escape(str(sizes))


def token(t: int, value: float) -> Callable[[Tensor], Tensor]:
    """Give one token's gates a value."""
    return lambda x: x.index_fill(1, torch.tensor(t), value)


def nested(x: Tensor, layout: torch.layout = torch.strided) -> Tensor:
    return torch.nested.nested_tensor(list(x), layout=layout)


def elsewhere(x: Tensor) -> Tensor:
    return x.to(META)


OF_A_SEQUENCE = [
    Bad("q_is_a_list", TypeError, "q", Tensor.tolist, "list"),
    Bad("q_is_none", TypeError, "q", None, "None"),
    Bad("q_lacks_an_axis", ValueError, "q", lambda x: x[..., 0], shape(B, T, H)),
    Bad("q_has_no_width", ValueError, "q", lambda x: x[..., :0], shape(B, T, H, 0)),
    Bad("q_of_integers", TypeError, "q", Tensor.long, "int64"),
    Bad("q_is_sparse", TypeError, "q", Tensor.to_sparse, "sparse_coo"),
    Bad("q_is_nested", TypeError, "q", lambda x: nested(x), "nested"),
    Bad("q_is_jagged", TypeError, "q", lambda x: nested(x, torch.jagged), "nested"),
    Bad("v_is_of_mkldnn", TypeError, "v", Tensor.to_mkldnn, "_mkldnn"),
    Bad("w_is_sparse", TypeError, "w", Tensor.to_sparse_csr, "sparse_csr"),
    Bad("theta_is_sparse", TypeError, "theta", Tensor.to_sparse, "sparse_coo"),
    Bad("q_of_complex_numbers", TypeError, "q", lambda x: x.to(torch.complex64), "complex64"),
    Bad("k_is_shorter", ValueError, "k", lambda x: x[:, 1:], shape(B, T, H, D) + ".*" + shape(B, T - 1, H, D)),
    Bad("k_is_narrower", ValueError, "k", lambda x: x[..., 1:], shape(B, T, H, D - 1)),
    Bad("v_is_wider", ValueError, "v", lambda x: torch.cat([x, x], -1), shape(B, T, H, 2 * D)),
    Bad("v_has_one_head", ValueError, "v", lambda x: x[:, :, :1], shape(B, T, 1, D)),
    Bad("k_of_another_dtype", TypeError, "k", Tensor.half, "float32.*float16"),
    Bad("v_of_another_dtype", TypeError, "v", Tensor.double, "float32.*float64"),
    Bad("k_on_another_device", ValueError, "k", elsewhere, "cpu.*meta"),
    Bad("w_without_b", ValueError, "b", None, "None"),
    Bad("b_without_w", ValueError, "w", None, "None"),
    Bad("w_is_a_number", TypeError, "w", 1.0, "float"),
    Bad("w_is_shared_by_the_heads", ValueError, "w", lambda x: x[0], shape(H, D) + ".*" + shape(D)),
    Bad("w_of_integers", TypeError, "w", Tensor.int, "int32"),
    Bad("b_is_transposed", ValueError, "b", lambda x: x.mT, shape(H, D) + ".*" + shape(D, H)),
    Bad("b_on_another_device", ValueError, "b", elsewhere, "cpu.*meta"),
    Bad("theta_is_a_number", TypeError, "theta", 0.1, "float"),
    Bad("theta_of_booleans", TypeError, "theta", Tensor.bool, "bool"),
    Bad("alpha_lacks_heads", ValueError, "alpha", lambda x: x[..., 0], shape(B, T, H) + ".*" + shape(B, T)),
    Bad("alpha_on_another_device", ValueError, "alpha", elsewhere, "cpu.*meta"),
    Bad("eta_has_its_heads_first", ValueError, "eta", lambda x: x.mT, shape(B, H, T)),
    Bad("eta_per_channel", ValueError, "eta", lambda x: x[..., None].expand(-1, -1, -1, D), shape(B, T, H, D)),
    Bad("eps_is_none", TypeError, "eps", None, "None"),
    Bad("eps_is_zero", ValueError, "eps", 0.0, "0"),
    Bad("eps_is_negative", ValueError, "eps", -1e-6, "-1e-06"),
    Bad("eps_is_nan", ValueError, "eps", NAN, "nan"),
    Bad("eps_is_infinite", ValueError, "eps", INF, "inf"),
    Bad("eps_is_zero_in_float32", ValueError, "eps", 1e-46, "float32.*1e-46"),
    Bad("eps_is_infinite_in_float32", ValueError, "eps", 1e39, "float32.*1e.39"),
    Bad("eps_is_more_than_a_float", ValueError, "eps", 10**400, "more than the largest float"),
    Bad("eps_is_a_tensor", TypeError, "eps", torch.tensor(1e-6), "Tensor"),
    Bad("chunk_size_is_a_float", TypeError, "chunk_size", 16.0, "float"),
    Bad("chunk_size_is_a_flag", TypeError, "chunk_size", True, "bool"),
    Bad("chunk_size_is_zero", ValueError, "chunk_size", 0, "0"),
    Bad("chunk_size_is_negative", ValueError, "chunk_size", -4, "-4"),
    Bad("chunk_size_is_no_int64", ValueError, "chunk_size", 2**63, f"{2**63}"),
    Bad("chunk_size_is_too_long_to_read", ValueError, "chunk_size", 10**1000, "3322 bits"),
    Bad("output_final_state_is_a_word", TypeError, "output_final_state", "yes", "str"),
    Bad("log_gates_is_a_number", TypeError, "log_gates", 1, "int"),
    Bad("the_state_lacks_the_offset", TypeError, "initial_state", lambda state: state[:3], "tuple of 3"),
    Bad("the_state_is_a_list", TypeError, "initial_state", list, "list"),
    Bad("the_state_was_made_with_other_chunks", ValueError, "initial_state", lambda s: TitansState(*s, 4), f"4.*{C}"),
    Bad("M_alone_for_too_many", ValueError, "initial_state", torch.zeros(B + 1, H, D, D), shape(B + 1, H, D, D)),
    Bad("M_alone_lacks_heads", ValueError, "initial_state", torch.zeros(D, D), shape(D, D)),
    Bad("M_alone_of_integers", TypeError, "initial_state", torch.zeros(B, H, D, D).long(), "int64"),
    Bad("M_alone_on_another_device", ValueError, "initial_state", torch.zeros(B, H, D, D, device=META), "cpu.*meta"),
    Bad("M_lacks_a_head", ValueError, "initial_state.M", lambda x: x[:, 1:], shape(B, H - 1, D, D)),
    Bad("S_is_none", TypeError, "initial_state.S", None, "None"),
    Bad("S_of_integers", TypeError, "initial_state.S", Tensor.int, "int32"),
    Bad("M_is_sparse", TypeError, "initial_state.M", Tensor.to_sparse, "sparse_coo"),
    Bad("M_alone_for_all_is_not_square", ValueError, "initial_state", torch.zeros(H, D, D + 1), shape(H, D, D + 1)),
    Bad("S_on_another_device", ValueError, "initial_state.S", elsewhere, "cpu.*meta"),
    Bad("the_anchor_is_not_square", ValueError, "initial_state.anchor", lambda x: x[..., 1:], shape(B, H, D, D - 1)),
    Bad("the_offset_is_a_float", TypeError, "initial_state.offset", Tensor.float, "float32"),
    Bad("the_offset_is_a_number", TypeError, "initial_state.offset", 0, "int"),
    Bad("the_offset_is_for_too_few", ValueError, "initial_state.offset", lambda x: x[1:], shape(1)),
    Bad("the_offset_is_a_whole_chunk", ValueError, "initial_state.offset", lambda x: x + C, f"< .*{C}.*{C}"),
    Bad("the_offset_is_negative", ValueError, "initial_state.offset", lambda x: x - 1, "-1"),
    Bad("cu_seqlens_of_a_batch", ValueError, "cu_seqlens", torch.tensor([0, T]), f"{B}"),
]

OF_PACKED_SEQUENCES = [
    Bad("cu_seqlens_is_a_list", TypeError, "cu_seqlens", Tensor.tolist, "list"),
    Bad("cu_seqlens_of_floats", TypeError, "cu_seqlens", Tensor.float, "float32"),
    Bad("cu_seqlens_is_empty", ValueError, "cu_seqlens", lambda x: x[:0], shape(0)),
    Bad("cu_seqlens_is_a_matrix", ValueError, "cu_seqlens", lambda x: x[None], shape(1, 3)),
    Bad("cu_seqlens_is_sparse", TypeError, "cu_seqlens", Tensor.to_sparse, "sparse_coo"),
    Bad("cu_seqlens_begins_late", ValueError, "cu_seqlens", torch.tensor([1, 3, T]), "got.*1"),
    Bad("cu_seqlens_ends_early", ValueError, "cu_seqlens", torch.tensor([0, 3, T - 1]), f"{T}.*{T - 1}"),
    Bad("cu_seqlens_ends_late", ValueError, "cu_seqlens", torch.tensor([0, 3, T + 1]), f"{T}.*{T + 1}"),
    Bad("cu_seqlens_decreases", ValueError, "cu_seqlens", torch.tensor([0, T + 3, T]), f"{T + 3}.*{T}"),
    Bad("cu_seqlens_on_another_device", ValueError, "cu_seqlens", elsewhere, "cpu.*meta"),
    Bad("M_alone_for_another_number", ValueError, "initial_state", torch.zeros(1, H, D, D), shape(1, H, D, D)),
    Bad("a_state_for_another_number", ValueError, "initial_state.M", torch.zeros(3, H, D, D), shape(3, H, D, D)),
]

OF_A_STEP = [
    Bad("q_is_a_list", TypeError, "q_t", Tensor.tolist, "list"),
    Bad("q_has_a_time_axis", ValueError, "q_t", lambda x: x[:, None], shape(B, 1, H, D)),
    Bad("k_lacks_a_sequence", ValueError, "k_t", lambda x: x[1:], shape(1, H, D)),
    Bad("v_of_another_dtype", TypeError, "v_t", Tensor.half, "float32.*float16"),
    Bad("w_without_b", ValueError, "b", None, "None"),
    Bad("theta_has_a_time_axis", ValueError, "theta_t", lambda x: x[:, None], shape(B, 1, H)),
    Bad("alpha_is_a_number", TypeError, "alpha_t", 0.5, "float"),
    Bad("eta_of_integers", TypeError, "eta_t", Tensor.long, "int64"),
    Bad("the_state_is_a_list", TypeError, "state", list, "list"),
    Bad("S_lacks_a_head", ValueError, "state.S", lambda x: x[:, 1:], shape(B, H - 1, D, D)),
    Bad("the_state_was_made_with_other_chunks", ValueError, "state", lambda s: TitansState(*s, 16), f"16.*{C}"),
    Bad("the_offset_is_a_whole_chunk", ValueError, "state.offset", lambda x: x + C, f"< .*{C}.*{C}"),
    Bad("chunk_size_is_zero", ValueError, "chunk_size", 0, "0"),
    Bad("eps_is_negative", ValueError, "eps", -1.0, "-1"),
    Bad("log_gates_is_a_number", TypeError, "log_gates", 1, "int"),
    Bad("the_backend_is_unknown", ValueError, "backend", "cuda", "cuda"),
]

OF_GATES = [
    Bad("theta_is_a_number", TypeError, "theta", 0.1, "float"),
    Bad("theta_of_integers", TypeError, "theta", Tensor.long, "int64"),
    Bad("theta_in_eight_bits", TypeError, "theta", lambda x: x.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    Bad("alpha_is_sparse", TypeError, "alpha", Tensor.to_sparse, "sparse_coo"),
    Bad("eta_is_nested", TypeError, "eta", lambda x: torch.nested.as_nested_tensor(list(x)), "nested"),
    Bad("alpha_has_no_values", ValueError, "alpha", lambda x: x.to(META), "meta"),
    Bad("log_gates_is_a_word", TypeError, "log_gates", "yes", "str"),
    Bad("theta_is_negative", ValueError, "theta", token(3, -0.5), r"-0\.5"),
    Bad("theta_is_infinite", ValueError, "theta", token(6, INF), "inf"),
    Bad("alpha_above_one", ValueError, "alpha", token(0, 1.5), r"1\.5"),
    Bad("alpha_is_negative", ValueError, "alpha", token(6, -0.25), r"-0\.25"),
    Bad("alpha_is_nan", ValueError, "alpha", token(2, NAN), "nan"),
    Bad("eta_above_one", ValueError, "eta", token(4, 2.0), r"2\.0"),
    Bad("eta_is_nan", ValueError, "eta", token(4, NAN), "nan"),
]

OF_LOG_GATES = [
    Bad("log_theta_is_infinite", ValueError, "theta", token(3, INF), "inf"),
    Bad("log_theta_is_nan", ValueError, "theta", token(0, NAN), "nan"),
    Bad("log_alpha_above_zero", ValueError, "alpha", token(6, 0.5), r"0\.5"),
    Bad("log_eta_above_zero", ValueError, "eta", token(2, 1e-3), r"0\.001"),
]


def law(bad: Bad) -> str:
    return bad.law


def raises(bad: Bad, good: Arguments, function: Callable[..., Any]) -> None:
    """The call fails as it should and leaves its arguments alone."""
    arguments = bad.spoil(good)
    before = snapshot(arguments)
    with pytest.raises(bad.error, match=f"(?s)`{re.escape(bad.argument)}`.*{bad.says}"):
        function(**arguments)
    assert snapshot(arguments) == before


def snapshot(x: Any) -> Any:
    """Everything one can see of the arguments, to compare with `==`."""
    if isinstance(x, Tensor):
        if x.is_nested or x.layout != torch.strided:
            return x.dtype, x.layout, x.requires_grad
        values = None if x.device == META else repr(x.tolist())
        return x.dtype, x.shape, x.stride(), x.requires_grad, x._version, values
    if isinstance(x, dict):
        return {name: snapshot(y) for name, y in x.items()}
    return [snapshot(y) for y in x] if isinstance(x, list | tuple) else repr(x)


@pytest.mark.parametrize("backend", [None, "chunk", "log", "recurrent"])
@pytest.mark.parametrize("bad", OF_A_SEQUENCE, ids=law)
def test_a_bad_call_is_explained(bad: Bad, backend: str | None) -> None:
    raises(bad, sequence() | {"backend": backend}, chunk_titans_linear)


@pytest.mark.parametrize("backend", [None, "chunk", "log", "recurrent"])
@pytest.mark.parametrize("bad", OF_PACKED_SEQUENCES, ids=law)
def test_a_bad_call_with_packed_sequences_is_explained(bad: Bad, backend: str | None) -> None:
    raises(bad, packed() | {"backend": backend}, chunk_titans_linear)


@pytest.mark.parametrize("bad", OF_A_SEQUENCE, ids=law)
def test_a_bad_call_of_the_definition_is_explained(bad: Bad) -> None:
    raises(bad, sequence(), titans_linear)


@pytest.mark.parametrize("bad", OF_A_STEP, ids=law)
def test_a_bad_step_is_explained(bad: Bad) -> None:
    raises(bad, step(), titans_linear_step)


@pytest.mark.parametrize("bad", OF_GATES, ids=law)
def test_bad_gates_are_explained(bad: Bad) -> None:
    raises(bad, gates(), check_gates)


@pytest.mark.parametrize("bad", OF_LOG_GATES, ids=law)
def test_bad_log_gates_are_explained(bad: Bad) -> None:
    raises(bad, {name: x.log() for name, x in gates().items()} | {"log_gates": True}, check_gates)


@pytest.mark.parametrize("backend", ["cuda", "Chunk", "", True, 1])
def test_an_unknown_backend_is_explained(backend: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"`backend`.*'chunk'.*{backend!r}"):
        chunk_titans_linear(**sequence() | {"backend": backend})


def test_triton_on_a_cpu_is_refused_with_the_reason() -> None:
    """In a process of its own: whether kernels are interpreted is settled when they are imported."""
    code = """if True:
        import torch, titans
        q, gate = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1)
        titans.chunk_titans_linear(q, q, q, None, None, gate, gate, gate, backend="triton")
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert re.search(r"ValueError: `backend` 'triton' .*CUDA.*`q` on cpu", run.stderr)


@pytest.mark.parametrize("function", [chunk_titans_linear, titans_linear, titans_linear_step, check_gates])
def test_an_unknown_keyword_is_named(function: Callable[..., Any]) -> None:
    good = {titans_linear_step: step, check_gates: gates}.get(function, sequence)()
    with pytest.raises(TypeError, match="head_first"):
        function(**good, head_first=True)


@pytest.mark.parametrize("backend", ["chunk", "log", "recurrent"])
@pytest.mark.parametrize("call", [sequence, packed])
def test_a_good_call_modifies_nothing(call: Callable[[], Arguments], backend: str) -> None:
    arguments = call() | {"backend": backend}
    before = snapshot(arguments)
    chunk_titans_linear(**arguments)
    assert snapshot(arguments) == before


def test_a_good_step_modifies_nothing() -> None:
    arguments = step()
    before = snapshot(arguments)
    titans_linear_step(**arguments)
    assert snapshot(arguments) == before


def test_the_ends_of_the_gates_ranges_are_good_gates() -> None:
    ends = torch.tensor([0.0, 1.0]).expand(B, T, 2)
    check_gates(8 * ends, ends, ends)
    check_gates(8 * ends.log(), ends.log(), ends.log(), log_gates=True)

"""Every row of MIGRATION.md, executed; against the packages themselves where they are installed (group `peers`)."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import oracle
import titans.recurrent
from oracle.bounds import arithmetic_for, forward_radius
from tests.examples.fla_gradient import gradient_of_fla
from titans import TitansLinear, TitansState, chunk_titans_linear, titans_linear
from titans.compat import fla as compat

TEXT = (Path(__file__).parents[2] / "MIGRATION.md").read_text()
B, T, H, D, C = 2, 8, 2, 4, 4
ROWS: set[tuple[str, str]] = set()

Test = Callable[..., None]


def row(table: str, *firsts: str) -> Callable[[Test], Test]:
    """Say which rows of which table a test executes."""
    ROWS.update((table, first) for first in firsts)
    return lambda test: test


FLA, TTT, LUCIDRAINS = "fla.ops.titans", "chunk_ttt_linear", "NeuralMemory"


@pytest.fixture
def theirs() -> Callable[..., Any]:
    with warnings.catch_warnings():
        # fla warns where there is no GPU
        warnings.simplefilter("ignore")
        return pytest.importorskip("fla.ops.titans").chunk_titans_linear


@pytest.fixture
def ttt() -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("fla.ops.ttt.naive").chunk_ttt_linear_ref


def arguments(T: int = T, **changes: Any) -> dict[str, Any]:
    """Those of `fla.ops.titans`, head first."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, B, H, T, D, generator=generator)
    theta, alpha, eta = 0.01 + 0.2 * torch.rand(3, B, H, T, 1, generator=generator)
    w, b = 1 + 0.25 * torch.randn(2, H, D, generator=generator)
    M = torch.randn(B, H, D, D, generator=generator)
    return {
        "q": q, "k": normalize(k, dim=-1), "v": v, "w": w, "b": b, "theta": theta, "alpha": alpha, "eta": eta,
        "eps": 1e-6, "chunk_size": C, "initial_state": M, "output_final_state": True,
    } | changes  # fmt: skip


def token_first(given: dict[str, Any]) -> dict[str, Any]:
    """The same, for `titans.chunk_titans_linear`."""
    return given | {name: given[name].transpose(1, 2) for name in ("q", "k", "v", "theta", "alpha", "eta")}


def same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x, y)


# fla.ops.titans


def test_every_row_is_executed() -> None:
    table, rows = "", set()
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or cells[0] == "---":
            continue
        if cells[2] == "in the numbers":
            table = cells[0]
        else:
            rows.add((table, cells[0].replace("`", "")))
    assert rows == ROWS


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_the_examples_run(code: str) -> None:
    exec(compile(code, "MIGRATION.md", "exec"), {})


@row(FLA, "inner gradient", "eps, chunk_size, in their places")
def test_the_inner_gradient_is_the_difference(theirs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With their formula ours gives their numbers; float32 leaves less than a thousandth of the difference."""
    given = arguments()
    o, M = theirs(*given.values())
    ours, M_ours = compat.chunk_titans_linear(*given.values())
    monkeypatch.setattr(titans.recurrent, "inner_gradient", gradient_of_fla)
    double = {name: x.double() if isinstance(x, Tensor) else x for name, x in token_first(given).items()}
    same_formula, state = titans_linear(**double)
    assert state is not None
    for x, y, z in ((o, ours, same_formula.transpose(1, 2)), (M, M_ours, state.M)):
        assert (x - z).norm() <= (x - y).norm() / 1000


@row(FLA, "q, k, v (B, H, T, D)", "returned state, M", "initial_state, M")
def test_the_layout_and_the_state() -> None:
    given = arguments()
    o, M = compat.chunk_titans_linear(*given.values())
    o_too, state = chunk_titans_linear(**token_first(given))
    assert state is not None
    assert same(o, o_too.transpose(1, 2))
    assert same(M, state.M)
    start = given["initial_state"]
    whole = TitansState(start, torch.zeros_like(start), start, torch.zeros(B, dtype=torch.int64))
    assert same(o, chunk_titans_linear(**token_first(given) | {"initial_state": whole})[0].transpose(1, 2))
    assert compat.chunk_titans_linear(*arguments(output_final_state=False).values())[1] is None


@row(FLA, "returned state, M")
def test_a_titans_state_resumes_and_m_alone_does_not() -> None:
    given = token_first(arguments())
    halves = [
        {name: x[:, part] if name in ("q", "k", "v", "theta", "alpha", "eta") else x for name, x in given.items()}
        for part in (slice(0, C), slice(C, T))
    ]
    whole, _ = chunk_titans_linear(**given, backend="recurrent")
    _, state = chunk_titans_linear(**halves[0], backend="recurrent")
    assert state is not None
    resumed, _ = chunk_titans_linear(**halves[1] | {"initial_state": state}, backend="recurrent")
    lost, _ = chunk_titans_linear(**halves[1] | {"initial_state": state.M}, backend="recurrent")
    assert same(resumed, whole[:, C:])
    assert not torch.equal(lost, whole[:, C:])


@row(FLA, "theta, alpha, eta (B, H, T, 1)")
def test_the_ends_of_the_gates(theirs: Callable[..., Any]) -> None:
    ends = {"alpha": 1.0, "eta": 0.0, "theta": 0.0}
    for name, end in ends.items():
        results = []
        for call in (compat.chunk_titans_linear, theirs):
            gate = torch.full((B, H, T, 1), end, requires_grad=True)
            o, _ = call(*arguments(**{name: gate}).values())
            o.sum().backward()
            assert gate.grad is not None
            results.append(bool(o.isfinite().all() and gate.grad.isfinite().all()))
        assert results == [True, False]
    given = token_first(arguments())
    logs = {"theta": given["theta"].log(), "alpha": torch.log1p(-given["alpha"]), "eta": given["eta"].log()}
    assert chunk_titans_linear(**given | logs, log_gates=True)[0].isfinite().all()
    squeezed = {name: given[name][..., 0] for name in logs}
    assert same(chunk_titans_linear(**given | squeezed)[0], chunk_titans_linear(**given)[0])


@row(FLA, "w, b (H, 1, D) or (H, D)")
def test_the_shapes_of_w_and_b() -> None:
    given = arguments()
    wide = arguments(w=given["w"][:, None], b=given["b"][:, None])
    assert same(compat.chunk_titans_linear(*given.values())[0], compat.chunk_titans_linear(*wide.values())[0])
    assert chunk_titans_linear(**token_first(given) | {"w": None, "b": None})[0].isfinite().all()


@row(FLA, "eps, chunk_size, in their places")
def test_the_defaults() -> None:
    given = token_first(arguments())
    few = {name: x for name, x in given.items() if name not in ("eps", "chunk_size")}
    assert same(chunk_titans_linear(**few)[0], chunk_titans_linear(**few, eps=1e-6, chunk_size=16)[0])


@row(FLA, "T a multiple of chunk_size", "float32")
def test_lengths_and_dtypes(theirs: Callable[..., Any]) -> None:
    odd = arguments(T=T - 1)
    assert compat.chunk_titans_linear(*odd.values())[0].shape == (B, H, T - 1, D)
    with pytest.raises(RuntimeError):
        theirs(*odd.values())
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        given = [x.to(dtype) if isinstance(x, Tensor) and x.ndim < 5 else x for x in arguments().values()]
        assert compat.chunk_titans_linear(*given)[0].dtype == dtype
        given[10] = None
        with pytest.raises(RuntimeError):
            theirs(*given)


# chunk_ttt_linear


def of_ttt(T: int) -> dict[str, Any]:
    given = token_first(arguments(T))
    names = ("q", "k", "v", "w", "b")
    return {name: given[name] for name in names} | {"initial_state": given["initial_state"]}


@row(TTT, "eta", "scale=None", "initial_state (H, K, V)", "w, b, eps, chunk_size")
@row(TTT, "initial_state_bias, final_state_bias")
def test_ttt_is_half_the_step_without_momentum_and_forgetting(ttt: Callable[..., Any]) -> None:
    """After one chunk: both are within the bound of the exact M, since both evaluate the same polynomial in float32."""
    given = of_ttt(2 * C)
    one = {name: x[:, :C] if name in "qkv" else x for name, x in given.items()}
    rate, zeros = 0.25, torch.zeros(B, C, H)
    inputs = oracle.Inputs(
        one["q"] * D**-0.5, one["k"], one["v"], one["w"], one["b"], zeros + rate / 2, zeros, zeros,
        chunk_size=C, M=given["initial_state"],
    )  # fmt: skip
    _, state = chunk_titans_linear(
        inputs.q, inputs.k, inputs.v, inputs.w, inputs.b, inputs.theta, zeros, zeros, chunk_size=C,
        initial_state=given["initial_state"], output_final_state=True,
    )  # fmt: skip
    assert state is not None
    eta = torch.full((B, 2 * C, H, 1), rate)

    def final(given: dict[str, Any], eta: Tensor) -> tuple[Tensor, Tensor]:
        _, M, bias = ttt(**given, eta=eta, mini_batch_size=C, output_final_state=True)
        return M, bias

    M, bias = final(one, eta[:, :C])
    assert bias.any()
    exact, radius = oracle.forward(inputs).state.M, forward_radius(inputs, arithmetic_for(torch.float32)).M
    for x in (M, state.M):
        assert (np.abs(oracle.exact(x) - exact) <= radius).all()
    zeros = torch.zeros(B, 2 * C, H)
    _, state = chunk_titans_linear(
        given["q"] * D**-0.5, given["k"], given["v"], given["w"], given["b"], zeros + rate / 2, zeros, zeros,
        chunk_size=C, initial_state=given["initial_state"], output_final_state=True,
    )  # fmt: skip
    assert state is not None
    M, _ = final(given, eta)
    # the bias of the first chunk moves the second: by far more than the bound of the first
    assert (np.abs((M - state.M).numpy()) > 2 * radius).any()


@row(TTT, "eta that differs inside a chunk")
def test_ttt_takes_the_last_tokens_eta_for_the_state(ttt: Callable[..., Any]) -> None:
    given = of_ttt(C)
    eta = torch.rand(B, C, H, 1, generator=torch.Generator().manual_seed(1))
    _, M, _ = ttt(**given, eta=eta, mini_batch_size=C, output_final_state=True)
    _, last, _ = ttt(**given, eta=eta[:, -1:].expand_as(eta), mini_batch_size=C, output_final_state=True)
    assert same(M, last)
    zeros, start = torch.zeros(B, C, H), {"chunk_size": C, "initial_state": given["initial_state"]}
    tokens = [given[name] for name in ("q", "k", "v", "w", "b")]
    _, state = chunk_titans_linear(*tokens, eta / 2, zeros, zeros, **start, output_final_state=True)
    _, wrong = chunk_titans_linear(
        *tokens, eta[:, -1:].expand_as(eta) / 2, zeros, zeros, **start, output_final_state=True
    )
    assert state is not None
    assert wrong is not None
    assert not torch.equal(state.M, wrong.M)


@row(TTT, "layer TTTLinear")
def test_the_layer_has_a_chunk_size() -> None:
    assert TitansLinear(8, chunk_size=4).chunk_size == 4


# NeuralMemory


@row(LUCIDRAINS, "model=MemoryMLP(dim, depth=1), mem_model_norm_add_residual=False", "batch_size")
@row(LUCIDRAINS, "to_adaptive_step(x).sigmoid() * max_lr", "to_decay_factor(x).sigmoid()", "to_momentum(x).sigmoid()")
@row(LUCIDRAINS, "chunk_size, tokens that share gates", "momentum=False")
@pytest.mark.parametrize("momentum", [True, False])
def test_neural_memory_of_one_matrix_is_the_plain_memory(momentum: bool) -> None:
    """With the loss that is a sum; both are within the bound of the exact outputs."""
    pytest.importorskip("titans_pytorch")
    from properties.adapters.titans_pytorch import neural_memory

    given = token_first(arguments(w=None, b=None))
    if not momentum:
        given["eta"] = torch.zeros_like(given["eta"])
    o, M = neural_memory(**given)
    gates = {name: given[name][..., 0] for name in ("theta", "alpha", "eta")}
    tokens = {name: given[name] for name in ("q", "k", "v", "w", "b")}
    inputs = oracle.Inputs(**tokens, **gates, chunk_size=C, M=given["initial_state"])
    exact, radius = oracle.forward(inputs), forward_radius(inputs, arithmetic_for(torch.float32))
    ours, state = chunk_titans_linear(**given)
    assert state is not None
    for x, y in ((o, M), (ours, state.M)):
        assert (np.abs(oracle.exact(x.detach()) - exact.o) <= radius.o).all()
        assert (np.abs(oracle.exact(y.detach()) - exact.state.M) <= radius.M).all()


@row(LUCIDRAINS, "to_adaptive_step(x).sigmoid() * max_lr")
def test_their_default_loss_is_a_mean() -> None:
    module = pytest.importorskip("titans_pytorch.neural_memory")
    x, y = torch.randint(-4, 5, (2, 3, D), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(module.default_loss_fn(x, y) * D, (x - y).square().sum(-1))


@row(LUCIDRAINS, "mem_model_norm_add_residual=True, the default")
def test_their_residual_norm_has_our_loss() -> None:
    """norm(k M) w + k against v is norm(k M) w against v - k; in whole numbers but for the norm, which is theirs."""
    models = pytest.importorskip("titans_pytorch.memory_models")
    model = models.ResidualNorm(D, models.MemoryMLP(D, depth=1)).double()
    nn.init.normal_(model.norm.gamma, generator=torch.Generator().manual_seed(0))
    k = torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    M, w = model.model.weights[0], 1 + model.norm.gamma
    wanted = nn.functional.layer_norm(k @ M, (D,)) * w + k
    assert torch.equal(model(k), wanted)


@row(LUCIDRAINS, "model=MemoryMLP(dim, depth=2), the default", "NeuralMemState")
def test_their_memory_is_deep_and_their_state_keeps_tokens() -> None:
    module = pytest.importorskip("titans_pytorch.neural_memory")
    memory = module.NeuralMemory(D, chunk_size=2)
    assert len(memory.memory_model.model.weights) == 2
    _, state = memory(torch.randn(1, 3, D))
    assert state._fields == ("seq_index", "weights", "cache_store_segment", "states", "updates")
    assert state.cache_store_segment.shape[1] == 1
    _, _, ours = TitansLinear(8)(torch.randn(1, 3, 8), use_cache=True)
    assert ours._fields == ("memory", "conv")
    assert ours.memory._fields == TitansState._fields == ("M", "S", "anchor", "offset")

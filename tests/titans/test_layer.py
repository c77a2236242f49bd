"""`TitansLinear`: one sequence cut in any way, padded, packed, cached, compiled or exported gives the same."""

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oracle
from oracle.bounds import arithmetic_for, forward_radius, kernel_arithmetic
from titans import TitansLinear, TitansState, chunk_titans_linear, layer, titans_linear_step
from titans.caches import LayerState
from titans.modules import GatedRMSNorm, Gates, ShortConvolution

B, T, H, D, C, HIDDEN = 2, 11, 2, 8, 4, 16
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
)


def make(seed: int = 0, **options: Any) -> TitansLinear:
    """A layer whose gates depend on the tokens."""
    torch.manual_seed(seed)
    module = TitansLinear(HIDDEN, num_heads=H, head_dim=D, chunk_size=C, **options)
    nn.init.normal_(module.gates.weight, std=0.25)
    return module


def tokens(seed: int = 1, B: int = B, T: int = T, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, T, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaves(state: LayerState) -> list[Tensor]:
    return [*state.memory, *state.conv]


def same(x: LayerState, y: LayerState) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(leaves(x), leaves(y), strict=True))


# The parts


def test_training_starts_at_the_documented_gates() -> None:
    gates = Gates(HIDDEN, H, C)
    assert not gates.weight.any()
    log_theta, log_keep, log_eta = (x.unique() for x in gates.double()(tokens(dtype=torch.float64)))
    (eta,), (keep,), (theta,) = log_eta.exp().tolist(), log_keep.exp().tolist(), log_theta.exp().tolist()
    # the biases are float32: one rounding of a logit below 8
    rounding = 8 * torch.finfo(torch.float32).eps
    assert abs(eta - 0.9) <= rounding
    assert abs(keep - 0.99) <= rounding
    assert abs(theta - 0.1 / (2 * C)) <= rounding


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_theta_stays_below_its_limit_and_nothing_saturates(scale: float) -> None:
    """log theta + log C - log(1 - eta) < 0 as a number, and all logs are finite, however large the logits."""
    gates = Gates(HIDDEN, H, C)
    nn.init.normal_(gates.weight, std=scale)
    x = tokens()
    logs = gates(x)
    assert all(y.isfinite().all() for y in logs)
    m = (x @ gates.weight.T + gates.bias).chunk(3, -1)[2].double()
    limit = nn.functional.logsigmoid(-m) - np.log(C)
    # 4 roundings of a sum of three terms, each no larger than the limit or log theta
    assert (logs[0] <= limit + 4 * torch.finfo(torch.float32).eps * (limit.abs() + logs[0].abs())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_gates_are_computed_in_float32_or_more(dtype: torch.dtype) -> None:
    gates = Gates(HIDDEN, H, C)
    nn.init.normal_(gates.weight)
    gates, x = gates.to(dtype), tokens(dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = copy.deepcopy(gates).to(wide)(x.to(wide))
    with torch.autocast("cpu", torch.bfloat16):
        found = gates(x)
    assert all(y.dtype == wide and torch.equal(y, z) for y, z in zip(found, wanted, strict=True))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_convolution_is_that_of_torch(width: int) -> None:
    """In whole numbers, which both compute exactly, up to the same SiLU."""
    convolution = ShortConvolution(HIDDEN, width)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        convolution.weight.copy_(torch.randint(-3, 4, convolution.weight.shape, generator=generator))
    x = torch.randint(-3, 4, (B, T, HIDDEN), generator=generator).float()
    padded = nn.functional.pad(x.transpose(1, 2), (width - 1, 0))
    wanted = nn.functional.conv1d(padded, convolution.weight, groups=HIDDEN).transpose(1, 2)
    assert torch.equal(convolution(x)[0], nn.functional.silu(wanted.contiguous()))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_convolution_resumes_and_keeps_packed_sequences_apart(width: int) -> None:
    """Bit for bit, with sequences that are empty or shorter than the window; SiLU is left to the layer's own tests."""
    convolution = ShortConvolution(HIDDEN, width)
    x = tokens(B=1)
    bounds = torch.tensor([0, 0, 5, 6, 6, T])
    caches = [tokens(seed, B=1, T=width - 1).transpose(1, 2) for seed in range(len(bounds) - 1)]
    with torch.no_grad():
        y, packed = convolution(x, torch.cat(caches), True, bounds)
        for n, (start, end) in enumerate(pairwise(bounds)):
            alone, cache = convolution(x[:, start:end], caches[n], True)
            # the vector and the scalar code of an exponential differ by an ulp at most; SiLU has 3 operations
            assert ((y[:, start:end] - alone).abs() <= 8 * torch.finfo(torch.float32).eps * alone.abs()).all()
            assert torch.equal(packed[n : n + 1], cache)


def test_a_cache_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(N, channels, kernel_size - 1\) = \(2, 16, 3\), got \(2, 16, 4\)"):
        ShortConvolution(HIDDEN, 4)(tokens(), torch.zeros(B, HIDDEN, 4))


def test_the_norm_is_that_of_torch_times_the_gate() -> None:
    x, gate = tokens(1, dtype=torch.float64), tokens(2, dtype=torch.float64)
    norm = GatedRMSNorm(HIDDEN, 1e-5).double()
    nn.init.normal_(norm.weight)
    wanted = nn.functional.rms_norm(x, (HIDDEN,), norm.weight, 1e-5)
    # a sum of HIDDEN squares in any order, halved by the root, and 6 operations
    bound = (HIDDEN + 8) * torch.finfo(torch.float64).eps
    assert ((norm(x) - wanted).abs() <= bound * wanted.abs()).all()
    gated = wanted * gate.sigmoid()
    assert ((norm(x, gate) - gated).abs() <= bound * gated.abs()).all()


# Cut in any way


@dataclass
class Recorder:
    """Calls the op for the layer, and keeps arguments and results, with an axis of tokens in all."""

    calls: list[dict[str, Any]] = field(default_factory=list)

    def chunk(self, *arguments: Any, **options: Any) -> Any:
        o, state = chunk_titans_linear(*arguments, **options)
        self.calls.append({"arguments": arguments, "start": options["initial_state"], "o": o, "state": state})
        return o, state

    def step(self, *arguments: Any, **options: Any) -> Any:
        o, state = titans_linear_step(*arguments, **options)
        tokens = [x if i in (3, 4) else x.unsqueeze(1) for i, x in enumerate(arguments[:8]) if x is not None]
        tokens[3:3] = [None, None] if arguments[3] is None else []
        self.calls.append({"arguments": tokens, "start": arguments[8], "o": o.unsqueeze(1), "state": state})
        return o, state


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(layer, "chunk_titans_linear", recorder.chunk)
    monkeypatch.setattr(layer, "titans_linear_step", recorder.step)
    return recorder


def dyadic(module: TitansLinear) -> TitansLinear:
    """Weights before the op with few bits, so that its products are exact in every format and order."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in module.named_parameters():
            if name.split(".")[0] not in ("M_0", "w", "b", "o_norm", "o_proj"):
                x.copy_(torch.randint(-3, 4, x.shape, generator=generator) / 8)
        module.gates.bias.copy_(torch.tensor([0, 4.5, 2.25]).repeat_interleave(H))
    return module


def run(module: TitansLinear, x: Tensor, cuts: tuple[int, ...]) -> tuple[Tensor, LayerState]:
    """Outputs and final state, cut into pieces."""
    outputs, state = [], None
    for start, end in zip((0, *cuts), (*cuts, x.shape[1]), strict=True):
        o, _, state = module(x[:, start:end], state=state, use_cache=True)
        outputs.append(o)
    assert state is not None
    return torch.cat(outputs, 1), state


def check_call(call: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """The op's results lie within the op's bounds of the exact ones, from the state that was really passed in."""
    arguments = [None if x is None else x.detach().cpu() for x in call["arguments"]]
    start = call["start"]
    state = (
        {"M": start.expand(B, -1, -1, -1)}
        if isinstance(start, Tensor)
        else dict(zip(("M", "S", "anchor"), start, strict=False))
    )
    offset = None if isinstance(start, Tensor) else tuple(start.offset.tolist())
    state = {name: x.detach().cpu() for name, x in state.items()}
    inputs = oracle.Inputs(*arguments, chunk_size=C, **state, offset=offset, log_gates=True)
    is_step = arguments[0].shape[1] == 1
    kernels = device == "cuda" and dtype != torch.float64
    arithmetic = (
        kernel_arithmetic(dtype, D, tensor_cores=True) if kernels else arithmetic_for(dtype, log_space=not is_step)
    )
    exact, radius = oracle.forward(inputs), forward_radius(inputs, arithmetic)
    for name, value in (("o", call["o"]), *zip(("M", "S", "anchor"), call["state"], strict=False)):
        truth, bound = (exact.o, radius.o) if name == "o" else (getattr(exact.state, name), getattr(radius, name))
        # over several chunks of the normalised memory nothing is promised of half precision
        assert np.isfinite(bound).all() or (dtype.itemsize == 2 and inputs.w is not None)
        if value.dtype.itemsize == 2:
            # and the rounding to the dtype of the result
            bound = bound + (np.abs(truth) + bound) * (torch.finfo(value.dtype).eps / 2)
        assert (np.abs(oracle.exact(value.detach().cpu()) - truth) <= bound).all(), name


WAYS = {"prefill": (), "split": (2, 7, 9), "decode": tuple(range(1, T))}
DTYPES = [
    pytest.param("cpu", torch.float64, id="cpu-float64"),
    pytest.param("cpu", torch.float32, id="cpu-float32"),
    *(pytest.param("cuda", dtype, id=f"cuda-{str(dtype)[6:]}", marks=CUDA.marks)
      for dtype in (torch.float64, torch.float32, torch.bfloat16)),
]  # fmt: skip


@pytest.mark.parametrize("norm_memory", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("device", "dtype"), DTYPES)
def test_prefill_any_split_and_decoding_are_the_op_within_its_bounds(
    recorder: Recorder, device: str, dtype: torch.dtype, way: str, norm_memory: bool
) -> None:
    """The op meets the same tokens, starts each piece where it left the last, and keeps its bounds in each.

    Before the op all products are exact, so that ways of cutting differ there by the vector and the scalar code of
    elementary functions alone. Behind it the last product may be summed in another order.
    """
    module = dyadic(make(norm_memory=norm_memory)).to(device, dtype)
    x = (torch.randint(-4, 5, (B, T, HIDDEN), generator=torch.Generator().manual_seed(0)) / 4).to(device, dtype)
    with torch.no_grad():
        run(module, x, ())
        (whole,) = recorder.calls
        recorder.calls.clear()
        y, state = run(module, x, WAYS[way])
    calls = recorder.calls
    for call in calls:
        check_call(call, dtype, device)
    assert calls[0]["start"] is module.M_0
    for before, after in pairwise(calls):
        assert all(torch.equal(a, b) for a, b in zip(before["state"], after["start"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(calls[-1]["state"], state.memory, strict=True))
    check_inputs(whole, calls, dtype)
    with torch.no_grad():
        check_outputs(module, x, torch.cat([call["o"] for call in calls], 1), y)


def check_inputs(whole: dict[str, Any], calls: list[dict[str, Any]], dtype: torch.dtype) -> None:
    """The tokens of the pieces are those of one call: 8 operations, and for q and k a sum of D squares and a root."""
    for i, x in enumerate(whole["arguments"]):
        if i in (3, 4):
            assert all(call["arguments"][i] is x for call in calls)
        else:
            y = torch.cat([call["arguments"][i] for call in calls], 1)
            unit = torch.finfo(torch.float32 if i > 4 and dtype != torch.float64 else dtype).eps
            assert ((x - y).abs() <= (8 + D) * unit * x.abs()).all()


def check_outputs(module: TitansLinear, x: Tensor, o: Tensor, y: Tensor) -> None:
    """The layer's outputs are norm, gate and projection of the op's: sums of H D products in any order."""
    gate = module.g_proj(x).unflatten(-1, (H, D))
    normed = module.o_norm(o, gate).flatten(-2)
    bound = (
        2 * (H * D + 16) * torch.finfo(y.dtype).eps * (normed.abs().double() @ module.o_proj.weight.abs().double().T)
    )
    assert ((y.double() - module.o_proj(normed).double()).abs() <= bound).all()


def test_a_state_says_where_the_sequences_stand() -> None:
    module = make()
    with torch.no_grad():
        _, state = run(module, tokens(), (3, 4))
    assert state.memory.offset.tolist() == [T % C] * B
    assert [x.shape for x in state.conv] == [(B, H * D, 3)] * 3


@pytest.mark.parametrize("T", [1, T])
def test_a_state_is_returned_on_request_alone(T: int) -> None:
    module, x = make(), tokens(T=T)
    with torch.no_grad():
        o, attentions, state = module(x, output_attentions=True)
        assert attentions is None
        assert state is None
        again, _, state = module(x, use_cache=True)
        assert torch.equal(o, again)
        assert isinstance(module(x, state=state)[2], LayerState)


def test_a_state_may_be_plain_tuples() -> None:
    module, x = make(), tokens()
    with torch.no_grad():
        _, _, state = module(x, use_cache=True)
        plain = (tuple(state.memory), list(state.conv))
        wanted, _, final = module(x, state=state)
        found, _, final_too = module(x, state=plain)
    assert torch.equal(wanted, found)
    assert same(final, final_too)


def test_a_saved_and_loaded_state_resumes_the_sequence() -> None:
    module, x = make(), tokens()
    with torch.no_grad():
        _, _, state = module(x, use_cache=True)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        loaded = torch.load(file)
        assert isinstance(loaded, LayerState)
        assert torch.equal(module(x, state=loaded)[0], module(x, state=state)[0])


def test_a_state_is_neither_modified_nor_a_view() -> None:
    module, x = make(), tokens()
    with torch.no_grad():
        _, _, state = module(x, use_cache=True)
        before = copy.deepcopy(state)
        for T in (1, 5):
            _, _, after = module(x[:, :T], state=state)
            assert same(state, before)
        inputs = {y.untyped_storage().data_ptr() for y in (x, *leaves(state), *module.parameters())}
        assert not inputs & {y.untyped_storage().data_ptr() for y in leaves(after)}
        assert all(y.untyped_storage().nbytes() == y.nbytes for y in after.conv)


def test_a_state_can_be_cut_from_the_graph_and_moved() -> None:
    _, _, state = make()(tokens(), use_cache=True)
    assert state.memory.M.requires_grad
    assert not any(x.requires_grad for x in leaves(state.detach()))
    assert {x.device.type for x in leaves(state.to("meta", non_blocking=True))} == {"meta"}
    assert isinstance(state.detach().memory, TitansState)
    copied = state.clone()
    assert all(
        torch.equal(x, y) and x.data_ptr() != y.data_ptr() for x, y in zip(leaves(copied), leaves(state), strict=True)
    )
    assert all(torch.equal(x, y[[1]]) for x, y in zip(leaves(state.cpu().select(1)), leaves(state), strict=True))


# Padded and packed


def masks(kind: str) -> Tensor:
    lengths = torch.tensor([T, 4, 0, 1])[:, None]
    places = torch.arange(T)
    return (places < lengths if kind == "right" else places >= T - lengths).long()


@pytest.mark.parametrize("way", ["right", "left"])
@pytest.mark.parametrize("kind", [torch.int64, torch.bool], ids=str)
def test_a_padded_batch_equals_its_sequences_alone(recorder: Recorder, way: str, kind: torch.dtype) -> None:
    """As in the split: the op meets the tokens of each sequence, from its start, and the results are put back."""
    module, mask = dyadic(make()).double(), masks(way)
    x = (torch.randint(-4, 5, (4, T, HIDDEN), generator=torch.Generator().manual_seed(0)) / 4).double()
    with torch.no_grad():
        y, _, state = module(x, attention_mask=mask.to(kind), use_cache=True)
        (packed,) = recorder.calls
        bounds = [0, T, T + 4, T + 4, T + 5]
        assert not y[mask == 0].any()
        for n, (start, end) in enumerate(pairwise(bounds)):
            recorder.calls.clear()
            alone, _, final = module(x[n : n + 1, mask[n] == 1], use_cache=True)
            arguments = [z if i in (3, 4) else z[:, start:end] for i, z in enumerate(packed["arguments"])]
            check_inputs({"arguments": arguments}, recorder.calls, torch.float64)
            assert y[n : n + 1, mask[n] == 1].shape == alone.shape
            check_outputs(module, x[n : n + 1, mask[n] == 1], packed["o"][:, start:end], y[n : n + 1, mask[n] == 1])
            assert all(torch.equal(z[n : n + 1], cache) for z, cache in zip(state.conv, final.conv, strict=True))
            assert state.memory.offset[n] == final.memory.offset[0]


def test_a_padded_batch_resumes_and_a_longer_mask_counts_from_its_end() -> None:
    """As transformers call a layer while they generate: the mask is that of all tokens so far."""
    module, mask = make().double(), masks("left")
    x = tokens(B=4, dtype=torch.float64)
    more = torch.cat([mask, mask[:, -1:], mask[:, -1:]], 1)
    with torch.no_grad():
        _, _, state = module(x, attention_mask=mask, use_cache=True)
        y, _, final = module(x[:, :2], attention_mask=more, state=state)
        z, _, wanted = module(x[:, :2], attention_mask=more[:, -2:], state=state)
        assert torch.equal(y, z)
        assert same(final, wanted)
        untouched = LayerState(*(tuple(part[2:3] for part in parts) for parts in state))
        left = LayerState(*(tuple(part[2:3] for part in parts) for parts in final))
        assert same(untouched, left)


@pytest.mark.parametrize("T", [1, T])
def test_a_mask_of_ones_changes_nothing(T: int) -> None:
    module, x = make(), tokens(T=T)
    with torch.no_grad():
        y, _, state = module(x, attention_mask=torch.ones(B, T + 3).long(), use_cache=True)
        z, _, wanted = module(x, use_cache=True)
    assert torch.equal(y, z)
    assert same(state, wanted)


def test_packed_sequences_are_a_right_padded_batch() -> None:
    module, x = make(), tokens()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 4:] = False
    packed = torch.cat([x[0, :4], x[1]])[None]
    with torch.no_grad():
        y, _, state = module(x, attention_mask=mask, use_cache=True)
        z, _, wanted = module(packed, cu_seqlens=torch.tensor([0, 4, 4 + T]), use_cache=True)
    assert torch.equal(z[0], y[mask])
    assert same(state, wanted)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.zeros(B, T), TypeError, "`attention_mask` must mark .* got dtype float32"),
        (torch.zeros(B, 1, T, T).long(), ValueError, r"shape \(B, L\) = \(2, 11 or more\), got \(2, 1, 11, 11\)"),
        (torch.ones(B, T - 1).long(), ValueError, r"got \(2, 10\)"),
        (torch.arange(B * T).view(B, T), ValueError, "0 and 1 alone, got 0 to 21"),
    ],
)
def test_a_mask_that_is_none_of_padding_is_refused(mask: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()(tokens(), attention_mask=mask)


def test_contradictions_are_refused() -> None:
    module, x = make(), tokens()
    _, _, state = module(x, use_cache=True)
    module.chunk_size = C + 1
    with pytest.raises(ValueError, match="chunk_size"):
        module(x, state=state)
    module.chunk_size = C
    cases: list[tuple[dict[str, Any], str]] = [
        ({"attention_mask": torch.ones(B, T).bool(), "cu_seqlens": torch.tensor([0, T])}, "must not both"),
        ({"past_key_values": []}, "`layer_idx`"),
        ({"state": LayerState(state.memory, ())}, "3 convolutions, got 0"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            module(x, **arguments)
    module.layer_idx = 0
    with pytest.raises(ValueError, match="must not both"):
        module(x, past_key_values=[], state=state)
    with pytest.raises(TypeError, match=r"LinearAttentionLayer\(number_of_states=4\), got object"):
        module(x, past_key_values=object())
    with pytest.raises(ValueError, match="multiple of `num_heads` = 4"):
        TitansLinear(18)
    for name in ("hidden_size", "num_heads", "head_dim", "chunk_size", "conv_size"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1 and less than 2\\*\\*63, got 0"):
            TitansLinear(**{"hidden_size": 16, name: 0})
    for wrong in (x[0], x[..., :3]):
        with pytest.raises(ValueError, match=r"`hidden_states` must have shape \(B, T, \d+\), got "):
            module(wrong)


# In other people's programs


@pytest.mark.parametrize(
    "options", [{}, {"norm_memory": False}, {"use_short_conv": False}, {"use_gate": False}], ids=str
)
def test_a_state_dict_and_a_copy_hold_everything(options: dict[str, Any]) -> None:
    module, other = make(**options), make(seed=5, **options)
    other.load_state_dict(module.state_dict())
    x = tokens()
    assert torch.equal(module(x)[0], other(x)[0])
    assert torch.equal(module(x)[0], copy.deepcopy(module)(x)[0])
    module(x)[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_the_names_are_those_that_users_of_fla_know() -> None:
    names = {name.split(".")[0] for name, _ in make().named_parameters()}
    convolutions, projections = {f"{x}_conv1d" for x in "qkv"}, {f"{x}_proj" for x in "qkvgo"}
    assert names == convolutions | projections | {"o_norm", "gates", "M_0", "w", "b"}


@pytest.mark.parametrize("change", [copy.deepcopy, TitansLinear.double, lambda module: module.to("meta")])
def test_weight_decay_is_not_for_gate_biases_and_the_memory(change: Callable[[TitansLinear], TitansLinear]) -> None:
    marked = {name for name, p in change(make()).named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"gates.bias", "M_0", "w", "b"}


@pytest.mark.parametrize("reset", ["whole", "every module"])
def test_a_layer_from_the_meta_device_starts_like_any_other(reset: str) -> None:
    with torch.device("meta"):
        module = TitansLinear(HIDDEN, num_heads=H)
    module.to_empty(device="cpu")
    for p in module.parameters():
        nn.init.constant_(p, torch.nan)
    torch.manual_seed(0)
    if reset == "whole":
        module.reset_parameters()
    else:
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    fresh = TitansLinear(HIDDEN, num_heads=H)
    assert all(p.isfinite().all() for p in module.parameters())
    for name in ("gates.weight", "gates.bias", "w", "b", "o_norm.weight"):
        assert torch.equal(module.get_parameter(name), fresh.get_parameter(name))


@pytest.mark.parametrize("T", [1, T])
def test_a_compiled_layer_is_the_layer(T: int) -> None:
    """In one graph; the op's own tests compile it further."""
    module, x = make(), tokens(T=T)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        y, _, state = compiled(x, use_cache=True)
        z, _, wanted = module(x, use_cache=True)
        assert torch.equal(y, z)
        assert same(state, wanted)
        assert torch.equal(compiled(x, state=state)[0], module(x, state=state)[0])


def test_gradients_through_a_compiled_layer_are_the_layer_s() -> None:
    module, x = make(), tokens()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(call(x)[0].square().sum(), list(module.parameters())) for call in (module, compiled)]
    for (name, _), a, b in zip(module.named_parameters(), *grads, strict=True):
        assert torch.equal(a, b), name


# of `torch.export.load` in torch 2.11
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize("T", [1, T])
def test_prefill_and_a_step_of_decoding_can_be_exported(T: int) -> None:
    module, x = make(), tokens(T=T)
    with torch.no_grad():
        _, _, state = module(tokens(2), use_cache=True)
        file = io.BytesIO()
        torch.export.save(torch.export.export(module, (x,), {"state": state}), file)
        file.seek(0)
        y, _, final = torch.export.load(file).module()(x, state=state)
        z, _, wanted = module(x, state=state)
    assert torch.equal(y, z)
    assert same(final, wanted)


def test_gradients_are_the_same_under_checkpointing() -> None:
    module, x = make(), tokens()

    def grads(call: Callable[..., Any]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(x)[0].square().sum(), list(module.parameters()))

    def checkpointed(x: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)

    assert all(torch.equal(a, b) for a, b in zip(grads(module), grads(checkpointed), strict=True))


@pytest.mark.parametrize("T", [1, T])
def test_autocast_and_bfloat16_parameters_give_bfloat16_and_float32_states(T: int) -> None:
    x = tokens(T=T)
    with torch.autocast("cpu", torch.bfloat16):
        y, _, state = make()(x, use_cache=True)
    z, _, wanted = make().bfloat16()(x.bfloat16(), use_cache=True)
    assert y.dtype == z.dtype == torch.bfloat16
    for found in (state, wanted):
        assert {m.dtype for m in found.memory[:3]} == {torch.float32}
        assert {m.dtype for m in found.conv} == {torch.bfloat16}
    for o in (y, z):
        o.float().square().sum().backward()
        assert o.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_row_of_zeros_has_no_direction_and_makes_no_nan(dtype: torch.dtype) -> None:
    x = tokens(dtype=dtype)
    x[:, 5:] = 0
    x.requires_grad_()
    y, _, _ = make().to(dtype)(x)
    assert y.isfinite().all()
    y.float().sum().backward()
    assert x.grad is not None
    # 1 / sqrt(eps) for the row of q, times as much for that of o, is beyond float16
    assert dtype == torch.float16 or x.grad.isfinite().all()


@pytest.mark.parametrize("norm_memory", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_correlated_keys_of_a_long_sequence_stay_finite(device: str, norm_memory: bool) -> None:
    """T = 8192, keys correlated 0.9; and the plain memory stays of the size of the values."""
    T, C, D = 8192, 16, 16
    torch.manual_seed(0)
    gates = Gates(1, 1, C).to(device)
    k, v = torch.randn(2, 1, T, 1, D, device=device)
    k = nn.functional.normalize(0.9**0.5 * torch.randn(D, device=device) + 0.1**0.5 * k, dim=-1)
    w, b = (torch.ones(1, D, device=device), torch.zeros(1, D, device=device)) if norm_memory else (None, None)
    M_0 = torch.randn(1, 1, D, D, device=device) / D**0.5
    leaves = [x.requires_grad_() for x in (k, v, M_0)]
    logs = gates(torch.ones(1, T, 1, device=device))
    o, state = chunk_titans_linear(
        k, k, v, w, b, *logs, chunk_size=C, initial_state=M_0, output_final_state=True, log_gates=True
    )
    assert state is not None
    o.sum().backward()
    assert all(x.isfinite().all() for x in (o, *state))
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)
    if not norm_memory:
        assert state.M.norm() <= v.norm(dim=-1).max() * D**0.5


@pytest.mark.parametrize("gates", ["ours", "three sigmoids"])
def test_correlated_keys_overflow_a_plain_memory_with_the_customary_gates(gates: str) -> None:
    """T = 2048, keys correlated 0.7, all logits zero or at our start."""
    T, C, D = 2048, 16, 16
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, T, 1, D, generator=generator)
    k = 0.7**0.5 * torch.randn(D, generator=generator) + 0.3**0.5 * k
    k = nn.functional.normalize(k, dim=-1)
    logs = Gates(1, 1, C)(torch.zeros(1, T, 1)) if gates == "ours" else [torch.full((1, T, 1), 0.5).log()] * 3
    start = torch.zeros(1, 1, D, D)
    o, _ = chunk_titans_linear(k, k, v, None, None, *logs, chunk_size=C, initial_state=start, log_gates=True)
    largest = o.nan_to_num(torch.inf).abs().max()
    assert largest < v.abs().max() if gates == "ours" else largest > 1e30


class Doubled(nn.Module):
    """Stands for a fused module of a user: its own cache, updated in place, and its own activation."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.width = kernel_size

    def forward(
        self, x: Tensor, cache: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        cache = x.new_zeros(x.shape[0], x.shape[2], self.width) if cache is None else cache
        before = torch.cat([cache[..., -1:].transpose(1, 2), x[:, :-1]], 1)
        cache.copy_(torch.cat([cache, x.transpose(1, 2)], -1)[..., -self.width :])
        return x + before, cache if output_final_state else None


class Halved(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()

    def forward(self, o: Tensor, gate: Tensor) -> Tensor:
        return o * gate / 2


def test_a_users_convolution_and_norm_take_the_place_of_ours(recorder: Recorder) -> None:
    """The op meets the user's rows in one call and resumed, and the state that was passed in stays as it was."""
    module = dyadic(make(conv=Doubled, norm=Halved)).double()
    x = (torch.randint(-4, 5, (B, T, HIDDEN), generator=torch.Generator().manual_seed(0)) / 4).double()
    assert isinstance(module.q_conv1d, Doubled)
    with torch.no_grad():
        y, _, _ = module(x)
        (whole,) = recorder.calls
        recorder.calls.clear()
        _, _, state = module(x[:, :1], use_cache=True)
        before = copy.deepcopy(state)
        module(x[:, 1:], state=state)
        check_outputs(module, x, whole["o"], y)
    assert same(state, before)
    check_inputs(whole, recorder.calls, torch.float64)
    rows = module.v_proj(x).unflatten(-1, (H, D))
    rows[:, 1:] += rows[:, :-1].clone()
    assert torch.equal(whole["arguments"][2], rows)


def test_a_layer_of_a_downstream_program_passes_mypy(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    snippet = tmp_path / "downstream.py"
    snippet.write_text(
        """
import torch
from titans import TitansLinear, TitansState, chunk_titans_linear
from titans.caches import LayerState
from titans.compat.fla import chunk_titans_linear as as_fla

layer: TitansLinear = TitansLinear(64, num_heads=4, chunk_size=8)
x: torch.Tensor = torch.randn(2, 10, 64)
o, none, state = layer.forward(x, use_cache=True)
assert isinstance(state, LayerState)
memory: TitansState = state.detach().to("cpu").memory
again: torch.Tensor = layer(x, state=state)[0]
M: torch.Tensor = memory.M
"""
    )
    root = Path(__file__).parents[2]
    # the cache of `make lint`, so that torch is not analysed anew
    command = [sys.executable, "-m", "mypy", "--strict", str(snippet)]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout

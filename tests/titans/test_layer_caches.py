"""`TitansLinear` in the caches of fla and transformers, the real ones (group `peers`); skipped without them."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from titans import TitansLinear, TitansState
from titans.caches import LayerState

with warnings.catch_warnings():
    # fla warns where there is no GPU
    warnings.simplefilter("ignore")
    hf = pytest.importorskip("transformers.cache_utils")
    fla = pytest.importorskip("fla.models.cache_utils")

B, T, HIDDEN, C, IDX = 4, 10, 16, 4, 1
# rows that a search of beams keeps: one twice, one dropped
BEAMS = torch.tensor([2, 0, 0, 3])
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def of_transformers() -> Any:
    return hf.Cache(layers=[hf.LinearAttentionLayer(number_of_states=4) for _ in range(IDX + 1)])


def of_fla() -> Any:
    cache = fla.FLACache()
    # the layers before ours have been here
    for layer_idx in range(IDX):
        cache.update(layer_idx=layer_idx, recurrent_state=torch.zeros(B, 1), offset=0)
    return cache


CACHES = pytest.mark.parametrize("make", [of_fla, of_transformers])
OPTIONS = pytest.mark.parametrize("options", [{}, {"use_short_conv": False}, {"conv_size": 1}], ids=str)


def layer(**options: Any) -> TitansLinear:
    torch.manual_seed(0)
    module = TitansLinear(HIDDEN, num_heads=2, chunk_size=C, layer_idx=IDX, **options)
    torch.nn.init.normal_(module.gates.weight, std=0.25)
    return module


def tokens(*sizes: int) -> tuple[Tensor, ...]:
    return torch.randn(B, sum(sizes), HIDDEN, generator=torch.Generator().manual_seed(1)).split(list(sizes), 1)


def reordered(state: LayerState, rows: Tensor) -> LayerState:
    memory, conv = ([x.index_select(0, rows.to(x.device)) for x in part] for part in state)
    return LayerState(TitansState(*memory), tuple(conv))


@CACHES
@OPTIONS
def test_a_cache_resumes_like_a_state(make: Callable[[], Any], options: dict[str, Any]) -> None:
    module, cache, state = layer(**options), make(), None
    with torch.no_grad():
        for x in tokens(T, 1, 1, 3):
            y, _, returned = module(x, past_key_values=cache)
            z, _, state = module(x, state=state, use_cache=True)
            assert returned is cache
            assert torch.equal(y, z)


@CACHES
@OPTIONS
def test_beams_may_be_reordered(make: Callable[[], Any], options: dict[str, Any]) -> None:
    module, cache = layer(**options), make()
    first, second, third = tokens(T, 1, 3)
    with torch.no_grad():
        module(first, past_key_values=cache)
        _, _, state = module(first, use_cache=True)
        for x in (second, third):
            cache.reorder_cache(BEAMS)
            y, _, _ = module(x, past_key_values=cache)
            z, _, state = module(x, state=reordered(state, BEAMS))
            assert torch.equal(y, z)


@CACHES
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("back", [True, False], ids=["and back", "alone"])
def test_a_cache_may_be_offloaded(make: Callable[[], Any], device: str, back: bool) -> None:
    module, cache, state = layer().to(device), make(), None
    with torch.no_grad():
        for x in tokens(T, 1, 3):
            y, _, _ = module(x.to(device), past_key_values=cache)
            z, _, state = module(x.to(device), state=state, use_cache=True)
            assert torch.equal(y, z)
            cache.layers[IDX].offload()
            if back:
                cache.layers[IDX].prefetch()


@CACHES
def test_a_padded_batch_generates_from_a_cache(make: Callable[[], Any]) -> None:
    module, cache = layer(), make()
    x, more = tokens(T, 1)
    mask = (torch.arange(T) >= torch.tensor([0, 3, 7, 9])[:, None]).long()
    with torch.no_grad():
        y, _, _ = module(x, attention_mask=mask, past_key_values=cache)
        z, _, state = module(x, attention_mask=mask, use_cache=True)
        assert torch.equal(y, z)
        longer = torch.cat([mask, mask[:, -1:]], 1)
        assert torch.equal(
            module(more, attention_mask=longer, past_key_values=cache)[0],
            module(more, attention_mask=longer, state=state)[0],
        )


@CACHES
def test_a_cache_that_is_reset_starts_anew(make: Callable[[], Any]) -> None:
    module, cache = layer(), make()
    (x,) = tokens(T)
    with torch.no_grad():
        first, _, _ = module(x, past_key_values=cache)
        cache.layers[IDX].reset()
        again, _, _ = module(x, past_key_values=cache)
    assert torch.equal(first, again)


def test_fla_counts_the_tokens_padded_or_not() -> None:
    module, cache = layer(), of_fla()
    x, more = tokens(T, 1)
    with torch.no_grad():
        module(x, attention_mask=torch.ones(B, T).tril(T - 2).long(), past_key_values=cache)
        assert cache.get_seq_length(IDX) == T
        module(more, past_key_values=cache)
        assert cache.get_seq_length(IDX) == T + 1


def test_fla_may_repeat_and_copy_a_state() -> None:
    module, cache = layer(), of_fla()
    x, more = tokens(T, 1)
    with torch.no_grad():
        module(x[:2], past_key_values=cache)
        cache.layers[0].reset()
        kept = copy.deepcopy(cache)
        cache.batch_repeat_interleave(2)
        y, _, _ = module(more[:2].repeat_interleave(2, 0), past_key_values=cache)
        z, _, _ = module(more[:2], past_key_values=kept)
    assert torch.equal(y[::2], y[1::2])
    assert y.shape[0] == 2 * z.shape[0]


def test_flas_old_cache_works_too() -> None:
    module, cache, state = layer(), fla.LegacyFLACache(), None
    module.layer_idx = 0
    with torch.no_grad():
        for x in tokens(T, 1, 3):
            y, _, _ = module(x, past_key_values=cache)
            z, _, state = module(x, state=state, use_cache=True)
            assert torch.equal(y, z)


def test_transformers_sees_that_there_is_a_state() -> None:
    module, cache = layer(), of_transformers()
    assert not cache.has_previous_state(IDX)
    with torch.no_grad():
        _, _, _ = module(tokens(T)[0], past_key_values=cache)
        _, _, state = module(tokens(T)[0], use_cache=True)
    assert cache.has_previous_state(IDX)
    for i, x in enumerate(state.memory):
        assert torch.equal(cache.get_recurrent_state(IDX, i), x)
    for i, x in enumerate(state.conv):
        assert torch.equal(cache.get_conv_state(IDX, i), x)


def test_a_cache_without_room_is_refused() -> None:
    (x,) = tokens(T)
    cache = hf.Cache(layers=[hf.LinearAttentionLayer() for _ in range(IDX + 1)])
    with pytest.raises(ValueError, match=r"number_of_states = 4 \(M, S, anchor, offset\), got 1"):
        layer()(x, past_key_values=cache)
    with pytest.raises(TypeError, match="got DynamicCache"):
        layer()(x, past_key_values=hf.DynamicCache())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_flas_fused_modules_take_the_place_of_ours() -> None:
    """In bfloat16, prefilling and decoding: no further from float32 than twice what ours are."""
    modules = pytest.importorskip("fla.modules")
    norm = partial(modules.FusedRMSNormGated, activation="sigmoid")
    fused, half, single = (
        layer(**options).cuda() for options in ({"conv": modules.ShortConvolution, "norm": norm}, {}, {})
    )
    fused, half = fused.bfloat16(), half.bfloat16()
    half.load_state_dict(fused.state_dict())
    single.load_state_dict(fused.state_dict())

    def run(module: TitansLinear, sizes: tuple[int, ...]) -> Tensor:
        state, outputs = None, []
        for x in tokens(*sizes):
            y, _, state = module(x.cuda().bfloat16().to(module.M_0.dtype), state=state, use_cache=True)
            outputs.append(y.float())
        return torch.cat(outputs, 1)

    with torch.no_grad():
        for sizes in ((T,), (4, 1, 1, 4)):
            wanted = run(single, sizes)
            assert (run(fused, sizes) - wanted).norm() <= 2 * (run(half, sizes) - wanted).norm()

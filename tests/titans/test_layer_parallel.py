"""`TitansLinear` in tensor parallel over two processes, and its checkpoints."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from titans import TitansLinear
from titans.sharding import tensor_parallel

RANKS = 2


def build(**options: object) -> TitansLinear:
    torch.manual_seed(0)
    layer = TitansLinear(16, num_heads=4, head_dim=4, chunk_size=4, **options).double()  # type: ignore[arg-type]
    torch.nn.init.normal_(layer.gates.weight)
    return layer


def tokens() -> Tensor:
    return torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rounded(x: Tensor) -> Tensor:
    """Sums over heads are made in another order in float64; float32 does not show it."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).float()


def train(layer: TitansLinear, x: Tensor) -> list[Tensor]:
    """Three steps; return the losses, the gradients of the last one, and the parameters."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        # in other ways each time: whole, packed, and with padding
        o = layer(x)[0] + layer(x[:1], cu_seqlens=torch.tensor([0, 3, 7], device=x.device))[0]
        o = o + layer(x, attention_mask=(torch.arange(7) > torch.tensor([[2], [-1]])).to(x.device))[0]
        loss = o.square().sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    return [*losses, *gradients, *layer.parameters()]


def decoded(layer: TitansLinear, x: Tensor) -> list[Tensor]:
    """Return the outputs of a prefill and of a step, and the state."""
    o, _, state = layer(x[:, :6], use_cache=True)
    o_t, _, state = layer(x[:, 6:], state=state)
    return [o, o_t, state.memory.M, state.memory.S, *state.conv]


def work(rank: int, folder: str, device: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = {"cpu": "gloo", "cuda": "nccl"}[device]
    dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    mesh = init_device_mesh(device, (RANKS,))
    whole, shared = build().to(device), tensor_parallel(build().to(device), mesh)
    x = tokens().to(device)
    with CommDebugMode() as sent:
        shared(x)
    assert {str(kind): count for kind, count in sent.get_comm_counts().items()} == {"c10d_functional.all_reduce": 1}
    (o, o_t, M, S, *conv), (true_o, true_o_t, true_M, true_S, *true_conv) = (decoded(y, x) for y in (shared, whole))
    heads, channels = slice(2 * rank, 2 * rank + 2), slice(8 * rank, 8 * rank + 8)
    assert torch.equal(rounded(o), rounded(true_o))
    assert torch.equal(rounded(o_t), rounded(true_o_t))
    for found, true in ((M, true_M[:, heads]), (S, true_S[:, heads])):
        assert torch.equal(rounded(found), rounded(true))
    for found, true in zip(conv, true_conv, strict=True):
        assert torch.equal(rounded(found), rounded(true[:, channels]))
    results = [train(layer, x.clone()) for layer in (shared, whole)]
    for found, true in zip(*results, strict=True):
        assert torch.equal(rounded(found), rounded(true))
    assert shared.M_0.to_local().shape == (2, 4, 4)
    assert shared.M_0._no_weight_decay
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for layer, y in zip((shared, whole), inputs, strict=True):
        layer(y)[0].square().sum().backward()
    assert torch.equal(rounded(inputs[0].grad), rounded(inputs[1].grad))
    sharded = fully_shard(build().to(device), mesh=mesh)
    # both processes have the same tokens, so that the mean of their gradients is the gradient of each
    for found, true in zip(train(sharded, x.clone()), train(build().to(device), x.clone()), strict=True):
        assert torch.equal(rounded(found), rounded(true))
    for name, layer in (("heads", shared), ("fsdp", sharded)):
        checkpoint.save(get_model_state_dict(layer), checkpoint_id=f"{folder}/{name}")
        parameters = {key: p.full_tensor() for key, p in layer.state_dict().items()}
        if rank == 0:
            torch.save(parameters, f"{folder}/{name}.pt")
    dist.destroy_process_group()


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.skipif(sys.platform != "linux", reason="processes meet over a file")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])])
def test_a_layer_sharded_by_heads_is_the_layer_and_one_process_loads_its_checkpoint(
    tmp_path: Path, device: str
) -> None:
    multiprocessing.spawn(work, (str(tmp_path), device), RANKS)
    for name in ("heads", "fsdp"):
        saved = torch.load(tmp_path / f"{name}.pt", map_location="cpu")
        layer = build()
        torch.nn.init.zeros_(layer.q_proj.weight)
        parameters = layer.state_dict()
        with pytest.warns(UserWarning, match="load in a single process"):
            checkpoint.load(parameters, checkpoint_id=tmp_path / name, no_dist=True)
        layer.load_state_dict(parameters)
        assert saved.keys() == parameters.keys()
        assert all(torch.equal(p, saved[key]) for key, p in layer.state_dict().items()), name


class Mesh:
    def __init__(self, ndim: int) -> None:
        self.ndim = ndim

    def size(self) -> int:
        return 3


def test_a_layer_that_cannot_be_sharded_says_why() -> None:
    with pytest.raises(ValueError, match=re.escape("`num_heads` must be a multiple of the 3 processes, got 4")):
        tensor_parallel(build(), Mesh(1))
    with pytest.raises(ValueError, match="`mesh` must have one dimension, got 2"):
        tensor_parallel(build(), Mesh(2))

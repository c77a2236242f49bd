"""`TitansLinear` sharded by FSDP2 over two processes, without a GPU: the outputs and gradients of the whole layer."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from titans import TitansLinear

RANKS = 2


def build() -> TitansLinear:
    torch.manual_seed(0)
    return TitansLinear(16, num_heads=3, head_dim=4, chunk_size=4)


def tokens(rank: int) -> Tensor:
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(rank))


def loss(call: Callable[..., Any], rank: int) -> Tensor:
    """Prefill, and a step of decoding from its state."""
    x = tokens(rank)
    o, _, state = call(x[:, :5], use_cache=True)
    o_t, _, _ = call(x[:, 5:], state=state)
    result: Tensor = o.square().sum() + o_t.square().sum()
    return result


def work(rank: int, file: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(file, RANKS), rank=rank, world_size=RANKS)
    whole, sharded = build(), build()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (RANKS,)))
    losses = [loss(whole, each) for each in range(RANKS)]
    grads = zip(*(torch.autograd.grad(each, list(whole.parameters())) for each in losses), strict=True)
    mine = loss(sharded, rank)
    mine.backward()
    assert torch.equal(mine, losses[rank])
    for (name, p), (first, second) in zip(sharded.named_parameters(), grads, strict=True):
        # the mean of two is exact but for one rounding, in any order
        assert torch.equal(p.grad.full_tensor(), (first + second) / RANKS), name
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over a file")
def test_a_sharded_layer_is_the_layer(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (str(tmp_path / "store"),), RANKS)

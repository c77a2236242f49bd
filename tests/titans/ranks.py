"""Two processes that share one call through DTensor: `python -m tests.titans.ranks` prints which checks held, as JSON.

Each check compares with one process, bit for bit. DEVICE=cuda takes two GPUs and NCCL.
"""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from titans import TitansState, chunk_titans_linear, titans_linear_step
from titans.sharding import context_parallel

DEVICE = os.environ.get("DEVICE", "cpu")
BACKEND = "triton" if DEVICE == "cuda" else "chunk"
NAMES = ("q", "k", "v", "w", "b", "theta", "alpha", "eta", "M")
PLACEMENTS = {"replicated": (Replicate(),) * 3, "batch": (Shard(0), Replicate(), Shard(0)),
              "heads": (Shard(2), Shard(0), Shard(1))}  # fmt: skip


def inputs(B: int = 4, T: int = 37, H: int = 4, D: int = 8) -> dict[str, Tensor]:
    """Draw the arguments, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if DEVICE == "cuda" else torch.float64

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=dtype)

    q, k, v = normal(3, B, T, H, D).unbind()
    w, b = normal(2, H, D).unbind()
    theta, alpha, eta = (0.1 * normal(3, B, T, H).sigmoid()).unbind()
    values = (q, k / D**0.5, v, w, b, theta, alpha, eta, normal(B, H, D, D))
    return {name: x.to(DEVICE) for name, x in zip(NAMES, values, strict=True)}


def placed(x: dict[str, Tensor], mesh: DeviceMesh, kind: str) -> dict[str, Tensor]:
    """Return leaves sharded by one rule."""
    tokens, parameters, states = PLACEMENTS[kind]
    at = {"w": parameters, "b": parameters, "M": states}
    shards = {name: distribute_tensor(y, mesh, [at.get(name, tokens)]) for name, y in x.items()}
    return {name: y.detach().requires_grad_() for name, y in shards.items()}


def call(x: dict[str, Tensor], state: Any = None, **options: Any) -> tuple[Any, TitansState]:
    """Run the op."""
    *arguments, M = (x[name] for name in NAMES)
    state = M if state is None else state
    options = {"backend": BACKEND} | options
    o, final = chunk_titans_linear(*arguments, chunk_size=16, initial_state=state, output_final_state=True, **options)
    assert final is not None
    return o, final


def gradients(x: dict[str, Tensor], o: Tensor, final: TitansState) -> dict[str, Tensor]:
    """Return the gradients of a loss of the outputs and the final state."""
    loss = o.square().sum() + final.M.sum() + final.S.square().sum()
    return dict(zip(x, torch.autograd.grad(loss, list(x.values())), strict=True))


def whole(x: Any) -> Tensor:
    """Return all of a tensor on every rank."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def alone(x: dict[str, Tensor]) -> tuple[Tensor, TitansState, dict[str, Tensor]]:
    """Return results and gradients of one process, dw and db summed as two ranks of sequences sum theirs."""
    leaves = {name: y.clone().requires_grad_() for name, y in x.items()}
    o, final = call(leaves)
    return o, final, gradients(leaves, o, final)


def halves(x: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the gradients of each half of the sequences."""
    half = len(x["q"]) // 2
    parts = []
    for n in (slice(half), slice(half, None)):
        leaves = {name: (y if name in "wb" else y[n]).clone().requires_grad_() for name, y in x.items()}
        parts.append(gradients(leaves, *call(leaves)))
    return parts


def sharded(mesh: DeviceMesh, kind: str) -> None:
    """Values and gradients are those of one process, and nothing is sent to get them."""
    x = inputs()
    o, final, exact = alone(x)
    leaves = placed(x, mesh, kind)
    with CommDebugMode() as sent:
        shared_o, shared_final = call(leaves)
        loss = shared_o.to_local().square().sum() + shared_final.M.to_local().sum()
        loss = loss + shared_final.S.to_local().square().sum()
        found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    assert sent.get_total_counts() == 0, sent.get_comm_counts()
    assert shared_o.placements == leaves["q"].placements
    assert shared_final.M.placements == leaves["M"].placements
    for name, value, true in (("o", shared_o, o), *zip(final._fields, shared_final, final, strict=True)):
        assert torch.equal(whole(value), true), name
    if kind == "batch":
        first, second = halves(x)
        assert found["w"].placements == (Partial(),)
        exact |= {name: first[name] + second[name] for name in ("w", "b")}
    for name, value in found.items():
        assert torch.equal(whole(value), exact[name]), f"d{name}"


def by_batch(mesh: DeviceMesh) -> None:
    sharded(mesh, "batch")


def by_heads(mesh: DeviceMesh) -> None:
    sharded(mesh, "heads")


def replicated(mesh: DeviceMesh) -> None:
    sharded(mesh, "replicated")


def plain_memory(mesh: DeviceMesh) -> None:
    for kind in ("batch", "heads"):
        x = inputs()
        leaves = placed(x, mesh, kind)
        for y in (x, leaves):
            y["w"] = y["b"] = None  # type: ignore[assignment]
        o, _ = call(x)
        shared, _ = call(leaves)
        (dq,) = torch.autograd.grad(shared.to_local().sum(), leaves["q"])
        x["q"].requires_grad_()
        (exact,) = torch.autograd.grad(call(x)[0].sum(), x["q"])
        assert torch.equal(whole(shared), o)
        assert torch.equal(whole(dq), exact)


def packed_by_heads(mesh: DeviceMesh) -> None:
    x = inputs(B=1)
    bounds = torch.tensor([0, 5, 5, 37], dtype=torch.int32, device=DEVICE)
    x["M"] = x["M"].expand(3, -1, -1, -1).contiguous()
    o, final = call(x, cu_seqlens=bounds)
    everywhere = distribute_tensor(bounds, mesh, [Replicate()])
    shared_o, shared_final = call(placed(x, mesh, "heads"), cu_seqlens=everywhere)
    assert torch.equal(whole(shared_o), o)
    assert torch.equal(whole(shared_final.S), final.S)
    assert torch.equal(whole(shared_final.offset), final.offset)


def in_two_calls(x: dict[str, Tensor]) -> tuple[list[Any], TitansState]:
    """Return the outputs of the first 21 tokens and of the others, and the final state."""
    outputs, state = [], None
    for tokens in (slice(0, 21), slice(21, None)):
        part = {name: y if name in ("w", "b", "M") else y[:, tokens] for name, y in x.items()}
        o, state = call(part, state)
        outputs.append(o)
    assert state is not None
    return outputs, state


def a_sequence_resumed(mesh: DeviceMesh) -> None:
    for kind in ("batch", "heads"):
        x = inputs()
        (outputs, final), (shared, shared_final) = in_two_calls(x), in_two_calls(placed(x, mesh, kind))
        for value, true in zip((*shared, *shared_final), (*outputs, *final), strict=True):
            assert torch.equal(whole(value), true)


def tokens_to_heads_and_back(mesh: DeviceMesh) -> None:
    x = inputs(T=38)
    o, _ = call(x)
    leaves = placed(x, mesh, "heads")
    by_token = {
        name: distribute_tensor(x[name], mesh, [Shard(1)]) for name in NAMES if x[name].ndim > 2 and name != "M"
    }
    with CommDebugMode() as sent:
        exchanged = leaves | {name: context_parallel(y) for name, y in by_token.items()}
        shared = context_parallel(call(exchanged)[0])
    counts = {str(kind): count for kind, count in sent.get_comm_counts().items()}
    # gloo has no all-to-all, for which DTensor gathers there
    exchange = "alltoall" if DEVICE == "cuda" else "allgather"
    assert all(exchange in kind.replace("_", "") for kind in counts), counts
    assert sum(counts.values()) == len(by_token) + 1, counts
    assert shared.placements == (Shard(1),)
    assert torch.equal(whole(shared), o)


def in_the_kernels(mesh: DeviceMesh) -> None:
    """What the kernels' backward keeps is sharded, too."""
    x = {name: y.float() for name, y in inputs(B=2, T=5, H=2, D=4).items()}
    for kind, plain in (("batch", False), ("heads", True)):
        leaves, single = placed(x, mesh, kind), {name: y.clone().requires_grad_() for name, y in x.items()}
        if plain:
            leaves["w"] = leaves["b"] = single["w"] = single["b"] = None  # type: ignore[assignment]
        results = []
        for y in (leaves, single):
            o, _ = call(y, backend="triton")
            flowing = o.to_local() if isinstance(o, DTensor) else o
            results.append((o, *torch.autograd.grad(flowing.square().sum(), [y["k"], y["theta"], y["M"]])))
        for value, true in zip(*results, strict=True):
            assert torch.equal(whole(value), true), kind


def a_step(mesh: DeviceMesh) -> None:
    """One decoded token, in the kernel where there is one."""
    for kind in ("batch", "heads"):
        x = {name: y.float() for name, y in inputs(T=3).items()}
        token = {name: y[:, 0] for name, y in x.items() if name not in ("w", "b", "M")} | {"w": x["w"], "b": x["b"]}
        tokens, parameters, states = PLACEMENTS[kind]
        tokens = {Shard(2): Shard(1)}.get(tokens, tokens)
        at = {"w": parameters, "b": parameters}
        shards = {name: distribute_tensor(y, mesh, [at.get(name, tokens)]) for name, y in token.items()}
        start, shared_start = x["M"], distribute_tensor(x["M"], mesh, [states])
        for backend in ("chunk", "triton"):
            o, state = titans_linear_step(*(token[name] for name in NAMES[:-1]), start, chunk_size=4, backend=backend)
            shared_o, shared = titans_linear_step(
                *(shards[name] for name in NAMES[:-1]), shared_start, chunk_size=4, backend=backend
            )
            assert torch.equal(whole(shared_o), o), backend
            assert torch.equal(whole(shared.M), state.M), backend
            assert torch.equal(whole(shared.offset), state.offset), backend


def a_pipeline_of_ranks(mesh: DeviceMesh) -> None:
    """Rank 0 takes the first 21 tokens and hands its state to rank 1, which goes on in the middle of a chunk."""
    x = inputs()
    (first, second), final = in_two_calls(x)
    if mesh.get_rank() == 0:
        o, state = call({name: y if name in ("w", "b", "M") else y[:, :21] for name, y in x.items()})
        for y in state:
            dist.send(y.contiguous(), 1)
        assert torch.equal(o, first)
        return
    received = TitansState(*(torch.empty_like(y) for y in final))
    for y in received:
        dist.recv(y, 0)
    o, state = call({name: y if name in ("w", "b", "M") else y[:, 21:] for name, y in x.items()}, received)
    assert torch.equal(o, second)
    assert all(torch.equal(y, true) for y, true in zip(state, final, strict=True))


CHECKS: tuple[Callable[[DeviceMesh], None], ...] = (
    replicated, by_batch, by_heads, plain_memory, packed_by_heads, a_sequence_resumed, tokens_to_heads_and_back,
    in_the_kernels, a_step, a_pipeline_of_ranks,
)  # fmt: skip


def worker(rank: int, world: int, folder: str) -> None:
    """Run every check; rank 0 writes which held, as rank 1 does for itself."""
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mesh = init_device_mesh(DEVICE, (world,))
    found = {}
    for check in CHECKS:
        try:
            check(mesh)
            found[check.__name__] = ""
        except Exception:
            found[check.__name__] = traceback.format_exc()
        dist.barrier()
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


def main() -> None:
    """Print one object: the name of each check, and what went wrong in it on either rank."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (2, folder), nprocs=2)
        ranks = []
        for rank in range(2):
            with open(f"{folder}/{rank}.json") as file:
                ranks.append(json.load(file))
    json.dump({name: "".join(rank[name] for rank in ranks) for name in ranks[0]}, sys.stdout)


if __name__ == "__main__":
    main()

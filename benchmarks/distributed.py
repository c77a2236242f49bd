"""The op on several GPUs against one: by batch, by heads, and with context parallelism.

    torchrun --nproc-per-node 2 -m benchmarks.distributed

Forward and backward in bfloat16. A time is the median of the slowest rank, from a barrier to the end on its GPU. Memory
is the most that a rank held above its inputs. Bytes are those that a rank sends, computed from the exchanged shapes.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from benchmarks.workload import Inputs, Shape, environment, make_inputs, show
from titans import chunk_titans_linear
from titans.sharding import context_parallel

TOKENS = ("q", "k", "v", "theta", "alpha", "eta")
PLACEMENTS = {"batch": (Shard(0), Replicate(), Shard(0)), "heads": (Shard(2), Shard(0), Shard(1)),
              "context": (Shard(1), Shard(0), Shard(1))}  # fmt: skip


def placed(x: Inputs, mesh: DeviceMesh, kind: str) -> Inputs:
    """Return the inputs as leaves, sharded over the mesh."""
    tokens, parameters, states = PLACEMENTS[kind]
    at = dict.fromkeys(TOKENS, tokens) | dict.fromkeys(("w", "b"), parameters) | {"M": states}
    return Inputs(*(distribute_tensor(y, mesh, [at[name]]) for name, y in x._asdict().items())).with_grad()


def call(x: Inputs, C: int, exchange: bool = False) -> Tensor:
    """Run the forward; with context parallelism tokens are exchanged for heads before it, and back after it."""
    moved = x._asdict()
    if exchange:
        moved |= {name: context_parallel(moved[name]) for name in TOKENS}
    y = Inputs(**moved)
    o, _ = chunk_titans_linear(
        y.q, y.k, y.v, y.w, y.b, y.theta[..., 0], y.alpha[..., 0], y.eta[..., 0], chunk_size=C, initial_state=y.M
    )
    return context_parallel(o) if exchange else o


def both(x: Inputs, C: int, exchange: bool = False) -> Callable[[], Any]:
    """Return the forward and backward of a call."""
    with torch.no_grad():
        do = torch.ones_like(call(x, C, exchange))
    return lambda: torch.autograd.grad(call(x, C, exchange), x, do)


def synchronize(device: str) -> None:
    """Wait for this rank's device."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(run: Callable[[], Any], device: str, repeats: int, together: bool) -> tuple[float, float]:
    """Return milliseconds and MiB of the worst rank; alone, of this one."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        if together:
            dist.barrier()
        begin = time.perf_counter()
        run()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run()
    synchronize(device)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if device == "cuda" else float("nan")
    found = torch.tensor([statistics.median(times), peak], device=device)
    if together:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found[0]), float(found[1])


def sent(x: Inputs, kind: str, ranks: int) -> float:
    """Return the MiB that a rank sends: its shards but for its own share of them, and as much for their gradients."""
    if kind != "context":
        return 0.0
    exchanged = [getattr(x, name) for name in TOKENS] + [x.q]
    held = sum(float(y.numel() * y.element_size()) for y in exchanged) / ranks
    return 2 * held * (ranks - 1) / ranks / 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--shape", default="8,16384,16,64,64", metavar="B,T,H,D,C")
    parser.add_argument("--long", type=int, default=262144, help="length for context parallelism, one sequence")
    options = parser.parse_args()
    device, repeats = options.device, options.repeats
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank)
    mesh = init_device_mesh(device, (ranks,))
    shape = Shape(*map(int, options.shape.split(",")))
    rows: list[Sequence[str]] = []
    for size, kinds in ((shape, ("batch", "heads")), (Shape(1, options.long, shape.H, shape.D, shape.C), ("context",))):
        x = make_inputs(size, torch.bfloat16, device)
        alone = measure(both(x.with_grad(), size.C), device, repeats, together=False) if rank == 0 else (0.0, 0.0)
        dist.barrier()
        rows.append((f"{size}", str(size.C), "one GPU", f"{alone[0]:.2f}", "", f"{alone[1]:.0f}", "0"))
        for kind in kinds:
            time_, memory = measure(
                both(placed(x, mesh, kind), size.C, kind == "context"), device, repeats, together=True
            )
            ratio, bytes_ = alone[0] / time_, sent(x, kind, ranks)
            rows.append(
                (f"{size}", str(size.C), kind, f"{time_:.2f}", f"{ratio:.2f}", f"{memory:.0f}", f"{bytes_:.0f}")
            )
    if rank == 0:
        print(environment(f"torchrun --nproc-per-node {ranks} -m benchmarks.distributed", device), end="\n\n")
        header = (
            "(B, T, H, D)",
            "C",
            "sharded by",
            "forward + backward (ms)",
            "times one GPU",
            "MiB per GPU",
            "MiB sent",
        )
        show(header, rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

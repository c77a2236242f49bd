"""Time of the host for a call of the Triton backend: the whole time of the call, where the GPU is faster.

    python -m benchmarks.host                          # needs a CUDA GPU
    PYTHONPATH=OTHER python benchmarks/host.py         # the same of another version of this repository

A round queues a few calls on an idle GPU and stops its clock before it waits for them. So the GPU's own time does not
count, as long as the launches of a round fit the queue. Medians and least values of the rounds. In bfloat16.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.workload import Inputs, Shape, environment, make_inputs, show
from titans import chunk_titans_linear

SHAPES = [Shape(1, 128, 2, 64, 64), Shape(4, 4096, 16, 64, 64), Shape(4, 2048, 16, 128, 64), Shape(4, 4096, 16, 64, 16)]
CALLS = 10


def microseconds(call: Callable[[], Any], rounds: int) -> list[float]:
    """Microseconds of the host for a call, of each round, in order of size."""
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        taken.append(1e6 * (time.perf_counter() - began) / CALLS)
    # the first rounds compile, and fill the allocator
    return sorted(taken[rounds // 4 :])


def passes(x: Inputs, C: int) -> dict[str, Callable[[], Any]]:
    """Return the forward where nothing is recorded, where it is, and the forward with the backward."""
    leaves, do = x.with_grad(), torch.randn_like(x.q)

    def call(x: Inputs) -> Any:
        return chunk_titans_linear(
            *x[:-1], chunk_size=C, initial_state=x.M, output_final_state=True, backend="triton"
        )[0]  # fmt: skip

    def forward() -> None:
        with torch.no_grad():
            call(x)

    return {
        "forward": forward,
        "forward, recorded": lambda: call(leaves),
        "forward + backward": lambda: torch.autograd.grad(call(leaves), leaves, do),
    }


def rows(shape: Shape, rounds: int) -> list[Sequence[str]]:
    """Time the passes of a shape."""
    found: list[Sequence[str]] = []
    for name, call in passes(make_inputs(shape, torch.bfloat16, "cuda"), shape.C).items():
        taken = microseconds(call, rounds)
        found.append((str(shape), str(shape.C), name, f"{statistics.median(taken):.0f}", f"{taken[0]:.0f}"))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    options = parser.parse_args()
    print(environment("python -m benchmarks.host", "cuda"), end="\n\n")
    header = ["bfloat16, (B, T, H, D)", "C", "pass", "host, median (us)", "host, least (us)"]
    show(header, (row for shape in SHAPES for row in rows(shape, options.rounds)))


if __name__ == "__main__":
    main()

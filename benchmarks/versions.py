"""The op of several checkouts, timed in turn: did a change make it slower?

    git worktree add ../titans-before COMMIT
    python -m benchmarks.versions ../titans-before .

Each checkout gets a process of its own, with the timing code of this one. They take turns, so that a change in the
load of the machine meets all of them. Times are those of the Triton backend on the device, in ms, as in
`benchmarks.gpu`; the last column is the first checkout's time over the last one's.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.workload import Shape, environment, make_inputs, medians, show
from titans import chunk_titans_linear

HERE = Path(__file__).parents[1]
# of the Triton kernels, which every GPU runs, then of bfloat16 with 64 tokens, which has kernels of its own on Hopper
CASES = [
    ("float32", Shape(4, 2048, 16, 64, 64)),
    ("bfloat16", Shape(4, 4096, 16, 64, 16)),
    ("bfloat16", Shape(4, 4096, 16, 64, 64)),
]
# `titans` is imported from the checkout, then `benchmarks` from here
CHILD = """
import sys
sys.path[0] = sys.argv[1]
import titans
sys.path[0] = sys.argv[2]
from benchmarks.versions import answer
answer(int(sys.argv[3]), sys.argv[4])
"""


def answer(repeats: int, device: str) -> None:
    """In a checkout's process: time case i, forward and forward + backward, whenever a line asks for it."""
    for line in sys.stdin:
        print(*timed(*CASES[int(line)], repeats, device), flush=True)


def timed(dtype: str, shape: Shape, repeats: int, device: str) -> list[float]:
    """Time the forward alone and the forward with the backward to every input, in ms."""
    x = make_inputs(shape, getattr(torch, dtype), device).with_grad()
    do = torch.randn_like(x.q)

    def output() -> Tensor:
        return chunk_titans_linear(*x[:-1], chunk_size=shape.C, initial_state=x.M, backend="triton")[0]

    def forward() -> None:
        with torch.no_grad():
            output()

    def both() -> None:
        torch.autograd.grad(output(), x, do)

    return medians((forward, both), repeats, warm=5 if device == "cuda" else 1, device=device, ahead=True)


def compare(trees: Sequence[Path], rounds: int, repeats: int, device: str) -> Iterator[Sequence[str]]:
    """Yield the rows of the table."""
    ask = [sys.executable, "-c", CHILD]
    answers = [
        subprocess.Popen(
            [*ask, str(tree.resolve()), str(HERE), str(repeats), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for tree in trees
    ]
    for i, (dtype, shape) in enumerate(CASES):
        times: list[list[list[float]]] = [[] for _ in trees]
        for _ in range(rounds):
            for tree, child, own in zip(trees, answers, times, strict=True):
                assert child.stdin is not None
                assert child.stdout is not None
                print(i, file=child.stdin, flush=True)
                line = child.stdout.readline()
                if not line:
                    sys.exit(f"{tree} could not be timed: its own message stands above")
                own.append([float(x) for x in line.split()])
        for j, name in enumerate(("forward", "forward + backward")):
            row = [statistics.median(round[j] for round in own) for own in times]
            yield [dtype, str(shape), str(shape.C), name, *(f"{x:.3f}" for x in row), f"{row[0] / row[-1]:.2f}"]
    for child in answers:
        child.communicate()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", metavar="CHECKOUT", nargs="+", type=Path, help="the root of a checkout")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each checkout")
    parser.add_argument("--repeats", type=int, default=10, help="times each call is timed in a turn")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    print(environment("python -m benchmarks.versions " + " ".join(sys.argv[1:]), options.device), end="\n\n")
    header = ["dtype", "(B, T, H, D)", "C", "pass", *(tree.resolve().name for tree in options.trees), "first / last"]
    show(header, compare(options.trees, options.rounds, options.repeats, options.device))


if __name__ == "__main__":
    main()

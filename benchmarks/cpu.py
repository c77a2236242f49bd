"""The PyTorch backends on a CPU: against `fla.ops.titans`, against the token loop, and what a backward costs.

    python -m benchmarks.cpu              # needs the `peers` dependency group for the first table (`make bench`)

Ratios are of medians in one run, the calls timed in turn, in blocks, on one thread under `make bench`.

`fla.ops.titans.naive.chunk_titans_linear_ref` (0.6.0) does not compute the gradient of the loss it states: the first
term of its LayerNorm gradient is never divided. Its values cannot be compared with ours, so that it is only checked to
return the same shape and finite numbers. Ours are compared with the token loop in float64 over the first chunks.
"""

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.workload import Inputs, Shape, environment, make_inputs, medians, relative_error, show
from titans import chunk_titans_linear, titans_linear
from titans.backend import Backend

CHECKED_CHUNKS = 4
BLOCK = 300  # milliseconds
FLOAT32_SANITY = torch.finfo(torch.float32).eps ** 0.5


def forward(x: Inputs, C: int, backend: Backend) -> Tensor:
    """Run one forward pass of ours."""
    return chunk_titans_linear(*x[:-1], chunk_size=C, initial_state=x.M, backend=backend)[0]


def check(shape: Shape, backend: Backend) -> float:
    """Return the float32 error over the first chunks, relative to the token loop in float64; stop if it is absurd."""
    shape = Shape(shape.B, CHECKED_CHUNKS * shape.C, shape.H, shape.D, shape.C)
    x = make_inputs(shape)
    exact, _ = titans_linear(*x.to(torch.float64)[:-1], chunk_size=shape.C, initial_state=x.M.double())
    error = relative_error(forward(x, shape.C, backend), exact)
    if not error <= FLOAT32_SANITY:
        sys.exit(f"`{backend}` is wrong at {shape}, C = {shape.C}: relative error {error:.1e}")
    return error


def against_fla(shape: Shape, repeats: int) -> Sequence[str]:
    """Time a forward of `chunk` and of fla-core's reference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fla warns of the missing GPU, of flash-attn, ...
        from fla.ops.titans.naive import chunk_titans_linear_ref

    x = make_inputs(shape)

    def fla() -> Tensor:
        # It writes to its gates where T is not a multiple of C, which is not so here.
        o: Tensor = chunk_titans_linear_ref(*x[:-1], chunk_size=shape.C, initial_state=x.M)[0]
        return o

    theirs, ours = fla(), forward(x, shape.C, "chunk")
    assert theirs.shape == ours.shape
    assert theirs.isfinite().all()
    error = check(shape, "chunk")
    with torch.no_grad():
        time_fla, time_chunk = medians([fla, lambda: forward(x, shape.C, "chunk")], repeats, warm=0, block=BLOCK)
    return _row(f"forward, `chunk` against fla-core {shape}", shape, time_chunk, time_fla, error)


def against_ours(shape: Shape, other: Backend, repeats: int) -> Sequence[str]:
    """Time a forward of `chunk` and of another backend of ours."""
    x = make_inputs(shape)
    error = max(check(shape, "chunk"), check(shape, other))
    calls = [lambda: forward(x, shape.C, "chunk"), lambda: forward(x, shape.C, other)]
    with torch.no_grad():
        time_chunk, time_other = medians(calls, repeats, block=BLOCK)
    return _row(f"forward, `chunk` against `{other}` {shape}", shape, time_chunk, time_other, error)


def backward_against_forward(shape: Shape, backend: Backend, repeats: int) -> Sequence[str]:
    """Time a forward that records for the backward, and the backward for every input."""
    x = make_inputs(shape).with_grad()
    outputs = [forward(x, shape.C, backend)]
    do = torch.randn_like(outputs[0])

    def run_forward() -> None:
        outputs[0] = forward(x, shape.C, backend)

    def run_backward() -> None:
        torch.autograd.grad(outputs[0], x, do, retain_graph=True)

    time_forward, time_backward = medians([run_forward, run_backward], repeats, block=BLOCK)
    return _row(f"`{backend}`: forward, then backward {shape}", shape, time_forward, time_backward, None)


def _row(what: str, shape: Shape, ours: float, other: float, error: float | None) -> Sequence[str]:
    shown = "" if error is None else f"{error:.1e}"
    return what, str(shape.C), f"{ours:.1f}", f"{other:.1f}", f"{other / ours:.1f}", shown


def peak_memory(shape: Shape, backend: Backend) -> int:
    """Return by how many bytes a forward and backward raise this process's peak resident memory."""
    small = make_inputs(Shape(1, 2 * shape.C, 1, shape.D, shape.C)).with_grad()
    torch.autograd.backward(forward(small, shape.C, backend).sum())  # code and thread pools are loaded
    x = make_inputs(shape).with_grad()
    before = _peak_resident()
    torch.autograd.backward(forward(x, shape.C, backend).sum())
    return _peak_resident() - before


def _peak_resident() -> int:
    """Read the peak since the process began: in a child, or an earlier peak hides this one (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def memory_row(shape: Shape, backend: Backend) -> Sequence[str]:
    """Measure the peak in a child; show it beside the bytes of the inputs and of two states per chunk."""
    sizes = ",".join(map(str, (shape.B, shape.T, shape.H, shape.D, shape.C)))
    command = [sys.executable, "-m", "benchmarks.cpu", "--memory-of", sizes, "--backend", backend]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    inputs = 4 * shape.B * shape.T * shape.H * (3 * shape.D + 3)
    states = 2 * 4 * shape.B * -(-shape.T // shape.C) * shape.H * shape.D**2
    megabytes = [f"{size / 2**20:.1f}" for size in (inputs, states, peak)]
    return f"`{backend}` {shape}", str(shape.C), *megabytes, f"{peak / (inputs + states):.1f}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="times each call is timed")
    parser.add_argument("--no-fla", action="store_true", help="leave fla-core out")
    parser.add_argument("--memory-of", metavar="B,T,H,D,C", help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="chunk", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(peak_memory(Shape(*map(int, options.memory_of.split(","))), options.backend))
        return
    n = options.repeats
    print(environment("python -m benchmarks.cpu", "cpu"), end="\n\n")
    rows: list[Callable[[], Sequence[str]]] = []
    if not options.no_fla:
        rows += [partial(against_fla, Shape(1, 1024, 4, 64, C), min(n, 3)) for C in (64, 16)]
    rows.append(lambda: against_ours(Shape(1, 4096, 4, 64, 64), "recurrent", n))
    rows += [partial(against_ours, Shape(1, 4096, 4, 64, C), "log", n) for C in (64, 16)]
    backends: tuple[Backend, ...] = ("chunk", "log")
    for backend in backends:
        rows += [partial(backward_against_forward, Shape(1, 1024, 4, 64, C), backend, n) for C in (64, 16)]
    header = ["float32, (B, T, H, D)", "C", "first (ms)", "second (ms)", "second / first", "error against float64"]
    show(header, (row() for row in rows))
    header = ["forward and backward, float32", "C", "inputs (MiB)", "states (MiB)", "peak (MiB)", "peak / both"]
    shapes = [Shape(1, T, 4, 64, 16) for T in (1024, 2048, 4096, 8192)]
    show(header, (memory_row(shape, "chunk") for shape in shapes))


if __name__ == "__main__":
    main()

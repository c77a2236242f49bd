"""The Triton backend on a GPU, against the nearest kernels there are: fla-core's `chunk_ttt_linear`.

    python -m benchmarks.gpu              # needs the `peers` dependency group
    python -m benchmarks.gpu --decode     # decoding alone: see `benchmarks.decoding`

TTT-Linear has the same LayerNorm gradient and chunk chain, but one state, no forgetting and no momentum: ours does
more work. All in bfloat16, medians of CUDA events on a warm GPU, the calls taken in turn, the L2 cache flushed before
each: as called, and on the device alone, when the host has queued a call's launches before its clock starts. The
difference is the cost of launching on that host. A must is required, an aim is not; both are of the device's time
unless a column says "called".

Before a shape is timed, ours is compared with our own `chunk` backend in float64 on the same bfloat16 inputs: outputs,
final state and every gradient over the first chunks, then outputs and final memory over the whole length, which the
gates drawn here leave well conditioned. The table names the largest of the errors ||value - exact|| / ||exact||. The
property suite is the judge of accuracy; this comparison only makes sure that the op is timed.

Exits with 1 if a result is wrong or a required ratio is missed.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import decoding
from benchmarks.workload import Inputs, Shape, environment, make_inputs, medians, milliseconds, relative_error, show
from titans import TitansState, chunk_titans_linear
from titans.backend import Backend

CHECKED_CHUNKS = 4
BFLOAT16_SANITY = 8 * torch.finfo(torch.bfloat16).eps


@dataclass(frozen=True)
class Goal:
    """How many times faster than TTT ours must be, and should be: on the device, and as called.

    Where TTT does not run, how many milliseconds ours may take on the device.
    """

    must: float | None = None
    aim: float | None = None
    called: float | None = None
    alone: float | None = None


@dataclass(frozen=True)
class Case:
    """A shape with its goals; `ours_only`: the others are not made for such chunks."""

    shape: Shape
    forward: Goal = Goal()
    both: Goal = Goal()
    ours_only: bool = False


CASES = [
    Case(Shape(4, 4096, 16, 64, 64), Goal(2.3, 3, called=2), Goal(2, 3, called=2)),
    Case(Shape(8, 4096, 33, 64, 64), Goal(1.8, 2.5), Goal(1.7, 2.5)),
    Case(Shape(4, 2048, 16, 128, 64), Goal(1.4, 2.3), Goal(alone=1.7)),
    Case(Shape(4, 4096, 16, 64, 16), Goal(1.6, 2, called=2), Goal(1.7, 2, called=2)),
    Case(Shape(4, 2048, 16, 128, 16), Goal(1.3, 1.8), Goal(1.2, 1.6)),
]
LONG_CHUNKS = [
    Case(Shape(B, T, 16, D, C), ours_only=True) for C in (256, 1024) for B, T, D in ((4, 4096, 64), (4, 2048, 128))
]


def titans(x: Inputs, C: int, backend: Backend, plain: bool = False) -> tuple[Tensor, TitansState]:
    """Run one forward of ours."""
    w, b = (None, None) if plain else (x.w, x.b)
    o, state = chunk_titans_linear(
        x.q, x.k, x.v, w, b, x.theta, x.alpha, x.eta,
        chunk_size=C, initial_state=x.M, output_final_state=True, backend=backend,
    )  # fmt: skip
    assert state is not None
    return o, state


def ttt(x: Inputs, C: int) -> tuple[Tensor, Any]:
    """Run one forward of fla-core's TTT-Linear, without states, as it is fastest; `theta` is its learning rate."""
    from fla.ops.ttt import chunk_ttt_linear

    o, state = chunk_ttt_linear(x.q, x.k, x.v, x.w, x.b, x.theta, chunk_size=C)[:2]
    return o, state


def fla_titans(x: Inputs, C: int) -> Tensor:
    """Run one forward of fla-core's Titans, whose values are wrong (see `benchmarks.cpu`)."""
    from fla.ops.titans.naive import chunk_titans_linear_ref

    o: Tensor = chunk_titans_linear_ref(*x[:-1], chunk_size=C, initial_state=x.M)[0]
    return o


def errors(shape: Shape, backend: Backend, device: str) -> Iterator[tuple[str, float]]:
    """Compare ours with `chunk` in float64: name and relative error of each result."""
    C = shape.C
    # the more tokens in a chunk, the fewer sequences: float64 takes memory by their product
    B = max(1, min(shape.B, 256 // C))
    head = make_inputs(Shape(B, CHECKED_CHUNKS * C, shape.H, shape.D, C), torch.bfloat16, device)
    x, exact = head.with_grad(), head.to(torch.float64).with_grad()
    (o, state), (exact_o, exact_state) = titans(x, C, backend), titans(exact, C, "chunk")
    yield "o", relative_error(o, exact_o)
    yield "M", relative_error(state.M, exact_state.M)
    yield "S", relative_error(state.S, exact_state.S)
    cotangents = [torch.randn_like(y) for y in (o, state.M, state.S)]
    gradients = torch.autograd.grad([o, state.M, state.S], x, cotangents)
    exact_gradients = torch.autograd.grad(
        [exact_o, exact_state.M, exact_state.S], exact, [y.double() for y in cotangents]
    )
    for name, value, true in zip(Inputs._fields, gradients, exact_gradients, strict=True):
        yield f"d{name}", relative_error(value, true)
    whole = make_inputs(shape, torch.bfloat16, device)
    with torch.no_grad():
        for plain, name in ((False, "o"), (True, "plain o")):
            exact_o, exact_state = titans(whole.to(torch.float64), C, "chunk", plain)
            o, state = titans(whole, C, backend, plain)
            yield f"{name}, whole length", relative_error(o, exact_o)
            yield f"{name[:-1]}M, whole length", relative_error(state.M, exact_state.M)


def passes(x: Inputs, call: Callable[[Inputs], tuple[Tensor, Any]]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return the forward alone (nothing recorded) and the forward with the backward to every input."""
    leaves = x.with_grad()
    with torch.no_grad():
        do = torch.randn_like(call(x)[0])

    def forward() -> None:
        with torch.no_grad():
            call(x)

    def both() -> None:
        torch.autograd.grad(call(leaves)[0], leaves, do, allow_unused=True)

    return forward, both


def peak_memory(call: Callable[[], Any], device: str) -> float:
    """Return the MiB a call needs above what was there before it."""
    if torch.device(device).type != "cuda":
        return float("nan")
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def runs(call: Callable[[], Any]) -> str:
    """Return why a call cannot run, or nothing: TTT's backward does not fit on the chip everywhere."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
    return ""


def compare(case: Case, backend: Backend, device: str, repeats: int) -> Iterator[tuple[bool, Sequence[str]]]:
    """Time one case, forward alone and with the backward: whether the musts are met, and the table's row."""
    shape = case.shape
    x = make_inputs(shape, torch.bfloat16, device)
    ours = passes(x, lambda y: titans(y, shape.C, backend))
    why_not = "" if case.ours_only else runs(lambda: passes(x, lambda y: ttt(y, shape.C)))
    theirs = None if case.ours_only or why_not else passes(x, lambda y: ttt(y, shape.C))
    names = ("forward", "forward + backward")
    for i, (name, goal) in enumerate(zip(names, (case.forward, case.both), strict=True)):
        calls, reason = [ours[i]], why_not
        if theirs is not None:
            reason = runs(theirs[i])
            calls += [] if reason else [theirs[i]]
        called, alone = (medians(calls, repeats, warm=5, device=device, ahead=ahead) for ahead in (False, True))
        memory = [peak_memory(call, device) for call in calls]
        label = [str(shape), str(shape.C), name]
        if len(calls) == 1:
            met, required = judged(-alone[0], None if goal.alone is None else -goal.alone)
            yield met, [*label, f"{alone[0]:.3f}", reason[:60], "", required, "", f"{called[0]:.3f}", "", "", "",
                        f"{memory[0]:.0f}", ""]  # fmt: skip
            continue
        ratios = alone[1] / alone[0], called[1] / called[0]
        (met, required), (called_met, called_required) = judged(ratios[0], goal.must), judged(ratios[1], goal.called)
        lean = memory[0] <= memory[1] or i == 0
        yield (
            met and called_met and lean,
            [
                *label, f"{alone[0]:.3f}", f"{alone[1]:.3f}", f"{ratios[0]:.2f}", required, f"{goal.aim or ''}",
                f"{called[0]:.3f}", f"{called[1]:.3f}", f"{ratios[1]:.2f}", called_required,
                f"{memory[0]:.0f}" + ("" if lean else " MISSED"), f"{memory[1]:.0f}",
            ],
        )  # fmt: skip


def judged(value: float, must: float | None) -> tuple[bool, str]:
    """Return whether a value is as large as it must be, and what to print of it; a negative one is a time."""
    met = must is None or value >= must
    return met, "" if must is None else f"{abs(must):g}" + (" ms" if must < 0 else "") + ("" if met else " MISSED")


def against_fla_titans(shape: Shape, backend: Backend, device: str, repeats: int) -> Sequence[str]:
    """Time a forward of ours and, once and cold (it takes seconds), of fla-core's Titans."""
    x = make_inputs(shape, torch.bfloat16, device)
    with torch.no_grad():
        (ours,) = medians([lambda: titans(x, shape.C, backend)], repeats, warm=5, device=device)
        theirs = milliseconds(lambda: fla_titans(x, shape.C), device)
    return str(shape), str(shape.C), f"{ours:.3f}", f"{theirs:.0f}", f"{theirs / ours:.0f}"


def main() -> None:
    """Print the tables, each row when it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton", help="the backend of ours that is timed")
    parser.add_argument("--repeats", type=int, default=30, help="times each call is timed")
    parser.add_argument("--shape", metavar="B,T,H,D,C", help="this shape only, with nothing required of it")
    parser.add_argument("--long-chunks", action="store_true", help="chunks of 256 and 1024 tokens only, ours alone")
    parser.add_argument("--no-fla-titans", action="store_true", help="leave out fla-core's Titans (half a minute)")
    parser.add_argument("--decode", action="store_true", help="time decoding, and nothing else")
    options = parser.parse_args()
    device, backend = options.device, options.backend
    cases = [Case(Shape(*map(int, options.shape.split(","))))] if options.shape else CASES
    cases = LONG_CHUNKS if options.long_chunks else cases
    warnings.simplefilter("ignore")  # fla warns of packages that are not installed
    print(environment(f"python -m benchmarks.gpu {' '.join(sys.argv[1:])}".strip(), device), end="\n\n")

    verdicts: list[bool] = []
    if options.decode:
        show(decoding.HEADER, decoding.compare(device, options.repeats, verdicts))
        sys.exit(not all(verdicts))

    def timed() -> Iterator[Sequence[str]]:
        for case in cases:
            # NaN, if there is one
            result, error = max(errors(case.shape, backend, device), key=lambda found: (math.isnan(found[1]), found[1]))
            right = error <= BFLOAT16_SANITY
            for met, row in compare(case, backend, device, options.repeats):
                verdicts.append(met and right)
                yield [*row, f"{error:.1e} {result}" + ("" if right else " WRONG")]

    columns = ["pass", "ours, device (ms)", "TTT (ms)", "ratio", "must", "aim"]
    columns += ["ours, called (ms)", "TTT (ms)", "ratio", "must", "peak memory (MiB)", "TTT's (MiB)", "largest error"]
    show(["bfloat16, (B, T, H, D)", "C", *columns], timed())
    if not options.no_fla_titans:
        small = (case.shape for case in cases if case.shape.D <= 64 and case.shape.H <= 16 and not case.ours_only)
        show(
            ["forward, (B, T, H, D)", "C", "titans (ms)", "fla.ops.titans, once (ms)", "ratio"],
            (against_fla_titans(shape, backend, device, options.repeats) for shape in small),
        )
    q = make_inputs(cases[0].shape, torch.bfloat16, device).q
    (copied,) = medians([lambda: [q.clone() for _ in range(4)]], options.repeats, warm=5, device=device)
    print(f"For scale: copying q, k, v and o of {cases[0].shape} once takes {copied:.3f} ms.")
    sys.exit(not all(verdicts))


if __name__ == "__main__":
    main()

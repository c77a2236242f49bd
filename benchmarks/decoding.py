"""Decoding on a GPU: a step of a `TitansState` against one of a `DecodeState`; `python -m benchmarks.gpu --decode`.

Device time of a step, averaged over a block, at whose end the memory moves: the steps of a block are captured in a CUDA
graph, which is replayed. Before a shape is timed, decoded outputs are compared with those of one call over the whole
sequence, whose bits they have on an H200.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.workload import Inputs, Shape, make_inputs, medians, relative_error
from titans import DecodeState, TitansState, chunk_titans_linear, titans_linear_step

C = 64
COPIED = 2**30  # bytes, more than any cache


@dataclass(frozen=True)
class Decoding:
    """A shape with its goals: how many times faster than a step of a `TitansState`."""

    N: int
    H: int
    D: int
    must: float
    aim: float

    def __str__(self) -> str:
        return f"({self.N}, {self.H}, {self.D})"


CASES = [Decoding(64, 16, 64, 2, 4), Decoding(256, 16, 128, 2, 4), Decoding(1, 16, 64, 1, 1)]


def start(x: Inputs) -> TitansState:
    """Return the state that the inputs begin with."""
    return TitansState(x.M, torch.zeros_like(x.M), x.M, x.M.new_zeros(len(x.M), dtype=torch.int64), C)


def tokens(x: Inputs) -> list[tuple[Tensor, ...]]:
    """Return q, k, v and the gates of each token, contiguous, so that a step is one launch."""
    each = (x.q, x.k, x.v, x.theta, x.alpha, x.eta)
    return [tuple(y[:, t].contiguous() for y in each) for t in range(x.q.shape[1])]


def step(x: Inputs, token: tuple[Tensor, ...], state: Any, **options: Any) -> Any:
    """Decode a token."""
    q, k, v, theta, alpha, eta = token
    return titans_linear_step(q, k, v, x.w, x.b, theta, alpha, eta, state, chunk_size=C, backend="triton", **options)


def difference(x: Inputs) -> float:
    """Return ||decoded - one call|| / ||one call|| of the outputs."""
    o, _ = chunk_titans_linear(*x[:8], chunk_size=C, initial_state=start(x))
    state = DecodeState.begin(start(x), x.q.dtype)
    return relative_error(torch.stack([step(x, token, state, in_place=True)[0] for token in tokens(x)], 1), o)


def moved(case: Decoding) -> tuple[float, float]:
    """Return the bytes that a step of either state must move, in bfloat16, averaged over a block."""
    square, row = case.D**2, case.D
    before = 6 * 4 * square
    # M0 and S0; half of the rows k and u; the coefficients; the token
    every = 2 * 2 * square + C / 2 * 2 * 2 * row + 3 * C * 4 + 8 * row
    # M and S in and out, the anchor, M0, S0 and A; all rows
    end = 5 * 4 * square + 3 * 2 * square + C * 6 * row
    return case.N * case.H * before, case.N * case.H * (every + end / C)


def graph_of(x: Inputs, carries: bool) -> Callable[[], Any]:
    """Capture the steps of a block; return what replays them."""
    # as many full blocks as the warm-up, so that the block starts where a chunk does
    states: list[Any] = [DecodeState.begin(start(x), x.q.dtype) if carries else start(x)]

    own = tokens(x)

    def block() -> None:
        for token in own:
            _, states[0] = step(x, token, states[0], in_place=carries)

    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        block()
    torch.cuda.synchronize()
    graph, first = torch.cuda.CUDAGraph(), states[0]
    with torch.cuda.graph(graph):
        block()

    def replay() -> None:
        # the graph reads them, so they must live as long
        _ = own, first
        graph.replay()

    return replay


def bandwidth(device: str, repeats: int) -> float:
    """Return the bytes per second of a copy, those read and those written."""
    source: Tensor = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (copied,) = medians([lambda: target.copy_(source)], repeats, warm=3, device=device)
    return 2 * COPIED / copied * 1e3


def compare(device: str, repeats: int, verdicts: list[bool]) -> Iterator[Sequence[str]]:
    """Time each case: the table's rows; whether the musts are met, and outputs are right, goes to `verdicts`."""
    copy = bandwidth(device, repeats)
    for case in CASES:
        x = make_inputs(Shape(case.N, C, case.H, case.D, C), torch.bfloat16, device)
        few = make_inputs(Shape(3, 2 * C + 7, case.H, case.D, C), torch.bfloat16, device, seed=1)
        with torch.no_grad():
            apart = difference(few)
            graphs = [graph_of(x, carries) for carries in (False, True)]
        times = [1e3 * ms / C for ms in medians(graphs, repeats, warm=3, device=device)]
        rates = [bytes_ / us * 1e6 for bytes_, us in zip(moved(case), times, strict=True)]
        ratio = times[0] / times[1]
        verdicts += [apart <= torch.finfo(torch.bfloat16).eps, ratio >= case.must]
        yield [
            str(case), *(f"{us:.1f}" for us in times), f"{ratio:.2f}",
            f"{case.must:g}" + ("" if ratio >= case.must else " MISSED"), f"{case.aim:g}",
            *(f"{rate / 1e12:.2f} ({rate / copy:.0%})" for rate in rates), f"{apart:.1e}",
        ]  # fmt: skip
        del graphs
        torch.cuda.empty_cache()


HEADER = [
    "bfloat16, (N, H, D)", "TitansState (us)", "DecodeState (us)", "ratio", "must", "aim",
    "TitansState, TB/s (of a copy)", "DecodeState, TB/s (of a copy)", "difference to one call",
]  # fmt: skip

"""What the benchmarks run, and how they time it."""

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CACHE = 2**28  # bytes, more than the L2 cache of any GPU
AHEAD = 10**7  # cycles, some 5 ms


@dataclass(frozen=True)
class Shape:
    """Size of one benchmark: batch, length, heads, head width and chunk length."""

    B: int
    T: int
    H: int
    D: int
    C: int

    def __str__(self) -> str:
        return f"({self.B}, {self.T}, {self.H}, {self.D})"


class Inputs(NamedTuple):
    """The arguments of the op that have a gradient; `M` is the initial memory.

    The memory does not start at zero: there the gradient of the normalised loss is scaled by 1 / sqrt(eps).
    The gates keep the recurrence stable, so that float32 results can be compared at all.
    """

    q: Tensor  # (B, T, H, D)
    k: Tensor  # (B, T, H, D), unit rows
    v: Tensor  # (B, T, H, D)
    w: Tensor  # (H, D)
    b: Tensor  # (H, D)
    theta: Tensor  # (B, T, H, 1) in (0, 0.02)
    alpha: Tensor  # (B, T, H, 1) in (0, 0.1)
    eta: Tensor  # (B, T, H, 1) in (0, 1)
    M: Tensor  # (B, H, D, D) float32

    def with_grad(self) -> "Inputs":
        """Return leaves with the same values that require gradients."""
        return Inputs(*(x.detach().clone().requires_grad_() for x in self))

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Return the same values in another dtype."""
        return Inputs(*(x.detach().to(dtype) for x in self))


def make_inputs(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
    """Draw the arguments of the op, the same on every device."""
    B, T, H, D = shape.B, shape.T, shape.H, shape.D
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    drawn = Inputs(
        q=F.normalize(normal(B, T, H, D), dim=-1),
        k=F.normalize(normal(B, T, H, D), dim=-1),
        v=normal(B, T, H, D),
        w=1 + 0.1 * normal(H, D),
        b=0.1 * normal(H, D),
        theta=0.02 * normal(B, T, H, 1).sigmoid(),
        alpha=0.1 * normal(B, T, H, 1).sigmoid(),
        eta=normal(B, T, H, 1).sigmoid(),
        M=normal(B, H, D, D),
    )
    return Inputs(*(x.to(device, dtype) for x in drawn))._replace(M=drawn.M.to(device))


def milliseconds(call: Callable[[], Any], device: str = "cpu", ahead: bool = False) -> float:
    """Time one call: CUDA events on a GPU, its cache flushed first; the host's clock elsewhere.

    `ahead` keeps the GPU busy while the host queues the call, so that its launches cost nothing.
    """
    if torch.device(device).type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.empty(CACHE, dtype=torch.uint8, device=device).zero_()
        if ahead:
            torch.cuda._sleep(AHEAD)  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def medians(
    calls: Sequence[Callable[[], Any]],
    repeats: int,
    warm: int = 1,
    device: str = "cpu",
    ahead: bool = False,
    block: float = 0,
) -> list[float]:
    """Time the calls in turn, so that a change in the machine's load meets all of them.

    Parameters
    ----------
    calls
        What to time.
    repeats, warm
        Rounds that are timed, and rounds before them that are not.
    device, ahead
        As in `milliseconds`.
    block
        Time each call again and again in its turn, for this many milliseconds: one that takes less is then not
        judged by the caches and the heap that the call before it left behind.

    Returns
    -------
    list of float
        The median of each call's times, in milliseconds.
    """
    for _ in range(warm):
        for call in calls:
            call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, own in zip(calls, times, strict=True):
            spent = 0.0
            while True:
                own.append(milliseconds(call, device, ahead))
                spent += own[-1]
                if spent >= block:
                    break
    return [statistics.median(own) for own in times]


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Return ||value - exact|| / ||exact||, NaN if anything is not finite."""
    exact = exact.detach().double()
    return float((value.detach().double() - exact).norm() / exact.norm())


def environment(command: str, device: str) -> str:
    """Describe a run: date, command, device, versions."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.processor() or "CPU"
    packages = ", ".join(f"{package} {_version(package)}" for package in ("torch", "triton", "fla-core"))
    return (
        f"{date.today()}, {name} ({torch.get_num_threads()} host thread(s)), "
        f"Python {platform.python_version()}, {packages}: `{command}`"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def show(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown, row by row as they come: a run that is cut off has said something."""
    for cells in chain((header, ["---"] * len(header)), rows):
        print(f"| {' | '.join(cells)} |", flush=True)
    print()

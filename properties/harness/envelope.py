"""The envelope of a run: how many calls an implementation got, by their sizes and by the way of calling."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from properties.harness.implementations import Implementation

# By the text that a count is kept under, "SIZE UP_TO" or "way WAY".
Counts = Mapping[str, int]
SIZES = ("D", "C", "T", "N", "H", "N x H", "pieces")
# The first arguments of a call.
ROWS = ("q", "k", "v", "w", "b", "theta", "alpha", "eta")


def counted(implementation: Implementation, counts: Counter[str]) -> Implementation:
    """Return an implementation that counts its calls."""
    lock, step = threading.Lock(), implementation.step

    def counting(function: Callable[..., Any], of: Callable[..., Iterable[str]]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            found = [*of(*arguments, **options)]
            with lock:
                counts.update(found)
            return function(*arguments, **options)

        return call

    return replace(implementation, call=counting(implementation.call, of_call), step=step and counting(step, of_step))


def of_call(*arguments: Any, cu_seqlens: Tensor | None = None, **options: Any) -> Iterator[str]:
    """Say under what a call is counted, from its arguments."""
    *rows, _, C, start, wanted = arguments
    B, T, H, D = rows[0].shape
    lengths = [T] * B if cu_seqlens is None else cu_seqlens.diff().tolist()
    offset = getattr(start, "offset", None)
    offsets = [0] * len(lengths) if offset is None else offset.tolist()
    pieces = max((-(-(begin + n) // C) - begin // C for begin, n in zip(offsets, lengths, strict=True) if n), default=0)
    sizes = D, C, max(lengths, default=0), len(lengths), H, len(lengths) * H, pieces
    yield from (f"{name} {ceiling(x)}" for name, x in zip(SIZES, sizes, strict=True))
    tensors = {name: x for name, x in zip(ROWS, rows, strict=True) if x is not None}
    ways = {
        "packed": cu_seqlens is not None,
        "M alone": isinstance(start, Tensor),
        "resumed": offset is not None,
        "inside a chunk": any(offsets),
        "no final state": not wanted,
        **ways_of(tensors, parts_of(start), **options),
    }
    yield from (f"way {way}" for way, holds in ways.items() if holds)


def of_step(*arguments: Any, **options: Any) -> Iterator[str]:
    """Say under what a call of one token is counted."""
    *rows, state, _, C = arguments
    N, H, D = rows[0].shape
    sizes = D, C, 1, N, H, N * H, 1
    yield from (f"{name} {ceiling(x)}" for name, x in zip(SIZES, sizes, strict=True))
    tensors = {name: x for name, x in zip(ROWS, rows, strict=True) if x is not None}
    resumed = getattr(state, "offset", None) is not None
    ways = {"step": True, "resumed": resumed} | ways_of(tensors, parts_of(state), **options)
    yield from (f"way {way}" for way, holds in ways.items() if holds)


def ways_of(
    tensors: Mapping[str, Tensor], state: Sequence[Tensor], log_gates: bool = False, **_: Any
) -> dict[str, bool]:
    """Return which ways of calling hold, whatever is called."""
    q, everything = tensors["q"], [*tensors.values(), *state]
    needing = [x.requires_grad for x in everything]
    records = torch.is_grad_enabled() and any(needing)
    dtypes = {name: x.dtype for name, x in tensors.items()}
    return {
        "normalised": "w" in tensors,
        "log gates": log_gates,
        str(q.dtype).removeprefix("torch."): True,
        "gates of another dtype": dtypes["theta"] != q.dtype,
        "w of another dtype": dtypes.get("w", q.dtype) != q.dtype,
        "gates with a last axis": tensors["theta"].ndim == q.ndim,
        "gradients of all": records and all(needing),
        "gradients of some": records and not all(needing),
        "no_grad": not torch.is_grad_enabled() and not torch.is_inference_mode_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "not contiguous": not all(x.is_contiguous() for x in everything),
        "expanded": any(x.numel() and 0 in strides(x) for x in everything),
        "shared memory": len({x.untyped_storage().data_ptr() for x in everything if x.numel()})
        < sum(x.numel() > 0 for x in everything),
        "not finite": not all(bool(x.isfinite().all()) for x in (q, *state)),
        "another thread": threading.current_thread() is not threading.main_thread(),
        "another default dtype": torch.get_default_dtype() != torch.float32,
        "another default device": torch.get_default_device().type != "cpu",
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
    }


def parts_of(state: Any) -> list[Tensor]:
    """Return the matrices of an initial state."""
    found = [state] if isinstance(state, Tensor) else [getattr(state, name, None) for name in ("M", "S", "anchor")]
    return [x for x in found if isinstance(x, Tensor)]


def strides(x: Tensor) -> list[int]:
    """Return the strides of the axes that have more than one entry."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def ceiling(x: int) -> int:
    """Return the least power of two from a size on, or 0."""
    return 1 << (x - 1).bit_length() if x else 0


def tables(verdicts: Sequence[Any]) -> list[str]:
    """Return the lines of every implementation: the calls of all laws together, and the problems of law 20."""
    lines: list[str] = []
    for name in dict.fromkeys(row.implementation for row in verdicts):
        counts, rows = Counter[str](), [row for row in verdicts if row.implementation == name]
        for row in rows:
            counts.update(row.envelope)
        ways = [(row.law.removeprefix("test_"), row.calls) for row in rows if "5.20" in row.sections and row.calls]
        lines += [*table(name, counts), *(f"    {law:80}{calls:6} problems" for law, calls in ways)]
    return lines


def table(name: str, counts: Counts) -> list[str]:
    """Return the lines of an implementation: how many calls there were of each size, and of each way of calling."""
    by: dict[str, list[tuple[str, int]]] = {}
    for key, count in counts.items():
        kind, _, value = key.rpartition(" ") if not key.startswith("way ") else key.partition(" ")
        by.setdefault(kind, []).append((value, count))
    calls = sum(count for _, count in by.get("D", []))
    lines = [f"envelope of {name}: {calls} calls"]
    for size in SIZES:
        cells = sorted((int(value), count) for value, count in by.get(size, []))
        lines.append(f"    {size:8}" + "".join(f"  {span(value)}: {count}" for value, count in cells))
    ways = sorted(by.get("way", []), key=lambda found: -found[1])
    return lines + [f"    {way:28}{count:10}" for way, count in ways]


def span(last: int) -> str:
    """Write the sizes that are counted together up to a power of two, or 0."""
    return str(last) if last < 3 else f"{last // 2 + 1}-{last}"

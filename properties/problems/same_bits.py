"""Problems that a sequence may be cut or passed otherwise in: their lengths lie beside the ends of blocks."""

import functools
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from properties.problems.problem import HALF, Problem
from properties.problems.real_sizes import DECAY, MOMENTUM, THETA

# Rows of blocks, whose ends lie where chunks end, too.
BLOCKS = (16, 32, 64)


@functools.cache
def ends(C: int, shortest: int, most: int) -> SearchStrategy[int]:
    """Draw a length from `shortest` to `most`: often within 1 of the end of a block, or of a chunk."""
    units = {rows // C * C if C <= rows else C if C % rows else rows for rows in BLOCKS} | {C}
    edges = {n + d for unit in units for n in range(unit, most + 2, unit) for d in (-1, 0, 1)}
    # The plainest, with which every run begins, ends in a second chunk: one with a single token says little.
    fitting = sorted((n for n in edges if shortest <= n <= most), key=lambda n: (abs(n - C - 1), n))
    return st.sampled_from(fitting or [most]) | st.integers(shortest, most)


@st.composite
def uncut(
    draw: st.DrawFn,
    /,
    *,
    D: Sequence[int] = (4, 3, 72, 16, 2, 8, 33, 64, 1, 66),
    C: Sequence[int] = (16, 3, 32, 8, 1, 48, 64, 40, 96, 200, 256, 512),
    shortest: int = 1,
    most: int = 100,
    cells: int = 200,
    heads: int = 2,
    sequences: int = 2,
    fewest: int = 1,
    packed: bool | None = None,
    initial: Sequence[str] = ("none", "M", "full", "momentum"),
    dtypes: Sequence[str] = ("float32", *HALF, "float32", "float64"),
    **fixed: Any,
) -> Problem:
    """Draw a problem in which nothing explodes, nothing is forgotten and no number is lost.

    Parameters
    ----------
    D, C, initial, dtypes : sequence
        The choices, the plainest first.
    shortest, most, cells : int
        At least and most so many tokens in a sequence; at most so many in all heads of all sequences.
    heads : int
        At most so many.
    fewest, sequences : int
        At least and most so many sequences.
    packed : bool or None
        None: either.
    **fixed
        Fields of `Problem`, or strategies for them.
    """
    chunk, N, H = draw(st.sampled_from(C)), draw(st.integers(fewest, sequences)), draw(st.integers(1, heads))
    is_packed, state = draw(st.booleans()) if packed is None else packed, draw(st.sampled_from(initial))
    # Short chunks are many steps.
    room = max(shortest, min(most, cells // (N * H), 40 if chunk < 4 else most))
    lengths = [draw(ends(chunk, shortest, room)) for _ in range(N if is_packed else 1)]
    # A whole number of blocks before the call began, or any other.
    place = st.sampled_from([n for n in (0, 16, 32, 64, 1, chunk - 1, chunk // 2) if n < chunk])
    offsets = [draw(place) for _ in range(N)]
    if not is_packed and draw(st.booleans()):
        # Where a batch can be cut, all its sequences can.
        offsets = offsets[:1] * N
    fields: dict[str, Any] = {
        "memory": st.sampled_from(("normalised", "plain")),
        "theta": st.sampled_from(THETA),
        "alpha": st.sampled_from(DECAY),
        "eta": st.sampled_from(MOMENTUM),
        "state": st.sampled_from(("random 0", "random -2", "unit 0")),
        "gate_dtype": st.sampled_from(("float32", *HALF)),
        "log_gates": st.booleans(),
    } | fixed
    return Problem(
        lengths=tuple(lengths if is_packed else lengths * N),
        packed=is_packed,
        H=H,
        D=draw(st.sampled_from(D)),
        C=chunk,
        initial=state,
        offsets=tuple(offsets) if state == "full" else (),
        dtype=draw(st.sampled_from(dtypes)),
        **{name: draw(field) if isinstance(field, SearchStrategy) else field for name, field in fields.items()},
        seed=draw(st.integers(0, 2**16)),
    )

"""Problems as large as real calls: few of them, with gates and values that leave something to compare."""

import functools
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from properties.problems.problem import HALF, Problem

# Tiles have such sizes, and their edges lie beside them.
TILES = (16, 32, 64, 128, 256)
# Gates that are another in each token and head: nothing explodes in a chunk, and little is forgotten.
THETA = ("uniform -3", "random 2^-8 2^-4", "constant 2^-6", "uniform -8", "alternate 2^-5 0")
DECAY = ("uniform -3", "random 2^-8 2^-3", "constant 2^-6", "spike 2^-8 1 -1", "alternate 0 2^-2", "uniform 0")
MOMENTUM = ("uniform 0", "random 2^-1 2^-3", "constant 2^-1", "alternate 0 1-2^-2", "spike 2^-1 0 0")


@functools.cache
def sizes(most: int, common: int = 1) -> SearchStrategy[int]:
    """Draw a size in [1, most]: half of the time a tile, or within 1 of a multiple of a tile, from `common` on.

    A failure shrinks towards the smallest size that fails, however its size was drawn.
    """
    beside = [n + d for tile in TILES for n in range(tile, most + 2, tile) for d in (-1, 0, 1)]
    beside = [n for n in beside if common <= n <= most] or [most]
    # What is written for one size is written for a tile.
    tiles = [n for n in TILES if common <= n <= most] or [most]
    edges = [*beside * max(1, most // 2 // len(beside)), *tiles * max(1, most // 2 // len(tiles))]
    return st.sampled_from(sorted([*range(1, most + 1), *edges]))


@st.composite
def real_problems(
    draw: st.DrawFn,
    /,
    *,
    D: int = 64,
    C: int = 64,
    chunks: int = 1,
    cells: int = 2**19,
    heads: int = 2,
    sequences: int = 3,
    memories: Sequence[str] = ("plain", "normalised"),
    dtypes: Sequence[str] = ("float32", "float64", *HALF, "float32", "float64"),
    initial: Sequence[str] = ("M", "full", "none"),
    packed: bool | None = None,
    **fixed: Any,
) -> Problem:
    """Draw a problem with D and C up to these; whatever is `fixed` has that value.

    Parameters
    ----------
    chunks : int
        At most so many in a sequence; 1: every sequence lies within one chunk.
    cells : int
        At most so many tokens x heads x D^2.
    heads, sequences, memories, dtypes, initial, packed
        See `strategies.problems`.
    """
    memory, dtype = draw(st.sampled_from(memories)), draw(st.sampled_from(dtypes))
    width, chunk = draw(sizes(D, max(min(32, D), D // 2))), draw(sizes(C, min(16, C)))
    H, N = draw(st.integers(1, heads)), draw(st.integers(1, sequences))
    is_packed, state = draw(st.booleans()) if packed is None else packed, draw(st.sampled_from(initial))
    room = max(1, cells // (N * H * width**2))
    offset = st.one_of(st.just(0), st.integers(0, chunk - 1)) if state == "full" else st.just(0)
    offsets = [draw(offset)] * N if not is_packed else draw(st.lists(offset, min_size=N, max_size=N))
    lengths = [
        min(room, draw(sizes(chunks * chunk - x, min(chunk, 16)))) for x in (offsets if is_packed else offsets[:1])
    ]
    fields: dict[str, Any] = {
        "theta": st.sampled_from(THETA),
        "alpha": st.sampled_from(DECAY),
        "eta": st.sampled_from(MOMENTUM),
        "q": st.sampled_from(("unit 0", "random 0")),
        "v": st.sampled_from(("random 0", "random -2", "unit 2")),
        "w": st.sampled_from(("random 0", "flat 0")),
        "state": st.sampled_from(("random -2", "random 0", "unit 0")),
        "cotangent": st.sampled_from(("o M S anchor", "o", "o M S anchor", "o M", "o M S anchor")),
        "gate_dtype": st.sampled_from(("float32", "bfloat16", "float16")),
        "log_gates": st.booleans(),
        "eps": st.sampled_from((1e-6, 1e-5)),
    } | fixed
    return Problem(
        lengths=tuple(lengths if is_packed else lengths * N),
        packed=is_packed,
        H=H,
        D=width,
        C=chunk,
        memory=memory,
        initial=state,
        offsets=tuple(offsets) if state == "full" else (),
        dtype=dtype,
        **{name: draw(field) if isinstance(field, SearchStrategy) else field for name, field in fields.items()},
        seed=draw(st.integers(0, 2**16)),
    )

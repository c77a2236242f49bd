"""Problems for Hypothesis: all that are valid, not only likely ones. They shrink towards the plainest call."""

import functools
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from properties.problems.gate_kinds import GATE_KINDS
from properties.problems.problem import HALF, Problem
from properties.problems.value_kinds import VALUE_KINDS

# Gates in [0, 1], mild ones first: ends of the range, last bits of each format, smallest normals and subnormals.
NEAR_0 = tuple(f"2^-{n}" for n in (2, 3, 4, 8, 11, 16, 24, 25, 53, 64, 126, 133, 149, 1022, 1074, 2000))
NEAR_1 = tuple(f"1-2^-{n}" for n in (2, 3, 4, 6, 8, 11, 12, 16, 24, 25, 53, 160, 2000))
UNIT_LEVELS = ("2^-1", *NEAR_0[:3], *NEAR_1[:3], "0", "1", *NEAR_0[3:], *NEAR_1[3:])
THETA_LEVELS = ("2^-1", *NEAR_0[:3], "2^0", "2^1", "2^3", "0", *NEAR_0[3:])
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23)
EPS = (1e-6, 1e-5, 1e-3, 1.0)
# The most that one problem may cost the oracle: tokens * heads * D^2.
CELLS = 1200
# Learning rates that amplify next to nothing.
CALM_THETAS = ("random 2^-4 2^-6", "constant 2^-5", "alternate 2^-4 0", "uniform -5", "single 0 2^-4 1")


@st.composite
def gates(draw: st.DrawFn, /, levels: Sequence[str] = UNIT_LEVELS, C: int = 16, T: int = 16) -> str:
    """Draw the text of a gate."""
    kinds = gate_texts(tuple(levels), C, T, "1" in levels and draw(st.booleans()))
    return draw(kinds[draw(st.sampled_from(tuple(kinds)))])


# To make a strategy takes as long as many draws from it.
@functools.cache
def gate_texts(levels: tuple[str, ...], C: int, T: int, near_1: bool) -> dict[str, SearchStrategy[str]]:
    """Return strategies for the texts of gates by kind; fading ones are a power of two, or so much below 1."""
    # A decay of 2^-n whose product leaves float32 within a chunk, and only over the whole sequence.
    fading = [-(-150 // max(n, 1)) for n in (C, T, 2 * C, 2 * T)]
    form = "1-2^-{}" if near_1 else "2^-{}"
    kinds = {name: kind.texts(levels, T) for name, kind in GATE_KINDS.items()}
    kinds["fading"] = st.builds("constant {}".format, st.sampled_from([form.format(n) for n in fading]))
    if {"0", "1"} <= {*levels}:
        kinds["switch"] = st.sampled_from(("alternate 0 1", "alternate 1 0"))
        kinds["saturated"] = st.sampled_from(("sigmoid 16 1", "sigmoid -16 1"))
    return kinds


@st.composite
def lengths_near(draw: st.DrawFn, /, C: int, most: int, shortest: int = 0) -> int:
    """Draw a length near a multiple of C, a prime, or any."""
    edges = {1, 0, C - 1, C, C + 1, *(n * C + d for n in (2, 3) for d in (-1, 0, 1)), *PRIMES}
    fitting = sorted((T for T in edges if shortest <= T <= most), key=lambda T: (T == 0, T))
    return draw(st.one_of(st.sampled_from(fitting), st.integers(shortest, most)))


@functools.cache
def values(huge: int, tiny: int) -> SearchStrategy[str]:
    """Draw the text of q, k or v; `huge` and `tiny` are the exponents of the largest and smallest sizes."""
    texts = {name: kind.texts(huge, tiny) for name, kind in VALUE_KINDS.items()}
    # Together these are as frequent as one of the others.
    special = st.sampled_from([texts.pop(name) for name in ("signs", "integers", "basis", "flat", "zero")])
    return st.one_of(texts.pop("unit"), texts.pop("random"), special.flatmap(lambda text: text), *texts.values())


MILD_VALUES = st.sampled_from(("random 0", "unit 0", "random -2", "random 2", "signs", "equal 0", "flat 0", "basis"))
STATES = st.sampled_from(
    ("random 0", "random -4", "random 2", "unit 0", "equal 0", "flat 0", "zero", "integers 2", "random -20")
)


@st.composite
def problems(
    draw: st.DrawFn,
    /,
    *,
    D: Sequence[int] = (1, 2, 3, 4, 5, 7, 8),
    C: Sequence[int] = (1, 2, 3, 4, 5, 7, 8, 16),
    heads: int = 3,
    fewest_heads: int = 1,
    sequences: int = 3,
    fewest: int = 1,
    most: int = 24,
    shortest: int = 0,
    memories: Sequence[str] = ("plain", "normalised"),
    dtypes: Sequence[str] = ("float32", "float64", *HALF),
    initial: Sequence[str] = ("none", "M", "full", "zero"),
    packed: bool | None = None,
    log_gates: bool | None = None,
    unit_levels: Sequence[str] = UNIT_LEVELS,
    theta_levels: Sequence[str] = THETA_LEVELS,
    wild: bool = True,
    **fixed: Any,
) -> Problem:
    """Draw any problem within these choices; whatever is `fixed` has that value.

    Of those in half precision every other one is `calm`. On tensor cores operands keep 8 or 11 bits, and
    where more is made of their errors, nothing is left that a bound could promise.

    Parameters
    ----------
    D, C, memories, dtypes, initial, unit_levels, theta_levels : sequence
        The choices, the plainest first.
    heads, sequences, most : int
        At most so many heads, sequences, and tokens in a sequence.
    fewest_heads, fewest, shortest : int
        At least so many heads, sequences, and tokens in a sequence.
    packed, log_gates : bool or None
        None: either.
    wild : bool
        Whether q, k and v may be huge, tiny or all zero.
    **fixed
        Fields of `Problem`, or strategies for them.
    """
    memory, dtype = draw(st.sampled_from(memories)), draw(st.sampled_from(dtypes))
    width, chunk, H = draw(st.sampled_from(D)), draw(st.sampled_from(C)), draw(st.integers(fewest_heads, heads))
    is_packed = draw(st.booleans()) if packed is None else packed
    N = draw(st.integers(fewest, sequences))
    # Rounding errors grow exponentially over the chunks of a normalised memory.
    chunks = 3 * chunk + 1 if memory == "normalised" else most
    longest = max(1, shortest, min(most, CELLS // (N * H * width**2), chunks))
    length = lengths_near(chunk, longest, shortest)
    lengths = tuple(draw(st.lists(length, min_size=N, max_size=N))) if is_packed else (draw(length),) * N
    start = draw(st.sampled_from(initial))
    # Every branch with as many choices: to Hypothesis a problem with fewer choices is smaller.
    place = st.sampled_from([*range(chunk), *[chunk - 1] * chunk])
    kinds = values(*{"float64": (40, -300), "float16": (3, -14)}.get(dtype, (12, -120))) if wild else MILD_VALUES
    narrower: tuple[str, ...] = {"float64": ("float64", "float32", *HALF)}.get(dtype, ("float32", *HALF))
    if dtype not in narrower or not set(HALF) & set(dtypes):
        narrower = (dtype,)
    unit, theta = (gates(levels, chunk, max(lengths)) for levels in (unit_levels, theta_levels))
    fields: dict[str, Any] = {
        "theta": theta,
        "alpha": unit,
        "eta": unit,
        "q": kinds,
        "k": kinds,
        "v": kinds,
        "w": st.sampled_from(("random 0", "flat 0", "zero", "random 2")),
        "b": st.sampled_from(("random 0", "zero")),
        "state": STATES,
        "cotangent": st.sampled_from(("o M S anchor", "o", "M", "S", "anchor", "o M", "M S anchor")),
        "log_gates": st.booleans() if log_gates is None else st.just(log_gates),
        "eps": st.sampled_from(EPS),
        "gate_dtype": st.sampled_from(narrower),
    } | fixed
    if memory == "plain":
        fields = {name: fields[name] for name in fields if name not in ("w", "b", "eps")}
    problem = Problem(
        lengths=lengths,
        packed=is_packed,
        H=H,
        D=width,
        C=chunk,
        memory=memory,
        initial=start,
        offsets=tuple(draw(st.lists(place, min_size=N, max_size=N))) if start == "full" else (),
        dtype=dtype,
        **{name: draw(field) if isinstance(field, SearchStrategy) else field for name, field in fields.items()},
        seed=draw(st.integers(0, 2**16)),
    )
    # Drawn after the rest, and for any dtype, so that the smaller problem is not the calm one.
    keep = {*fixed} if theta_levels is THETA_LEVELS else {*fixed, "theta"}
    return calm(problem, keep) if draw(st.booleans()) and dtype in HALF else problem


def calm(problem: Problem, keep: Collection[str]) -> Problem:
    """Return a problem like this one that amplifies errors less; the fields to keep are as they were."""
    change: dict[str, Any] = {
        "theta": CALM_THETAS[problem.seed % len(CALM_THETAS)],
        "q": "random 0",
        "k": "unit 0",
        "v": "random 0",
        "state": "random -4",
    }
    if problem.memory == "normalised":
        change["eps"] = 1.0
    change = {name: value for name, value in change.items() if name not in keep}
    lengths = tuple(min(length, 8) for length in problem.lengths)
    return replace(problem, lengths=lengths, D=min(problem.D, 4), **change)


@st.composite
def split(draw: st.DrawFn, /, whole: SearchStrategy[Problem]) -> Problem:
    """Draw a problem and places to cut its sequences at: one inside, and others anywhere, even at the ends."""
    problem = draw(whole)
    T = max(problem.lengths)
    inside = st.integers(1, T - 1) if T > 1 else st.integers(0, T)
    cuts = [draw(inside), *draw(st.lists(st.integers(0, T), max_size=2))]
    return replace(problem, splits=tuple(sorted(cuts)))


@st.composite
def explicit(draw: st.DrawFn, /) -> Problem:
    """Draw a tiny problem with every number of it: Hypothesis may then find and shrink any value."""
    # LayerNorm takes a row of two for its signs, unless eps is large: little depends on its numbers.
    T, D, eps = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from(EPS))
    memory = draw(st.sampled_from(("plain", "normalised")))
    real = st.floats(-4, 4, width=32)
    gate = st.one_of(st.sampled_from((0.5, 0.0, 1.0)), st.floats(0, 1, width=32))
    sizes = {"q": T * D, "k": T * D, "v": T * D, "theta": T, "alpha": T, "eta": T, "M": D * D}
    sizes |= {"w": D, "b": D} if memory == "normalised" else {}
    given = {
        name: tuple(draw(st.lists(gate if name in ("theta", "alpha", "eta") else real, min_size=n, max_size=n)))
        for name, n in sizes.items()
    }
    C = draw(st.integers(1, 4))
    return Problem(lengths=(T,), D=D, C=C, memory=memory, eps=eps, initial="M", explicit=tuple(given.items()))

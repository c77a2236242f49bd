"""The sizes of real calls: law 19. The verdicts are those of (B12) to (B16), of section 4.3 and of exact integers."""

import math
from collections.abc import Collection
from dataclasses import fields, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from numpy.typing import NDArray
from torch import Tensor

from oracle import Cotangents, Inputs
from oracle.bounds import FLOAT32
from oracle.bounds.posterior import as_pieces, judge
from oracle.bounds.posterior.pieces import piece_lengths
from properties.harness.comparing import Comparison, Found, in_ulps, nearest, radii, same, same_bits, solved
from properties.harness.definition import definition
from properties.harness.implementations import Implementation
from properties.harness.laws import law
from properties.harness.running import STATE, LawBroken, backward, compute_dtype, run, tensors
from properties.harness.subcalls import Part, resumed, segment
from properties.problems.problem import HALF, Problem
from properties.problems.real_sizes import real_problems
from properties.problems.strategies import problems
from properties.test_conventions import gradients_of, outputs_alone, recorded, values
from properties.test_plain_memory import fits
from properties.test_sequences import check_finite

# Elements and rows of each result that have radii of their own, beside the coarse radii of all.
SAMPLES = 4


def moved(x: Any, device: str) -> Any:
    """Return inputs or cotangents on a device."""
    return replace(x, **{f.name: y.to(device) for f in fields(x) if isinstance(y := getattr(x, f.name), Tensor)})


def check_pieces(implementation: Implementation, inputs: Inputs, cotangents: Cotangents) -> Found:
    """Compare all results of a call whose sequences lie within one chunk each with a-posteriori radii."""
    results = run(implementation, inputs, cotangents if "backward" in implementation.claims else None)
    device = implementation.device
    on_device = {name: x.to(device) for name, x in results.items() if name != "offset"}
    arithmetic = implementation.arithmetic(inputs)
    verdicts = judge(moved(inputs, device), moved(cotangents, device), arithmetic, on_device, samples=SAMPLES)
    widest = max(x.dtype.itemsize for x in on_device.values())
    found: Found = []
    for one in verdicts:
        if not one.count:
            continue
        x, wrong = results[one.result], one.ratio > 1
        ulps = in_ulps(one.error, float(x.abs().max()), x.dtype) if one.kind == "elements" else 0.0
        narrow = x.dtype.itemsize < widest and not wrong
        # An exact 0 has no size that its radius could exceed.
        unsure = 2 * one.empty > one.count and bool(x.any())
        found.append(Comparison(one.result, one.count, one.ratio, ulps, unsure, narrow=narrow))
        if wrong:
            raise LawBroken(
                f"{one.result}[{', '.join(map(str, one.index))}] of its {one.kind} is wrong\n"
                f"    error  {one.error:.6g}\n"
                f"    bound  {one.radius:.6g}\n"
                f"    ratio  {one.ratio:.6g}\n"
                f"    dtype  {x.dtype}",
                found,
            )
    return found


# The widths that kernels are written for: other rows are padded to one of them, and masked.
WIDTHS = (32, 64, 128)


def at_a_tile(problem: Problem) -> Problem:
    """Return the same with the nearest of these widths."""
    return replace(problem, D=min(WIDTHS, key=lambda D: abs(D - problem.D)))


def beside_a_tile(problem: Problem) -> Problem:
    """Return the same with none of these widths."""
    return replace(problem, D=problem.D - 1) if problem.D in WIDTHS else problem


# The wide ones are short.
WIDE = real_problems(D=128, C=256, cells=2**19, heads=1, sequences=1, memories=("normalised", "plain", "normalised"))
# Those with more than 64 tokens are narrow.
DEEP = real_problems(D=8, cells=2**10, heads=1, sequences=1).map(
    lambda problem: replace(problem, C=problem.C + 64, lengths=tuple(T + 64 for T in problem.lengths))
)
# As in training and serving: a tile of columns, and more often than not a full state.
USUAL = (real_problems(initial=("full",)) | real_problems(initial=("full",)) | WIDE).map(at_a_tile)
ODD = (real_problems() | WIDE).map(beside_a_tile)
# More heads than a group of threads.
MANY_HEADED = real_problems(D=40, C=16, cells=2**18, heads=80, sequences=2).map(beside_a_tile)
# Most have rows that are padded: of the few that an interpreter is asked there must be some of each memory.
REAL = ODD | USUAL | ODD | ODD | DEEP | MANY_HEADED


def is_within_chunks(implementation: Implementation, problem: Problem) -> bool:
    """Whether every sequence has tokens, and lies within one chunk."""
    return all(0 < T <= problem.C - start for start, T in zip(problem.starts, problem.lengths, strict=True))


@law("5.19", "4.2", problems=REAL, share=1.5, fewest=0.3, about=is_within_chunks, any_size=True)
def test_a_chunk_of_real_size_is_right(implementation: Implementation, problem: Problem) -> Found:
    return check_pieces(implementation, problem.inputs(), problem.cotangents())


# Sequences and heads, at most 70,000 pairs, of a few that the oracle knows. Their numbers are prime to those of a grid.
FEW = (7, 5)
MANY = ((7, 10_000), (280, 250), (2002, 35))
# Pairs, and the most tokens x pairs x D^2.
PAIRS, MOST = 70_070, 2**22


def is_small(implementation: Implementation, problem: Problem) -> bool:
    """Whether a problem has tokens, and so many copies of it fit into the memory."""
    return 0 < PAIRS * max(problem.lengths) * problem.D**2 <= MOST


@law(
    "5.5", "5.16", "5.19", "4.2",
    problems=problems(
        D=(1, 2, 3), C=(1, 2, 3), heads=FEW[1], fewest_heads=FEW[1], sequences=FEW[0], fewest=FEW[0], most=4,
        wild=False, dtypes=("float32", *HALF),
    ),
    needs=["large"],
    share=0.1,
    about=is_small,
    any_size=True,
)  # fmt: skip
def test_many_sequences_and_heads_give_what_each_of_them_gives(
    implementation: Implementation, problem: Problem
) -> Found:
    inputs, cotangents = problem.inputs(), problem.cotangents() if "backward" in implementation.claims else None
    sequences, heads = MANY[problem.seed % len(MANY)]
    many = Part(inputs, [n % problem.sequences for n in range(sequences)], [h % problem.H for h in range(heads)])
    results = run(implementation, many.inputs(), cotangents and many.cotangents(cotangents))
    radius, wanted = radii(implementation, inputs, cotangents), solved(problem, cotangents is not None)
    if not all(np.isfinite(radius[name]).all() for name in wanted):
        return []
    found: Found = []
    # Those of w and b are sums over the sequences.
    for name in (name for name in wanted if name in results and name not in ("dw", "db")):
        exactly = nearest(wanted[name])
        # The exact value is rounded to float64 here.
        allowed = radius[name] + np.abs(exactly) * np.finfo(np.float64).eps
        found.append(within(name, results[name], *(many.select(name, x) for x in (exactly, allowed))))
    return found


def within(name: str, actual: Tensor, exactly: NDArray[np.float64], radius: NDArray[np.float64]) -> Comparison:
    """Return how a result compares with float64 numbers, or raise unless every element is within its radius."""
    error, size = np.abs(actual.double().numpy() - exactly), np.abs(exactly).max(initial=0)
    wrong = ~(error <= radius)
    if wrong.any():
        i = tuple(int(n) for n in np.argwhere(wrong)[0])
        raise LawBroken(
            f"{name}[{', '.join(map(str, i))}] is wrong, the first of {int(wrong.sum())} of {actual.numel()} elements\n"
            f"    exact  {exactly[i]!r}\n"
            f"    actual {actual[i].item()!r}\n"
            f"    bound  {radius[i]:.6g}"
        )
    ratio = np.divide(error, radius, out=np.zeros_like(error), where=error > 0)
    unsure = bool(0 < size < 2 * radius.max(initial=0))
    return Comparison(name, actual.numel(), float(ratio.max(initial=0)), ill_conditioned=unsure, zero=not size)


def as_its_own_pieces(implementation: Implementation, inputs: Inputs) -> Inputs:
    """Return every piece of a call of one sequence as a sequence, from the states that the implementation leaves."""
    ends = [0, *accumulate(piece_lengths(inputs)[0])]
    nothing = torch.zeros(1, *inputs.q.shape[2:], inputs.q.shape[-1], dtype=compute_dtype(inputs.q.dtype))
    entering = [{name: nothing if x is None else x for name, x in (("M", inputs.M), ("S", inputs.S))}]
    part = segment(inputs, slice(0, ends[1]))
    for span in pairwise(ends[1:]):
        entering.append(run(implementation, part))
        part = resumed(segment(inputs, slice(*span)), entering[-1])
    check_finite(entering[-1])
    M, S = (torch.cat([state[name] for state in entering]) for name in ("M", "S"))
    pieces = as_pieces(inputs, M, S)
    return pieces if inputs.anchor is not None else replace(pieces, anchor=None)


@law(
    "5.19", "4.2",
    problems=real_problems(D=48, C=64, chunks=32, cells=2**18, sequences=1, packed=False),
    needs=["resume", "varlen"],
    share=0.16,
    any_size=True,
)  # fmt: skip
def test_every_chunk_of_a_long_sequence_is_right_from_the_state_before_it(
    implementation: Implementation, problem: Problem
) -> Found:
    if implementation.device == "cuda":
        problem = implementation.domain.nearest(replace(problem, lengths=(min(16 * problem.tokens, 8192),)))
    pieces = as_its_own_pieces(implementation, problem.inputs())
    lengths = tuple(end - start for _, start, end in pieces.sequences)
    alike = replace(problem, lengths=lengths, packed=True, initial="momentum", offsets=())
    return check_pieces(implementation, pieces, alike.cotangents())


def with_large_values(problem: Problem) -> Problem:
    """Return the same in float64 with integers that float32 has not."""
    return replace(problem, v=f"integers {2**27}", gate_dtype="float64") if problem.dtype == "float64" else problem


# Integers, with few halvings. With theta = 1, (3) reflects a row of M at its value, and nothing grows.
EXACT = real_problems(
    D=128, C=256, chunks=3, cells=2**20, sequences=2, memories=("plain",), dtypes=("float32", "float64"),
    theta=st.sampled_from(("constant 2^0", "alternate 2^0 0", "spike 2^0 2^-1 -1", "single 2^0 2^-1 40")),
    alpha=st.sampled_from(("constant 0", "single 0 2^-1 20", "spike 0 2^-1 -1", "single 0 1 33")),
    eta=st.sampled_from(("constant 0", "single 0 1 30", "spike 0 2^-1 0")),
    q=st.sampled_from(("integers 1", "basis")), k=st.sampled_from(("basis", "signs")), v="integers 2",
    state="integers 2", do="integers 2", gate_dtype="float32", log_gates=False, eps=1e-6,
).map(with_large_values)  # fmt: skip


def whole(cotangents: Cotangents) -> Cotangents:
    """Return cotangents of small integers."""
    given: dict[str, Any] = {name: None if x is None else x.mul(4).round() for name, x in vars(cotangents).items()}
    return Cotangents(**given)


@law("5.19", "4.5", problems=EXACT, needs=["plain", "exact"], share=0.6, any_size=True)
def test_small_integers_of_real_size_give_exact_values(implementation: Implementation, problem: Problem) -> Found:
    inputs, cotangents = problem.inputs(), whole(problem.cotangents())
    if not fits(inputs, cotangents):
        return []
    backward = "backward" in implementation.claims
    results = run(implementation, inputs, cotangents if backward else None)
    wanted = {name: x for name, x in definition(inputs, cotangents, torch.float64).items() if name in results}
    found = same(wanted, {name: x.double() for name, x in results.items()}, wanted)
    return [replace(one, exact=True, oracle=True) for one in found]


# How often a right implementation may be taken for a wrong one, and the heads that this needs: properties/README.md.
HEADS, FALSE_ALARM = 32, 1e-9
INDEPENDENT: dict[str, Any] = {
    "theta": st.sampled_from(("uniform -3", "random 2^-8 2^-4", "uniform -8")),
    "alpha": st.sampled_from(("uniform -3", "random 2^-8 2^-3", "uniform 0")),
    "eta": st.sampled_from(("uniform 0", "random 2^-1 2^-3")),
}


def has_many_heads(implementation: Implementation, problem: Problem) -> bool:
    """Whether a problem has the heads that the law counts."""
    return problem.H == HEADS


def sizes_of_heads(name: str, x: Tensor) -> Tensor:
    """Return the root mean square of a result in each head, shape (H,)."""
    axis = 0 if name in ("dw", "db") else 1 if name.removeprefix("d") in STATE else 2
    return x.double().movedim(axis, 0).flatten(1).square().mean(1).sqrt()


def compare_with_the_definition(implementation: Implementation, problem: Problem) -> Found:
    """Compare the errors of every head with those of the token loop in float32; that in float64 is exact."""
    inputs, cotangents = problem.inputs(), problem.cotangents()
    ours = run(implementation, inputs, cotangents)
    check_finite(ours)
    exactly, its = (definition(inputs, cotangents, dtype) for dtype in (torch.float64, torch.float32))
    arithmetic = implementation.arithmetic(inputs)
    costs_more = arithmetic.log_space or arithmetic.operand > 0 or arithmetic.unit > FLOAT32.unit
    found: Found = []
    for name in (name for name in exactly if name in ours):
        x, format_ = exactly[name], torch.finfo(ours[name].dtype)
        # Half an ulp of the result's own format: a domain may have no other than half precision.
        once = format_.eps / 2 * sizes_of_heads(name, x).clamp(min=format_.smallest_normal)
        allowed = 2 * sizes_of_heads(name, its[name] - x) + once
        # 0 / 0 is no failure.
        ratio = (sizes_of_heads(name, ours[name] - x) / allowed).nan_to_num(nan=0, posinf=math.inf)
        worse = 0 if costs_more else int((ratio > 1).sum())
        found.append(Comparison(name, x.numel(), heads=worse / problem.H if problem.H >= HEADS else 0.0))
        if worse >= HEADS == problem.H or ratio.max() > FALSE_ALARM**-0.5:
            raise LawBroken(
                f"{name} is less accurate than the definition\n"
                f"    heads more than twice as far off {worse} of {problem.H}\n"
                f"    error / (2 x that of the definition + half an ulp) {ratio.min():.6g} to {ratio.max():.6g}",
                found,
            )
    return found


def independent(**sizes: Any) -> SearchStrategy[Problem]:
    """Draw problems whose heads are independent; one head, which the law multiplies."""
    return real_problems(
        heads=1, dtypes=("float32", "float32", *HALF), gate_dtype="float32", **sizes, **INDEPENDENT,
    )  # fmt: skip


SINGLE: dict[str, Any] = {"sequences": 1, "packed": False}
NORMALISED = ("normalised", "plain", "normalised")
# A chunk of more than 64 tokens.
LONG = independent(D=40, C=64, cells=2**16, memories=NORMALISED, **SINGLE).map(
    lambda problem: replace(problem, C=problem.C + 64, lengths=(problem.tokens + 64,))
)
# Several chunks, however wide.
SHORT = independent(D=128, C=5, chunks=4, cells=3 * 2**16, sequences=3, memories=NORMALISED)
ACCURATE = independent(D=128, C=128, chunks=3, cells=3 * 2**16, **SINGLE) | SHORT | LONG


@law(
    "5.19", "4.3",
    problems=ACCURATE.map(lambda problem: replace(problem, H=HEADS)),
    needs=["backward", "large"],
    share=0.4,
    about=has_many_heads,
    any_size=True,
)  # fmt: skip
def test_errors_of_real_size_are_at_most_twice_those_of_the_definition(
    implementation: Implementation, problem: Problem
) -> Found:
    return compare_with_the_definition(implementation, problem)


# The ninth of anything, tokens that need a third tile of 32, and more pieces than a tile has rows.
NINE, TOKENS, MANY_SHORT = 9, 64, 70


def with_many(problem: Problem, claims: Collection[str]) -> Problem:
    """Return the same with many heads, nine sequences if they are packed, and eight chunks or more added to the last.

    In a batch every sequence has as many more. Without the claim `large`, only a batch has the heads, and nothing more,
    and all packed sequences but the last are short.
    """
    large = "large" in claims
    if not large and not problem.packed:
        return replace(problem, H=NINE)
    # Nine, or many short ones.
    short = not large or problem.seed % 2 > 0
    N = max(MANY_SHORT if large and short else NINE, problem.sequences) if problem.packed else problem.sequences
    lengths = [problem.lengths[i % problem.sequences] for i in range(N)]
    few = N - 1 if problem.packed else 0
    lengths[:few] = [min(T, 1 if large else 2) if short else T for T in lengths[:few]]
    lengths[few:] = [T + max((NINE - 1) * problem.C, TOKENS) for T in lengths[few:]]
    # Each at a place of its own.
    places = [problem.offsets[i % problem.sequences] + min(i, NINE - 2) for i in range(N) if problem.offsets]
    offsets = tuple(place % problem.C for place in places)
    return replace(problem, H=HEADS if large else 1, lengths=tuple(lengths), offsets=offsets)


# What is learned in a chunk is much of what there is: a wrong anchor, or a wrong place, is far beyond a rounding error.
LEARNING = INDEPENDENT | {"theta": st.sampled_from(("uniform -3", "random 2^-6 2^-3"))}


def manifold(packed: bool, D: int = 16) -> SearchStrategy[Problem]:
    """Draw problems that `with_many` then makes larger; of shorter chunks an interpreter would take too many."""
    return real_problems(
        D=D, C=6, chunks=2, cells=2**14, heads=1, sequences=3, packed=packed, dtypes=("float32",),
        gate_dtype="float32", initial=("full", "none", "full" if packed else "M"), **LEARNING,
    ).map(lambda problem: replace(problem, C=problem.C + 3))  # fmt: skip


# Most of them are packed: of the few that an interpreter is asked, too.
@law(
    "5.19",
    "4.3",
    problems=manifold(True) | manifold(True, D=40) | manifold(False),
    needs=["backward"],
    share=0.3,
    any_size=True,
)
def test_many_chunks_sequences_and_heads_are_as_accurate_as_the_definition(
    implementation: Implementation, problem: Problem
) -> Found:
    many = with_many(problem, implementation.claims - ({"large"} if implementation.domain.brief else set()))
    return compare_with_the_definition(implementation, implementation.domain.nearest(many))


@law(
    "5.20", "5.18", "5.19",
    problems=real_problems(chunks=2, cells=2**16, initial=("full", "M", "none")),
    needs=["backward", "final_state"],
    share=0.3,
    any_size=True,
)  # fmt: skip
def test_a_call_of_real_size_may_be_made_in_any_way(implementation: Implementation, problem: Problem) -> Found:
    inputs, cotangents = problem.inputs(), problem.cotangents()
    plain = run(implementation, inputs, cotangents)
    found, left = check_finite(plain), ("o", *implementation.left)
    found += same_bits({name: plain[name] for name in left}, run(implementation, inputs))
    # Some of the tensors, and twice; and the others.
    for seed, times in ((problem.seed, 2), (~problem.seed, 1)):
        names = [name for i, name in enumerate(tensors(inputs)) if seed >> i & 1]
        outputs, leaves = recorded(implementation, inputs, names)
        for _ in range(times):
            found += same_bits(values(outputs | backward(outputs, leaves, cotangents, retain_graph=True)), plain)
    # One cotangent alone, or beside zeros.
    outputs, leaves = recorded(implementation, inputs)
    connected = [name for name in left if outputs[name].requires_grad]
    if not connected:
        return found
    name = connected[problem.seed % len(connected)]
    flowing = {one: (torch.ones_like if one == name else torch.zeros_like)(outputs[one]) for one in connected}
    only: dict[str, Any] = {"o": torch.zeros_like(outputs["o"]), name: flowing[name]}
    one = values(backward(outputs, leaves, Cotangents(**only), retain_graph=True))
    torch.autograd.backward([outputs[x] for x in connected], [flowing[x] for x in connected], retain_graph=True)
    found += same(one, gradients_of(leaves))
    alone = Cotangents(cotangents.o)
    wanted = values(outputs | backward(outputs, leaves, alone))
    found += same_bits(outputs_alone(implementation, inputs, alone), wanted)
    return found + same_bits(plain, run(implementation, inputs, cotangents))

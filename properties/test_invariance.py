"""However the tokens of a sequence are passed, its results are the same in every bit: law 18.

That a recorded call gives the bits of a plain one is a law of `test_conventions`; compiled and captured calls are
tested in `tests/titans`.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from oracle import Cotangents, Inputs
from properties.harness.comparing import Found, same, same_bits
from properties.harness.implementations import Implementation
from properties.harness.laws import law
from properties.harness.running import STATE, Results, call, run, tensors
from properties.harness.subcalls import TOKENS, Part, resumed, stretch
from properties.problems.problem import DTYPES, Problem
from properties.problems.same_bits import uncut
from properties.problems.strategies import split


def real(implementation: Implementation, problem: Problem) -> Problem:
    """Return the problem for a GPU as wide as a real one, with more heads."""
    if implementation.device != "cuda":
        return problem
    return implementation.domain.nearest(replace(problem, D=min(128, 16 * problem.D), H=4 * problem.H))


def before(problem: Problem) -> list[tuple[int, int]]:
    """Return the tokens of each sequence before the first place to split at."""
    return [(0, min(T, problem.splits[0])) for T in problem.lengths]


# Longer than a block of the kernels, as the interpreter runs them.
LONG = uncut(
    D=(4, 16, 3, 72, 64, 33, 8, 2), C=(16, 48, 3, 40, 32, 64, 8, 200, 1), heads=1, shortest=34, most=80, cells=100
)
# Longer than several of them.
LONGER = LONG | LONG | uncut(D=(4, 3, 16), C=(16, 40, 64), heads=1, sequences=1, shortest=130, most=200, cells=200)


@law("5.18", problems=split(LONGER), needs=["prefix_bits"], share=0.7, fewest=0.4, cheap=True)
def test_the_outputs_of_a_prefix_are_the_prefix_of_the_outputs(
    implementation: Implementation, problem: Problem
) -> Found:
    problem = real(implementation, problem)
    inputs = problem.inputs()
    prefix, index = stretch(inputs, before(problem))
    whole, part = run(implementation, inputs), run(implementation, prefix)
    return same_bits({"o": whole["o"].flatten(0, 1)[index]}, {"o": part["o"].flatten(0, 1)})


# Most are longer than a block of the kernels, and their beginning is not.
TWO_BLOCKS = uncut(heads=1, sequences=1, shortest=34, most=44, cells=44)
PADDED = split(TWO_BLOCKS | uncut(most=40, cells=50) | TWO_BLOCKS).map(
    lambda problem: replace(problem, splits=(max(problem.splits[0], max(problem.lengths) // 3),))
)


@law("5.18", problems=PADDED, needs=["padding_bits", "backward"], share=0.7, cheap=True)
def test_tokens_behind_the_loss_change_no_gradient(implementation: Implementation, problem: Problem) -> Found:
    problem = replace(real(implementation, problem), cotangent="o")
    inputs, do = problem.inputs(), problem.cotangents().o.flatten(0, 1)
    prefix, index = stretch(inputs, before(problem))
    flowing = torch.zeros_like(do).index_copy(0, torch.tensor(index, dtype=torch.int64), do[index])
    whole = run(implementation, inputs, Cotangents(flowing.reshape(inputs.q.shape)))
    part = run(implementation, prefix, Cotangents(do[index].reshape(prefix.q.shape)))
    # Sums over all tokens have another order. A gradient of zero may have either sign.
    names = [name for name in part if name.startswith("d") and name not in ("dw", "db")]
    cut = {name: whole[name].flatten(0, 1)[index].reshape(part[name].shape) for name in names if name[1:] in TOKENS}
    return same({name: whole[name] for name in names} | cut, part, names)


def grid_of(implementation: Implementation, problem: Problem) -> int:
    """Return at multiples of how many tokens a sequence may be cut without changing a bit."""
    grid = implementation.grid(DTYPES[problem.dtype], problem.D, problem.C)
    return grid if "offset" in implementation.claims else math.lcm(grid, problem.C)


def cuts(implementation: Implementation, problem: Problem) -> list[list[int]]:
    """Return where each sequence is cut, on the grid, into three; a sequence ends where there is no such place."""
    grid = grid_of(implementation, problem)
    places = [
        set(range(-start % grid or grid, T, grid)) for start, T in zip(problem.starts, problem.lengths, strict=True)
    ]
    if not problem.packed:
        # The sequences of a batch are cut at the same token.
        places = [set.intersection(*places)] * problem.sequences
    found = []
    for T, own in zip(problem.lengths, map(sorted, places), strict=True):
        chosen = {own[problem.seed % len(own)], own[problem.seed // 7 % len(own)]} if own else set()
        found.append([*sorted(chosen), T, T][:2])
    return found


def has_a_cut(implementation: Implementation, problem: Problem) -> bool:
    """Whether a sequence can be cut on the grid."""
    problem = real(implementation, problem)
    return any(own[0] < T for own, T in zip(cuts(implementation, problem), problem.lengths, strict=True))


@law("5.18", problems=LONG, needs=["resume_bits"], share=0.8, fewest=0.4, about=has_a_cut, cheap=True)
def test_resuming_on_the_grid_gives_the_bits_of_one_call(implementation: Implementation, problem: Problem) -> Found:
    problem = real(implementation, problem)
    inputs = problem.inputs()
    whole = run(implementation, inputs)
    o, state = torch.full_like(whole["o"], torch.nan).flatten(0, 1), Results()
    begins = [0] * problem.sequences
    for stops in (*zip(*cuts(implementation, problem), strict=True), problem.lengths):
        part, index = stretch(inputs, list(zip(begins, stops, strict=True)))
        state = run(implementation, resumed(part, state) if state else part)
        o[index] = state["o"].flatten(0, 1)
        begins = list(stops)
    return same_bits(whole, state | {"o": o.reshape(whole["o"].shape)})


def spoiled(inputs: Inputs, n: int, number: float) -> Inputs:
    """Return the call with this number in all tokens and states but those of sequence n."""
    row, begin, end = inputs.sequences[n]

    def others(name: str, x: Tensor) -> Tensor:
        changed, own = torch.full_like(x, number), (n,) if name in STATE else (row, slice(begin, end))
        changed[own] = x[own]
        return changed

    given = tensors(inputs)
    changes: dict[str, Any] = {name: others(name, given[name]) for name in (*TOKENS[:3], *STATE) if name in given}
    return replace(inputs, **changes)


def passed(problem: Problem, n: int) -> Iterator[tuple[Part, Cotangents]]:
    """Yield sequence n alone, in a batch, and packed with others of other lengths, with the cotangents of all.

    The others are no numbers, or huge, every other time.
    """
    inputs, cotangents = problem.inputs(), problem.cotangents()
    alone = Part(inputs, [n], range(problem.H))
    yield Part(alone.inputs(), [0], range(problem.H)), alone.cotangents(cotangents)
    T = problem.lengths[n]
    spans = [(0, T if i == n else (5 * i + problem.seed) % (T + 1)) for i in range(problem.sequences)]
    packed, index = stretch(inputs, spans, packed=True)
    packed_cotangents = replace(cotangents, o=cotangents.o.flatten(0, 1)[index][None])
    for of, flowing in ((inputs, cotangents), (packed, packed_cotangents)):
        number = (None, math.nan, None, 2.0**10)[problem.seed % 4]
        yield Part(of if number is None else spoiled(of, n, number), [n], range(problem.H)), flowing


def check_passed(implementation: Implementation, problem: Problem, backward: bool) -> Found:
    """Compare one sequence in all ways in which it may be passed."""
    problem, wanted = real(implementation, problem), Results()
    found: Found = []
    for part, cotangents in passed(problem, problem.seed % problem.sequences):
        results = run(implementation, part.of, cotangents if backward else None)
        # Sums over all sequences are not those of one.
        names = [name for name in results if name not in ("offset", "dw", "db")]
        own = part.select_all({name: results[name] for name in names})
        # A gradient of zero may have either sign.
        compared = same if backward else same_bits
        found += compared({name: x.flatten() for name, x in wanted.items()}, {n: own[n].flatten() for n in wanted})
        wanted = wanted or own
    return found


BATCHES = uncut(fewest=2, sequences=3, packed=False)


@law("5.18", problems=BATCHES, needs=["batch_invariant", "varlen"], share=0.5, fewest=0.3, cheap=True)
def test_packed_in_a_batch_and_alone_give_the_same_bits(implementation: Implementation, problem: Problem) -> Found:
    return check_passed(implementation, problem, backward=False)


SHORT = uncut(fewest=2, sequences=2, packed=False, most=20, cells=40, C=(8, 16, 3, 1, 32, 200))


@law("5.18", problems=SHORT, needs=["batch_invariant", "varlen", "backward"], share=0.3, cheap=True)
def test_packed_in_a_batch_and_alone_give_the_same_bits_of_gradients(
    implementation: Implementation, problem: Problem
) -> Found:
    return check_passed(implementation, problem, backward=True)


@law("5.18", problems=uncut(initial=("none",), most=40), needs=["none_bits"], share=0.25, cheap=True)
def test_no_initial_state_is_one_of_zeros(implementation: Implementation, problem: Problem) -> Found:
    problem = real(implementation, problem)
    inputs = problem.inputs()
    N, H, D = problem.sequences, problem.H, problem.D
    zeros = torch.zeros(N, H, D, D, dtype=problem.compute_dtype)
    none = run(implementation, inputs)
    found = same_bits(none, run(implementation, replace(inputs, M=zeros)))
    if "resume" in implementation.claims:
        full = replace(inputs, M=zeros, S=zeros, anchor=zeros, offset=(0,) * N)
        found += same_bits(none, run(implementation, full))
    return found


def decoded(implementation: Implementation, inputs: Inputs) -> Results:
    """Return the results of a call whose tokens are decoded one by one, from its initial state."""
    given = {name: x.to(implementation.device) for name, x in tensors(inputs).items()}
    step, o = implementation.step, []
    assert step is not None

    def begin(*arguments: Any, **options: Any) -> Any:
        *tokens, eps, C, state, _ = arguments
        nothing = (x if i in (3, 4) else x[:, :0] for i, x in enumerate(tokens))
        _, start = implementation.call(*nothing, eps, C, state, True, **options)
        state = implementation.decoding(start, inputs.q.dtype)
        for t in range(inputs.q.shape[1]):
            now = [x if i in (3, 4) else x[:, t] for i, x in enumerate(tokens)]
            o_t, state = step(*now, state, eps, C, **options)
            o.append(o_t)
        return torch.stack(o, 1), implementation.decoded(state)

    return {name: x.cpu() for name, x in call(replace(implementation, call=begin), inputs, given).items()}


def apart(problem: Problem) -> Problem:
    """Return the same, for an even seed with every sequence at a place of its own."""
    offsets = tuple((place + 5 * n * (1 - problem.seed % 2)) % problem.C for n, place in enumerate(problem.offsets))
    return replace(problem, offsets=offsets)


@law(
    "5.18",
    problems=uncut(
        D=(72, 4, 16, 66, 3, 64, 33, 1), initial=("full", "none", "full", "M"), packed=False, fewest=2,
        sequences=3, most=70, cells=80,
    ).map(apart),
    needs=["decode_bits"],
    share=0.5,
    fewest=0.14,
    cheap=True,
)  # fmt: skip
def test_decoding_gives_the_bits_of_one_call(implementation: Implementation, problem: Problem) -> Found:
    problem = real(implementation, problem)
    if not implementation.decodes_alike(DTYPES[problem.dtype], problem.D, problem.C):
        return []
    inputs = problem.inputs()
    # What went before ends on the grid, or there is nothing before.
    T, first = problem.lengths[0], cuts(implementation, problem)[0][0] if problem.seed % 2 else 0
    first %= T
    whole = run(implementation, inputs)
    results = run(implementation, stretch(inputs, [(0, first)] * problem.sequences)[0]) if first else Results()
    o = [results["o"]] if first else []
    if first < T:
        rest, _ = stretch(inputs, [(first, T)] * problem.sequences)
        results = decoded(implementation, resumed(rest, results) if first else rest)
        o.append(results["o"])
    return same_bits(whole, results | {"o": torch.cat(o, 1)})

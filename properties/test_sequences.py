"""Sequences and heads know nothing of each other, tokens nothing of the future: laws 3, 4, 5 and section 4.1."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from oracle import Inputs
from properties.harness.comparing import Comparison, Found, answer, check, compare, radii, run_finite, same, solved
from properties.harness.implementations import Implementation
from properties.harness.laws import has_wide_range, law
from properties.harness.running import Results, expect, run
from properties.harness.subcalls import TOKENS, Part
from properties.problems.problem import Problem
from properties.problems.strategies import problems, split

# Nothing here truly overflows, however ill-conditioned it is.
BOUNDED = problems(
    dtypes=("float32", "float64", "bfloat16"),
    wild=False,
    k="unit 0",
    theta_levels=("2^-1", "2^-2", "2^0", "0", "2^-149"),
)
# The ends of the ranges of theta and eta; that of alpha is left to the outputs.
SWITCHED = problems(
    dtypes=("float32", "float64"),
    wild=False,
    log_gates=False,
    k="unit 0",
    unit_levels=("2^-1", "0"),
    theta_levels=("2^-1", "0"),
    alpha="constant 2^-1",
)


def places(problem: Problem) -> Tensor:
    """Return the place of every token in its sequence, shape (B, T)."""
    tokens = torch.cat([torch.arange(length) for length in problem.lengths])
    return tokens.reshape(problem.B, -1)


def check_part(implementation: Implementation, problem: Problem, part: Part) -> Found:
    """Check a problem, and a part of it against that part of the whole truth."""
    whole, found = answer(implementation, problem)
    inputs, cotangents = part.inputs(), part.cotangents(problem.cotangents())
    results = run(implementation, inputs, cotangents)
    found += compare(results, part.select_all(solved(problem, True)), radii(implementation, inputs, cotangents))
    if "batch_invariant" in implementation.claims:
        # In other order the sum over the sequences has other roundings.
        sums = ("dw", "db") if len(part.sequences) > 1 else ()
        wanted = {name: x for name, x in whole.items() if name not in ("offset", *sums)}
        found += same(part.select_all(wanted), results)
    return found


@st.composite
def packed_with_empty(draw: st.DrawFn, /) -> Problem:
    """Draw packed sequences, often with an empty one among them."""
    problem = draw(problems(packed=True, fewest=2, wild=False, most=12))
    if draw(st.booleans()):
        at = draw(st.integers(0, problem.sequences))
        lengths, offsets = ((*x[:at], 0, *x[at:]) for x in (problem.lengths, problem.offsets))
        problem = replace(problem, lengths=lengths, offsets=offsets if problem.offsets else ())
    return problem


@law("5.3", problems=packed_with_empty(), needs=["varlen"], share=0.6)
def test_packed_sequences_are_separate(implementation: Implementation, problem: Problem) -> Found:
    found = check(implementation, problem)
    for n, length in enumerate(problem.lengths):
        part = Part(problem.inputs(), [n], range(problem.H))
        inputs = replace(part.inputs(), cu_seqlens=None)
        expect("the length", inputs.q.shape[1], length)
        results = run(implementation, inputs, part.cotangents(problem.cotangents()))
        radius = radii(implementation, inputs, part.cotangents(problem.cotangents()))
        found += compare(results, part.select_all(solved(problem, True)), radius)
    return found


def has_several(implementation: Implementation, problem: Problem) -> bool:
    """Whether there are several sequences or heads."""
    return problem.sequences * problem.H > 1


SEVERAL = problems(wild=False, most=12, fewest=2) | problems(wild=False, most=12, fewest_heads=2)
# Each head has w and b of its own, and gradients for them.
OWN_PARAMETERS = problems(
    D=(2, 3, 4, 5, 7, 8), wild=False, most=12, shortest=1, fewest_heads=2, memories=("normalised",), w="random 0",
    b="random 0", cotangent=st.sampled_from(("o", "o M", "o M S anchor")),
)  # fmt: skip


@law("5.5", problems=SEVERAL | OWN_PARAMETERS, about=has_several)
def test_permuting_sequences_and_heads_permutes_the_results(implementation: Implementation, problem: Problem) -> Found:
    reverse = Part(problem.inputs(), range(problem.sequences)[::-1], range(problem.H)[::-1])
    return check_part(implementation, problem, reverse)


@law("5.5", problems=SEVERAL, about=has_several)
def test_a_sequence_alone_gives_what_it_gives_in_a_batch(implementation: Implementation, problem: Problem) -> Found:
    n, h = problem.seed % problem.sequences, problem.seed % problem.H
    return check_part(implementation, problem, Part(problem.inputs(), [n], [h]))


@law("5.4", problems=split(problems(wild=False, shortest=2)))
def test_later_tokens_change_no_earlier_output(implementation: Implementation, problem: Problem) -> Found:
    inputs, others = problem.inputs(), replace(problem, seed=problem.seed + 1).inputs()
    # Where there are two tokens, some are earlier and some later.
    earlier = places(problem) < 1 + problem.splits[0] % max(1, max(problem.lengths) - 1)

    def mixed(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(earlier.reshape(*earlier.shape, *[1] * (x.ndim - 2)), x, y)

    tokens: dict[str, Any] = {name: mixed(getattr(inputs, name), getattr(others, name)) for name in TOKENS}
    before, after = run_finite(implementation, inputs), run(implementation, replace(inputs, **tokens))
    return same({"o": before["o"][earlier]}, {"o": after["o"][earlier]})


def poisoned(problem: Problem, n: int, t: int, h: int) -> Inputs:
    """Return the inputs with one number of one token that is not finite."""
    inputs, name = problem.inputs(), TOKENS[problem.seed % len(TOKENS)]
    row, begin, _ = inputs.sequences[n]
    bad = getattr(inputs, name).clone()
    bad[row, begin + t, h].view(-1)[0] = (torch.nan, torch.inf)[problem.seed // len(TOKENS) % 2]
    changed: dict[str, Any] = {name: bad}
    return replace(inputs, **changed)


def one_of_length(problem: Problem, shortest: int) -> int | None:
    """Return one of the sequences that are at least so long, if there are any."""
    fitting = [n for n, T in enumerate(problem.lengths) if shortest <= T]
    return fitting[problem.seed % len(fitting)] if fitting else None


@law("4.1", problems=split(problems(wild=False)))
def test_what_is_not_finite_stays_in_its_sequence_and_head(implementation: Implementation, problem: Problem) -> Found:
    n, h = one_of_length(problem, 1), problem.seed % problem.H
    if n is None:
        return []
    t = problem.splits[0] % problem.lengths[n]
    inputs, cotangents = problem.inputs(), problem.cotangents()
    clean = run_finite(implementation, inputs, cotangents)
    dirty = run(implementation, poisoned(problem, n, t, h), cotangents)
    # The gradients of w and b are sums over the sequences of a head.
    clean.pop("offset", None)
    found: Found = []
    heads, others = [x for x in range(problem.H) if x != h], [x for x in range(problem.sequences) if x != n]
    for part in (Part(inputs, range(problem.sequences), heads), Part(inputs, others, range(problem.H))):
        wanted = part.select_all(clean)
        found += same(wanted, part.select_all({name: dirty[name] for name in clean}), wanted)
    row, begin, _ = inputs.sequences[n]
    chunk = slice(begin, begin + max(0, t - (problem.starts[n] + t) % problem.C))
    return found + same({"o": clean["o"][row, chunk, h]}, {"o": dirty["o"][row, chunk, h]})


# Nothing is 0 from the second token on, so that each of its numbers has a part in its output.
POSITIVE = st.sampled_from(("constant 2^-1", "random 2^-1 2^-3", "alternate 2^-1 2^-2", "ramp 2^-3 2^-1"))
SIMPLE: dict[str, Any] = dict.fromkeys(("q", "k", "v", "w", "b", "state"), "random 0")
TAKING_PART = problems(
    D=(3, 4, 5), most=12, shortest=2, theta=POSITIVE, alpha=POSITIVE, eta=POSITIVE, **SIMPLE
)  # fmt: skip


@law("4.1", problems=split(TAKING_PART))
def test_what_is_not_finite_is_not_hidden(implementation: Implementation, problem: Problem) -> Found:
    n, h = one_of_length(problem, 2), problem.seed % problem.H
    if n is None:
        return []
    t = 1 + problem.splits[0] % (problem.lengths[n] - 1)
    row, begin, _ = problem.inputs().sequences[n]
    # By (2) to (5) the output is no number with it, where that is none, and beyond all bounds where that is infinite.
    o = run(implementation, poisoned(problem, n, t, h))["o"][row, begin + t, h]
    expect("whether the output of a token that is not finite is finite", bool(o.isfinite().all()), False)
    return [Comparison("o", int((~o.isfinite()).sum()), oracle=False)]


def is_bounded(implementation: Implementation, problem: Problem) -> bool:
    """Whether no output overflows: in float16 those of a wide head might."""
    return problem.D <= 8 or has_wide_range(implementation, problem)


@law("4.1", problems=BOUNDED, share=4, about=is_bounded)
def test_finite_inputs_give_finite_results(implementation: Implementation, problem: Problem) -> Found:
    # However many chunks there are.
    C = implementation.domain.C.nearest(1)
    short = replace(problem, C=C, offsets=(0,) * len(problem.offsets))
    return check_finite(run(implementation, short.inputs()))


@law("4.1", "5.8", problems=SWITCHED, needs=["backward"], about=has_wide_range)
def test_gates_of_zero_give_finite_gradients(implementation: Implementation, problem: Problem) -> Found:
    # A single chunk, since a gradient may grow a million times from one to the next.
    single = replace(problem, C=max(1, *problem.lengths), offsets=(0,) * len(problem.offsets))
    single = implementation.domain.nearest(single)
    return check_finite(run(implementation, single.inputs(), single.cotangents()))


def check_finite(results: Results) -> Found:
    """Raise unless every number is finite."""
    for name, x in results.items():
        expect(f"whether {name} is finite", bool(x.isfinite().all()), True)
    return [Comparison(name, x.numel(), oracle=False) for name, x in results.items() if x.numel()]

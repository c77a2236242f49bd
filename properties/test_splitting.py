"""A sequence may be split anywhere and resumed: law 2."""

from collections.abc import Sequence

import torch

from oracle import Cotangents, Inputs
from properties.harness.comparing import Found, check_inputs, same
from properties.harness.implementations import Implementation
from properties.harness.laws import law
from properties.harness.running import STATE, Results, run
from properties.harness.subcalls import TOKENS, chain, places, resumed, segment, spans, stepping
from properties.problems.problem import HALF, Problem
from properties.problems.strategies import problems, split

PER_TOKEN = ("o", *(f"d{name}" for name in TOKENS))
SPLIT = split(problems(packed=False, wild=False, most=16, shortest=2))


def check_segments(
    implementation: Implementation, inputs: Inputs, cotangents: Cotangents, splits: Sequence[int]
) -> tuple[list[Results], Found]:
    """Check each segment from the state that the one before it really left, and backwards; return all results."""
    calls: list[Inputs] = []
    cuts = spans(inputs.q.shape[1], splits)
    for span in cuts:
        part = segment(inputs, span)
        calls.append(resumed(part, run(implementation, calls[-1])) if calls else part)
    flowing = {name: getattr(cotangents, name) for name in STATE}
    results: list[Results] = []
    found: Found = []
    for part, span in zip(reversed(calls), reversed(cuts), strict=True):
        one, compared = check_inputs(implementation, part, Cotangents(o=cotangents.o[:, span], **flowing))
        flowing = {name: one.get(f"d{name}") for name in STATE}
        results.append(one)
        found += compared
    return results[::-1], found


def check_chain(implementation: Implementation, problem: Problem, splits: Sequence[int]) -> Found:
    """Check the segments one by one, and that autograd through all of them gives the same."""
    inputs, cotangents = problem.inputs(), problem.cotangents()
    segments, found = check_segments(implementation, inputs, cotangents, splits)
    through = chain(implementation, inputs, cotangents, splits)
    first = {name: x for name, x in segments[0].items() if name in ("dM", "dS", "danchor")}
    wanted = first | {name: segments[-1][name] for name in STATE if name in through}
    wanted |= {name: torch.cat([part[name] for part in segments], 1) for name in PER_TOKEN if name in through}
    # Not their sum: autograd adds the gradients of single tokens, which may cancel, in an order of its own.
    wanted |= {name: torch.stack([part[name] for part in segments]) for name in ("dw", "db") if name in through}
    return found + same(wanted, through)


def is_split_inside(implementation: Implementation, problem: Problem) -> bool:
    """Whether a split leaves tokens on both sides."""
    return any(0 < n < problem.lengths[0] for n in places(implementation, problem))


@law("5.2", problems=SPLIT, needs=["resume"], share=1, about=is_split_inside)
def test_splitting_a_sequence_changes_nothing(implementation: Implementation, problem: Problem) -> Found:
    return check_chain(implementation, problem, places(implementation, problem))


@law("5.2", problems=problems(packed=False, wild=False, most=6, shortest=2), needs=["offset"], share=0.3)
def test_splitting_into_single_tokens_changes_nothing(implementation: Implementation, problem: Problem) -> Found:
    return check_chain(implementation, problem, range(1, problem.lengths[0]))


# A step rounds at places of its own: mostly in half precision, in the memory that has more of them.
STEPS = problems(
    packed=False, wild=False, most=4, shortest=1, initial=("none", "full"),
    memories=("normalised", "plain", "normalised"), dtypes=("float32", *HALF, "float64", *HALF, "float16"),
)  # fmt: skip
# One step of a wide head.
WIDE = problems(
    D=(33, 17, 20, 24, 32), packed=False, wild=False, heads=1, sequences=1, most=1, shortest=1,
    initial=("full", "none"), memories=("normalised", "plain"), dtypes=("float32", "float64"),
)  # fmt: skip


@law(
    "5.2",
    problems=STEPS | STEPS | STEPS | WIDE,
    needs=["step"],
    share=0.5,
    fewest=0.3,
)  # fmt: skip
def test_decoding_step_by_step_changes_nothing(implementation: Implementation, problem: Problem) -> Found:
    T = problem.lengths[0]
    return check_chain(stepping(implementation), problem, range(1, T)) if T else []

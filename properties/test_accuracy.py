"""How accurate is accurate enough: section 4, beyond the bounds of the other laws."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from oracle import Cotangents, Inputs
from oracle.precision import exact
from properties.harness.comparing import (
    Comparison,
    Found,
    Truth,
    check,
    check_against,
    compare,
    has_narrow_operands,
    nearest,
    radii,
    solved,
    stage,
    truth,
)
from properties.harness.implementations import Implementation
from properties.harness.implementations import implementation as backend
from properties.harness.laws import law
from properties.harness.running import STATE, LawBroken, compute_dtype, run
from properties.harness.subcalls import segment
from properties.problems.domain import CELLS, cells
from properties.problems.problem import Problem
from properties.problems.strategies import problems

# How often a right implementation may be taken for a wrong one, and the heads that this needs: properties/README.md.
HEADS, FALSE_ALARM = 256, 1e-9
# Gates that are another in each head: the errors of heads with one gate are all the same, and no evidence.
INDEPENDENT = st.sampled_from(("random 2^-1 2^-2", "random 2^-1 2^-8", "random 2^-8 2^-30", "uniform 0", "uniform -3"))
# A chunk of 64 tokens with these neither explodes nor forgets everything.
CONTRACTING: dict[str, Any] = {
    "theta": st.sampled_from(("constant 2^-8", "uniform -8", "random 2^-11 2^-8")),
    "alpha": st.sampled_from(("constant 2^-8", "uniform -8", "random 2^-16 2^-4")),
    "eta": st.sampled_from(("constant 2^-1", "uniform 0", "random 2^-4 2^-1")),
}


def is_long(implementation: Implementation, problem: Problem) -> bool:
    """Whether a problem has thousands of tokens, for an implementation that takes so many."""
    return problem.tokens > 1000 or "large" not in implementation.claims


def has_many_heads(implementation: Implementation, problem: Problem) -> bool:
    """Whether a problem has the heads that the law of section 4.3 counts, and is small enough for the oracle."""
    return problem.H == HEADS and cells(problem) <= CELLS


def stretched(problem: Problem) -> Problem:
    """Return the same for a sequence of eight chunks more."""
    return replace(problem, lengths=tuple(8 * problem.C + length for length in problem.lengths))


def chunks(problem: Problem) -> Iterator[slice]:
    """Return the pieces of a problem of one sequence."""
    T, start = problem.tokens, 0
    end = problem.C - problem.starts[0]
    while start < T:
        yield slice(start, min(end, T))
        start, end = end, end + problem.C


def started(part: Inputs, state: Truth) -> Inputs:
    """Return a chunk with the oracle's state before it, as an implementation takes it: the anchor is M."""
    M, S = (torch.tensor(nearest(state[name])).to(compute_dtype(part.q.dtype)) for name in ("M", "S"))
    return replace(part, M=M, S=S, anchor=None, offset=None)


@law(
    "4.2",
    problems=problems(
        memories=("normalised",), C=(2, 3, 4, 7), D=(2, 3, 4), most=8, heads=2, sequences=1, packed=False, wild=False
    ).map(stretched),
    needs=["normalised", "resume", "backward"],
    share=0.2,
)
def test_every_chunk_is_right_from_the_oracles_own_state(implementation: Implementation, problem: Problem) -> Found:
    inputs, flowing = problem.inputs(), problem.cotangents()
    state: Truth | None = None
    found: Found = []
    for span in chunks(problem):
        part = segment(inputs, span) if state is None else started(segment(inputs, span), state)
        cotangents = Cotangents(**vars(flowing) | {"o": flowing.o[:, span]})
        state = truth(part, cotangents)
        found += check_against(state, implementation, part, cotangents)[1]
    return found


@law(
    "4.2",
    problems=problems(
        memories=("plain",), dtypes=("float32", "float64"), D=(1, 2), C=(16, 64, 1), heads=1, sequences=1,
        packed=False, wild=False, k="unit 0", **CONTRACTING,
    ).map(lambda problem: replace(problem, lengths=(2048 - problem.seed % 3,) * 2, offsets=problem.offsets * 2)),
    needs=["plain"],
    share=0.02,
    about=is_long,
)  # fmt: skip
def test_a_plain_memory_is_right_for_thousands_of_tokens(implementation: Implementation, problem: Problem) -> Found:
    return check(implementation, problem)


def sizes(name: str, x: NDArray[np.float64], unit: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the root mean square of x / unit in each head of a result, shape (H,), where there is a unit."""
    axis = 0 if name in ("dw", "db") else 1 if name.removeprefix("d") in STATE else 2
    relative = np.divide(x, unit, out=np.zeros_like(unit), where=(unit > 0) & (unit < math.inf))
    heads = np.moveaxis(relative, axis, 0).reshape(x.shape[axis], -1)
    means: NDArray[np.float64] = np.sqrt((heads * heads).sum(1) / max(1, heads.shape[1]))
    return means


def most(heads: int) -> float:
    """Return the number of heads that a fair coin exceeds at most once in 1 / FALSE_ALARM times (Hoeffding)."""
    return heads / 2 + math.sqrt(heads * math.log(1 / FALSE_ALARM) / 2)


@law(
    "4.3",
    problems=problems(
        D=(2, 3), C=(1, 2, 3, 4, 8), most=6, heads=1, sequences=1, packed=False, wild=False,
        alpha=INDEPENDENT, eta=INDEPENDENT, theta=INDEPENDENT, k="unit 0", q="random 0", v="random 0", w="random 0",
        b="random 0",
        state="random 0",
    ).map(lambda problem: replace(problem, H=HEADS)),
    needs=["backward", "large"],
    share=0.1,
    about=has_many_heads,
)  # fmt: skip
def test_errors_are_at_most_twice_those_of_the_definition(implementation: Implementation, problem: Problem) -> Found:
    inputs, cotangents, wanted = problem.inputs(), problem.cotangents(), solved(problem, True)
    found: Found = []
    both = implementation, backend("recurrent", implementation.device)
    ours, its = (run(x, inputs, cotangents) for x in both)
    radius, unit = (radii(x, inputs, cotangents) for x in both)
    found += compare(ours, wanted, radius, stage(inputs, has_narrow_operands(implementation, inputs)))
    for name in (name for name in wanted if name in ours):
        far, its_far = (nearest(np.abs(exact(x[name]) - wanted[name])) for x in (ours, its))
        rounding = torch.finfo(ours[name].dtype).eps / 2 * nearest(np.abs(wanted[name]))
        with np.errstate(all="ignore"):
            # The cost of another arithmetic in the error model: logs, narrow operands.
            cost = np.maximum(radius[name] - unit[name], 0)
            known = np.where(radius[name] < math.inf, unit[name], 0)
            error, definition, once, extra = (sizes(name, x, known) for x in (far, its_far, rounding, cost))
        worse = int(np.count_nonzero(~(error <= 2 * definition + once + extra)))
        found.append(Comparison(name, ours[name].numel(), heads=worse / problem.H))
        if worse > most(problem.H):
            raise LawBroken(
                f"{name} is less accurate than the definition\n"
                f"    heads more than twice as far off {worse} of {problem.H}\n"
                f"    by chance at most                {most(problem.H):.6g}",
                found,
            )
    return found

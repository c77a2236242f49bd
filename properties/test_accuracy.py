"""How accurate is accurate enough: section 4, beyond the bounds of the other laws."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from oracle import Cotangents, Inputs
from oracle.formats import exact
from properties.checks import (
    TALLY,
    Implementation,
    LawBroken,
    Results,
    Truth,
    check,
    check_against,
    compute_dtype,
    law,
    nearest,
    note,
    radii,
    run,
    solved,
    truth,
)
from properties.implementations import implementation as backend
from properties.parts import piece
from properties.problem import Problem
from properties.strategies import problems

# So many heads that the mean square of their errors is a number and not luck: properties/README.md.
HEADS = 64
# Gates that are another in each head: the errors of heads with one gate are all the same, and then luck again.
INDEPENDENT = st.sampled_from(("random 2^-1 2^-2", "random 2^-1 2^-8", "random 2^-8 2^-30", "uniform 0", "uniform -3"))
# A chunk of 64 tokens with these neither explodes nor forgets everything.
CONTRACTING = {
    "theta": st.sampled_from(("constant 2^-8", "uniform -8", "random 2^-11 2^-8")),
    "alpha": st.sampled_from(("constant 2^-8", "uniform -8", "random 2^-16 2^-4")),
    "eta": st.sampled_from(("constant 2^-1", "uniform 0", "random 2^-4 2^-1")),
}


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
    share=0.3,
)
def test_every_chunk_is_right_from_the_oracles_own_state(implementation: Implementation, problem: Problem) -> None:
    inputs, flowing, state = problem.inputs(), problem.cotangents(), None
    for span in chunks(problem):
        part = piece(inputs, span) if state is None else started(piece(inputs, span), state)
        cotangents = Cotangents(**vars(flowing) | {"o": flowing.o[:, span]})
        state = truth(part, cotangents)
        check_against(state, implementation, part, cotangents)


@law(
    "4.2",
    problems=problems(
        memories=("plain",), dtypes=("float32", "float64"), D=(1, 2), C=(16, 64, 1), heads=1, sequences=1,
        packed=False, wild=False, k="unit 0", **CONTRACTING,
    ).map(lambda problem: replace(problem, lengths=(4096 - problem.seed % 3,))),
    needs=["plain"],
    share=0.02,
)  # fmt: skip
def test_a_plain_memory_is_right_for_thousands_of_tokens(implementation: Implementation, problem: Problem) -> None:
    check(implementation, problem)


def errors(results: Results, wanted: Truth, radius: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Return error / bound of every element that has a bound."""
    far = {name: nearest(np.abs(exact(x) - wanted[name])) for name, x in results.items() if name in wanted}
    with np.errstate(divide="ignore", invalid="ignore"):
        return {n: np.where((radius[n] > 0) & (radius[n] < np.inf), x / radius[n], 0) for n, x in far.items()}


def root_mean_square(x: NDArray[np.float64]) -> float:
    """Return the size of a typical element."""
    return float(np.sqrt(np.mean(x * x))) if x.size else 0.0


@law(
    "4.3",
    problems=problems(
        D=(2, 3), C=(1, 2, 3, 4, 8), most=6, heads=1, sequences=1, packed=False, wild=False,
        alpha=INDEPENDENT, eta=INDEPENDENT, theta=INDEPENDENT, k="unit 0", q="random 0", v="random 0", w="random 0",
        b="random 0",
        state="random 0",
    ).map(lambda problem: replace(problem, H=HEADS)),
    needs=["backward", "large"],
    share=0.3,
)  # fmt: skip
def test_errors_are_at_most_twice_those_of_the_definition(implementation: Implementation, problem: Problem) -> None:
    inputs, cotangents, wanted = problem.inputs(), problem.cotangents(), solved(problem, True)
    TALLY.now.compared = True
    definition = backend("recurrent", implementation.device)
    both = []
    for subject in (implementation, definition):
        radius = radii(subject, inputs, cotangents)
        results = run(subject, inputs, cotangents)
        forms = {name: torch.finfo(results[name].dtype).eps / 2 for name in wanted if name in results}
        own = {name: half * nearest(np.abs(wanted[name])) for name, half in forms.items()}
        rounding = {n: np.where(radius[n] > 0, x / np.where(radius[n] > 0, radius[n], 1), 0) for n, x in own.items()}
        both.append((errors(results, wanted, radius), rounding))
    (ours, rounding), (theirs, _) = both
    for name, x in ours.items():
        error, allowed = root_mean_square(x), 2 * root_mean_square(theirs[name]) + root_mean_square(rounding[name])
        note(name, error / allowed if allowed else 0.0, 0.0)
        if error > allowed:
            raise LawBroken(
                f"{name} is less accurate than the definition\n"
                f"    root mean square of error / bound {error:.6g}\n"
                f"    of the definition                 {root_mean_square(theirs[name]):.6g}\n"
                f"    allowed                           {allowed:.6g}"
            )

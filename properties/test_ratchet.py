"""The worst errors that were ever seen, and how they are now: section 4.4."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

# Importing the fixtures registers all laws.
from properties import test_fixtures  # noqa: F401
from properties.harness import ratchet
from properties.harness.facts import Recorder, worst_error
from properties.harness.implementations import Implementation
from properties.harness.laws import PROPERTIES
from properties.harness.running import LawBroken
from properties.problems.problem import Problem

# The factor of section 4.4 in SPEC.md.
WORSE = 4
# A result that is rounded once may be so far off, in ulps, and on another machine will be.
ONE_ROUNDING = 0.5

Order = Callable[[int], Tensor]


def backwards(D: int) -> Tensor:
    """Number D features from the last."""
    return torch.arange(D).flip(0)


def halves_swapped(D: int) -> Tensor:
    """Number D features from the middle."""
    return torch.arange(D).roll(D // 2)


# Another machine's products have other orders of their sums, and other luck: an error that is four times as large in
# one order may be less than that in all others.
ORDERS: tuple[Order, ...] = (backwards, halves_swapped)


def reordered(implementation: Implementation, order: Order) -> Implementation:
    """Hand the features over in another order, and take the results back: exactly, the op is the same."""

    def call(*arguments: Any, **options: Any) -> Any:
        *rows, theta, alpha, eta, eps, chunk_size, start, final = arguments
        there = order(rows[0].shape[-1]).to(rows[0].device)
        back = there.argsort()

        def squares(state: Any, at: Tensor) -> Any:
            if state is None:
                return None
            if isinstance(state, Tensor):
                return state[..., at, :][..., at]
            return implementation.state(*(squares(x, at) for x in (state.M, state.S, state.anchor)), state.offset)

        rows = [None if x is None else x[..., there] for x in rows]
        o, left = implementation.call(
            *rows, theta, alpha, eta, eps, chunk_size, squares(start, there), final, **options
        )
        return o[..., back], squares(left, back)

    return replace(implementation, call=call)


def replayed(implementation: Implementation, law: str, problem: Problem, enough: float, recorder: Recorder) -> float:
    """Return the error of a problem in ulps, the least of some orders of its sums unless the first is small enough."""
    errors: list[float] = []
    for candidate in (implementation, *(reordered(implementation, order) for order in ORDERS)):
        errors.append(worst_error(PROPERTIES[law].check(candidate, problem, recorder)))
        if errors[-1] <= enough:
            break
    return min(errors)


def replay_a_case(implementation: Implementation, case: str, stored: tuple[float, str], recorder: Recorder) -> None:
    """Compare the error of a stored worst case, named "law dtype", with the stored one."""
    error, problem = stored
    limit = WORSE * max(error, ONE_ROUNDING)
    now = replayed(implementation, case.partition(" ")[0], Problem.from_json(problem), limit, recorder)
    recorder.ratio(f"ratchet {case}", now / error)
    if now > limit:
        raise LawBroken(f"{case}: the error was {error:.6g} ulp and is {now:.6g} ulp, of {problem}")


@pytest.mark.law("4.4", needs=frozenset())
@pytest.mark.parametrize("part", range(ratchet.PARTS))
def test_ratchet(implementation: Implementation, recorder: Recorder, part: int) -> None:
    cases = ratchet.read().get(ratchet.subject(implementation.name, implementation.device), {})
    mine = [*cases.items()][part :: ratchet.PARTS]
    if not mine:
        pytest.skip("worst cases in ratchet.json")
    for case, stored in mine:
        replay_a_case(implementation, case, stored, recorder)

"""A sequence may be split anywhere and resumed: law 2."""

import torch

from oracle import Cotangents, Inputs
from properties.checks import STATE, Implementation, Results, check_inputs, law, run, same
from properties.parts import TOKENS, chain, piece, resumed, reverse_pieces, spans, stepping
from properties.problem import Problem
from properties.strategies import problems, split

PER_TOKEN = ("o", *(f"d{name}" for name in TOKENS))
UNPACKED = split(problems(packed=False, wild=False, most=16))
STEPS = problems(packed=False, wild=False, most=6, initial=("none", "full"))


def check_pieces(
    implementation: Implementation, inputs: Inputs, cotangents: Cotangents, splits: tuple[int, ...]
) -> list[Results]:
    """Check each piece from the state that the one before it really left, and backwards; return all results."""
    cuts, calls = spans(inputs.q.shape[1], splits), []
    for span in cuts:
        part = piece(inputs, span)
        calls.append(resumed(part, run(implementation, calls[-1])) if calls else part)
    backwards, results = reverse_pieces(calls, cotangents, cuts), []
    step = next(backwards)
    while step:
        results.append(check_inputs(implementation, *step))
        try:
            step = backwards.send(results[-1])
        except StopIteration:
            step = None
    return results[::-1]


def check_chain(implementation: Implementation, problem: Problem, splits: tuple[int, ...]) -> None:
    """Check the pieces one by one, and that autograd through all of them gives the same."""
    inputs, cotangents = problem.inputs(), problem.cotangents()
    pieces = check_pieces(implementation, inputs, cotangents, splits)
    through = chain(implementation, inputs, cotangents, splits)
    first = {name: x for name, x in pieces[0].items() if name in ("dM", "dS", "danchor")}
    wanted = first | {name: pieces[-1][name] for name in STATE if name in through}
    wanted |= {name: torch.cat([part[name] for part in pieces], 1) for name in PER_TOKEN if name in through}
    # Not their sum: autograd adds up what single tokens gave, which may cancel, in an order of its own.
    wanted |= {name: torch.stack([part[name] for part in pieces]) for name in ("dw", "db") if name in through}
    same(wanted, through)


@law("5.2", problems=UNPACKED, needs=["resume"], share=1.5)
def test_splitting_a_sequence_changes_nothing(implementation: Implementation, problem: Problem) -> None:
    anywhere = "offset" in implementation.claims
    check_chain(implementation, problem, tuple(n if anywhere else n - n % problem.C for n in problem.splits))


@law("5.2", problems=problems(packed=False, wild=False, most=6), needs=["offset"], share=0.5)
def test_splitting_into_single_tokens_changes_nothing(implementation: Implementation, problem: Problem) -> None:
    check_chain(implementation, problem, tuple(range(1, problem.lengths[0])))


@law("5.2", problems=STEPS, needs=["step"])
def test_decoding_step_by_step_changes_nothing(implementation: Implementation, problem: Problem) -> None:
    if problem.tokens:
        check_chain(stepping(implementation), problem, tuple(range(1, problem.lengths[0])))

"""Values and gradients are the oracle's: laws 1, 7, 8, 9 and 14."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from properties.harness.comparing import Found, check
from properties.harness.implementations import Implementation
from properties.harness.laws import law
from properties.problems.problem import Problem
from properties.problems.strategies import CALM_THETAS, MILD_VALUES, explicit, gates, problems

ENDS = ("0", "1", "2^-149", "2^-126", "2^-1", "1-2^-24")
FADING = tuple(f"1-2^-{n}" for n in range(1, 25))


@st.composite
def huge(draw: st.DrawFn, /, **fixed: Any) -> Problem:
    """Draw one chunk of a plain memory with these profiles, in which something is too large for its neighbours."""
    return Problem(
        lengths=(draw(st.integers(2, 4)),),
        D=draw(st.integers(1, 4)),
        C=draw(st.integers(4, 5)),
        H=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 2**16)),
        **fixed,
    )


def two_chunks_and_more(*C: int) -> SearchStrategy[Problem]:
    """Draw problems that are about two chunks of one of these lengths or more.

    The plainest, which every run begins with, starts with the last token of a chunk and ends inside the next but one.
    """

    def lengthened(problem: Problem) -> Problem:
        offsets = tuple(problem.C - 1 - n for n in problem.offsets)
        return replace(problem, lengths=(2 * problem.C - 1 + problem.lengths[0],), offsets=offsets)

    starts = ("full", "M", "none")
    return problems(C=C, D=(2, 3, 1), most=8, heads=1, sequences=1, initial=starts, wild=False).map(lengthened)


@law("5.1", "5.8", problems=problems(), share=6)
def test_values_are_the_oracles(implementation: Implementation, problem: Problem) -> Found:
    return check(implementation, problem, gradients=False)


@law("5.14", "5.8", problems=problems(), share=3, needs=["backward"])
def test_gradients_are_the_oracles(implementation: Implementation, problem: Problem) -> Found:
    return check(implementation, problem)


@law("5.1", "5.14", problems=problems(wild=False, dtypes=("float32", "float64")), share=1.5)
def test_the_chunked_form_is_the_recurrence_for_any_length(implementation: Implementation, problem: Problem) -> Found:
    return check(implementation, problem)


@law("5.1", "5.14", problems=two_chunks_and_more(33, 48, 65), share=0.3)
def test_the_chunked_form_is_the_recurrence_for_long_chunks(implementation: Implementation, problem: Problem) -> Found:
    # A kernel may cut a chunk into blocks.
    return check(implementation, problem)


def beside_a_long_chunk(problem: Problem) -> Problem:
    """Return the same with a few chunks, or for an odd seed with fewer tokens than a chunk has."""
    few = problem.lengths[0] * problem.C // 9
    chunks = 0 if problem.seed % 2 else max(2, 800 // problem.C)
    return replace(problem, lengths=(chunks * problem.C + few,))


@law(
    "5.1", "5.14",
    problems=problems(
        C=(257, 129, 200, 512), D=(2, 1), most=8, shortest=1, heads=1, sequences=1, packed=False, wild=False,
        dtypes=("float32", "float64"), initial=("M", "full", "none"), k="unit 0", theta=st.sampled_from(CALM_THETAS),
    ).map(beside_a_long_chunk),
    share=0.06,
)  # fmt: skip
def test_the_chunked_form_is_the_recurrence_for_chunks_of_hundreds(
    implementation: Implementation, problem: Problem
) -> Found:
    return check(implementation, problem)


# More tokens than any sequence of a problem has.
HUGE = 5000


def in_a_huge_chunk(problem: Problem) -> Problem:
    """Return the same in a chunk of thousands, of which some sequences begin at the start and others at the end."""
    offsets = tuple(place + HUGE * (problem.seed >> n & 1) for n, place in enumerate(problem.offsets))
    return replace(problem, C=problem.C + HUGE, offsets=offsets)


def is_a_part_of_a_chunk(implementation: Implementation, problem: Problem) -> bool:
    """Whether the sequences are shorter than a chunk, inside any domain."""
    return max(problem.lengths) < HUGE < problem.C


@law(
    "5.1", "5.14",
    problems=problems(C=(3, 16, 7, 1), most=40, shortest=1, initial=("full", "M", "full"), wild=False).map(
        in_a_huge_chunk
    ),
    share=0.3,
    fewest=0.1,
    about=is_a_part_of_a_chunk,
)  # fmt: skip
def test_the_chunked_form_is_the_recurrence_for_chunks_of_thousands(
    implementation: Implementation, problem: Problem
) -> Found:
    return check(implementation, problem)


@law("5.1", "5.14", problems=two_chunks_and_more(3, 2, 5), share=0.3)
def test_the_chunked_form_is_the_recurrence_for_short_chunks(implementation: Implementation, problem: Problem) -> Found:
    # A kernel may work on a block of several chunks.
    return check(implementation, problem)


@law("5.7", problems=problems(C=(2, 3, 4, 7, 8), wild=False, cotangent="M S anchor"), needs=["final_state"])
def test_the_state_after_a_tail_is_that_of_the_definition(implementation: Implementation, problem: Problem) -> Found:
    # One token more, where the sequence would end with its chunk.
    lengths = tuple(
        T + (T > 0 and (start + T) % problem.C == 0) for T, start in zip(problem.lengths, problem.starts, strict=True)
    )
    uneven = problem.packed or len(set(lengths)) == 1
    return check(implementation, replace(problem, lengths=lengths) if uneven else problem)


@law(
    "5.8",
    "4.1",
    problems=problems(unit_levels=ENDS, theta_levels=("0", "2^-1", "2^-149", "2^-126"), wild=False),
    share=1.4,
)
def test_gates_at_the_ends_of_their_ranges_are_harmless(implementation: Implementation, problem: Problem) -> Found:
    return check(implementation, problem)


@law(
    "5.8",
    problems=problems(
        memories=("normalised",),
        k=st.sampled_from(("flat 0", "random 0", "zero")),
        v=st.sampled_from(("flat 0", "random 0")),
        state=st.sampled_from(("flat 0", "zero")),
        wild=False,
        most=4,
    ),
    needs=["normalised"],
)
def test_rows_without_variance_are_harmless(implementation: Implementation, problem: Problem) -> Found:
    return check(implementation, problem)


@law("5.9", problems=problems(alpha=gates(FADING), eta=gates(tuple(f"2^-{n}" for n in range(1, 80))), wild=False))
def test_decays_that_underflow_give_what_is_representable(implementation: Implementation, problem: Problem) -> Found:
    return check(implementation, problem)


@law("5.4", "4.1", problems=huge(q="spike 70 0", k="spike 70 1", theta="constant 2^-126"), share=0.5)
def test_huge_later_tokens_harm_nothing_earlier(implementation: Implementation, problem: Problem) -> Found:
    # Nothing overflows but the product of the first query and the second key, which no result contains.
    return check(implementation, problem)


@law("5.4", "4.1", problems=huge(v="spike 70 1", do="spike 70 0"), needs=["backward"], share=0.5)
def test_huge_later_values_harm_no_earlier_gradient(implementation: Implementation, problem: Problem) -> Found:
    # Nothing overflows but the product of the first cotangent and the second inner gradient, which no result contains.
    return check(implementation, problem)


@law("5.1", "5.14", problems=explicit(), share=2)
def test_any_small_numbers_give_the_oracles_results(implementation: Implementation, problem: Problem) -> Found:
    return check(implementation, problem)


@law(
    "5.1",
    problems=problems(
        memories=("plain",), D=(2,), C=(16, 5, 33), most=200, heads=1, sequences=1, k=MILD_VALUES, wild=False
    ),
    needs=["plain"],
    share=0.3,
)
def test_long_sequences_of_a_plain_memory_are_the_recurrence(implementation: Implementation, problem: Problem) -> Found:
    return check(implementation, problem)

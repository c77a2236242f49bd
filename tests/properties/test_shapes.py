"""An implementation whose kernels are compiled for each shape gets few of them, and every kind of them."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from properties.harness import corpus
from properties.harness.foreign import foreign
from properties.harness.implementations import implementation
from properties.harness.laws import PROPERTIES
from properties.problems.problem import Problem
from properties.problems.real_sizes import real_problems
from properties.problems.shapes import FEW, FEWEST, Shapes
from properties.problems.strategies import explicit, problems
from properties.test_real_sizes import is_within_chunks

corpus.import_laws()

DRAWS = 150


def drawn(strategy: SearchStrategy[Problem]) -> list[Problem]:
    found: list[Problem] = []

    @settings(
        max_examples=DRAWS, phases=[Phase.generate], database=None, derandomize=True, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(problem=strategy)
    def draw(problem: Problem) -> None:
        found.append(problem)

    draw()
    return found


@pytest.mark.parametrize("strategy", [problems(), real_problems(D=128, C=256), real_problems(C=200, chunks=3)])
@pytest.mark.parametrize("shapes", [FEW, FEWEST], ids=["few", "fewest"])
def test_shapes_are_few_and_no_larger(strategy: SearchStrategy[Problem], shapes: Shapes) -> None:
    for problem in (problem for problem in drawn(strategy) if problem.dtype != "float64"):
        few, widths = shapes.nearest(problem), shapes.widths[problem.dtype, problem.memory]
        assert shapes.nearest(few) == few
        assert few.D <= max(problem.D, widths[0])
        assert few.C <= problem.C
        assert all(new <= old for new, old in zip(few.lengths, problem.lengths, strict=True))
        assert few.C <= shapes.free or few.C in shapes.chunks[few.memory]
        assert few.D in widths
        # The rest is as it was drawn.
        same = {name: getattr(problem, name) for name in ("D", "C", "lengths", "offsets")}
        assert replace(few, **same) == problem


@pytest.mark.parametrize("shapes", [FEW, FEWEST], ids=["few", "fewest"])
def test_every_width_and_chunk_length_is_reached(shapes: Shapes) -> None:
    for (dtype, memory), widths in shapes.widths.items():
        problem = Problem(dtype=dtype, memory=memory, gate_dtype="float32")
        assert {shapes.nearest(replace(problem, D=D)).D for D in range(1, 129)} == {*widths}
        chunks = {shapes.nearest(replace(problem, C=C)).C for C in range(1, 257)}
        assert chunks == {*range(1, shapes.free + 1), *shapes.chunks[memory]}


def test_a_problem_within_a_chunk_stays_within_it() -> None:
    subject = implementation("chunk", "cpu")
    inside = [problem for problem in drawn(real_problems(D=128, C=256)) if is_within_chunks(subject, problem)]
    shorter = [few for problem in inside if (few := FEW.nearest(problem)).C < problem.C]
    assert len(shorter) > DRAWS / 10
    assert all(is_within_chunks(subject, few) for few in shorter)


def test_numbers_that_are_given_one_by_one_keep_their_sizes() -> None:
    assert all(FEW.nearest(problem) == problem for problem in drawn(explicit()))


def test_kernels_that_a_gpu_compiles_get_few_shapes_and_no_others_do() -> None:
    odd = Problem(lengths=(9,), D=6, C=200)
    own, others = implementation, lambda name, device: foreign(f"titans:{name}", device)
    for load, name, device, few in (
        (own, "triton", "cuda", True),
        (own, "triton", "cpu", False),
        (own, "chunk", "cuda", False),
        (others, "chunk_titans_linear", "cuda", True),
        (others, "chunk_titans_linear", "cpu", False),
    ):
        domain = load(name, device).domain
        assert domain.nearest(odd) == (FEW.nearest(odd) if few else odd)
        # Every problem is inside: a stored one is replayed as it is.
        assert not domain.objection(odd.inputs())
        assert not str(domain)


def test_every_law_has_problems_of_the_fewest_shapes() -> None:
    subject = implementation("chunk", "cpu")
    subject = replace(subject, domain=replace(subject.domain, few_shapes=FEWEST))
    for law in PROPERTIES.values():
        assert any(law.posed(subject, problem) for problem in drawn(law.problems)[:40]), law.name

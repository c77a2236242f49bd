"""Nothing is called outside a declared domain, and inside it nothing may raise."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oracle import bounds
from properties.harness.comparing import check
from properties.harness.facts import Recorder
from properties.harness.foreign import foreign
from properties.harness.laws import PROPERTIES
from properties.harness.running import LawBroken
from properties.problems.domain import CELLS, EVERYWHERE, Domain, cells
from properties.problems.problem import Problem
from properties.problems.strategies import problems
from tests.properties.test_laws import run_suite, verdicts

RESTRICTED = "tests.properties.restricted:whole_chunks"
TEXTS = (
    "D=16,64,128 C=16,64 T%C=0",
    "D=64 C=64 T%C=0 N=1 H<=8 dtype=bfloat16",
    "D%16=0 C>=16 T%64=0 T>=64 T<=256",
    "C=1 H%4=0 N>=2 dtype=float16,float32 memory=plain device=cpu",
)
DOMAINS = [Domain.parse(text) for text in TEXTS]


@pytest.mark.parametrize("text", TEXTS)
def test_a_domain_is_read_as_it_is_written(text: str) -> None:
    assert Domain.parse(str(Domain.parse(text))) == Domain.parse(text)
    assert set(str(Domain.parse(text)).split()) == set(text.split())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("E=64", "a rule of a domain must be like D=64,128"),
        ("D%C=0", "a multiple must be like T%C=0"),
        ("T>=1,2", "a limit like T>=64"),
        ("dtype=int8", "dtype must be among bfloat16"),
        ("D=64 D=16", "one rule of a kind, got 'D=64' and 'D=16'"),
        ("dtype=float32 dtype=float16", "one rule of a kind"),
        ("D=8 D>=16", "no D obeys all rules of 'D=8 D>=16'"),
        ("C=64 T<=32 T%C=0", "no T obeys"),
        ("N=0", "no N obeys"),
    ],
)
def test_a_mistake_in_a_domain_is_named(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Domain.parse(text)


@settings(max_examples=200, suppress_health_check=list(HealthCheck), deadline=None)
@given(domain=st.sampled_from(DOMAINS), brief=st.booleans(), problem=problems())
def test_the_nearest_problem_is_inside(domain: Domain, brief: bool, problem: Problem) -> None:
    domain = replace(domain, brief=brief)
    if domain.memory and problem.memory not in domain.memory:
        return
    inside = domain.nearest(problem)
    assert domain.holds(inside)
    assert not domain.objection(inside.inputs())
    assert domain.nearest(inside) == inside
    assert EVERYWHERE.nearest(problem) == problem


def test_the_nearest_problem_keeps_its_chunks_and_has_the_least_sizes_for_seed_0() -> None:
    problem = Problem(lengths=(7,), C=3, D=2, initial="full", offsets=(2,), splits=(3,))
    inside = DOMAINS[0].nearest(problem)
    assert inside == replace(problem, lengths=(48,), C=16, D=16, offsets=(15,), splits=(20,))
    widths = {(x.D, x.C) for seed in range(2000) if (x := DOMAINS[0].nearest(replace(problem, seed=seed)))}
    assert widths == {(D, C) for D in (16, 64, 128) for C in (16, 64)}


def test_what_would_cost_too_much_is_made_smaller() -> None:
    problem = Problem(lengths=(24, 24, 24), H=3, C=8)
    costs = [cells(DOMAINS[1].nearest(replace(problem, seed=seed))) for seed in range(20)]
    # One chunk of two heads.
    assert max(costs) == 2 * 64 * 64**2


def test_a_problem_in_brief_has_few_tokens_as_far_from_the_end_of_a_chunk_as_they_were() -> None:
    domain = replace(Domain.parse("D=64 C=64"), brief=True)
    problem = Problem(lengths=(7,), C=3, D=2, initial="full", offsets=(2,), splits=(3,))
    assert domain.nearest(problem) == replace(problem, C=64, D=64, offsets=(63,))
    large = domain.nearest(replace(problem, lengths=(24, 24, 24), H=3, offsets=(2, 0, 1)))
    assert (large.lengths, large.H, large.offsets) == ((2, 2), 2, (63, 61))
    assert cells(large) == CELLS
    assert domain.nearest(replace(problem, lengths=(0,), H=256)).H == 2
    # What is cheap has its chunks, and rules are rules.
    narrow = replace(Domain.parse("D=2 C=64"), brief=True)
    assert narrow.nearest(problem) == replace(narrow, brief=False).nearest(problem)
    assert replace(Domain.parse("D=64 C=64 T%C=0"), brief=True).nearest(problem).lengths == (64,)


def test_no_call_is_made_outside_and_what_cannot_be_stated_is_not_claimed(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    tests = ("properties/test_splitting.py", "properties/test_coefficients.py", "properties/test_fixtures.py")
    chosen = ("-k", "splitting or coefficient or decoding or fixture and 001", "--hypothesis-profile=smoke")
    output = run_suite(*tests, "--impl", RESTRICTED, *chosen, "--verdicts", str(path), "--hypothesis-seed=0")
    found = {law: row for (law, _), row in verdicts(path).items()}
    assert {law for law, row in found.items() if row["verdict"] == "not claimed"} == {
        "test_splitting_into_single_tokens_changes_nothing",
        "test_fixture",
    }
    outside = found["test_splitting_into_single_tokens_changes_nothing"]["outside"]
    assert re.match("T = 1 with C = (16|64) is outside", outside)
    assert f"not claimed  tests.properties.restricted:whole_chunks: {outside[:25]}" in output
    assert "whole_chunks is defined for D=16,64,128 C=16,64 T%C=0" in output


NEVER = ("properties/test_oracle.py::test_values_are_the_oracles", "--impl", "tests.properties.restricted:never_whole")


def test_raising_inside_the_domain_fails_with_what_was_raised(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    inside = Problem(lengths=(16,), D=16, C=16)
    output = run_suite(*NEVER, "--replay", inside.to_json(), "--verdicts", str(path), fails=1)
    (row,) = verdicts(path).values()
    assert (row["verdict"], row["message"]) == ("fail", "ValueError: C must be 8")
    assert "ValueError: C must be 8" in output
    # Outside it is never called.
    assert "1 skipped" in run_suite(*NEVER, "--replay", Problem().to_json())


def test_the_command_line_says_it_too(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    declared = ("--impl-domain", "T>=1 T<=3", "--replay", Problem().to_json())
    run_suite(*NEVER, *declared, "--verdicts", str(path), fails=1)
    (row,) = verdicts(path).values()
    assert "--impl-domain 'T>=1 T<=3'" in row["replay"]
    run_suite(NEVER[0], "--impl-domain", "T>=1", fails=4)


def test_a_stored_case_outside_is_not_judged() -> None:
    subject, recorder = foreign(RESTRICTED, "cpu"), Recorder()
    assert not PROPERTIES["test_values_are_the_oracles"].check(subject, Problem(lengths=(3,)), recorder)
    assert recorder.unclaimed == "D = 1 is outside D=16,64,128 C=16,64 T%C=0"
    assert not recorder.facts.compared


HALF = Problem(
    lengths=(9,), D=4, C=4, H=2, initial="full", offsets=(2,), theta="constant 2^-5", eps=1.0, state="random -4"
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("memory", ["plain", "normalised"])
def test_operands_of_half_precision_are_right_only_as_such(dtype: str, memory: str) -> None:
    subject = foreign("tests.properties.restricted:half_operands", "cpu", domain="")
    problem = replace(HALF, dtype=dtype, memory=memory)
    assert check(subject, problem)
    undeclared = foreign("tests.properties.restricted:half_operands", "cpu", domain="", operands="")
    assert undeclared.arithmetic(problem.inputs()) == bounds.arithmetic_for(problem.inputs().q.dtype)
    if dtype != "float32":
        with pytest.raises(LawBroken):
            check(undeclared, problem)

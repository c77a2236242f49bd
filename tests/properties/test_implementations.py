"""Any callable can be verified: what it lacks is not claimed, and never counts as passed."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import titans
from properties.harness.comparing import check
from properties.harness.foreign import OPTIONAL, Adapter, foreign
from properties.harness.implementations import CLAIMS, SAME_BITS
from properties.harness.laws import PROPERTIES
from properties.harness.running import call, tensors
from properties.problems.problem import Problem
from tests.properties.adapted import OUTPUTS_ALONE
from tests.properties.test_laws import ROOT, run_suite

QUICK = ("-k", "not fixture and not ratchet and not long_sequences and not thousands")
SUBJECT = foreign("titans:chunk_titans_linear", "cpu")
LAWS = {name: law for name, law in PROPERTIES.items() if "long_sequences" not in name and "thousands" not in name}


@pytest.mark.parametrize(
    ("target", "lacks"),
    [
        ("titans:chunk_titans_linear", None),
        ("tests.properties.adapted:without_backward", None),
        ("tests.properties.adapted:resumes_between_chunks", None),
        ("tests.properties.adapted:outputs_alone", OUTPUTS_ALONE),
    ],
)
def test_a_correct_implementation_passes(target: str, lacks: str | None) -> None:
    output = run_suite(
        "properties",
        "--impl",
        target,
        *(["--impl-lacks", lacks] if lacks else []),
        "--hypothesis-profile=smoke",
        *QUICK,
    )
    claims = foreign(target, "cpu", lacks.split(",") if lacks else None).claims
    not_claimed = [name for name, law in LAWS.items() if not law.needs <= claims]
    assert re.search(rf"{len(LAWS) - len(not_claimed)} passed, {len(not_claimed)} skipped", output), output
    assert f"not claimed: {', '.join(sorted(CLAIMS - claims))}" in output


LOGS = Problem(
    lengths=(4,), D=2, C=4, memory="normalised", theta="random 2^-1 2^-1074", k="random 0", dtype="float64",
    gate_dtype="float64", log_gates=True,
)  # fmt: skip


@pytest.mark.parametrize("target", ["titans:chunk_titans_linear", "tests.properties.adapted:resumes_between_chunks"])
def test_a_claim_may_depend_on_the_call(target: str) -> None:
    subject = foreign(target, "cpu")
    for log_gates in (True, False):
        problem = replace(LOGS, log_gates=log_gates).restricted(subject.claims)
        assert subject.arithmetic(problem.inputs()).log_space == log_gates
        check(subject, problem)


def test_the_type_of_a_state_is_that_of_the_final_state() -> None:
    taken: list[object] = []

    def strict(*arguments: object, initial_state: object, **options: object) -> object:
        taken.append(initial_state)
        return titans.chunk_titans_linear(*arguments, initial_state=initial_state, **options)

    problem = Problem(lengths=(3,), initial="full", offsets=(1,), C=2)
    call(replace(SUBJECT, call=Adapter(strict, frozenset())), problem.inputs(), tensors(problem.inputs()))
    # A call without a state comes first, and says which type it is.
    assert [type(state) for state in taken] == [type(None), titans.TitansState]


def test_resuming_from_the_memory_alone_is_caught() -> None:
    test = "properties/test_splitting.py::test_splitting_a_sequence_changes_nothing"
    output = run_suite(test, "--impl", "tests.properties.adapted:memory_alone", fails=True)
    assert re.search(r"S\[0, 0, \d, \d\] is wrong\n.*\n.*actual 0.0", output), output
    assert re.search(r"replay: pytest '\S+' --impl tests.properties.adapted:memory_alone --replay", output), output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--impl", "tests.properties.adapted"], "must be named as package.module:callable, got"),
        (["--impl", "no_such_module:f"], "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        (["--impl", "titans:no_such_name"], "cannot be imported: AttributeError"),
        (["--impl", "tests.properties.adapted:NOT_CALLABLE"], "must be callable, got int"),
        (["--impl", "titans:chunk_titans_linear", "--impl-lacks", "speed"], "must be among .*, got speed"),
        (["--impl", "titans:chunk_titans_linear", "--impl-claims", "speed"], "claims must be among .*, got speed"),
        (["--impl", "titans:chunk_titans_linear", "--backends", "chunk"], "exclude each other"),
        (["--impl-lacks", "half"], "--impl-lacks needs --impl"),
        (["--impl-claims", "none_bits"], "--impl-claims needs --impl"),
    ],
)
def test_a_mistake_in_the_options_is_one_message(options: list[str], message: str) -> None:
    output = run_suite("properties/test_oracle.py", *options, fails=4)
    assert re.search(f"ERROR: .*{message}", output)
    assert len(output.splitlines()) < 4


@pytest.mark.parametrize("claim", sorted(OPTIONAL))
def test_what_depends_on_a_lacking_claim_is_lacking_too(claim: str) -> None:
    claims = foreign("titans:chunk_titans_linear", "cpu", [claim]).claims
    assert claim not in claims
    assert not ({"resume"} & claims and not {"initial_state", "final_state"} <= claims)
    assert not ({"offset"} & claims and "resume" not in claims)


def test_claims_of_the_same_bits_are_made_by_those_who_say_so() -> None:
    target = "tests.properties.adapted:token_by_token"
    claimed = foreign(target, "cpu").claims & SAME_BITS
    assert claimed == {"prefix_bits", "resume_bits"}
    assert not foreign("titans:titans_linear", "cpu").claims & SAME_BITS
    assert foreign(target, "cpu", claims=["none_bits"]).claims & SAME_BITS == {"none_bits"}
    # Nobody resumes with the same bits who does not resume.
    assert "resume_bits" not in foreign(target, "cpu", ["resume"]).claims


def test_the_grid_is_the_implementations_own() -> None:
    law, problem = PROPERTIES["test_resuming_on_the_grid_gives_the_bits_of_one_call"], Problem(lengths=(5,), D=2, C=4)
    subject = foreign("tests.properties.adapted:token_by_token", "cpu")
    assert (subject.grid(torch.float32, 2, 4), SUBJECT.grid(torch.float32, 2, 4)) == (3, 4)
    assert law.posed(subject, problem)
    assert law.check(subject, problem)
    assert not law.posed(subject, replace(problem, lengths=(3,)))


def test_the_adapter_in_the_readme_passes(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(# my_adapter\.py\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "my_adapter.py").write_text(code)
    test = "properties/test_oracle.py::test_values_are_the_oracles"
    output = run_suite(test, "--impl", "my_adapter:memory", PYTHONPATH=str(tmp_path))
    assert "1 passed" in output


@pytest.mark.parametrize(("name", "value"), [("lacks", 5), ("lacks", "resume"), ("claims", [1]), ("domain", 64)])
def test_an_attribute_that_declares_nothing_is_refused(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(titans.titans_linear, name, value, raising=False)
    with pytest.raises(ValueError, match=f"`{name}` of a callable must be"):
        foreign("titans:titans_linear", "cpu")

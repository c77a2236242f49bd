"""Does each law hold for the definition, and does it catch what is wrong with a wrong one?"""

import functools
import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from oracle.precision import exact
from properties.harness import implementations
from properties.harness.comparing import Comparison, Found, distances, nearest
from properties.harness.facts import Recorder
from properties.harness.implementations import Implementation
from properties.harness.laws import PROPERTIES, Property
from properties.harness.running import LawBroken
from properties.problems.problem import Problem
from properties.problems.strategies import problems
from tests.properties import wrong
from tests.properties.wrong import Definition, implementation

ROOT = Path(__file__).parents[2]
for path in sorted((ROOT / "properties").glob("test_*.py")):
    importlib.import_module(f"properties.{path.stem}")

# Each law with a mistake that it has to notice.
CATCHES: dict[str, type[Definition]] = {
    "test_values_are_the_oracles": wrong.Half,
    "test_gradients_are_the_oracles": wrong.DetachedState,
    "test_the_chunked_form_is_the_recurrence_for_any_length": wrong.LateAnchor,
    "test_the_chunked_form_is_the_recurrence_for_long_chunks": wrong.LateAnchor,
    "test_the_chunked_form_is_the_recurrence_for_chunks_of_hundreds": wrong.LateAnchor,
    "test_the_chunked_form_is_the_recurrence_for_chunks_of_thousands": wrong.LateAnchor,
    "test_the_chunked_form_is_the_recurrence_for_short_chunks": wrong.NoMomentumAcrossChunks,
    "test_the_state_after_a_tail_is_that_of_the_definition": wrong.TailRunsOn,
    "test_gates_at_the_ends_of_their_ranges_are_harmless": wrong.LogOfZero,
    "test_rows_without_variance_are_harmless": wrong.NoEps,
    "test_decays_that_underflow_give_what_is_representable": wrong.FlushesGates,
    "test_huge_later_tokens_harm_nothing_earlier": wrong.WholeProducts,
    "test_huge_later_values_harm_no_earlier_gradient": wrong.WholeGradients,
    "test_any_small_numbers_give_the_oracles_results": wrong.UndividedLayerNorm,
    "test_long_sequences_of_a_plain_memory_are_the_recurrence": wrong.NoMomentumAcrossChunks,
    "test_every_coefficient_has_a_few_roundings": wrong.GatesInHalf,
    "test_every_chunk_is_right_from_the_oracles_own_state": wrong.LateAnchor,
    "test_a_plain_memory_is_right_for_thousands_of_tokens": wrong.NoMomentumAcrossChunks,
    "test_errors_are_at_most_twice_those_of_the_definition": wrong.Sloppy,
    "test_splitting_a_sequence_changes_nothing": wrong.ForgetsOffset,
    "test_splitting_into_single_tokens_changes_nothing": wrong.ForgetsOffset,
    "test_decoding_step_by_step_changes_nothing": wrong.ForgetsOffset,
    "test_packed_sequences_are_separate": wrong.LeaksIntoTheNext,
    "test_permuting_sequences_and_heads_permutes_the_results": wrong.OneHeadsGates,
    "test_a_sequence_alone_gives_what_it_gives_in_a_batch": wrong.OneHeadsGates,
    "test_later_tokens_change_no_earlier_output": wrong.LooksAhead,
    "test_what_is_not_finite_stays_in_its_sequence_and_head": wrong.SpreadsNaN,
    "test_what_is_not_finite_is_not_hidden": wrong.HidesNaN,
    "test_finite_inputs_give_finite_results": wrong.NoEps,
    "test_gates_of_zero_give_finite_gradients": wrong.LogOfZero,
    "test_the_same_input_gives_the_same_bits": wrong.Unsteady,
    "test_any_layout_gives_the_same_bits_and_nothing_is_modified": wrong.WritesItsInput,
    "test_expanded_inputs_give_the_same_bits": wrong.LayoutMatters,
    "test_a_cotangent_of_any_layout_is_understood": wrong.IgnoresStrides,
    "test_an_expanded_cotangent_gives_the_same_bits": wrong.IgnoresStrides,
    "test_gates_may_have_a_last_axis": wrong.AxisMatters,
    "test_asking_for_the_final_state_changes_no_output": wrong.StateChangesOutputs,
    "test_results_do_not_depend_on_uninitialised_memory": wrong.Uninitialised,
    "test_scaling_a_plain_memory_by_a_power_of_two_scales_its_results": wrong.NotLinear,
    "test_a_plain_memory_is_linear": wrong.NotLinear,
    "test_small_integers_give_exactly_the_oracles_values": wrong.NoMomentumAcrossChunks,
    "test_without_learning_the_memory_only_decays": wrong.DecaysMomentumTwice,
    "test_the_state_after_a_tail_without_learning_has_decayed_so_far": wrong.TailRunsOn,
    "test_gates_are_raised_before_anything_else": wrong.GatesStayHalf,
    "test_every_tensor_is_raised_from_its_own_dtype": wrong.RoundsToTheDtypeOfQ,
    "test_without_momentum_the_initial_momentum_is_forgotten": wrong.KeepsSomeMomentum,
    "test_chunks_of_one_token_are_the_papers_recurrence": wrong.Half,
    "test_logs_of_0_and_1_give_what_0_and_1_give": wrong.DerivativeAtLogZero,
    "test_a_gate_of_exactly_zero_has_no_derivative_by_its_log": wrong.DerivativeAtLogZero,
    "test_the_grad_mode_changes_no_value": wrong.GradModeMatters,
    "test_the_tensors_that_require_gradients_change_no_result": wrong.NeedsEveryGradient,
    "test_gradients_need_no_final_state": wrong.HalvesGradientsWithoutState,
    "test_a_cotangent_may_be_expanded_or_missing": wrong.ReadsExpandedCotangents,
    "test_a_cotangent_that_is_no_number_stays_in_its_sequence_and_head": wrong.SpreadsNaNBackward,
    "test_a_second_backward_gives_the_same_bits": wrong.WritesWhatItKept,
    "test_a_call_of_real_size_may_be_made_in_any_way": wrong.NeedsEveryGradient,
    "test_inputs_may_share_memory": wrong.ExpandedStateMatters,
    "test_the_same_numbers_in_other_dtypes_give_the_same_results": wrong.DtypeMatters,
    "test_a_tensor_that_was_changed_in_place_is_read_again": wrong.CachesByAddress,
    "test_results_share_no_memory_with_arguments": wrong.ReturnsItsArgument,
    "test_other_calls_before_and_between_change_nothing": wrong.KeepsGatesOfTheLastCall,
    "test_calls_of_several_threads_at_once_change_nothing": wrong.SharesAmongThreads,
    "test_what_is_set_around_a_call_changes_nothing": wrong.DefaultDtypeMatters,
    "test_the_outputs_of_a_prefix_are_the_prefix_of_the_outputs": wrong.LengthMatters,
    "test_tokens_behind_the_loss_change_no_gradient": wrong.LengthMattersBackward,
    "test_resuming_on_the_grid_gives_the_bits_of_one_call": wrong.RoundsTheMomentum,
    "test_packed_in_a_batch_and_alone_give_the_same_bits": wrong.PlaceInTheBatchMatters,
    "test_packed_in_a_batch_and_alone_give_the_same_bits_of_gradients": wrong.BatchMattersBackward,
    "test_no_initial_state_is_one_of_zeros": wrong.StartsElsewhere,
    "test_decoding_gives_the_bits_of_one_call": wrong.OneTokenMatters,
    "test_a_chunk_of_real_size_is_right": wrong.Half,
    "test_many_sequences_and_heads_give_what_each_of_them_gives": wrong.FewPrograms,
    "test_every_chunk_of_a_long_sequence_is_right_from_the_state_before_it": wrong.NoMomentumAcrossChunks,
    "test_small_integers_of_real_size_give_exact_values": wrong.Half,
    "test_errors_of_real_size_are_at_most_twice_those_of_the_definition": wrong.Sloppy,
    "test_many_chunks_sequences_and_heads_are_as_accurate_as_the_definition": wrong.Sloppy,
}


def examine(law: str, definition: Definition, examples: int, shrink: bool = False) -> None:
    """Put a definition before a law."""
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    quick = settings(
        max_examples=examples, phases=phases, database=None, derandomize=True, deadline=None,
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    found = PROPERTIES[law]

    @functools.wraps(found.law)
    def checked(implementation: Implementation, problem: Problem) -> None:
        found.check(implementation, problem)

    quick(given(problem=found.problems)(checked))(implementation(definition))


def test_every_law_has_a_mistake_to_catch() -> None:
    assert set(CATCHES) == set(PROPERTIES)


@pytest.mark.parametrize("law", CATCHES)
def test_the_definition_obeys(law: str) -> None:
    # Thousands of tokens, one by one, are enough once.
    examine(law, Definition(), examples=4 if PROPERTIES[law].share > 0.1 else 1)


@pytest.mark.parametrize(("law", "mistake"), CATCHES.items(), ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_wrong_definition_breaks(law: str, mistake: type[Definition]) -> None:
    with pytest.raises(LawBroken):
        examine(law, mistake(), examples=100)


def test_examples_that_exercise_nothing_do_not_count() -> None:
    def law(implementation: Implementation, problem: Problem) -> Found:
        # Every fifth problem leaves nothing to compare.
        return [Comparison("seed", 1)] if problem.seed % 5 else []

    recorder = Recorder()
    about = Property(law, problems(), frozenset(), 1, about=lambda implementation, problem: problem.seed % 3 > 0)
    test = about.test(recorder, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck))
    test(implementation(Definition()))
    assert recorder.facts.compared == settings().max_examples < recorder.facts.calls
    # Where a failure is replayed, every problem is put before the law.
    about.replay(Problem(seed=3), replayed := Recorder())(implementation(Definition()))
    assert replayed.facts.compared == 1


def test_a_law_that_returns_nothing_is_an_error() -> None:
    forgetful: Any = Property(lambda implementation, problem: None, problems(), frozenset(), 1)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="a law must return its comparisons"):
        forgetful.check(implementation(Definition()), Problem())


def test_a_failure_says_what_where_and_how_to_see_it_again() -> None:
    with pytest.raises(LawBroken) as caught:
        examine("test_values_are_the_oracles", wrong.Half(), examples=60, shrink=True)
    message, notes = str(caught.value), "\n".join(caught.value.__notes__)
    for part in (
        r"^o\[0, 0, 0, 0\] is wrong",
        *(rf"\n +{x} +\S+" for x in ("exact", "actual", "error", "bound", "ratio")),
    ):
        assert re.search(part, message), message
    for part in (
        r"implementation: Half on cpu; python \S+, torch \S+, numpy \S+",
        r"problem: Problem\(",
        r"theta = \[",
    ):
        assert re.search(part, notes), notes
    # It shrank to a single token, and the problem that is printed fails on its own.
    problem = Problem.from_json(re.search(r"--replay '(.*)'", notes).group(1))
    assert problem.tokens == 1
    with pytest.raises(LawBroken):
        PROPERTIES["test_values_are_the_oracles"].replay(problem)(implementation(wrong.Half()))


@pytest.mark.parametrize(("radius", "right"), [(2**-60, True), (2**-60 - 2**-113, False), (2**-20, True)])
def test_a_radius_is_exceeded_by_any_excess(radius: float, right: bool) -> None:
    exactly = exact(torch.ones(1)) + exact(2.0**-60)
    far, within = distances(torch.ones(1), exactly, nearest(exactly), np.array([radius]))
    assert within.item() is right
    # Where the radius is far larger, the distance is that from the nearest number of float64.
    assert far.item() == (0 if radius > 2**-52 else 2**-60)


# The seed of a nested run. In CI it is always the same; elsewhere none is, unless the environment says which.
SEED = os.environ.get("NESTED_SEED", "0" if os.environ.get("HYPOTHESIS_PROFILE") == "ci" else "")


def run_suite(*arguments: str, fails: int = 0, **environment: str) -> str:
    """Run the suite, on the real op unless a plugin says otherwise."""
    # With a seed Hypothesis asks no database; a run with a profile of its own may need one.
    seeded = [f"--hypothesis-seed={SEED}"] if SEED and "HYPOTHESIS_PROFILE" not in environment else []
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *seeded, *arguments]
    variables = os.environ | {"OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_laws_of_real_sizes_come_first() -> None:
    output = run_suite("properties/", "--collect-only", "--quiet", "--backends", "chunk")
    files = [line.partition("::")[0] for line in output.splitlines() if "::" in line]
    dear = files.count("properties/test_real_sizes.py")
    assert {*files[:dear]} == {"properties/test_real_sizes.py"}
    assert len(files) > dear > 0


def test_the_replay_option_runs_one_problem() -> None:
    problem = Problem(lengths=(5,), D=2, C=2, memory="normalised", eps=1e-5)
    test = "properties/test_oracle.py::test_gradients_are_the_oracles[chunk]"
    output = run_suite(test, "--replay", problem.to_json())
    assert "1 generated examples checked" in output
    assert "1 passed" in output


def test_a_failure_can_be_saved_and_replayed(tmp_path: Path) -> None:
    test = "properties/test_oracle.py::test_any_small_numbers_give_the_oracles_results[chunk]"
    broken = ("-p", "tests.properties.broken", test)
    output = run_suite(*broken, "--save-failures", "--hypothesis-seed=0", fails=True, FIXTURES=str(tmp_path))
    assert re.search(r"any_small_numbers_give_the_oracles_results +FAIL +\d+", output)
    assert re.search(r"replay: pytest 'properties/\S+\[chunk\]' --replay '\{.*\}'", output)
    (saved,) = tmp_path.glob("001-any-small-numbers-give-the-oracles-results.json")
    assert json.loads(saved.read_text())["laws"] == ["test_any_small_numbers_give_the_oracles_results"]
    run_suite(*broken, "--replay", str(saved), fails=True, FIXTURES=str(tmp_path))
    run_suite(test, "--replay", str(saved))


def test_the_header_and_the_summary_survive_xdist() -> None:
    test = "properties/test_oracle.py::test_any_small_numbers_give_the_oracles_results"
    output = run_suite("-n", "2", test, "--backends", "chunk,recurrent")
    assert re.search(r"titans: backends chunk,recurrent on cpu .*profile \w+", output)
    assert re.search(r"any_small_numbers_give_the_oracles_results +pass +\d+ +0\.\d+ \w+\n", output)
    assert re.search(
        r"\d+ generated examples checked against the oracle; 0 replays\n\d+ of the examples are ill-c", output
    )


def verdicts(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Read what `--verdicts` wrote, by law and implementation."""
    return {(x["law"], x["implementation"]): x for x in json.loads(path.read_text())["verdicts"]}


def test_the_verdicts_are_written_as_json_and_xml(tmp_path: Path) -> None:
    path, xml = tmp_path / "verdicts.json", tmp_path / "junit.xml"
    tests = ("properties/test_oracle.py", "properties/test_plain_memory.py", "-k", "small")
    written = ("--verdicts", str(path), "--junitxml", str(xml))
    run_suite("-n", "2", *tests, "--backends", "chunk,log", *written)
    found = verdicts(path)
    numbers, integers = (
        "test_any_small_numbers_give_the_oracles_results",
        "test_small_integers_give_exactly_the_oracles_values",
    )
    assert found[numbers, "chunk"]["verdict"] == "pass"
    assert found[numbers, "chunk"]["examples"] >= 50
    assert found[numbers, "chunk"]["ratio"] > 0
    Problem.from_json(found[numbers, "chunk"]["problem"])
    # What is not claimed is never passed.
    assert found[integers, "log"]["verdict"] == "not claimed"
    assert found[integers, "log"]["lacking"] == ["exact"]
    cases = {x.get("name"): x for x in ElementTree.parse(xml).iter("testcase")}
    facts = {x.get("name"): x.get("value") for x in cases[f"{integers}[log]"].iter("property")}
    assert facts["titans.lacking"] == "['exact']"


def test_the_verdict_on_a_failure_has_all_there_is_to_say(tmp_path: Path) -> None:
    path, law = tmp_path / "verdicts.json", "test_any_small_numbers_give_the_oracles_results"
    test = f"properties/test_oracle.py::{law}[chunk]"
    broken = ("-p", "tests.properties.broken", test, "--verdicts", str(path), "--hypothesis-seed=0")
    run_suite(*broken, fails=True, FIXTURES=str(tmp_path))
    (failed,) = verdicts(path).values()
    assert (failed["law"], failed["verdict"]) == (law, "fail")
    assert failed["failing_call"] > 0
    assert Problem.from_json(failed["failing_problem"]).tokens == 1
    assert isinstance(failed["error"], float)  # not "inf"
    assert failed["message"].startswith("LawBroken: ")
    assert failed["failing_problem"] in failed["replay"]


def test_decoding_is_judged_where_the_bits_are_claimed_alone() -> None:
    subject = implementations.implementation("recurrent", "cpu")
    law, problem = PROPERTIES["test_decoding_gives_the_bits_of_one_call"], Problem(lengths=(3,), D=2, C=4)
    asked: list[tuple[object, int, int]] = []

    def nowhere(dtype: torch.dtype, D: int, C: int) -> bool:
        asked.append((dtype, D, C))
        return False

    assert law.check(subject, problem)
    assert not law.check(replace(subject, decodes_alike=nowhere), problem)
    assert asked == [(torch.float32, 2, 4)]

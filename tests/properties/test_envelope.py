"""The envelope counts every call of an implementation, by its sizes and by the way of calling."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from properties.harness import envelope
from properties.harness.containment import at_once
from properties.harness.facts import Recorder, Verdict
from properties.harness.implementations import implementation
from properties.harness.laws import PROPERTIES
from properties.harness.merging import Run, merge
from properties.harness.running import run
from properties.problems.problem import Problem
from properties.test_conventions import surroundings
from tests.properties.test_laws import run_suite

PACKED = Problem(lengths=(9, 0, 2), packed=True, H=2, D=3, C=4, initial="full", offsets=(3, 0, 1), dtype="bfloat16")
SIZES = {"D 4", "C 4", "T 16", "N 4", "H 2", "N x H 8", "pieces 4"}


def counted(problem: Problem, gradients: bool = True, around: Any = None) -> Counter[str]:
    counts = Counter[str]()
    subject = envelope.counted(implementation("chunk", "cpu"), counts)
    inputs, cotangents = problem.inputs(), problem.cotangents() if gradients else None
    with around or nullcontext():
        run(subject, inputs, cotangents)
    return counts


def test_a_call_is_counted_under_its_sizes_and_ways() -> None:
    found = counted(PACKED)
    assert set(found.values()) == {1}
    ways = {"packed", "resumed", "inside a chunk", "bfloat16", "gates of another dtype", "gradients of all"}
    assert set(found) == SIZES | {f"way {way}" for way in ways}
    plain = counted(Problem(lengths=(5,), D=1, C=2), gradients=False)
    assert set(plain) == {"D 1", "C 2", "T 8", "N 1", "H 1", "N x H 1", "pieces 4", "way float32"}


def test_what_is_set_around_a_call_is_counted() -> None:
    modes = {"no_grad": torch.no_grad(), "inference mode": torch.inference_mode()}
    for way, around in (modes | {f"another {way}": around for way, around in surroundings("cpu")}).items():
        way = way.removeprefix("another ") if way in ("another deterministic", "another anomaly mode") else way
        assert counted(PACKED, gradients=False, around=around)[f"way {way}"] == 1


def test_calls_of_several_threads_are_all_counted() -> None:
    counts = Counter[str]()
    subject = envelope.counted(implementation("chunk", "cpu"), counts)
    at_once([lambda: [run(subject, Problem().inputs()) for _ in range(20)]] * 3)
    assert counts["D 1"] == counts["way another thread"] == 60


def test_a_law_counts_all_the_calls_that_it_makes() -> None:
    recorder = Recorder()
    law = PROPERTIES["test_decoding_step_by_step_changes_nothing"]
    law.check(implementation("chunk", "cpu"), Problem(lengths=(3,), C=2, initial="full", offsets=(0,)), recorder)
    assert recorder.facts.calls == 1
    # Of three tokens each, and all of them steps.
    assert recorder.facts.envelope["D 1"] == recorder.facts.envelope["way step"] >= 3


def test_a_step_from_no_state_is_counted_without_one() -> None:
    counts = Counter[str]()
    step = envelope.counted(implementation("chunk", "cpu"), counts).step
    row, gate = torch.zeros(1, 1, 2), torch.zeros(1, 1)
    assert step is not None
    step(row, row, row, None, None, gate, gate, gate, None, 1e-6, 4)
    assert counts["way step"] == 1
    assert counts["way resumed"] == 0


def test_the_table_adds_up_the_laws_of_an_implementation() -> None:
    counts = {"D 1": 2, "N x H 64": 3, "way step": 1}
    a, b = (Verdict("", f"test_{x}", "mine", "pass", calls=7, sections=("5.20",), envelope=counts) for x in "ab")
    rows = [a, b]
    lines = envelope.tables([*rows, Verdict("", "test_a", "yours", "pass", envelope={"D 8": 5})])
    assert lines[0] == "envelope of mine: 4 calls"
    assert "    N x H     33-64: 6" in lines
    assert "    step" + " " * 24 + " " * 9 + "2" in lines
    assert any(line.split() == ["a", "7", "problems"] for line in lines)
    assert "envelope of yours: 5 calls" in lines


def test_the_table_is_printed_on_request_and_survives_xdist_and_merging(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    test = "properties/test_oracle.py::test_any_small_numbers_give_the_oracles_results"
    run_ = ("-n", "2", test, "--backends", "chunk,log", "--hypothesis-profile=smoke", "--verdicts", str(path))
    output = run_suite(*run_, "--envelope")
    rows = merge([Run.read(path)])
    for row in rows:
        calls = sum(count for key, count in row.envelope.items() if key.startswith("D "))
        assert calls >= row.examples > 0
        assert f"envelope of {row.implementation}: {calls} calls" in output
    assert "envelope of" not in run_suite(*run_)

"""Are the verdicts on accuracy what they say?"""

import json
from pathlib import Path

import pytest

from properties import report
from properties.checks import TALLY, LawBroken
from properties.implementations import implementation
from properties.problem import Problem
from properties.report import Verdict
from properties.test_ratchet import WORSE
from properties.test_ratchet import test_ratchet as replay_the_ratchet

LAW = "test_values_are_the_oracles"
PROBLEM = Problem(lengths=(7,), D=3, C=4, memory="normalised", initial="M", seed=1)


def seen(error: float) -> list[Verdict]:
    """What a run saw whose worst error is this one."""
    return [Verdict("", LAW, "chunk", "pass", worst={f"{LAW} float32": (error, PROBLEM.to_json())})]


def test_the_ratchet_fails_where_errors_are_four_times_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RATCHET", tmp_path / "ratchet.json")
    TALLY.__init__()
    report.update_ratchet(seen(1e-9))
    with pytest.raises(LawBroken, match="the error was 1e-09 ulp and is"):
        replay_the_ratchet(implementation("chunk", "cpu"))
    error = TALLY.last.error
    assert error > 0
    for stored in (error / WORSE, error * 2):
        report.update_ratchet(seen(stored))
        replay_the_ratchet(implementation("chunk", "cpu"))


def test_an_update_keeps_what_the_run_did_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RATCHET", tmp_path / "ratchet.json")
    report.update_ratchet(seen(3.0))
    report.update_ratchet([Verdict("", LAW, "log", "pass", device="cuda", worst={f"{LAW} float64": (2.0, "{}")})])
    stored = report.read_ratchet()
    assert stored["chunk"][f"{LAW} float32"][0] == 3.0
    assert stored["log on cuda"][f"{LAW} float64"] == (2.0, "{}")
    # Of two cases of one law the worse one is stored.
    report.update_ratchet([*seen(1.5), *seen(2.5)])
    assert report.read_ratchet()["chunk"][f"{LAW} float32"][0] == 2.5


def test_the_stored_cases_are_problems() -> None:
    for cases in report.read_ratchet().values():
        for error, problem in cases.values():
            assert error > 0
            Problem.from_json(problem)


@pytest.mark.parametrize(("unsure", "too_many"), [(200, False), (201, True)])
def test_a_run_says_too_little_where_a_tenth_is_ill_conditioned(unsure: int, too_many: bool) -> None:
    rows = [Verdict("", LAW, "chunk", "pass", examples=1000, ill_conditioned=n) for n in (unsure, 0)]
    assert bool(report.too_many_ill_conditioned(rows)) == too_many


def test_what_is_not_finite_is_text_in_the_json(tmp_path: Path) -> None:
    report.write_json(tmp_path / "x.json", [Verdict("", LAW, "chunk", "fail", ratio=float("inf"))], {})
    assert json.loads((tmp_path / "x.json").read_text())["verdicts"][0]["ratio"] == "inf"


def test_a_law_that_is_not_claimed_is_not_passed() -> None:
    rows = [Verdict("", LAW, "mine", "not claimed", sections=("4.1",), lacking=("plain",))]
    (_, line) = report.table(rows)
    assert "not claimed  mine lacks plain" in line
    assert report.finite(rows)[0].startswith("4.1 finite: not checked")

"""Every law and implementation that was collected has a verdict, whatever became of the process that checked it."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from properties.harness import corpus, report
from properties.harness.containment import interrupted
from properties.harness.facts import Verdict
from properties.harness.implementations import BACKENDS, implementation
from properties.harness.ledger import Ledger, verdict
from properties.harness.merging import Run
from tests.properties.test_laws import ROOT, run_suite

TEST = "properties/test_oracle.py::test_values_are_the_oracles[chunk]"
ABOUT = {"law": "test_values_are_the_oracles", "implementation": "chunk", "device": "cpu", "sections": ["4.1"]}
LAWS = ("properties/test_plain_memory.py", "--hypothesis-profile=smoke")


def made(outcome: Any, when: Any = "call", about: Mapping[str, Any] = ABOUT) -> pytest.TestReport:
    """A report of pytest's."""
    properties = report.properties(dict(about))
    return pytest.TestReport(TEST, ("x", None, "x"), {}, outcome, None, when, user_properties=properties)


def ledger_of(*reports: pytest.TestReport) -> Ledger:
    """What is left of some reports of one test."""
    ledger = Ledger([implementation("chunk", "cpu")])
    ledger.expect([(TEST, ABOUT)])
    for one in reports:
        ledger.pytest_runtest_logreport(one)
    return ledger


@pytest.mark.parametrize(
    ("reports", "wanted"),
    [
        ([made("passed", "setup"), made("passed"), made("passed", "teardown")], "pass"),
        ([made("skipped", "setup")], "not claimed"),
        ([made("failed", "setup")], "error"),
        ([made("passed"), made("failed", "teardown")], "error"),
        ([made("failed", "???", {})], "error"),
        # A test that fails and passes when it is run again has failed; so has one with an unknown outcome.
        ([made("rerun"), made("passed")], "fail"),
        ([made("rerun", "setup"), made("passed")], "error"),
        ([made("passed"), made("failed")], "fail"),
        ([made("postponed")], "fail"),
        # So has one whose law was broken, whatever pytest was made to report.
        ([made("passed", about=ABOUT | {"failing_call": 1})], "fail"),
        ([made("skipped", about=ABOUT | {"failing_call": 2})], "fail"),
        ([made("passed", about=ABOUT | {"message": "ValueError: it is wrong"})], "fail"),
    ],
)
def test_the_worst_report_of_a_test_is_its_verdict(reports: list[pytest.TestReport], wanted: str) -> None:
    ledger = ledger_of(*reports)
    assert [(row.law, row.implementation, row.verdict) for row in ledger.verdicts] == [
        ("test_values_are_the_oracles", "chunk", wanted)
    ]
    assert bool(ledger.exit_status) == (wanted in ("fail", "error"))


def test_an_expected_failure_is_a_failure() -> None:
    expected = made("skipped")
    expected.wasxfail = "reason: it is wrong"  # type: ignore[attr-defined]
    assert verdict(expected) == "fail"


def test_a_law_that_cannot_be_collected_has_no_verdict() -> None:
    ledger = ledger_of(made("passed"))
    ledger.pytest_collectreport(pytest.CollectReport("properties/test_x.py", "failed", "SyntaxError", []))
    assert [(row.law, row.verdict) for row in ledger.verdicts][1] == ("properties/test_x.py", "error")


@pytest.mark.parametrize("name", ["chunk", "log"])
def test_the_node_id_says_which_implementation_a_test_is_about(name: str) -> None:
    ledger = Ledger([implementation("chunk", "cpu"), implementation("log", "cpu")])
    ledger.pytest_xdist_node_collection_finished([f"a.py::test_fixture[{name}-007-in-a-chunk]", "a.py::test_b"])
    (about,) = ledger.collected.values()
    assert (about["law"], about["implementation"]) == ("test_fixture", name)


def test_no_section_passes_where_a_law_has_no_result() -> None:
    sections = ("4.1", "4.3", "4.4", "4.5")
    passed = Verdict(TEST, "test_values_are_the_oracles", "chunk", "pass", sections=sections, examples=1)
    died = Verdict("y", "test_gradients_are_the_oracles", "chunk", "error")

    def outcomes(*rows: Verdict) -> list[str]:
        return re.findall(r"4\.\d [^:]+: ([a-z ]+)(?:;|$)", "\n".join(report.summary(rows)), re.MULTILINE)

    assert outcomes(passed) == ["pass"] * 5
    assert outcomes(passed, died) == ["not complete"] * 5


def test_a_worker_that_is_killed_leaves_a_verdict_on_every_law(tmp_path: Path) -> None:
    path, xml = tmp_path / "verdicts.json", tmp_path / "junit.xml"
    written = ("--verdicts", str(path), "--junitxml", str(xml))
    target = ("--impl", "tests.properties.misbehaving:dies")
    output = run_suite(*LAWS, "-n", "1", "--max-worker-restart=0", *target, *written, fails=1)
    rows = json.loads(path.read_text())["verdicts"]
    assert [row["verdict"] for row in rows] == ["error"] * 3
    assert sum("crashed while running" in row["message"] for row in rows) == 1
    assert sum("the run ended before" in row["message"] for row in rows) == 2
    assert re.search(r"4\.2 bound: not complete", output), output
    assert re.search(r"a_plain_memory_is_linear +ERROR", output)
    cases = list(ElementTree.parse(xml).iter("testcase"))
    assert {case.find(".//property[@name='titans.law']").get("value") for case in cases} == {row["law"] for row in rows}
    assert all(case.find("error") is not None for case in cases)


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_a_run_that_is_ended_shows_what_it_has_judged(workers: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    words = ("properties/test_sequences.py", "--backends", "chunk", *workers, "--progress", "--verdicts", str(path))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    assert "laws" in process.stderr.readline()
    process.terminate()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == pytest.ExitCode.INTERRUPTED, output
    (unjudged,) = re.findall(r"not complete: (\d+) of \d+ tests were not run", output)
    verdicts = [row["verdict"] for row in json.loads(path.read_text())["verdicts"]]
    assert verdicts.count("error") >= int(unjudged) > 0
    assert "pass" in verdicts


def test_a_run_that_is_killed_leaves_the_verdicts_so_far(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    run_suite(*LAWS, "--backends", "chunk", "-p", "tests.properties.ended", "--verdicts", str(path), fails=-9)
    content = json.loads(path.read_text())
    assert content["about"][-1] == "the run has not ended"
    assert [row["verdict"] for row in content["verdicts"]] == ["pass"]
    with pytest.raises(ValueError, match="the run has not ended"):
        Run.read(path)


def test_what_fails_after_an_interrupt_has_no_result() -> None:
    interrupted.set()
    try:
        ledger = ledger_of(made("failed"))
    finally:
        interrupted.clear()
    assert not ledger.rows
    assert ledger_of(made("failed")).verdicts[0].verdict == "fail"


WRONG = ("--impl", "tests.properties.mistaken:without_factor", "--hypothesis-profile=smoke")


@pytest.mark.parametrize(
    ("words", "said", "status"),
    [
        (("-k", "scaling"), r"not complete: \d+ of \d+ tests were not selected", 0),
        (("-k", "scaling", "-n", "1"), r"not complete: \d+ of \d+ tests were not selected", 0),
        (("-k", "none"), "not complete: no law was checked", 5),
        (("--collect-only", "-q"), "not complete: no law was checked", 0),
    ],
)
def test_a_run_that_leaves_out_laws_is_not_complete(words: tuple[str, ...], said: str, status: int) -> None:
    # The laws that see the mistake are left out.
    output = run_suite("properties/test_plain_memory.py", *WRONG, *words, fails=status)
    assert len(re.findall(said, output)) == 1, output


def test_the_header_says_what_a_run_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    run_suite("properties/test_plain_memory.py", *WRONG, "-k", "scaling", "--verdicts", str(path))
    assert re.fullmatch(r"not complete: \d+ of \d+ tests were not selected", json.loads(path.read_text())["about"][-1])


def test_a_run_of_all_laws_leaves_out_none() -> None:
    """Both kinds of run: the whole suite has several tests of the worst cases."""
    words = ("properties/", "--collect-only", "-q", "--backends", ",".join(BACKENDS))
    ledger = Ledger([implementation(name, "cpu") for name in BACKENDS])
    ledger.pytest_xdist_node_collection_finished(re.findall(r"^properties/\S+", run_suite(*words), re.MULTILINE))
    assert ledger.left_out == []
    rows = (*corpus.rows().values(), *corpus.fixtures(), corpus.RATCHET)
    assert corpus.left_out([(row.law, "chunk") for row in rows], ["chunk"]) == []
    (line,) = corpus.left_out([(row.law, "chunk") for row in rows[2:]], ["chunk"])
    assert line == f"not complete: 2 of {len(rows)} tests were not selected"

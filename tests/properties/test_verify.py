"""Does `verify` say of an implementation what the suite says, in a form that programs can read?"""

import errno
import functools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import titans
from properties import Report, verify
from properties.__main__ import main
from properties.harness import command_line, corpus, files, headers, report, verify_command, verifying
from properties.harness.columns import columns
from properties.harness.facts import Facts, Verdict
from properties.harness.implementations import BACKENDS
from properties.harness.laws import PROPERTIES
from properties.harness.merging import Run
from properties.harness.specification import sentences
from properties.harness.subjects import Subject, name_of
from properties.harness.verifying import seconds
from properties.problems.problem import Problem
from tests.properties import mistaken

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "properties" / "verdicts.schema.json").read_text())
VALID = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker())
LAW, PROBLEM = "test_values_are_the_oracles", Problem(lengths=(3,), C=2)
PASSED = Verdict(f"x.py::{LAW}[m:f]", LAW, "m:f", "pass", compared=50, said={"o": (1, 2, 3, 4, 5)}, sizes={"1 2": 1})
BROKEN = replace(
    PASSED, verdict="fail", ratio=math.inf, error=math.nan, tightness={"o": math.inf}, worst={"x": (math.inf, "{}")},
    failing_call=7, failing_problem=PROBLEM.to_json(), message="LawBroken: o is wrong", replay="pytest x",
)  # fmt: skip
HEADER = headers.header("python -m properties verify m:f", 0, ["titans: m:f"], profile="dev", seed="0")


def written(path: Path, *rows: Verdict, header: dict[str, Any] = HEADER) -> dict[str, Any]:
    """What a program reads of some verdicts."""
    Report(rows, header).to_json(path)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_the_format_is_the_published_one(tmp_path: Path) -> None:
    for header in (HEADER, command_line.unended()):
        VALID.validate(written(tmp_path / "x.json", PASSED, BROKEN, header=header))
    # All that is written is described, and nothing else is.
    described = SCHEMA["$defs"]["verdict"]
    assert set(described["properties"]) == {field.name for field in fields(Verdict)}
    # A field that came later is missing from older files.
    assert set(described["properties"]) - set(described["required"]) <= {"envelope"}
    assert set(SCHEMA["properties"]) == set(SCHEMA["required"]) == {"schema", "verdicts", *HEADER}
    assert SCHEMA["properties"]["schema"]["const"] == report.SCHEMA


@pytest.mark.parametrize(
    ("name", "value"), [("verdict", "green"), ("ratio", "large"), ("problem", "a token"), ("calls", -1), ("said", [])]
)
def test_another_format_is_refused(name: str, value: object, tmp_path: Path) -> None:
    document = written(tmp_path / "x.json", PASSED)
    document["verdicts"][0][name] = value
    with pytest.raises(jsonschema.ValidationError):
        VALID.validate(document)


def test_verdicts_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = (PASSED, replace(BROKEN, error=math.inf))
    written(tmp_path / "x.json", *rows)
    run = Run.read(tmp_path / "x.json")
    assert (run.verdicts, run.header) == (rows, HEADER)


@pytest.mark.parametrize(
    ("verdicts", "ok"),
    [
        (["pass", "not claimed"], True),
        (["pass (quick)"], True),
        (["pass", "fail"], False),
        # Something claimed has no result; nothing is claimed.
        (["pass", "error"], False),
        (["not claimed"], False),
        ([], False),
    ],
)
def test_all_is_well_if_every_claimed_law_passed(verdicts: list[str], ok: bool) -> None:
    found = Report(tuple(replace(PASSED, verdict=x) for x in verdicts), HEADER)
    assert found.ok == ok
    assert ("FAIL: no law was checked" in str(found)) == (
        "pass" not in verdicts[:1] and set(verdicts) <= {"not claimed"}
    )


def test_a_failure_has_its_problem_and_how_to_see_it_again() -> None:
    (failure,) = Report((PASSED, BROKEN), HEADER).failures
    assert (failure.law, failure.implementation, failure.problem) == (LAW, "m:f", PROBLEM)
    assert (failure.message, failure.replay) == ("LawBroken: o is wrong", "pytest x")
    (failure,) = Report((replace(PASSED, verdict="error"),), HEADER).failures
    assert failure.problem is None


class Reader(HTMLParser):
    """Reads a page: its text, its tags, and whether they close as they open."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.text, self.links = list[str](), set[str](), "", list[str]()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_all_in_one_file(tmp_path: Path) -> None:
    rows = (
        replace(PASSED, sections=("5.1",)),
        replace(BROKEN, law="test_c", sections=("4.1",)),
        replace(PASSED, law="test_b", verdict="error", message="the time <was> up"),
    )
    Report(rows, HEADER).to_html(tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    for said in (
        "m:f: fails", "values are the oracles", "SPEC 5.1: Chunked = token by token", "SPEC 4.1: Non-finite contract.",
        PROBLEM.to_json(), "pytest x", "LawBroken: o is wrong", "no result for 1: the time <was> up", HEADER["command"],
    ):  # fmt: skip
        assert said in reader.text, said
    # Nothing is loaded, and nothing runs.
    assert not reader.links
    assert not reader.tags & {"script", "link", "img", "iframe"}
    assert not re.search(r"url\(|@import|https?:", text)


def test_every_section_of_a_law_has_its_sentence() -> None:
    corpus.import_laws()
    assert {x for law in PROPERTIES.values() for x in law.sections} <= set(sentences())
    assert all(law.sections for law in PROPERTIES.values())
    assert sentences()["3"] == "Public API."
    assert sentences()["5.3"] == "Packed (cu_seqlens) = separate, with empty and one-token sequences among them."


def test_several_implementations_have_a_column_each() -> None:
    rows = [
        PASSED,
        replace(PASSED, law="test_b", verdict="pass (quick)"),
        replace(BROKEN, implementation="n:g"),
        replace(PASSED, law="test_b", implementation="n:g", verdict="not claimed"),
        replace(PASSED, law="test_c", implementation="n:g", verdict="error"),
    ]
    lines = columns(rows)
    assert lines[:2] == ["  [1] m:f", "  [2] n:g"]
    assert [line.split() for line in lines[3:]] == [
        ["values_are_the_oracles", "pass", "50", "FAIL", "at", "7"],
        ["b", "pass", "50", "not", "claimed"],
        ["c", "-", "no", "result"],
    ]


def test_no_line_is_wider_than_a_hundred_columns() -> None:
    law = "test_every_chunk_of_a_long_sequence_is_right_from_the_state_before_it"
    rows = [replace(x, law=law, implementation=name, result="dtheta") for x in (PASSED, BROKEN) for name in BACKENDS]
    tight = {f"normalised end to end {x}": 1e-9 for x in ("o", "M")} | {"plain piece dtheta": 1e-3}
    rows = [replace(row, tightness=tight, sections=("4.1", "4.2", "4.3", "4.4", "4.5"), examples=9) for row in rows]
    for text in (report.table(rows), columns(rows), report.summary(rows), report.table(rows[:1])):
        assert max(len(line) for part in text for line in part.splitlines()) <= 100, "\n".join(text)
    assert "no failure" in "\n".join(report.summary(rows))


def test_files_of_several_machines_stand_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rows in (("cpu", (PASSED,)), ("gpu", (BROKEN, replace(PASSED, law="test_b", implementation="n:g")))):
        Report(rows, HEADER).to_json(tmp_path / f"{name}.json")
    files = [str(tmp_path / f"{name}.json") for name in ("cpu", "gpu")]
    monkeypatch.setattr(sys, "argv", ["python -m properties", "compare", *files, "--html", str(tmp_path / "x.html")])
    assert main() == 1
    output = capsys.readouterr().out
    assert re.search(r"\[1\] m:f \(cpu\)\n  \[2\] m:f \(gpu\)\n  \[3\] n:g\n", output)
    assert re.search(r"values_are_the_oracles +pass 50 +FAIL at 7 +-\n", output)
    assert "m:f (gpu)" in (tmp_path / "x.html").read_text()
    monkeypatch.setattr(sys, "argv", ["python -m properties", "compare", str(tmp_path / "x.html")])
    assert main() == 2
    assert "x.html is not a file of --verdicts" in capsys.readouterr().err


def local() -> None:
    """Stand for a kernel."""


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (titans.chunk_titans_linear, "titans.api:chunk_titans_linear"),
        ("m:f", "m:f"),
        (local, f"{__name__}:local"),
        (Problem.from_json, "properties.problems.problem:Problem.from_json"),
    ],
)
def test_a_callable_is_known_by_its_name(thing: Any, name: str) -> None:
    assert name_of(thing) == name


def test_a_callable_that_no_other_process_can_import_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def inner() -> None:
        """Stand for a kernel."""

    with pytest.raises(ValueError, match=r"`.*<locals>.inner` has no name in its module.*put it into a module"):
        verify(inner)
    with pytest.raises(ValueError, match="has no name in its module"):
        verify(lambda: None)
    with pytest.raises(ValueError, match=r"an object without a name of its own cannot be imported.*put it into a mod"):
        verify(mistaken.right)
    monkeypatch.setattr(local, "__module__", "__main__")
    with pytest.raises(ValueError, match=r"`local` is defined in the script that runs.*put it into a module"):
        verify(local)
    monkeypatch.undo()
    monkeypatch.setattr(sys.modules[__name__], "local", inner)
    monkeypatch.setattr(inner, "__qualname__", "local")
    original = test_a_callable_is_known_by_its_name.pytestmark[0].args[1][2][0]
    with pytest.raises(ValueError, match="is not this object any more"):
        verify(original)


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("hopper", {}, "must be package.module:callable, or one of recurrent, chunk, log, triton, got 'hopper'"),
        ("chunk", {"domain": "D=64"}, "are a callable's, got the backend chunk"),
    ],
)
def test_a_subject_is_a_callable_or_a_backend(target: str, options: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Subject(target, **options)


def test_the_options_of_a_subject_are_those_of_pytest() -> None:
    assert Subject("m:f", "cuda", "plain", "", "D=64", "inputs").options == (
        ("--impl", "m:f"), ("--impl-lacks", "plain"), ("--impl-claims", ""), ("--impl-domain", "D=64"),
        ("--impl-operands", "inputs"), ("--device", "cuda"),
    )  # fmt: skip
    assert Subject("log").options == (("--backends", "log"),)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command `verify`."""
    words = [sys.executable, "-m", "properties", "verify", *arguments]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


SMALL = ("--select", "any_small", "--profile", "smoke", "-n", "1")


def test_the_command_judges_a_wrong_kernel_beside_a_right_one(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    done = command("chunk", "tests.properties.mistaken:without_factor", *SMALL, "--json", str(path))
    assert done.returncode == 1, done.stdout + done.stderr
    document = json.loads(path.read_text())
    VALID.validate(document)
    assert [row["verdict"] for row in document["verdicts"]] == ["pass", "fail"]
    assert document["command"].startswith("python -m properties verify chunk tests.")
    assert re.search(r"any_small_numbers_give_the_oracles_results +pass \d+ +FAIL at \d+\n", done.stdout)
    assert document["verdicts"][1]["replay"] in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere:f", *SMALL), "'nowhere:f' cannot be imported: ModuleNotFoundError"),
        (("hopper",), "an implementation must be package.module:callable"),
        (("hopper", "--quick"), "an implementation must be package.module:callable"),
        (("chunk", "--budget", "soon"), "a budget must be a time such as 60s or 2m, got 'soon'"),
        (("chunk", "--profile", "quickly", "-n", "1"), "--hypothesis-profile must be dev, smoke, ci or deep"),
        (("chunk", "--json", "/dev"), "results must go into files that can be written"),
        (("chunk", "--html", "/dev"), "results must go into files that can be written"),
        (("chunk", "--colour"), "unrecognized arguments: --colour"),
        (("chunk", "--quick", "--budget", "2m"), "not allowed with argument --quick"),
        ((), "the following arguments are required: MODULE:CALLABLE"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(
    words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m properties", "verify", *words])
    try:
        status: object = main()
    except SystemExit as ended:
        status = ended.code
    output, errors = capsys.readouterr()
    assert (status, output) == (2, "")
    assert re.fullmatch(r"python -m properties( verify)?: .*\n", errors)
    assert said in errors


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_results_that_cannot_be_stored_are_shown(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(verify_command, "thoroughly", lambda options: Report((PASSED,), HEADER))
    monkeypatch.setattr(files, "write", full)
    monkeypatch.setattr(sys, "argv", ["properties", "verify", "chunk", option, str(tmp_path / "x")])
    assert main() == 3
    printed = capsys.readouterr()
    assert "titans: m:f" in printed.out
    assert "the results could not be stored: [Errno 28] No space left on device" in printed.err


def test_options_of_a_run_of_pytest_around_it_are_no_options_of_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k nothing")
    assert "PYTEST_ADDOPTS" not in verifying.surroundings()


def test_an_interrupt_before_the_first_verdict_is_no_mistake_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "ended", lambda command, progress: ("Traceback", True))
    with pytest.raises(KeyboardInterrupt):
        verify("chunk", budget=60)


def test_the_function_returns_the_report() -> None:
    found = verify("chunk", select="any_small", profile="smoke", workers=1)
    assert found.ok
    assert found.header["profile"] == "smoke"
    (row,) = found.verdicts
    assert row.examples >= 4
    assert {field.name for field in fields(Facts)} < set(vars(row))


@pytest.mark.parametrize(("text", "wanted"), [("60s", 60), ("2m", 120), (7, 7), ("1.5 min", 90), (2.5, 2.5)])
def test_a_budget_is_a_time(text: str | float, wanted: float) -> None:
    assert seconds(text) == wanted


@pytest.mark.parametrize("text", ["soon", "-1s", "", "nan", "inf", "1h"])
def test_another_budget_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"a budget must be a time such as 60s or 2m, got '{text}'"):
        seconds(text)


def test_laws_without_a_result_for_one_reason_are_told_once() -> None:
    rows = [replace(PASSED, law=f"test_{x}", verdict="error", message="the time was up") for x in "ab"]
    assert report.failures(rows) == ["  2 tests have no result", "    the time was up"]
    assert "[m:f] has no result" in report.failures(rows[:1])[0]


def test_the_loop_of_the_readme_ends_when_all_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```py\n(from properties import verify.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 11
    monkeypatch.chdir(tmp_path)
    asked, written = [], []
    reports = [Report((BROKEN,), HEADER), Report((PASSED,), HEADER), Report((PASSED,), HEADER)]

    def answer(target: str, budget: str | None = None, first_failure: bool = False) -> Report:
        asked.append((target, budget))
        return reports[len(asked) - 1]

    monkeypatch.setattr("properties.verify", answer)
    exec(compile(code, "README.md", "exec"), {"write_kernel": lambda *given: written.append(given)})
    assert asked == [("my_kernel:memory", "60s")] * 2 + [("my_kernel:memory", None)]
    assert written == [("my_kernel.py", LAW, PROBLEM, BROKEN.message)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "verdicts.json"]


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    (tmp_path / "hypothesis.py").write_text("raise ModuleNotFoundError('no', name='hypothesis')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = functools.partial(subprocess.run, cwd=ROOT, env=environment, capture_output=True, text=True)
    done = run([sys.executable, "-m", "properties", "verify", "chunk", "--quick"])
    assert (done.returncode, done.stdout) == (2, "")
    advice = "the suite needs hypothesis, which is not installed here; run\n"
    assert done.stderr.startswith(f"python -m properties: {advice}    {sys.executable} -m pip install mpmath==")
    assert done.stderr.endswith("\nor use .venv/bin/python, which `make .venv/.ready` makes\n")
    # A program sees an error.
    done = run([sys.executable, "-c", "from properties import verify"])
    assert done.returncode == 1
    assert f"ModuleNotFoundError: {advice}" in done.stderr

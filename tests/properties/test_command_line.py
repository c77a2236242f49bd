"""Mistakes on the command line are found before anything runs; a disk that is full or read-only changes no verdict."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from properties.harness import command_line, files, plugin, report
from properties.harness.facts import Recorder
from properties.problems.problem import Problem
from tests.properties.test_laws import ROOT, run_suite

LAW = "properties/test_plain_memory.py::test_a_plain_memory_is_linear[chunk]"


class Options:
    """A configuration of pytest's with nothing but options."""

    def __init__(self, **given: Any) -> None:
        self.given = {"example_timeout": 600} | given

    def getoption(self, name: str, default: Any = None) -> Any:
        return self.given.get(name.removeprefix("--").replace("-", "_"), default)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hypothesis_seed": "first"}, "--hypothesis-seed must be an integer, got 'first'"),
        ({"hypothesis_profile": "quick"}, "--hypothesis-profile must be dev, smoke, ci or deep, got 'quick'"),
        ({"example_timeout": -1.0}, "--example-timeout must be a number of seconds, got -1"),
        ({"example_timeout": float("nan")}, "--example-timeout must be a number of seconds, got nan"),
        ({"impl_lacks": ""}, "--impl-lacks must name claims"),
        ({"impl_lacks": " ,"}, "--impl-lacks must name claims"),
    ],
)
def test_options_that_no_run_can_follow_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        command_line.check(Options(**given))  # type: ignore[arg-type]


def test_a_run_on_gpus_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda needs a GPU that PyTorch can use"):
        command_line.check(Options(device="cuda"))  # type: ignore[arg-type]
    # A driver says that there is one, and there is none that works.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *size, device: fail(RuntimeError("CUDA error: no kernel image")))
    with pytest.raises(ValueError, match="no kernel image"):
        command_line.check(Options(device="cuda"))  # type: ignore[arg-type]


def fail(error: Exception) -> None:
    """Raise."""
    raise error


WRONG_TYPES = (
    '{"C":2.5}', '{"lengths":[true]}', '{"splits":["1"]}', '{"packed":"yes"}', '{"log_gates":"false"}',
    '{"eps":"nan"}', '{"eps":-1}', '{"seed":null}', '{"C":1e400}',
)  # fmt: skip


@pytest.mark.parametrize(
    "given", ["nowhere.json", "pyproject.toml", '{"lengths":7}', '{"D":"x"}', '{"colour":1}', "{", *WRONG_TYPES]
)
def test_a_problem_that_cannot_be_read_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="--replay must be a problem as JSON, or a file of one"):
        command_line.read_problem(given)


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x", tmp_path):
        with pytest.raises(ValueError, match="--verdicts must name a file that can be written"):
            command_line.check_files(Options(verdicts=path))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="--junitxml must name a file that can be written"):
            command_line.check_files(Options(xmlpath=str(path)))  # type: ignore[arg-type]


def test_a_full_device_is_refused() -> None:
    for options in (Options(verdicts=Path("/dev/full")), Options(xmlpath="/dev/full")):
        with pytest.raises(ValueError, match=r"must name a file that can be written: .*No space left"):
            command_line.check_files(options)  # type: ignore[arg-type]


def test_a_pipe_gets_the_verdicts_once_and_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    command_line.check_files(Options(verdicts=path, xmlpath=str(path)))  # type: ignore[arg-type]
    with pytest.raises(OSError, match="No such device or address"):
        files.write(path, "nobody reads")
    text = "x" * 10**6
    with (tmp_path / "read").open("w") as read, subprocess.Popen(["cat", path], stdout=read) as reader:
        deadline = time.monotonic() + 60
        while True:
            try:
                files.write(path, text)
                break
            except OSError:
                # The reader has not opened it yet.
                assert time.monotonic() < deadline
        assert reader.wait(60) == 0
    assert (tmp_path / "read").read_text() == text


def test_verdicts_of_an_earlier_run_do_not_stay(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    report.write_json(path, [], {"about": ["green"]})
    command_line.check_files(Options(verdicts=path, xmlpath=str(tmp_path / "junit.xml")))  # type: ignore[arg-type]
    assert json.loads(path.read_text())["about"] == ["the run has not ended"]
    assert os.listdir(tmp_path) == ["verdicts.json"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--replay", "nowhere.json"), "ERROR: --replay must be a problem"),
        (("--impl", "nowhere.adapter:f"), "No module named 'nowhere'; add its folder: PYTHONPATH="),
    ],
)
def test_a_mistake_is_one_line(options: tuple[str, ...], said: str) -> None:
    output = run_suite(LAW, *options, fails=4)
    assert said in output
    assert "INTERNALERROR" not in output
    assert "Traceback" not in output


def full(descriptor: int) -> None:
    """Find no space left, as a full disk does at the last."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_no_half_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    files.write(path, "before")
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(plugin, "FIXTURES", tmp_path)
    with pytest.raises(OSError, match="No space left"):
        files.write(path, "after")
    with pytest.raises(OSError, match="No space left"):
        plugin.save("test_law", Problem(), "test_law[chunk]")
    assert os.listdir(tmp_path) == ["x.json"]
    assert path.read_text() == "before"


def test_a_fixture_replaces_no_other(tmp_path: Path) -> None:
    files.create(tmp_path / "x.json", "before")
    with pytest.raises(FileExistsError):
        files.create(tmp_path / "x.json", "after")
    assert (tmp_path / "x.json").read_text() == "before"


def test_a_run_whose_results_cannot_be_stored_shows_them() -> None:
    replay = ("--replay", Problem(lengths=(2,)).to_json())
    output = run_suite("-p", "tests.properties.full", LAW, *replay, "--verdicts", "/dev/null", fails=3)
    assert "the results could not be stored: [Errno 28] No space left on device" in output
    assert "1 passed" in output


def test_a_run_that_can_store_nothing_is_right() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.properties.full", "-o", "cache_dir=/dev/null/x", LAW]
    # In CI Hypothesis keeps no database.
    environment = {name: x for name, x in os.environ.items() if name not in ("CI", "HYPOTHESIS_PROFILE")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    for said in ("could not create cache path", "falling back to an in-memory database", "1 passed"):
        assert said in output


def test_a_replay_line_is_quoted() -> None:
    recorder = Recorder("a b.py::test_x[m:f]", [("--impl", "m:f"), ("--impl-lacks", "a, b")])
    assert recorder.replay(Problem()) == "pytest 'a b.py::test_x[m:f]' --impl m:f --impl-lacks 'a, b' --replay '{}'"

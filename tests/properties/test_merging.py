"""The verdicts of the shards of a run are those of the run."""

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from properties.harness.facts import Facts, Verdict
from properties.harness.merging import COUNTS, Run, merge, together
from properties.harness.report import write_json
from properties.harness.sharding import Shard
from tests.properties.test_laws import run_suite

ROOT = Path(__file__).parents[2]
LAW = Verdict(test="t[x]", law="test_law", implementation="x", verdict="pass")


def run_of(number: int, *verdicts: Verdict, of: int = 2, seed: str = "1") -> Run:
    return Run(Path(f"{number}.json"), Shard(number, of), ("dev", seed), ("header",), verdicts or (LAW,))


def test_four_shards_are_the_whole_run(tmp_path: Path) -> None:
    tests = ("properties/test_oracle.py::test_any_small_numbers_give_the_oracles_results[recurrent]",
             "properties/test_fixtures.py", "-k", "any_small or 001")  # fmt: skip
    for shard in ("1/1", "1/4", "2/4", "3/4", "4/4"):
        name = shard.replace("/", "-")
        options = ("--hypothesis-profile=smoke", "--hypothesis-seed=3", "--backends", "recurrent")
        run_suite(*tests, *options, "--shard", shard, "--verdicts", str(tmp_path / f"{name}.json"))
    merged = merge([Run.read(tmp_path / f"{number}-4.json") for number in range(1, 5)])
    whole = Run.read(tmp_path / "1-1.json").verdicts
    assert sum(row.examples for row in whole) > 0
    assert merged == list(whole)


def test_counts_add_up_and_the_worst_is_kept() -> None:
    numbers = dict.fromkeys(COUNTS, 2)
    one = replace(LAW, **numbers, error=1.0, ratio=0.5, result="o", problem="a")
    one = replace(one, tightness={"o": 0.5}, worst={"k": (1.0, "a")})
    other = replace(LAW, **numbers, error=3.0, ratio=0.2, result="M", problem="b")
    other = replace(other, tightness={"o": 0.7}, worst={"k": (3.0, "b")})
    both = together([one, other])
    assert all(getattr(both, name) == 4 for name in COUNTS)
    assert (both.error, both.ratio, both.result, both.problem) == (3.0, 0.5, "o", "a")
    assert (both.tightness, both.worst) == ({"o": 0.7}, {"k": (3.0, "b")})
    assert {field.name for field in fields(Facts)} >= set(COUNTS)


def test_what_every_shard_replays_is_counted_once() -> None:
    row = replace(LAW, law="test_fixture", calls=1, examples=1)
    assert together([row, row]).examples == 1


@pytest.mark.parametrize("order", [0, 1])
def test_a_law_fails_where_one_shard_fails(order: int) -> None:
    failing = replace(LAW, verdict="fail", failing_call=3, replay="pytest ...")
    (both,) = merge([run_of(1 + order, failing), run_of(2 - order)])
    assert (both.verdict, both.failing_call, both.replay) == ("fail", 3, "pytest ...")


def test_shards_are_complete_and_of_one_run() -> None:
    with pytest.raises(ValueError, match=r"missing 2/2"):
        merge([run_of(1)])
    with pytest.raises(ValueError, match=r"got 1/2 more than once"):
        merge([run_of(1), run_of(1), run_of(2)])
    with pytest.raises(ValueError, match="shards of one run"):
        merge([run_of(1), run_of(2, seed="2")])
    with pytest.raises(ValueError, match="shards of one run"):
        merge([run_of(1), run_of(2, of=3)])
    with pytest.raises(ValueError, match=r"2.json is not complete: it has no verdict of u\[x\]"):
        merge([run_of(1, LAW, replace(LAW, test="u[x]")), run_of(2)])


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 1, "shard": "3/2"}', '{"schema": 2}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (path := tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="is not a file of --verdicts"):
        Run.read(path)


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "properties", "merge", *arguments]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)

    for number, verdict in ((1, LAW), (2, replace(LAW, verdict="fail", ratio=float("inf")))):
        header = {"about": [], "shard": f"{number}/2", "profile": "dev", "seed": "1"}
        write_json(tmp_path / f"{number}.json", [verdict], header)
    files = [str(tmp_path / f"{number}.json") for number in (1, 2)]
    done = command(*files, "-o", str(tmp_path / "all.json"))
    assert done.returncode == 1, done.stderr
    assert "FAIL" in done.stdout
    (row,) = json.loads((tmp_path / "all.json").read_text())["verdicts"]
    assert (row["verdict"], row["ratio"]) == ("fail", "inf")
    missing = command(files[0])
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr == "python -m properties merge: all shards must be there, missing 2/2\n"


CAMPAIGNS = (ROOT / "properties" / "README.md").read_text().partition("## Campaigns")[2].partition("\n## ")[0]


@pytest.mark.parametrize("script", re.findall(r"```(?:sh|bash)\n(.*?)```", CAMPAIGNS, re.DOTALL))
def test_the_scripts_of_the_readme_name_every_shard(script: str, tmp_path: Path) -> None:
    for program in ("pytest", "python", "parallel"):
        (path := tmp_path / program).write_text(f'#!/bin/sh\necho {program} "$@"\n')
        path.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    done = subprocess.run(["bash", "-eu"], input=script, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"--shard (3|{})/8|merge", done.stdout)

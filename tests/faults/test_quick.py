"""Are the problems that a quick run begins with of use, and does the tool say which faults it kills?"""

import json
import re
import subprocess
import sys

from faults.plant import ROOT, load
from properties.harness import corpus
from properties.harness.laws import PROPERTIES
from properties.problems.problem import Problem

FAULTS = {fault.name: fault for fault in load()}


def test_every_stored_problem_kills_faults_that_there_are() -> None:
    corpus.import_laws()
    stored = json.loads(corpus.KILLERS.read_text())
    killed = [name for entry in stored for name in entry["kills"]]
    assert len(killed) == len(set(killed))
    assert set(killed) <= set(FAULTS), "python -m faults --collect brings killers.json up to date"
    for entry in stored:
        assert entry["kills"]
        assert {FAULTS[name].backend for name in entry["kills"]} == {entry["backend"]}
        assert entry["law"] in PROPERTIES
        assert Problem.from_json(json.dumps(entry["problem"])).tokens < 100


def test_the_problems_that_kill_most_come_first() -> None:
    counts = [len(entry["kills"]) for entry in json.loads(corpus.KILLERS.read_text())]
    assert counts == sorted(counts, reverse=True)


def test_the_tool_says_which_faults_a_quick_run_kills() -> None:
    words = ("--quick", "--select", "anchor never refreshed", "-n", "1")
    done = subprocess.run([sys.executable, "-m", "faults", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = r"killed    anchor never refreshed  \[chunk, \d+\.\d s, computing \d+\.\d s, \d+ examples\]\n +test_"
    assert re.match(said, done.stdout)
    assert re.search(r"chunk: 1 of 1 faults killed; 1 processes, 60 s\n +after \d+\.\d s in the median", done.stdout)

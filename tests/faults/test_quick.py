"""Are the problems that a quick run begins with of use, and does the tool say which faults it kills?"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
        assert Problem.from_json(json.dumps(entry["problem"])).tokens < 5000


def test_the_problems_that_kill_most_come_first() -> None:
    counts = [len(entry["kills"]) for entry in json.loads(corpus.KILLERS.read_text())]
    assert counts == sorted(counts, reverse=True)


def test_the_tool_says_which_faults_a_quick_run_kills() -> None:
    words = ("--quick", "--select", "anchor never refreshed", "-n", "1")
    done = subprocess.run([sys.executable, "-m", "faults", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    line = r"killed    anchor never refreshed  \[chunk, \d+\.\d s, computing \d+\.\d s, \d+ examples\]\n +test_"
    assert re.match(line, done.stdout)
    assert re.search(r"chunk: 1 of 1 faults killed within 60 s\n +after \d+\.\d s in the median", done.stdout)


def said(code: str) -> str:
    """Return the output of a fresh process: this one must not have imported the op, and its killers must not change."""
    head = "import json, tempfile\nfrom pathlib import Path\nfrom faults.plant import load, plant\n"
    head += "from faults import quick\nfrom properties.harness import corpus\ncorpus.import_laws()\n"
    done = subprocess.run([sys.executable, "-c", head + code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", ["recurrent", "chunk", "log", "triton"])
def test_the_op_without_a_fault_obeys_its_laws_with_every_stored_problem(backend: str) -> None:
    broken = f"""
pairs = quick.known({backend!r}, json.loads(corpus.KILLERS.read_text()))
fine = quick.obeyed(({backend!r}, pairs))
print(len(pairs), [pair for pair in pairs if ({backend!r}, pair) not in fine])
"""
    assert re.fullmatch(r"[1-9]\d* \[\]\n", said(broken))


def test_a_problem_that_breaks_a_law_is_no_problem_that_it_obeys() -> None:
    planted = """
(fault,) = (x for x in load() if x.name == "anchor never refreshed")
with tempfile.TemporaryDirectory() as folder:
    plant(fault, Path(folder))
    pairs = [("test_values_are_the_oracles", problem) for problem in ('{"lengths":[2]}', '{"lengths":[1]}')]
    print(quick.obeyed(("chunk", pairs)))
"""
    assert said(planted) == "[('chunk', ('test_values_are_the_oracles', '{\"lengths\":[1]}'))]\n"


def test_problems_are_stored_for_the_faults_that_they_kill(tmp_path: Path) -> None:
    collected = f"""
corpus.KILLERS = Path({str(tmp_path / "killers.json")!r})
law = "values_are_the_oracles"
rows = [
    {{"fault": "anchor never refreshed", "law": law, "problem": '{{"lengths":[2],"q":"unit 0","v":"unit 0"}}'}},
    {{"fault": "tail: f taken at the token before", "law": law, "problem": '{{"lengths":[0]}}'}},
]
chosen = [x for x in load() if x.name in ("anchor never refreshed", "tail: f taken at the token before")]
print(quick.collect(rows, chosen, 1))
print(quick.collect([], chosen, 1))
"""
    lines = said(collected).splitlines()
    assert lines[0].startswith("anchor never refreshed: test_values_are_the_oracles {")
    # The first fault's problem kills the second as well, once it is stored.
    assert lines[1:3] == ["tail: f taken at the token before: NONE", "1"]
    assert lines[3].startswith("tail: f taken at the token before: test_values_are_the_oracles {")
    assert lines[4:] == ["0"]
    (entry,) = json.loads((tmp_path / "killers.json").read_text())
    assert entry["kills"] == ["anchor never refreshed", "tail: f taken at the token before"]

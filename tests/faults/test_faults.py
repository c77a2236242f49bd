"""Can every fault still be planted, and does the tool say what the laws see?"""

import importlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import oracle
from faults.answers import keep
from faults.plant import ROOT, Fault, Hunk, load, plant
from properties.harness.implementations import BACKENDS
from properties.harness.laws import PROPERTIES
from properties.problems.problem import Problem

for path in sorted((ROOT / "properties").glob("test_*.py")):
    importlib.import_module(f"properties.{path.stem}")


FAULTS = load()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_applies_to_the_source_as_it_is(fault: Fault) -> None:
    for path, source in fault.sources().items():
        assert source != (ROOT / path).read_text()
        compile(source, path, "exec")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_names_laws_that_its_backend_has_to_obey(fault: Fault) -> None:
    assert fault.backend in BACKENDS
    assert fault.laws
    assert {f"test_{law}" for law in fault.laws} <= set(PROPERTIES)


def test_no_two_faults_are_alike() -> None:
    names, sources = ({key(fault) for fault in FAULTS} for key in (lambda x: x.name, lambda x: str(x.sources())))
    assert len(names) == len(sources) == len(FAULTS) >= 190


def test_a_patch_follows_the_code_and_is_an_error_where_it_cannot() -> None:
    hunk = Hunk.parse(" a = 1\n-b = 2\n+b = 3\n")
    assert hunk.apply("first = 0\na = 1\nb = 2\n", "x.py") == "first = 0\na = 1\nb = 3\n"
    with pytest.raises(ValueError, match=r"must stand once in x\.py, found 0 times"):
        hunk.apply("a = 1\nb = 0\n", "x.py")
    with pytest.raises(ValueError, match=r"must stand once in x\.py, found 2 times"):
        hunk.apply("a = 1\nb = 2\n" * 2, "x.py")


def test_a_fault_is_not_planted_too_late(tmp_path: Path) -> None:
    import titans  # noqa: F401

    with pytest.raises(RuntimeError, match="before a fault"):
        plant(FAULTS[0], tmp_path)


def test_answers_are_kept_and_are_those_of_the_oracle(tmp_path: Path) -> None:
    kept = keep(oracle.gradient, tmp_path)
    problem = Problem(lengths=(3,), H=2, D=2, C=2, memory="normalised", initial="full", offsets=(1,))
    for seed in (0, 1, 0):
        inputs, cotangents = replace(problem, seed=seed).inputs(), problem.cotangents()
        (output, gradient), (exactly, wanted) = kept(inputs, cotangents), oracle.gradient(inputs, cotangents)
        assert (output.o == exactly.o).all()
        assert all((x == getattr(wanted, name)).all() for name, x in vars(gradient).items())
    assert len(list(tmp_path.iterdir())) == 2
    # Signs of zeros are bits, too.
    zero = replace(inputs, q=inputs.q * 0)
    kept(zero, cotangents), kept(replace(zero, q=-zero.q), cotangents)
    assert len(list(tmp_path.iterdir())) == 4


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_planted_module_is_the_changed_one(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from faults.plant import load, plant\n"
        "fault = next(x for x in load() if list(x.changes) == ['titans/inner.py'])\n"
        f"plant(fault, Path({str(tmp_path)!r}))\n"
        "import titans.inner, titans.chunk\n"
        "print(titans.inner.__file__, titans.chunk.norm is titans.inner.norm)"
    )
    done = command("-c", code)
    assert done.stdout.split() == [str(tmp_path / "titans.inner.py"), "True"], done.stderr


def test_a_fault_is_caught_with_its_law_its_examples_and_its_problem() -> None:
    done = command("-m", "faults", "--named", "--select", "factor 2 missing in the output", "-n", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^caught  factor 2 missing in the output", done.stdout)
    assert re.search(r"values_are_the_oracles \(\d+\)\n", done.stdout)
    assert "Problem(" in done.stdout
    assert "1 of 1 faults caught" in done.stdout

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
from faults.catalogue import FAULTS
from faults.plant import ROOT, Fault, plant
from properties.harness.implementations import BACKENDS
from properties.harness.laws import PROPERTIES
from properties.problems.problem import Problem

for path in sorted((ROOT / "properties").glob("test_*.py")):
    importlib.import_module(f"properties.{path.stem}")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_applies_to_the_source_as_it_is(fault: Fault) -> None:
    assert fault.source() != fault.path.read_text()
    compile(fault.source(), fault.path, "exec")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_names_laws_that_its_backend_has_to_obey(fault: Fault) -> None:
    assert fault.backend in BACKENDS
    assert fault.laws
    assert {f"test_{law}" for law in fault.laws} <= set(PROPERTIES)


def test_no_two_faults_are_alike() -> None:
    assert len({fault.name for fault in FAULTS}) == len({fault.source() for fault in FAULTS}) == len(FAULTS)


def test_a_fault_that_no_longer_applies_is_an_error() -> None:
    gone = replace(FAULTS[0], changes=(("what is not there", ""),))
    with pytest.raises(ValueError, match="must occur once"):
        gone.source()
    everywhere = replace(FAULTS[0], changes=(("=", "-"),))
    with pytest.raises(ValueError, match="must occur once"):
        everywhere.source()


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
        "from pathlib import Path; from faults.catalogue import FAULTS; from faults.plant import plant\n"
        "fault = next(x for x in FAULTS if x.module == 'inner')\n"
        f"plant(fault, Path({str(tmp_path)!r}))\n"
        "import titans.inner, titans.chunk\n"
        "print(titans.inner.__file__, titans.chunk.norm is titans.inner.norm)"
    )
    done = command("-c", code)
    assert done.stdout.split() == [str(tmp_path / "inner.py"), "True"], done.stderr


def test_a_fault_is_caught_with_its_law_its_examples_and_its_problem() -> None:
    done = command("-m", "faults", "--named", "--select", "factor 2 missing in the output", "-n", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^caught  factor 2 missing in the output", done.stdout)
    assert re.search(r"values_are_the_oracles \(\d+\)\n", done.stdout)
    assert "Problem(" in done.stdout
    assert "1 of 1 faults caught" in done.stdout

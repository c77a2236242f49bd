"""Can every mutant of the suite still be planted, and is a test that notices told from one that does not?"""

import re

import pytest

from faults.plant import ROOT, Hunk, changed
from faults.suite import SuiteFault, load, measure

FAULTS = load()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_mutant_applies_and_names_tests_that_there_are(fault: SuiteFault) -> None:
    for path, source in changed(fault.changes).items():
        assert path.startswith("properties/")
        assert source != (ROOT / path).read_text()
        compile(source, path, "exec")
    assert fault.tests
    for test in fault.tests:
        path, _, function = test.partition("::")
        assert re.search(rf"^def {function or 'test_'}", (ROOT / path).read_text(), re.M), test


def test_no_two_mutants_are_alike() -> None:
    assert len({fault.name for fault in FAULTS}) == len({str(changed(fault.changes)) for fault in FAULTS}) >= 26


def test_a_mutant_is_killed_by_a_test_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    (fault,) = (fault for fault in FAULTS if fault.name == "a missing shard is not missed")
    path = "properties/harness/merging.py"
    harmless = SuiteFault("nothing", fault.tests, {path: (Hunk("def merge(", "def merge("),)})
    one, other = measure([fault, harmless], 2)
    assert one.test == fault.tests[0]
    assert other.test == ""
    assert "1 of 2 mutants of the suite killed" in capsys.readouterr().out


def test_tests_that_cannot_run_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="could not be run"):
        measure([SuiteFault("none", ("tests/properties/test_nowhere.py",), {})], 1)

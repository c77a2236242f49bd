"""Every bound and module that the code names is in oracle/README.md."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "oracle"
TEXT = (PACKAGE / "README.md").read_text()
MODULES = sorted(PACKAGE.rglob("*.py"))
BOUNDS = re.findall(r"^### \((B\d+)\)", TEXT, re.MULTILINE)


def test_the_bounds_are_numbered_one_after_the_other() -> None:
    assert BOUNDS == [f"B{number}" for number in range(1, len(BOUNDS) + 1)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_cited_bound_has_its_number(path: Path) -> None:
    assert set(re.findall(r"\((B\d+)\)", path.read_text())) <= set(BOUNDS)


def test_every_module_is_named() -> None:
    modules = {path.name for path in MODULES if path.name != "__init__.py"}
    assert modules <= set(re.findall(r"(\w+\.py)", TEXT))

"""What titans/README.md says is so: its examples run, and every equation that the code cites is there."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "titans"
TEXT = (PACKAGE / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_the_examples_run(code: str) -> None:
    exec(compile(code, "titans/README.md", "exec"), {})


def test_the_equations_are_numbered_one_after_the_other() -> None:
    assert re.findall(r"&& \((\d+)\)", TEXT) == [str(number) for number in range(1, 21)]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_cited_equation_has_its_number(path: Path) -> None:
    citations = re.findall(r"(?:[Ee]quations?|Eqs?\.|eqs?\.|#) ((?:\(\d+\)(?:-|, | and | to )?)+)", path.read_text())
    assert {int(number) for cited in citations for number in re.findall(r"\d+", cited)} <= set(range(1, 21))


def test_every_module_is_in_the_table_of_files() -> None:
    table = TEXT[TEXT.index("## Files") : TEXT.index("## Using it")]
    modules = {path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert modules <= set(re.findall(r"`(\w+\.py)`", table))

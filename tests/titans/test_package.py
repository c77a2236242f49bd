"""What a user gets: the wheel, the names, the example of the README."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import titans

ROOT = Path(__file__).parents[2]


def test_the_names_are_the_documented_ones() -> None:
    functions = {"chunk_titans_linear", "titans_linear", "titans_linear_step", "check_gates", "check_layout", "grid"}
    functions |= {"titans_linear_prefill", "decodes_alike"}
    assert set(titans.__all__) == functions | {"TitansLinear", "TitansState", "DecodeState", "__version__"}
    assert all(getattr(titans, name).__doc__ for name in titans.__all__)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
def test_the_example_of_the_readme_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_the_wheel_holds_titans_alone(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("titans_linear-*.whl")
    folders = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    version = wheel.name.split("-")[1]
    assert folders == {"titans", f"titans_linear-{version}.dist-info"}
    assert version == titans.__version__


@pytest.mark.parametrize(("package", "other"), [("titans", "oracle"), ("oracle", "titans")])
def test_the_op_and_the_oracle_never_import_each_other(package: str, other: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert not re.search(rf"^\s*(from|import) {other}\b", path.read_text(), re.MULTILINE), path

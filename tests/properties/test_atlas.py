"""The atlas: what is measured, what is read, and what the page says of it."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from properties.adapters import ratios
from properties.atlas import collect, data, maps, others, page, pictures, tables
from properties.atlas.collect import Cell
from properties.atlas.data import Atlas, Group, Judged, Measured
from properties.atlas.grids import GATE_AXIS, GRIDS, MEMORIES, PLAINEST, complement
from properties.atlas.pictures import Picture
from properties.atlas.spec import sections, sentence
from properties.harness.facts import Verdict
from properties.harness.foreign import foreign
from properties.harness.headers import header
from properties.harness.implementations import Implementation, implementation
from properties.harness.report import write_json
from properties.harness.sharding import Shard
from properties.problems.problem import Problem
from titans import chunk_titans_linear

ROOT = Path(__file__).parents[2]
STORED = sorted((ROOT / "properties" / "atlas").glob("*.json"))
MAPS = [path for path in STORED if json.loads(path.read_text()).get("kind") == collect.KIND]
ABOUT = {"date": "2026-11-30", "device": "a CPU", "versions": "torch 2", "command": "python -m x"}
RATIOS = "properties.adapters.ratios:chunk_titans_linear"
STEADY = replace(PLAINEST, lengths=(8,), C=4, D=2, eta="uniform 0", alpha="uniform -3", theta="uniform -3")
LAW = "test_values_are_the_oracles"
HOSTILE = "</script><img src=x onerror=alert(1)>"


def off_by_a_percent(*arguments: Any, **options: Any) -> Any:
    o, state = chunk_titans_linear(*arguments, **options)
    return 1.01 * o, state


def raising(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("no")


def measured(subject: Implementation | str, problem: Problem) -> dict[str, Cell]:
    if isinstance(subject, str):
        subject = foreign(subject, "cpu")
    (found,) = collect.measure([subject], problem)
    return found


def verdict(**fields: Any) -> Verdict:
    row = {"test": f"properties/test_oracle.py::{LAW}[chunk]", "law": LAW, "sections": ("5.1",)}
    return Verdict(**row | {"implementation": "chunk", "verdict": "pass"} | fields)


def drawn(atlas: Atlas) -> list[Picture]:
    return [*maps.maps(atlas.maps), *others.pictures(atlas)]


def everything() -> Atlas:
    """An atlas with a picture of each kind."""
    atlas = data.read(MAPS)
    problem = Problem().to_json()
    rows = [
        verdict(examples=3, compared=3, ratio=0.5, result="o", worst={f"{LAW} float32": (2.0, problem)}),
        verdict(implementation=HOSTILE, verdict="fail", message=HOSTILE, failing_problem=problem, failing_call=1),
        verdict(implementation="log", verdict="not claimed", lacking=("half",)),
    ]  # fmt: skip
    atlas.runs.append(Judged(ABOUT, rows))
    caught = {"fault": "a", "must": ["some_law"], "caught": {"some_law": 3}, "problem": "Problem()"}
    atlas.faults.append(Measured(ABOUT, [caught, caught | {"fault": "b", "caught": {}}]))
    times = {"name": "ours", "facet": "forward", "ms": 1.0, "MiB": 2.0}
    atlas.times.append(Measured(ABOUT, [times | {"T": T} for T in (64, 128)]))
    atlas.recall.append(Measured(ABOUT, [{"name": "ours", "seed": 0, "accuracies": [0.1, 0.5, 0.9]}]))
    return atlas


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_right_implementation_is_within_its_bounds(memory: str) -> None:
    found = measured(implementation("chunk", "cpu"), replace(STEADY, memory=memory))
    assert {*found} == {"values", "gradients"}
    assert all(0 < cell.ratio <= 1 and cell.state in ".i" for cell in found.values())


def test_an_error_of_a_percent_is_beyond_them() -> None:
    found = measured(f"{__name__}:off_by_a_percent", STEADY)
    assert (found["values"].state, found["values"].result) == (".", "o")
    assert found["values"].ratio > 1
    # A percent of the largest number, but for the errors of that number and of the product.
    assert abs(found["values"].error - 0.01) <= 2 * found["values"].bound


def test_an_exception_is_seen() -> None:
    assert measured(f"{__name__}:raising", STEADY)["values"] == Cell(math.inf, "RuntimeError", "r")


def test_the_ratio_form_is_right_until_its_products_underflow() -> None:
    problem = replace(STEADY, lengths=(32,), C=32)
    assert measured(RATIOS, problem)["values"].ratio <= 1
    assert measured(RATIOS, replace(problem, alpha=GATE_AXIS["1-2^-8 .. 1-2^-12"]))["values"].state == "x"


def test_the_ratio_form_returns_no_tokens_for_none() -> None:
    x = torch.zeros(1, 0, 1, 2)
    gates = (torch.zeros(1, 0, 1),) * 3
    o, M = ratios.chunk_titans_linear(
        x, x, x, None, None, *gates, eps=1e-6, chunk_size=2, initial_state=None, output_final_state=True
    )
    assert o.shape == x.shape
    assert M is not None
    assert not M.any()


def test_true_underflow_is_told_from_a_zero() -> None:
    forgotten = replace(STEADY, theta="constant 0", alpha="constant 1-2^-24", lengths=(6,))
    subject = implementation("chunk", "cpu")
    assert measured(subject, forgotten)["values"].state == "u"
    assert measured(subject, replace(forgotten, alpha="constant 1"))["values"].state == "."


def test_a_problem_that_needs_a_missing_claim_is_left_out() -> None:
    assert measured(RATIOS, replace(STEADY, dtype="float16")) == {}


def test_shards_are_the_whole(tmp_path: Path) -> None:
    subjects, grids, paths = [implementation("chunk", "cpu")], [GRIDS["sizes"]], []
    few = replace(grids[0], x=("1", "2"), y=("1", "2"))
    for shard in ("1/1", "1/2", "2/2"):
        paths.append(tmp_path / f"{shard.replace('/', '-')}.json")
        groups = [group for found in collect.collect(subjects, [few], MEMORIES, Shard.parse(shard)) for group in found]
        collect.write(paths[-1], groups, ABOUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GRIDS, "sizes", few)
        whole, joined = data.read(paths[:1]), data.read(paths[1:])
    assert len(whole.maps) == 4
    assert whole.maps == joined.maps
    assert all(cell.state != "-" for group in whole.maps.values() for cell in group.cells)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must be a file of"),
        ("{", "cannot be read"),
        ('{"kind": "titans maps", "version": 0}', "must have version 1, got 0"),
        ('{"kind": "titans maps", "version": 1}', "lacks a field"),
        ('{"kind": "titans maps", "version": 1, "groups": [{"grid": "gates", "digest": "0"}]}', "on another grid"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        data.read([path])


def test_a_mistake_on_the_command_line_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "properties", "collect", "--maps", "gate", "-o", "x.json"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    message = "python -m properties collect: a map must be one of decay, gates, sizes, growth, got gate\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_verdicts_are_read_with_their_origin(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    about = header("pytest", 0, ["titans: torch 2", "titans: chunk on cpu"], profile="dev", seed="0", device="a CPU")
    write_json(path, [verdict(ratio=math.inf)], about)
    (run,) = data.read([path]).runs
    assert run.verdicts[0].ratio == math.inf
    assert (run.about["command"], run.about["device"]) == ("pytest", "a CPU; chunk on cpu")
    assert f"torch {torch.__version__.split('+')[0]}" in run.about["versions"]


def test_the_stored_maps_are_those_of_the_grids() -> None:
    found = data.read(MAPS).maps
    assert {key[0] for key in found} == {*GRIDS}
    assert {"chunk", "log", "recurrent", RATIOS} <= {group.implementation for group in found.values()}
    assert sum(path.stat().st_size for path in STORED) < 500_000


def test_levels_have_complements() -> None:
    assert [complement(x) for x in ("0", "1", "2^-1", "2^-8", "1-2^-8")] == ["1", "0", "2^-1", "1-2^-8", "2^-8"]
    assert maps.label("2^-4 .. 1-2^-12") == "2⁻⁴ … 1−2⁻¹²"


def test_the_sections_of_spec_are_read_in_their_order() -> None:
    known = sections()
    assert known["3"] == "Public API"
    assert known["5.6"] == "Same input, same bits, forward and backward, run after run."
    laws = [number for number in known if number.startswith("5.")]
    assert laws[:20] == [f"5.{n}" for n in range(1, 21)]
    text = "".join(path.read_text() for path in (ROOT / "properties").glob("test_*.py"))
    cited = [number for marks in re.findall(r"@law\(([^=)]*)", text) for number in re.findall(r'"([\d.]+)"', marks)]
    assert {"5.1", "5.20", "4.3"} <= {*cited} <= {*known}


def test_a_law_is_a_sentence() -> None:
    assert sentence(verdict(law="test_one_law", test="t[chunk-001-a-b]")) == "One law: 001-a-b"


def test_a_cell_can_be_run_again() -> None:
    row = tables.worst_cell(next(iter(data.read(MAPS).maps.values())))
    (line,) = re.findall(r"<code>(.*?)</code>", row)
    test, _, problem = re.fullmatch(r"\S+ '?(\S+?)\[(.*?)\]'? --replay '(.*)'", line).groups()  # type: ignore[union-attr]
    file, _, law = test.partition("::")
    assert f"def {law}(" in (ROOT / file).read_text()
    assert Problem.from_json(problem).lengths


def test_a_picture_says_where_its_data_come_from() -> None:
    atlas = everything()
    for picture in drawn(atlas):
        assert picture.alt
        assert all({"date", "device", "versions", "command"} <= set(about) for about in picture.abouts)


def test_the_words_count_what_is_seen() -> None:
    cells = [Cell(0.5, "o", "."), Cell(3.0, "o", "."), Cell(math.inf, "o", "x"), Cell(0.1, "o", "i"), Cell()]
    assert maps.in_words(cells) == "1 of 4 cells beyond the bound, 1 not finite, 1 ill-conditioned"
    assert maps.in_words(cells[:1]) == "at most 0.5 of the bound"
    assert [maps.colour(cell) for cell in cells[1:3]] == [round(math.log10(3), 2), maps.BEYOND]


def test_verdicts_alone_need_no_vega(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    path = tmp_path / "report.html"
    page.write(path, Atlas(runs=everything().runs))
    assert "Values are the oracles" in path.read_text()
    with pytest.raises(ValueError, match="needs vl-convert-python"):
        page.write(path, everything())


def test_vega_lite_takes_every_picture() -> None:
    vl_convert = pytest.importorskip("vl_convert")
    atlas = everything()
    for picture in drawn(atlas):
        vega = vl_convert.vegalite_to_vega(picture.spec, vl_version=page.VEGA_LITE)
        assert vega["marks"]


def test_rows_are_restored() -> None:
    rows = [{"a": 1, "b": "x"}, {"a": 2}]
    short = page.shortened({"data": {"values": rows}})["data"]["values"]
    assert [dict(zip(short["names"], row, strict=True)) for row in short["rows"]] == [rows[0], {"a": 2, "b": None}]


def test_groups_of_one_source_name_it_once() -> None:
    group = Group("gates", "plain", "values", "chunk", "cpu", ABOUT, [])
    assert pictures.abouts([group, replace(group, part="gradients")]) == [ABOUT]

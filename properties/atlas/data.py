"""The files that an atlas is made of: verdicts, maps, planted faults, times, recall."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from properties.atlas.collect import ABSENT, KIND, VERSION, Cell
from properties.atlas.grids import GRIDS
from properties.harness.facts import Verdict
from properties.harness.merging import Run, merge

About = Mapping[str, str]
TIMES, RECALL, FAULTS = "titans times", "titans recall", "titans faults"


@dataclass(frozen=True)
class Group:
    """The cells of one implementation in one grid, of one memory and part.

    Parameters
    ----------
    grid, memory, part, implementation, device : str
    about : mapping of str
        Date, device, versions and command.
    cells : sequence of Cell
        In the order of the grid's problems.
    """

    grid: str
    memory: str
    part: str
    implementation: str
    device: str
    about: About
    cells: Sequence[Cell]

    @property
    def title(self) -> str:
        """The name of the implementation, as a picture shows it."""
        return short(self.implementation, self.device)


@dataclass(frozen=True)
class Judged:
    """The verdicts of a run."""

    about: About
    verdicts: Sequence[Verdict]


@dataclass(frozen=True)
class Measured:
    """The rows of some other measurement."""

    about: About
    rows: Sequence[Mapping[str, Any]]


@dataclass
class Atlas:
    """Everything there is to draw."""

    runs: list[Judged] = field(default_factory=list)
    maps: dict[tuple[str, ...], Group] = field(default_factory=dict)
    faults: list[Measured] = field(default_factory=list)
    times: list[Measured] = field(default_factory=list)
    recall: list[Measured] = field(default_factory=list)


NAMES = {
    "properties.adapters.ratios:chunk_titans_linear": "ratio form",
    "properties.adapters.fla:chunk_titans_linear": "fla.ops.titans",
    "properties.adapters.fla:chunk_titans_linear_in_linear_space": "fla, linear space",
    "properties.adapters.fla:token_by_token": "fla, token loop",
    "properties.adapters.titans_pytorch:neural_memory": "titans-pytorch",
}


def short(implementation: str, device: str) -> str:
    """Return a short name of an implementation; one that is not known keeps its own."""
    return NAMES.get(implementation, implementation) + ("" if device == "cpu" else f" on {device}")


def read(paths: Sequence[Path]) -> Atlas:
    """Read files of any of the kinds.

    Raises
    ------
    ValueError
        If a file cannot be read, or is of no kind that is known, or was collected on other grids.
    """
    atlas = Atlas()
    shards: list[Run] = []
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        try:
            add(atlas, shards, path, content)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} lacks a field or has one of another kind: {error}") from error
    if shards:
        verdicts = merge(sorted(shards, key=lambda run: run.shard.number))
        atlas.runs.append(Judged(header(shards[0]), verdicts))
    return atlas


def add(atlas: Atlas, shards: list[Run], path: Path, content: Any) -> None:
    """Add the content of a file to its kind."""
    kind = content.get("kind") if isinstance(content, dict) else None
    others = {TIMES: atlas.times, RECALL: atlas.recall, FAULTS: atlas.faults}
    if kind == KIND:
        add_maps(atlas, path, content)
    elif kind in others:
        others[kind].append(Measured(content["about"], content["rows"]))
    elif isinstance(content, dict) and "verdicts" in content:
        run = Run.read(path)
        if run.shard.of > 1:
            shards.append(run)
        else:
            atlas.runs.append(Judged(header(run), run.verdicts))
    else:
        raise ValueError(
            f"{path} must be a file of --verdicts, or of `python -m properties collect`, `python -m faults`, "
            "benchmarks or examples/recall.py with --json"
        )


def header(run: Run) -> dict[str, str]:
    """Return date, device, versions and command of a run."""
    about = {name: str(run.header[name]) for name in ("date", "device", "command")}
    about["date"] = about["date"].partition("T")[0]
    about["versions"] = ", ".join(f"{name} {number}" for name, number in run.header["versions"].items())
    # The line of the header after that of the versions: implementations, device and profile.
    return about | {"device": "; ".join([about["device"], *(x.removeprefix("titans: ") for x in run.about[1:2])])}


def add_maps(atlas: Atlas, path: Path, content: Mapping[str, Any]) -> None:
    """Add a file of `collect`; the cells of shards come together."""
    if content["version"] != VERSION:
        raise ValueError(f"{path} must have version {VERSION}, got {content['version']}: collect it again")
    for stored in content["groups"]:
        grid = GRIDS.get(stored["grid"])
        if grid is None or grid.digest != stored["digest"]:
            raise ValueError(f"{path} was collected on another grid `{stored['grid']}`: collect it again")
        facts = (stored["states"], stored["results"].split(" "), stored["ratio"], stored["error"], stored["bound"])
        cells = [
            Cell(float(ratio), result, state, float(error), float(bound))
            for state, result, ratio, error, bound in zip(*facts, strict=True)
        ]
        fields = {name: stored[name] for name in ("grid", "memory", "part", "implementation", "device")}
        if there := atlas.maps.get(key := tuple(fields.values())):
            cells = [old if new.state == ABSENT else new for old, new in zip(there.cells, cells, strict=True)]
        atlas.maps[key] = Group(**fields, about=content["about"], cells=cells)

"""Collecting the errors over bounds of the maps: `python -m properties collect -o maps.json`."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oracle.bounds import ErrorModel
from oracle.precision import exact
from properties.atlas.grids import GRIDS, Grid
from properties.harness import files
from properties.harness.comparing import Comparison, Radii, Truth, compare_one, nearest, radii, solved
from properties.harness.containment import contained
from properties.harness.implementations import Implementation
from properties.harness.running import Results, run
from properties.harness.sharding import Shard
from properties.problems.problem import Problem

KIND, VERSION = "titans maps", 1
PARTS = ("values", "gradients")
DIGITS = 3
# The states of a cell, in the order in which the first that holds is taken.
NOT_FINITE, RAISED, UNDERFLOW, UNSURE, JUDGED, ABSENT = "xrui.-"


@dataclass(frozen=True)
class Cell:
    """The comparison of one part, values or gradients, of one problem.

    Parameters
    ----------
    ratio : float
        The worst error / bound.
    result : str
        The result that has it, such as `dq`; where the call raised, the name of the exception.
    state : str
        "x": something is not finite; "r": the call raised; "u": the exact values underflow; "i": ill-conditioned; ".":
        none of these; "-": not measured.
    error, bound : float
        The worst error, and the largest bound, over the largest exact value of their result.
    """

    ratio: float = 0.0
    result: str = ""
    state: str = ABSENT
    error: float = 0.0
    bound: float = 0.0


def collect(
    implementations: Sequence[Implementation], grids: Sequence[Grid], memories: Sequence[str], shard: Shard
) -> Iterator[list[dict[str, Any]]]:
    """Measure; return the groups that are stored, of one grid and memory after the other."""
    for grid in grids:
        for memory in memories:
            able = [x for x in implementations if memory in x.claims]
            # Problem by problem: the oracle answers once for all.
            cells: list[list[dict[str, Cell]]] = [
                measure(able, problem) if number % shard.of == shard.number - 1 else [{}] * len(able)
                for number, problem in enumerate(grid.problems(memory))
            ]
            yield [
                stored(grid, memory, implementation, part, [x.get(part, Cell()) for x in own])
                for implementation, own in zip(able, zip(*cells, strict=True), strict=True)
                for part in PARTS
            ]


def stored(grid: Grid, memory: str, implementation: Implementation, part: str, cells: Sequence[Cell]) -> dict[str, Any]:
    """Return a group of cells as it is stored: a list for each fact, in the order of the grid's problems."""
    return {
        "grid": grid.name, "digest": grid.digest, "memory": memory, "implementation": implementation.name,
        "device": implementation.device, "part": part, "states": "".join(x.state for x in cells),
        "results": " ".join(x.result or "-" for x in cells),
        **{name: [rounded(getattr(x, name)) for x in cells] for name in ("ratio", "error", "bound")},
    }  # fmt: skip


def rounded(x: float) -> float | str:
    """Round to a few digits; a number that is not finite is a text."""
    return float(f"{x:.{DIGITS}g}") if math.isfinite(x) else str(x)


def measure(implementations: Sequence[Implementation], problem: Problem) -> list[dict[str, Cell]]:
    """Return for each implementation a cell for the values and one for the gradients.

    There is none where the problem needs a claim that the implementation lacks.
    """
    known: dict[tuple[bool, ErrorModel], Radii] = {}
    return [
        {} if problem.features - implementation.claims else cells_of(implementation, problem, known)
        for implementation in implementations
    ]


def cells_of(
    implementation: Implementation, problem: Problem, known: dict[tuple[bool, ErrorModel], Radii]
) -> dict[str, Cell]:
    """Run an implementation and compare; `known` are the radii of the problem for other implementations."""
    gradients = "backward" in implementation.claims
    inputs, cotangents = problem.inputs(), problem.cotangents() if gradients else None
    implementation.require(inputs)
    wanted, arithmetic = solved(problem, gradients), (gradients, implementation.arithmetic(inputs))
    if arithmetic not in known:
        known[arithmetic] = radii(implementation, inputs, cotangents)
    try:
        results = run(contained(implementation), inputs, cotangents)
    except Exception as error:
        return dict.fromkeys(PARTS[: 1 + gradients], Cell(math.inf, type(error).__name__, RAISED))
    names = [name for name in wanted if name in results]
    parts = {part: [name for name in names if name.startswith("d") == (part == "gradients")] for part in PARTS}
    return {part: cell(results, wanted, known[arithmetic], parts[part]) for part in PARTS if parts[part]}


def cell(results: Results, wanted: Truth, radius: Radii, names: Sequence[str]) -> Cell:
    """Compare some results, as a law does, and return the worst."""
    overflows = any(not np.isfinite(radius[name]).all() for name in names)
    found = [compare_one(name, results[name], wanted[name], radius[name], overflows)[0] for name in names]
    worst = max(found, key=lambda one: one.ratio)
    size = {name: float(nearest(np.abs(wanted[name])).max()) for name in names}
    broken = not all(bool(results[name].isfinite().all()) for name in names) and not overflows
    error, bound = 0.0, 0.0
    for name in names:
        if size[name]:
            far = float(nearest(np.abs(exact(results[name]) - wanted[name])).max())
            error, bound = max(error, far / size[name]), max(bound, float(radius[name].max()) / size[name])
    tiny = {name: torch.finfo(results[name].dtype).tiny for name in names}
    # A number may be too small even for float64.
    underflows = any(size[name] < tiny[name] and (wanted[name] != 0).any() for name in names)
    return Cell(worst.ratio, worst.result, state(found, broken, underflows), error, bound)


def state(found: Sequence[Comparison], broken: bool, underflows: bool) -> str:
    """Return the letter of a cell; see `Cell`."""
    if broken:
        return NOT_FINITE
    # An error beyond the bound is shown, however small the exact values are.
    if underflows and all(one.ratio <= 1 for one in found):
        return UNDERFLOW
    return UNSURE if any(one.ill_conditioned for one in found) else JUDGED


def write(path: Path, groups: Sequence[dict[str, Any]], about: dict[str, str]) -> None:
    """Write a file of maps, a group on each line."""
    lines = ",\n".join(json.dumps(group, separators=(",", ":")) for group in groups)
    head = json.dumps({"kind": KIND, "version": VERSION, "about": about})
    files.write(path, f'{head[:-1]}, "groups": [\n{lines}\n]}}\n')


def selected(names: str) -> list[Grid]:
    """Return the grids with these names, separated by commas, or raise ValueError."""
    if unknown := [name for name in names.split(",") if name not in GRIDS]:
        raise ValueError(f"a map must be one of {', '.join(GRIDS)}, got {', '.join(unknown)}")
    return [GRIDS[name] for name in names.split(",")]

"""The maps of error over bound."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from properties.atlas.collect import ABSENT, JUDGED, NOT_FINITE, PARTS, RAISED, UNDERFLOW, UNSURE, Cell
from properties.atlas.data import Group
from properties.atlas.grids import GRIDS, MEMORIES, Grid
from properties.atlas.growth import growth
from properties.atlas.pictures import Picture, Spec, abouts
from properties.harness.implementations import BACKENDS

# Of the colour scale, in powers of ten: beyond, all is as bad, or as good.
END = 4
# Of no error, and of no number.
BEYOND = 99
SPACING = 14
# Diagonal lines that fill a cell.
HATCH: Spec = {
    "type": "point", "shape": "M-1,0L0,-1M-1,1L1,-1M0,1L1,0", "size": {"expr": "pow(0.9 * step, 2)"}, "style": "hatch",
    "filled": False, "strokeWidth": 1,
}  # fmt: skip
# Error / bound as text, and the state of a cell.
WORDS = {NOT_FINITE: "not finite", RAISED: "raised", UNDERFLOW: "true underflow", UNSURE: "ill-conditioned", JUDGED: ""}
SHOWN = (
    f"(datum.v == {-BEYOND} ? 'no error ' : datum.v == {BEYOND} ? '' : format(pow(10, datum.v), '.2~g') + ' ')"
    f" + ({json.dumps(WORDS)})[datum.s]"
)
CROSS: Spec = {"type": "text", "style": "cross", "text": "×", "fontSize": {"expr": "step"}}
# The picture of the README.
FIRST = "map-gates-values"


def of_part(groups: Mapping[tuple[str, ...], Group], grid: Grid, part: str) -> list[Group]:
    """Return the groups of a grid and part, those of the plain memory first, and in each memory our own backends."""
    found = [group for group in groups.values() if (group.grid, group.part) == (grid.name, part)]
    return sorted(found, key=lambda group: (MEMORIES.index(group.memory), group.implementation not in BACKENDS))


def maps(groups: Mapping[tuple[str, ...], Group]) -> list[Picture]:
    """Return the maps of error over bound, and the growth of the error."""
    pictures = []
    for grid in GRIDS.values():
        for part in PARTS:
            if found := of_part(groups, grid, part):
                pictures.append(growth(grid, part, found) if grid.name == "growth" else heat_map(grid, part, found))
    return pictures


def heat_map(grid: Grid, part: str, groups: Sequence[Group]) -> Picture:
    """Return error over bound in each cell of a grid, with a small map for each memory and implementation."""
    facets = [f"{group.memory}: {group.title}" for group in groups]
    rows = [
        {"c": number, "g": place, "v": colour(cell), "s": cell.state, "n": cell.result}
        for place, group in enumerate(groups)
        for number, cell in enumerate(group.cells)
        if cell.state != ABSENT
    ]
    names = [{"g": place, "f": facet} for place, facet in enumerate(facets)]
    places = [{"c": number, "x": label(x), "y": label(y)} for number, (x, y) in enumerate(grid.places())]
    step = 18 if len(grid.x) < 10 else 13
    header = {"labelExpr": "split(datum.label, ': ')"}
    spec: Spec = {
        "params": [{"name": "step", "value": step}],
        "data": {"values": rows},
        "transform": [
            {"lookup": "c", "from": {"data": {"values": places}, "key": "c", "fields": ["x", "y"]}},
            {"lookup": "g", "from": {"data": {"values": names}, "key": "g", "fields": ["f"]}},
            {"calculate": SHOWN, "as": "r"},
        ],
        "facet": {"field": "f", "type": "nominal", "sort": facets, "title": None, "header": header},
        # A row for each memory, where there is room.
        "columns": max(Counter(group.memory for group in groups).values()),
        "spacing": SPACING,
        "spec": {"width": {"step": step}, "height": {"step": step}, "encoding": axes(grid), "layer": LAYERS},
    }
    worst = "; ".join(f"{facet}, {in_words(group.cells)}" for facet, group in zip(facets, groups, strict=True))
    return Picture(
        name=f"map-{grid.name}-{part}",
        title=f"{grid.title}: {part}",
        caption=grid.about,
        alt=f"Error over bound of the {part}, over {grid.x_title} and {grid.y_title}. {worst}.",
        spec=spec,
        abouts=abouts(groups),
        column=step * len(grid.x) + SPACING,
        cells=len(grid.x),
        margin=40 + 5 * max(len(label(y)) for y in grid.y),
    )


def axes(grid: Grid) -> Spec:
    """Return the axes of a small map, and the facts that are shown of a cell."""
    bare = {"ticks": False, "domain": False, "labelFontSize": 9}
    x, y = ([*map(label, labels)] for labels in (grid.x, reversed(grid.y)))
    facts = {"f": "of", "x": grid.x_title, "y": grid.y_title, "r": "error / bound", "n": "worst in"}
    return {
        "x": {"field": "x", "type": "nominal", "sort": x, "title": grid.x_title, "axis": {"labelAngle": -90, **bare}},
        "y": {"field": "y", "type": "nominal", "sort": y, "title": grid.y_title, "axis": bare},
        "tooltip": [{"field": name, "type": "nominal", "title": title} for name, title in facts.items()],
    }


def colours() -> Spec:
    """Return the one scale of all maps: powers of ten of error / bound, with the bound in the middle."""
    names = {-END: f"≤ 10⁻{'⁰¹²³⁴'[END]}", -END / 2: "0.01", 0: "1, the bound", END / 2: "100", END: "≥ 10⁴"}
    test = "''"
    for value, name in names.items():
        test = f"datum.value == {value:g} ? '{name}' : {test}"
    return {
        "field": "v",
        "type": "quantitative",
        "scale": {"domain": [-END, END], "domainMid": 0, "clamp": True},
        "legend": {
            "title": "error / bound",
            "orient": "bottom",
            "direction": "horizontal",
            "gradientLength": 250,
            "values": list(names),
            "labelExpr": test,
        },
    }


def layer(states: Sequence[str], mark: Spec) -> Spec:
    """Return a layer for the cells in some states."""
    return {"transform": [{"filter": {"field": "s", "oneOf": list(states)}}], "mark": mark}


LAYERS = [
    {"mark": "rect", "encoding": {"color": colours()}},
    layer([UNDERFLOW], {"type": "rect", "style": "underflow"}),
    layer([UNSURE], HATCH),
    layer([NOT_FINITE, RAISED], CROSS),
]


def colour(cell: Cell) -> float:
    """Return the power of ten of error / bound; the colours end before it may."""
    if cell.state in (NOT_FINITE, RAISED) or not cell.ratio < math.inf:
        return BEYOND
    return round(math.log10(cell.ratio), 2) if cell.ratio > 0 else -BEYOND


def label(text: str) -> str:
    """Return the label of an axis with its exponents raised."""
    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    words = [
        f"{head}2{exponent.translate(digits)}" if sign else word
        for word in text.split(" ")
        for head, sign, exponent in [word.partition("2^")]
    ]
    return " ".join(words).replace(" .. ", " … ").replace("1-", "1−")


def in_words(cells: Sequence[Cell]) -> str:
    """Say of the cells of a group how far off they are."""
    seen = [cell for cell in cells if cell.state != ABSENT]
    broken = [cell for cell in seen if cell.state in (NOT_FINITE, RAISED)]
    beyond = [cell for cell in seen if cell.ratio > 1 and cell not in broken]
    within = [cell.ratio for cell in seen if cell not in broken]
    parts = [f"{len(beyond)} of {len(seen)} cells beyond the bound"] if beyond else []
    parts += [f"at most {max(within):.2g} of the bound"] if within and not beyond else []
    parts += [f"{len(broken)} not finite"] if broken else []
    for state, name in ((UNDERFLOW, "with true underflow"), (UNSURE, "ill-conditioned")):
        if count := sum(cell.state == state for cell in seen):
            parts.append(f"{count} {name}")
    return ", ".join(parts)

"""The pictures of the atlas as Vega-Lite specifications, each with the text that stands for it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from properties.atlas.collect import ABSENT, JUDGED, NOT_FINITE, PARTS, RAISED, UNDERFLOW, UNSURE, Cell
from properties.atlas.data import About, Group
from properties.atlas.grids import GRIDS, MEMORIES, Grid

Spec = dict[str, Any]
# Of the colour scale, in powers of ten: beyond, all is as bad, or as good.
END = 4
SPACING = 14
# Diagonal lines that fill a cell.
HATCH: Spec = {
    "type": "point", "shape": "M-1,0L0,-1M-1,1L1,-1M0,1L1,0", "size": {"expr": "pow(0.9 * step, 2)"}, "style": "hatch",
    "filled": False, "strokeWidth": 1,
}  # fmt: skip
CROSS: Spec = {"type": "text", "style": "cross", "text": "×", "fontSize": {"expr": "step"}}
# The picture of the README.
FIRST = "map-gates-values"
FONT = "system-ui, sans-serif"


@dataclass(frozen=True)
class Picture:
    """A picture.

    Parameters
    ----------
    name : str
        Of its element in the page.
    title, caption, alt : str
        `alt` says in words what is to be seen.
    spec : dict
        Of Vega-Lite, without colours of its own: `theme` has them.
    abouts : sequence of About
        Where its data come from.
    column, cells : int
        The pixels that a column of small pictures needs, where it has columns; the cells in a row of a small map.
    wide : bool
        Whether it scrolls by itself where the screen is narrow.
    """

    name: str
    title: str
    caption: str
    alt: str
    spec: Spec
    abouts: Sequence[About]
    column: int = 0
    cells: int = 0
    wide: bool = False


def theme(dark: bool) -> Spec:
    """Return the colours and fonts of Vega-Lite's `config`."""
    ink, faint, line = ("#e6e6e6", "#9a9a9a", "#4a4a4a") if dark else ("#1b1b1b", "#5f5f5f", "#d0d0d0")
    text = {"labelColor": ink, "titleColor": ink, "labelFont": FONT, "titleFont": FONT, "titleFontWeight": "normal"}
    within = ["#9ad0ff", "#5a9bd5", "#336490"] if dark else ["#08519c", "#4292c6", "#b5d4ea"]
    beyond = ["#8a4a2a", "#e07b39", "#ffb27a"] if dark else ["#fdc9a0", "#f1742e", "#a63603"]
    middle = "#3c3c3c" if dark else "#f4f4f4"
    return {
        "background": None if dark else "#ffffff",
        "font": FONT,
        "axis": {**text, "gridColor": line, "domainColor": faint, "tickColor": faint, "labelFontSize": 10},
        "header": {**text, "labelFontSize": 12, "labelFontWeight": "bold"},
        "legend": {**text, "labelFontSize": 11, "titleFontSize": 11, "titleLimit": 340, "labelLimit": 200},
        "title": {"color": ink, "subtitleColor": faint, "font": FONT, "subtitleFont": FONT, "anchor": "start"},
        "view": {"stroke": line},
        "range": {
            "diverging": [*within, middle, *beyond],
            "heatmap": ["#2f4d6b", "#a8d8ff"] if dark else ["#c6dbef", "#08306b"],
            "category": ["#7fc8ff", "#ffb000", "#ff7eb6", "#6fdc8c", "#c6a5ff", "#e8e8e8", "#ff8389", "#08bdba"]
            if dark
            else ["#0062b1", "#b35900", "#c2185b", "#1b7837", "#6a3fb5", "#444444", "#a2191f", "#007d79"],
        },
        "style": {
            "underflow": {"color": "#808080" if dark else "#a8a8a8"},
            "hatch": {"color": ink, "opacity": 0.6},
            "cross": {"color": "#000000"},
        },
    }


def of_part(maps: Mapping[tuple[str, ...], Group], grid: Grid, part: str) -> list[Group]:
    """Return the groups of a grid and part, those of the plain memory first."""
    return [
        group
        for memory in MEMORIES
        for group in maps.values()
        if (group.grid, group.part, group.memory) == (grid.name, part, memory)
    ]


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
        {"c": number, "f": facet, "v": colour(cell), "s": cell.state, "n": cell.result, "r": shown(cell)}
        for facet, group in zip(facets, groups, strict=True)
        for number, cell in enumerate(group.cells)
        if cell.state != ABSENT
    ]
    places = [{"c": number, "x": label(x), "y": label(y)} for number, (x, y) in enumerate(grid.places())]
    x = {"field": "x", "type": "nominal", "sort": [*map(label, grid.x)], "title": grid.x_title}
    y = {"field": "y", "type": "nominal", "sort": [*map(label, reversed(grid.y))], "title": grid.y_title}
    bare = {"ticks": False, "domain": False, "labelFontSize": 9}
    step = 18 if len(grid.x) < 10 else 13
    spec: Spec = {
        "params": [{"name": "step", "value": step}],
        "data": {"values": rows},
        "transform": [{"lookup": "c", "from": {"data": {"values": places}, "key": "c", "fields": ["x", "y"]}}],
        "facet": {"field": "f", "type": "nominal", "sort": facets, "title": None,
                  "header": {"labelExpr": "split(datum.label, ': ')"}},
        "columns": 5,
        "spacing": SPACING,
        "spec": {
            "width": {"step": step},
            "height": {"step": step},
            "encoding": {
                "x": {**x, "axis": {"labelAngle": -90, **bare}},
                "y": {**y, "axis": bare},
                "tooltip": [
                    {"field": name, "type": "nominal", "title": title}
                    for name, title in (
                        ("f", "of"), ("x", grid.x_title), ("y", grid.y_title),
                        ("r", "error / bound"), ("n", "worst in"),
                    )
                ],
            },
            "layer": [
                {"mark": "rect", "encoding": {"color": colours()}},
                layer([UNDERFLOW], {"type": "rect", "style": "underflow"}),
                layer([UNSURE], HATCH),
                layer([NOT_FINITE, RAISED], CROSS),
            ],
        },
    }  # fmt: skip
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
    )


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


def colour(cell: Cell) -> float:
    """Return the power of ten of error / bound; the ends of the scale for zero, and for no number."""
    if cell.state in (NOT_FINITE, RAISED) or math.isnan(cell.ratio):
        return END
    return round(max(-END, min(END, math.log10(cell.ratio) if cell.ratio > 0 else -END)), 2)


def shown(cell: Cell) -> str:
    """Return error / bound as text, with the state of the cell."""
    words = {NOT_FINITE: "not finite", RAISED: "raised", UNDERFLOW: "true underflow", UNSURE: "ill-conditioned"}
    number = f"{cell.ratio:.3g}"
    return number if cell.state == JUDGED else f"{number}, {words[cell.state]}"


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
    judged = max((cell.ratio for cell in seen if cell not in broken), default=math.inf)
    parts = [
        f"at most {judged:.2g} of the bound" if not beyond else f"{len(beyond)} of {len(seen)} cells beyond the bound"
    ]
    parts += [f"{len(broken)} not finite"] if broken else []
    for state, name in ((UNDERFLOW, "with true underflow"), (UNSURE, "ill-conditioned")):
        if count := sum(cell.state == state for cell in seen):
            parts.append(f"{count} {name}")
    return ", ".join(parts)


def growth(grid: Grid, part: str, groups: Sequence[Group]) -> Picture:
    """Return the error relative to the largest exact value, and its bound, over the length."""
    rows = [
        {"f": f"{group.memory}, {dtype}", "i": group.title, "T": int(T), "e": value, "k": kind}
        for group in groups
        for (T, dtype), cell in zip(grid.places(), group.cells, strict=True)
        for kind, value in (("error", cell.error), ("bound", cell.bound))
        if cell.state not in (ABSENT, NOT_FINITE, RAISED) and 0 < value < math.inf
    ]
    order = list(dict.fromkeys(group.title for group in groups))
    facets = [f"{memory}, {dtype}" for memory in MEMORIES for dtype in grid.y]
    line = {"field": "i", "type": "nominal", "sort": order, "title": None, "legend": {"orient": "bottom", "columns": 3}}
    spec: Spec = {
        "data": {"values": rows},
        "facet": {"field": "f", "type": "nominal", "sort": facets, "title": None},
        "columns": 4,
        "spec": {
            "width": 220,
            "height": 200,
            "encoding": {
                "x": {"field": "T", "type": "quantitative", "scale": {"type": "log", "base": 2}, "title": grid.x_title,
                      "axis": {"values": [int(T) for T in grid.x], "grid": False}},
                "y": {"field": "e", "type": "quantitative", "scale": {"type": "log"},
                      "title": "error / largest value", "axis": {"format": "~e", "tickCount": 6}},
                "color": line,
                "strokeDash": {"field": "k", "type": "nominal", "sort": ["error", "bound"], "title": None,
                               "legend": {"orient": "bottom"}},
                "tooltip": [
                    {"field": name, "type": kind, "title": title, **form}
                    for name, kind, title, form in (
                        ("i", "nominal", "of", {}), ("f", "nominal", "memory, dtype", {}), ("k", "nominal", "what", {}),
                        ("T", "quantitative", "tokens", {}), ("e", "quantitative", "relative", {"format": ".2e"}),
                    )
                ],
            },
            "layer": [
                {"mark": {"type": "line", "strokeWidth": 1.8}},
                {"mark": {"type": "point", "filled": True, "size": 22},
                 "transform": [{"filter": "datum.k == 'error'"}]},
            ],
        },
        "resolve": {"scale": {"y": "independent"}},
    }  # fmt: skip
    ends = "; ".join(
        f"{group.memory}: {group.title} from {cells[0].error:.1e} at {grid.x[0]} tokens to {cells[-1].error:.1e} at "
        f"{grid.x[-1]} in float32"
        for group in groups
        for cells in [group.cells[: len(grid.x)]]
    )
    return Picture(
        name=f"growth-{part}",
        title=f"{grid.title}: {part}",
        caption=f"{grid.about} The error of the worst result, relative to its largest exact value; dashed: its bound.",
        alt=f"Relative error of the {part} over the number of tokens. {ends}.",
        spec=spec,
        abouts=abouts(groups),
        column=300,
    )


def abouts(groups: Sequence[Group]) -> list[About]:
    """Return where groups come from, each source once."""
    return list({id(group.about): group.about for group in groups}.values())

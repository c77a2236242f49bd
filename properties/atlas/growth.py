"""The growth of the error with the length of a sequence."""

import math
from collections.abc import Sequence

from properties.atlas.collect import ABSENT, NOT_FINITE, RAISED
from properties.atlas.data import Group
from properties.atlas.grids import MEMORIES, Grid
from properties.atlas.pictures import Picture, Spec, abouts


def growth(grid: Grid, part: str, groups: Sequence[Group]) -> Picture:
    """Return the error relative to the largest exact value, and its bound, over the length."""
    rows = [
        {"f": f"{group.memory}, {dtype}", "i": group.title, "T": int(T), "e": value, "k": kind}
        for group in groups
        for (T, dtype), cell in zip(grid.places(), group.cells, strict=True)
        for kind, value in (("error", cell.error), ("bound", cell.bound))
        if cell.state not in (ABSENT, NOT_FINITE, RAISED) and 0 < value < math.inf
    ]
    facets = [f"{memory}, {dtype}" for memory in MEMORIES for dtype in grid.y]
    point = {"type": "point", "filled": True, "size": 22}
    spec: Spec = {
        "data": {"values": rows},
        "facet": {"field": "f", "type": "nominal", "sort": facets, "title": None},
        "columns": 4,
        "spec": {
            "width": 220,
            "height": 200,
            "encoding": axes(grid, list(dict.fromkeys(group.title for group in groups))),
            "layer": [
                {"mark": {"type": "line", "strokeWidth": 1.8}},
                {"mark": point, "transform": [{"filter": "datum.k == 'error'"}]},
            ],
        },
        "resolve": {"scale": {"y": "independent"}, "axis": {"x": "independent"}},
    }
    return Picture(
        name=f"growth-{part}",
        title=f"{grid.title}: {part}",
        caption=f"{grid.about} The error of the worst result, relative to its largest exact value; dashed: its bound.",
        alt=f"Relative error of the {part} over the number of tokens. {'; '.join(in_words(grid, groups))}.",
        spec=spec,
        abouts=abouts(groups),
        column=300,
    )


def axes(grid: Grid, order: Sequence[str]) -> Spec:
    """Return the axes, the colours of the implementations in their order, and the facts that are shown of a point."""
    facts = {"i": "of", "f": "memory, dtype", "k": "", "T": "tokens"}
    shown = [{"field": name, "type": "nominal", "title": title} for name, title in facts.items()]
    shown += [{"field": "e", "type": "quantitative", "title": "relative", "format": ".2e"}]
    lengths, legend = [int(T) for T in grid.x], {"orient": "bottom", "columns": 3}
    return {
        "x": {"field": "T", "type": "quantitative", "scale": {"type": "log", "base": 2}, "title": grid.x_title,
              "axis": {"values": lengths, "grid": False, "labelOverlap": False, "labelFlush": False,
                    "format": "d"}},
        "y": {"field": "e", "type": "quantitative", "scale": {"type": "log"}, "title": "error / largest value",
              "axis": {"format": "~e", "tickCount": 6}},
        "color": {"field": "i", "type": "nominal", "sort": order, "title": None, "legend": legend},
        "strokeDash": {"field": "k", "type": "nominal", "sort": ["error", "bound"], "title": None, "legend": None},
        "tooltip": shown,
    }  # fmt: skip


def in_words(grid: Grid, groups: Sequence[Group]) -> list[str]:
    """Say of each implementation how its error grows in float32."""
    return [
        f"{group.memory}: {group.title} from {cells[0].error:.1e} at {grid.x[0]} tokens to {cells[-1].error:.1e} at "
        f"{grid.x[-1]} in float32"
        for group in groups
        for cells in [group.cells[: len(grid.x)]]
    ]

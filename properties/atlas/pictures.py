"""A picture of the atlas: a Vega-Lite specification, with the text that stands for it; and the colours of all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from properties.atlas.data import About, Group

Spec = dict[str, Any]
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
    column, cells, margin : int
        The pixels that a column of small pictures needs, where it has columns; the cells in a row of a small map; the
        pixels that the labels of its rows need.
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
    margin: int = 0
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
        "axis": {
            **text,
            "gridColor": line,
            "gridOpacity": 0.6,
            "domainColor": faint,
            "tickColor": faint,
            "labelFontSize": 10,
        },
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


def abouts(groups: Sequence[Group]) -> list[About]:
    """Return where groups come from, each source once."""
    return list({id(group.about): group.about for group in groups}.values())

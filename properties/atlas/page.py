"""The page of the atlas: one file, which loads nothing."""

import copy
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from properties.atlas import maps, others, pictures, tables
from properties.atlas.data import About, Atlas, Judged, short
from properties.atlas.pictures import Picture
from properties.atlas.spec import sections
from properties.atlas.tables import text
from properties.harness import files

HERE = Path(__file__).parent
VEGA_LITE = "6.4"
# Nothing may be loaded; Vega makes functions of its expressions.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data:"
KEY = (
    '<ul class="key"><li class="underflow">true underflow: the exact result is below the normal numbers</li>'
    '<li class="unsure">ill-conditioned: the bound says little</li>'
    '<li class="broken">not finite, or an exception</li></ul>'
)


def vega() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script, or raise ValueError."""
    try:
        import vl_convert
    except ImportError as error:
        raise ValueError("the atlas needs vl-convert-python, which `make` installs: pip install --group dev") from error
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    return bundle.replace("</script", "<\\/script")


def write(path: Path, atlas: Atlas) -> None:
    """Write the page; without pictures it is small, and needs no vl-convert."""
    drawn = [*maps.maps(atlas.maps), *others.pictures(atlas)]
    content = {
        "pictures": [
            {
                "name": x.name,
                "column": x.column,
                "cells": x.cells,
                "margin": x.margin,
                "wide": x.wide,
                "spec": shortened(x.spec),
            }
            for x in drawn
        ],
        "themes": {"light": pictures.theme(False) | {"background": None}, "dark": pictures.theme(True)},
    }
    parts = dict(section for section in sections_of(atlas, drawn))
    navigation = "".join(f'<li><a href="#{slug(title)}">{text(title)}</a></li>' for title in parts)
    body = "".join(
        f'<section aria-labelledby="{slug(title)}"><h2 id="{slug(title)}">{text(title)}</h2>\n{part}</section>\n'
        for title, part in parts.items()
    )
    files.write(path, PAGE.format(
        policy=POLICY, css=(HERE / "page.css").read_text(), navigation=navigation, body=body,
        pictures=tables.embedded(content), vega=vega() if drawn else "", script=(HERE / "page.js").read_text(),
    ))  # fmt: skip


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>Atlas of titans-linear</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body>
<a class="skip" href="#main">To the content</a>
<header>
<h1>Atlas of titans-linear</h1>
<p>Measured errors of implementations of the Titans linear memory, over their derived bounds, and the verdicts of the
property suite. Every picture says where its data come from.</p>
<nav aria-label="Sections"><ul>{navigation}</ul></nav>
</header>
<main id="main" tabindex="-1">
{body}</main>
<footer><p>Made by <code>python -m properties atlas</code>. The page loads nothing. It
contains Vega, Vega-Lite and vega-embed, which draw it (BSD-3-Clause, University of Washington Interactive Data Lab and
contributors).</p></footer>
<div id="said" class="said" role="status"></div>
<script type="application/json" id="pictures">{pictures}</script>
<script>{vega}</script>
<script>
{script}</script>
</body>
</html>
"""


def sections_of(atlas: Atlas, drawn: Sequence[Picture]) -> Iterator[tuple[str, str]]:
    """Return the sections for which there are data, by their titles."""
    mapped = [x for x in drawn if x.name.startswith("map")]
    growing = [x for x in drawn if x.name.startswith("growth")]
    if atlas.runs:
        yield "Verdicts", judged(atlas.runs)
    if mapped:
        yield (
            "Error over bound",
            (
                "<p>Each cell is one call. Its colour is the worst error over its bound, of all elements of all "
                "results: blue is within the bound, orange beyond.</p>" + KEY + figures(mapped)
            ),
        )
    if growing:
        yield "Growth of the error", figures(growing)
    if atlas.maps:
        yield "Cells in numbers", f"<details><summary>Counts and worst cells</summary>{worst_cells(atlas)}</details>"
    if any(row.worst for run in atlas.runs for row in run.verdicts):
        yield (
            "Worst cases",
            (
                "<p>The largest error of each law, ill-conditioned examples left out, in units in the last place of "
                "the largest exact value.</p>" + filters("worst", of_worst(atlas.runs)) + tables.worst_cases(atlas.runs)
            ),
        )
    for title, kind in (("Planted faults", "faults"), ("Speed and memory", "times"), ("Recall", "recall")):
        if found := [x for x in drawn if x.name.startswith(kind)]:
            more = "".join(tables.faults(n, x) for n, x in enumerate(atlas.faults, 1)) if kind == "faults" else ""
            yield title, figures(found) + (f"<details><summary>Every fault</summary>{more}</details>" if more else "")
    if atlas.runs:
        yield "Sections of SPEC", spec(atlas.runs)


def worst_cells(atlas: Atlas) -> str:
    """Return the table of the cells."""
    return tables.worst_cells(atlas.maps.values())


def judged(runs: Sequence[Judged]) -> str:
    """Return how the runs went, and the table of all verdicts."""
    lines = []
    for number, run in enumerate(runs, 1):
        counts: dict[str, int] = {}
        for row in run.verdicts:
            counts[row.verdict] = counts.get(row.verdict, 0) + 1
        summary = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
        examples = sum(row.compared for row in run.verdicts)
        lines.append(f"<li>Run {number}: {summary}; {examples} examples. {source(run.about)}</li>")
    return f"<ul>{''.join(lines)}</ul>" + filters("verdicts", of_verdicts(runs)) + tables.verdicts(runs)


def of_verdicts(runs: Sequence[Judged]) -> dict[str, list[str]]:
    """Return the choices by which verdicts are filtered."""
    rows = [row for run in runs for row in run.verdicts]
    choices = {
        "implementation": sorted({short(row.implementation, row.device) for row in rows}),
        "verdict": sorted({row.verdict for row in rows}),
    }
    return choices | ({"run": [str(n + 1) for n in range(len(runs))]} if len(runs) > 1 else {})


def of_worst(runs: Sequence[Judged]) -> dict[str, list[str]]:
    """Return the choices by which worst cases are filtered."""
    rows = [row for run in runs for row in run.verdicts if row.worst]
    return {
        "implementation": sorted({short(row.implementation, row.device) for row in rows}),
        "dtype": sorted({key.rsplit(" ", 1)[1] for row in rows for key in row.worst}),
    }


def filters(table: str, choices: Mapping[str, Sequence[str]]) -> str:
    """Return the form that filters a table."""
    selects = "".join(
        f'<label>{name}<select name="{name}"><option value="">all</option>'
        + "".join(f"<option>{text(choice)}</option>" for choice in of)
        + "</select></label>"
        for name, of in choices.items()
    )
    return (
        f'<form class="filters" data-table="{table}" role="search" aria-label="Filter the table {table}">'
        f'<label>words<input type="search" name="text" autocomplete="off"></label>{selects}'
        '<button type="reset">show all</button><output aria-live="polite"></output></form>'
    )


def figures(drawn: Iterable[Picture]) -> str:
    """Return pictures with their captions."""
    return "".join(
        f'<h3>{text(x.title)}</h3><figure><div class="picture{" wide" if x.wide else ""}" id="{x.name}" role="img" '
        f'aria-label="{escape(x.alt)}"{" tabindex=0" if x.wide else ""}></div>'
        f"<figcaption>{text(x.caption)} {' '.join(map(source, x.abouts))}"
        f"<details><summary>The picture in words</summary><p>{text(x.alt)}</p></details></figcaption></figure>\n"
        for x in drawn
    )


def source(about: About) -> str:
    """Return where data come from."""
    facts = "; ".join(text(about[name]) for name in ("date", "device", "versions") if about.get(name))
    return f'<span class="source">[{facts}: <code>{text(about.get("command", ""))}</code>]</span>'


def spec(runs: Sequence[Judged]) -> str:
    """Return the sentences of SPEC.md that the laws check."""
    used = {number for run in runs for row in run.verdicts for number in row.sections}
    items = (
        f'<dt id="spec-{number}">{number}</dt><dd>{text(sentence)}</dd>'
        for number, sentence in sections().items()
        if number in used
    )
    return f"<dl>{''.join(items)}</dl>"


def slug(title: str) -> str:
    """Return a title as an identifier."""
    return title.lower().replace(" ", "-")


def shortened(spec: Any) -> Any:
    """Return a specification with its rows written shorter; the page's script restores them."""
    if isinstance(spec, list):
        return [shortened(x) for x in spec]
    if not isinstance(spec, dict):
        return spec
    if isinstance(values := spec.get("values"), list) and values and isinstance(values[0], dict):
        return spec | {"values": tables.compact(values)}
    return {name: shortened(x) for name, x in spec.items()}


def write_picture(path: Path, atlas: Atlas) -> None:
    """Write the picture of the README, from the same specification as the page's, as PNG."""
    import vl_convert
    from PIL import Image

    (picture,) = (x for x in maps.maps(atlas.maps) if x.name == maps.FIRST)
    spec = copy.deepcopy(picture.spec)
    lines = [picture.caption, "Grey: true underflow. Hatched: ill-conditioned. ×: not finite."]
    spec["title"] = {"text": "Error / bound of the values of each call", "subtitle": lines, "offset": 12}
    spec["config"] = pictures.theme(False)
    drawn = io.BytesIO(vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=2))
    # As it comes it is eight times as large.
    Image.open(drawn).convert("RGB").save(path, optimize=True)

"""The pictures of planted faults, times, memory and recall, where those were measured."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from properties.atlas.data import Atlas, Measured
from properties.atlas.pictures import Picture, Spec


def pictures(atlas: Atlas) -> Iterator[Picture]:
    """Return a picture of every other measurement."""
    for number, measured in enumerate(atlas.faults, 1):
        yield faults(number, measured)
    for number, measured in enumerate(atlas.times, 1):
        for what in ("ms", "MiB"):
            rows = [row for row in measured.rows if row.get(what) is not None]
            if rows:
                yield times(number, measured, what, rows)
    for number, measured in enumerate(atlas.recall, 1):
        yield recall(number, measured)


def faults(number: int, measured: Measured) -> Picture:
    """Return the planted faults and the laws that kill them as a matrix."""
    rows = [
        {"fault": row["fault"], "law": law.replace("_", " "), "n": calls, "must": law in row["must"]}
        for row in measured.rows
        for law, calls in row["caught"].items()
    ]
    laws = sorted({row["law"] for row in rows})
    alive = [row["fault"] for row in measured.rows if not row["caught"]]
    place: Spec = {
        "x": {"field": "law", "type": "nominal", "sort": laws, "title": None,
              "axis": {"labelAngle": -90, "labelLimit": 330, "ticks": False}},
        "y": {"field": "fault", "type": "nominal", "sort": [row["fault"] for row in measured.rows], "title": None,
              "axis": {"labelLimit": 330, "ticks": False}},
        "tooltip": [{"field": name, "type": "nominal", "title": title} for name, title in
                    (("fault", "fault"), ("law", "law"), ("n", "examples needed"), ("must", "must notice"))],
    }  # fmt: skip
    spec: Spec = {
        "data": {"values": rows},
        "width": {"step": 11},
        "height": {"step": 11},
        "encoding": place,
        "layer": [
            {"mark": "rect", "encoding": {"color": {
                "field": "n", "type": "quantitative", "scale": {"type": "log", "reverse": True},
                "legend": {"title": "examples needed", "orient": "top", "direction": "horizontal"}}}},
            {"mark": {"type": "point", "style": "cross", "filled": True, "size": 9, "opacity": 1},
             "transform": [{"filter": "datum.must"}]},
        ],
    }  # fmt: skip
    asked = "Only the laws that must notice were asked. " if "--named" in measured.about["command"] else ""
    survive = f"{len(alive)} survive: {', '.join(alive)}" if alive else "none survives"
    return Picture(
        name=f"faults-{number}",
        title="Planted faults and the laws that kill them",
        caption=(
            f"{asked}A dot marks a law that must notice the fault. The colour is the number of examples it needed. "
            f"Of {len(measured.rows)} faults {survive}."
        ),
        alt=f"Matrix of {len(measured.rows)} planted faults and {len(laws)} laws; {survive}. The table below has all.",
        spec=spec,
        abouts=[measured.about],
        wide=True,
    )


def times(number: int, measured: Measured, what: str, rows: Sequence[Mapping[str, Any]]) -> Picture:
    """Return milliseconds, or MiB, over the length of a sequence, of ours and of peers."""
    titles = {"ms": ("Time", "milliseconds"), "MiB": ("Peak memory", "MiB")}
    title, unit = titles[what]
    facets = list(dict.fromkeys(str(row["facet"]) for row in rows))
    spec: Spec = {
        "data": {"values": [{"f": row["facet"], "i": row["name"], "T": row["T"], "y": row[what]} for row in rows]},
        "facet": {"field": "f", "type": "nominal", "sort": facets, "title": None},
        "columns": 4,
        "spec": {
            "width": 220,
            "height": 190,
            "encoding": {
                "x": {"field": "T", "type": "quantitative", "scale": {"type": "log", "base": 2}, "title": "tokens T",
                      "axis": {"values": sorted({row["T"] for row in rows}), "grid": False, "format": "d"}},
                "y": {"field": "y", "type": "quantitative", "scale": {"type": "log"}, "title": unit,
                      "axis": {"tickCount": 5, "format": "~g"}},
                "color": {"field": "i", "type": "nominal", "title": None, "legend": {"orient": "bottom", "columns": 3}},
                "tooltip": [{"field": "i", "type": "nominal", "title": "of"},
                            {"field": "T", "type": "quantitative", "title": "tokens"},
                            {"field": "y", "type": "quantitative", "title": unit, "format": ".4~g"}],
            },
            "layer": [{"mark": {"type": "line"}}, {"mark": {"type": "point", "filled": True, "size": 35}}],
        },
        "resolve": {"scale": {"x": "independent", "y": "independent"}},
    }  # fmt: skip
    words = "; ".join(f"{row['facet']}, T = {row['T']}: {row['name']} {row[what]:.3g} {unit}" for row in rows)
    return Picture(
        name=f"times-{number}-{what}",
        title=title,
        caption="Medians of one run, as called from Python; scales are logarithmic.",
        alt=f"{title} over the number of tokens. {words}.",
        spec=spec,
        abouts=[measured.about],
        column=300,
    )


def recall(number: int, measured: Measured) -> Picture:
    """Return the accuracy of recall over training steps."""
    window = 10
    rows = [
        {"i": row["name"], "f": f"seed {row['seed']}", "step": step + 1, "y": round(sum(part) / len(part), 4)}
        for row in measured.rows
        for step in range(0, len(row["accuracies"]), 2)
        for part in [row["accuracies"][max(0, step - window + 1) : step + 1]]
    ]
    spec: Spec = {
        "data": {"values": rows},
        "facet": {"field": "f", "type": "nominal", "title": None},
        "columns": 3,
        "spec": {
            "width": 300,
            "height": 200,
            "mark": "line",
            "encoding": {
                "x": {"field": "step", "type": "quantitative", "title": "training step", "axis": {"grid": False}},
                "y": {"field": "y", "type": "quantitative", "title": "accuracy", "scale": {"domain": [0, 1]}},
                "color": {"field": "i", "type": "nominal", "title": None,
                          "legend": {"orient": "bottom", "columns": 1, "labelLimit": 300}},
            },
        },
    }  # fmt: skip
    ends = "; ".join(f"{row['name']}, seed {row['seed']}: {row['accuracies'][-1]:.2f}" for row in measured.rows)
    return Picture(
        name=f"recall-{number}",
        title="Accuracy of recall over training steps",
        caption=f"Each point is the mean of {window} steps.",
        alt=f"Accuracy of recall at the end of training: {ends}.",
        spec=spec,
        abouts=[measured.about],
        column=380,
    )

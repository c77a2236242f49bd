"""The verdicts of several runs as those of one: of the shards of a run, or of runs on several machines."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from properties.harness import headers, report, sections
from properties.harness.facts import Verdict
from properties.harness.ledger import ORDER
from properties.harness.sharding import Shard

COUNTS = (
    "calls", "compared", "examples", "ill_conditioned", "half", "half_ill_conditioned", "finite", "exact", "refused",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """The file that `--verdicts` wrote.

    Parameters
    ----------
    path : Path
    shard : Shard
        1/1 for a whole run.
    settings : tuple of str
        Profile and seed: shards of one run have the same.
    about : tuple of str
        The header of the run: versions, machine, implementations.
    verdicts : tuple of Verdict
    header : dict
        All that the file says beside the verdicts.
    """

    path: Path
    shard: Shard
    settings: tuple[str, ...]
    about: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    header: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Read a file, or raise ValueError."""
        try:
            content = json.loads(path.read_text())
            if (version := content["schema"]) != report.SCHEMA:
                raise ValueError(f"`schema` must be {report.SCHEMA}, got {version!r}")
            if headers.UNENDED in content["about"]:
                raise ValueError(headers.UNENDED)
            return cls(
                path,
                Shard.parse(content["shard"] or "1/1"),
                (content["profile"], content["seed"]),
                tuple(content["about"]),
                tuple(verdict(fields) for fields in content["verdicts"]),
                {name: x for name, x in content.items() if name not in ("schema", "verdicts")},
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file of --verdicts: {type(error).__name__}: {error}") from error


def verdict(fields: dict[str, Any]) -> Verdict:
    """Return a verdict from its JSON, where numbers that are not finite are texts."""
    numbers = {name: float(fields[name]) for name in ("error", "ratio")}
    tightness = {name: float(x) for name, x in fields["tightness"].items()}
    worst = {name: (float(error), problem) for name, (error, problem) in fields["worst"].items()}
    lists = {name: tuple(fields[name]) for name in ("sections", "lacking")}
    said = {name: tuple(counts) for name, counts in fields["said"].items()}
    return Verdict(**fields | numbers | lists | {"tightness": tightness, "worst": worst, "said": said})


def merge(runs: Sequence[Run]) -> list[Verdict]:
    """Return one verdict for each law and implementation.

    Raises
    ------
    ValueError
        If a shard is missing or there twice, if the runs are not shards of one run, or if a law has a verdict in one
        of them alone.
    """
    check_complete(runs)
    tests = {row.test: None for run in runs for row in run.verdicts}
    rows: dict[str, list[Verdict]] = {test: [] for test in tests}
    for run in runs:
        for row in run.verdicts:
            rows[row.test].append(row)
        if lacking := rows.keys() - {row.test for row in run.verdicts}:
            raise ValueError(f"{run.path} is not complete: it has no verdict of {', '.join(sorted(lacking)[:3])}")
    return [together(found) for found in rows.values()]


def check_complete(runs: Sequence[Run]) -> None:
    """Every shard of one run must be there once."""
    of = {run.shard.of for run in runs}
    if len(of) != 1 or len({run.settings for run in runs}) != 1:
        kinds = sorted({f"n = {run.shard.of}, profile and seed {' '.join(run.settings)}" for run in runs})
        raise ValueError(f"all files must be shards of one run, got {'; '.join(kinds)}")
    numbers = [run.shard.number for run in runs]
    if doubled := sorted({x for x in numbers if numbers.count(x) > 1}):
        raise ValueError(f"a shard must be there once, got {named(doubled, of)} more than once")
    if missing := sorted(set(range(1, max(of) + 1)) - set(numbers)):
        raise ValueError(f"all shards must be there, missing {named(missing, of)}")


def named(numbers: Iterable[int], of: Iterable[int]) -> str:
    """Write shards as on the command line."""
    return ", ".join(f"{number}/{max(of)}" for number in numbers)


def together(rows: Sequence[Verdict], replayed: Collection[str] = sections.REPLAYED) -> Verdict:
    """Return the verdict of all shards on one law and implementation: sums of counts, and worst cases.

    Parameters
    ----------
    rows : sequence of Verdict
    replayed : collection of str
        The laws that every shard runs whole: they count once.
    """
    total = max if rows[0].law in replayed else sum
    counts = {name: total(getattr(row, name) for row in rows) for name in COUNTS}
    said: dict[str, tuple[int, ...]] = {}
    for name in dict.fromkeys(name for row in rows for name in row.said):
        counted = [row.said[name] for row in rows if name in row.said]
        said[name] = tuple(total(numbers) for numbers in zip(*counted, strict=True))
    sizes, envelope = (
        {key: total(counts.get(key, 0) for counts in found) for key in dict.fromkeys(key for x in found for key in x)}
        for found in ([row.sizes for row in rows], [row.envelope for row in rows])
    )
    # A law fails where it fails in one shard.
    first = min(rows, key=lambda row: ORDER.index(row.verdict))
    widest = max(rows, key=lambda row: row.ratio)
    worst: dict[str, tuple[float, str]] = {}
    tightness: dict[str, float] = {}
    for row in rows:
        for key, case in row.worst.items():
            worst[key] = max(worst.get(key, case), case, key=lambda found: found[0])
        for name, ratio in row.tightness.items():
            tightness[name] = max(ratio, tightness.get(name, 0.0))
    return replace(
        first, **counts, error=max(row.error for row in rows), ratio=widest.ratio, result=widest.result,
        problem=widest.problem, worst=worst, tightness=tightness, said=said, sizes=sizes,
        envelope=envelope, heads=max(row.heads for row in rows),
    )  # fmt: skip

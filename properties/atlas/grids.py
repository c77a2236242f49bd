"""The problems of the maps: a fixed grid for each pair of quantities."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from properties.problems.problem import Problem

MEMORIES = ("plain", "normalised")
# The same cotangents for all, so that the oracle answers once: no peer has a momentum or an anchor to return.
PLAINEST = Problem(initial="M", cotangent="o M", w="random 0", b="random 0", seed=18)
# Both ends exactly, and between them what lies between two levels: powers of two would be multiplied without error.
LEVELS = (
    "2^-24", "2^-12", "2^-8", "2^-4", "2^-2", "2^-1", "1-2^-2", "1-2^-4", "1-2^-8", "1-2^-12", "1-2^-24",
)  # fmt: skip
GATE_AXIS = {
    "0": "constant 0",
    **{f"{x} .. {y}": f"random {x} {y}" for x, y in pairwise(LEVELS)},
    "1": "constant 1",
}
# With the usual eps the bounds of most gradients of the normalised memory say nothing.
CALM = replace(PLAINEST, eps=1.0)
# Gates as in training: alpha in (0, 1/8), eta in (0, 1).
USUAL: Mapping[str, Any] = {"theta": "random 2^-5 2^-4", "alpha": "uniform -3", "eta": "uniform 0"}


def complement(level: str) -> str:
    """Return 1 - x of a level, as text."""
    known = {"0": "1", "1": "0", "2^-1": "2^-1"}
    return known.get(level) or (level[2:] if level.startswith("1-") else f"1-{level}")


def decay_axis() -> dict[str, str]:
    """Return the texts of alpha by the decay per token, 1 - alpha, from forgetting all to forgetting nothing."""
    labels = {" .. ".join(complement(x) for x in reversed(label.split(" .. "))): label for label in GATE_AXIS}
    return {label: GATE_AXIS[of] for label, of in reversed(labels.items())}


@dataclass(frozen=True)
class Grid:
    """The problems of a map: one for each place on two axes.

    Parameters
    ----------
    name, title, x_title, y_title, about : str
        `about` says what is the same in all cells.
    x, y : sequence of str
        The labels of the axes.
    problem : callable
        Makes the problem, of a plain memory, of two labels.
    """

    name: str
    title: str
    x_title: str
    y_title: str
    about: str
    x: Sequence[str]
    y: Sequence[str]
    problem: Callable[[str, str], Problem]

    def problems(self, memory: str) -> Iterator[Problem]:
        """Return the problems of a memory, row by row."""
        return (replace(self.problem(x, y), memory=memory) for y in self.y for x in self.x)

    def places(self) -> Iterator[tuple[str, str]]:
        """Return the labels of each cell, in the same order."""
        return ((x, y) for y in self.y for x in self.x)

    @property
    def digest(self) -> str:
        """A text that is another for other problems: cells of another grid must not be shown on this one's axes."""
        texts = [problem.to_json() for memory in MEMORIES for problem in self.problems(memory)]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


DECAYS = decay_axis()
LENGTHS = ("16", "32", "64", "128", "256")
SIZES = ("1", "2", "4", "8", "16", "32", "64")
GRIDS = {
    grid.name: grid
    for grid in (
        Grid(
            "decay",
            "Decay per token and sequence length",
            "decay 1 - alpha",
            "tokens T",
            "A memory that learns nothing (theta = 0) and only decays; C = 16, D = 2, eps = 1.",
            tuple(DECAYS),
            LENGTHS,
            lambda x, y: replace(
                CALM, theta="constant 0", alpha=DECAYS[x], eta="uniform 0", lengths=(int(y),), C=16, D=2
            ),
        ),
        Grid(
            "gates",
            "Forgetting and momentum",
            "forgetting alpha",
            "momentum decay eta",
            "Two chunks of 16 tokens; D = 4, eps = 1, theta between 1/32 and 1/16.",
            tuple(GATE_AXIS),
            tuple(GATE_AXIS),
            lambda x, y: replace(
                CALM, theta=USUAL["theta"], alpha=GATE_AXIS[x], eta=GATE_AXIS[y], lengths=(32,), C=16, D=4
            ),
        ),
        Grid(
            "sizes",
            "Chunk length and head width",
            "chunk length C",
            "head width D",
            "Two chunks; eps = 1, theta between 1/32 and 1/16, alpha in (0, 1/8), eta in (0, 1).",
            SIZES,
            SIZES,
            lambda x, y: replace(CALM, **USUAL, lengths=(2 * int(x),), C=int(x), D=int(y)),
        ),
        Grid(
            "growth",
            "Growth of the error with the length",
            "tokens T",
            "dtype",
            "C = 16, D = 4, eps = 1e-6; theta between 1/32 and 1/16, alpha in (0, 1/8), eta in (0, 1).",
            ("16", "32", "64", "128", "256", "512", "1024"),
            ("float32", "float64"),
            lambda x, y: replace(PLAINEST, **USUAL, lengths=(int(x),), C=16, D=4, dtype=y, gate_dtype=y),
        ),
    )
}

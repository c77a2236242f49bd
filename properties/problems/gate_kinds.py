"""The kinds of gates: of each its text, its array, and the texts that Hypothesis may draw."""

import functools
import math
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from properties.problems.kinds import Array, Kind, Text, read

GATES = ("theta", "alpha", "eta")
LEVEL = re.compile(r"0|1|2\^-?\d+|1-2\^-[1-9]\d*")
# Levels that theta, which is 2^-s for any s, does not have; and those that are too large for the other gates.
ABOVE, LARGE = re.compile(r"1|1-.*"), re.compile(r"2\^[1-9]\d*")


class Level(str):
    """A value of a gate, as text: `0`, `1`, `2^n` or `1-2^-n`."""

    def __new__(cls, text: str) -> Self:
        """Read one, or raise ValueError."""
        if not LEVEL.fullmatch(text):
            raise ValueError(f"a level must be 0, 1, 2^n or 1-2^-n, got {text!r}")
        return super().__new__(cls, text)

    @property
    def coordinate(self) -> float:
        """The s with which it is 2^-s at s >= 0 and 1 - 2^s below; infinite for exactly 0 and 1."""
        if self in ("0", "1"):
            return math.inf if self == "0" else -math.inf
        return float(self[4:]) if self.startswith("1-2^") else -float(self[2:])


class Tokens(NamedTuple):
    """The tokens of a gate, whose arrays broadcast to (tokens, H).

    Parameters
    ----------
    place, length, phase : array, shape (tokens, 1)
        Place of each token in its sequence, length of that sequence, place in the running chunk.
    C : int
    random : array, shape (tokens, H)
        Numbers in (0, 1).
    unbounded : bool
        Whether the gate may exceed 1: theta.
    """

    place: NDArray[np.int64]
    length: NDArray[np.int64]
    phase: NDArray[np.int64]
    C: int
    random: Array
    unbounded: bool


class Gate(Kind):
    """A kind of gate."""

    @abstractmethod
    def coordinates(self, x: Tokens) -> Array:
        """Return the coordinates of the gates, which broadcast to (tokens, H); see `Level`."""

    @classmethod
    @abstractmethod
    def texts(cls, levels: Sequence[str], T: int) -> Text:
        """Draw a text with these levels, for sequences of at most T tokens."""


@dataclass(frozen=True)
class Constant(Gate):
    """`constant x`: x throughout."""

    name = "constant"
    x: Level

    def coordinates(self, x: Tokens) -> Array:
        return np.array(self.x.coordinate)

    @classmethod
    def texts(cls, levels: Sequence[str], T: int) -> Text:
        return st.builds("constant {}".format, st.sampled_from(levels))


class Between(Gate):
    """A gate between two levels, of which neither is 0 or 1."""

    x: Level
    y: Level

    def __post_init__(self) -> None:
        if {self.x, self.y} & {"0", "1"}:
            raise ValueError(f"neither x nor y may be 0 or 1, got {self.x} and {self.y}")

    @abstractmethod
    def part(self, way: float, x: Tokens) -> Array:
        """Return the part of the way from x to y that each gate has gone."""

    def coordinates(self, x: Tokens) -> Array:
        first, second = self.x.coordinate, self.y.coordinate
        s = first + self.part(second - first, x)
        # A gate that may not exceed 1 jumps over the coordinates in (-1, 1), which stand for no level.
        return s if x.unbounded else np.where(abs(s) < 1, np.copysign(1, s), s)

    @classmethod
    def texts(cls, levels: Sequence[str], T: int) -> Text:
        inner = st.sampled_from([x for x in levels if x not in ("0", "1")])
        return st.builds(f"{cls.name} {{}} {{}}".format, inner, inner)


@dataclass(frozen=True)
class Random(Between):
    """`random x y`: anywhere between x and y."""

    name = "random"
    x: Level
    y: Level

    def part(self, way: float, x: Tokens) -> Array:
        return way * x.random


@dataclass(frozen=True)
class Ramp(Between):
    """`ramp x y`: from x to y over each sequence."""

    name = "ramp"
    x: Level
    y: Level

    def part(self, way: float, x: Tokens) -> Array:
        return way * x.place / np.maximum(x.length - 1, 1)


@dataclass(frozen=True)
class Uniform(Gate):
    """`uniform n`: in (0, 2^n)."""

    name = "uniform"
    n: int

    def coordinates(self, x: Tokens) -> Array:
        return -self.n - np.log2(x.random)

    @classmethod
    def texts(cls, levels: Sequence[str], T: int) -> Text:
        return st.builds("uniform {}".format, st.sampled_from((0, -1, -3, -8)))


@dataclass(frozen=True)
class Alternate(Gate):
    """`alternate x y`: x and y in turn."""

    name = "alternate"
    x: Level
    y: Level

    def coordinates(self, x: Tokens) -> Array:
        return np.where(x.place % 2, self.y.coordinate, self.x.coordinate)

    @classmethod
    def texts(cls, levels: Sequence[str], T: int) -> Text:
        level = st.sampled_from(levels)
        return st.builds("alternate {} {}".format, level, level)


@dataclass(frozen=True)
class Spike(Gate):
    """`spike x y p`: x, but y at place p mod C of each chunk."""

    name = "spike"
    x: Level
    y: Level
    p: int

    def coordinates(self, x: Tokens) -> Array:
        return np.where(x.phase == self.p % x.C, self.y.coordinate, self.x.coordinate)

    @classmethod
    def texts(cls, levels: Sequence[str], T: int) -> Text:
        level = st.sampled_from(levels)
        return st.builds("spike {} {} {}".format, level, level, st.sampled_from((-1, 0, 1, -2)))


@dataclass(frozen=True)
class Single(Gate):
    """`single x y t`: x, but y at token t mod T."""

    name = "single"
    x: Level
    y: Level
    t: int

    def coordinates(self, x: Tokens) -> Array:
        return np.where(x.place == self.t % np.maximum(x.length, 1), self.y.coordinate, self.x.coordinate)

    @classmethod
    def texts(cls, levels: Sequence[str], T: int) -> Text:
        level = st.sampled_from(levels)
        return st.builds("single {} {} {}".format, level, level, st.integers(0, max(T - 1, 0)))


@dataclass(frozen=True)
class Sigmoid(Gate):
    """`sigmoid c s`: the sigmoid of c + s times something in (-1, 1)."""

    name = "sigmoid"
    c: int
    s: int

    def coordinates(self, x: Tokens) -> Array:
        z = self.c + self.s * (2 * x.random - 1)
        s: Array = np.where((z < 0) | x.unbounded, np.log2(1 + np.exp(-z)), -np.log2(1 + np.exp(z)))
        return s

    @classmethod
    def texts(cls, levels: Sequence[str], T: int) -> Text:
        return st.builds("sigmoid {} {}".format, st.sampled_from((0, 4, 8, 16, -8, -16)), st.sampled_from((1, 8)))


# In the order in which Hypothesis draws them, the plainest first.
GATE_KINDS: dict[str, type[Gate]] = {
    kind.name: kind for kind in (Constant, Random, Uniform, Alternate, Spike, Single, Ramp, Sigmoid)
}


@functools.cache
def read_gate(field: str, text: str) -> Gate:
    """Read the text of a gate, or raise ValueError."""
    gate = read(GATE_KINDS, field, text)
    wrong = ABOVE if field == "theta" else LARGE
    for level in (x for x in vars(gate).values() if isinstance(x, Level)):
        if wrong.fullmatch(level):
            allowed = "0 or 2^n" if field == "theta" else "0, 1, 2^n with n <= 0, or 1-2^-n"
            raise ValueError(f"a level of `{field}` must be {allowed}, got {text!r}")
    return gate

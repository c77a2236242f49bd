"""The kinds of gates and values: of each its text, its array and what Hypothesis may draw of it.

The text of a kind is its name and its parameters: `spike 2^-1 0 -2`. Reading one raises ValueError unless it has the
right parameters, each of the right form.
"""

import functools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from numpy.typing import NDArray

Array = NDArray[np.float64]
Text = SearchStrategy[str]

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


class Power(int):
    """The exponent of a size 2^n that float64 has."""

    def __new__(cls, text: str) -> Self:
        """Read one, or raise ValueError."""
        n = super().__new__(cls, text)
        if not -1022 <= n <= 1023:
            raise ValueError(f"n must be from -1022 to 1023, got {n}")
        return n


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


class Kind(ABC):
    """One kind; a subclass is a frozen dataclass whose fields are the parameters in the text."""

    name: ClassVar[str]

    @classmethod
    def read(cls, words: Sequence[str]) -> Self:
        """Read the parameters, or raise ValueError."""
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        if len(words) != len(names):
            raise ValueError(f"`{cls.name}` takes {len(names)} parameters ({' '.join(names)}), got {len(words)}")
        readers: list[Any] = [f.type for f in fields(cls)]  # type: ignore[arg-type]
        return cls(*(reader(word) for reader, word in zip(readers, words, strict=True)))

    def __str__(self) -> str:
        """Return the text that reads as this."""
        return " ".join([self.name, *(str(getattr(self, f.name)) for f in fields(self))])  # type: ignore[arg-type]


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


class Value(Kind):
    """A kind of q, k, v, w, b, state or cotangent."""

    # Whether it is about tokens: not for w, b and a state.
    of_tokens: ClassVar[bool] = False

    @abstractmethod
    def array(self, random: Array, lengths: Sequence[int]) -> Array:
        """Return the values.

        Parameters
        ----------
        random : array, of the shape wanted
            Numbers in (0, 1). All axes but the last two are those of tokens.
        lengths : sequence of int
            Tokens of each sequence.
        """

    @classmethod
    @abstractmethod
    def texts(cls, huge: int, tiny: int) -> Text:
        """Draw a text; `huge` and `tiny` are the exponents of the largest and smallest sizes."""


class Sized(Value):
    """A kind whose numbers are in units of 2^n."""

    n: Power

    def array(self, random: Array, lengths: Sequence[int]) -> Array:
        return self.units(2 * random - 1) * math.ldexp(1, self.n)

    @abstractmethod
    def units(self, x: Array) -> Array:
        """Return the values for n = 0, from numbers in (-1, 1)."""

    @classmethod
    def texts(cls, huge: int, tiny: int) -> Text:
        sizes = (0, -1, 1, -4, 4, tiny // 2, huge, tiny)
        return st.builds(f"{cls.name} {{}}".format, st.sampled_from(sizes))


@dataclass(frozen=True)
class RandomValues(Sized):
    """`random n`: in (-2^n, 2^n)."""

    name = "random"
    n: Power

    def units(self, x: Array) -> Array:
        return x


@dataclass(frozen=True)
class Unit(Sized):
    """`unit n`: rows of length 2^n."""

    name = "unit"
    n: Power

    def units(self, x: Array) -> Array:
        lengths: Array = np.sqrt((x * x).sum(-1, keepdims=True))
        return x / lengths


@dataclass(frozen=True)
class Equal(Sized):
    """`equal n`: all tokens alike."""

    name = "equal"
    n: Power

    def units(self, x: Array) -> Array:
        tokens = x.reshape(-1, *x.shape[-2:])
        first = tokens[:1] if len(tokens) else np.ones((1, *x.shape[-2:]))
        return np.broadcast_to(first, tokens.shape).reshape(x.shape)

    @classmethod
    def texts(cls, huge: int, tiny: int) -> Text:
        return st.builds("equal {}".format, st.sampled_from((0, 2, -4)))


@dataclass(frozen=True)
class Flat(Sized):
    """`flat n`: all entries of a row alike, so that its variance is 0."""

    name = "flat"
    n: Power

    def units(self, x: Array) -> Array:
        return np.broadcast_to(x[..., :1], x.shape)

    @classmethod
    def texts(cls, huge: int, tiny: int) -> Text:
        return st.just("flat 0")


@dataclass(frozen=True)
class Zero(Value):
    """`zero`: zeros of both signs."""

    name = "zero"

    def array(self, random: Array, lengths: Sequence[int]) -> Array:
        return np.copysign(0, 2 * random - 1)

    @classmethod
    def texts(cls, huge: int, tiny: int) -> Text:
        return st.just("zero")


@dataclass(frozen=True)
class Signs(Value):
    """`signs`: 0, -0, 1 and -1."""

    name = "signs"

    def array(self, random: Array, lengths: Sequence[int]) -> Array:
        x = 2 * random - 1
        return np.where(abs(x) < 0.5, np.copysign(0, x), np.copysign(1, x))

    @classmethod
    def texts(cls, huge: int, tiny: int) -> Text:
        return st.just("signs")


@dataclass(frozen=True)
class Integers(Value):
    """`integers n`: in [-n, n]."""

    name = "integers"
    n: int

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ValueError(f"n must not be negative, got {self.n}")

    def array(self, random: Array, lengths: Sequence[int]) -> Array:
        return np.floor(random * (2 * self.n + 1)) - self.n

    @classmethod
    def texts(cls, huge: int, tiny: int) -> Text:
        return st.just("integers 2")


@dataclass(frozen=True)
class Basis(Value):
    """`basis`: token t is the unit vector t mod D."""

    name = "basis"

    def array(self, random: Array, lengths: Sequence[int]) -> Array:
        tokens, D = random.reshape(-1, *random.shape[-2:]), random.shape[-1]
        units = np.eye(D)[np.arange(len(tokens)) % D]
        return np.broadcast_to(units[:, None], tokens.shape).reshape(random.shape)

    @classmethod
    def texts(cls, huge: int, tiny: int) -> Text:
        return st.just("basis")


@dataclass(frozen=True)
class SpikeOfValues(Value):
    """`spike n t`: `random 0`, but token t mod T times 2^n."""

    name = "spike"
    of_tokens = True
    n: Power
    t: int

    def array(self, random: Array, lengths: Sequence[int]) -> Array:
        tokens = (2 * random - 1).reshape(-1, *random.shape[-2:])
        there = np.concatenate([np.arange(T) == self.t % max(T, 1) for T in lengths])
        return (tokens * np.where(there, math.ldexp(1, self.n), 1)[:, None, None]).reshape(random.shape)

    @classmethod
    def texts(cls, huge: int, tiny: int) -> Text:
        return st.builds("spike {} {}".format, st.sampled_from((huge, 4)), st.integers(0, 24))


# In the order in which Hypothesis draws them, the plainest first.
GATE_KINDS: dict[str, type[Gate]] = {
    kind.name: kind for kind in (Constant, Random, Uniform, Alternate, Spike, Single, Ramp, Sigmoid)
}
VALUE_KINDS: dict[str, type[Value]] = {
    kind.name: kind for kind in (Unit, RandomValues, Signs, Integers, Basis, Flat, Zero, Equal, SpikeOfValues)
}


K = TypeVar("K", bound=Kind)


def read(kinds: dict[str, type[K]], field: str, text: str) -> K:
    """Read the text of a field, or raise ValueError."""
    name, *words = text.split() or [""]
    if name not in kinds:
        raise ValueError(f"the kind of `{field}` must be one of {', '.join(kinds)}, got {text!r}")
    try:
        return kinds[name].read(words)
    except ValueError as error:
        raise ValueError(f"`{field}` is {text!r}: {error}; the form is {kinds[name].__doc__}") from error


@functools.cache
def read_gate(field: str, text: str) -> Gate:
    """Read what a gate is like, or raise ValueError."""
    gate = read(GATE_KINDS, field, text)
    wrong = ABOVE if field == "theta" else LARGE
    for level in (x for x in vars(gate).values() if isinstance(x, Level)):
        if wrong.fullmatch(level):
            allowed = "0 or 2^n" if field == "theta" else "0, 1, 2^n with n <= 0, or 1-2^-n"
            raise ValueError(f"a level of `{field}` must be {allowed}, got {text!r}")
    return gate


@functools.cache
def read_value(field: str, text: str) -> Value:
    """Read what a tensor is like, or raise ValueError."""
    value = read(VALUE_KINDS, field, text)
    if value.of_tokens and field in ("w", "b", "state"):
        raise ValueError(f"`{field}` has no tokens and must not be a {value.name!r}, got {text!r}")
    return value

"""The kinds of values: of each its text, its array, and the texts that Hypothesis may draw."""

import functools
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from hypothesis import strategies as st

from properties.problems.kinds import Array, Kind, Text, read


class Power(int):
    """The exponent of a size 2^n that float64 has."""

    def __new__(cls, text: str) -> Self:
        """Read one, or raise ValueError."""
        n = super().__new__(cls, text)
        if not -1022 <= n <= 1023:
            raise ValueError(f"n must be from -1022 to 1023, got {n}")
        return n


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


VALUE_KINDS: dict[str, type[Value]] = {
    kind.name: kind for kind in (Unit, RandomValues, Signs, Integers, Basis, Flat, Zero, Equal, SpikeOfValues)
}


@functools.cache
def read_value(field: str, text: str) -> Value:
    """Read the text of a tensor, or raise ValueError."""
    value = read(VALUE_KINDS, field, text)
    if value.of_tokens and field in ("w", "b", "state"):
        raise ValueError(f"`{field}` has no tokens and must not be a {value.name!r}, got {text!r}")
    return value

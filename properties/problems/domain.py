"""Where an implementation is defined, and the problem inside that is most like one outside."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from oracle import Inputs
from properties.problems.problem import DTYPES, HALF, Problem
from properties.problems.shapes import Shapes

UNLIMITED = 2**62
RULE = re.compile(r"([DCTHN])(=|<=|>=|%)([\d,]+|C=0|\d+=0)|(dtype|memory|device)=([\w,]+)")
# The largest width and chunk length that is tried where a rule has no end.
LARGEST = {"D": 128, "C": 64}
# By which part of a turn the choice among sizes moves on from seed to seed.
TURNS = {"D": (5**0.5 - 1) / 2, "C": 2**0.5 - 1}
# How many cells, tokens * heads * D^2, a problem may have, and how many times those of the problem it is made of.
CELLS, GROWTH = 2**15, 128
# The cells of the problems that a profile's number of examples is meant for.
PLAIN_CELLS = 500


@dataclass(frozen=True)
class Sizes:
    """The values that one size of a call may have.

    Parameters
    ----------
    values : tuple of int
        Nothing but these; none: any.
    least, most : int
    multiple : int
        Multiples of this alone.
    whole_chunks : bool
        Multiples of the chunk length alone.
    """

    values: tuple[int, ...] = ()
    least: int = 0
    most: int = UNLIMITED
    multiple: int = 1
    whole_chunks: bool = False

    def step(self, C: int = 1) -> int:
        """Return what all values are multiples of, for chunks of length C."""
        return math.lcm(self.multiple, C if self.whole_chunks else 1)

    def contain(self, x: int, C: int = 1) -> bool:
        """Whether a size may be x, for chunks of length C."""
        return (not self.values or x in self.values) and self.least <= x <= self.most and x % self.step(C) == 0

    def nearest(self, x: int, C: int = 1) -> int:
        """Return the value nearest to x by ratio, or the next one without a list; x itself where there is none."""
        if self.values:
            fitting = [value for value in self.values if self.contain(value, C)]
            return min(fitting, key=lambda value: abs(math.log((value + 1) / (x + 1))), default=x)
        step = self.step(C)
        above, highest = -(-max(x, self.least) // step) * step, self.most // step * step
        return min(above, highest) if highest >= self.least else x

    def at_least(self, x: int) -> int:
        """Return the least value from x on; x itself where there is none."""
        if self.values:
            return min((value for value in self.values if value >= x and self.contain(value)), default=x)
        return self.nearest(x)

    def upwards(self, x: int, largest: int) -> list[int]:
        """Return the nearest value, and larger ones: those listed, else doubled again and again."""
        first = self.nearest(x)
        doubled = [first * 2**n for n in range(1, 8) if first * 2**n <= largest]
        return [first, *(value for value in sorted(self.values) or doubled if value > first and self.contain(value))]


ANY = Sizes()


@dataclass(frozen=True)
class Domain:
    """The calls that an implementation is defined for; the default is all there are.

    Parameters
    ----------
    D, C, T, H, N : Sizes
        Head width, chunk length, tokens of each sequence, heads, sequences.
    dtype, memory, device : tuple of str
        Of q, k and v; plain or normalised; cpu or cuda. None named: any.
    few_shapes : Shapes or None
        The nearest problem has one of these, as a kernel is compiled for each; every shape is inside.
    brief : bool
        Whether the nearest problem has a part of a chunk where a whole one would cost too much.
    """

    D: Sizes = ANY
    C: Sizes = ANY
    T: Sizes = ANY
    H: Sizes = ANY
    N: Sizes = ANY
    dtype: tuple[str, ...] = ()
    memory: tuple[str, ...] = ()
    device: tuple[str, ...] = ()
    few_shapes: Shapes | None = None
    brief: bool = False

    @classmethod
    def parse(cls, text: str) -> "Domain":
        """Read rules such as `D=64,128 C=64 T%C=0 T>=64 H<=8 dtype=bfloat16`, or raise ValueError."""
        found: dict[str, Any] = {}
        said: dict[Any, str] = {}
        for word in text.split():
            match = RULE.fullmatch(word)
            if not match:
                raise ValueError(
                    "a rule of a domain must be like D=64,128 or C=64 or T%C=0 or N%8=0 or T>=64 or H<=8 or "
                    f"dtype=bfloat16 or memory=plain or device=cuda, got {word!r}"
                )
            size, sign, value, name, names = match.groups()
            key = name or (size, sign, value == "C=0")
            if key in said:
                raise ValueError(f"a domain must have one rule of a kind, got {said[key]!r} and {word!r}")
            said[key] = word
            if name:
                found[name] = tuple(names.split(","))
            else:
                found[size] = replace(found.get(size, ANY), **rule(word, size, sign, value))
        known = {"dtype": set(DTYPES), "memory": {"plain", "normalised"}, "device": {"cpu", "cuda"}}
        for name, allowed in known.items():
            if unknown := set(found.get(name, ())) - allowed:
                raise ValueError(f"{name} must be among {', '.join(sorted(allowed))}, got {', '.join(sorted(unknown))}")
        domain = cls(**found)
        for size in "DCTHN":
            if domain.has_no(size):
                raise ValueError(f"a domain must contain a call, but no {size} obeys all rules of {text!r}")
        return domain

    def has_no(self, size: str) -> bool:
        """Whether no call with a token has a size, D, C, T, H or N, that its rules allow."""
        sizes: Sizes = getattr(self, size)
        lengths = (self.C.values or (self.C.nearest(1),)) if size == "T" else (1,)
        return not any(sizes.contain(x, C) for C in lengths for x in sizes.values or (sizes.nearest(1, C),) if x > 0)

    def __str__(self) -> str:
        """Return the text that reads as this."""
        words = [word for name in "DCTHN" for word in rules(name, getattr(self, name))]
        words += [f"{x}={','.join(getattr(self, x))}" for x in ("dtype", "memory", "device") if getattr(self, x)]
        return " ".join(words)

    @property
    def lacks(self) -> set[str]:
        """The claims that nothing inside needs."""
        lacks = {"plain", "normalised"} - set(self.memory) if self.memory else set()
        if self.dtype:
            lacks |= {"float64", "bfloat16"} - set(self.dtype) | (set() if set(HALF) & set(self.dtype) else {"half"})
        return lacks

    def objection(self, inputs: Inputs) -> str:
        """Say why a call is outside, or nothing where it is inside."""
        C, (_, _, H, D) = inputs.chunk_size, inputs.q.shape
        lengths = [end - begin for _, begin, end in inputs.sequences]
        dtype, memory = str(inputs.q.dtype).removeprefix("torch."), "plain" if inputs.w is None else "normalised"
        return self._objection(C, {"D": [D], "C": [C], "H": [H], "N": [len(lengths)], "T": lengths}, dtype, memory)

    def _objection(self, C: int, sizes: dict[str, Sequence[int]], dtype: str, memory: str) -> str:
        for name, values in sizes.items():
            allowed = getattr(self, name)
            if wrong := [x for x in values if not allowed.contain(x, C)]:
                return f"{name} = {wrong[0]}{f' with C = {C}' if name == 'T' else ''} is outside {self}"
        for name, value in (("dtype", dtype), ("memory", memory)):
            if getattr(self, name) and value not in getattr(self, name):
                return f"{name} {value} is outside {self}"
        return ""

    def holds(self, problem: Problem) -> bool:
        """Whether the call of a problem is inside."""
        sizes = {"D": [problem.D], "C": [problem.C], "H": [problem.H], "N": [problem.sequences], "T": problem.lengths}
        return not self._objection(problem.C, sizes, problem.dtype, problem.memory)

    def nearest(self, problem: Problem) -> Problem:
        """Return the problem inside that is most like a problem: itself, where it is inside.

        The number of chunks stays, and the seed chooses among several sizes, the smallest for seed 0: each size gets
        about the same time. A problem that would cost too much has fewer sequences, heads or chunks. Where every tensor
        is given by its values no size changes, and the problem may remain outside.
        """
        problem = self.few_shapes.nearest(problem) if self.few_shapes else problem
        if self.holds(problem):
            return problem
        if self.dtype and problem.dtype not in self.dtype:
            dtype = self.dtype[problem.seed % len(self.dtype)]
            gates = problem.gate_dtype if problem.gate_dtype != "float64" or dtype == "float64" else "float32"
            problem = replace(problem, dtype=dtype, gate_dtype=gates)
        if problem.explicit:
            return problem
        limit, longest = max(CELLS, GROWTH * cells(problem)), max(1, *problem.lengths)
        D, C = problem.D, problem.C
        if not self.D.contain(D):
            D = turn(self.D.upwards(D, LARGEST["D"]), problem.seed * TURNS["D"], 2)
        if not self.C.contain(C):
            C = turn(self.C.upwards(C, LARGEST["C"]), problem.seed * TURNS["C"], 1)
        given = replace(problem, D=D)
        problem = self.with_sequences(rechunked(given, C), problem.sequences, problem.H, UNLIMITED)
        few = min(2, problem.sequences), min(2, problem.H)
        one = (1, few[1]) if few[0] == 1 else (few[0], 1)
        choices = ((problem.sequences, problem.H, UNLIMITED), (*few, UNLIMITED), (*few, 2), (*one, 2), (*one, 1))
        for sequences, heads, chunks in choices:
            smaller = self.with_sequences(problem, sequences, heads, chunks)
            if cells(smaller) <= limit:
                break
        # The states of many heads cost much without a token, too.
        if self.brief and max(cells(smaller), smaller.sequences * smaller.H * D**2) > CELLS:
            smaller = self.in_brief(given, C)
        return replace(smaller, splits=tuple(n * max(smaller.lengths) // longest for n in problem.splits))

    def in_brief(self, problem: Problem, C: int) -> Problem:
        """Return a problem with chunks of length C and few tokens, as far from the ends of chunks as they are now."""
        N, H = min(2, problem.sequences), min(2, problem.H)
        offsets = tuple(min(C - 1, max(0, C - problem.C + place)) for place in problem.offsets)
        most = max(1, CELLS // (N * H * problem.D**2))
        lengths = tuple(min(T, most) for T in problem.lengths)
        return self.with_sequences(replace(problem, C=C, offsets=offsets, lengths=lengths), N, H, UNLIMITED)

    def with_sequences(self, problem: Problem, sequences: int, heads: int, chunks: int) -> Problem:
        """Return a problem with so many sequences and heads, at most so many chunks, or what the rules allow."""
        N, C = max(1, self.N.nearest(sequences)), problem.C
        again = -(-N // problem.sequences)
        lengths = tuple(self.T.nearest(min(T, chunks * C), C) for T in (problem.lengths * again)[:N])
        return replace(
            problem,
            H=max(1, self.H.nearest(heads)),
            lengths=lengths,
            offsets=(problem.offsets * again)[:N],
        )

    @property
    def share(self) -> float:
        """The share of a profile's examples that takes about its time: the least problem inside may be a large one."""
        D, C = (sizes.nearest(1) for sizes in (self.D, self.C))
        return min(1.0, PLAIN_CELLS / (max(1, self.T.nearest(1, C)) * D * D))


class OutsideDomain(Exception):
    """A call outside the domain of an implementation, which is not made."""


EVERYWHERE = Domain()


def rule(word: str, size: str, sign: str, value: str) -> dict[str, Any]:
    """Return the fields of `Sizes` that a rule sets, or raise ValueError."""
    if sign == "%":
        divisor = value.removesuffix("=0")
        if not value.endswith("=0") or divisor == "0" or (divisor == "C" and size != "T"):
            raise ValueError(f"a multiple must be like T%C=0 (T alone) or D%16=0, got {word!r}")
        return {"whole_chunks": True} if divisor == "C" else {"multiple": int(divisor)}
    numbers = [int(number) for number in value.split(",") if number.isdecimal()]
    if len(numbers) != value.count(",") + 1 or (sign != "=" and len(numbers) != 1):
        raise ValueError(f"a list must be like D=64,128 and a limit like T>=64, got {word!r}")
    if sign == "=":
        return {"values": tuple(numbers)}
    return {"least" if sign == ">=" else "most": numbers[0]}


def rules(name: str, sizes: Sizes) -> list[str]:
    """Return the rules for one size as text."""
    texts = {f.name: getattr(sizes, f.name) for f in fields(sizes) if getattr(sizes, f.name) != f.default}
    signs = {"values": "=", "least": ">=", "most": "<="}
    words = [f"{name}{signs[x]}{','.join(map(str, v)) if x == 'values' else v}" for x, v in texts.items() if x in signs]
    words += [f"{name}%{sizes.multiple}=0"] if "multiple" in texts else []
    return words + ([f"{name}%C=0"] if sizes.whole_chunks else [])


def turn(values: Sequence[int], angle: float, power: int) -> int:
    """Return one of some ascending sizes, each as rarely as its cost, size^power, is high; the first for angle 0."""
    fitting = [value for value in values if 1 - angle % 1 <= (max(1, values[0]) / max(1, value)) ** power]
    return fitting[-1]


def cells(problem: Problem) -> int:
    """Return what a problem costs the oracle."""
    return problem.tokens * problem.H * problem.D**2


def rechunked(problem: Problem, C: int) -> Problem:
    """Return a problem with as many chunks of another length; the last place of a chunk remains the last."""
    if problem.C == C:
        return problem
    parts = [divmod(T, problem.C) for T in problem.lengths]
    lengths = tuple(n * C + min(rest, C - 1) for n, rest in parts)
    offsets = tuple(C - 1 if place == problem.C - 1 else min(place, C - 1) for place in problem.offsets)
    return replace(problem, C=C, lengths=lengths, offsets=offsets)

"""A problem: a small readable descriptor and a seed, from which every tensor of one call of the op is built.

Gates and values are described by short texts, such as `spike 2^-1 0 -2`: see `gate_kinds` and `value_kinds`.
"""

import dataclasses
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from oracle import Cotangents, Inputs
from properties.problems.gate_kinds import GATES, Tokens, read_gate
from properties.problems.kinds import Array
from properties.problems.value_kinds import read_value

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
HALF = ("bfloat16", "float16")
INITIAL = ("none", "zero", "M", "momentum", "full")
ROWS, PARAMETERS, STATE = ("q", "k", "v"), ("w", "b"), ("M", "S", "anchor")
TENSORS = (*ROWS, *PARAMETERS, *GATES, *STATE)


@dataclass(frozen=True, repr=False)
class Problem:
    """One call of the op; the defaults are the plainest call there is.

    Parameters
    ----------
    lengths : tuple of int
        Tokens of each sequence.
    packed : bool
        One row with `cu_seqlens`; otherwise a batch, whose sequences have the same length.
    H, D, C : int
        Heads, head width, chunk length.
    memory : {"plain", "normalised"}
    initial : {"none", "zero", "M", "momentum", "full"}
        The initial state: not given, M = 0 given, M alone given, M and S at the start of a chunk, or M, S, anchor and
        `offsets`.
    offsets : tuple of int
        With "full": tokens already consumed of each sequence's running chunk; where it is 0 the anchor is M.
    splits : tuple of int
        Where the law of splitting cuts each sequence.
    theta, alpha, eta, q, k, v, w, b, state : str
        The gates and values as texts; see `gate_kinds` and `value_kinds`.
    cotangent : str
        Which of `o M S anchor` have a cotangent.
    do : str
        The cotangent of `o`, as a text.
    dtype, gate_dtype : str
        Of q, k, v, w, b and of the gates; a state is float64 where q is, else float32.
    log_gates : bool
    eps : float
    seed : int
        Of everything random.
    explicit : tuple of (name, values)
        Tensors given by their values instead, flattened.
    """

    lengths: tuple[int, ...] = (1,)
    packed: bool = False
    H: int = 1
    D: int = 1
    C: int = 1
    memory: str = "plain"
    initial: str = "none"
    offsets: tuple[int, ...] = ()
    splits: tuple[int, ...] = ()
    theta: str = "constant 2^-1"
    alpha: str = "constant 2^-1"
    eta: str = "constant 2^-1"
    q: str = "random 0"
    k: str = "unit 0"
    v: str = "random 0"
    w: str = "random 0"
    b: str = "random 0"
    state: str = "random 0"
    cotangent: str = "o M S anchor"
    do: str = "random 0"
    dtype: str = "float32"
    gate_dtype: str = "float32"
    log_gates: bool = False
    eps: float = 1e-6
    seed: int = 0
    explicit: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        """Refuse a description with a mistake in it."""
        rules = {
            "a batch must have sequences of one length": self.packed or len(set(self.lengths)) == 1,
            "lengths must be >= 0, H, D and C >= 1": min(self.lengths, default=0) >= 0 < min(self.H, self.D, self.C),
            f"initial must be one of {INITIAL}": self.initial in INITIAL,
            "memory must be plain or normalised": self.memory in ("plain", "normalised"),
            "a full state needs one offset in [0, C) for each sequence, the others none": (
                len(self.offsets) == (len(self.lengths) if self.initial == "full" else 0)
                and all(0 <= offset < self.C for offset in self.offsets)
            ),
            "cotangent must name some of o, M, S and anchor": {*self.cotangent.split()} <= {"o", *STATE},
            "explicit must name tensors": {name for name, _ in self.explicit} <= {*TENSORS},
            "dtypes must be known, and gates not wider than q": (
                {self.dtype, self.gate_dtype} <= set(DTYPES)
                and (self.gate_dtype != "float64" or self.dtype == "float64")
            ),
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"{rule}, got {self!r}")
        for name in GATES:
            read_gate(name, getattr(self, name))
        for name in (*ROWS, *PARAMETERS, "state", "do"):
            read_value(name, getattr(self, name))

    def __repr__(self) -> str:
        """Show the fields that differ from the plainest call; Python reads it back."""
        changed = (f"{name}={value!r}" for name, value in self._changed().items())
        return f"Problem({', '.join(changed)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the same in Hypothesis's report."""
        printer.text(repr(self))

    def _changed(self) -> dict[str, Any]:
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}

    def to_json(self) -> str:
        """Write the fields that differ from the plainest call, floats in hexadecimal."""
        return json.dumps(_hexadecimal(self._changed()), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Problem":
        """Read the text that `to_json` wrote."""
        fields = {name: _tuples(value) for name, value in json.loads(text).items()}
        if "eps" in fields:
            fields["eps"] = _float(fields["eps"])
        if "explicit" in fields:
            fields["explicit"] = tuple((name, tuple(map(_float, values))) for name, values in fields["explicit"])
        return cls(**fields)

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Number of tokens in all sequences."""
        return sum(self.lengths)

    @property
    def B(self) -> int:
        """Rows of the batch."""
        return 1 if self.packed else self.sequences

    @property
    def cu_seqlens(self) -> tuple[int, ...] | None:
        """Where the packed sequences begin and end."""
        return tuple(int(n) for n in np.cumsum((0, *self.lengths))) if self.packed else None

    @property
    def starts(self) -> tuple[int, ...]:
        """The place in its chunk at which each sequence starts."""
        return self.offsets or (0,) * self.sequences

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the arithmetic and the state."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def features(self) -> frozenset[str]:
        """The claims that this problem needs."""
        uses = {
            self.memory: True,
            "varlen": self.packed,
            "initial_state": self.initial != "none",
            "resume": self.initial in ("momentum", "full"),
            "offset": self.initial == "full",
            "log_gates": self.log_gates,
            "half": self.dtype in HALF or self.gate_dtype in HALF,
            "bfloat16": "bfloat16" in (self.dtype, self.gate_dtype),
            "float64": self.dtype == "float64",
            "large": self != self._small(),
        }
        return frozenset(feature for feature, used in uses.items() if used)

    def restricted(self, claims: Collection[str]) -> "Problem":
        """Return the nearest problem that an implementation with these claims takes."""
        lacking = self.features - frozenset(claims)
        change: dict[str, Any] = {}
        if lacking & {"plain", "normalised"}:
            change["memory"] = "normalised" if self.memory == "plain" else "plain"
            if self.memory == "plain":
                # As in `strategies.problems`: a normalised memory amplifies rounding errors from chunk to chunk.
                change["lengths"] = tuple(min(length, 3 * self.C + 1) for length in self.lengths)
        if lacking & {"half", "bfloat16", "float64"}:
            other = {"float16": "float32", "float32": "float32", "float64": "float32"}
            other["bfloat16"] = "float16" if "half" in claims else "float32"
            change |= {"dtype": other[self.dtype], "gate_dtype": other[self.gate_dtype]}
        if "log_gates" in lacking:
            change["log_gates"] = False
        if "varlen" in lacking:
            change |= {"packed": False, "lengths": (max(change.get("lengths", self.lengths)),) * self.sequences}
        for feature, start in (("offset", "momentum"), ("resume", "M"), ("initial_state", "none")):
            if feature in lacking:
                change |= {"initial": start, "offsets": ()}
        needed = {"M": "final_state", "S": "resume", "anchor": "offset"}
        kept = [name for name in self.cotangent.split() if name == "o" or needed[name] in claims]
        change["cotangent"] = " ".join(kept) or ("M" if "final_state" in claims else "o")
        restricted = dataclasses.replace(self, **change)
        return restricted._small() if "large" in lacking else restricted

    def _small(self) -> "Problem":
        """Return the same with a few heads, sequences and chunks, for an implementation that takes seconds for more."""
        if self.explicit:
            return self
        few = 3 if self.packed else 2
        lengths = tuple(min(length, 2 * self.C + 1) for length in self.lengths[:few])
        return dataclasses.replace(self, H=min(self.H, 2), lengths=lengths, offsets=self.offsets[:few])

    def inputs(self) -> Inputs:
        """Build everything that the op is given."""
        t: dict[str, Any] = {name: self._tensor(name) for name in TENSORS}
        return Inputs(
            **t,
            eps=self.eps,
            chunk_size=self.C,
            offset=self.offsets if self.initial == "full" else None,
            cu_seqlens=self.cu_seqlens,
            log_gates=self.log_gates,
        )

    def cotangents(self) -> Cotangents:
        """Build the gradients that flow in; zeros for an `o` without one."""
        o, given = self._shape("q"), self.cotangent.split()
        state = (self.sequences, self.H, self.D, self.D)
        do = self._values(self.do if "o" in given else "zero", "do", o)
        others = {
            name: _to(self._values("random 0", "d" + name, state), self.compute_dtype) if name in given else None
            for name in ("M", "S", "anchor")
        }
        return Cotangents(o=_to(do, DTYPES[self.dtype]), **others)

    def _shape(self, name: str) -> tuple[int, ...]:
        row = (self.B, self.tokens // self.B)
        if name in ROWS:
            return (*row, self.H, self.D)
        if name in GATES:
            return (*row, self.H)
        return (self.H, self.D) if name in PARAMETERS else (self.sequences, self.H, self.D, self.D)

    def _dtype(self, name: str) -> torch.dtype:
        return self.compute_dtype if name in STATE else DTYPES[self.gate_dtype if name in GATES else self.dtype]

    def _given(self, name: str) -> bool:
        if name in STATE:
            return self.initial in {"M": INITIAL[1:], "S": INITIAL[3:], "anchor": INITIAL[4:]}[name]
        return name not in PARAMETERS or self.memory == "normalised"

    def _tensor(self, name: str) -> Tensor | None:
        if not self._given(name):
            return None
        dtype, explicit = self._dtype(name), dict(self.explicit)
        if name in explicit:
            return torch.tensor(explicit[name], dtype=torch.float64).reshape(self._shape(name)).to(dtype)
        if name in GATES:
            return _to(self._gate(name), dtype)
        text = getattr(self, "state" if name in STATE else name)
        text = "zero" if name in STATE and self.initial == "zero" else text
        x = _to(self._values(text, name, self._shape(name)), dtype)
        if name != "anchor":
            return x
        M = self._tensor("M")
        assert M is not None
        return torch.where(torch.tensor(self.offsets).bool()[:, None, None, None], x, M)

    def _gate(self, name: str) -> Array:
        """Return theta, alpha or eta, or log theta, log (1 - alpha) or log eta."""
        shape = (self.tokens, self.H)
        place = np.concatenate([np.arange(n) for n in self.lengths])[:, None]
        length = np.repeat(self.lengths, self.lengths)[:, None]
        phase = (place + np.repeat(self.starts, self.lengths)[:, None]) % self.C
        tokens = Tokens(place, length, phase, self.C, _stream(self.seed, name, shape), name == "theta")
        s = read_gate(name, getattr(self, name)).coordinates(tokens)
        s = np.broadcast_to(s, shape).reshape(self._shape(name))
        if not self.log_gates:
            return _power(s, name == "theta")
        return _log_power(-s if name == "alpha" else s, name == "theta")

    def _values(self, text: str, name: str, shape: tuple[int, ...]) -> Array:
        return read_value(name, text).array(_stream(self.seed, name, shape), self.lengths)


def _stream(seed: int, name: str, shape: tuple[int, ...]) -> Array:
    """Return numbers in (0, 1), the same everywhere: NumPy promises its raw bit streams, not its distributions."""
    raw = np.random.PCG64([seed, crc32(name.encode())]).random_raw(math.prod(shape))
    return ((raw >> np.uint64(12)).astype(np.float64) + 0.5).reshape(shape) * 2.0**-52


def _power(s: Array, unbounded: bool) -> Array:
    """Return the gate at coordinate s; an unbounded one (theta) is 2^-s throughout."""
    if unbounded:
        return np.exp2(-s)
    return np.where(s >= 0, np.exp2(-np.maximum(s, 0)), 1 - np.exp2(np.where(s < 0, s, -1)))


def _log_power(s: Array, unbounded: bool) -> Array:
    """Return the log of the gate at coordinate s, right however near the gate is to 1."""
    if unbounded:
        return -s * math.log(2)
    return np.where(s >= 0, -np.maximum(s, 0) * math.log(2), np.log1p(-np.exp2(np.where(s < 0, s, -1))))


def _to(x: Array, dtype: torch.dtype) -> Tensor:
    return torch.tensor(x).to(dtype)


def _hexadecimal(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _hexadecimal(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_hexadecimal(item) for item in value]
    return value.hex() if isinstance(value, float) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _float(value: str | float) -> float:
    return float.fromhex(value) if isinstance(value, str) else float(value)

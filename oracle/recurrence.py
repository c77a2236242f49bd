"""The definition, token by token: equations (1) to (6) of titans/README.md in high precision."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch import Tensor

from oracle.formats import (
    AGREED_DIGITS,
    MOST_DIGITS,
    RESTING_DIGITS,
    Arithmetic,
    Number,
    Numbers,
    doubles,
    elementwise,
    evaluate,
)

Vector = list[Number]
# A list of columns, because the definition multiplies from the left: (x M)_j is x times column j.
Matrix = list[Vector]


@dataclass(frozen=True)
class Inputs:
    """What the op was given, as torch tensors of any float dtype on any device.

    Parameters
    ----------
    q, k, v : Tensor, shape (B, T, H, D)
    w, b : Tensor, shape (H, D), or None
        Both None: the plain memory.
    theta, alpha, eta : Tensor, shape (B, T, H)
        With `log_gates`: log theta, log(1 - alpha) and log eta, where -inf is the exact zero.
    eps : float
        Enters as the float64 that it is.
    chunk_size : int
    M, S, anchor : Tensor, shape (N, H, D, D), or None
        Initial state. M and S default to zero; an anchor of None is the same variable as M.
    offset : tuple of N int, or None
        Tokens already consumed of the running chunk; None means 0.
    cu_seqlens : tuple of N + 1 int, or None
        Bounds of packed sequences (B = 1); None means N = B sequences of T tokens.
    log_gates : bool
    """

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor | None
    b: Tensor | None
    theta: Tensor
    alpha: Tensor
    eta: Tensor
    eps: float = 1e-6
    chunk_size: int = 16
    M: Tensor | None = None
    S: Tensor | None = None
    anchor: Tensor | None = None
    offset: tuple[int, ...] | None = None
    cu_seqlens: tuple[int, ...] | None = None
    log_gates: bool = False

    @property
    def sequences(self) -> list[tuple[int, int, int]]:
        """Batch row, first token and end of each of the N sequences."""
        B, T = self.q.shape[:2]
        if self.cu_seqlens is None:
            return [(row, 0, T) for row in range(B)]
        return [(0, start, end) for start, end in pairwise(self.cu_seqlens)]

    @property
    def offsets(self) -> tuple[int, ...]:
        """`offset`, or its default."""
        return (0,) * len(self.sequences) if self.offset is None else self.offset

    @property
    def start_digits(self) -> int:
        """Precision of the first run: more than the usual where the inputs span more decades than that."""
        given = [self.q, self.k, self.v, self.w, self.b, self.M, self.S, self.anchor]
        if not self.log_gates:
            given += [self.theta, self.alpha, self.eta]
        sizes = np.concatenate(
            [np.abs(doubles(x)).ravel() for x in given if x is not None] + [np.array([1.0, self.eps])]
        )
        logs = np.log10(sizes[sizes > 0])
        # At most an eighth of the limit, so that three doublings remain.
        return min(max(RESTING_DIGITS, AGREED_DIGITS + math.ceil(float(np.ptp(logs)))), MOST_DIGITS // 8)


@dataclass(frozen=True)
class State:
    """State after the last token: M, S, anchor of shape (N, H, D, D), and N offsets."""

    M: Numbers
    S: Numbers
    anchor: Numbers
    offset: tuple[int, ...]


@dataclass(frozen=True)
class Output:
    """Outputs o, shape (B, T, H, D), and the final state."""

    o: Numbers
    state: State


def check(inputs: Inputs) -> None:
    """Raise a ValueError that names the argument if a value is not finite or the parts contradict each other."""
    B, T, H, D = inputs.q.shape
    N, C, bounds = len(inputs.sequences), inputs.chunk_size, inputs.cu_seqlens
    if (inputs.w is None) != (inputs.b is None):
        raise ValueError("`w` and `b` must be given together")
    if C < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {C}")
    if not (math.isfinite(inputs.eps) and inputs.eps >= 0):
        raise ValueError(f"`eps` must be finite and not negative, got {inputs.eps}")
    if bounds is not None and (B != 1 or bounds[0] != 0 or bounds[-1] != T or list(bounds) != sorted(bounds)):
        raise ValueError(f"`cu_seqlens` must rise from 0 to T = {T} with B = 1, got {bounds} with B = {B}")
    if len(inputs.offsets) != N or not all(0 <= offset < C for offset in inputs.offsets):
        raise ValueError(f"`offset` must hold N = {N} numbers from 0 to {C - 1}, got {inputs.offset}")
    for names, shape in (
        (("q", "k", "v"), (B, T, H, D)),
        (("w", "b"), (H, D)),
        (("theta", "alpha", "eta"), (B, T, H)),
        (("M", "S", "anchor"), (N, H, D, D)),
    ):
        for name in names:
            check_tensor(name, getattr(inputs, name), shape, inputs.log_gates and name in ("theta", "alpha", "eta"))


def check_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...], is_log_gate: bool = False) -> None:
    """Raise a ValueError unless the tensor has this shape and only finite values (or the -inf of a log gate)."""
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}")
    x = doubles(tensor)
    wrong = ~np.isfinite(x) & ~(is_log_gate & np.isneginf(x))
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        rule = "finite or -inf" if is_log_gate else "finite"
        raise ValueError(f"`{name}` must be {rule}, got {x[index]} at {index}")


class Given:
    """`Inputs` as numbers of one precision, with the gates theta, a = 1 - alpha and eta."""

    def __init__(self, inputs: Inputs, numbers: Arithmetic) -> None:
        def exactly(x: Tensor) -> Numbers:
            return elementwise(numbers.number, doubles(x))

        def state(x: Tensor | None) -> Numbers:
            return np.full((N, H, D, D), numbers.number(0.0)) if x is None else exactly(x)

        N, (H, D) = len(inputs.sequences), inputs.q.shape[2:]
        self.q, self.k, self.v = exactly(inputs.q), exactly(inputs.k), exactly(inputs.v)
        self.w = None if inputs.w is None else exactly(inputs.w)
        self.b = None if inputs.b is None else exactly(inputs.b)
        theta, alpha, eta = exactly(inputs.theta), exactly(inputs.alpha), exactly(inputs.eta)
        if inputs.log_gates:
            self.theta, self.a, self.eta = (elementwise(numbers.exp, x) for x in (theta, alpha, eta))
        else:
            self.theta, self.a, self.eta = theta, 1 - alpha, eta
        self.M, self.S = state(inputs.M), state(inputs.S)
        self.anchor = self.M if inputs.anchor is None else exactly(inputs.anchor)
        self.eps = numbers.number(inputs.eps)


class Norm(NamedTuple):
    """norm(y) = x and what it was made of: s = y - mean y, r = 1 / sqrt(var y + eps), x = s r."""

    s: Vector
    r: Number
    x: Vector


class Inner(NamedTuple):
    """Eq. (2): w, the norm of k A, the residual g of the loss, e = g w, c = mean(e x), p = u / r, and u."""

    w: Vector
    norm: Norm
    g: Vector
    e: Vector
    c: Number
    p: Vector
    u: Vector


class Step(NamedTuple):
    """One token: everything that eqs. (2) to (6) made of it, and the state before it."""

    M_before: Matrix
    S_before: Matrix
    anchor: Matrix
    inner: Inner | None  # None: plain memory
    u: Vector
    M: Matrix
    read: Norm | None  # norm of q M
    o: Vector
    completes_chunk: bool


@dataclass(frozen=True)
class Run:
    """One head of one sequence: its tokens, and the state after them."""

    steps: list[Step]
    M: Matrix
    S: Matrix
    anchor: Matrix
    offset: int


def product(x: Vector, M: Matrix, numbers: Arithmetic) -> Vector:
    """X M."""
    return [numbers.dot(x, column) for column in M]


def outer(x: Vector, y: Vector) -> Matrix:
    """x^T y."""
    return [[x_i * y_j for x_i in x] for y_j in y]


def combine(scale: Number, X: Matrix, Y: Matrix) -> Matrix:
    """Scale X + Y."""
    return [[scale * x_i + y_i for x_i, y_i in zip(x, y, strict=True)] for x, y in zip(X, Y, strict=True)]


def mean(x: Vector) -> Number:
    """Mean over the entries."""
    return sum(x) / len(x)


def centred(x: Vector) -> Vector:
    """X - mean x, taken of x - x_0: the same value, and exactly 0 where all entries are equal."""
    shifted = [entry - x[0] for entry in x]
    middle = mean(shifted)
    return [entry - middle for entry in shifted]


def norm(y: Vector, eps: Number, numbers: Arithmetic) -> Norm:
    """norm(y) of SPEC section 2."""
    s = centred(y)
    r = 1 / numbers.sqrt(numbers.dot(s, s) / len(s) + eps)
    return Norm(s, r, [entry * r for entry in s])


def inner_gradient(y: Vector, k: Vector, v: Vector, w: Vector, b: Vector, eps: Number, numbers: Arithmetic) -> Inner:
    """Eq. (2) at y = k A, normalised memory."""
    normed = norm(y, eps, numbers)
    g = [x_i * w_i + b_i - (v_i - k_i) for x_i, w_i, b_i, v_i, k_i in zip(normed.x, w, b, v, k, strict=True)]
    e = [g_i * w_i for g_i, w_i in zip(g, w, strict=True)]
    c = numbers.dot(e, normed.x) / len(e)
    p = [e_i - x_i * c for e_i, x_i in zip(centred(e), normed.x, strict=True)]
    return Inner(w, normed, g, e, c, p, [normed.r * p_i for p_i in p])


def run_head(given: Given, inputs: Inputs, n: int, h: int, numbers: Arithmetic) -> Run:
    """Carry one head through its sequence by eqs. (2) to (6)."""
    row, start, end = inputs.sequences[n]
    offset = inputs.offsets[n]
    M, S, anchor = columns(given.M[n, h]), columns(given.S[n, h]), columns(given.anchor[n, h])
    steps = []
    for t in range(start, end):
        q, k, v = (list(x[row, t, h]) for x in (given.q, given.k, given.v))
        theta, a, eta = given.theta[row, t, h], given.a[row, t, h], given.eta[row, t, h]
        y = product(k, anchor, numbers)
        inner = None
        if given.w is None or given.b is None:
            u = [y_i - v_i for y_i, v_i in zip(y, v, strict=True)]
        else:
            w, b = list(given.w[h]), list(given.b[h])
            inner = inner_gradient(y, k, v, w, b, given.eps, numbers)
            u = inner.u
        M_before, S_before = M, S
        # Eqs. (3) and (4).
        S = combine(eta, S, outer(k, [-2 * theta * u_j for u_j in u]))
        M = combine(a, M, S)
        # Eq. (5).
        read = None
        o = product(q, M, numbers)
        if inner is not None:
            read = norm(o, given.eps, numbers)
            o = [o_i + x_i * w_i + b_i for o_i, x_i, w_i, b_i in zip(o, read.x, w, b, strict=True)]
        offset = (offset + 1) % inputs.chunk_size
        steps.append(Step(M_before, S_before, anchor, inner, u, M, read, o, offset == 0))
        # Eq. (6).
        if offset == 0:
            anchor = M
    return Run(steps, M, S, anchor, offset)


def columns(M: Numbers) -> Matrix:
    """(D, D) array to list of columns."""
    return [list(column) for column in M.T]


def heads(inputs: Inputs) -> Iterator[tuple[int, int]]:
    """Every (sequence, head)."""
    return iter(np.ndindex(len(inputs.sequences), inputs.q.shape[2]))


def collect(runs: Mapping[tuple[int, int], Run], inputs: Inputs) -> dict[str, Numbers]:
    """Put the runs of all heads together: o (B, T, H, D); M, S, anchor (N, H, D, D)."""
    N, (H, D) = len(inputs.sequences), inputs.q.shape[2:]
    o = np.empty(inputs.q.shape, dtype=object)
    M, S, anchor = (np.empty((N, H, D, D), dtype=object) for _ in range(3))
    for (n, h), run in runs.items():
        row, start, end = inputs.sequences[n]
        for t, step in zip(range(start, end), run.steps, strict=True):
            o[row, t, h] = step.o
        for array, matrix in ((M, run.M), (S, run.S), (anchor, run.anchor)):
            array[n, h].T[...] = matrix
    return {"o": o, "M": M, "S": S, "anchor": anchor}


def output(results: Mapping[str, Numbers], inputs: Inputs) -> Output:
    """Build an `Output` from the collected arrays."""
    lengths = [end - start for _, start, end in inputs.sequences]
    offset = tuple((r + T) % inputs.chunk_size for r, T in zip(inputs.offsets, lengths, strict=True))
    return Output(results["o"], State(results["M"], results["S"], results["anchor"], offset))


def forward(inputs: Inputs, digits: int | None = None) -> Output:
    """Outputs and final state, exactly, by eqs. (2) to (6).

    Parameters
    ----------
    inputs : Inputs
    digits : int or None
        Decimal digits of a single run; None chooses them and confirms at twice as many.

    Returns
    -------
    Output

    Raises
    ------
    Unsettled
        If the values do not settle (only where `digits` is None).
    ValueError
        If a value is not finite (-inf in a log gate is all right) or the inputs contradict each other.
    """
    check(inputs)

    def run(numbers: Arithmetic) -> dict[str, Numbers]:
        given = Given(inputs, numbers)
        return collect({(n, h): run_head(given, inputs, n, h, numbers) for n, h in heads(inputs)}, inputs)

    return output(evaluate(run, inputs.start_digits, digits), inputs)

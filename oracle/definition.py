"""The definition for one head of one sequence, token by token: equations (2) to (6), as numbered in titans/README.md.

Arrays hold the numbers of one engine, so that + - * / and @ are rounded to its precision. Vectors are rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from oracle.precision import Number, Numbers


@dataclass(frozen=True)
class Head:
    """One head of one sequence of T tokens.

    Parameters
    ----------
    q, k, v : Numbers, shape (T, D)
    w, b : Numbers, shape (D,), or None
        Both None: the plain memory.
    theta, a, eta : Numbers, shape (T,)
        Linear gates, a = 1 - alpha.
    M, S : Numbers, shape (D, D)
        Initial state.
    anchor : Numbers, shape (D, D), or None
        None: the same variable as M.
    eps : Number
    sqrt : callable
        The engine's square root of a number.
    chunk_size, offset : int
        Tokens of a chunk, and how many of the running chunk came before.
    """

    q: Numbers
    k: Numbers
    v: Numbers
    w: Numbers | None
    b: Numbers | None
    theta: Numbers
    a: Numbers
    eta: Numbers
    M: Numbers
    S: Numbers
    anchor: Numbers | None
    eps: Number
    sqrt: Callable[[Number], Number]
    chunk_size: int
    offset: int

    def completes_chunk(self, t: int) -> bool:
        """Whether token t, counted from 0, is the last one of a chunk."""
        return (self.offset + t + 1) % self.chunk_size == 0


class Norm(NamedTuple):
    """s = y - mean y, r = 1 / sqrt(var y + eps), and x = norm(y) = s r."""

    s: Numbers
    r: Number
    x: Numbers


class Inner(NamedTuple):
    """The lines of eq. (2): norm of k A, the residual z of the loss, e = z w, c = mean(e x), p = u / r, and u."""

    norm: Norm
    z: Numbers
    e: Numbers
    c: Number
    p: Numbers
    u: Numbers


class HeadState(NamedTuple):
    """M, S and the anchor A before or after a token."""

    M: Numbers
    S: Numbers
    A: Numbers


class Token(NamedTuple):
    """Inner gradient, norm of q M, and output of a token; `inner` and `read` are None in the plain memory."""

    inner: Inner | None
    u: Numbers
    read: Norm | None
    o: Numbers


def mean(x: Numbers) -> Number:
    """Mean of the entries."""
    return x.sum() / len(x)


def centred(x: Numbers) -> Numbers:
    """x - mean x, computed from x - x_0: the same value, and exactly 0 where all entries are equal."""
    shifted = x - x[0]
    deviation: Numbers = shifted - mean(shifted)
    return deviation


def norm(y: Numbers, head: Head) -> Norm:
    """norm(y) = (y - mean y) / sqrt(var y + eps)."""
    s = centred(y)
    r = 1 / head.sqrt(mean(s * s) + head.eps)
    return Norm(s, r, s * r)


def inner_gradient(y: Numbers, k: Numbers, v: Numbers, w: Numbers, b: Numbers, head: Head) -> Inner:
    """Eq. (2) of the normalised memory, at y = k A."""
    normed = norm(y, head)
    x = normed.x
    z = x * w + b - (v - k)
    e = z * w
    c = mean(e * x)
    p = centred(e) - x * c
    return Inner(normed, z, e, c, p, u=normed.r * p)


def run(head: Head) -> tuple[list[Token], list[HeadState]]:
    """Eqs. (2) to (6).

    Returns
    -------
    tokens : list of T Token
    states : list of T + 1 HeadState
        states[t] is the state before token t, counted from 0; the last one is the final state.
    """
    M, S, w, b = head.M, head.S, head.w, head.b
    A = M if head.anchor is None else head.anchor
    tokens, states = [], [HeadState(M, S, A)]
    for t, (q, k, v) in enumerate(zip(head.q, head.k, head.v, strict=True)):
        if w is None or b is None:
            inner, u = None, k @ A - v  # (2)
        else:
            inner = inner_gradient(k @ A, k, v, w, b, head)
            u = inner.u
        S = head.eta[t] * S - np.outer(k, 2 * head.theta[t] * u)  # (3)
        M = head.a[t] * M + S  # (4)
        read, o = None, q @ M  # (5)
        if w is not None and b is not None:
            read = norm(o, head)
            o = o + read.x * w + b
        if head.completes_chunk(t):
            A = M  # (6)
        tokens.append(Token(inner, u, read, o))
        states.append(HeadState(M, S, A))
    return tokens, states

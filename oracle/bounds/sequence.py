"""Bounds for whole calls: the pieces of every sequence one after the other, storage, and sums over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oracle.bounds.ball import Array, Ball, ball
from oracle.bounds.error_model import ErrorModel
from oracle.bounds.gates import gates, log_growth
from oracle.bounds.piece import OPERANDS, Piece, PieceGradient, TokenBalls, reverse_piece, run_piece
from oracle.bounds.plain import Errors, transition
from oracle.inputs import Cotangents, Inputs

# Of the gradient of a log gate beyond that of the gate: exp is good to 4 units, and their product. (B7)
LOG_GATE_ROUNDINGS = 5


@dataclass(frozen=True)
class Radius:
    """Radii of o, shape (B, T, H, D), and of the final M, S, anchor, shape (N, H, D, D); inf: nothing is promised."""

    o: Array
    M: Array
    S: Array
    anchor: Array


@dataclass(frozen=True)
class GradientRadius:
    """Radii of the gradients, shaped like `oracle.Gradient`."""

    q: Array
    k: Array
    v: Array
    w: Array | None
    b: Array | None
    theta: Array
    alpha: Array
    eta: Array
    M: Array
    S: Array
    anchor: Array


def forward_radius(inputs: Inputs, arithmetic: ErrorModel) -> Radius:
    """Radii of the outputs and the final state: bounds (B2) to (B5), composed over the pieces of each sequence.

    Parameters
    ----------
    inputs : Inputs
    arithmetic : ErrorModel
        As `arithmetic_for(inputs.q.dtype)` gives it for the PyTorch backends.

    Returns
    -------
    Radius
    """
    with np.errstate(all="ignore"):
        return _radius([_run(inputs, n, arithmetic) for n in range(len(inputs.sequences))], inputs, arithmetic)


def gradient_radius(inputs: Inputs, cotangents: Cotangents, arithmetic: ErrorModel) -> tuple[Radius, GradientRadius]:
    """Radii of the outputs, as in `forward_radius`, and of the gradients, bounds (B6), (B7) and (B9).

    Parameters
    ----------
    inputs : Inputs
    cotangents : Cotangents
        Of o and of the final state; exact.
    arithmetic : ErrorModel

    Returns
    -------
    Radius, GradientRadius
    """
    with np.errstate(all="ignore"):
        runs = [_run(inputs, n, arithmetic) for n in range(len(inputs.sequences))]
        gradient = _Gradients(inputs, arithmetic)
        for n, run in enumerate(runs):
            gradient.reverse(n, run, cotangents)
        return _radius(runs, inputs, arithmetic), gradient.radius()


@dataclass(frozen=True)
class _Run:
    """One sequence: its pieces with the tokens they span, and the state after them, shape (H, D, D)."""

    row: int
    spans: list[slice]
    pieces: list[Piece]
    M: Ball
    S: Ball
    anchor: Ball
    refreshed: bool


def _run(inputs: Inputs, n: int, arithmetic: ErrorModel) -> _Run:
    row = inputs.sequences[n][0]
    M, S = (_state(x, inputs, n, arithmetic) for x in (inputs.M, inputs.S))
    anchor = M if inputs.anchor is None else _state(inputs.anchor, inputs, n, arithmetic)
    spans = list(_spans(inputs, n))
    pieces: list[Piece] = []
    errors, chunks = None, arithmetic.chunks(inputs.chunk_size)
    for span in spans:
        if pieces:
            anchor = M
        pieces.append(run_piece(_tokens(inputs, row, span, arithmetic), M, S, anchor, arithmetic))
        M, S = pieces[-1].M_T, pieces[-1].S_T
        if errors is not None:
            M, S = errors.carry(*transition(pieces[-1].tokens), M, S)
        elif inputs.w is None:
            errors = Errors(M, S)
        if len(pieces) % chunks:
            M, S = M.within(pieces[-1].M[:, -1]), S.within(pieces[-1].S[:, -1])
    length = inputs.sequences[n][2] - inputs.sequences[n][1]
    refreshed = length > 0 and (inputs.offsets[n] + length) % inputs.chunk_size == 0
    return _Run(row, spans, pieces, M, S, M if refreshed else anchor, refreshed)


def _spans(inputs: Inputs, n: int) -> Iterator[slice]:
    """The pieces of a sequence: the rest of the running chunk, then chunks."""
    _, start, end = inputs.sequences[n]
    room = inputs.chunk_size - inputs.offsets[n]
    while start < end:
        yield slice(start, min(start + room, end))
        start, room = start + room, inputs.chunk_size


def _tokens(inputs: Inputs, row: int, span: slice, arithmetic: ErrorModel) -> TokenBalls:
    def rows(x: Tensor) -> Ball:
        return arithmetic.argument(x[row, span].transpose(0, 1))  # (H, L, D)

    def per_head(x: Tensor | None) -> Ball | None:
        return None if x is None else arithmetic.argument(x[:, None, :])

    L = span.stop - span.start
    theta, a, eta = gates(inputs, row, span, arithmetic)
    # (B3): the rounding of 1 - alpha, a product and a sum; exp is good to 4 units, beside the error of its argument.
    per_token = 3 + 4 * inputs.log_gates + (log_growth(L) if arithmetic.log_space else 0.0)
    return TokenBalls(
        rows(inputs.q), rows(inputs.k), rows(inputs.v), per_head(inputs.w), per_head(inputs.b),
        theta, a, eta, inputs.eps, per_token,
    )  # fmt: skip


def _state(x: Tensor | None, inputs: Inputs, n: int, arithmetic: ErrorModel) -> Ball:
    H, D = inputs.q.shape[2:]
    return ball(np.zeros((H, D, D))) if x is None else arithmetic.argument(x[n])


def _stored(x: Ball, like: Tensor | None, arithmetic: ErrorModel) -> Array:
    """Radius of a result in the dtype it is returned in, that of `like`; a narrow format keeps its subnormals."""
    if like is None or torch.finfo(like.dtype).eps / 2 <= arithmetic.unit:
        return x.rad
    narrow = torch.finfo(like.dtype)
    size = np.abs(x.mid) + x.rad
    return np.where(size < narrow.max, x.rad + narrow.eps / 2 * size + narrow.tiny * narrow.eps, np.inf)


def _radius(runs: list[_Run], inputs: Inputs, arithmetic: ErrorModel) -> Radius:
    N, (H, D) = len(runs), inputs.q.shape[2:]
    o = np.zeros(inputs.q.shape)
    M, S, anchor = (np.zeros((N, H, D, D)) for _ in range(3))
    for n, run in enumerate(runs):
        for span, piece in zip(run.spans, run.pieces, strict=True):
            o[run.row, span] = _stored(piece.o, inputs.q, arithmetic).swapaxes(0, 1)
        M[n], S[n], anchor[n] = run.M.rad, run.S.rad, run.anchor.rad
    return Radius(o, M, S, anchor)


class _Gradients:
    """The radii of the gradients, filled sequence by sequence."""

    def __init__(self, inputs: Inputs, arithmetic: ErrorModel) -> None:
        B, T, H, D = inputs.q.shape
        N = len(inputs.sequences)
        self.inputs, self.arithmetic = inputs, arithmetic
        self.tokens = {name: np.zeros((B, T, H, D)) for name in "qkv"}
        self.tokens |= {name: np.zeros((B, T, H)) for name in ("theta", "alpha", "eta")}
        self.states = {name: np.zeros((N, H, D, D)) for name in ("M", "S", "anchor")}
        self.w = self.b = ball(np.zeros((H, D)))

    def reverse(self, n: int, run: _Run, cotangents: Cotangents) -> None:
        """Bounds (B7), from the last piece of a sequence to its first."""
        rounded, inputs = self.arithmetic.rounded, self.inputs
        dM, dS, dA = (_state(x, inputs, n, self.arithmetic) for x in (cotangents.M, cotangents.S, cotangents.anchor))
        if run.refreshed:
            dM, dA = rounded(dM + dA, 1), ball(np.zeros_like(dA.mid))
        errors = Errors(dM, dS) if inputs.w is None else None
        for i in reversed(range(len(run.pieces))):
            span, piece = run.spans[i], run.pieces[i]
            do = self.arithmetic.argument(cotangents.o[run.row, span].transpose(0, 1))
            back = reverse_piece(piece, do, dM, dS, self.arithmetic)
            self._store(run.row, span, piece, back)
            count = piece.tokens.state_roundings
            dM, dS, dA = back.M, rounded(back.S, count, OPERANDS), back.anchor + dA
            if i > 0 or inputs.anchor is None:
                dM, dA = dM + dA, ball(np.zeros_like(dA.mid))
            whole = dM, back.S
            dM, dA = rounded(dM, count, OPERANDS), rounded(dA, count, OPERANDS)
            if errors is not None and (i > 0 or inputs.anchor is None):
                # the adjoint of the transition is its transpose
                signed, absolute = (x.swapaxes(-1, -2) for x in transition(piece.tokens))
                dM, dS = errors.carry(signed, absolute, dM, dS)
            if i % self.arithmetic.chunks(inputs.chunk_size):
                dM, dS = (x.within(polynomial) for x, polynomial in zip((dM, dS), whole, strict=True))
        if not run.pieces and inputs.anchor is None:
            dM, dA = rounded(dM + dA, 1), ball(np.zeros_like(dA.mid))
        for name, x in (("M", dM), ("S", dS), ("anchor", dA)):
            self.states[name][n] = _stored(x, getattr(inputs, name), self.arithmetic)

    def _store(self, row: int, span: slice, piece: Piece, back: PieceGradient) -> None:
        inputs, tokens = self.inputs, piece.tokens
        dgates = {"theta": back.theta, "alpha": back.a, "eta": back.eta}
        if inputs.log_gates:
            factors = (tokens.theta, tokens.a, tokens.eta)
            dgates = {
                name: self.arithmetic.rounded(gate * factor, LOG_GATE_ROUNDINGS)
                for (name, gate), factor in zip(dgates.items(), factors, strict=True)
            }
        for name, x in ({"q": back.q, "k": back.k, "v": back.v}).items():
            self.tokens[name][row, span] = _stored(x, getattr(inputs, name), self.arithmetic).swapaxes(0, 1)
        for name, x in dgates.items():
            self.tokens[name][row, span] = _stored(x, getattr(inputs, name), self.arithmetic)[..., 0, 0].T
        if back.w is not None and back.b is not None:
            self.w += back.w.map(lambda x: x.sum(1))
            self.b += back.b.map(lambda x: x.sum(1))

    def radius(self) -> GradientRadius:
        """All radii, once every sequence is done: w and b are sums over all tokens, bound (B9)."""
        count = 3 * self.inputs.q.shape[0] * self.inputs.q.shape[1] + 4
        w = b = None
        if self.inputs.w is not None and self.inputs.b is not None:
            w = _stored(self.arithmetic.rounded(self.w, count), self.inputs.w, self.arithmetic)
            b = _stored(self.arithmetic.rounded(self.b, count), self.inputs.b, self.arithmetic)
        return GradientRadius(w=w, b=b, **self.tokens, **self.states)

"""Bounds for one piece of a sequence, forward and backward, all heads at once; (B1) to (B9) are in oracle/README.md."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oracle.bounds.ball import Array, Ball, ball, outer, stack
from oracle.bounds.error_model import ErrorModel


@dataclass(frozen=True)
class TokenBalls:
    """The tokens of one piece: q, k, v (H, L, D); w, b (H, 1, D) or None; gates (H, L, 1, 1).

    `per_token` is the most roundings that one token adds to a product of gates, as (B3) counts them.
    """

    q: Ball
    k: Ball
    v: Ball
    w: Ball | None
    b: Ball | None
    theta: Ball
    a: Ball
    eta: Ball
    eps: float
    per_token: float

    @property
    def length(self) -> int:
        """Number of tokens L."""
        return int(self.q.mid.shape[1])

    @property
    def width(self) -> int:
        """Head width D."""
        return int(self.q.mid.shape[2])

    @property
    def state_roundings(self) -> float:
        """Of a state or its cotangent across the piece: a coefficient, its products, and a sum over L tokens."""
        return (self.per_token + 1) * self.length + 8

    @property
    def row_roundings(self) -> Array:
        """Of y_t, shape (L, 1): as across t tokens, and a dot of length D."""
        t = np.arange(1.0, self.length + 1)[:, None]
        return (self.per_token + 1) * t + self.width + 8

    @property
    def gate_roundings(self) -> float:
        """Of a gate's cotangent: two coefficients that share the piece, and two dots, or a sum over a whole D x D."""
        D = self.width
        return (self.per_token + 1) * self.length + max(2 * D, min(D * D, 2 * D + 16)) + 10


# The most operands of dots in one term: q or k, and computed ones. In k A: k, and A;
RECALL = (1, 1)
# in a state, an output, or the cotangent of a gate, a state or u: q, k, and u (or dy) and the weight G_tj (q . k);
OPERANDS = (2, 2)
# in the cotangent of q or k: k or q, and u, dy and the weight G_tj (u . dy).
OPERANDS_OF_ROWS = (1, 3)


@dataclass(frozen=True)
class NormBalls:
    """norm(y) = x: the centred y, r = 1 / sqrt(var y + eps), and x."""

    centred: Ball
    r: Ball
    x: Ball


@dataclass(frozen=True)
class InnerBalls:
    """The lines of eq. (2): norm of y, z = x w + b - (v - k), e = z w, c = mean(e x), p = u / r, and u."""

    norm: NormBalls
    z: Ball
    e: Ball
    c: Ball
    p: Ball
    u: Ball


@dataclass(frozen=True)
class Piece:
    """One piece, run: states M, S before the piece and after each token (H, L + 1, D, D), u, y, o (H, L, D)."""

    tokens: TokenBalls
    anchor: Ball
    M: Ball
    S: Ball
    inner: InnerBalls | None
    u: Ball
    read: NormBalls | None
    o: Ball
    M_T: Ball
    S_T: Ball


@dataclass(frozen=True)
class PieceGradient:
    """Cotangents of the tokens of a piece, shaped like these (w and b unsummed, (H, L, D)), and of M, S and anchor."""

    q: Ball
    k: Ball
    v: Ball
    w: Ball | None
    b: Ball | None
    theta: Ball
    a: Ball
    eta: Ball
    M: Ball
    S: Ball
    anchor: Ball


def norm(y: Ball, eps: float, arithmetic: ErrorModel) -> NormBalls:
    """norm(y), bound (B5)."""
    rounded, D = arithmetic.rounded, y.mid.shape[-1]
    centred = rounded(y.centred(), _centring(D))
    variance = rounded((centred * centred).mean(), D + 2)
    r = _rsqrt(variance, eps, arithmetic)
    return NormBalls(centred, r, rounded(centred * r, 1))


def _centring(D: int) -> int:
    """Roundings of x - mean x and two more sums. Nothing is rounded where D = 1: x - x / 1 is 0."""
    return D + 4 if D > 1 else 0


def _rsqrt(variance: Ball, eps: float, arithmetic: ErrorModel) -> Ball:
    """1 / sqrt(variance + eps), bound (B4): the steepest chord of length `rad` that the variance allows."""
    low = np.maximum(variance.mid - 2 * variance.rad, 0) + eps
    high = low + variance.rad
    # 1/sqrt(low) - 1/sqrt(high) without cancellation
    chord = variance.rad / (np.sqrt(low) * np.sqrt(high) * (np.sqrt(low) + np.sqrt(high)))
    r = ball(1 / np.sqrt(np.maximum(variance.mid, 0) + eps), np.where(variance.rad > 0, chord, 0))
    return arithmetic.rounded(r, 6)


def norm_vjp(norm: NormBalls, dx: Ball, dr: Ball, arithmetic: ErrorModel) -> Ball:
    """Cotangent of y before its last rounding, given those of x = norm(y) and of r beyond x, bound (B6)."""

    def rounded(x: Ball, count: int) -> Ball:
        # another order may round the terms of x further before it adds them, and then they cancel
        return arithmetic.rounded(x, count).with_terms_of(x)

    D, r = dx.mid.shape[-1], norm.r
    total = rounded((dx * norm.centred).sum() + dr, D + 2)
    slope = rounded(total * (r * r * r), 6)
    through_x, through_r = rounded(dx * r, 5), rounded((norm.centred * slope).times(1 / D), 5)
    return through_x.centred() - through_r.centred_or_not()


def inner_gradient(y: Ball, tokens: TokenBalls, w: Ball, b: Ball, arithmetic: ErrorModel) -> InnerBalls:
    """Eq. (2) at y = k A for the normalised memory, bound (B5)."""
    rounded, D = arithmetic.rounded, tokens.width
    normed = norm(y, tokens.eps, arithmetic)
    z = rounded(normed.x * w + b - tokens.v + tokens.k, 4)
    e = rounded(z * w, 1)
    c = rounded((e * normed.x).mean(), D + 2)
    p = rounded(e.centred() - normed.x * c, _centring(D))
    return InnerBalls(normed, z, e, c, p, rounded(normed.r * p, 1))


def inner_gradient_vjp(inner: InnerBalls, w: Ball, du: Ball, arithmetic: ErrorModel) -> tuple[Ball, Ball, Ball]:
    """Cotangents of y and of z, and that of w unsummed, by the reverse of `inner_gradient`, bound (B6)."""
    rounded, D, x = arithmetic.rounded, du.mid.shape[-1], inner.norm.x
    dr = (du * inner.p).sum()
    dp = rounded(du * inner.norm.r, 1)
    dc = -rounded((dp * x).mean(), D + 2)
    de = rounded(dp.centred() + dc * x, _centring(D))
    dz = rounded(de * w, 1)
    dx = rounded(dc * inner.e - dp * inner.c + dz * w, 4)
    dy = rounded(norm_vjp(inner.norm, dx, dr, arithmetic), _centring(D))
    return dy, dz, de * inner.z + dz * x


def run_piece(tokens: TokenBalls, M: Ball, S: Ball, anchor: Ball, arithmetic: ErrorModel) -> Piece:
    """Eqs. (2) to (5) over one piece: bounds (B2) of its states and outputs.

    M, S and anchor, shape (H, D, D), are the state that enters it.
    """
    rounded, w, b = arithmetic.rounded, tokens.w, tokens.b
    y = tokens.k @ anchor
    inner = None
    if w is None or b is None:
        u = rounded(y - tokens.v, tokens.width + 1, RECALL)
    else:
        inner = inner_gradient(rounded(y, tokens.width, RECALL), tokens, w, b, arithmetic)
        u = inner.u
    kicks = (tokens.theta * outer(tokens.k, u)).times(2)
    memories, momenta = [M], [S]
    for t in range(tokens.length):
        S = tokens.eta[:, t] * S - kicks[:, t]  # (3)
        M = tokens.a[:, t] * M + S  # (4)
        memories.append(M)
        momenta.append(S)
    states = stack(memories, 1)
    y = rounded((tokens.q[..., None, :] @ states[:, 1:])[..., 0, :], tokens.row_roundings, OPERANDS)
    read, o = None, y
    if w is not None and b is not None:
        read = norm(y, tokens.eps, arithmetic)
        o = rounded(y + read.x * w + b, 3)
    M_T, S_T = (rounded(x, tokens.state_roundings, OPERANDS) for x in (M, S))
    return Piece(tokens, anchor, states, stack(momenta, 1), inner, u, read, o, M_T, S_T)


def reverse_piece(piece: Piece, do: Ball, dM: Ball, dS: Ball, arithmetic: ErrorModel) -> PieceGradient:
    """The adjoint of `run_piece`, bounds (B7).

    do, shape (H, L, D), is the cotangent of o; dM and dS, shape (H, D, D), those of the state that leaves the piece.
    The cotangent of the anchor leaves out the part through M, where the anchor is the M that enters the piece.
    """
    tokens, rounded = piece.tokens, arithmetic.rounded
    q, k, w = tokens.q, tokens.k, tokens.w
    dy = do
    if piece.read is not None and w is not None:
        dx = rounded(do * w, 1)
        no_dr = ball(np.zeros_like(dx.mid[..., :1]))
        # do may be added before the mean is taken away, so that D = 1 is no exception here
        dy = rounded(do + norm_vjp(piece.read, dx, no_dr, arithmetic), tokens.width + 4)

    reads = outer(q, dy)
    towards_M, towards_S = [], []
    for t in reversed(range(tokens.length)):
        dM = dM + reads[:, t]
        dS = dS + dM
        towards_M.append(dM)
        towards_S.append(dS)
        dM = tokens.a[:, t] * dM
        dS = tokens.eta[:, t] * dS
    dM_t, dS_t = stack(towards_M[::-1], 1), stack(towards_S[::-1], 1)  # (H, L, D, D)

    k_dS = (k[..., None, :] @ dS_t)[..., 0, :].times(-2)
    theta = tokens.theta[..., 0]
    roundings = tokens.row_roundings[::-1]
    du = rounded(theta * k_dS, roundings, OPERANDS)
    dk = theta * (dS_t @ piece.u[..., None])[..., 0].times(-2)
    dw = db = None
    if piece.inner is None or piece.read is None or w is None:
        d_recall, dv = du, -du
    else:
        d_recall, dz, dw = inner_gradient_vjp(piece.inner, w, du, arithmetic)
        dk, dv = dk + dz, -dz
        dw, db = dw + do * piece.read.x, dz + do
    dk = rounded(dk + d_recall @ piece.anchor.mT, roundings + 2, OPERANDS_OF_ROWS)

    gates = (
        (k_dS * piece.u).sum()[..., None],
        _inner_product(dM_t, piece.M[:, :-1]),
        _inner_product(dS_t, piece.S[:, :-1]),
    )
    dtheta, da, deta = (rounded(x, tokens.gate_roundings, OPERANDS) for x in gates)
    return PieceGradient(
        q=rounded((piece.M[:, 1:] @ dy[..., None])[..., 0], tokens.row_roundings, OPERANDS_OF_ROWS),
        k=dk, v=dv, w=dw, b=db, theta=dtheta, a=da, eta=deta, M=dM, S=dS, anchor=k.mT @ d_recall,
    )  # fmt: skip


def _inner_product(x: Ball, y: Ball) -> Ball:
    """<x, y> of D x D matrices, shape (..., 1, 1)."""
    return (x * y).map(lambda part: part.sum((-2, -1), keepdims=True))

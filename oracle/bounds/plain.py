"""Errors of the plain memory, carried from piece to piece by its transition with its signs: bound (B10)."""

from __future__ import annotations

import numpy as np

from oracle.bounds.ball import Array, Ball, ball
from oracle.bounds.piece import TokenBalls

# Covers the rounding of the difference below, in float64.
FLOAT64_SLACK = 2.0**-40


def transition(tokens: TokenBalls) -> tuple[Array, Array]:
    """Matrix that takes (M, S) through a piece of the plain memory whose anchor is M, and that of absolute values.

    Returns
    -------
    signed, absolute : Array, shape (H, 2D, 2D)
    """
    k, theta, a, eta = (x.mid for x in (tokens.k, tokens.theta, tokens.a, tokens.eta))
    H, _, D = k.shape
    both = []
    for keys, sign in ((k, -2), (np.abs(k), 2)):
        M = np.broadcast_to(np.eye(D, 2 * D), (H, D, 2 * D))
        S = np.broadcast_to(np.eye(D, 2 * D, D), (H, D, 2 * D))
        kicks = np.zeros((*k.shape, 2 * D))
        kicks[..., :D] = sign * theta * keys[..., :, None] * keys[..., None, :]
        for t in range(k.shape[1]):
            S = eta[:, t] * S + kicks[:, t]
            M = a[:, t] * M + S
        both.append(np.concatenate([M, S], 1))
    return both[0], both[1]


class Errors:
    """Errors of M and S, or of their cotangents, kept apart by the piece in which they arose."""

    def __init__(self, M: Ball, S: Ball) -> None:
        self.rad = np.concatenate([M.rad, S.rad], 1)  # (H, 2D, D)
        self.sources = self.rad[None]
        self.paths = np.broadcast_to(np.eye(self.rad.shape[1]), (1, len(self.rad), *(self.rad.shape[1],) * 2))

    def carry(self, signed: Array, absolute: Array, M: Ball, S: Ball) -> tuple[Ball, Ball]:
        """Replace the radii of M and S at the other end of a piece, where absolute values passed on the earlier errors.

        The rest of these radii arose inside the piece. An earlier error goes through all transitions since, multiplied.
        """
        rad = np.concatenate([M.rad, S.rad], 1)
        new = rad - absolute @ self.rad + FLOAT64_SLACK * rad
        new = np.where(np.isfinite(new), np.maximum(new, 0), np.inf)
        identity = np.broadcast_to(np.eye(rad.shape[1]), (1, len(rad), *(rad.shape[1],) * 2))
        self.paths = np.concatenate([signed @ self.paths, identity])
        self.sources = np.concatenate([self.sources, new[None]])
        # a NaN is 0 times infinity here, and fmin passes it over
        self.rad = np.fmin(rad, (np.abs(self.paths) @ self.sources).sum(0))
        D = M.mid.shape[-1]
        return ball(M.mid, self.rad[:, :D]), ball(S.mid, self.rad[:, D:])

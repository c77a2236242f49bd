"""Bounds for the gates and the chunk coefficients, in linear and in log space."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from oracle.bounds.ball import Array, Ball, ball
from oracle.bounds.error_model import ErrorModel
from oracle.inputs import Inputs

# exp x = 2^(x log2 e) rounds the product, and log2 e itself, which is off by 0.224 u in float32, less in float64: (B3).
EXP_ARGUMENT = 1.23


@dataclass(frozen=True)
class CoefficientsRadius:
    """Radii of beta, m, f, shape (C,), and n, G, shape (C, C), shaped like `oracle.coefficients.Coefficients`."""

    beta: Array
    m: Array
    f: Array
    n: Array
    G: Array


def coefficients_radius(theta: Array, a: Array, eta: Array, arithmetic: ErrorModel) -> CoefficientsRadius:
    """Radii of the chunk coefficients of one piece, bounds (B3) and (B8).

    Parameters
    ----------
    theta, a, eta : Array, shape (C,)
        Linear gates as the stage receives them, a = 1 - alpha.
    arithmetic : ErrorModel

    Returns
    -------
    CoefficientsRadius
    """
    C = len(theta)
    gates = [_gate(np.asarray(x, dtype=np.float64), np.zeros(C), _log(x), C, arithmetic) for x in (theta, a, eta)]
    count = 2 * C + 4 + (log_growth(C) * C if arithmetic.log_space else 0.0)
    # Columns M0, S0, then the tokens, as the rows of G and n are written in titans/README.md.
    start = np.zeros((2, C + 2))
    start[0, 1] = start[1, 0] = 1
    n, G = ball(start[0]), ball(start[1])
    rows_n, rows_G = [], []
    for t in range(C):
        theta_t, a_t, eta_t = (gate[t : t + 1] for gate in gates)
        unit = np.zeros(C + 2)
        unit[t + 2] = 1
        n = n * eta_t + ball(unit) * theta_t
        G = G * a_t + n
        rows_n.append(arithmetic.rounded(n, count).rad)
        rows_G.append(arithmetic.rounded(G, count).rad)
    n_rad, G_rad = np.array(rows_n).reshape(C, C + 2), np.array(rows_G).reshape(C, C + 2)
    return CoefficientsRadius(G_rad[:, 0], n_rad[:, 1], G_rad[:, 1], np.tril(n_rad[:, 2:]), np.tril(G_rad[:, 2:]))


def gates(inputs: Inputs, row: int, span: slice, arithmetic: ErrorModel) -> Iterator[Ball]:
    """theta, a and eta of a piece, shape (H, L, 1, 1), with the errors of their logs, bounds (B3) and (B8)."""
    L = span.stop - span.start
    for name in ("theta", "alpha", "eta"):
        x = arithmetic.argument(getattr(inputs, name)[row, span].T[..., None, None])
        if inputs.log_gates:
            gate = np.exp(x.mid)
            log = np.where(gate > 0, x.mid, 0)
            # exp rounds its argument once for all uses of the gate; in log space the drift contains it
            argument = 0 if arithmetic.log_space else EXP_ARGUMENT * arithmetic.unit * np.abs(log)
            yield _gate(gate, np.where(gate > 0, gate * (x.rad + argument), 0), log, L, arithmetic)
        elif name == "alpha":
            yield _gate(1 - x.mid, x.rad, np.where(x.mid < 1, np.log1p(-x.mid), 0), L, arithmetic)
        else:
            yield _gate(x.mid, x.rad, _log(x.mid), L, arithmetic)


def _gate(gate: Array, rad: Array, log: Array, L: int, arithmetic: ErrorModel) -> Ball:
    """A gate of a piece of L tokens; in log space with a drift, the roundings of its log in every use."""
    drift = 1.01 * log_roundings(L) * arithmetic.unit * np.abs(log) if arithmetic.log_space else 0.0
    return ball(gate, rad, drift)


def _log(x: Array) -> Array:
    """log x, and 0 in place of log 0: an exact zero stays exact."""
    with np.errstate(divide="ignore"):
        return np.where(x > 0, np.log(x), 0)


def log_roundings(L: int) -> float:
    """Roundings of a log-space coefficient of L tokens that are relative to a log, bound (B8)."""
    return 2 * L + 4


def log_growth(L: int) -> float:
    """Roundings per token that log space adds to those of (B3), bound (B8): its logs may be as large as log L."""
    return 4 + 2 * math.log(max(L, 1))

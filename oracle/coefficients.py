"""The chunk coefficients of one piece, straight from the sums and products that define them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from oracle.precision import RESTING_DIGITS, Engine, Numbers, elementwise, evaluate, exact


@dataclass(frozen=True)
class Coefficients:
    """beta, m, f, shape (C,); n, G, shape (C, C), indexed [t, j] and 0 for j > t."""

    beta: Numbers
    m: Numbers
    f: Numbers
    n: Numbers
    G: Numbers


def coefficients(
    theta: Tensor | NDArray[Any], a: Tensor | NDArray[Any], eta: Tensor | NDArray[Any], digits: int | None = None
) -> Coefficients:
    """Coefficients of one piece from its gates, token 1 to C.

        beta_t = prod_{s<=t} a_s            f_t  = sum_{i<=t} prod_{s<=i} eta_s prod_{i<s<=t} a_s
        m_t    = prod_{s<=t} eta_s          n_tj = theta_j prod_{j<s<=t} eta_s
                                            G_tj = theta_j sum_{j<=i<=t} prod_{j<s<=i} eta_s prod_{i<s<=t} a_s

    Parameters
    ----------
    theta, a, eta : Tensor or NDArray, shape (C,)
        Linear gates, a = 1 - alpha: floats, or numbers of the oracle.
    digits : int or None
        As in `forward`.

    Returns
    -------
    Coefficients

    Raises
    ------
    Unsettled
        If the values do not settle: cannot happen for gates in range, where nothing cancels.
    """
    gates = [x if isinstance(x, np.ndarray) and x.dtype == object else exact(x) for x in (theta, a, eta)]

    def compute(engine: Engine) -> dict[str, Numbers]:
        theta, a, eta = (elementwise(engine.number, gate) for gate in gates)
        C, zero, one = len(theta), engine.number(0.0), engine.number(1.0)
        decay, momentum = _products(a, one), _products(eta, one)
        f = np.full(C, zero)
        n, G = np.full((C, C), zero), np.full((C, C), zero)
        for t in range(1, C + 1):
            f[t - 1] = momentum[0, 1 : t + 1] @ decay[1 : t + 1, t]
            for j in range(1, t + 1):
                n[t - 1, j - 1] = theta[j - 1] * momentum[j, t]
                G[t - 1, j - 1] = theta[j - 1] * (momentum[j, j : t + 1] @ decay[j : t + 1, t])
        return {"beta": decay[0, 1:], "m": momentum[0, 1:], "f": f, "n": n, "G": G}

    return Coefficients(**evaluate(compute, RESTING_DIGITS, digits))


def _products(gate: Numbers, one: Any) -> Numbers:
    """Table [i, t] of the product of gate_s over i < s <= t, for 0 <= i <= t <= C; tokens count from 1."""
    C = len(gate)
    table = np.empty((C + 1, C + 1), dtype=object)
    for i in range(C + 1):
        table[i, i] = one
        for t in range(i + 1, C + 1):
            table[i, t] = table[i, t - 1] * gate[t - 1]
    return table

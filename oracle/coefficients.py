"""The chunk coefficients of one piece, straight from the sums and products that define them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from oracle.formats import RESTING_DIGITS, Arithmetic, Numbers, evaluate, exact


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

    def run(numbers: Arithmetic) -> dict[str, Numbers]:
        theta, a, eta = ([numbers.number(x) for x in gate] for gate in gates)
        C = len(theta)
        zero, one = numbers.number(0.0), numbers.number(1.0)
        # decay[i][t] is the product of a over i < s <= t, momentum[j][i] that of eta over j < s <= i; 0 is the start.
        decay, momentum = _products(a, one), _products(eta, one)
        n, G = np.full((C, C), zero), np.full((C, C), zero)
        f = np.empty(C, dtype=object)
        for t in range(1, C + 1):
            f[t - 1] = numbers.dot([momentum[0][i] for i in range(1, t + 1)], [decay[i][t] for i in range(1, t + 1)])
            for j in range(1, t + 1):
                span = range(j, t + 1)
                n[t - 1, j - 1] = theta[j - 1] * momentum[j][t]
                G[t - 1, j - 1] = theta[j - 1] * numbers.dot(
                    [momentum[j][i] for i in span], [decay[i][t] for i in span]
                )
        beta, m = (np.array([table[0][t] for t in range(1, C + 1)], dtype=object) for table in (decay, momentum))
        return {"beta": beta, "m": m, "f": f, "n": n, "G": G}

    return Coefficients(**evaluate(run, RESTING_DIGITS, digits))


def _products(gate: list[Any], one: Any) -> list[dict[int, Any]]:
    """table[i][t] = product of gate_s over i < s <= t, for 0 <= i <= t <= C."""
    C = len(gate)
    table = []
    for i in range(C + 1):
        row = {i: one}
        for t in range(i + 1, C + 1):
            row[t] = row[t - 1] * gate[t - 1]
        table.append(row)
    return table

"""Gates, chunk coefficients and their adjoint as polynomials of the gates: bounds (B3), (B8) and (B17)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oracle.bounds.error_model import ErrorModel
from oracle.bounds.gates import EXP_ARGUMENT, log_growth, log_roundings
from oracle.bounds.posterior.polynomial import Polynomial, leaf, stack


@dataclass(frozen=True)
class Gates:
    """Gates of N pieces, shape (N, L), and the most roundings that a token adds to a product of gates, (B3)."""

    theta: Polynomial
    a: Polynomial
    eta: Polynomial
    per_token: float


@dataclass(frozen=True)
class Coefficients:
    """Rows 0 to L of G and n, shape (N, L + 1, L + 2): what M_t and S_t have of M0, S0 and each token."""

    G: Polynomial
    n: Polynomial


def gates(theta: Tensor, alpha: Tensor, eta: Tensor, log_gates: bool, arithmetic: ErrorModel) -> Gates:
    """Gates as the polynomials know them; theta, alpha, eta, shape (N, L), are logs with `log_gates`."""
    L = theta.shape[-1]

    def gate(value: Tensor, log: Tensor) -> Polynomial:
        argument = arithmetic.unit * torch.where(value > 0, log, 0).abs()
        if arithmetic.log_space:
            return leaf(value, drift=value * torch.expm1(1.01 * log_roundings(L) * argument))
        # exp rounds its argument
        return leaf(value, drift=value * torch.expm1(1.01 * EXP_ARGUMENT * argument) if log_gates else None)

    per_token = 3 + 4 * log_gates + (log_growth(L) if arithmetic.log_space else 0.0)
    if log_gates:
        return Gates(gate(theta.exp(), theta), gate(alpha.exp(), alpha), gate(eta.exp(), eta), per_token)
    return Gates(gate(theta, theta.log()), gate(1 - alpha, torch.log1p(-alpha)), gate(eta, eta.log()), per_token)


def coefficients(gates: Gates) -> Coefficients:
    """n_t = eta_t n_{t-1} + theta_t (column t), G_t = a_t G_{t-1} + n_t, from the columns of S0 and M0."""
    N, L = gates.theta.value.shape
    columns = torch.eye(L + 2, dtype=gates.theta.value.dtype, device=gates.theta.value.device).expand(N, -1, -1)
    # 0 and 1 are exact, and so is adding the one and multiplying by the other
    G, n, *tokens = (Polynomial(x, x, 0 * x, 0 * x, x, 0 * x) for x in columns.unbind(1))
    rows_G, rows_n = [G], [n]
    for t in range(L):
        theta, a, eta = (gate[:, t : t + 1] for gate in (gates.theta, gates.a, gates.eta))
        n = n * eta + tokens[t] * theta
        G = G * a + n
        rows_G.append(G)
        rows_n.append(n)
    return Coefficients(stack(rows_G, 1), stack(rows_n, 1))


def gates_vjp(
    gates: Gates, coefficients: Coefficients, rows: Polynomial, last: Polynomial
) -> tuple[Polynomial, Polynomial, Polynomial]:
    """Cotangents of theta, a and eta, shape (N, L), from those of the rows 1 to L of G and of the last of n.

    Parameters
    ----------
    gates : Gates
    coefficients : Coefficients
    rows : Polynomial, shape (N, L, L + 2)
    last : Polynomial, shape (N, L + 2)
    """
    L = rows.value.shape[1]
    dtheta, da, deta = [], [], []
    dG, dn = rows[:, L - 1], last
    for t in reversed(range(L)):
        dn = dn + dG
        dtheta.append(dn[:, t + 2])
        da.append((dG * coefficients.G[:, t]).sum()[:, 0])
        deta.append((dn * coefficients.n[:, t]).sum()[:, 0])
        if t > 0:
            dG = rows[:, t - 1] + dG * gates.a[:, t : t + 1]
            dn = dn * gates.eta[:, t : t + 1]
    theta, a, eta = (stack(x[::-1], 1) for x in (dtheta, da, deta))
    return theta, a, eta

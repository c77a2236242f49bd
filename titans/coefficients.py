"""The chunk coefficients of equation (7), in linear space and in log space, and their reverse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """One row of the coefficients of each piece, shaped to multiply a (D, D) state or the rows of (C, D).

    Attributes
    ----------
    beta, f, m : Tensor, shape (K, H, 1, 1)
    n, G : Tensor, shape (K, H, C, 1)
    """

    beta: Tensor
    f: Tensor
    m: Tensor
    n: Tensor
    G: Tensor


class Coefficients(NamedTuple):
    """The coefficients of K pieces, one row per local token t; row 0 is the start of the piece.

    The columns say what is being decayed: M0, S0, then the tokens j = 1..C. `n` is the part of it that stands
    in S_t, `G` the part that stands in M_t: G = (beta_t, f_t, G_t1 ... G_tC) and n = (0, m_t, n_t1 ... n_tC).

    Attributes
    ----------
    n, G : Tensor, shape (C + 1, K, H, C + 2)
    """

    n: Tensor
    G: Tensor

    @property
    def beta(self) -> Tensor:
        """Shape (K, H, C, 1)."""
        return self.G[1:, ..., 0].permute(1, 2, 0).unsqueeze(-1)

    @property
    def f(self) -> Tensor:
        """Shape (K, H, C, 1)."""
        return self.G[1:, ..., 1].permute(1, 2, 0).unsqueeze(-1)

    @property
    def G_tj(self) -> Tensor:
        """Shape (K, H, C, C)."""
        return self.G[1:, ..., 2:].permute(1, 2, 0, 3)

    def rows(self, token: Tensor) -> Row:
        """The row of each piece at its token `token`, shape (K,), counted from 0."""
        at = (token + 1, torch.arange(len(token), device=token.device))
        n, G = self.n[at], self.G[at]  # (K, H, C + 2)
        beta, f, m = (x[..., None, None] for x in (G[..., 0], G[..., 1], n[..., 1]))
        return Row(beta, f, m, n[..., 2:, None], G[..., 2:, None])


def coefficients(theta: Tensor, a: Tensor, eta: Tensor) -> Coefficients:
    """Equations (7): every column obeys one transition, n <- eta n and then G <- a G + n.

    Parameters
    ----------
    theta, a, eta : Tensor, shape (K, H, C)
        Inner learning rate, 1 - alpha, momentum decay.
    """
    K, H, C = theta.shape
    n = theta.new_zeros(C + 1, K, H, C + 2)
    G = torch.zeros_like(n)
    n[0, ..., 1] = 1
    G[0, ..., 0] = 1
    for t in range(C):
        # only the columns of M0, S0 and the tokens up to t hold anything but zero
        past, now = slice(0, t + 2), slice(0, t + 3)
        torch.mul(n[t, ..., past], eta[..., t, None], out=n[t + 1, ..., past])
        n[t + 1, ..., t + 2] = theta[..., t]
        torch.addcmul(n[t + 1, ..., now], G[t, ..., now], a[..., t, None], out=G[t + 1, ..., now])
    return Coefficients(n, G)


def log_coefficients(log_theta: Tensor, log_a: Tensor, log_eta: Tensor) -> Coefficients:
    """Equations (7) with their logs carried from row to row: products become sums, sums become log-add-exps.

    No difference of prefix sums is ever formed, and a log of -inf (an exact zero) stays what it is.

    Parameters
    ----------
    log_theta, log_a, log_eta : Tensor, shape (K, H, C)
        Natural logs of theta, 1 - alpha and eta; -inf is legal.
    """
    K, H, C = log_theta.shape
    log_n = log_theta.new_full((C + 1, K, H, C + 2), -torch.inf)
    log_G = torch.full_like(log_n, -torch.inf)
    log_n[0, ..., 1] = 0
    log_G[0, ..., 0] = 0
    for t in range(C):
        past, now = slice(0, t + 2), slice(0, t + 3)
        torch.add(log_n[t, ..., past], log_eta[..., t, None], out=log_n[t + 1, ..., past])
        log_n[t + 1, ..., t + 2] = log_theta[..., t]
        log_aG = log_G[t, ..., now] + log_a[..., t, None]
        torch.logaddexp(log_aG, log_n[t + 1, ..., now], out=log_G[t + 1, ..., now])
    return Coefficients(log_n.exp_(), log_G.exp_())


def coefficients_vjp(dn: Tensor, dG: Tensor, c: Coefficients, a: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equations (13): cotangents of theta, a and eta; `dn` and `dG`, shaped like `c`, are overwritten.

    A gate enters only as the factor that one row applies to the row before. So nothing is divided, and a gate
    of exactly zero has its right derivative, the product of the others.
    """
    for t in range(a.shape[-1] - 1, -1, -1):
        dn[t + 1] += dG[t + 1]
        dn[t].addcmul_(dn[t + 1], eta[..., t, None])
        dG[t].addcmul_(dG[t + 1], a[..., t, None])
    dtheta = dn[1:, ..., 2:].diagonal(dim1=0, dim2=-1)  # (K, H, C)
    da = (dG[1:] * c.G[:-1]).sum(-1).permute(1, 2, 0)
    deta = (dn[1:] * c.n[:-1]).sum(-1).permute(1, 2, 0)
    return dtheta, da, deta

"""The chunk form in PyTorch: coefficients -> state -> output, and back.

Every stage handles all pieces at once, except that `state` follows the chain of pieces: the anchor of one is the
memory that the one before it leaves. Equation numbers are those of ``titans/README.md``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans.arguments import Call, compute_dtype
from titans.coefficients import Coefficients, coefficients, coefficients_vjp, log_coefficients
from titans.gates import linear_gates, linear_gates_vjp, logs_of_gates
from titans.inner import inner_gradient, inner_gradient_vjp, norm, norm_vjp, readout, target
from titans.partition import Pieces, cut, max_pieces


class Tokens(NamedTuple):
    """A call cut into pieces, in the compute dtype.

    Attributes
    ----------
    q, k, target : Tensor, shape (K, H, C, D)
    w, b : Tensor, shape (H, 1, D), or both None
    theta, a, eta : Tensor, shape (K, H, C)
    eps : float
    pieces : Pieces
    """

    q: Tensor
    k: Tensor
    target: Tensor
    w: Tensor | None
    b: Tensor | None
    theta: Tensor
    a: Tensor
    eta: Tensor
    eps: float
    pieces: Pieces


def tokens_and_coefficients(call: Call, log_space: bool) -> tuple[Tokens, Coefficients]:
    """Cut the call into pieces and raise everything to the compute dtype; run the `coefficients` stage."""
    B, T = call.q.shape[:2]
    dtype = compute_dtype(call.q.dtype)
    pieces = cut(B, T, call.chunk_size, call.cu_seqlens, call.offset, call.q.device)
    q, k, v = (pieces.gather(x).to(dtype) for x in (call.q, call.k, call.v))
    w, b = (None if x is None else x.to(dtype)[:, None, :] for x in (call.w, call.b))
    passed = pieces.gather(call.theta).to(dtype), pieces.gather(call.alpha).to(dtype), pieces.gather(call.eta).to(dtype)
    theta, a, eta = linear_gates(passed, call.log_gates)
    c = log_coefficients(*logs_of_gates(passed, call.log_gates)) if log_space else coefficients(theta, a, eta)
    return Tokens(q, k, target(k, v, w), w, b, theta, a, eta, call.eps, pieces), c


def state(
    x: Tokens, c: Coefficients, M: Tensor, S: Tensor, anchor: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Equations (8)-(10): follow the chain of pieces from the initial state.

    Parameters
    ----------
    M, S, anchor : Tensor, shape (N, H, D, D)
        The initial state.

    Returns
    -------
    u : Tensor, shape (K, H, C, D)
    M0, S0 : Tensor, shape (K, H, D, D)
        What each piece starts from.
    M, S, anchor : Tensor, shape (N, H, D, D)
        The final state.
    """
    K, H, _, D = x.k.shape
    u = torch.empty_like(x.k)
    M0, S0 = x.k.new_empty(K, H, D, D), x.k.new_empty(K, H, D, D)
    M, S, A = (x.pieces.ordered(z) for z in (M, S, anchor))
    end = c.rows(x.pieces.end)
    # in place, since many short sequences have many states
    for i, now in enumerate(x.pieces.steps):
        live = slice(0, now.stop - now.start)
        if i > 0:
            A[live] = M[live]
        M0[now], S0[now] = M[live], S[live]
        beta, f, m, n, G = (row[now] for row in end)
        u[now] = inner_gradient(x.k[now] @ A[live], x.target[now], x.w, x.b, x.eps)
        k_T = -2 * x.k[now].mT
        M[live].mul_(beta).add_(f * S[live]).add_(k_T @ (G * u[now]))
        S[live].mul_(m).add_(k_T @ (n * u[now]))
    M, S, A = (x.pieces.as_passed(z) for z in (M, S, A))
    return u, M0, S0, M, S, torch.where(x.pieces.refreshed[:, None, None, None], M, A)


def output(x: Tokens, c: Coefficients, u: Tensor, M0: Tensor, S0: Tensor) -> Tensor:
    """Equation (11): y_t = beta_t q_t M0 + f_t q_t S0 - 2 sum_j G_tj (q_t . k_j) u_j, shape (K, H, C, D)."""
    # what is above the diagonal may overflow, and must not meet the zeros of G there
    weights = (x.q @ x.k.mT).tril() * c.G_tj  # (K, H, C, C)
    return c.beta * (x.q @ M0) + c.f * (x.q @ S0) - 2 * (weights @ u)


def forward(call: Call, log_space: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op: o, the final M, S and anchor, and for the backward the M0 and S0 of every piece."""
    x, c = tokens_and_coefficients(call, log_space)
    u, M0, S0, M, S, anchor = state(x, c, call.M, call.S, call.anchor)
    o = readout(output(x, c, u, M0, S0), x.w, x.b, x.eps)
    unused = max_pieces(call) - len(M0)
    if unused:
        # the registered operator must return a shape that does not depend on `cu_seqlens` and `offset`
        M0, S0 = (torch.cat([x0, x0.new_zeros(unused, *x0.shape[1:])]) for x0 in (M0, S0))
    return x.pieces.scatter(o, call.q), M, S, anchor, M0, S0


class Grad(NamedTuple):
    """Cotangents that the reverse of the stages accumulates, shaped like what they belong to.

    `dn` and `dG` belong to the coefficients; `M0`, `S0` and `u` reach the state stage through the outputs.
    """

    q: Tensor
    k: Tensor
    u: Tensor
    M0: Tensor
    S0: Tensor
    dn: Tensor
    dG: Tensor


def output_vjp(x: Tokens, c: Coefficients, u: Tensor, M0: Tensor, S0: Tensor, dy: Tensor) -> Grad:
    """Equations (14): the reverse of `output`; `dy`, shape (K, H, C, D), is the cotangent of y."""
    scores = (x.q @ x.k.mT).tril()  # (K, H, C, C)
    dweights = -2 * (dy @ u.mT).tril()
    dscores = dweights * c.G_tj
    dn, dG = torch.zeros_like(c.n), torch.zeros_like(c.G)
    dG[1:, ..., 0] = (dy * (x.q @ M0)).sum(-1).permute(2, 0, 1)
    dG[1:, ..., 1] = (dy * (x.q @ S0)).sum(-1).permute(2, 0, 1)
    dG[1:, ..., 2:] = (dweights * scores).permute(2, 0, 1, 3)
    return Grad(
        q=c.beta * (dy @ M0.mT) + c.f * (dy @ S0.mT) + dscores @ x.k,
        k=dscores.mT @ x.q,
        u=-2 * ((scores * c.G_tj).mT @ dy),
        M0=(c.beta * x.q).mT @ dy,
        S0=(c.f * x.q).mT @ dy,
        dn=dn,
        dG=dG,
    )


def state_vjp(
    x: Tokens, c: Coefficients, A: Tensor, u: Tensor, M0: Tensor, S0: Tensor,
    grad: Grad, dM: Tensor, dS: Tensor, danchor: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """Equations (15)-(18): the reverse of `state`; adds to `grad.k`, `grad.dn` and `grad.dG` in place.

    Parameters
    ----------
    A : Tensor, shape (K, H, D, D)
        The anchor of each piece.
    dM, dS, danchor : Tensor, shape (N, H, D, D)
        Cotangents of the final state.

    Returns
    -------
    dtarget : Tensor, shape (K, H, C, D)
    dw, db : Tensor, shape (K, H, D), or None
        The part of each piece.
    dM, dS, danchor : Tensor, shape (N, H, D, D)
        Cotangents of the initial state.
    """
    end, refreshed = c.rows(x.pieces.end), x.pieces.refreshed[x.pieces.order][:, None, None, None]
    dM, dS, dA = (x.pieces.ordered(d) for d in (dM, dS, danchor))
    dM += torch.where(refreshed, dA, 0)
    dA.masked_fill_(refreshed, 0)
    dtarget = torch.empty_like(u)
    K, H, _, D = u.shape
    dw, db = (None, None) if x.w is None else (u.new_empty(K, H, D), u.new_empty(K, H, D))
    for i, now in reversed(list(enumerate(x.pieces.steps))):
        live = slice(0, now.stop - now.start)
        beta, f, m, n, G = (row[now] for row in end)
        k, u_now, dM_now, dS_now = x.k[now], u[now], dM[live], dS[live]
        k_dM, k_dS = k @ dM_now, k @ dS_now
        du = grad.u[now] - 2 * (G * k_dM + n * k_dS)
        dy, dtarget[now], dw_rows, db_rows = inner_gradient_vjp(du, k @ A[now], x.target[now], x.w, x.b, x.eps)
        if dw is not None and db is not None and dw_rows is not None and db_rows is not None:
            dw[now], db[now] = dw_rows.sum(-2), db_rows.sum(-2)

        grad.k[now] += dy @ A[now].mT - 2 * (G * (u_now @ dM_now.mT) + n * (u_now @ dS_now.mT))
        dbeta, df, dm = (dot(p, s[now]) for p, s in ((dM_now, M0), (dM_now, S0), (dS_now, S0)))
        at = (x.pieces.end[now] + 1, torch.arange(now.start, now.stop, device=k.device))
        grad.dG[at] += torch.cat([dbeta[..., None], df[..., None], -2 * (k_dM * u_now).sum(-1)], -1)
        grad.dn[at] += torch.cat([torch.zeros_like(dm[..., None]), dm[..., None], -2 * (k_dS * u_now).sum(-1)], -1)

        dA[live] += k.mT @ dy
        dS_now.mul_(m).add_(f * dM_now).add_(grad.S0[now])
        dM_now.mul_(beta).add_(grad.M0[now])
        if i > 0:
            # this piece's anchor was the memory it started from
            dM[live] += dA[live]
            dA[live] = 0
    dM, dS, dA = (x.pieces.as_passed(d) for d in (dM, dS, dA))
    return dtarget, dw, db, dM, dS, dA


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The sum of the products of all elements of (..., D, D), without a tensor of the products."""
    return (x.flatten(-2)[..., None, :] @ y.flatten(-2)[..., None])[..., 0, 0]


def backward(
    call: Call, log_space: bool, M0: Tensor, S0: Tensor, do: Tensor, dM: Tensor, dS: Tensor, danchor: Tensor
) -> tuple[Tensor | None, ...]:
    """Cotangents of q, k, v, w, b, theta, alpha, eta and of the initial M, S and anchor."""
    x, c = tokens_and_coefficients(call, log_space)
    M0, S0 = M0[: len(x.q)], S0[: len(x.q)]
    A = M0
    if x.pieces.steps:
        first = x.pieces.steps[0]
        A = torch.cat([call.anchor[x.pieces.order[: first.stop]], M0[first.stop :]])
    u = inner_gradient(x.k @ A, x.target, x.w, x.b, x.eps)

    do = x.pieces.gather(do).to(u.dtype)
    dy, dw, db = do, None, None
    if x.w is not None:
        y_normed, r = norm(output(x, c, u, M0, S0), x.eps)
        dy = do + norm_vjp(do * x.w, y_normed, r)
        dw, db = (do * y_normed).sum((0, 2)), do.sum((0, 2))
    grad = output_vjp(x, c, u, M0, S0, dy)
    dtarget, dw_state, db_state, dM, dS, danchor = state_vjp(x, c, A, u, M0, S0, grad, dM, dS, danchor)
    if dw is not None and db is not None and dw_state is not None and db_state is not None:
        dw, db = dw + dw_state.sum(0), db + db_state.sum(0)
    gates = coefficients_vjp(grad.dn, grad.dG, c, x.a, x.eta)
    dgates = linear_gates_vjp(gates, (x.theta, x.a, x.eta), call.log_gates)

    dk = grad.k if x.w is None else grad.k - dtarget
    scatter = x.pieces.scatter
    return (
        scatter(grad.q, call.q), scatter(dk, call.k), scatter(dtarget, call.v), dw, db,
        *(scatter(d, gate) for d, gate in zip(dgates, (call.theta, call.alpha, call.eta), strict=True)),
        dM, dS, danchor,
    )  # fmt: skip

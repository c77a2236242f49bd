"""The exact adjoint of the definition for one head of one sequence: its equations in reverse, token after token."""

from dataclasses import dataclass

import numpy as np

from oracle.definition import Head, HeadState, Inner, Norm, Token, centred
from oracle.precision import Number, Numbers


@dataclass(frozen=True)
class HeadGradient:
    """Cotangents of the arrays of a `Head`, each in its shape; w and b are 0 in the plain memory."""

    q: Numbers
    k: Numbers
    v: Numbers
    w: Numbers
    b: Numbers
    theta: Numbers
    a: Numbers
    eta: Numbers
    M: Numbers
    S: Numbers
    anchor: Numbers


def norm_vjp(norm: Norm, dx: Numbers, dr: Number = 0) -> Numbers:
    """Cotangent of y from those of x = norm(y) and of r."""
    s, r, _ = norm
    # x = s r;  r = (var + eps)^(-1/2);  var = <s, s> / D;  s = y - mean y
    dr = dr + dx @ s
    dvar = -(r * r * r) * dr / 2
    return centred(r * dx + 2 * dvar / len(s) * s)


def inner_gradient_vjp(inner: Inner, du: Numbers, w: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Cotangents of y, e = z w and z = x w + b - (v - k) from that of u: eq. (2) backwards."""
    x, r, D = inner.norm.x, inner.norm.r, len(du)
    # u = r p
    dr, dp = du @ inner.p, r * du
    # p = e - mean e - x c;  c = <e, x> / D
    dc = -dp @ x
    de = centred(dp) + dc / D * x
    # e = z w;  z = x w + b - (v - k)
    dz = de * w
    dx = -inner.c * dp + dc / D * inner.e + dz * w
    return norm_vjp(inner.norm, dx, dr), de, dz


def reverse(
    head: Head, tokens: list[Token], states: list[HeadState], do: Numbers, dM: Numbers, dS: Numbers, dA: Numbers
) -> HeadGradient:
    """Eqs. (6) to (2), from the last token to the first.

    Parameters
    ----------
    head : Head
    tokens, states : list of Token and of HeadState
        From `definition.run`.
    do : Numbers, shape (T, D)
    dM, dS, dA : Numbers, shape (D, D)
        Cotangents of the final state.

    Returns
    -------
    HeadGradient
    """
    nothing, w = 0 * dA, head.w
    dq, dk, dv = (np.empty_like(head.q) for _ in range(3))
    dtheta, da, deta = (np.empty_like(head.theta) for _ in range(3))
    dw = db = nothing[0]
    for t in reversed(range(len(tokens))):
        k, (inner, u, read, _), before, after = head.k[t], tokens[t], states[t], states[t + 1]
        if head.completes_chunk(t):  # (6)
            dM, dA = dM + dA, nothing
        dy = do[t]  # (5)
        if read is not None:
            dw, db = dw + do[t] * read.x, db + do[t]
            dy = do[t] + norm_vjp(read, do[t] * w)
        dq[t] = after.M @ dy
        dM = dM + np.outer(head.q[t], dy)
        da[t] = (dM * before.M).sum()  # (4)
        dS = dS + dM
        dM = head.a[t] * dM
        deta[t] = (dS * before.S).sum()  # (3)
        dtheta[t] = -2 * (k @ dS) @ u
        du = -2 * head.theta[t] * (k @ dS)
        dk[t] = -2 * head.theta[t] * (dS @ u)
        dS = head.eta[t] * dS
        dy, dv[t] = du, -du  # (2)
        if inner is not None and w is not None:
            dy, de, dz = inner_gradient_vjp(inner, du, w)
            dw, db = dw + de * inner.z + dz * inner.norm.x, db + dz
            dv[t] = -dz
            dk[t] = dk[t] + dz
        dk[t] = dk[t] + before.A @ dy
        dA = dA + np.outer(k, dy)
    if head.anchor is None:
        dM, dA = dM + dA, nothing
    return HeadGradient(dq, dk, dv, dw, db, dtheta, da, deta, dM, dS, dA)

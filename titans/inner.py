"""The inner gradient u of equation (2), the normalisation it uses, and their vector-Jacobian products.

Everything acts on the last axis, of width D. With ``w is None`` the memory is plain.
"""

from __future__ import annotations

from torch import Tensor


def mean(x: Tensor) -> Tensor:
    """Mean over the last axis, kept."""
    return x.mean(-1, keepdim=True)


def norm(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise the rows of `y`.

    Parameters
    ----------
    y : Tensor, shape (..., D)
    eps : float, > 0

    Returns
    -------
    x : Tensor, shape (..., D)
        (y - mean y) r.
    r : Tensor, shape (..., 1)
        1 / sqrt(var y + eps), var the population variance.
    """
    centred = y - mean(y)
    r = (mean(centred * centred) + eps).rsqrt()
    return centred * r, r


def norm_vjp(dx: Tensor, x: Tensor, r: Tensor) -> Tensor:
    """Cotangent of y, given that of x = norm(y): r (dx - x mean(dx x)), centred."""
    dcentred = r * (dx - x * mean(dx * x))
    return dcentred - mean(dcentred)


def readout(y: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """Equation (5): o = y, or o = y + norm(y) * w + b."""
    if w is None or b is None:
        return y
    return y + norm(y, eps)[0] * w + b


def target(k: Tensor, v: Tensor, w: Tensor | None) -> Tensor:
    """What k A should recall: v in the plain memory, v - k in the normalised one."""
    return v if w is None else v - k


def inner_gradient(y: Tensor, target: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """Equation (2): u, half the gradient of the inner loss with respect to y = k A.

    Parameters
    ----------
    y : Tensor, shape (..., D)
        The recall k A.
    target : Tensor, shape (..., D)
    w, b : Tensor, broadcastable to (..., D), or both None
    eps : float

    Returns
    -------
    u : Tensor, shape (..., D)
    """
    if w is None or b is None:
        return y - target
    x, r = norm(y, eps)
    e = (x * w + b - target) * w
    return r * (e - mean(e) - x * mean(e * x))


def inner_gradient_vjp(
    du: Tensor, y: Tensor, target: Tensor, w: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Equation (12): cotangents of `y`, `target`, `w` and `b` given that of u; the last two per row, not yet summed.

    Each line is the reverse of one line of `inner_gradient`.
    """
    if w is None or b is None:
        return du, -du, None, None
    D = y.shape[-1]
    x, r = norm(y, eps)
    z = x * w + b - target
    e = z * w
    c = mean(e * x)
    p = e - mean(e) - x * c
    # u = r p
    dr = (du * p).sum(-1, keepdim=True)
    dp = du * r
    # p = e - mean(e) - x c,  c = mean(e x)
    dc = -mean(dp * x)
    de = dp - mean(dp) + dc * x
    dx = dc * e - dp * c
    # e = z w,  z = x w + b - target
    dz = de * w
    dw = de * z + dz * x
    dx = dx + dz * w
    # x = norm(y), and r once more
    dcentred = r * (dx - x * mean(dx * x)) - x * (r * r * dr / D)
    return dcentred - mean(dcentred), -dz, dw, dz

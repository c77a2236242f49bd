"""The definition as a token loop in PyTorch, where the oracle's 60 digits take too long: SPEC section 2."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from oracle import Cotangents, Inputs
from properties.harness.running import STATE, Results, backward, tensors


def definition(inputs: Inputs, cotangents: Cotangents, dtype: torch.dtype) -> Results:
    """Return all values and gradients of the token loop and of its autograd in a dtype; names as in `run`.

    In float64 they are the exact results but for 2^-29 of the errors of any computation in float32.
    """
    leaves: dict[str, Any] = {name: x.detach().to(dtype).requires_grad_() for name, x in tensors(inputs).items()}
    o, ends = [], []
    for n, (row, start, end) in enumerate(inputs.sequences):
        outputs, state = _sequence(replace(inputs, **leaves), n, slice(start, end), row)
        o.append(outputs)
        ends.append(state)
    packed = inputs.cu_seqlens is not None
    values = {"o": torch.cat(o)[None] if packed else torch.stack(o)}
    values |= {name: torch.stack(x) for name, x in zip(STATE, zip(*ends, strict=True), strict=True)}
    gradients = backward(values, leaves, cotangents)
    return {name: x.detach() for name, x in values.items()} | gradients


def _sequence(inputs: Inputs, n: int, span: slice, row: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Outputs, shape (T, H, D), and M, S and the anchor, shape (H, D, D), of sequence n: eqs. (2) to (6)."""
    q, k, v = (x[row, span, :, None] for x in (inputs.q, inputs.k, inputs.v))  # (T, H, 1, D)
    theta, alpha, eta = (x[row, span, :, None, None] for x in (inputs.theta, inputs.alpha, inputs.eta))
    theta, a, eta = (theta.exp(), alpha.exp(), eta.exp()) if inputs.log_gates else (theta, 1 - alpha, eta)
    w, b = (None if x is None else x[:, None] for x in (inputs.w, inputs.b))
    nothing = q.new_zeros(q.shape[1], q.shape[-1], q.shape[-1])
    M, S = (nothing if x is None else x[n] for x in (inputs.M, inputs.S))
    A = M if inputs.anchor is None else inputs.anchor[n]
    o = [q[:0, :, 0]]
    for t in range(len(q)):
        S = eta[t] * S - 2 * theta[t] * k[t].mT @ _inner_gradient(k[t] @ A, v[t], k[t], w, b, inputs.eps)
        M = a[t] * M + S
        y = q[t] @ M
        o.append((y if w is None or b is None else y + _norm(y, inputs.eps)[0] * w + b)[None, :, 0])
        A = M if (inputs.offsets[n] + t + 1) % inputs.chunk_size == 0 else A
    return torch.cat(o), (M, S, A)


def _norm(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    centred = y - y.mean(-1, keepdim=True)
    r = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * r, r


def _inner_gradient(y: Tensor, v: Tensor, k: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """u of eq. (2), or of the plain memory."""
    if w is None or b is None:
        return y - v
    x, r = _norm(y, eps)
    e = (x * w + b - (v - k)) * w
    return r * (e - e.mean(-1, keepdim=True) - x * (e * x).mean(-1, keepdim=True))

"""SPEC section 2 written down twice more: over any kind of number, and in PyTorch for autograd."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

import oracle
from oracle.precision import elementwise, exact

# How far float64 may be from the oracle on these problems, relative to the largest value: half of its 53 bits. They are
# short and well-conditioned, so that rounding costs far less, while a slip in any equation shows in the first digits.
HALF_OF_FLOAT64 = 2.0**-26
GATES = ("theta", "alpha", "eta")


def tensors(inputs: oracle.Inputs) -> dict[str, Tensor]:
    """The tensors that were passed, by name."""
    named = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return {name: x for name, x in named.items() if isinstance(x, Tensor)}


def sequences(inputs: oracle.Inputs) -> Iterator[tuple[int, int, range, int]]:
    """n, batch row, tokens and offset of each sequence."""
    B, T = inputs.q.shape[:2]
    bounds = inputs.cu_seqlens
    if bounds is None:
        spans = [(row, range(T)) for row in range(B)]
    else:
        spans = [(0, range(*span)) for span in pairwise(bounds)]
    for n, (row, span) in enumerate(spans):
        yield n, row, span, inputs.offset[n] if inputs.offset else 0


def over_numbers(
    inputs: oracle.Inputs, given: dict[str, Any], zero: Any, eps: Any, sqrt: Any, exp: Any
) -> dict[str, Any]:
    """o, M, S, anchor as object arrays, from object arrays of numbers that know + - * /."""
    B, T, H, D = inputs.q.shape
    shape = (len(list(sequences(inputs))), H, D, D)
    o = np.full((B, T, H, D), zero)
    M, S = given.get("M", np.full(shape, zero)).copy(), given.get("S", np.full(shape, zero)).copy()
    anchor = given.get("anchor", M).copy()

    def norm(y: Any) -> tuple[Any, Any]:
        deviation = y - y.sum() / D
        r = 1 / sqrt((deviation * deviation).sum() / D + eps)
        return deviation * r, r

    for n, row, span, offset in sequences(inputs):
        for h in range(H):
            for position, t in enumerate(span, offset + 1):
                q, k, v = given["q"][row, t, h], given["k"][row, t, h], given["v"][row, t, h]
                theta, alpha, eta = (given[name][row, t, h] for name in GATES)
                a = 1 - alpha
                if inputs.log_gates:
                    theta, a, eta = exp(theta), exp(alpha), exp(eta)
                u = k @ anchor[n, h] - v
                if "w" in given:
                    w, b = given["w"][h], given["b"][h]
                    x, r = norm(k @ anchor[n, h])
                    e = (x * w + b - (v - k)) * w
                    u = (e - e.sum() / D - x * ((e * x).sum() / D)) * r
                S[n, h] = S[n, h] * eta - np.outer(k, u) * (theta * 2)
                M[n, h] = M[n, h] * a + S[n, h]
                y = q @ M[n, h]
                o[row, t, h] = y + norm(y)[0] * w + b if "w" in given else y
                if position % inputs.chunk_size == 0:
                    anchor[n, h] = M[n, h]
    return {"o": o, "M": M, "S": S, "anchor": anchor}


def in_pytorch(inputs: oracle.Inputs) -> dict[str, Tensor]:
    """o, M, S, anchor in the dtype of the tensors, differentiable; all heads at once."""
    B, T, H, D = inputs.q.shape
    zeros = inputs.q.new_zeros(len(list(sequences(inputs))), H, D, D)
    M_0 = zeros if inputs.M is None else inputs.M
    S_0 = zeros if inputs.S is None else inputs.S
    A_0 = M_0 if inputs.anchor is None else inputs.anchor

    def normed(y: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(y, (D,), eps=inputs.eps) * inputs.w + inputs.b

    rows, states = {row: [] for row in range(B)}, []
    for n, row, span, offset in sequences(inputs):
        M, S, A = M_0[n], S_0[n], A_0[n]
        for position, t in enumerate(span, offset + 1):
            q, k, v = (x[row, t] for x in (inputs.q, inputs.k, inputs.v))
            theta, a, eta = inputs.theta[row, t], 1 - inputs.alpha[row, t], inputs.eta[row, t]
            if inputs.log_gates:
                theta, a, eta = theta.exp(), inputs.alpha[row, t].exp(), eta.exp()
            # The inner gradient by autograd of the loss, eq. (1), so that eq. (2) is checked too.
            with torch.enable_grad():
                y = torch.einsum("hi,hij->hj", k, A)
                y = y if y.requires_grad else y.requires_grad_()
                error = y - v if inputs.w is None else normed(y) - (v - k)
                (u,) = torch.autograd.grad((error**2).sum() / 2, y, create_graph=True)
            S = eta[:, None, None] * S - 2 * theta[:, None, None] * torch.einsum("hi,hj->hij", k, u)
            M = a[:, None, None] * M + S
            y = torch.einsum("hi,hij->hj", q, M)
            rows[row].append(y if inputs.w is None else y + normed(y))
            if position % inputs.chunk_size == 0:
                A = M
        states.append((M, S, A))
    o = torch.stack([torch.stack(outputs) for outputs in rows.values()]) if T else inputs.q
    M, S, A = (torch.stack(state) for state in zip(*states, strict=True))
    return {"o": o, "M": M, "S": S, "anchor": A}


def problem(
    seed: int,
    lengths: tuple[int, ...] = (5,),
    H: int = 1,
    D: int = 3,
    C: int = 2,
    plain: bool = False,
    log_gates: bool = False,
    state: str = "MSA",
    offset: int = 0,
    packed: bool = False,
) -> oracle.Inputs:
    """A well-conditioned float64 problem; `state` names the parts of the initial state that are passed."""
    generator = torch.Generator().manual_seed(seed)
    N, B, T = len(lengths), 1 if packed else len(lengths), sum(lengths) if packed else lengths[0]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(B, T, H, generator=generator, dtype=torch.float64)

    theta, alpha, eta = uniform(0.05, 0.3), uniform(0.0, 0.5), uniform(0.2, 1.0)
    if log_gates:
        theta, alpha, eta = theta.log(), (1 - alpha).log(), eta.log()
    bounds = np.cumsum((0, *lengths)).tolist()
    return oracle.Inputs(
        normal(B, T, H, D),
        normal(B, T, H, D),
        normal(B, T, H, D),
        None if plain else 1 + normal(H, D) / 4,
        None if plain else normal(H, D) / 4,
        theta,
        alpha,
        eta,
        eps=2.0**-6,
        chunk_size=C,
        M=normal(N, H, D, D) if "M" in state else None,
        S=normal(N, H, D, D) if "S" in state else None,
        anchor=normal(N, H, D, D) if "A" in state else None,
        offset=(offset,) * N,
        cu_seqlens=tuple(bounds) if packed else None,
        log_gates=log_gates,
    )


# Both memories, linear and log gates, every length around a chunk, both ends of an offset, packed with empty and
# one-token sequences, and each way of passing a state.
PROBLEMS = {
    "normalised": problem(1),
    "plain": problem(2, plain=True),
    "log gates": problem(3, log_gates=True),
    "no state": problem(4, state=""),
    "plain, no state": problem(5, plain=True, state=""),
    "anchor is M": problem(6, state="MS", C=3),
    "anchor without M": problem(7, state="A", offset=1),
    "mid-chunk": problem(8, C=4, offset=3, lengths=(6,)),
    "stays in its chunk": problem(9, C=9, offset=2, log_gates=True),
    "C = 1": problem(10, C=1, state="M"),
    "D = 1": problem(11, D=1, H=2),
    "two rows, two heads": problem(12, lengths=(3, 3), H=2, D=2, plain=True),
    "packed": problem(13, lengths=(0, 3, 1, 0, 2), packed=True, D=2, offset=1, C=3),
    "packed, anchor is M": problem(14, lengths=(2, 0, 1), packed=True, D=2, offset=1, C=2, state="M", plain=True),
    "T = 0": problem(15, lengths=(0,)),
}


def cotangents(inputs: oracle.Inputs, seed: int = 99) -> oracle.Cotangents:
    """Random ones, of o and of the whole final state."""
    generator = torch.Generator().manual_seed(seed)
    state = (len(list(sequences(inputs))), inputs.q.shape[2], inputs.q.shape[3], inputs.q.shape[3])
    shapes = (inputs.q.shape, state, state, state)
    return oracle.Cotangents(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))


def with_gates(inputs: oracle.Inputs, **values: float) -> oracle.Inputs:
    """Set whole gates to a value."""
    return replace(inputs, **{name: torch.full_like(getattr(inputs, name), value) for name, value in values.items()})


def numbers(inputs: oracle.Inputs, convert: Callable[[Any], Any] = lambda x: x) -> dict[str, Any]:
    """The tensors as object arrays of exact numbers."""
    return {name: elementwise(convert, exact(x)) for name, x in tensors(inputs).items()}

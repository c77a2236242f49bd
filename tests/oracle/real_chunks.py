"""Chunks of real sizes, and results of several implementations under the names of an enclosure."""

from typing import Any

import torch
from torch import Tensor

import oracle
from oracle.bounds.posterior import Enclosure
from tests.oracle.test_bounds import gradients, normed, ratio
from titans import TitansState, chunk_titans_linear

VALUES = ("o", "M", "S", "anchor")
GRADIENTS = ("q", "k", "v", "w", "b", "theta", "alpha", "eta", "M", "S", "anchor")
PER_TOKEN = ("q", "k", "v", "theta", "alpha", "eta")
NORMALISED = (*VALUES, *("d" + name for name in GRADIENTS))
PLAIN = tuple(name for name in NORMALISED if name not in ("dw", "db"))


def chunk(
    D: int, L: int, *, heads: int = 2, plain: bool = False, log_gates: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[oracle.Inputs, oracle.Cotangents]:
    """One whole chunk with a state of its own, as a trained layer has it."""
    generator = torch.Generator().manual_seed(D + L)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = normal(3, 1, L, heads, D)
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    largest = torch.tensor([0.02, 0.1, 1])[:, None, None, None]
    theta, alpha, eta = torch.rand(3, 1, L, heads, generator=generator) * largest
    if log_gates:
        theta, alpha, eta = theta.log(), torch.log1p(-alpha), eta.log()
    M, S, anchor, *final = normal(6, 1, heads, D, D) / D**0.5
    inputs = oracle.Inputs(
        *(x.to(dtype) for x in (q, k, v)),
        None if plain else (1 + normal(heads, D) / 10).to(dtype),
        None if plain else (normal(heads, D) / 10).to(dtype),
        *(x.to(dtype) for x in (theta, alpha, eta)),
        chunk_size=L, M=M, S=S / 10, anchor=anchor, log_gates=log_gates,
    )  # fmt: skip
    return inputs, oracle.Cotangents(normal(1, L, heads, D).to(dtype), *(x * D**0.5 for x in final))


def by_name(output: Any, gradient: Any, state: Any = None) -> dict[str, Any]:
    """Results, or their radii, under the names of an enclosure."""
    state = output if state is None else state
    named = {"o": output.o} | {name: getattr(state, name) for name in VALUES[1:]}
    named |= {"d" + name: getattr(gradient, name) for name in GRADIENTS}
    return {name: x for name, x in named.items() if x is not None}


def exact(inputs: oracle.Inputs, cotangents: oracle.Cotangents) -> dict[str, Any]:
    output, gradient = oracle.gradient(inputs, cotangents)
    return by_name(output, gradient, output.state)


def loop(inputs: oracle.Inputs, cotangents: oracle.Cotangents) -> dict[str, Tensor]:
    """Results and gradients of the token loop in the dtype of the state."""
    results, grads = gradients(inputs, cotangents)
    return {name: x.detach() for name, x in results.items()} | {"d" + name: x for name, x in grads.items()}


def op(inputs: oracle.Inputs, cotangents: oracle.Cotangents, backend: str) -> dict[str, Tensor]:
    """Results and gradients of a backend."""
    leaves = {name: getattr(inputs, name) for name in GRADIENTS}
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items() if x is not None}
    offset = torch.tensor(inputs.offsets, device=inputs.q.device)
    state = TitansState(leaves["M"], leaves["S"], leaves["anchor"], offset)
    o, final = chunk_titans_linear(
        *(leaves.get(name) for name in ("q", "k", "v", "w", "b", "theta", "alpha", "eta")),
        inputs.eps, inputs.chunk_size, state, True, log_gates=inputs.log_gates, backend=backend,
    )  # fmt: skip
    results = {"o": o, "M": final.M, "S": final.S, "anchor": final.anchor}
    given = [getattr(cotangents, name) for name in results]
    grads = torch.autograd.grad(list(results.values()), list(leaves.values()), given)
    results = {name: x.detach() for name, x in results.items()}
    return results | {"d" + name: x for name, x in zip(leaves, grads, strict=True)}


class NarrowProduct(torch.autograd.Function):
    """A product whose operands are rounded to bfloat16, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x.bfloat16().float() @ y.bfloat16().float()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        x, y = (operand.bfloat16().float() for operand in ctx.saved_tensors)
        return d.bfloat16().float() @ y.mT, x.mT @ d.bfloat16().float()


def with_narrow_products(inputs: oracle.Inputs, cotangents: oracle.Cotangents) -> dict[str, Tensor]:
    """The chunk form of one head in float32 with such products, and its autograd."""
    product = NarrowProduct.apply
    leaves = {name: getattr(inputs, name) for name in GRADIENTS}
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items() if x is not None}
    q, k, v, theta, alpha, eta = (leaves[name][0, :, 0].float() for name in PER_TOKEN)
    M, S, anchor = (leaves[name][0, 0] for name in ("M", "S", "anchor"))
    y = product(k, anchor)
    u = y - v
    if inputs.w is not None:
        w, b = leaves["w"][0].float(), leaves["b"][0].float()
        x, r = normed(y, inputs.eps)
        e = (x * w + b - (v - k)) * w
        u = r * (e - e.mean(-1, keepdim=True) - x * (e * x).mean(-1, keepdim=True))
    columns = torch.eye(len(theta) + 2)
    G, n, rows = columns[0], columns[1], []
    for t in range(len(theta)):
        n = eta[t] * n + theta[t] * columns[t + 2]
        G = (1 - alpha[t]) * G + n
        rows.append(G)
    all_G = torch.stack(rows)
    y = all_G[:, :1] * product(q, M) + all_G[:, 1:2] * product(q, S) - 2 * product(all_G[:, 2:] * product(q, k.mT), u)
    o = y if inputs.w is None else y + normed(y, inputs.eps)[0] * w + b
    M_T = G[0] * M + G[1] * S - 2 * product(k.mT, G[2:, None] * u)
    S_T = n[1] * S - 2 * product(k.mT, n[2:, None] * u)
    results = {"o": o[None, :, None].to(inputs.q.dtype), "M": M_T[None, None], "S": S_T[None, None]}
    results["anchor"] = results["M"]
    given = [getattr(cotangents, name) for name in results]
    grads = torch.autograd.grad(list(results.values()), list(leaves.values()), given)
    return {name: x.detach() for name, x in results.items()} | {"d" + n: x for n, x in zip(leaves, grads, strict=True)}


def worst_ratio(enclosure: Enclosure, results: dict[str, Any]) -> dict[str, float]:
    """Distance from the float64 values over the radius; the results may be in high precision."""
    found = {}
    for name, x in results.items():
        numbers = oracle.exact(x) if isinstance(x, Tensor) else x
        found[name] = ratio(enclosure.values[name], numbers, enclosure.radius[name].numpy())
    return found

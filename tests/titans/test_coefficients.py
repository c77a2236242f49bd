"""The chunk coefficients and their reverse: against the oracle's sums and products, and against autograd, exactly."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import oracle
from oracle.bounds import arithmetic_for, coefficients_radius
from oracle.precision import doubles, exact
from titans.coefficients import Coefficients, coefficients, coefficients_vjp, log_coefficients

K, H = 2, 3
NAMES = ("beta", "m", "f", "n", "G")
TINY = 2.0**-149  # the smallest float32

Gates = tuple[Tensor, Tensor, Tensor]


def some(C: int, seed: int = 0) -> Gates:
    """theta, a, eta in (0, 1)."""
    theta, a, eta = torch.rand(3, K, H, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return theta, a, eta


def constant(theta: float, a: float, eta: float, C: int = 9) -> Gates:
    return (*(torch.full((K, H, C), x, dtype=torch.float64) for x in (theta, a, eta)),)


def with_zeros(C: int = 9) -> Gates:
    """Dyadic gates from 0 to 1, each of them zero somewhere: products and sums of these few are exact."""
    choice = torch.randint(0, 4, (3, K, H, C), generator=torch.Generator().manual_seed(C))
    theta, a, eta = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)[choice]
    return theta, a, eta


GATES = {
    "C = 1": some(1),
    "C = 33": some(33),
    "zeros": with_zeros(),
    "no memory": constant(0.3, 0.0, 0.7),
    "no momentum": constant(0.3, 0.7, 0.0),
    "nothing learned": constant(0.0, 0.7, 0.7),
    "all kept": constant(1.0, 1.0, 1.0),
    "nearly all kept": constant(0.3, 1 - 2.0**-24, 1 - 2.0**-24),
    "strong decay": constant(3.0, 2.0**-40, 2.0**-30),
    "subnormal": constant(TINY, TINY, 0.5),
}


def in_logs(theta: Tensor, a: Tensor, eta: Tensor) -> Coefficients:
    return log_coefficients(theta.log(), a.log(), eta.log())


def part(c: Coefficients, name: str, piece: int, h: int) -> Tensor:
    """One coefficient of one piece and head, shaped as the oracle has it."""
    if name in ("n", "m"):
        columns = c.n[1:, piece, h]
        return columns[:, 1] if name == "m" else columns[:, 2:]
    return {"beta": c.beta[..., 0], "f": c.f[..., 0], "G": c.G_tj}[name][piece, h]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("compute", "log_space"), [(coefficients, False), (in_logs, True)], ids=["linear", "log"])
@pytest.mark.parametrize("gates", GATES.values(), ids=GATES)
def test_coefficients_are_within_the_bound_of_their_definition(
    gates: Gates, compute: Callable[..., Coefficients], log_space: bool, dtype: torch.dtype
) -> None:
    theta, a, eta = (x.to(dtype) for x in gates)
    c = compute(theta, a, eta)
    for piece, h in np.ndindex(K, H):
        here = [x[piece, h] for x in (theta, a, eta)]
        wanted = oracle.coefficients(*here)
        radius = coefficients_radius(*(doubles(x) for x in here), arithmetic_for(dtype, log_space=log_space))
        for name in NAMES:
            error: NDArray[np.object_] = np.abs(exact(part(c, name, piece, h)) - getattr(wanted, name))
            assert (error <= exact(getattr(radius, name))).all(), (name, piece, h)


@pytest.mark.parametrize("gates", [with_zeros(), constant(1, 1, 1), constant(0.5, 0, 1), constant(0.5, 1, 0)])
def test_dyadic_gates_give_exact_coefficients(gates: Gates) -> None:
    c = coefficients(*gates)
    for piece, h in np.ndindex(K, H):
        wanted = oracle.coefficients(*(x[piece, h] for x in gates))
        for name in NAMES:
            assert (exact(part(c, name, piece, h)) == getattr(wanted, name)).all(), name


@pytest.mark.parametrize("gates", [with_zeros(), constant(0.5, 0, 0.5), constant(0.5, 0.5, 0), constant(0, 0.5, 0.5)])
def test_log_space_keeps_the_zeros_exact(gates: Gates) -> None:
    linear, log = coefficients(*gates), in_logs(*gates)
    assert torch.equal(linear.n == 0, log.n == 0)
    assert torch.equal(linear.G == 0, log.G == 0)


def test_the_row_of_a_token_is_the_row_of_that_token() -> None:
    c, token = coefficients(*some(5)), torch.tensor([4, 1])
    row = c.rows(token)
    for piece, t in enumerate(token.tolist()):
        for name in NAMES:
            wanted = torch.stack([part(c, name, piece, h)[t] for h in range(H)])
            assert torch.equal(getattr(row, name)[piece].flatten(), wanted.flatten()), name


def differentiable(theta: Tensor, a: Tensor, eta: Tensor) -> Coefficients:
    """Equation (7) for autograd: one row from the one before."""
    C = theta.shape[-1]
    units = torch.eye(C + 2, dtype=theta.dtype)
    n, G = [units[1].expand(K, H, -1)], [units[0].expand(K, H, -1)]
    for t in range(C):
        n.append(eta[..., t, None] * n[-1] + theta[..., t, None] * units[t + 2])
        G.append(a[..., t, None] * G[-1] + n[-1])
    return Coefficients(torch.stack(n), torch.stack(G))


@pytest.mark.parametrize(
    "gates", [with_zeros(1), with_zeros(2), with_zeros(8), constant(1, 0, 0), constant(0, 1, 0), constant(0, 0, 0)]
)
def test_the_vjp_is_that_of_autograd_also_where_gates_are_zero(gates: Gates) -> None:
    """All numbers are small dyadic ones, so that both are exact."""
    theta, a, eta = (x.clone().requires_grad_() for x in gates)
    c = differentiable(theta, a, eta)
    generator = torch.Generator().manual_seed(0)
    dn, dG = (torch.randint(-3, 4, c.n.shape, generator=generator).double() for _ in range(2))
    expected = torch.autograd.grad([c.n, c.G], [theta, a, eta], [dn, dG])
    actual = coefficients_vjp(dn, dG, coefficients(*gates), a.detach(), eta.detach())
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)
        assert y.any()

"""The inner gradient and its reverse, against autograd of the loss it comes from; both within the bounds of a piece."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from oracle.bounds import FLOAT64, piece
from oracle.bounds.ball import Ball, ball
from titans.inner import inner_gradient, inner_gradient_vjp, norm, norm_vjp, readout, target

EPS = 2.0**-6
WIDTHS = (1, 2, 3, 8)
ROWS = 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(D: int, kind: str) -> Tensor:
    """Recalls y: anything, or with equal entries, whose variance is 0."""
    return normal(ROWS, D) if kind == "any" else torch.arange(ROWS, dtype=torch.float64)[:, None].expand(-1, D)


def given(x: Tensor) -> Ball:
    return ball(x[None].numpy())


def agree(x: Tensor, y: Tensor, one: Ball) -> None:
    """Both are within a radius of the exact value, so within two of each other."""
    # a bound may leave its last step to the caller: at most a centring
    rad: NDArray[np.float64] = FLOAT64.rounded(one, x.shape[-1] + 4).rad[0]
    assert (rad < np.inf).all()
    assert (np.abs((x - y).numpy()) <= 2 * rad).all()


def loss(y: Tensor, target: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    """Equation (1), half of it, with PyTorch's own LayerNorm."""
    if w is None or b is None:
        return ((y - target) ** 2).sum() / 2
    normed = torch.nn.functional.layer_norm(y, y.shape[-1:], eps=EPS) * w + b
    return ((normed - target) ** 2).sum() / 2


class Case:
    """Rows of a recall, what belongs to them, and the stations of their bound."""

    def __init__(self, D: int, kind: str) -> None:
        self.y, self.k, self.v = rows(D, kind), normal(ROWS, D, seed=1), normal(ROWS, D, seed=2)
        self.w, self.b, self.du = normal(1, D, seed=3), normal(1, D, seed=4), normal(ROWS, D, seed=5)
        self.target = target(self.k, self.v, self.w)
        k, v, w, b = (given(x) for x in (self.k, self.v, self.w, self.b))
        gate = ball(np.ones((1, ROWS, 1, 1)))
        tokens = piece.TokenBalls(k, k, v, w, b, gate, gate, gate, EPS, 0)
        self.bound = piece.inner_gradient(given(self.y), tokens, w, b, FLOAT64)


@pytest.fixture(params=[(D, kind) for D in WIDTHS for kind in ("any", "constant")], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def test_u_is_half_the_gradient_of_the_inner_loss(case: Case) -> None:
    y = case.y.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(y, case.target, case.w, case.b), y)
    agree(inner_gradient(case.y, case.target, case.w, case.b, EPS), expected, case.bound.u)


def test_plain_u_is_the_error_of_the_recall() -> None:
    y, v = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 5.0]])
    assert inner_gradient(y, target(y, v, None), None, None, EPS).tolist() == [[2, -4]]
    du, dtarget, dw, db = inner_gradient_vjp(v, y, v, None, None, EPS)
    assert (du.tolist(), dtarget.tolist(), dw, db) == (v.tolist(), (-v).tolist(), None, None)


def test_the_vjp_of_u_is_that_of_autograd(case: Case) -> None:
    w, b = (x.expand(ROWS, -1) for x in (case.w, case.b))
    leaves = [x.clone().requires_grad_() for x in (case.y, case.target, w, b)]
    expected = torch.autograd.grad(inner_gradient(*leaves, EPS), leaves, case.du)
    dy, dz, dw = piece.inner_gradient_vjp(case.bound, given(case.w), given(case.du), FLOAT64)
    actual = inner_gradient_vjp(case.du, case.y, case.target, case.w, case.b, EPS)
    for x, y, one in zip(actual, expected, (dy, dz, dw, dz), strict=True):
        assert x is not None
        agree(x, y, one)


def test_the_vjp_of_norm_is_that_of_autograd(case: Case) -> None:
    y = case.y.clone().requires_grad_()
    x, r = norm(y, EPS)
    (expected,) = torch.autograd.grad(x, y, case.du)
    no_r = ball(np.zeros((1, ROWS, 1)))
    bound = piece.norm_vjp(case.bound.norm, given(case.du), no_r, FLOAT64)
    agree(norm_vjp(case.du, x.detach(), r.detach()), expected, bound)


def test_constant_rows_have_no_direction() -> None:
    x, r = norm(rows(8, "constant"), EPS)
    assert not x.any()
    assert (r == EPS**-0.5).all()


def test_a_single_entry_is_always_at_its_mean() -> None:
    one = Case(1, "any")
    assert not inner_gradient(one.y, one.target, one.w, one.b, EPS).any()
    assert not any(x.any() for x in inner_gradient_vjp(one.du, one.y, one.target, one.w, one.b, EPS) if x is not None)


def test_the_readout_adds_the_normalised_recall() -> None:
    # mean 1, deviations -1 and 1, variance 1: with eps = 3 the norm is half the deviation
    y, w, b = torch.tensor([[0.0, 2.0]]), torch.tensor([[4.0, 6.0]]), torch.tensor([[1.0, 0.0]])
    assert readout(y, w, b, 3.0).tolist() == [[0 - 2 + 1, 2 + 3 + 0]]
    assert readout(y, None, None, 3.0) is y

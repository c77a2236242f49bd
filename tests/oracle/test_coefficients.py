from fractions import Fraction

import numpy as np
import pytest
import torch

from oracle import coefficients, exact
from oracle.precision import AGREED_DIGITS, context

NAMES = ("beta", "m", "f", "n", "G")


def recurrences(theta, a, eta, zero, one):
    """The recurrences of SPEC section 2, for any kind of number."""
    C = len(theta)
    beta, m, f = one, one, zero
    n, G = np.full(C, zero), np.full(C, zero)
    rows = []
    for t in range(C):
        beta, m = a[t] * beta, eta[t] * m
        f = a[t] * f + m
        n, G = eta[t] * n, a[t] * G
        n[t] = theta[t]
        G = G + n
        rows.append((beta, m, f, n, G))
    return {
        name: np.array([row[i] for row in rows], dtype=object).reshape((C,) if i < 3 else (C, C))
        for i, name in enumerate(NAMES)
    }


def random(C, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(C, generator=generator, dtype=torch.float64) for _ in range(3)]


def edges():
    """Each gate at 0, 1, the smallest subnormal, next to 1, and between."""
    values = torch.tensor([0.0, 1.0, 5e-324, 1 - 2.0**-53, 0.3], dtype=torch.float64)
    return [x.reshape(-1) for x in torch.meshgrid(values, values, values, indexing="ij")]


@pytest.mark.parametrize(
    "gates", [random(1), random(2), random(17), [x[60:100] for x in edges()], [x.float() for x in random(5)]]
)
def test_the_defining_sums_satisfy_the_recurrences(gates):
    """To the digits the oracle promises; the recurrences run in four times as many, and nothing in them cancels."""
    found = coefficients(*gates)
    with context.workdps(4 * AGREED_DIGITS):
        expected = recurrences(*(exact(x) for x in gates), context.zero, context.one)
    for name in NAMES:
        error = np.abs(getattr(found, name) - expected[name])
        assert getattr(found, name).shape == expected[name].shape
        assert (error <= context.mpf(10) ** -AGREED_DIGITS * np.abs(expected[name])).all(), name


@pytest.mark.parametrize("seed", range(5))
def test_dyadic_gates_give_the_rational_coefficients(seed):
    """Quarters over six tokens need 14 bits: the oracle has every coefficient exactly."""
    gates = [torch.randint(0, 5, (6,), generator=torch.Generator().manual_seed(3 * seed + i)) / 4 for i in range(3)]
    expected = recurrences(*([Fraction(float(x)) for x in gate] for gate in gates), Fraction(0), Fraction(1))
    found = coefficients(*gates)
    for name in NAMES:
        assert [Fraction(int(x * 2**20), 2**20) for x in getattr(found, name).flat] == list(expected[name].flat), name


def test_future_tokens_have_no_weight():
    found = coefficients(*random(4))
    above = np.triu_indices(4, k=1)
    assert (found.n[above] == 0).all()
    assert (found.G[above] == 0).all()


def test_numbers_of_the_oracle_are_accepted_and_arguments_kept():
    gates = [exact(x) for x in random(4)]
    copies = [gate.copy() for gate in gates]
    from_numbers, from_floats = coefficients(*gates), coefficients(*random(4))
    assert all((getattr(from_numbers, name) == getattr(from_floats, name)).all() for name in NAMES)
    assert all((gate == copy).all() for gate, copy in zip(gates, copies, strict=True))


def test_an_empty_piece_has_no_coefficients():
    assert coefficients(*random(0)).G.shape == (0, 0)

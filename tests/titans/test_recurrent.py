"""The definition on cases small enough to be worked out by hand, in fractions; float64 holds all of them exactly."""

from fractions import Fraction as F

import pytest
import torch
from torch import Tensor

from titans import TitansState, titans_linear

HALF = F(1, 2)


def tensor(x: list[F | int], *shape: int) -> Tensor:
    return torch.tensor([float(value) for value in x], dtype=torch.float64).reshape(shape)


def fractions(x: Tensor) -> list[F]:
    return [F(value) for value in x.flatten().tolist()]


def one_entry(
    theta: F, alpha: F, eta: F, v: list[F | int], C: int, state: TitansState | None = None
) -> tuple[list[F], TitansState]:
    """Plain memory, one head of width 1, q = k = 1: M, S, anchor are numbers."""
    T = len(v)
    ones = torch.ones(1, T, 1, 1, dtype=torch.float64)
    gates = (tensor([gate] * T, 1, T, 1) for gate in (theta, alpha, eta))
    o, final = titans_linear(ones, ones, tensor(v, 1, T, 1, 1), None, None, *gates, 1e-6, C, state, True)
    assert final is not None
    return fractions(o), final


def numbers(state: TitansState) -> tuple[F, ...]:
    return tuple(F(x.item()) for x in state)


# theta = alpha = eta = 1/2, v = 1, M = S = 0:
#   u = A - 1;   S <- S/2 - u;   M <- M/2 + S;   o = M
CHUNK_OF_2 = [
    # A = 0: u = -1, S = 1, M = 1
    1,
    # A = 0: u = -1, S = 3/2, M = 1/2 + 3/2; it completes a chunk: A = 2
    2,
    # A = 2: u = 1, S = 3/4 - 1 = -1/4, M = 1 - 1/4
    F(3, 4),
    # A = 2: u = 1, S = -1/8 - 1 = -9/8, M = 3/8 - 9/8; A = -3/4
    F(-3, 4),
    # A = -3/4: u = -7/4, S = -9/16 + 7/4 = 19/16, M = -3/8 + 19/16
    F(13, 16),
]
CHUNK_OF_1 = [
    # A = 0: u = -1, S = 1, M = 1
    1,
    # A = 1: u = 0, S = 1/2, M = 1/2 + 1/2
    1,
    # A = 1: u = 0, S = 1/4, M = 1/2 + 1/4
    F(3, 4),
    # A = 3/4: u = -1/4, S = 1/8 + 1/4 = 3/8, M = 3/8 + 3/8
    F(3, 4),
]


@pytest.mark.parametrize(("C", "wanted"), [(2, CHUNK_OF_2), (1, CHUNK_OF_1)])
def test_the_gradient_is_taken_where_the_chunk_began(C: int, wanted: list[F | int]) -> None:
    o, _ = one_entry(HALF, HALF, HALF, [1] * len(wanted), C)
    assert o == wanted


def test_the_final_state_is_that_after_the_last_token() -> None:
    _, state = one_entry(HALF, HALF, HALF, [1] * 5, 2)
    assert numbers(state) == (F(13, 16), F(19, 16), F(-3, 4), 1)
    _, state = one_entry(HALF, HALF, HALF, [1] * 4, 2)
    assert numbers(state) == (F(-3, 4), F(-9, 8), F(-3, 4), 0)


def test_a_state_in_mid_chunk_keeps_its_anchor_until_the_chunk_is_full() -> None:
    start = TitansState(*(tensor([x], 1, 1, 1, 1) for x in (4, 2, 8)), torch.tensor([1]))
    # offset 1 of 3, A = 8: u = 7, S = 1 - 7 = -6, M = 2 - 6 = -4
    # offset 2, A = 8:      u = 7, S = -3 - 7 = -10, M = -2 - 10 = -12; A = -12
    # offset 0, A = -12:    u = -13, S = -5 + 13 = 8, M = -6 + 8 = 2
    o, state = one_entry(HALF, HALF, HALF, [1, 1, 1], 3, start)
    assert o == [-4, -12, 2]
    assert numbers(state) == (2, 8, -12, 1)


@pytest.mark.parametrize(
    ("theta", "alpha", "eta", "wanted"),
    [
        # nothing learned: zeros stay
        (F(0), HALF, HALF, [0, 0, 0]),
        # everything forgotten: M = S, and with A = 0 in the whole chunk S <- S/2 + 1
        (HALF, F(1), HALF, [1, F(3, 2), F(7, 4)]),
        # no momentum: S = 1, M <- M/2 + 1
        (HALF, HALF, F(0), [1, F(3, 2), F(7, 4)]),
        # nothing forgotten, all momentum: S = 1, 2, 3, M = 1, 3, 6
        (HALF, F(0), F(1), [1, 3, 6]),
    ],
)
def test_gates_at_the_ends_of_their_ranges(theta: F, alpha: F, eta: F, wanted: list[F | int]) -> None:
    o, _ = one_entry(theta, alpha, eta, [1, 1, 1], 3)
    assert o == wanted


def test_keys_are_the_rows_and_values_the_columns() -> None:
    """k = (1, 0), v = (3, 5): u = -v, and M = 2 theta k^T v; only a query along k recalls it."""
    q = tensor([1, 0, 0, 1], 1, 2, 1, 2)
    k, v = tensor([1, 0, 0, 0], 1, 2, 1, 2), tensor([3, 5, 0, 0], 1, 2, 1, 2)
    theta, zero = tensor([HALF, 0], 1, 2, 1), tensor([0, 0], 1, 2, 1)
    o, state = titans_linear(q, k, v, None, None, theta, zero, zero, 1e-6, 4, None, True)
    assert state is not None
    assert fractions(state.M) == [3, 5, 0, 0]
    assert fractions(o) == [3, 5, 0, 0]


def test_the_normalised_memory() -> None:
    """One token of width 2, eps = 3, w = (2, 4), b = (1, 0), M_0 = A = ((1, -1), (2, -2)), S_0 = 0.

    y = k A = (1, -1), var y + eps = 4, r = 1/2, x = (1/2, -1/2);  v - k = (1, 2)
    e = (x w + b - (v - k)) w = ((1 + 1 - 1) 2, (-2 + 0 - 2) 4) = (2, -16),  mean e = -7,  mean e x = (1 + 8) / 2
    u = r (e - mean e - x mean(e x)) = ((9 - 9/4) / 2, (-9 + 9/4) / 2) = (27/8, -27/8)
    S = -2 theta k^T u = ((-27/8, 27/8), (0, 0)) at theta = 1/2,  M = M_0 / 2 + S = ((-23/8, 23/8), (1, -1))
    y = q M = (1, -1), norm y = (1/2, -1/2), o = y + norm y w + b = (1 + 1 + 1, -1 - 2 + 0)
    """
    q, k, v = (tensor(x, 1, 1, 1, 2) for x in ([0, 1], [1, 0], [2, 2]))
    w, b = tensor([2, 4], 1, 2), tensor([1, 0], 1, 2)
    gates = (tensor([gate], 1, 1, 1) for gate in (HALF, HALF, HALF))
    M = tensor([1, -1, 2, -2], 1, 1, 2, 2)
    o, state = titans_linear(q, k, v, w, b, *gates, 3.0, 4, M, True)
    assert state is not None
    assert fractions(o) == [3, -3]
    assert fractions(state.M) == [F(-23, 8), F(23, 8), 1, -1]
    assert fractions(state.S) == [F(-27, 8), F(27, 8), 0, 0]
    assert fractions(state.anchor) == [1, -1, 2, -2]
    assert state.offset.tolist() == [1]


def test_log_gates_hold_the_log_of_what_is_kept() -> None:
    """log(1 - alpha) = -inf forgets everything; log eta = 0 keeps all momentum; log theta = 0 is a rate of 1."""
    ones, zero = torch.ones(1, 3, 1, 1, dtype=torch.float64), tensor([0] * 3, 1, 3, 1)
    forget = tensor([0], 1, 1, 1).expand(1, 3, 1).clone()
    forget[0, 1] = -torch.inf
    # A = 0: S = 2, 4, 6; M = 2, then only S = 4, then 4 + 6
    o, _ = titans_linear(ones, ones, ones, None, None, zero, forget, zero, 1e-6, 3, None, log_gates=True)
    assert fractions(o) == [2, 4, 10]


def test_no_tokens_leave_the_state_as_it_was() -> None:
    start = TitansState(*(tensor([x], 1, 1, 1, 1) for x in (4, 2, 8)), torch.tensor([1]))
    o, state = one_entry(HALF, HALF, HALF, [], 3, start)
    assert o == []
    assert numbers(state) == (4, 2, 8, 1)

"""A-posteriori radii hold for the exact result and at the worst signs, and are no looser than the balls."""

from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
from oracle.bounds import gradient_radius
from oracle.bounds.error_model import FLOAT32, FLOAT64, ErrorModel, arithmetic_for
from oracle.bounds.gates import EXP_ARGUMENT
from oracle.bounds.posterior import EXACT, enclose, judge
from oracle.bounds.posterior import piece as pieces
from oracle.bounds.posterior.batches import batches
from oracle.bounds.posterior.enclosure import SLACK
from oracle.bounds.posterior.polynomial import Polynomial, leaf
from oracle.bounds.posterior.stages import RSQRT, NormSegments, norm_vjp, rsqrt
from oracle.bounds.posterior.tape import OWN, Tape, charge
from tests.oracle.real_chunks import (
    NORMALISED,
    PER_TOKEN,
    PLAIN,
    VALUES,
    by_name,
    chunk,
    exact,
    loop,
    op,
    worst_ratio,
)
from tests.oracle.test_bounds import SPECIAL, problem

# At the worst signs an error must come this close to its radius.
WORST_SIGNS = 1 / 2


@cache
def pieces_of(plain: bool) -> list[tuple[oracle.Inputs, oracle.Cotangents]]:
    """Small problems within one chunk, of every kind that the balls are tested on."""
    drawn = (problem(seed, one_piece=True) for seed in range(60))
    return [(inputs, cotangents) for inputs, cotangents in drawn if plain == (inputs.w is None)][:12]


@pytest.mark.parametrize("plain", [False, True])
def test_exact_result_lies_within_the_radius_of_exact_arithmetic(plain: bool) -> None:
    for inputs, cotangents in pieces_of(plain):
        ratios = worst_ratio(enclose(inputs, cotangents, EXACT), exact(inputs, cotangents))
        assert max(ratios.values()) <= 1, ratios


@pytest.mark.parametrize("case", [case for case in SPECIAL if case != "no tokens"])
def test_special_values_lie_within_a_finite_radius(case: str) -> None:
    inputs, cotangents = chunk(4, 5)
    inputs = SPECIAL[case](replace(inputs, anchor=None, chunk_size=5))
    D = inputs.q.shape[-1]
    inputs = replace(inputs, chunk_size=5, S=inputs.S[..., :D, :D])
    cotangents = oracle.Cotangents(cotangents.o[..., :D], cotangents.M[..., :D, :D], cotangents.S[..., :D, :D])
    assert max(worst_ratio(enclose(inputs, cotangents, EXACT), exact(inputs, cotangents)).values()) <= 1
    enclosure = enclose(inputs, cotangents, FLOAT32)
    assert all(x.isfinite().all() for x in enclosure.radius.values())
    assert max(worst_ratio(enclosure, loop(inputs, cotangents)).values()) <= 1


@pytest.mark.parametrize("kind", [{}, {"plain": True}, {"log_gates": True}])
def test_real_chunk_lies_within_the_radius(kind: dict[str, bool]) -> None:
    inputs, cotangents = chunk(32, 32, heads=1, **kind)
    ratios = worst_ratio(enclose(inputs, cotangents, EXACT), exact(inputs, cotangents))
    assert max(ratios.values()) <= 1, ratios
    for backend in ("chunk", "log"):
        results = op(inputs, cotangents, backend)
        verdicts = judge(inputs, cotangents, arithmetic_for(torch.float32, log_space=backend == "log"), results)
        assert {verdict.result for verdict in verdicts} == set(PLAIN if "plain" in kind else NORMALISED)
        assert max(verdict.ratio for verdict in verdicts) <= 1
        assert not any(verdict.empty for verdict in verdicts)


@pytest.mark.parametrize("plain", [False, True])
def test_radius_is_no_looser_than_the_balls(plain: bool) -> None:
    # a log gate's rounded argument is allowed more than the balls allow, (B14)
    linear = [(inputs, cotangents) for inputs, cotangents in pieces_of(plain) if not inputs.log_gates]
    assert len(linear) > 3
    for inputs, cotangents in linear:
        enclosure = enclose(inputs, cotangents, FLOAT32)
        for name, radius in by_name(*gradient_radius(inputs, cotangents, FLOAT32)).items():
            # `SLACK` is in the radius already; the roundings of the float64 values are less than another
            assert (enclosure.radius[name] <= SLACK**2 * torch.tensor(radius)).all(), name


def test_radius_of_a_real_chunk_is_far_tighter_than_the_balls() -> None:
    inputs, cotangents = chunk(32, 32, heads=1)
    enclosure = enclose(inputs, cotangents, FLOAT32)
    balls = by_name(*gradient_radius(inputs, cotangents, FLOAT32))
    for name in ("dk", "dv", "dw", "db", "dtheta", "dalpha", "deta"):
        assert enclosure.radius[name].max() < balls[name].max() / 100


@pytest.mark.parametrize("kind", [{}, {"plain": True}, {"log_gates": True}])
def test_counts_are_those_of_the_written_model(kind: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, cotangents = chunk(3, 4, **kind)
    written, charged = Counter[Any](), Counter[Any]()
    rounded, roundings = ErrorModel.rounded, Tape.roundings

    def key(count: Any, operands: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        return float(np.max(np.asarray(count))), operands

    def count_balls(self: ErrorModel, x: Any, count: Any, operands: Any = (0, 0)) -> Any:
        written[key(count, operands)] += 1
        return rounded(self, x, count, operands)

    def count_segments(self: Tape, x: Any, count: Any, operands: Any = (0, 0)) -> Any:
        charged[key(count, operands)] += 1
        return roundings(self, x, count, operands)

    monkeypatch.setattr(ErrorModel, "rounded", count_balls)
    monkeypatch.setattr(Tape, "roundings", count_segments)
    gradient_radius(inputs, cotangents, FLOAT32)
    enclose(inputs, cotangents, FLOAT32, sharp=False)
    # the sums of w and b over sequences, (B9), are not on a tape
    written[key(3 * 4 + 4, (0, 0))] -= 0 if "plain" in kind else 2
    assert charged == +written


class Shaken(Tape):
    """A tape whose segments are moved by given errors, and that records how large the model lets them be."""

    moves: list[Tensor] | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.allowed: list[Tensor] = []

    def roundings(self, x: Polynomial, count: Any, operands: tuple[int, int] = (0, 0)) -> Tensor:
        exactly = replace(x, first=torch.zeros_like(x.size), rest=torch.zeros_like(x.size))
        self.last = charge(exactly, count, operands, self.arithmetic)
        return super().roundings(x, count, operands)

    def moved(self, value: Tensor) -> Tensor:
        self.allowed.append(self.last)
        return value if self.moves is None else value + self.moves[len(self.allowed) - 1]

    def enter(self, value: Tensor, size: Tensor) -> Polynomial:
        return super().enter(self.moved(value), size)

    def _cut(self, source: Tensor, size: Tensor, radius: Tensor) -> Polynomial:
        # what is cut has its error already
        source = self.moved(source) if size.any() else source
        return super()._cut(source, size, radius)


@pytest.mark.parametrize(
    ("D", "L", "unit", "names"),
    [
        (8, 16, 2.0**-24, ("o", "dq", "dk", "dv", "dw", "dtheta", "dalpha", "deta", "dM", "danchor")),
        (4, 6, 2.0**-14, ("o", "dk", "db", "dalpha", "dS")),
        (32, 32, 2.0**-24, ("dk",)),
    ],
)
def test_errors_at_the_worst_signs_stay_within_the_radius_and_come_close(
    D: int, L: int, unit: float, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "Tape", Shaken)
    monkeypatch.setattr(Shaken, "moves", None)
    inputs, cotangents = chunk(D, L, heads=1)
    arithmetic = replace(FLOAT32, unit=unit)
    (batch,) = batches(inputs, cotangents, arithmetic)
    tape = batch.piece.tape
    moved = [error.source is None or bool(error.size.any()) for error in tape.errors]
    for name in names:
        value = batch.piece.results[name].polynomial.value
        functional = torch.zeros(1, *value.shape, dtype=torch.float64)
        functional.flatten(2)[..., 0] = 1
        adjoints = tape.adjoints(value, functional)
        signs = [0.0 if x is None else x[0].sign() for x, is_moved in zip(adjoints, moved, strict=True) if is_moved]
        radius = tape.chained(value, functional)[0]
        for sign in (1, -1):
            moves = [sign * s * allowed for s, allowed in zip(signs, tape.allowed, strict=True)]
            monkeypatch.setattr(Shaken, "moves", moves)
            (shaken,) = batches(inputs, cotangents, arithmetic)
            shift = (shaken.piece.results[name].polynomial.value - value).flatten(1)[:, 0].abs()
            assert (shift <= radius).all(), name
            assert (shift >= WORST_SIGNS * radius).all(), name


def test_remainder_of_a_polynomial_is_exact_for_positive_leaves() -> None:
    x, y, d, h = torch.randint(1, 9, (4, 5, 5), generator=torch.Generator().manual_seed(1)).double()

    def polynomial(a: Any, b: Any) -> Any:
        return a @ b * a + b * b

    p = polynomial(leaf(x, d), leaf(y, h))
    assert (p.grown == polynomial(x + d, y + h)).all()
    # the derivative in the direction (d, h), by the product rule
    linear = (d @ y + x @ h) * x + (x @ y) * d + 2 * y * h
    assert (p.first == linear).all()
    assert (p.rest == polynomial(x + d, y + h) - polynomial(x, y) - linear).all()


@pytest.mark.parametrize("unit", [2.0**-4, 2.0**-24])
def test_radius_of_a_square_has_its_second_order(unit: float) -> None:
    tape = Tape(replace(FLOAT32, unit=unit), 0)
    x = tape.local(leaf(torch.ones(1, 1, 1, dtype=torch.float64)), 3)
    square = tape.local(x * x, 0)
    assert x.first > 3 * unit
    exactly = (1 + x.first) ** 2 - 1
    assert exactly / SLACK <= square.first <= exactly * SLACK


@pytest.mark.parametrize("eps", [1e-6, 1.0])
@pytest.mark.parametrize("radius", [1e-9, 1e-3, 0.4, 3.0, 1e13])
def test_radius_of_rsqrt_covers_the_curve(radius: float, eps: float) -> None:
    # 1e10 + 1e-6 rounds to twice that distance from 1e10
    for variance in (0.0, 1e-7, 0.3, 2.0, 1e10):
        tape = Tape(EXACT, 0)
        value = tape.enter(*torch.tensor([variance, radius], dtype=torch.float64)[:, None, None, None])
        bound = float(rsqrt(value, eps, tape).first)
        here, away = oracle.exact(np.array([variance, radius]))
        curve = np.array([here, max(here - away, 0 * here), here + away]) + oracle.exact(eps)
        values = 1 / curve ** oracle.exact(0.5)
        worst = max(abs(values[1:] - values[0]))
        assert worst <= bound * SLACK
        # the tangent and its remainder are twice the change, at most, where the radius is not large
        own = 1.01 * OWN * RSQRT * FLOAT64.unit * values[0]
        assert radius > variance + eps or bound <= 4 * worst + own * SLACK


def joined(problems: list[tuple[oracle.Inputs, oracle.Cotangents]]) -> tuple[oracle.Inputs, oracle.Cotangents]:
    """The problems as packed sequences of one call; w and b are those of the first."""

    def cat(xs: list[Any], axis: int) -> Any:
        return torch.cat(xs, axis)

    first, lengths = problems[0][0], [inputs.q.shape[1] for inputs, _ in problems]
    tokens = {n: cat([getattr(x, n) for x, _ in problems], 1) for n in PER_TOKEN}
    states = {n: cat([getattr(x, n) for x, _ in problems], 0) for n in ("M", "S", "anchor")}
    bounds = tuple(int(x) for x in np.cumsum([0, *lengths]))
    inputs = replace(first, **tokens, **states, chunk_size=max(lengths), cu_seqlens=bounds, offset=None)
    cotangents = [cat([getattr(d, n) for _, d in problems], axis) for n, axis in zip(VALUES, (1, 0, 0, 0), strict=True)]
    return inputs, oracle.Cotangents(*cotangents)


def test_sequences_of_a_call_are_judged_as_each_alone() -> None:
    problems = [chunk(4, L) for L in (5, 3, 5, 1)]
    whole, cotangents = joined(problems)
    together = enclose(whole, cotangents, FLOAT32)
    enclosure = enclose(whole, cotangents, EXACT)
    assert max(worst_ratio(enclosure, exact(whole, cotangents)).values()) <= 1
    for n, (start, end) in enumerate(pairwise(whole.cu_seqlens or ())):
        inputs, given = problems[n]
        inputs = replace(inputs, w=whole.w, b=whole.b, chunk_size=whole.chunk_size)
        alone, own = enclose(inputs, given, FLOAT32), enclose(inputs, given, EXACT).radius
        for name in set(NORMALISED) - {"dw", "db"}:
            part = slice(n, n + 1) if together.values[name].shape[0] == len(problems) else np.s_[:, start:end]
            difference = (together.values[name][part] - alone.values[name]).abs()
            assert (difference <= enclosure.radius[name][part] + own[name]).all(), name
            assert (together.radius[name][part] <= SLACK * alone.radius[name]).all(), name
            assert (alone.radius[name] <= SLACK * together.radius[name][part]).all(), name


def row(*entries: float) -> Tensor:
    """One token of one problem."""
    return torch.tensor(entries, dtype=torch.float64)[None, None]


def test_roundings_of_the_reverse_of_norm_act_on_terms_that_cancel() -> None:
    """(B6): dr cancels dx . (y - mean y) here, and an implementation may round both on their way into dy."""
    tape, D, r = Tape(FLOAT32, 0), 4, 1 / np.sqrt(3)
    centred, dx, dr = row(3, -1, -1, -1), row(3, -1, -1, -1), row(-12)
    dy = norm_vjp(NormSegments(leaf(centred), leaf(row(r)), leaf(centred * r)), leaf(dx), leaf(dr), tape)
    through_x = dx.abs() * r
    through_r = centred.abs() * ((dx * centred).abs().sum() + dr.abs()) * r**3 / D
    roundings = sum((D + 4) * (term + term.mean()) for term in (through_x, through_r)) + (D + 2 + 6 + 5) * through_r
    assert (tape.local(dy, D + 4).first >= FLOAT32.unit * roundings).all()


def test_a_mean_that_may_be_left_out_counts_both_ways() -> None:
    """(B6): centred, an error of 1 in one of four entries is 3/4 there and 1/4 elsewhere; not centred it is 1 and 0."""
    tape = Tape(EXACT, 0)
    x = tape.enter(row(3, -1, -1, -1), row(1, 0, 0, 0))
    assert (tape.local(tape.centred_or_not(x), 1).first >= row(1, 0.25, 0.25, 0.25)).all()


def test_a_log_gates_rounded_argument_is_charged_on_every_use() -> None:
    """(B14): exp x as a power of two is off by the relative error 1.23 u |x|, and M_T = a_2 a_1 M_0 has two of them."""
    zero, one = torch.full((1, 2, 1), -torch.inf), torch.ones(1, 2, 1, 1)
    inputs = oracle.Inputs(
        0 * one, 0 * one, 0 * one, None, None, zero, torch.full((1, 2, 1), -20.0), zero,
        chunk_size=2, M=torch.ones(1, 1, 1, 1), log_gates=True,
    )  # fmt: skip
    cotangents = oracle.Cotangents(o=0 * one)
    enclosure = enclose(inputs, cotangents, FLOAT32)
    assert (enclosure.radius["M"] >= 2 * EXP_ARGUMENT * 20 * FLOAT32.unit * enclosure.values["M"]).all()


def test_roundings_of_the_reverse_pass_are_in_every_radius() -> None:
    """(B13): what a segment inherits is known up to N 2^-53 of it."""
    N = 2.0**20
    tape = Tape(EXACT, N)
    inherited = tape.enter(row(1), row(1))
    assert tape.local(inherited, 0).first == 1 + N * FLOAT64.unit

"""A-posteriori radii hold for the exact result and at the worst signs, are no looser than the balls, and judge."""

from collections import Counter
from dataclasses import fields, replace
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
from oracle.bounds.posterior import EXACT, Enclosure, Verdict, as_pieces, enclose, judge
from oracle.bounds.posterior import piece as pieces
from oracle.bounds.posterior.batches import batches
from oracle.bounds.posterior.enclosure import SLACK
from oracle.bounds.posterior.polynomial import Polynomial, leaf
from oracle.bounds.posterior.stages import RSQRT, NormSegments, norm_vjp, rsqrt
from oracle.bounds.posterior.tape import OWN, Tape, charge
from tests.oracle.test_bounds import SPECIAL, gradients, linear_coefficients, problem, ratio
from titans import TitansState, chunk_titans_linear

VALUES = ("o", "M", "S", "anchor")
GRADIENTS = ("q", "k", "v", "w", "b", "theta", "alpha", "eta", "M", "S", "anchor")
PER_TOKEN = ("q", "k", "v", "theta", "alpha", "eta")
NORMALISED = (*VALUES, *("d" + name for name in GRADIENTS))
PLAIN = tuple(name for name in NORMALISED if name not in ("dw", "db"))

# At the worst signs an error must come this close to its radius.
WORST_SIGNS = 1 / 2


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


@cache
def pieces_of(plain: bool) -> list[tuple[oracle.Inputs, oracle.Cotangents]]:
    """Small problems within one chunk, of every kind that the balls are tested on."""
    drawn = (problem(seed, one_piece=True) for seed in range(60))
    return [(inputs, cotangents) for inputs, cotangents in drawn if plain == (inputs.w is None)][:12]


def worst_ratio(enclosure: Enclosure, results: dict[str, Any]) -> dict[str, float]:
    """Distance from the float64 values over the radius; the results may be in high precision."""
    found = {}
    for name, x in results.items():
        numbers = oracle.exact(x) if isinstance(x, Tensor) else x
        found[name] = ratio(enclosure.values[name], numbers, enclosure.radius[name].numpy())
    return found


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


@pytest.mark.parametrize("kind", [{}, {"plain": True}])
@pytest.mark.parametrize("fault", ["ten radii", "nan"])
def test_one_wrong_element_of_any_result_is_seen(kind: dict[str, bool], fault: str) -> None:
    inputs, cotangents = chunk(8, 12, **kind)
    enclosure = enclose(inputs, cotangents, FLOAT32)
    right = loop(inputs, cotangents)
    assert max(verdict.ratio for verdict in judge(inputs, cotangents, FLOAT32, right)) <= 1
    for name, x in right.items():
        wrong = x.double().contiguous()
        at = wrong.numel() // 3
        wrong.view(-1)[at] += torch.nan if fault == "nan" else 10 * enclosure.radius[name].flatten()[at]
        verdicts = judge(inputs, cotangents, FLOAT32, right | {name: wrong})
        found = [verdict for verdict in verdicts if verdict.ratio > 1]
        assert {verdict.result for verdict in found} == {name}
        index = np.unravel_index(at, wrong.shape)
        places = {"elements": index}
        if name in ("o", "dq", "dk", "dv"):
            # one sequence, whose tokens are those of the call
            places |= {"samples": (0, index[2], index[1], index[3]), "rows": (0, index[2], index[1])}
        elif name in ("dM", "dS", "danchor"):
            places |= {"samples": index, "rows": index[:3]}
        assert all(verdict.index == places[verdict.kind] for verdict in found)


def test_no_element_escapes_the_projection_of_its_row() -> None:
    inputs, cotangents = chunk(8, 12)
    right, radius = loop(inputs, cotangents), enclose(inputs, cotangents, FLOAT32).radius
    for name in ("o", "dq", "dk", "dv"):
        wrong = right[name].double().contiguous()
        # the radius of a projection on signs is at most the sum of the elements' radii
        wrong[0, 5, 1, 3] += 2 * radius[name][0, 5, 1].sum()
        verdicts = judge(inputs, cotangents, FLOAT32, right | {name: wrong})
        assert [verdict.ratio > 1 for verdict in verdicts if verdict.kind == "rows" and verdict.result == name] == [
            True
        ]


def test_verdict_of_an_overflow_promises_nothing_and_says_so() -> None:
    inputs, cotangents = chunk(4, 5)
    big = replace(inputs, k=inputs.k * 2.0**100, q=inputs.q * 2.0**100)
    enclosure = enclose(big, cotangents, FLOAT32)
    assert enclosure.radius["dk"].isinf().any()
    assert not any(x.isnan().any() for x in enclosure.radius.values())
    verdicts = judge(big, cotangents, FLOAT32, {"dk": torch.full_like(big.k, torch.nan)})
    assert all(verdict.empty > 0 for verdict in verdicts)


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


def long_call() -> oracle.Inputs:
    """Two rows of eleven tokens that begin in the middle of a chunk of four, with anchors of their own."""
    inputs, _ = chunk(4, 22)
    rows = {name: getattr(inputs, name).unflatten(1, (2, 11))[0] for name in PER_TOKEN}
    states = {name: torch.cat([getattr(inputs, name), getattr(inputs, name).mT]) for name in ("M", "S", "anchor")}
    return replace(inputs, **rows, **states, chunk_size=4, offset=(1, 3))


def test_pieces_of_a_call_are_the_call() -> None:
    inputs = long_call()
    # plain memory of small integers with gates of 1/2: every state is exact in float64
    whole = {name: getattr(inputs, name).round() for name in ("q", "k", "v", "M", "S", "anchor")}
    halves = {name: torch.full_like(inputs.theta, 0.5) for name in ("theta", "alpha", "eta")}
    inputs = replace(inputs, **whole, **halves, w=None, b=None)
    entering = []
    for n, ends in enumerate(((0, 3, 7), (0, 1, 5, 9))):
        for end in ends:
            tokens = {name: getattr(inputs, name)[n : n + 1, :end] for name in PER_TOKEN}
            state = {name: getattr(inputs, name)[n : n + 1] for name in ("M", "S", "anchor")}
            entering.append(oracle.forward(replace(inputs, **tokens, **state, offset=inputs.offsets[n : n + 1])).state)
    M, S = (torch.tensor(np.concatenate([getattr(x, name) for x in entering]).astype(float)) for name in ("M", "S"))
    pieces = as_pieces(inputs, M, S)
    assert pieces.cu_seqlens == (0, 3, 7, 11, 12, 16, 20, 22)
    assert pieces.offset == (1, 0, 0, 3, 0, 0, 0)
    output = oracle.forward(inputs)
    assert (oracle.forward(pieces).o.reshape(output.o.shape) == output.o).all()


def test_an_implementation_is_judged_from_its_own_states_at_the_ends_of_chunks() -> None:
    inputs = long_call()
    generator = torch.Generator().manual_seed(7)
    M, S = torch.randn(2, 7, 2, 4, 4, generator=generator)
    pieces = as_pieces(inputs, M, S)
    cotangents = oracle.Cotangents(torch.randn(pieces.q.shape, generator=generator), M.mT, S.mT, M + S)
    results = loop(pieces, cotangents)
    assert max(verdict.ratio for verdict in judge(pieces, cotangents, FLOAT32, results)) <= 1
    results["M"][4] *= 1.001
    assert {verdict.result for verdict in judge(pieces, cotangents, FLOAT32, results) if verdict.ratio > 1} == {"M"}


def test_calls_that_cannot_be_judged_are_refused() -> None:
    inputs, cotangents = chunk(4, 5)
    with pytest.raises(ValueError, match="sequence 0 must have 1 to 4 tokens, got 5"):
        enclose(replace(inputs, chunk_size=4), cotangents, FLOAT32)
    with pytest.raises(ValueError, match=r"`dtheta` must have shape \(1, 5, 2\), got \(1, 5, 2, 1\)"):
        judge(inputs, cotangents, FLOAT32, {"dtheta": inputs.theta[..., None]})
    with pytest.raises(ValueError, match="exact in the arithmetic"):
        enclose(replace(inputs, q=inputs.q.double()), cotangents, FLOAT32)


def test_operands_rounded_to_half_precision_stay_within_their_own_radius_alone() -> None:
    inputs, cotangents = chunk(16, 16, plain=True, dtype=torch.bfloat16)
    arithmetic = arithmetic_for(torch.bfloat16, operand=torch.bfloat16)
    results = half_operands(inputs)
    rounded, not_rounded = (judge(inputs, cotangents, x, results) for x in (arithmetic, arithmetic_for(torch.bfloat16)))
    assert max(verdict.ratio for verdict in rounded) <= 1
    assert max(verdict.ratio for verdict in not_rounded) > 1


def half_operands(inputs: oracle.Inputs) -> dict[str, Tensor]:
    """M and S after a chunk of the plain memory by products whose operands are rounded to bfloat16."""

    def product(x: Tensor, y: Tensor) -> Tensor:
        return x.bfloat16().float() @ y.bfloat16().float()

    results = {"M": inputs.M.clone(), "S": inputs.S.clone()}
    for h in range(2):
        k, v = inputs.k[0, :, h], inputs.v[0, :, h]
        gates = (np.asarray(x[0, :, h].float()) for x in (inputs.theta, 1 - inputs.alpha.float(), inputs.eta))
        beta, m, f, n, G = (torch.tensor(x)[-1] for x in linear_coefficients(*gates))
        u = product(k, inputs.anchor[0, h]) - v.float()
        M, S = inputs.M[0, h], inputs.S[0, h]
        results["M"][0, h] = beta * M + f * S - 2 * product(k.mT, G[:, None] * u)
        results["S"][0, h] = m * S - 2 * product(k.mT, n[:, None] * u)
    return results


def test_half_precision_results_have_their_own_rounding() -> None:
    inputs, cotangents = chunk(8, 8, dtype=torch.float16)
    results = op(inputs, cotangents, "chunk")
    verdicts = judge(inputs, cotangents, FLOAT32, results)
    assert max(verdict.ratio for verdict in verdicts) <= 1
    assert max(verdict.ratio for verdict in verdicts if verdict.result == "o") > 1 / 30


def test_float64_is_bounded_too() -> None:
    inputs, cotangents = chunk(8, 12)
    names = [name for name in (*GRADIENTS, "anchor") if getattr(inputs, name) is not None]
    wide = replace(inputs, **{name: getattr(inputs, name).double() for name in names})
    given = oracle.Cotangents(*(getattr(cotangents, name).double() for name in VALUES))
    verdicts = judge(wide, given, FLOAT64, op(wide, given, "chunk"))
    assert 0 < max(verdict.ratio for verdict in verdicts) <= 1


def test_ratio_of_a_verdict() -> None:
    assert Verdict("o", "rows", 1, 0, 2.0, 1.0, (0,)).ratio == 2
    assert Verdict("o", "rows", 1, 0, 0.0, 0.0, (0,)).ratio == 0
    assert Verdict("o", "rows", 1, 0, 1.0, 0.0, (0,)).ratio == np.inf
    assert Verdict("o", "rows", 1, 0, np.inf, 1.0, (0,)).ratio == np.inf
    assert Verdict("o", "rows", 1, 1, np.inf, np.inf, (0,)).ratio == 0


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_device_changes_no_verdict() -> None:
    inputs, cotangents = chunk(32, 32)
    devices = []
    for device in ("cpu", "cuda"):
        moved = [
            replace(x, **{f.name: y.to(device) for f in fields(x) if isinstance(y := getattr(x, f.name), Tensor)})
            for x in (inputs, cotangents)
        ]
        devices.append((*moved, op(*moved, "chunk")))
    (cpu, cuda), exactly = (enclose(x, d, FLOAT32) for x, d, _ in devices), enclose(inputs, cotangents, EXACT).radius
    for name in NORMALISED:
        difference = (cpu.values[name] - cuda.values[name].cpu()).abs()
        assert (difference <= 2 * exactly[name]).all(), name
        assert (cuda.radius[name].cpu() <= SLACK * cpu.radius[name]).all(), name
    for given, cotangent, results in devices:
        assert max(verdict.ratio for verdict in judge(given, cotangent, FLOAT32, results)) <= 1

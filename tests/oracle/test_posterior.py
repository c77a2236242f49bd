"""A-posteriori radii hold for the exact result and at the worst signs, are no looser than the balls, and judge."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
from oracle.ball import FLOAT32, FLOAT64, Arithmetic, arithmetic_for
from oracle.bounds import gradient_radius
from oracle.posterior import EXACT, Enclosure, Verdict, enclose, judge
from oracle.posterior import piece as pieces
from oracle.posterior.batches import batches
from oracle.posterior.polynomial import Polynomial
from oracle.posterior.tape import Tape, charge
from tests.oracle.test_bounds import SPECIAL, gradients, problem, ratio
from titans import TitansState, chunk_titans_linear

VALUES = ("o", "M", "S", "anchor")
GRADIENTS = ("q", "k", "v", "w", "b", "theta", "alpha", "eta", "M", "S", "anchor")
NORMALISED = (*VALUES, *("d" + name for name in GRADIENTS))
PLAIN = tuple(name for name in NORMALISED if name not in ("dw", "db"))

# At the worst signs an error must come this close to its radius.
WORST_SIGNS = 1 / 2


def chunk(
    D: int, L: int, plain: bool = False, log_gates: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[oracle.Inputs, oracle.Cotangents]:
    """One whole chunk of two heads with a state of its own, as a trained layer has it."""
    generator = torch.Generator().manual_seed(D + L)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = normal(3, 1, L, 2, D)
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    theta, alpha, eta = torch.rand(3, 1, L, 2, generator=generator) * torch.tensor([0.02, 0.1, 1])[:, None, None, None]
    if log_gates:
        theta, alpha, eta = theta.log(), torch.log1p(-alpha), eta.log()
    M, S, anchor, *final = normal(6, 1, 2, D, D) / D**0.5
    inputs = oracle.Inputs(
        *(x.to(dtype) for x in (q, k, v)),
        None if plain else (1 + normal(2, D) / 10).to(dtype),
        None if plain else (normal(2, D) / 10).to(dtype),
        *(x.to(dtype) for x in (theta, alpha, eta)),
        chunk_size=L, M=M, S=S / 10, anchor=anchor, log_gates=log_gates,
    )  # fmt: skip
    return inputs, oracle.Cotangents(normal(1, L, 2, D).to(dtype), *(x * D**0.5 for x in final))


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
    state = TitansState(leaves["M"], leaves["S"], leaves["anchor"], torch.tensor(inputs.offsets))
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
    inputs, cotangents = chunk(32, 32, **kind)
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
            # the float64 values have their own roundings, with at most 2^-25 of float32's unit, and `SLACK`
            assert (enclosure.radius[name] <= (1 + 2.0**-19) * torch.tensor(radius)).all(), name


def test_radius_of_a_real_chunk_is_far_tighter_than_the_balls() -> None:
    inputs, cotangents = chunk(32, 32)
    enclosure = enclose(inputs, cotangents, FLOAT32)
    balls = by_name(*gradient_radius(inputs, cotangents, FLOAT32))
    for name in ("dk", "dv", "dw", "db", "dtheta", "dalpha", "deta"):
        assert enclosure.radius[name].max() < balls[name].max() / 100


def test_counts_are_those_of_the_written_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(count: Any, operands: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        return float(np.max(np.asarray(count))), operands

    for plain in (False, True):
        inputs, cotangents = chunk(3, 4, plain)
        written, charged = Counter[Any](), Counter[Any]()
        rounded, roundings = Arithmetic.rounded, Tape.roundings

        def count_balls(self: Any, x: Any, count: Any, operands: Any = (0, 0), written: Any = written) -> Any:
            written[key(count, operands)] += 1
            return rounded(self, x, count, operands)

        def count_segments(self: Any, x: Any, count: Any, operands: Any = (0, 0), charged: Any = charged) -> Any:
            charged[key(count, operands)] += 1
            return roundings(self, x, count, operands)

        with monkeypatch.context() as patch:
            patch.setattr(Arithmetic, "rounded", count_balls)
            patch.setattr(Tape, "roundings", count_segments)
            gradient_radius(inputs, cotangents, FLOAT32)
            enclose(inputs, cotangents, FLOAT32, sharp=False)
        if not plain:
            # the sums of w and b over sequences, (B9), are not on a tape
            written[key(3 * 4 + 4, (0, 0))] -= 2
        # an anchor of its own has its cotangent rounded with a state's count in both
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


def test_errors_at_the_worst_signs_stay_within_the_radius_and_come_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "Tape", Shaken)
    for D, L, unit in ((8, 16, 2.0**-24), (32, 32, 2.0**-24), (4, 6, 2.0**-14)):
        inputs, cotangents = chunk(D, L)
        arithmetic = replace(FLOAT32, unit=unit)
        monkeypatch.setattr(Shaken, "moves", None)
        (batch,) = batches(inputs, cotangents, arithmetic)
        tape = batch.piece.tape
        sources = [error for error in tape.errors if error.source is None or error.size.any()]
        for name in set(NORMALISED) - {"M", "S", "anchor"}:
            value = batch.piece.results[name].polynomial.value
            functional = torch.zeros(1, *value.shape, dtype=torch.float64)
            functional.flatten(2)[..., 0] = 1
            adjoints = dict(zip(map(id, tape.errors), tape.adjoints(value, functional), strict=True))
            found = [adjoints[id(error)] for error in sources]
            signs = [torch.zeros_like(e.at) if x is None else x[0].sign() for x, e in zip(found, sources, strict=True)]
            radius = tape.chained(value, functional)[0]
            for sign in (1, -1):
                moves = [sign * s * allowed for s, allowed in zip(signs, tape.allowed, strict=True)]
                monkeypatch.setattr(Shaken, "moves", moves)
                (shaken,) = batches(inputs, cotangents, arithmetic)
                shift = (shaken.piece.results[name].polynomial.value - value).flatten(1)[:, 0].abs()
                assert (shift <= radius).all(), name
                assert (shift >= WORST_SIGNS * radius).all(), (name, shift / radius)

"""The strategies reach every edge that they were written for, and often."""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from oracle import Inputs
from properties.harness import draws as draws  # It registers the profiles.
from properties.harness import workarounds
from properties.problems.problem import HALF, Problem
from properties.problems.strategies import PRIMES, explicit, problems, split

DRAWS = 1500
# Each edge is reached at least this often.
ENOUGH = 5

Edge = Callable[[Problem, Inputs], bool]


def kind(name: str) -> Edge:
    """A gate of this kind."""
    return lambda p, x: any(gate.startswith(name) for gate in (p.theta, p.alpha, p.eta))


def decay(p: Problem, x: Inputs) -> torch.Tensor:
    """log2 (1 - alpha)."""
    return x.alpha.double() / math.log(2) if p.log_gates else (1 - x.alpha.double()).log2()


def underflows(p: Problem, span: int) -> bool:
    """Whether the decay over so many tokens leaves float32, though no single one is 0."""
    logs = decay(p, p.inputs()).reshape(-1, p.H)[: max(p.lengths)]
    whole = logs.cumsum(0)
    if not len(logs) or not bool(logs.isfinite().all()):
        return False
    parts = whole[span:] - whole[:-span] if span < len(whole) else whole[-1:]
    return bool((parts < -149).any()) and span <= len(whole)


def length(of: Callable[[Problem], set[int]]) -> Edge:
    return lambda p, x: bool(of(p) & set(p.lengths))


def gate(of: Callable[[torch.Tensor], torch.Tensor], log_gates: bool = False) -> Edge:
    return lambda p, x: p.log_gates == log_gates and any(bool(of(g).any()) for g in (x.theta, x.alpha, x.eta))


def values(of: Callable[[torch.Tensor], torch.Tensor]) -> Edge:
    return lambda p, x: any(bool(of(v.double()).any()) for v in (x.q, x.k, x.v))


EDGES: dict[str, Edge] = {
    **{f"{name} gates": kind(name) for name in ("constant", "ramp", "alternate 0 1", "sigmoid", "uniform", "random")},
    **{f"a spike at place {n} of a chunk": lambda p, x, n=n: any(
        g.startswith("spike") and g.endswith(f" {n}") for g in (p.theta, p.alpha, p.eta)) for n in (-2, -1, 0, 1)},
    "a gate of exactly 0": gate(lambda g: g == 0),
    "a gate of exactly 1": gate(lambda g: g == 1),
    "alpha = 1": lambda p, x: not p.log_gates and bool((x.alpha == 1).any()),
    "a gate one bit below 1": gate(lambda g: g.double() == 1 - torch.finfo(g.dtype).eps / 2),
    "a subnormal gate": gate(lambda g: (g > 0) & (g < torch.finfo(g.dtype).tiny)),
    "a log of 0": gate(torch.isneginf, log_gates=True),
    "a decay too small for float32": lambda p, x: p.log_gates and bool((x.alpha.isfinite() & (x.alpha < -104)).any()),
    "a decay too near 1 for float32": lambda p, x: p.log_gates and bool(((x.alpha < 0) & (x.alpha > -2.0**-26)).any()),
    "saturated sigmoids in half precision": lambda p, x: (
        p.gate_dtype in ("bfloat16", "float16") and p.alpha.startswith("sigmoid") and bool((x.alpha == 1).any())
    ),
    "a decay that underflows within a chunk": lambda p, x: underflows(p, min(p.C, 8)),
    "a decay that underflows over the sequence only": lambda p, x: (
        underflows(p, max(p.lengths)) and not underflows(p, min(p.C, max(p.lengths) - 1))
    ),
    "no token": length(lambda p: {0}),
    "one token": length(lambda p: {1}),
    "C - 1 tokens": length(lambda p: {p.C - 1} if p.C > 2 else set()),
    "C tokens": length(lambda p: {p.C}),
    "C + 1 tokens": length(lambda p: {p.C + 1}),
    "n C - 1 tokens": length(lambda p: {n * p.C - 1 for n in (2, 3) if p.C > 1}),
    "n C tokens": length(lambda p: {n * p.C for n in (2, 3)}),
    "n C + 1 tokens": length(lambda p: {n * p.C + 1 for n in (2, 3) if p.C > 1}),
    "a prime number of tokens": length(lambda p: set(PRIMES[2:])),
    **{f"C = {n}": lambda p, x, n=n: n == p.C for n in (1, 2, 3, 16)},
    **{f"D = {n}": lambda p, x, n=n: n == p.D for n in (1, 2, 3, 4, 7, 8)},
    "an empty sequence among others": lambda p, x: p.packed and 0 in p.lengths and any(p.lengths),
    "several heads and sequences": lambda p, x: p.H > 1 < p.sequences,
    **{f"{name} memory": lambda p, x, name=name: p.memory == name for name in ("plain", "normalised")},
    **{f"initial state {name}": lambda p, x, name=name: p.initial == name for name in ("none", "zero", "M", "full")},
    "resumed inside a chunk": lambda p, x: any(p.offsets),
    "one token of a chunk missing": lambda p, x: p.C > 1 and p.C - 1 in p.offsets,
    **{f"split {name}": edge for name, edge in {
        "at the start": lambda p, x: 0 in p.splits,
        "at the end": lambda p, x: max(p.lengths) in p.splits,
        "inside a chunk": lambda p, x: any(n % p.C for n in p.splits),
        "twice at one place": lambda p, x: len(set(p.splits)) < len(p.splits),
    }.items()},
    "keys of length 1": lambda p, x: p.k == "unit 0",
    "huge values": values(lambda v: v.abs() > 2**10),
    "tiny values": values(lambda v: (v != 0) & (v.abs() < 2**-50)),
    "equal rows": lambda p, x: p.k.startswith("equal"),
    "rows without variance": lambda p, x: p.memory == "normalised" and p.D > 1 and p.state == "flat 0",
    "a zero memory": lambda p, x: x.M is None or not bool(x.M.any()),
    "signed zeros": values(lambda v: (v == 0) & v.signbit()),
    "one huge token": lambda p, x: any(v.startswith("spike") for v in (p.q, p.k, p.v)),
    **{f"{name}": lambda p, x, name=name: p.dtype == name for name in ("float32", "float64", "bfloat16", "float16")},
    "half-precision gates with float32 values": lambda p, x: p.dtype == "float32" and p.gate_dtype == "bfloat16",
    "half precision, calm": lambda p, x: p.dtype in HALF and p.D > 2 and (p.k, p.state) == ("unit 0", "random -4"),
    "half precision, not calm": lambda p, x: p.dtype in HALF and max(p.lengths) > 8 < p.D * p.H,
    "only the final state has a cotangent": lambda p, x: p.cotangent == "M S anchor",
}  # fmt: skip


@functools.cache
def reached() -> Counter[str]:
    """How many of many draws reach each edge."""
    count: Counter[str] = Counter()

    @settings(
        max_examples=DRAWS, phases=[Phase.generate], database=None, derandomize=True, deadline=None,
        suppress_health_check=list(HealthCheck), backend=workarounds.INDEPENDENT,
    )  # fmt: skip
    @given(problem=split(problems()))
    def draw(problem: Problem) -> None:
        inputs = problem.inputs()
        count.update(name for name, edge in EDGES.items() if edge(problem, inputs))

    draw()
    return count


@pytest.mark.parametrize("edge", EDGES)
def test_the_strategy_reaches(edge: str) -> None:
    assert reached()[edge] >= ENOUGH


@pytest.mark.parametrize("profile", ["dev", "smoke", "ci"])
def test_examples_are_independent(profile: str) -> None:
    # Sizes are drawn first: a variation of an example has its sizes. By chance fewer than one in a hundred has.
    sizes: list[tuple[object, ...]] = []
    quick = {"max_examples": 200, "phases": [Phase.generate], "database": None, "derandomize": True}

    @settings(settings.get_profile(profile), **quick)
    @given(problem=problems())
    def draw(problem: Problem) -> None:
        sizes.append((problem.lengths, problem.D, problem.C, problem.H, problem.dtype))

    draw()
    assert sum(x == y for x, y in itertools.pairwise(sizes)) <= 8


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(problem=explicit())
def test_explicit_problems_give_every_number(problem: Problem) -> None:
    inputs = problem.inputs()
    assert inputs.alpha.flatten().tolist() == list(dict(problem.explicit)["alpha"])

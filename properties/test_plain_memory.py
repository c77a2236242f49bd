"""The plain memory is linear, and exact where every number fits: law 10 and section 4.5."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from oracle import Cotangents, Inputs
from oracle.precision import AGREED_DIGITS
from properties.harness.comparing import (
    Found,
    check_inputs,
    compare,
    compare_exactly,
    nearest,
    radii,
    run_finite,
    same,
    truth,
)
from properties.harness.implementations import Implementation
from properties.harness.laws import has_wide_range, law
from properties.harness.running import Results, run, tensors
from properties.harness.subcalls import chain, places, stepping
from properties.problems.problem import Problem
from properties.problems.strategies import gates, problems, split

# Nothing underflows at either scale: every product of these gates and values stays far from the smallest normal. The
# length is that over which a fading gate fades: over one so long its decay is mild.
MILD, LONG = ("2^-1", "0", "1", "2^-2", "2^-3", "1-2^-2", "1-2^-3"), 150
MILD_GATES = gates(MILD, LONG, LONG).filter(lambda gate: not gate.startswith(("uniform", "sigmoid")))
MILD_THETA = gates(("2^-1", "2^-2", "0", "2^0"), LONG, LONG).filter(
    lambda gate: not gate.startswith(("uniform", "sigmoid"))
)
LINEAR: dict[str, Any] = {
    "memories": ("plain",),
    "dtypes": ("float32", "float64"),
    "most": 10,
    "wild": False,
    "log_gates": False,
}
LINEAR_IN = ("v", "M", "S", "anchor")
BINARY_GATES = st.sampled_from(("constant 2^-1", "constant 0", "constant 1", "alternate 2^-1 1", "spike 1 2^-1 -1"))
BINARY_THETA = st.sampled_from(
    ("constant 2^-1", "constant 0", "constant 2^0", "alternate 2^-1 2^1", "spike 2^0 2^-1 0")
)
INTEGERS = st.sampled_from(("integers 1", "integers 2", "signs", "basis"))


def scaled(inputs: Inputs, by: float) -> Inputs:
    """Scale everything that the plain memory is linear in."""
    changed: dict[str, Any] = {name: x * by for name, x in tensors(inputs).items() if name in LINEAR_IN}
    return replace(inputs, **changed)


@law(
    "5.10",
    problems=problems(alpha=MILD_GATES, eta=MILD_GATES, theta=MILD_THETA, **LINEAR),
    needs=["plain", "backward"],
    about=has_wide_range,
)
def test_scaling_a_plain_memory_by_a_power_of_two_scales_its_results(
    implementation: Implementation, problem: Problem
) -> Found:
    by, cotangents = 2.0 ** (problem.seed % 17 - 8), problem.cotangents()
    results = run_finite(implementation, problem.inputs(), cotangents)
    # The gradients for v and the state do not change; q, k and the gates see the scale once.
    fixed = {"offset", *(f"d{name}" for name in LINEAR_IN)}
    wanted = {name: x if name in fixed else x * by for name, x in results.items()}
    return same(wanted, run(implementation, scaled(problem.inputs(), by), cotangents))


@law("5.10", problems=problems(v="integers 3", **LINEAR), needs=["plain"], share=0.5)
def test_a_plain_memory_is_linear(implementation: Implementation, problem: Problem) -> Found:
    one, two = problem.inputs(), replace(problem, seed=problem.seed + 1).inputs()
    # Integers and zeros: their sum is exact, and so is that of the states at half the precision.
    zeros: dict[str, Any] = {name: torch.zeros_like(x) for name, x in tensors(one).items() if name in LINEAR_IN[1:]}
    two = replace(one, v=two.v, **zeros)
    both = replace(one, v=one.v + two.v)
    terms = {name: (x, truth(two)[name]) for name, x in truth(one).items()}
    sums = {name: x + y for name, (x, y) in terms.items()}
    # Where the two cancel, their sum has only the digits that the oracle promises of each.
    doubt = {name: nearest(abs(x) + abs(y)) * 10.0**-AGREED_DIGITS for name, (x, y) in terms.items()}
    radius = {name: x + doubt[name] for name, x in radii(implementation, both).items()}
    found = compare(run(implementation, both), sums, radius)
    parts: list[Results] = []
    for x in (one, two):
        results, compared = check_inputs(implementation, x, None)
        parts.append(results)
        found += compared
    total = {name: parts[0][name].double() + parts[1][name].double() for name in {*sums} & {*parts[0]}}
    radius = {name: x + radii(implementation, two)[name] for name, x in radii(implementation, one).items()}
    return found + compare(total, truth(both), radius)


def majorant(inputs: Inputs, cotangents: Cotangents) -> Results:
    """Return the plain memory with every term counted positive: it bounds all that any order of summation meets."""
    leaves = {name: x.double().abs().requires_grad_() for name, x in tensors(inputs).items()}
    a = (1 - inputs.alpha.double()).requires_grad_()
    ends: list[Tensor] = []
    nothing = torch.zeros(*inputs.q.shape[2:], inputs.q.shape[-1], dtype=torch.float64)
    for n, (row, begin, end) in enumerate(inputs.sequences):
        M, S, A = (leaves[x][n] if x in leaves else nothing for x in ("M", "S", "anchor"))
        A = M if "anchor" not in leaves else A
        for t in range(begin, end):
            q, k, v = (leaves[x][row, t][:, None] for x in ("q", "k", "v"))  # (H, 1, D)
            theta, decay, eta = (x[row, t][:, None, None] for x in (leaves["theta"], a, leaves["eta"]))
            S = eta * S + 2 * theta * k.mT @ (k @ A + v)
            M = decay * M + S
            ends.append((q @ M * cotangents.o[row, t].double().abs()[:, None]).sum())
            ends.append((q @ M).detach().max())
            A = M if (inputs.offsets[n] + t - begin + 1) % inputs.chunk_size == 0 else A
        ends += [(x * 4).sum() for x in (M, S, A)]
    return {"values": torch.stack(ends).detach(), **differentiated(torch.stack(ends).sum(), leaves, a)}


def differentiated(total: Tensor, leaves: Results, a: Tensor) -> Results:
    """Return the gradients of the majorant."""
    if not total.requires_grad:
        return {}
    gradients = torch.autograd.grad(total, [*leaves.values(), a], allow_unused=True)
    return {str(i): x for i, x in enumerate(gradients) if x is not None}


def fits(inputs: Inputs, cotangents: Cotangents) -> bool:
    """Whether every number that can occur is a multiple of one power of two and has few enough digits."""
    # A path through the memory meets at most one gate in each token.
    gate = torch.stack([inputs.theta.double(), 1 - inputs.alpha.double(), inputs.eta.double()])
    steps = torch.where(gate > 0, gate, 1).amin(0).log2().clamp(max=0).sum(1).amin()
    largest = max(float(x.max()) for x in majorant(inputs, cotangents).values() if x.numel())
    # A gradient has the format of its tensor.
    eps = max(torch.finfo(x.dtype).eps for x in tensors(inputs).values())
    return bool(np.log2(max(largest, 1)) - float(steps) < -np.log2(eps / 2))


EXACT = split(
    problems(
        memories=("plain",), dtypes=("float64", "float32"), D=(1, 2, 3), most=14, shortest=1, packed=False,
        log_gates=False, theta=BINARY_THETA, alpha=BINARY_GATES, eta=BINARY_GATES, q=INTEGERS, k=INTEGERS, v=INTEGERS,
        state="integers 2",
    )
)  # fmt: skip


@law("4.5", "5.2", problems=EXACT, needs=["plain", "exact"], share=1.2)
def test_small_integers_give_exactly_the_oracles_values(implementation: Implementation, problem: Problem) -> Found:
    inputs, flowing = problem.inputs(), problem.cotangents()
    whole: dict[str, Any] = {name: None if x is None else x.mul(4).round() for name, x in vars(flowing).items()}
    cotangents = Cotangents(**whole)
    if not problem.tokens or not fits(inputs, cotangents):
        return []
    wanted = truth(inputs, cotangents)
    found = compare_exactly(run(implementation, inputs, cotangents), wanted)
    if {"resume", "offset"} <= implementation.claims:
        found += compare_exactly(chain(implementation, inputs, cotangents, places(implementation, problem)), wanted)
    if "step" in implementation.claims and problem.initial in ("none", "full"):
        steps = range(1, problem.lengths[0])
        found += compare_exactly(chain(stepping(implementation), inputs, cotangents, steps), wanted)
    return found

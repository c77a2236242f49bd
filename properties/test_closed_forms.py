"""Special cases that can be written down without the recurrence: laws 11 and 12."""

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

import oracle
from oracle.precision import doubles, exact
from properties.harness.comparing import Found, Truth, answer, check, check_inputs, compare, radii, same, solved
from properties.harness.implementations import Implementation
from properties.harness.laws import law
from properties.harness.running import expect, run, tensors
from properties.problems.problem import HALF, Problem
from properties.problems.strategies import problems

STATEFUL: dict[str, Any] = {"initial": ("full", "M"), "wild": False, "log_gates": False}
# Gates whose logs are exact too.
SWITCHES = st.sampled_from(("constant 0", "constant 1", "alternate 0 1", "spike 1 0 0", "spike 0 1 -1", "single 1 0 2"))
THETA_SWITCHES = st.sampled_from(("constant 0", "constant 2^0", "alternate 0 2^0", "spike 2^0 0 0", "single 0 2^0 1"))


def decayed(problem: Problem) -> Truth:
    """Return the plain memory for theta = 0: M_t = beta_t M_0 + f_t S_0, straight from the defining sums."""
    inputs = problem.inputs()
    assert inputs.M is not None
    M0 = exact(inputs.M)
    S0 = exact(inputs.S) if inputs.S is not None else 0 * M0
    o, M, S = 0 * exact(inputs.q), M0.copy(), S0.copy()
    for n, (row, begin, end) in enumerate(inputs.sequences):
        for h in range(problem.H):
            theta, a, eta = (
                doubles(x[row, begin:end, h]) for x in (inputs.theta, 1 - inputs.alpha.double(), inputs.eta)
            )
            c = oracle.coefficients(theta, a, eta)
            for t in range(end - begin):
                M[n, h], S[n, h] = c.beta[t] * M0[n, h] + c.f[t] * S0[n, h], c.m[t] * S0[n, h]
                o[row, begin + t, h] = exact(inputs.q[row, begin + t, h]) @ M[n, h]
    return {"M": M, "S": S} | ({"o": o} if problem.memory == "plain" else {})


@law("5.11", problems=problems(theta="constant 0", most=12, **STATEFUL), needs=["initial_state"])
def test_without_learning_the_memory_only_decays(implementation: Implementation, problem: Problem) -> Found:
    inputs = problem.inputs()
    return compare(run(implementation, inputs), decayed(problem), radii(implementation, inputs))


# Nothing but the decay is left of the memory: whatever is wrong with the inner gradient, it is not looked at.
DECAY: dict[str, Any] = {"theta": "constant 0", "initial": ("M",), "most": 12, "wild": False, "log_gates": False}


def has_tail(implementation: Implementation, problem: Problem) -> bool:
    """Whether a sequence ends inside a chunk."""
    return any((start + T) % problem.C for start, T in zip(problem.starts, problem.lengths, strict=True))


MIDDLE = ("2^-1", "2^-2", "2^-3", "1-2^-2")


@law(
    "5.7",
    problems=problems(dtypes=("float32",), C=(2, 3, 4, 7, 8), unit_levels=MIDDLE, gate_dtype="float32", **DECAY),
    needs=["initial_state", "final_state"],
    about=has_tail,
)
def test_the_state_after_a_tail_without_learning_has_decayed_so_far(
    implementation: Implementation, problem: Problem
) -> Found:
    inputs = problem.inputs()
    return compare(run(implementation, inputs), decayed(problem), radii(implementation, inputs))


@law(
    "3",
    problems=problems(C=(1,), gate_dtype=st.sampled_from(HALF), dtypes=("float32", *HALF), unit_levels=MIDDLE, **DECAY),
    needs=["initial_state", "half"],
)
def test_gates_are_raised_before_anything_else(implementation: Implementation, problem: Problem) -> Found:
    inputs = problem.inputs()
    return compare(run(implementation, inputs), decayed(problem), radii(implementation, inputs))


@law(
    "3",
    problems=problems(dtypes=HALF, gate_dtype=st.sampled_from(HALF), most=8, wild=False),
    needs=["half"],
)
def test_every_tensor_is_raised_from_its_own_dtype(implementation: Implementation, problem: Problem) -> Found:
    # Some of these as they are in training: wider than q, k and v, and each in a dtype of its own.
    wide = tensors(replace(problem, dtype="float32", gate_dtype="float32").inputs())
    names = [name for i, name in enumerate(("w", "theta", "b", "alpha", "eta")) if problem.seed >> i & 1]
    wider: dict[str, Any] = {name: wide[name] for name in names if name in wide}
    return check_inputs(implementation, replace(problem.inputs(), **wider), problem.cotangents())[1]


@law(
    "5.11",
    problems=problems(eta="constant 0", most=12, initial=("full",), wild=False, log_gates=None),
    needs=["resume"],
)
def test_without_momentum_the_initial_momentum_is_forgotten(implementation: Implementation, problem: Problem) -> Found:
    inputs = problem.inputs()
    assert inputs.S is not None
    other = run(implementation, replace(inputs, S=inputs.S.flip(-1) + 1))
    forgotten = same(run(implementation, inputs), other) if min(problem.lengths) else []
    return forgotten + check(implementation, problem)


def papers_recurrence(problem: Problem) -> Truth:
    """Return Eq. 13 and 14 of the paper for the plain memory, token by token."""
    inputs = problem.inputs()
    q, k, v, theta, alpha, eta = (exact(getattr(inputs, x)) for x in ("q", "k", "v", "theta", "alpha", "eta"))
    assert inputs.M is not None
    M = exact(inputs.M)
    S, o = exact(inputs.S) if inputs.S is not None else 0 * M, 0 * q
    for n, (row, begin, end) in enumerate(inputs.sequences):
        for t in range(begin, end):
            for h in range(problem.H):
                surprise = 2 * np.outer(k[row, t, h], k[row, t, h] @ M[n, h] - v[row, t, h])
                S[n, h] = eta[row, t, h] * S[n, h] - theta[row, t, h] * surprise
                M[n, h] = (1 - alpha[row, t, h]) * M[n, h] + S[n, h]
                o[row, t, h] = q[row, t, h] @ M[n, h]
    return {"o": o, "M": M, "S": S, "anchor": M}


def has_chunks_of_one_token(implementation: Implementation, problem: Problem) -> bool:
    """Whether every token is a chunk."""
    return problem.C == 1


@law(
    "5.11",
    problems=problems(C=(1,), memories=("plain",), most=12, **STATEFUL),
    needs=["plain", "initial_state"],
    about=has_chunks_of_one_token,
)
def test_chunks_of_one_token_are_the_papers_recurrence(implementation: Implementation, problem: Problem) -> Found:
    inputs = problem.inputs()
    results = run(implementation, inputs)
    return compare(results, papers_recurrence(problem), radii(implementation, inputs))


@law(
    "5.12",
    problems=problems(log_gates=False, alpha=SWITCHES, eta=SWITCHES, theta=THETA_SWITCHES, wild=False),
    needs=["log_gates", "backward"],
)
def test_logs_of_0_and_1_give_what_0_and_1_give(implementation: Implementation, problem: Problem) -> Found:
    logs, wanted = replace(problem, log_gates=True), dict(solved(problem, True))
    # d/d log x = x d/dx, and a = 1 - alpha.
    linear = problem.inputs()
    wanted["dtheta"] = wanted["dtheta"] * exact(linear.theta)
    wanted["deta"] = wanted["deta"] * exact(linear.eta)
    wanted["dalpha"] = wanted["dalpha"] * (exact(linear.alpha) - 1)
    inputs, cotangents = logs.inputs(), logs.cotangents()
    return compare(run(implementation, inputs, cotangents), wanted, radii(implementation, inputs, cotangents))


WITH_ZEROS = problems(
    log_gates=True, wild=False, unit_levels=("2^-1", "0", "1", "2^-4"), theta_levels=("2^-1", "0", "2^-3")
)


@law("5.12", problems=WITH_ZEROS, needs=["log_gates", "backward"])
def test_a_gate_of_exactly_zero_has_no_derivative_by_its_log(implementation: Implementation, problem: Problem) -> Found:
    results, found = answer(implementation, problem)
    for name in ("theta", "alpha", "eta"):
        at_zero = results[f"d{name}"][getattr(problem.inputs(), name).isneginf()]
        expect(f"the derivatives by log {name} at -inf", at_zero.count_nonzero().item(), 0)
    return found

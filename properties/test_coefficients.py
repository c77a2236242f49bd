"""The chunk coefficients, read off the outputs of any implementation: section 4.2 and law 9."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from numpy.typing import NDArray

import oracle
from oracle import Inputs, bounds
from oracle.coefficients import Coefficients
from oracle.precision import doubles
from properties.harness.comparing import Found, compare
from properties.harness.implementations import Implementation
from properties.harness.laws import law
from properties.harness.running import run
from properties.problems.domain import EVERYWHERE, Domain
from properties.problems.problem import Problem
from properties.problems.strategies import problems


def one_chunk(*dtypes: str, **fixed: Any) -> SearchStrategy[Problem]:
    """Draw gates for one chunk of a plain memory."""
    return problems(
        memories=("plain",), dtypes=dtypes, C=(16,), most=14, shortest=1, D=(1,), sequences=1,
        packed=False, log_gates=False, initial=("none",), q="zero", k="zero", v="zero", cotangent="o", **fixed,
    )  # fmt: skip


# Just above the least normal numbers nothing may be lost; below, where a sum of so many terms may flush them, it may.
BARELY_NORMAL = {
    "float32": ("constant 2^-110", "random 2^-100 2^-120", "ramp 2^-115 2^-1"),
    "float64": ("constant 2^-1000", "random 2^-990 2^-1015", "ramp 2^-1010 2^-1"),
}
ONE_CHUNK = one_chunk("float32", "float64") | st.one_of(
    [one_chunk(dtype, theta=st.sampled_from(theta)) for dtype, theta in BARELY_NORMAL.items()]
)


def unit_vectors(problem: Problem, domain: Domain = EVERYWHERE) -> Inputs:
    """Return a chunk in which o_t holds 2 G_t1 ... 2 G_tT, beta_t and f_t, each the only term of its sum.

    Token j has key and value e_j; M_0 and S_0 are e_j^T e_j for two more directions; q is 1 throughout.
    """
    T, H = problem.tokens, problem.H
    # More directions, where the domain has no such width, hold nothing.
    D, dtype = domain.D.at_least(16 if domain.few_shapes else T + 2), problem.compute_dtype
    rows = torch.eye(D, dtype=dtype)[:T].reshape(1, T, 1, D).expand(1, T, H, D)
    M, S = (torch.zeros(D, dtype=dtype).index_fill(0, torch.tensor(T + i), 1).diag() for i in (0, 1))
    given = problem.inputs()
    steps = 2 / torch.finfo(given.alpha.dtype if problem.gate_dtype == "float64" else torch.float32).eps
    alpha = (given.alpha.double() * steps).round() / steps
    M, S = M.expand(1, H, D, D), S.expand(1, H, D, D)
    return replace(
        given, q=torch.ones(1, T, H, D, dtype=dtype), k=rows, v=rows, M=M, S=S, anchor=M, offset=(0,),
        alpha=alpha.to(given.alpha.dtype),
    )  # fmt: skip


def table(x: Coefficients | bounds.CoefficientsRadius) -> NDArray[Any]:
    """Lay one head's coefficients out like its outputs, shape (T, T + 2)."""
    return np.concatenate([2 * x.G, x.beta[:, None], x.f[:, None]], 1)


@law("4.2", "5.9", problems=ONE_CHUNK, needs=["plain", "resume"], share=6)
def test_every_coefficient_has_a_few_roundings(implementation: Implementation, problem: Problem) -> Found:
    if not problem.tokens:
        return []
    found: Found = []
    inputs = unit_vectors(problem, implementation.domain)
    results = run(implementation, inputs)
    arithmetic = implementation.arithmetic(inputs)
    for h in range(problem.H):
        # 1 - alpha is exact: alpha is a multiple of half an epsilon.
        theta, a, eta = (doubles(x[0, :, h]) for x in (inputs.theta, 1 - inputs.alpha.double(), inputs.eta))
        exact, radius = oracle.coefficients(theta, a, eta), bounds.coefficients_radius(theta, a, eta, arithmetic)
        final = np.concatenate([2 * exact.n[-1], [exact.m[-1]]]), np.concatenate([2 * radius.n[-1], [radius.m[-1]]])
        diagonal = results["S"][0, h].diagonal()
        T = problem.tokens
        momentum = torch.cat([diagonal[:T], diagonal[T + 1 : T + 2]])
        found += compare(
            {"coefficients": results["o"][0, :, h, : T + 2], "momentum": momentum},
            {"coefficients": table(exact), "momentum": final[0]},
            {"coefficients": table(radius), "momentum": final[1]},
            stage="coefficients",
        )
    return found

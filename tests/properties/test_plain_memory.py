"""The problems of the laws about the plain memory are as mild as these laws need them."""

import math

import torch
from hypothesis import given, settings

from properties import test_plain_memory  # noqa: F401
from properties.harness.laws import PROPERTIES
from properties.problems.problem import Problem

SCALING = PROPERTIES["test_scaling_a_plain_memory_by_a_power_of_two_scales_its_results"]
# Exponents: of the smallest state, of the smallest scale, of q, k and v together; and what is left for small numbers.
STATE, SCALE, VALUES, ROOM = -20, -8, -6, 24


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(problem=SCALING.problems)
def test_no_product_comes_near_the_smallest_normal_when_a_plain_memory_is_scaled(problem: Problem) -> None:
    inputs = problem.inputs()
    gates = torch.stack([inputs.theta.double(), 1 - inputs.alpha.double(), inputs.eta.double()])  # (3, B, T, H)
    steps = torch.where(gates > 0, gates, 1).amin(0).log2().clamp(max=0)
    for row, begin, end in inputs.sequences:
        # A monomial meets at most one gate in each token on its way forward, and one on its way back.
        fading = 2 * float(steps[row, begin:end].sum(0).amin())
        assert fading + STATE + SCALE + VALUES - ROOM > math.log2(torch.finfo(torch.float32).tiny)

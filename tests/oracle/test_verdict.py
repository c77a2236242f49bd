"""The verdict on an implementation: right results pass in every arithmetic, and one wrong element is seen."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
from oracle.bounds.error_model import FLOAT32, FLOAT64, arithmetic_for
from oracle.bounds.posterior import EXACT, Verdict, as_pieces, enclose, judge
from oracle.bounds.posterior.enclosure import SLACK
from tests.oracle.real_chunks import (
    GRADIENTS,
    NORMALISED,
    PER_TOKEN,
    VALUES,
    chunk,
    loop,
    op,
    with_narrow_products,
)


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


@pytest.mark.parametrize("plain", [False, True])
def test_operands_rounded_to_half_precision_stay_within_their_own_radius_alone(plain: bool) -> None:
    inputs, cotangents = chunk(6, 8, heads=1, plain=plain, dtype=torch.bfloat16)
    results = with_narrow_products(inputs, cotangents)
    arithmetic = arithmetic_for(torch.bfloat16, operand=torch.bfloat16)
    rounded, not_rounded = (judge(inputs, cotangents, x, results) for x in (arithmetic, arithmetic_for(torch.bfloat16)))
    assert max(verdict.ratio for verdict in rounded) <= 1
    assert {verdict.result for verdict in not_rounded if verdict.ratio > 1} >= {"M", "S", "dq", "dk"}


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


def test_comparisons_that_say_nothing_are_counted() -> None:
    inputs, cotangents = chunk(8, 12)
    results = {"o": torch.zeros_like(inputs.q), "dk": torch.zeros_like(inputs.k)}
    for verdict in judge(inputs, cotangents, FLOAT32, results):
        assert verdict.empty == 0
        assert verdict.ratio > 1
    # with one bit no radius is smaller than the result
    verdicts = judge(inputs, cotangents, replace(FLOAT32, unit=0.5), results)
    assert all(verdict.empty == verdict.count > 0 for verdict in verdicts)

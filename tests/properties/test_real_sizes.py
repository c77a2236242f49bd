"""The laws of real sizes see faults that small problems do not show, around a correct backend."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, seed, settings
from torch import Tensor

from properties import test_real_sizes as laws
from properties.harness.comparing import compare, radii, truth
from properties.harness.definition import definition
from properties.harness.implementations import implementation
from properties.harness.laws import PROPERTIES
from properties.harness.running import LawBroken
from properties.harness.workarounds import INDEPENDENT
from properties.problems.problem import DTYPES, Problem
from properties.problems.real_sizes import sizes

Call = Callable[..., Any]
CHUNK = implementation("chunk", "cpu")
NAMES = tuple(name for name in vars(laws) if name.startswith("test_"))


class Halved(torch.autograd.Function):
    """The identity, with half of its gradient."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] / 2


def heads_are_nan(call: Call, *arguments: Any, **options: Any) -> Any:
    o, state = call(*arguments, **options)
    last = torch.arange(o.shape[2])[:, None] >= o.shape[2] / 2
    return torch.where(last, torch.nan, o), state


def nothing_beyond_eight_columns(call: Call, *arguments: Any, **options: Any) -> Any:
    o, state = call(*arguments, **options)
    return o * (o.shape[-1] <= 8), state


def outputs_too_large_at_real_sizes(call: Call, *arguments: Any, **options: Any) -> Any:
    o, state = call(*arguments, **options)
    real = o.shape[-1] >= 16 and arguments[9] >= 16 and o.shape[1] >= 32
    return o * (1.5 if real else 1), state


def one_column_of_dk_is_off_at_64(call: Call, *arguments: Any, **options: Any) -> Any:
    q, k, *rest = arguments
    if k.shape[-1] == 64 and k.requires_grad:
        scale = torch.ones(64, dtype=k.dtype)
        scale[17] = 1.01
        k = k * 1  # its gradient, not that of the leaf
        k.register_hook(lambda dk: dk * scale)
    return call(q, k, *rest, **options)


def gradients_are_halved_in_a_second_chunk(call: Call, *arguments: Any, **options: Any) -> Any:
    o, state = call(*arguments, **options)
    return Halved.apply(o) if o.shape[1] > arguments[9] >= 16 else o, state


SIZED = (
    heads_are_nan, nothing_beyond_eight_columns, outputs_too_large_at_real_sizes, one_column_of_dk_is_off_at_64,
    gradients_are_halved_in_a_second_chunk,
)  # fmt: skip


def noticed(call: Call, name: str, number: int) -> bool:
    """Whether a law breaks in as many examples as a default run has."""
    found, subject = PROPERTIES[name], replace(CHUNK, call=call)
    quick = settings(max_examples=max(1, int(50 * found.share)), phases=[Phase.generate], database=None, deadline=None)

    def checked(problem: Problem) -> None:
        found.check(subject, problem)

    try:
        quick(seed(number)(given(problem=found.problems)(checked)))()
    except LawBroken:
        return True
    return False


@pytest.mark.parametrize("fault", SIZED)
def test_a_fault_that_small_problems_do_not_show_is_noticed(fault: Call) -> None:
    def call(*arguments: Any, **options: Any) -> Any:
        return fault(CHUNK.call, *arguments, **options)

    assert any(noticed(call, name, 0) for name in NAMES)


def test_errors_three_times_those_of_the_definition_are_noticed() -> None:
    law = PROPERTIES["test_errors_of_real_size_are_at_most_twice_those_of_the_definition"]
    problem = Problem(lengths=(64,), H=laws.HEADS, D=16, C=32, memory="normalised", theta="uniform -3", initial="M")
    inputs, cotangents = problem.inputs(), problem.cotangents()
    exactly, its = (definition(inputs, cotangents, dtype) for dtype in (torch.float64, torch.float32))

    def off(times: float) -> Call:
        def call(*arguments: Any, **options: Any) -> Any:
            o, state = CHUNK.call(*arguments, **options)
            wanted = exactly["o"] + times * (its["o"] - exactly["o"])
            return o + (wanted - o.double()).detach().to(o.dtype), state

        return call

    law.check(replace(CHUNK, call=off(1)), problem)
    with pytest.raises(LawBroken, match="o is less accurate than the definition"):
        law.check(replace(CHUNK, call=off(3)), problem)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_of_half_precision_may_be_rounded_once(dtype: str) -> None:
    chosen = {"theta": "uniform -3", "alpha": "uniform -3", "eta": "uniform 0", "q": "unit 0", "state": "random -2"}
    problem = Problem(lengths=(8,), H=32, D=4, C=4, initial="M", dtype=dtype, **chosen)  # type: ignore[arg-type]
    assert laws.compare_with_the_definition(CHUNK, problem)

    def rounds_the_memory(call: Call, *arguments: Any, **options: Any) -> Any:
        *tensors, eps, C, state, wanted = arguments
        return call(*tensors, eps, C, state.to(DTYPES[dtype]).float(), wanted, **options)

    with pytest.raises(LawBroken, match="32 of 32"):
        laws.compare_with_the_definition(replace(CHUNK, call=functools.partial(rounds_the_memory, CHUNK.call)), problem)


@pytest.mark.parametrize("memory", ["plain", "normalised"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("log_gates", [False, True])
def test_the_definition_is_the_oracles(memory: str, dtype: str, log_gates: bool) -> None:
    problem = Problem(
        lengths=(2, 0, 3), packed=True, H=2, D=3, C=4, memory=memory, initial="full", offsets=(1, 0, 1),
        theta="uniform 0", alpha="uniform 0", eta="uniform 0", dtype=dtype, log_gates=log_gates, eps=1e-3,
    )  # fmt: skip
    inputs, cotangents = problem.inputs(), problem.cotangents()
    found = definition(inputs, cotangents, DTYPES[dtype])
    assert compare(found, truth(inputs, cotangents), radii(CHUNK, inputs, cotangents))


def test_sizes_are_large_and_lie_beside_the_edges_of_tiles() -> None:
    drawn: list[int] = []

    @settings(max_examples=200, phases=[Phase.generate], database=None, derandomize=True)
    @given(sizes(64, 32))
    def draw(n: int) -> None:
        drawn.append(n)

    draw()
    assert sum(n >= 32 for n in drawn) > len(drawn) / 2
    assert {31, 33, 63, 64} & {*drawn}
    # The tiles themselves, for which some kernels are written, most often of all.
    assert all(drawn.count(n) > len(drawn) / 16 for n in (32, 64))


def test_there_are_nine_chunks_sequences_and_heads() -> None:
    problem = Problem(lengths=(3, 5), packed=True, C=4, initial="full", offsets=(0, 3))
    many = laws.with_many(problem, CHUNK.claims)
    assert (many.H, many.lengths, many.offsets) == (32, (3, 5, 3, 5, 3, 5, 3, 5, 67), (0, 0, 2, 2, 0, 0, 2, 2, 3))
    assert laws.with_many(Problem(lengths=(2, 2), C=4), CHUNK.claims).lengths == (66, 66)
    few = CHUNK.claims - {"large"}
    assert laws.with_many(problem, few) == replace(many, H=1, lengths=(*[2] * 8, 67))
    assert laws.with_many(Problem(lengths=(2, 2), C=4), few) == Problem(lengths=(2, 2), C=4, H=9)


@pytest.mark.parametrize(("lengths", "within"), [((0,), False), ((1,), True), ((2,), False)])
def test_a_chunk_of_real_size_has_tokens(lengths: tuple[int, ...], within: bool) -> None:
    problem = Problem(lengths=lengths, C=32, initial="full", offsets=(31,))
    assert laws.is_within_chunks(CHUNK, problem) is within


def test_problems_of_real_size_have_widths_of_kernels_and_padded_ones() -> None:
    drawn: list[Problem] = []

    @settings(max_examples=300, phases=[Phase.generate], database=None, derandomize=True, backend=INDEPENDENT)
    @given(laws.REAL)
    def draw(problem: Problem) -> None:
        drawn.append(problem)

    draw()
    usual = [problem for problem in drawn if problem.D in laws.WIDTHS]
    assert len(drawn) / 10 < len(usual) < len(drawn) / 3
    assert sum(problem.initial == "full" for problem in usual) > len(usual) / 2
    for memory in ("plain", "normalised"):
        padded = [problem for problem in drawn if problem.D > 32 and problem.memory == memory and problem not in usual]
        assert len(padded) > len(drawn) / 8


def test_a_slow_implementation_gets_the_fewest_examples() -> None:
    law = PROPERTIES["test_a_chunk_of_real_size_is_right"]
    drawn: list[Problem] = []
    law.drawn(lambda implementation, problem: drawn.append(problem), 0.01, database=None, derandomize=True)(CHUNK)
    assert len(drawn) == math.ceil(law.fewest * settings().max_examples)

"""Results that must not change in a single bit, and memory that must not be touched: laws 6 and 13."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from oracle import Cotangents
from properties.harness.comparing import Found, bits, check_inputs, compare, radii, run_finite, same_bits, solved
from properties.harness.implementations import Implementation
from properties.harness.laws import law
from properties.harness.running import Results, expect, run, tensors
from properties.harness.subcalls import TOKENS
from properties.problems.problem import Problem
from properties.problems.strategies import problems

Layout = Callable[[Tensor], Tensor]


def columns_first(x: Tensor) -> Tensor:
    """Lay the last two axes out the other way round."""
    return x.mT.contiguous().mT


def tokens_last(x: Tensor) -> Tensor:
    """Lay the first axis out innermost."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def every_other(x: Tensor) -> Tensor:
    """Leave a NaN after each element."""
    room = x.new_full((*x.shape, 2), torch.nan)
    room[..., 0] = x
    return room[..., 0]


def inside(x: Tensor) -> Tensor:
    """Put NaNs around the elements, at an address that is aligned to nothing but them."""
    room = x.new_full((x.numel() + 6,), torch.nan)
    room[3:-3] = x.reshape(-1)
    return room[3:-3].view(x.shape)


LAYOUTS: tuple[Layout, ...] = (columns_first, tokens_last, every_other, inside)

# Products that are large enough for a library to order their sums by the strides.
WIDE = problems(most=12, D=(8, 7), C=(7, 8, 16), dtypes=("float32", "float64"), initial=("M", "full"))


def storage(x: Tensor) -> bytes:
    """Return all bytes that belong to a tensor, those between and around its elements too."""
    whole: Any = x.untyped_storage()
    return bytes(whole.cpu().tolist())


@law("5.6", "5.15", problems=problems() | WIDE)
def test_the_same_input_gives_the_same_bits(implementation: Implementation, problem: Problem) -> Found:
    first = run_finite(implementation, problem.inputs(), problem.cotangents())
    return same_bits(first, run(implementation, problem.inputs(), problem.cotangents()))


@law("5.13", problems=problems(most=12) | WIDE)
def test_any_layout_gives_the_same_bits_and_nothing_is_modified(
    implementation: Implementation, problem: Problem
) -> Found:
    inputs, cotangents = problem.inputs(), problem.cotangents()
    given, flowing = {name: bits(x) for name, x in tensors(inputs).items()}, bits(cotangents.o)
    plain = run_finite(implementation, inputs, cotangents)
    found: Found = []
    for name, x in tensors(inputs).items():
        expect(f"whether {name} is as it was", bits(x) == given[name], True)
    for layout in LAYOUTS:
        leaves = {name: layout(x.to(implementation.device)) for name, x in tensors(inputs).items()}
        before = {name: storage(x) for name, x in leaves.items()}
        found += same_bits(plain, run(implementation, inputs, cotangents, leaves))
        for name, x in leaves.items():
            expect(f"whether {name} is as it was", storage(x) == before[name], True)
    expect("whether the cotangent is as it was", bits(cotangents.o) == flowing, True)
    return found


@law("5.13", "5.14", problems=problems(most=12, wild=False), needs=["backward"])
def test_a_cotangent_of_any_layout_is_understood(implementation: Implementation, problem: Problem) -> Found:
    inputs, layout = problem.inputs(), LAYOUTS[problem.seed % len(LAYOUTS)]
    given = vars(problem.cotangents()).items()
    cotangents: dict[str, Any] = {name: None if x is None else layout(x) for name, x in given}
    results = run(implementation, inputs, Cotangents(**cotangents))
    return compare(results, solved(problem, True), radii(implementation, inputs, problem.cotangents()))


@law("5.13", problems=problems(most=12, wild=False, shortest=2))
def test_expanded_inputs_give_the_same_bits(implementation: Implementation, problem: Problem) -> Found:
    if not problem.tokens:
        return []
    inputs = problem.inputs()
    # The same for all tokens, or for all heads: there w, b and the state, too.
    of_heads = {"w": 0, "b": 0, "M": 1, "S": 1, "anchor": 1} | dict.fromkeys(TOKENS, 2)
    axes = of_heads if problem.H > 1 and problem.seed % 2 else dict.fromkeys(TOKENS, 1)
    given = {name: x for name, x in tensors(inputs).items() if name in axes}
    changes: dict[str, Any] = {name: x.narrow(axes[name], 0, 1).expand_as(x) for name, x in given.items()}
    alike = replace(inputs, **changes)
    whole = {name: x.contiguous() for name, x in tensors(alike).items()}
    expanded = run(implementation, alike, problem.cotangents())
    return same_bits(run_finite(implementation, alike, problem.cotangents(), whole), expanded)


@law("5.13", problems=problems(most=12, wild=False), needs=["backward"], share=0.5)
def test_an_expanded_cotangent_gives_the_same_bits(implementation: Implementation, problem: Problem) -> Found:
    if not problem.tokens:
        return []
    inputs, cotangents = problem.inputs(), problem.cotangents()
    o = cotangents.o.to(implementation.device)
    # The same for all tokens, as after a mean over them, or for all along other axes.
    axes = ((1, 2, 3, 0) * 2)[problem.seed % 4 :][: 1 + problem.seed // 4 % 4]
    alike = o[tuple(slice(0, 1 if axis in axes else None) for axis in range(4))].expand_as(o)
    plain, found = check_inputs(implementation, inputs, replace(cotangents, o=alike.cpu().contiguous()))
    return found + same_bits(plain, run(implementation, inputs, replace(cotangents, o=alike)))


@law("5.13", problems=problems(most=12, wild=False), share=0.5)
def test_gates_may_have_a_last_axis(implementation: Implementation, problem: Problem) -> Found:
    inputs, cotangents = problem.inputs(), problem.cotangents()
    leaves = {name: x[..., None] if name in TOKENS[3:] else x for name, x in tensors(inputs).items()}
    with_axis = run(implementation, inputs, cotangents, leaves)
    gates = {name: with_axis[name].squeeze(-1) for gate in TOKENS[3:] if (name := f"d{gate}") in with_axis}
    return same_bits(run_finite(implementation, inputs, cotangents), with_axis | gates)


@law("5.13", problems=problems(most=12), needs=["final_state"], share=0.5)
def test_asking_for_the_final_state_changes_no_output(implementation: Implementation, problem: Problem) -> Found:
    without: Results = {}

    def both(*arguments: Any, **options: Any) -> Any:
        o, nothing = implementation.call(*arguments[:-1], False, **options)
        expect("the final state", nothing, None)
        without["o"] = o.cpu()
        return implementation.call(*arguments, **options)

    o = run_finite(replace(implementation, call=both), problem.inputs())["o"]
    return same_bits({"o": o}, without)


@contextmanager
def fresh_memory(fill: bool) -> Iterator[None]:
    """Let torch fill what it allocates with NaN, or not."""
    # It has properties that its type does not know.
    deterministic: Any = torch.utils.deterministic
    filled = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(False)


# Buffers have the most room where sequences are packed and resume anywhere: some of it is not used.
ROOM = problems(memories=("normalised",), packed=True, fewest=2, initial=("full",), wild=False)


@law("5.13", problems=problems(wild=False) | ROOM)
def test_results_do_not_depend_on_uninitialised_memory(implementation: Implementation, problem: Problem) -> Found:
    def results(fill: bool) -> Results:
        with fresh_memory(fill):
            return run_finite(implementation, problem.inputs(), problem.cotangents())

    return same_bits(results(False), results(True))

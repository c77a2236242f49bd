"""How the op is called changes nothing: law 20."""

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from oracle import Cotangents, Inputs
from properties.harness.comparing import Found, answer, check_inputs, same, same_bits
from properties.harness.containment import at_once
from properties.harness.implementations import Implementation
from properties.harness.laws import law
from properties.harness.running import STATE, Results, backward, call, expect, run, tensors
from properties.harness.subcalls import TOKENS, Part
from properties.problems.problem import DTYPES, Problem
from properties.problems.strategies import problems

ANY, SHARE = problems(wild=False, most=12), 0.5
PROJECTED, GATES = TOKENS[:3], TOKENS[3:]


def values(outputs: Results) -> Results:
    """Return the outputs of a call, without their graph, on the CPU."""
    return {name: x.detach().cpu() for name, x in outputs.items()}


def recorded(
    implementation: Implementation, inputs: Inputs, wanted: Collection[str] | None = None
) -> tuple[Results, Results]:
    """Return the outputs of a call and those of its tensors, all unless some are wanted, that require gradients."""
    given = tensors(inputs)
    wanted = given.keys() if wanted is None else wanted
    leaves = {name: x.detach().to(implementation.device).requires_grad_(name in wanted) for name, x in given.items()}
    return call(implementation, inputs, leaves), {name: x for name, x in leaves.items() if name in wanted}


def with_call(implementation: Implementation, change: Callable[..., Any]) -> Implementation:
    """Return the implementation with `change(call, *arguments, **options)` in the place of its call."""

    def changed(*arguments: Any, **options: Any) -> Any:
        return change(implementation.call, *arguments, **options)

    return replace(implementation, call=changed)


def outputs_alone(implementation: Implementation, inputs: Inputs, cotangents: Cotangents) -> Results:
    """Return the outputs of a call that asks for no final state, and its gradients."""

    def without(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        o, nothing = call(*arguments[:-1], False, **options)
        expect("the final state", nothing, None)
        return o, nothing

    alone = replace(implementation, claims=implementation.claims - {"final_state", "resume", "offset"})
    return run(with_call(alone, without), inputs, cotangents)


@law("5.20", "5.18", problems=ANY, share=SHARE)
def test_the_grad_mode_changes_no_value(implementation: Implementation, problem: Problem) -> Found:
    inputs = problem.inputs()
    plain, found = answer(implementation, problem, gradients=False)
    if "backward" in implementation.claims:
        found += same_bits(plain, values(recorded(implementation, inputs)[0]))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found += same_bits(plain, run(implementation, inputs))
    return found


@law("5.20", "5.18", problems=ANY, needs=["backward"], share=SHARE)
def test_the_tensors_that_require_gradients_change_no_result(implementation: Implementation, problem: Problem) -> Found:
    inputs, cotangents = problem.inputs(), problem.cotangents()
    (plain, found), names = answer(implementation, problem), [*tensors(inputs)]
    for seed in (problem.seed, 2 ** (problem.seed % len(names))):
        wanted = [name for i, name in enumerate(names) if seed >> i & 1]
        outputs, leaves = recorded(implementation, inputs, wanted)
        gradients = backward(outputs, leaves, cotangents)
        found += same_bits({name: plain[name] for name in (*outputs, *gradients)}, values(outputs | gradients))
    return found


@law("5.20", problems=problems(wild=False, most=12, cotangent="o"), needs=["backward", "final_state"], share=SHARE)
def test_gradients_need_no_final_state(implementation: Implementation, problem: Problem) -> Found:
    plain, found = answer(implementation, problem)
    return found + same_bits(outputs_alone(implementation, problem.inputs(), problem.cotangents()), plain)


@law("5.20", problems=ANY, needs=["backward"], share=SHARE)
def test_a_cotangent_may_be_expanded_or_missing(implementation: Implementation, problem: Problem) -> Found:
    inputs = problem.inputs()
    outputs, leaves = recorded(implementation, inputs)
    ones = {name: torch.ones_like(x.detach(), device="cpu") for name, x in outputs.items() if name != "offset"}
    wanted, found = check_inputs(implementation, inputs, Cotangents(**ones))
    connected = [name for name in ones if outputs[name].requires_grad]
    if not connected:
        return []
    torch.autograd.backward([outputs[name].sum() for name in connected])
    found += same_bits({f"d{name}": wanted[f"d{name}"] for name in leaves}, gradients_of(leaves))
    # Zeros are no cotangent: the numbers are equal, but for the signs of zeros.
    outputs, leaves = recorded(implementation, inputs)
    zeros = [(torch.ones_like if name == "o" else torch.zeros_like)(outputs[name]) for name in connected]
    torch.autograd.backward([outputs[name] for name in connected], zeros)
    alone = run(implementation, inputs, Cotangents(ones["o"]))
    return found + same({f"d{name}": alone[f"d{name}"] for name in leaves}, gradients_of(leaves))


def gradients_of(leaves: Results) -> Results:
    """Return the accumulated gradients: zeros where nothing has arrived."""
    return {f"d{name}": torch.zeros_like(x).cpu() if x.grad is None else x.grad.cpu() for name, x in leaves.items()}


# Several heads, and every cotangent.
SPREADING = problems(wild=False, most=12, fewest_heads=2, cotangent="o M S anchor")


@law("5.20", problems=ANY | SPREADING, needs=["backward"], share=SHARE)
def test_a_cotangent_that_is_no_number_stays_in_its_sequence_and_head(
    implementation: Implementation, problem: Problem
) -> Found:
    fitting = [n for n, T in enumerate(problem.lengths) if T]
    if not fitting:
        return []
    inputs, cotangents = problem.inputs(), problem.cotangents()
    n, h = fitting[problem.seed % len(fitting)], problem.H - 1
    row, begin, end = inputs.sequences[n]
    given = {name: x for name, x in vars(cotangents).items() if x is not None and name in ("o", *implementation.left)}
    name = [*given][problem.seed // 2 % len(given)]
    dirt = given[name].clone()
    dirt[(row, begin + problem.seed % (end - begin), h, 0) if name == "o" else (n, h, 0, 0)] = torch.nan
    changed: dict[str, Any] = {name: dirt}
    clean, found = answer(implementation, problem)
    dirty = run(implementation, inputs, replace(cotangents, **changed))
    heads, others = range(problem.H - 1), [x for x in range(problem.sequences) if x != n]
    for part in (Part(inputs, range(problem.sequences), heads), Part(inputs, others, range(problem.H))):
        chosen = [part.select_all({name: x for name, x in y.items() if name != "offset"}) for y in (clean, dirty)]
        found += same(chosen[0], chosen[1])
    return found


@law("5.20", problems=ANY, needs=["backward"], share=SHARE)
def test_a_second_backward_gives_the_same_bits(implementation: Implementation, problem: Problem) -> Found:
    (plain, found), cotangents = answer(implementation, problem), problem.cotangents()
    outputs, leaves = recorded(implementation, problem.inputs())
    for _ in range(2):
        gradients = backward(outputs, leaves, cotangents, retain_graph=True)
        found += same_bits({name: plain[name] for name in gradients}, values(gradients))
    return found


@law("5.20", problems=ANY, share=SHARE)
def test_inputs_may_share_memory(implementation: Implementation, problem: Problem) -> Found:
    inputs, flowing = problem.inputs(), problem.cotangents()
    given = {name: x.to(implementation.device) for name, x in tensors(inputs).items()}
    q, k, v = torch.stack([given[name] for name in PROJECTED], 2).unbind(2)
    theta, alpha, eta = torch.stack([given[name] for name in GATES], -1).unbind(-1)
    fused = given | {"q": q, "k": k, "v": v, "theta": theta, "alpha": alpha, "eta": eta}
    plain, found = answer(implementation, problem)
    found += same_bits(plain, run(implementation, inputs, flowing, fused))
    # The same tensor twice, and one state for all sequences.
    expanded = {name: given[name][:1].expand_as(given[name]) for name in ("M", "S") if name in given}
    alike = given | expanded | {"q": given["k"]}
    if "anchor" in given:
        alike["anchor"] = alike["M"]
    apart: dict[str, Any] = {name: x.cpu().clone(memory_format=torch.contiguous_format) for name, x in alike.items()}
    plain, others = check_inputs(implementation, replace(inputs, **apart), flowing)
    return found + others + same_bits(plain, run(implementation, inputs, flowing, alike))


CONVERTED = problems(wild=False, most=12, dtypes=("float32",), initial=("none", "M", "full", "full"))


@law("5.20", problems=CONVERTED, needs=["half"], share=SHARE)
def test_the_same_numbers_in_other_dtypes_give_the_same_results(
    implementation: Implementation, problem: Problem
) -> Found:
    wide = "bfloat16" in implementation.claims and problem.seed % 2
    narrow, inputs, flowing = DTYPES["bfloat16" if wide else "float16"], problem.inputs(), problem.cotangents()
    # All of a state, all but M, or M alone.
    names = {"w", "b", *GATES, *(STATE, STATE[1:], STATE[:1])[problem.seed // 2 % 3]}
    given = tensors(inputs)
    half = {name: x.to(narrow) if name in names else x for name, x in given.items()}
    single: dict[str, Any] = {name: x.to(given[name].dtype) for name, x in half.items()}

    def other_integers(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        *rest, start, wanted = arguments
        if "cu_seqlens" in options:
            options["cu_seqlens"] = options["cu_seqlens"].long()
        if hasattr(start, "offset"):
            start = implementation.state(start.M, start.S, start.anchor, start.offset.int())
        return call(*rest, start, wanted, **options)

    plain, found = check_inputs(implementation, replace(inputs, **single), flowing)
    narrowed = run(with_call(implementation, other_integers), inputs, flowing, half)
    expected = {name: x.to(narrowed[name].dtype) for name, x in plain.items()}
    return found + same(expected, narrowed, [name for name in expected if name != "offset"])


@law("5.20", problems=ANY, share=SHARE)
def test_a_tensor_that_was_changed_in_place_is_read_again(implementation: Implementation, problem: Problem) -> Found:
    offsets = tuple((offset + 1) % problem.C for offset in problem.offsets)
    first = problem.inputs()
    second = replace(problem, seed=problem.seed + 1, lengths=problem.lengths[::-1], offsets=offsets).inputs()
    kept: list[Tensor] = []

    def in_place(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        *rest, start, wanted = arguments
        passed = [x for x in (*rest, *fields_of(start), options.get("cu_seqlens")) if isinstance(x, Tensor)]
        if not kept:
            kept.extend(x.clone() for x in passed)
        for x, y in zip(kept, passed, strict=True):
            x.copy_(y)
        # The same tensors, or others at the addresses of those before, as new ones often are.
        again = iter([x.data for x in kept] if problem.seed % 2 else kept)
        rest = [next(again) if isinstance(x, Tensor) else x for x in rest]
        parts = [next(again) for _ in fields_of(start)]
        start = implementation.state(*parts) if len(parts) == 4 else parts[0] if parts else None
        if "cu_seqlens" in options:
            options["cu_seqlens"] = next(again)
        return call(*rest, start, wanted, **options)

    subject = with_call(implementation, in_place)
    run(subject, first)
    plain, found = check_inputs(implementation, second, None)
    return found + same_bits(plain, run(subject, second))


def fields_of(start: Any) -> tuple[Tensor, ...]:
    """Return the tensors of an initial state."""
    if start is None or isinstance(start, Tensor):
        return () if start is None else (start,)
    return start.M, start.S, start.anchor, start.offset


def without_tokens(problem: Problem) -> Problem:
    """Return the same problem with sequences of no tokens."""
    return replace(problem, lengths=(0,) * problem.sequences)


@law("5.20", problems=ANY | ANY.map(without_tokens), share=SHARE)
def test_results_share_no_memory_with_arguments(implementation: Implementation, problem: Problem) -> Found:
    inputs = problem.inputs()
    plain, found = answer(implementation, problem, gradients=False)
    leaves = {name: x.to(implementation.device) for name, x in tensors(inputs).items()}
    before = values({name: x.clone() for name, x in leaves.items()})
    with torch.no_grad():
        outputs = call(implementation, inputs, leaves)
        found += same_bits(plain, values(outputs))
        for x in outputs.values():
            x.fill_(7)
    # The arguments are no results, and not counted.
    same(before, values(leaves))
    return found


@law("5.20", problems=ANY, share=SHARE, fewest=0.16)
def test_other_calls_before_and_between_change_nothing(implementation: Implementation, problem: Problem) -> Found:
    inputs, cotangents = problem.inputs(), problem.cotangents()
    # Of other chunks, or of the same sizes with other gates or another start.
    initial, offsets = ("none", ()) if problem.initial == "full" else ("full", (0,) * problem.sequences)
    kinds = {"C": problem.C + 1}, {"log_gates": not problem.log_gates}, {"initial": initial, "offsets": offsets}
    unlike: dict[str, Any] = kinds[problem.seed % len(kinds)]
    changed = replace(problem, seed=problem.seed + 1, alpha="constant 2^-2", theta="constant 0", **unlike)
    other = implementation.domain.nearest(changed.restricted(implementation.claims))
    (first, found), (beside, others) = answer(implementation, problem), answer(implementation, other)
    found += others
    if "backward" not in implementation.claims:
        found += same_bits(first, run(implementation, inputs))
        return found + same_bits(beside, run(implementation, other.inputs()))
    # The backward of a call after the forward of another.
    one, two = recorded(implementation, inputs), recorded(implementation, other.inputs())
    for (outputs, leaves), flowing, wanted in ((one, cotangents, first), (two, other.cotangents(), beside)):
        found += same_bits(wanted, values(outputs | backward(outputs, leaves, flowing)))
    return found


@law("5.20", problems=ANY, needs=["threads"], share=0.2)
def test_calls_of_several_threads_at_once_change_nothing(implementation: Implementation, problem: Problem) -> Found:
    other = replace(problem, seed=problem.seed + 1)
    (first, found), (second, others) = answer(implementation, problem), answer(implementation, other)
    found += others
    calls = [functools.partial(run, implementation, x.inputs(), x.cotangents()) for x in (problem, other, problem)]
    for wanted, results in zip((first, second, first), at_once(calls), strict=True):
        found += same_bits(wanted, results)
    return found


@contextmanager
def restored(change: Callable[[Any], None], value: Any, old: Any) -> Iterator[None]:
    """Set something for a while."""
    change(value)
    try:
        yield
    finally:
        change(old)


def surroundings(device: str) -> Iterator[tuple[str, AbstractContextManager[Any]]]:
    """All that a program may set around a call, by name."""
    yield "default dtype", restored(torch.set_default_dtype, torch.float64, torch.get_default_dtype())
    yield "default device", torch.device("meta")
    yield "deterministic", restored(torch.use_deterministic_algorithms, True, False)
    yield "anomaly mode", torch.autograd.set_detect_anomaly(True, check_nan=False)
    if device == "cuda":
        yield "stream", torch.cuda.stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]


@law("5.20", problems=ANY, share=SHARE)
def test_what_is_set_around_a_call_changes_nothing(implementation: Implementation, problem: Problem) -> Found:
    inputs, cotangents = problem.inputs(), problem.cotangents()
    plain, found = answer(implementation, problem)
    for _, around in surroundings(implementation.device):
        with around:
            found += same_bits(plain, run(implementation, inputs, cotangents))
    return found

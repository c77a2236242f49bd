"""What the laws are written with: run an implementation, ask the oracle, compare, and say what is wrong."""

import functools
import math
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import currently_in_test_context, given, settings, target
from hypothesis.errors import HypothesisException
from hypothesis.strategies import SearchStrategy
from numpy.typing import NDArray
from torch import Tensor

import oracle
from oracle import Cotangents, Inputs, bounds
from oracle.precision import context, exact
from properties.isolation import DeviceLost, is_fatal
from properties.problem import Problem

Results = dict[str, Tensor]
Truth = dict[str, NDArray[np.object_]]
Radii = dict[str, NDArray[np.float64]]
Law = Callable[..., None]

STATE = ("M", "S", "anchor")
# Every tensor that a gradient is asked for; a result named `dq` is the gradient for `q`.
DIFFERENTIABLE = ("q", "k", "v", "w", "b", "theta", "alpha", "eta", *STATE)
# Everything an implementation can claim.
CLAIMS = frozenset(
    {
        "plain",
        "normalised",
        "varlen",
        "initial_state",
        "final_state",
        "resume",
        "offset",
        "step",
        "log_gates",
        "backward",
    }
    | {"half", "bfloat16", "float64", "exact", "batch_invariant", "large"}
)
# What a replay command needs besides the test and the problem; set by `conftest.py`.
OPTIONS: list[str] = []


@dataclass(frozen=True, repr=False)
class Implementation:
    """Something to verify.

    Parameters
    ----------
    name : str
    call, step : callable
        With the signatures of `titans.chunk_titans_linear` and `titans.titans_linear_step`.
    state : callable
        Makes what `call` accepts as an initial state out of M, S, anchor and offset.
    claims : frozenset of str
        Which of `CLAIMS` it has.
    device : str
    arithmetic : callable
        Of a call, an `Inputs`: what it computes with there, and so which bounds it answers to.
    share : float
        Of the profile's number of examples: slow ones get fewer.
    """

    name: str
    call: Callable[..., Any]
    step: Callable[..., Any] | None
    state: Callable[..., Any]
    claims: frozenset[str]
    device: str = "cpu"
    arithmetic: Callable[[Inputs], bounds.ErrorModel] = lambda inputs: bounds.arithmetic_for(inputs.q.dtype)
    share: float = 1.0

    @property
    def left(self) -> tuple[str, ...]:
        """What of a final state it answers for: what its claims allow to be passed on."""
        names = {"final_state": ("M",), "resume": ("S",), "offset": ("anchor", "offset")}
        return tuple(name for claim, of in names.items() if claim in self.claims for name in of)

    def __repr__(self) -> str:
        """Show the name alone in reports."""
        return self.name

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the same in Hypothesis's report."""
        printer.text(self.name)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the state for inputs of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Property:
    """A law, with the problems that it is about and the claims without which it says nothing."""

    law: Law
    problems: SearchStrategy[Problem]
    needs: frozenset[str]
    share: float

    def test(self, share: float = 1.0, **options: Any) -> Law:
        """Return the law as a test of problems that Hypothesis invents, with these settings."""
        examples = max(1, math.ceil(self.share * share * settings.default.max_examples))
        return settings(max_examples=examples, **options)(given(problem=self.problems)(self.law))


# Every property by its test's name, so that fixtures and meta-tests can call it with what they like.
PROPERTIES: dict[str, Property] = {}


class LawBroken(AssertionError):
    """An implementation does not do what a law says."""


@dataclass
class Tally:
    """What one test saw: the facts of a `report.Verdict`."""

    calls: int = 0
    examples: int = 0
    ill_conditioned: int = 0
    half: int = 0
    half_ill_conditioned: int = 0
    finite: int = 0
    exact: int = 0
    error: float = 0.0
    ratio: float = 0.0
    result: str = ""
    problem: str = ""
    tightness: dict[str, float] = field(default_factory=dict)
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)
    failing_call: int = 0
    failing_problem: str = ""
    message: str = ""
    replay: str = ""
    now: "Example" = field(default_factory=lambda: Example())
    last: "Example" = field(default_factory=lambda: Example())

    def close_example(self, implementation: Implementation, law: str, problem: Problem) -> None:
        """Count the example that just ended, if the oracle was asked in it."""
        now, self.now, self.last = self.now, Example(), self.now
        self.calls += 1
        self.examples += now.compared
        self.ill_conditioned += now.unsure
        if now.half:
            self.half += now.compared
            self.half_ill_conditioned += now.unsure
        self.finite += now.compared and not now.overflows
        self.exact += now.exact
        self.error = max(self.error, now.error)
        if now.ratio > self.ratio:
            self.ratio, self.result, self.problem = now.ratio, now.result, problem.to_json()
        key = f"{law} {problem.dtype}"
        if now.error > self.worst.get(key, (0.0, ""))[0] and not now.unsure:
            self.worst[key] = now.error, problem.to_json()
        for name, ratio in now.tightness.items():
            self.tightness[name] = max(ratio, self.tightness.get(name, 0.0))

    def fail(self, implementation: Implementation, problem: Problem, error: Exception) -> None:
        """Note a failure; Hypothesis shows the smallest one last."""
        self.failing_call = self.failing_call or self.calls + 1
        self.failing_problem, self.message = problem.to_json(), f"{type(error).__name__}: {error}"
        self.replay = replay_command(problem)

    def facts(self) -> dict[str, Any]:
        """Return everything but the running example."""
        return {name: value for name, value in vars(self).items() if name not in ("now", "last")}


@dataclass
class Example:
    """What the running example saw."""

    compared: bool = False
    unsure: bool = False
    half: bool = False
    overflows: bool = False
    exact: bool = False
    error: float = 0.0
    ratio: float = 0.0
    result: str = ""
    stage: str = ""
    tightness: dict[str, float] = field(default_factory=dict)


# The tally of the running test; `conftest.py` empties it before each.
TALLY = Tally()


def law(
    *numbers: str, problems: SearchStrategy[Problem], needs: Iterable[str] = (), share: float = 1.0
) -> Callable[[Law], Law]:
    """Make a property of a function of an implementation and a problem.

    Parameters
    ----------
    *numbers : str
        The sections of `SPEC.md` it comes from: "5.2" is law 2.
    problems : strategy of Problem
    needs : iterable of str
        Claims without which the law says nothing.
    share : float
        Of the profile's number of examples.
    """

    def decorate(function: Law) -> Law:
        roomy = with_room(function)

        @functools.wraps(function)
        def checked(implementation: Implementation, problem: Problem) -> None:
            problem = problem.restricted(implementation.claims)
            try:
                roomy(implementation, problem)
                drive_to_the_worst()
            except HypothesisException:
                raise
            except oracle.Unsettled:
                TALLY.now.compared = TALLY.now.unsure = True
            except Exception as error:
                TALLY.fail(implementation, problem, error)
                error.add_note(explanation(implementation, problem))
                if is_fatal(error):
                    raise DeviceLost from error
                raise
            finally:
                TALLY.close_example(implementation, function.__name__, problem)

        found = Property(checked, problems, frozenset(needs), share)
        PROPERTIES[function.__name__] = found
        return pytest.mark.law(*numbers, needs=found.needs)(found.test())

    return decorate


def drive_to_the_worst() -> None:
    """Let a deep search look for the largest error / bound; in a short one that would only narrow what is tried."""
    deep = settings.get_current_profile_name() == "deep"
    if deep and currently_in_test_context() and math.isfinite(TALLY.now.ratio):
        target(TALLY.now.ratio, label="error / bound")


def with_room(function: Law) -> Law:
    """Return the function with room on CPython's stack of frames for what it calls.

    That stack grows by 16 KiB and gives them back at once: where a busy call sits on the edge of such a block, as some
    call of Triton's interpreter often does, every single one maps and unmaps memory, and that takes half of the time.
    """

    def caller(*arguments: Any) -> None:
        function(*arguments)

    caller.__code__ = caller.__code__.replace(co_stacksize=100_000)
    return caller


def replay(law: Law, problem: Problem) -> Law:
    """Return a law about one problem."""

    def replayed(implementation: Implementation) -> None:
        law(implementation, problem)

    return replayed


def explanation(implementation: Implementation, problem: Problem) -> str:
    """Say what a failed example was, and how to run it again."""
    versions = f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    lines = [f"implementation: {implementation.name} on {implementation.device}; {versions}", f"problem: {problem!r}"]
    if problem.tokens * problem.H <= 8:
        given = problem.inputs()
        lines += [f"    {name} = {getattr(given, name).tolist()}" for name in ("theta", "alpha", "eta")]
    lines.append(f"replay: {replay_command(problem)}")
    return "\n".join(lines)


def replay_command(problem: Problem) -> str:
    """Return what runs the current test on this problem."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "TEST (call)").rpartition(" ")[0]
    options = "".join(f" {option}" for option in OPTIONS)
    return f"pytest '{test}'{options} --replay '{problem.to_json()}'"


def run(
    implementation: Implementation,
    inputs: Inputs,
    cotangents: Cotangents | None = None,
    leaves: Results | None = None,
) -> Results:
    """Call an implementation, forward and, given cotangents, backward.

    Parameters
    ----------
    implementation : Implementation
    inputs : Inputs
    cotangents : Cotangents or None
    leaves : dict of Tensor or None
        Pass these tensors, on the right device, instead of those of `inputs`.

    Returns
    -------
    dict of Tensor
        `o`, and `M`, `S`, `anchor`, `offset` where they are claimed; with cotangents, where the backward is claimed,
        also `dq`, ... for every differentiable input that was given.
    """
    cotangents = cotangents if "backward" in implementation.claims else None
    given = (leaves or tensors(inputs)).items()
    leaves = {name: x.detach().to(implementation.device).requires_grad_(cotangents is not None) for name, x in given}
    outputs = call(implementation, inputs, leaves)
    check_form(inputs, outputs)
    results = {name: x.detach() for name, x in outputs.items()}
    if cotangents is not None:
        results |= backward(outputs, leaves, cotangents)
    return {name: x.cpu() for name, x in results.items()}


def call(implementation: Implementation, inputs: Inputs, leaves: Results) -> Results:
    """Call the implementation on these tensors; the rest comes from `inputs`."""
    device = implementation.device
    names = ("q", "k", "v", "w", "b", "theta", "alpha", "eta")
    start = leaves.get("M")
    if inputs.S is not None or inputs.anchor is not None:
        offset = torch.tensor(inputs.offsets, dtype=torch.int64, device=device)
        start = implementation.state(leaves["M"], leaves["S"], leaves.get("anchor", leaves["M"]), offset)
    options: dict[str, Any] = {"log_gates": True} if inputs.log_gates else {}
    if inputs.cu_seqlens is not None:
        options["cu_seqlens"] = torch.tensor(inputs.cu_seqlens, dtype=torch.int32, device=device)
    tensors = (leaves.get(name) for name in names)
    o, final = implementation.call(*tensors, inputs.eps, inputs.chunk_size, start, True, **options)
    return {"o": o} | {name: getattr(final, name) for name in implementation.left}


def backward(outputs: Results, leaves: Results, cotangents: Cotangents) -> Results:
    """Return the gradients; an output without a cotangent, or with one of zeros, is left out of the backward pass."""
    flowing = [
        (outputs[name], x.to(outputs[name].device))
        for name in ("o", *STATE)
        if name in outputs
        and (x := getattr(cotangents, name)) is not None
        and outputs[name].requires_grad
        and bool((x != 0).any())
    ]
    gradients: Iterable[Tensor | None] = [None] * len(leaves)
    if flowing:
        ends, inflow = zip(*flowing, strict=True)
        gradients = torch.autograd.grad(ends, list(leaves.values()), inflow, allow_unused=True)
    pairs = zip(leaves.items(), gradients, strict=True)
    return {f"d{name}": torch.zeros_like(x) if dx is None else dx.detach() for (name, x), dx in pairs}


def check_form(inputs: Inputs, outputs: Results) -> None:
    """Shapes and dtypes are those of the contract, and the offsets are exactly right."""
    B, T, H, D = inputs.q.shape
    N, dtype = len(inputs.sequences), compute_dtype(inputs.q.dtype)
    ends = [
        (start + end - begin) % inputs.chunk_size
        for start, (_, begin, end) in zip(inputs.offsets, inputs.sequences, strict=True)
    ]
    expect("o", (outputs["o"].shape, outputs["o"].dtype), ((B, T, H, D), inputs.q.dtype))
    for name in (name for name in STATE if name in outputs):
        expect(name, (outputs[name].shape, outputs[name].dtype), ((N, H, D, D), dtype))
    if "offset" in outputs:
        expect("offset", outputs["offset"].tolist(), ends)


def expect(name: str, actual: object, wanted: object) -> None:
    """Raise unless two things are equal."""
    __tracebackhide__ = True
    if actual != wanted:
        raise LawBroken(f"`{name}` must be {wanted}, got {actual}")


def truth(inputs: Inputs, cotangents: Cotangents | None = None) -> Truth:
    """Ask the oracle; names as in `run`."""
    if cotangents is None:
        output, gradients = oracle.forward(inputs), {}
    else:
        output, gradient = oracle.gradient(inputs, cotangents)
        gradients = {f"d{name}": getattr(gradient, name) for name in tensors(inputs)}
    return {"o": output.o} | {name: getattr(output.state, name) for name in STATE} | gradients


def radii(implementation: Implementation, inputs: Inputs, cotangents: Cotangents | None = None) -> Radii:
    """Return how far from the truth the implementation may be; names as in `run`."""
    arithmetic = implementation.arithmetic(inputs)
    if cotangents is None:
        radius, gradients = bounds.forward_radius(inputs, arithmetic), {}
    else:
        radius, gradient = bounds.gradient_radius(inputs, cotangents, arithmetic)
        gradients = {f"d{name}": getattr(gradient, name) for name in tensors(inputs)}
    return {name: getattr(radius, name) for name in ("o", *STATE)} | gradients


@functools.lru_cache(maxsize=64)
def solved(problem: Problem, with_gradient: bool) -> Truth:
    """Return the oracle's answer to a problem."""
    return truth(problem.inputs(), problem.cotangents() if with_gradient else None)


def check(implementation: Implementation, problem: Problem, gradients: bool = True) -> Results:
    """Compare everything that the implementation makes of a problem with the oracle's answer, and return it."""
    gradients = gradients and "backward" in implementation.claims
    inputs, cotangents = problem.inputs(), problem.cotangents() if gradients else None
    return check_against(solved(problem, gradients), implementation, inputs, cotangents)


def check_inputs(implementation: Implementation, inputs: Inputs, cotangents: Cotangents | None) -> Results:
    """Do as `check`, for inputs that are not directly those of a problem."""
    return check_against(truth(inputs, cotangents), implementation, inputs, cotangents)


def check_against(
    wanted: Truth, implementation: Implementation, inputs: Inputs, cotangents: Cotangents | None
) -> Results:
    """Compare everything that the implementation makes of some inputs with the oracle's answer, and return it."""
    results = run(implementation, inputs, cotangents)
    half = inputs.q.dtype.itemsize == 2 and implementation.arithmetic(inputs).operand > 0
    TALLY.now.half |= half
    TALLY.now.stage = stage(inputs, half)
    compare(results, wanted, radii(implementation, inputs, cotangents))
    return results


def stage(inputs: Inputs, half: bool) -> str:
    """Say which memory, and whether a call is a piece, from a state that is exact, or several from end to end.

    Apart from the others stand products of `half` precision, whose operands are all that their bounds are made of. The
    stage is none where a sequence has no tokens: what comes of one is rounded once or not at all, just within its
    bound, and would hide how loose the bounds of the others are.
    """
    lengths = [end - begin for _, begin, end in inputs.sequences]
    if not all(lengths):
        return ""
    alone = all(start + T <= inputs.chunk_size for start, T in zip(inputs.offsets, lengths, strict=True))
    memory = "plain" if inputs.w is None else "normalised"
    return f"{memory}{' half' if half else ''} {'piece' if alone else 'end to end'}"


def compare(results: Results, wanted: Truth, radius: Radii) -> None:
    """Raise unless every element of every result is within its radius of the exact value.

    There are fewer results than `wanted` where an implementation does not claim them all.
    """
    now = TALLY.now
    now.compared = True
    wanted = {name: exactly for name, exactly in wanted.items() if name in results}
    overflows = any(not np.isfinite(radius[name]).all() for name in wanted)
    now.overflows |= overflows
    widest = max((x.dtype.itemsize for x in results.values() if x.is_floating_point()), default=0)
    for name, exactly in wanted.items():
        actual = results[name]
        expect(name, tuple(actual.shape), exactly.shape)
        if actual.numel():
            ratio, error = compare_one(name, actual, exactly, radius[name], overflows)
            # A narrow result may always be half an ulp off, which says nothing about the arithmetic.
            if actual.dtype.itemsize == widest:
                note(name, ratio, error)


def note(name: str, ratio: float, error: float) -> None:
    """Keep the worst of the running example."""
    now = TALLY.now
    now.error = max(now.error, error)
    if ratio > now.ratio:
        now.ratio, now.result = ratio, name
    if now.stage:
        key = f"{now.stage} {name}"
        now.tightness[key] = max(ratio, now.tightness.get(key, 0.0))


def compare_one(
    name: str, actual: Tensor, exactly: NDArray[np.object_], radius: NDArray[np.float64], overflows: bool
) -> tuple[float, float]:
    """Compare one result, and return its worst error, over the radius and in ulps of the largest exact value.

    There is no verdict where the radius is infinite. Where anything overflows, section 4.1 promises nothing finite.
    """
    __tracebackhide__ = True
    size = nearest(np.abs(exactly))
    measurable = (radius < math.inf) & (actual.isfinite().numpy() | (not overflows))
    TALLY.now.unsure |= is_unsure(actual.dtype, size, radius)
    error = np.abs(exact(actual) - exactly)
    within = (error <= exact(radius)).astype(bool) | ~measurable
    far = np.where(measurable, nearest(error), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(far != 0, far / radius, 0)
    # No number at all is as wrong as can be.
    far, ratio = (np.where(np.isnan(x), math.inf, x) for x in (far, ratio))
    worst = np.unravel_index(np.argmax(ratio), ratio.shape)
    ulps = in_ulps(float(far.max()), float(size.max()), actual.dtype)
    if not within.all():
        note(name, float(ratio[worst]), ulps)
        raise LawBroken(
            f"{name}[{', '.join(map(str, worst))}] is wrong\n"
            f"    exact  {context.nstr(exactly[worst], 20)}\n"
            f"    actual {actual[worst].item()!r}\n"
            f"    error  {context.nstr(error[worst], 6)}\n"
            f"    bound  {radius[worst]:.6g}\n"
            f"    ratio  {ratio[worst]:.6g}\n"
            f"    dtype  {actual.dtype}, {(~within).sum()} of {within.size} elements are wrong"
        )
    # Next to nothing, or nothing: an ulp of it says nothing either.
    clear = size.max() / 2 >= np.where(radius < math.inf, radius, 0).max()
    return float(ratio[worst]), ulps if clear else 0.0


def in_ulps(error: float, size: float, dtype: torch.dtype) -> float:
    """Return an error in units of the spacing of a format at a size; below the normal numbers that is constant.

    Beyond float64 there is no spacing, and no error counts.
    """
    if math.isinf(size):
        return 0.0
    form = torch.finfo(dtype)
    return error / (form.eps * 2.0 ** math.floor(math.log2(max(size, form.tiny))))


def nearest(x: Any) -> Any:
    """Round the oracle's numbers to float64."""
    return np.asarray(x).astype(np.float64)


def is_unsure(dtype: torch.dtype, size: NDArray[np.float64], radius: NDArray[np.float64]) -> bool:
    """Whether a radius promises not even the leading bit of the largest element: the example is ill-conditioned.

    Where the truth is 0 the radius is that of the cancellation, and where it is next to nothing that of underflow.
    """
    form = torch.finfo(compute_dtype(dtype))
    underflow = max(form.tiny / form.eps**2, torch.finfo(dtype).tiny)
    if radius.max() < math.inf and (size.max() == 0 or radius.max() < underflow):
        return False
    return bool(radius.max() > size.max() / 2)


def same(x: Results, y: Results, names: Iterable[str] | None = None) -> None:
    """Raise unless two runs gave equal numbers; NaN equals NaN."""
    for name in x if names is None else names:
        same_tensor(name, x[name], y[name])


def same_tensor(name: str, x: Tensor, y: Tensor) -> None:
    """Raise unless two tensors hold equal numbers; NaN equals NaN."""
    __tracebackhide__ = True
    expect(f"{name}.shape", x.shape, y.shape)
    differs = ~((x == y) | (x.isnan() & y.isnan()))
    if differs.any():
        i = tuple(int(n) for n in differs.nonzero()[0])
        raise LawBroken(
            f"{name}[{', '.join(map(str, i))}] must not change, but is {x[i].item()!r} in one run and {y[i].item()!r}"
            f" in the other ({int(differs.sum())} of {x.numel()} elements differ)"
        )


def bits(x: Tensor) -> bytes:
    """Return the bytes of a tensor's elements, so that even the signs of zeros and NaNs count."""
    return x.detach().cpu().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


def same_bits(x: Results, y: Results) -> None:
    """Raise unless two runs gave the same bits."""
    same(x, y)
    for name in x:
        expect(f"the bits of {name}", bits(x[name]).hex(), bits(y[name]).hex())


def tensors(inputs: Inputs) -> Results:
    """Return every tensor of some inputs by name."""
    return {name: x for name in DIFFERENTIABLE if (x := getattr(inputs, name)) is not None}

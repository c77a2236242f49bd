"""Comparing results with the oracle's answer, or with those of another run: the comparisons are returned."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import oracle
from oracle import Cotangents, Inputs, bounds
from oracle.precision import context, doubles, exact
from properties.harness.implementations import Implementation
from properties.harness.running import STATE, LawBroken, Results, compute_dtype, expect, run, tensors
from properties.problems.problem import Problem

Truth = dict[str, NDArray[np.object_]]
Radii = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Comparison:
    """One comparison of one result, within its law.

    Parameters
    ----------
    result : str
        Its name, such as `o` or `dq`.
    elements : int
        How many elements were compared.
    ratio, ulps : float
        The worst error / bound, and the worst error in ulps of the largest exact value.
    ill_conditioned : bool
        Whether the bound says nothing; see `is_unsure`.
    finite, exact : bool
        Whether the law is that every element is finite, or right in every bit.
    narrow : bool
        Whether another result of the call has a wider format, so that the errors say nothing about the arithmetic.
    stage : str
        See `stage`; "" where bounds are not measured.
    oracle : bool
        Whether it is a comparison with the oracle; otherwise with another run.
    empty, zero : bool
        Whether some finite radius is above the largest exact value; whether all exact values are 0.
    unjudged : int
        The elements without a verdict.
    heads : float
        The share of heads that are more than twice as far off as the definition.
    """

    result: str
    elements: int
    ratio: float = 0.0
    ulps: float = 0.0
    ill_conditioned: bool = False
    finite: bool = False
    exact: bool = False
    narrow: bool = False
    stage: str = ""
    oracle: bool = True
    empty: bool = False
    zero: bool = False
    unjudged: int = 0
    heads: float = 0.0


# The comparisons of one example.
Found = list[Comparison]


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


def check(implementation: Implementation, problem: Problem, gradients: bool = True) -> Found:
    """Compare all results of the implementation for a problem with the oracle's answer."""
    return answer(implementation, problem, gradients)[1]


def answer(implementation: Implementation, problem: Problem, gradients: bool = True) -> tuple[Results, Found]:
    """Return all results for a problem, and how they compare with the oracle's answer."""
    gradients = gradients and "backward" in implementation.claims
    inputs, cotangents = problem.inputs(), problem.cotangents() if gradients else None
    implementation.require(inputs)
    return check_against(solved(problem, gradients), implementation, inputs, cotangents)


def check_inputs(
    implementation: Implementation, inputs: Inputs, cotangents: Cotangents | None
) -> tuple[Results, Found]:
    """Do as `answer`, for inputs that are not directly those of a problem."""
    implementation.require(inputs)
    return check_against(truth(inputs, cotangents), implementation, inputs, cotangents)


def check_against(
    wanted: Truth, implementation: Implementation, inputs: Inputs, cotangents: Cotangents | None
) -> tuple[Results, Found]:
    """Do as `answer`, for inputs of which the oracle's answer is known."""
    results = run(implementation, inputs, cotangents)
    radius = radii(implementation, inputs, cotangents)
    return results, compare(results, wanted, radius, stage(inputs, has_narrow_operands(implementation, inputs)))


def has_narrow_operands(implementation: Implementation, inputs: Inputs) -> bool:
    """Whether the operands of products are rounded to half precision, as on tensor cores."""
    return inputs.q.dtype.itemsize == 2 and implementation.arithmetic(inputs).operand > 0


def stage(inputs: Inputs, half: bool) -> str:
    """Say which memory, and whether a call is a piece, from a state that is exact, or several from end to end.

    Apart from the others stand products of `half` precision, whose operands are all that their bounds are made of. The
    stage is none where a sequence has no tokens: its results are rounded once or not at all, just within the
    bound, and would hide how loose the bounds of the others are.
    """
    lengths = [end - begin for _, begin, end in inputs.sequences]
    if not all(lengths):
        return ""
    alone = all(start + T <= inputs.chunk_size for start, T in zip(inputs.offsets, lengths, strict=True))
    memory = "plain" if inputs.w is None else "normalised"
    return f"{memory}{' half' if half else ''} {'piece' if alone else 'end to end'}"


def compare(results: Results, wanted: Truth, radius: Radii, stage: str = "", exactly: bool = False) -> Found:
    """Return how results compare with exact values, or raise unless every element is within its radius.

    Parameters
    ----------
    results : dict of Tensor
        Fewer than `wanted` where an implementation does not claim them all.
    wanted : dict of array of the oracle's numbers
    radius : dict of array
    stage : str
        See `stage`.
    exactly : bool
        Whether the law is that every bit is right.
    """
    wanted = {name: x for name, x in wanted.items() if name in results}
    overflows = any(not np.isfinite(radius[name]).all() for name in wanted)
    widest = max((x.dtype.itemsize for x in results.values() if x.is_floating_point()), default=0)
    found: Found = []
    for name, x in wanted.items():
        actual = results[name]
        expect(name, tuple(actual.shape), x.shape)
        if not actual.numel():
            continue
        one, wrong = compare_one(name, actual, x, radius[name], overflows)
        # A narrow result may always be half an ulp off, which says nothing about the arithmetic.
        narrow = actual.dtype.itemsize < widest and not wrong
        found.append(replace(one, stage=stage, exact=exactly, finite=not overflows, narrow=narrow))
        if wrong:
            raise LawBroken(wrong, found)
    return found


def compare_exactly(results: Results, wanted: Truth) -> Found:
    """Return how results compare with exact values, or raise unless every element is exactly right."""
    return compare(results, wanted, {name: np.zeros(x.shape) for name, x in wanted.items()}, exactly=True)


def compare_one(
    name: str, actual: Tensor, exactly: NDArray[np.object_], radius: NDArray[np.float64], overflows: bool
) -> tuple[Comparison, str]:
    """Compare one result; return its worst errors, and a description of the worst element if one is wrong.

    There is no verdict where the radius is infinite. Where anything overflows, section 4.1 promises nothing finite.
    """
    near = nearest(exactly)
    size = np.abs(near)
    measurable = (radius < math.inf) & (actual.isfinite().numpy() | (not overflows))
    far, within = distances(actual, exactly, near, radius)
    far, within = np.where(measurable, far, 0), within | ~measurable
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(far != 0, far / radius, 0)
    # A result that is no number is as wrong as can be.
    far, ratio = (np.where(np.isnan(x), math.inf, x) for x in (far, ratio))
    worst = np.unravel_index(np.argmax(ratio), ratio.shape)
    ulps = in_ulps(float(far.max()), float(size.max()), actual.dtype)
    # Next to nothing, or nothing: an ulp of it says nothing either.
    clear = size.max() / 2 >= np.where(radius < math.inf, radius, 0).max()
    unsure = is_unsure(actual.dtype, size, radius)
    right = bool(within.all())
    found = Comparison(
        name,
        actual.numel(),
        float(ratio[worst]),
        ulps if clear or not right else 0.0,
        unsure,
        empty=bool(0 < size.max() < np.where(radius < math.inf, radius, 0).max()),
        zero=not size.any(),
        unjudged=int((~measurable).sum()),
    )
    return found, "" if right else (
        f"{name}[{', '.join(map(str, worst))}] is wrong\n"
        f"    exact  {context.nstr(exactly[worst], 20)}\n"
        f"    actual {actual[worst].item()!r}\n"
        f"    error  {context.nstr(np.abs(exact(actual) - exactly)[worst], 6)}\n"
        f"    bound  {radius[worst]:.6g}\n"
        f"    ratio  {ratio[worst]:.6g}\n"
        f"    dtype  {actual.dtype}, {(~within).sum()} of {within.size} elements are wrong"
    )


def distances(
    actual: Tensor, exactly: NDArray[np.object_], near: NDArray[np.float64], radius: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the distance of each element from the exact value, in float64, and whether it is within the radius.

    `near` holds the exact values rounded to float64. Where that settles the question, there is no need of 60 digits.
    """
    with np.errstate(all="ignore"):
        form, far = np.finfo(np.float64), np.abs(doubles(actual) - near)
        # `near`, the difference and this sum are rounded, each by half a unit or the smallest number at most.
        most = far + 4 * form.eps * (far + np.abs(near)) + form.tiny
        if actual.dtype != torch.float64 and (most <= radius).all():
            return far, np.ones(far.shape, dtype=bool)
    error = np.abs(exact(actual) - exactly)
    return nearest(error), (error <= exact(radius)).astype(bool)


def run_finite(
    implementation: Implementation, inputs: Inputs, cotangents: Cotangents | None = None, leaves: Results | None = None
) -> Results:
    """Do as `run`, and raise unless every number is finite, where every radius is."""
    results = run(implementation, inputs, cotangents, leaves)
    radius = radii(implementation, inputs, cotangents)
    if all(np.isfinite(radius[name]).all() for name in results if name in radius):
        for name, x in results.items():
            expect(f"whether {name} is finite", bool(x.isfinite().all()), True)
    return results


def in_ulps(error: float, size: float, dtype: torch.dtype) -> float:
    """Return an error in units of the spacing of a format at a size; below the normal numbers that is constant.

    Beyond float64 there is no spacing, and no error counts.
    """
    if math.isinf(size):
        return 0.0
    form = torch.finfo(dtype)
    return error / (form.eps * 2.0 ** math.floor(math.log2(max(size, form.tiny))))


def nearest(x: Any) -> NDArray[np.float64]:
    """Round the oracle's numbers to float64."""
    rounded: NDArray[np.float64] = np.asarray(x).astype(np.float64)
    return rounded


def is_unsure(dtype: torch.dtype, size: NDArray[np.float64], radius: NDArray[np.float64]) -> bool:
    """Whether a radius promises not even the leading bit of the largest element: the example is ill-conditioned.

    Where the truth is 0 the radius is that of the cancellation, and where it is next to nothing that of underflow.
    """
    form = torch.finfo(compute_dtype(dtype))
    underflow = max(form.tiny / form.eps**2, torch.finfo(dtype).tiny)
    if radius.max() < math.inf and (size.max() == 0 or radius.max() < underflow):
        return False
    return bool(radius.max() > size.max() / 2)


def same(x: Results, y: Results, names: Iterable[str] | None = None) -> Found:
    """Return how two runs compare, or raise unless they gave equal numbers; NaN equals NaN."""
    return [
        found for name in (x if names is None else names) if (found := same_tensor(name, x[name], y[name])).elements
    ]


def same_tensor(name: str, x: Tensor, y: Tensor) -> Comparison:
    """Return how two tensors compare, or raise unless they hold equal numbers; NaN equals NaN."""
    __tracebackhide__ = True
    expect(f"{name}.shape", x.shape, y.shape)
    differs = ~((x == y) | (x.isnan() & y.isnan()))
    if differs.any():
        i = tuple(int(n) for n in differs.nonzero()[0])
        raise LawBroken(
            f"{name}[{', '.join(map(str, i))}] must not change, but is {x[i].item()!r} in one run and {y[i].item()!r}"
            f" in the other ({int(differs.sum())} of {x.numel()} elements differ)"
        )
    return Comparison(name, x.numel(), oracle=False)


def bits(x: Tensor) -> bytes:
    """Return the bytes of a tensor's elements, so that even the signs of zeros and NaNs count."""
    return x.detach().cpu().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


def same_bits(x: Results, y: Results) -> Found:
    """Return how two runs compare, or raise unless they gave the same bits."""
    found = same(x, y)
    for name in x:
        if bits(x[name]) != bits(y[name]):
            pairs = enumerate(zip(x[name].flatten(), y[name].flatten(), strict=True))
            i, one, other = next((i, a, b) for i, (a, b) in pairs if bits(a) != bits(b))
            # The numbers are equal: it is the sign of a zero, or what a NaN carries.
            raise LawBroken(
                f"the bits of {name} must not change, but those of element {i} are {bits(one).hex()} in one run and"
                f" {bits(other).hex()} in the other"
            )
    return found

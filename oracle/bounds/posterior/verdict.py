"""The verdict on an implementation's results: (B16)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from oracle.bounds.error_model import ErrorModel
from oracle.bounds.posterior.batches import GATES, PARAMETERS, Batch, batches
from oracle.bounds.posterior.enclosure import COARSE_IS_SHARP, Builder, functionals_at_once, stored, units, usable
from oracle.inputs import Cotangents, Inputs

# Results of which every element has its sharp radius: there are few.
FEW = PARAMETERS + GATES


@dataclass(frozen=True)
class Verdict:
    """The worst of some comparisons of one result.

    Attributes
    ----------
    result : str
        o, M, S, anchor, dq, dk, dv, dw, db, dtheta, dalpha, deta, dM, dS or danchor.
    kind : str
        "elements": all of them, against coarse radii, or sharp ones for `FEW`; "samples": some, against sharp radii;
        "rows": random signs times a row, against sharp radii.
    count, empty : int
        How many comparisons there were, and in how many the radius exceeds the largest value of the result, or, of
        rows, the largest sum of a row's absolute values. All are empty where the result is 0.
    error, radius : float
        Of the worst comparison, that of the largest error / radius.
    index : tuple of int
        Where that is: of "elements" in the result; else the sequence, the head, and the row or element there.
    """

    result: str
    kind: str
    count: int
    empty: int
    error: float
    radius: float
    index: tuple[int, ...]

    @property
    def ratio(self) -> float:
        """Error / radius: above 1 the result is wrong. A result that is not finite has an infinite ratio."""
        if self.error <= self.radius:
            return self.error / self.radius if 0 < self.radius < float("inf") else 0.0
        return self.error / self.radius if self.radius > 0 and self.error < float("inf") else float("inf")


def judge(
    inputs: Inputs,
    cotangents: Cotangents,
    arithmetic: ErrorModel,
    results: Mapping[str, Tensor],
    *,
    samples: int = 32,
    seed: int = 0,
) -> list[Verdict]:
    """Compare results with the float64 values of `enclose`: all elements, rows times random signs, and samples.

    Parameters
    ----------
    inputs : Inputs
        Every sequence has at least one token and lies within one chunk.
    cotangents : Cotangents
    arithmetic : ErrorModel
        In which the implementation computes.
    results : mapping of str to Tensor
        By the names of `Verdict`, shaped like the results of the call; results that are missing are not judged.
    samples : int
        Elements of each result and problem that are compared with their sharp radius: those of the largest error and of
        the largest error / coarse radius, and random ones.
    seed : int
        Of the random elements and signs.

    Returns
    -------
    list of Verdict

    Raises
    ------
    ValueError
        As `enclose` does, and if a result has another shape than that of the call.
    """
    generator = torch.Generator().manual_seed(seed)
    builder, verdicts = Builder(inputs, arithmetic), list[Verdict]()
    for name, x in results.items():
        if x.shape != builder.values[name].shape:
            raise ValueError(f"`{name}` must have shape {tuple(builder.values[name].shape)}, got {tuple(x.shape)}")
    for batch in batches(inputs, cotangents, arithmetic):
        builder.add(batch, lambda name: name in FEW)
        for name in results:
            if name not in FEW + COARSE_IS_SHARP:
                verdicts += _projections(batch, name, results[name], builder, samples, generator)
    enclosure = builder.finish()
    for name, x in results.items():
        value = enclosure.values[name]
        verdicts.append(_worst(name, "elements", x.detach().double() - value, enclosure.radius[name], value.abs()))
    return verdicts


def _projections(
    batch: Batch, name: str, result: Tensor, builder: Builder, samples: int, generator: torch.Generator
) -> Iterator[Verdict]:
    """Compare samples and rows of a result of one batch with their sharp radii."""
    x = batch.piece.results[name]
    value = x.polynomial.value.detach()
    error = batch.gather(name, result) - value
    extra = stored(name, value, x.radius, builder.inputs, builder.arithmetic)
    size = error.abs().nan_to_num(nan=torch.inf).flatten(1)
    picks = _samples(size, size / (x.radius + extra).flatten(1), samples, generator)
    signs = torch.randint(0, 2, error.shape, generator=generator).to(error) * 2 - 1
    rows = torch.eye(error.shape[1], dtype=error.dtype, device=error.device)[:, None, :, None] * signs
    H = len(error) // len(batch.numbers)

    def sampled(f: int, problem: int) -> tuple[int, ...]:
        element = np.unravel_index(int(picks[f, problem]), error.shape[1:])
        return int(batch.numbers[problem // H]), problem % H, *map(int, element)

    def in_row(f: int, problem: int) -> tuple[int, ...]:
        return int(batch.numbers[problem // H]), problem % H, f

    for kind, functionals, where in (("samples", units(picks, error.shape), sampled), ("rows", rows, in_row)):
        # 0 times infinity is 0 here: a functional says nothing of the elements that it leaves out
        moved = torch.where(functionals == 0, 0, functionals * error).flatten(2).sum(-1)
        added = torch.where(functionals == 0, 0, functionals.abs() * extra).flatten(2).sum(-1)
        at_once = functionals_at_once(batch.piece)
        radius = torch.cat([batch.piece.sharp(name, part) for part in torch.split(functionals, at_once)])
        sizes = value.abs() if kind == "samples" else value.abs().sum(-1)
        worst = _worst(name, kind, moved, usable(radius + added), sizes)
        yield replace(worst, index=where(*worst.index))


def _samples(size: Tensor, ratio: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Flat indices, shape (F, N), of the elements of each problem to look at: all, where there are no more."""
    N, count = size.shape
    if count <= samples:
        return torch.arange(count, device=size.device)[:, None].expand(count, N)
    drawn = torch.randint(0, count, (max(samples - 2, 0), N), generator=generator).to(size.device)
    return torch.cat([size.argmax(1)[None], ratio.nan_to_num(nan=0.0).argmax(1)[None], drawn])


def _worst(name: str, kind: str, error: Tensor, radius: Tensor, sizes: Tensor) -> Verdict:
    """The comparison of the largest ratio, with its index in `error`; `sizes` are those of the exact quantities."""
    if not error.numel():
        return Verdict(name, kind, 0, 0, 0.0, 0.0, ())
    error = error.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    # 0 / 0 and inf / inf are no failures
    ratio = torch.where(error <= radius, (error / radius).nan_to_num(nan=0.0), error / radius)
    at = int(ratio.argmax())
    index = tuple(int(i) for i in np.unravel_index(at, error.shape))
    empty = int((radius > sizes.max()).sum())
    return Verdict(name, kind, error.numel(), empty, float(error.flatten()[at]), float(radius.flatten()[at]), index)

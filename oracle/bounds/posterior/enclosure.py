"""Values and radii of all results of a call: (B16)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oracle.bounds.error_model import FLOAT64, ErrorModel
from oracle.bounds.posterior.batches import GATES, PARAMETERS, STATES, TOKENS, Batch, batches
from oracle.bounds.posterior.piece import PieceSegments
from oracle.bounds.posterior.polynomial import leaf
from oracle.bounds.posterior.tape import OWN, charge
from oracle.inputs import Cotangents, Inputs

# No rounding at all: with this arithmetic the radius encloses the exact result.
EXACT = ErrorModel(0.0, 0.0, float("inf"))

# Covers sums of non-negative numbers in float64, (B13).
SLACK = 1 + 2.0**-20

# Numbers in the largest tensor of one reverse pass, which some dozens of others accompany.
PASS = {"cpu": 2**19, "cuda": 2**24}

# Their coarse radius is the sharp one: they are linear in u, with coefficients that no feature changes.
COARSE_IS_SHARP = ("M", "S", "anchor")


@dataclass(frozen=True)
class Enclosure:
    """Values in float64 and radii around them, by name: o, M, S, anchor, and the gradients dq ... danchor.

    They are shaped like the results of the call. A radius of infinity promises nothing.
    """

    values: dict[str, Tensor]
    radius: dict[str, Tensor]


def enclose(inputs: Inputs, cotangents: Cotangents, arithmetic: ErrorModel, *, sharp: bool = True) -> Enclosure:
    """Radii of all results for any correct implementation in an arithmetic, bounds (B12) to (B17).

    Parameters
    ----------
    inputs : Inputs
        Every sequence has at least one token and lies within one chunk.
    cotangents : Cotangents
    arithmetic : ErrorModel
        That of the implementation, or `EXACT`.
    sharp : bool
        False: only the coarse radii, (B15), which cost little.
    """
    builder = Builder(inputs, arithmetic)
    for batch in batches(inputs, cotangents, arithmetic):
        builder.add(batch, lambda name: sharp)
    return builder.finish()


class Builder:
    """An enclosure, filled batch by batch."""

    def __init__(self, inputs: Inputs, arithmetic: ErrorModel) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=inputs.q.device)

        self.inputs, self.arithmetic = inputs, arithmetic
        B, T, H, D = inputs.q.shape
        shapes: dict[str, tuple[int, ...]] = {name: (len(inputs.sequences), H, D, D) for name in STATES}
        shapes |= {name: (B, T, H) if name in GATES else (B, T, H, D) for name in TOKENS}
        shapes |= {name: (H, D) for name in PARAMETERS if inputs.w is not None}
        self.values, self.radius = ({name: zeros(*shape) for name, shape in shapes.items()} for _ in range(2))
        # grown majorants and caps of the sums over sequences
        self.majorants, self.caps = ({name: zeros(H, D) for name in PARAMETERS} for _ in range(2))

    def add(self, batch: Batch, sharp: Callable[[str], bool]) -> None:
        """Enter all results of a batch, with the sharp radii of those whose name is to have them."""
        for name, result in batch.piece.results.items():
            x = result.polynomial
            batch.scatter(name, x.value.detach(), self.values[name])
            batch.scatter(name, elements(batch.piece, name) if sharp(name) else result.radius, self.radius[name])
            if name in PARAMETERS:
                batch.scatter(name, x.grown + x.drift, self.majorants[name])
                batch.scatter(name, x.cap, self.caps[name])

    def finish(self) -> Enclosure:
        """Round the sums over sequences, bound (B9), and store all results."""
        B, T = self.inputs.q.shape[:2]
        count = 3 * B * T + 4
        for name in PARAMETERS if self.inputs.w is not None else ():
            x = replace(leaf(self.majorants[name]), cap=self.caps[name])
            self.radius[name] += charge(x, count, (0, 0), self.arithmetic) + charge(x, OWN * count, (0, 0), FLOAT64)
        radius = {
            name: usable(x + stored(name, self.values[name], x, self.inputs, self.arithmetic))
            for name, x in self.radius.items()
        }
        return Enclosure(self.values, radius)


def elements(piece: PieceSegments, name: str) -> Tensor:
    """Sharp radii of all elements of a result, shaped like it."""
    result = piece.results[name]
    if name in COARSE_IS_SHARP:
        return result.radius
    shape = result.radius.shape
    count = result.radius[0].numel()
    at_once = functionals_at_once(piece)
    found = []
    for start in range(0, count, at_once):
        block = torch.arange(start, min(start + at_once, count), device=result.radius.device)
        found.append(piece.sharp(name, units(block[:, None].expand(-1, shape[0]), shape)))
    return torch.cat(found).T.reshape(shape)


def functionals_at_once(piece: PieceSegments) -> int:
    """How many functionals one reverse pass may have."""
    q = piece.arguments.q
    return max(1, PASS[q.device.type] // q.numel())


def units(index: Tensor, shape: torch.Size) -> Tensor:
    """Functionals that pick one element, given by its flat index (F, N), from each problem of a result."""
    seeds = torch.zeros(*index.shape, shape[1:].numel(), dtype=torch.float64, device=index.device)
    return seeds.scatter_(2, index[..., None], 1).view(*index.shape, *shape[1:])


def stored(name: str, value: Tensor, radius: Tensor, inputs: Inputs, arithmetic: ErrorModel) -> Tensor:
    """What storing a result in the dtype it is returned in adds to its radius, bound (B9)."""
    like = inputs.q if name == "o" else getattr(inputs, name[1:]) if name.startswith("d") else None
    if like is None or arithmetic == EXACT or torch.finfo(like.dtype).eps / 2 <= arithmetic.unit:
        return torch.zeros_like(radius)
    narrow = torch.finfo(like.dtype)
    size = value.abs() + radius
    return torch.where(size < narrow.max, narrow.eps / 2 * size + narrow.tiny * narrow.eps, torch.inf)


def usable(radius: Tensor) -> Tensor:
    """A radius in which nothing is unknown: NaN is 0 times infinity."""
    return (radius * SLACK).nan_to_num(nan=torch.inf, posinf=torch.inf)

"""Parts of a call: some of its sequences and heads, or some of its tokens, resumed one after the other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oracle import Cotangents, Inputs
from properties.harness.implementations import Implementation
from properties.harness.running import STATE, Results, backward, call, check_form, tensors
from properties.problems.domain import ANY
from properties.problems.problem import Problem

TOKENS = ("q", "k", "v", "theta", "alpha", "eta")


@dataclass(frozen=True)
class Part:
    """Some sequences and heads of a call, in any order.

    Parameters
    ----------
    of : Inputs
        The whole call.
    sequences, heads : sequence of int
    """

    of: Inputs
    sequences: Sequence[int]
    heads: Sequence[int]

    def inputs(self) -> Inputs:
        """Return the call that this part is."""
        of = self.of
        lengths = [end - begin for _, begin, end in (of.sequences[n] for n in self.sequences)]
        packed = of.cu_seqlens is not None
        return replace(
            of,
            **{name: self.select(name, x) for name, x in tensors(of).items()},
            offset=None if of.offset is None else tuple(of.offset[n] for n in self.sequences),
            cu_seqlens=tuple(int(n) for n in np.cumsum([0, *lengths])) if packed else None,
        )

    def cotangents(self, of: Cotangents) -> Cotangents:
        """Return the cotangents of this part."""
        given = {name: x for name in ("o", *STATE) if (x := getattr(of, name)) is not None}
        return Cotangents(**{name: self.select(name, x) for name, x in given.items()})

    def select(self, name: str, x: Any) -> Any:
        """Return this part of a tensor or array of the call, or of its gradient."""
        name = name if name == "o" else name.removeprefix("d")
        if name in ("w", "b"):
            return x[list(self.heads)]
        if name in STATE:
            return x[list(self.sequences)][:, list(self.heads)]
        if self.of.cu_seqlens is None:
            return x[list(self.sequences)][:, :, list(self.heads)]
        tokens = [t for n in self.sequences for t in range(*self.of.sequences[n][1:])]
        return x[:, tokens][:, :, list(self.heads)]

    def select_all(self, results: dict[str, Any]) -> dict[str, Any]:
        """Select from every result; the gradients of w and b only where no sequence is missing."""
        complete = len(self.sequences) == len(self.of.sequences)
        return {n: self.select(n, x) for n, x in results.items() if complete or n not in ("dw", "db")}


def spans(T: int, splits: Sequence[int]) -> list[slice]:
    """Return the segments between the splits; empty ones are welcome."""
    ends = sorted(min(split, T) for split in splits)
    return [slice(*span) for span in pairwise((0, *ends, T))]


def places(implementation: Implementation, problem: Problem) -> tuple[int, ...]:
    """Return where to split: where the implementation resumes and its domain has the segments."""
    step = 1 if "offset" in implementation.claims else problem.C
    step = math.lcm(step, implementation.domain.T.step(problem.C))
    cuts: list[int] = []
    T = problem.lengths[0]
    for place in sorted(min(n - n % step, T) for n in problem.splits):
        before = cuts[-1] if cuts else 0
        if all(implementation.domain.T.contain(length, problem.C) for length in (place - before, T - place)):
            cuts.append(place)
    return tuple(cuts)


def segment(inputs: Inputs, span: slice) -> Inputs:
    """Return some tokens of an unpacked call, with its initial state."""
    tokens: dict[str, Any] = {name: getattr(inputs, name)[:, span] for name in TOKENS}
    return replace(inputs, **tokens)


def stretch(inputs: Inputs, spans: Sequence[tuple[int, int]], packed: bool | None = None) -> tuple[Inputs, list[int]]:
    """Return some tokens of each sequence, with its initial state.

    Parameters
    ----------
    inputs : Inputs
    spans : sequence of (int, int)
        From where to where, counted in the sequence. Those of a batch have one length.
    packed : bool or None
        Whether the result is packed; None: as the call is.

    Returns
    -------
    Inputs
    list of int
        The row of each token of the result, among all rows of the call.
    """
    T = inputs.q.shape[1]
    packed = inputs.cu_seqlens is not None if packed is None else packed
    index = [
        row * T + begin + t for (row, begin, _), span in zip(inputs.sequences, spans, strict=True) for t in range(*span)
    ]
    rows = 1 if packed else len(spans)
    shape = (rows, len(index) // rows)
    tokens: dict[str, Any] = {
        name: (x := getattr(inputs, name)).flatten(0, 1)[index].reshape(*shape, *x.shape[2:]) for name in TOKENS
    }
    bounds = np.cumsum([0, *(end - begin for begin, end in spans)])
    return replace(inputs, **tokens, cu_seqlens=tuple(map(int, bounds)) if packed else None), index


def resumed(inputs: Inputs, state: Results) -> Inputs:
    """Return the call with the state that another one left."""
    offset = tuple(state["offset"].tolist()) if "offset" in state else None
    return replace(inputs, M=state.get("M"), S=state.get("S"), anchor=state.get("anchor"), offset=offset)


def chain(implementation: Implementation, inputs: Inputs, cotangents: Cotangents, splits: Sequence[int]) -> Results:
    """Run a call in pieces, each resumed from the last, and differentiate through all of them at once; as `run`.

    Every segment has w and b of its own, so that `dw` and `db` have one more axis: that of the segments.
    """
    given, cuts = tensors(inputs), spans(inputs.q.shape[1], splits)
    weights = [name for name in ("w", "b") if name in given]
    given |= {name: given[name].expand(len(cuts), -1, -1) for name in weights}
    leaves = {name: x.detach().to(implementation.device).requires_grad_() for name, x in given.items()}
    state: Results | None = None
    o: list[Tensor] = []
    for i, span in enumerate(cuts):
        part, now = segment(inputs, span), leaves | {name: leaves[name][:, span] for name in TOKENS}
        now |= {name: leaves[name][i] for name in weights}
        if state is not None:
            part, now = resumed(part, state), now | {name: state[name] for name in {*STATE} & {*state}}
        outputs = call(implementation, part, now)
        check_form(part, outputs)
        o.append(outputs["o"])
        state = {name: outputs[name] for name in implementation.left}
    whole = {"o": torch.cat(o, 1), **(state or {})}
    results = {name: x.detach() for name, x in whole.items()}
    if "backward" in implementation.claims:
        results |= backward(whole, leaves, cotangents)
    return {name: x.cpu() for name, x in results.items()}


def stepping(implementation: Implementation) -> Implementation:
    """Return the implementation's step as an implementation of its own, for calls of one token."""
    step = implementation.step
    assert step is not None

    def one_token(*arguments: Any, **options: Any) -> tuple[Tensor, Any]:
        q, k, v, w, b, theta, alpha, eta, eps, chunk_size, state, _ = arguments
        now = (x[:, 0] for x in (q, k, v))
        gates = (x[:, 0] for x in (theta, alpha, eta))
        o, final = step(*now, w, b, *gates, state, eps, chunk_size, **options)
        return o[:, None], final

    # The rules for the number of tokens are not those of a step.
    return replace(implementation, call=one_token, domain=replace(implementation.domain, T=ANY))

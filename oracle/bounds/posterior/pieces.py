"""A call of many chunks as one call in which every piece is a sequence: (B16)."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from torch import Tensor

from oracle.inputs import Inputs


def piece_lengths(inputs: Inputs) -> list[list[int]]:
    """Lengths of the pieces of every sequence: the rest of its running chunk, then chunks."""
    found = []
    for (_, start, end), offset in zip(inputs.sequences, inputs.offsets, strict=True):
        lengths, room = [], inputs.chunk_size - offset
        while start < end:
            lengths.append(min(room, end - start))
            start, room = start + lengths[-1], inputs.chunk_size
        found.append(lengths)
    return found


def as_pieces(inputs: Inputs, M: Tensor, S: Tensor) -> Inputs:
    """Every piece of a call as a packed sequence of its own, from given states.

    `enclose` and `judge` take the result. If the states are an implementation's own, its results on the pieces say
    whether each transition and each output is right, however far its states have drifted from the exact ones.

    Parameters
    ----------
    inputs : Inputs
    M, S : Tensor, shape (P, H, D, D)
        The state that enters each of the P pieces, sequence by sequence. It is also the anchor, except that of the
        first piece of a sequence with an anchor of its own.

    Returns
    -------
    Inputs
        B = 1, with the tokens of all rows one after the other, and P sequences.
    """
    lengths = piece_lengths(inputs)
    anchor, offsets = M.clone(), list[int]()
    for n, pieces in enumerate(lengths):
        if pieces and inputs.anchor is not None:
            anchor[len(offsets)] = inputs.anchor[n]
        offsets += [inputs.offsets[n] if i == 0 else 0 for i in range(len(pieces))]
    names = ("q", "k", "v", "theta", "alpha", "eta")
    return replace(
        inputs,
        **{name: getattr(inputs, name).flatten(0, 1)[None] for name in names},
        M=M,
        S=S,
        anchor=anchor,
        offset=tuple(offsets),
        cu_seqlens=tuple(accumulate((x for pieces in lengths for x in pieces), initial=0)),
    )

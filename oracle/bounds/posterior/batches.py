"""A call whose sequences lie within one chunk each, as batches of pieces: (B16)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from oracle.bounds.error_model import ErrorModel
from oracle.bounds.posterior.piece import Arguments, PieceSegments
from oracle.inputs import Cotangents, Inputs, check, check_cotangents

GATES = ("dtheta", "dalpha", "deta")
TOKENS = ("o", "dq", "dk", "dv", *GATES)
STATES = ("M", "S", "anchor", "dM", "dS", "danchor")
PARAMETERS = ("dw", "db")

# Numbers in the largest tensor of a batch, which some dozens of others accompany.
BATCH = {"cpu": 2**21, "cuda": 2**25}


@dataclass(frozen=True)
class Batch:
    """n sequences of L tokens each, in all heads: problem i H + h of `piece` is head h of the ith of them.

    Attributes
    ----------
    numbers : Tensor, shape (n,)
        Which sequences.
    rows, tokens : Tensor, shape (n, 1) and (n, L)
        Where their tokens are.
    piece : PieceSegments
    """

    numbers: Tensor
    rows: Tensor
    tokens: Tensor
    piece: PieceSegments

    def gather(self, name: str, x: Tensor) -> Tensor:
        """From the layout of the call to that of the piece, (n H, ...)."""
        return _gather(name, x, self.numbers, self.rows, self.tokens)

    def scatter(self, name: str, x: Tensor, into: Tensor) -> None:
        """From the layout of the piece to that of the call; parameters are sums over the sequences."""
        heads = x.reshape(len(self.numbers), -1, *x.shape[1:])
        if name in TOKENS:
            into[self.rows, self.tokens] = heads.transpose(1, 2)
        elif name in STATES:
            into[self.numbers] = heads
        else:
            into += heads.sum(0)


def _gather(name: str, x: Tensor, numbers: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    x = x.detach().double()
    if name in TOKENS:
        return x[rows, tokens].transpose(1, 2).flatten(0, 1)
    if name in STATES:
        return x[numbers].flatten(0, 1)
    return x.repeat(len(numbers), 1)


def batches(inputs: Inputs, cotangents: Cotangents, arithmetic: ErrorModel) -> Iterator[Batch]:
    """All sequences of a call, grouped by their length and by whether they complete their chunk.

    Raises
    ------
    ValueError
        If a sequence has no token, or tokens of two chunks, or an argument is in a wider format than the arithmetic.
    """
    check(inputs)
    check_cotangents(cotangents, inputs)
    groups: dict[tuple[int, bool], list[int]] = {}
    for n, ((_, start, end), offset) in enumerate(zip(inputs.sequences, inputs.offsets, strict=True)):
        length = end - start
        if not 1 <= length <= inputs.chunk_size - offset:
            raise ValueError(f"sequence {n} must have 1 to {inputs.chunk_size - offset} tokens, got {length}")
        groups.setdefault((length, offset + length == inputs.chunk_size), []).append(n)
    H, D = inputs.q.shape[2:]
    for (length, completes), numbers in groups.items():
        at_once = max(1, BATCH[inputs.q.device.type] // (H * max(length, D) * max(length + 2, D) * D))
        for i in range(0, len(numbers), at_once):
            yield _batch(inputs, cotangents, arithmetic, numbers[i : i + at_once], length, completes)


def _batch(
    inputs: Inputs, cotangents: Cotangents, arithmetic: ErrorModel, numbers: list[int], length: int, completes: bool
) -> Batch:
    device = inputs.q.device
    starts = torch.tensor([inputs.sequences[n][:2] for n in numbers], device=device)
    where = torch.tensor(numbers, device=device), starts[:, :1], starts[:, 1:] + torch.arange(length, device=device)
    N, (H, D) = len(inputs.sequences), inputs.q.shape[2:]
    zeros = torch.zeros(N, H, D, D, dtype=torch.float64, device=device)

    def of_pieces(name: str, x: Tensor | None) -> Tensor:
        if x is not None and torch.finfo(x.dtype).tiny < arithmetic.tiny:
            raise ValueError(f"arguments must be exact in the arithmetic, got {x.dtype}")
        return _gather(name, zeros if x is None else x, *where)

    tokens = {name: of_pieces("o", getattr(inputs, name)) for name in ("q", "k", "v", "theta", "alpha", "eta")}
    states = {name: of_pieces("M", getattr(inputs, name)) for name in ("M", "S")}
    arguments = Arguments(
        **tokens,
        **states,
        w=None if inputs.w is None else of_pieces("dw", inputs.w)[:, None],
        b=None if inputs.b is None else of_pieces("dw", inputs.b)[:, None],
        anchor=of_pieces("M", inputs.M if inputs.anchor is None else inputs.anchor),
        do=of_pieces("o", cotangents.o),
        dM=of_pieces("M", cotangents.M),
        dS=of_pieces("M", cotangents.S),
        danchor=of_pieces("M", cotangents.anchor),
        eps=inputs.eps,
        log_gates=inputs.log_gates,
        completes=completes,
        shared=inputs.anchor is None,
    )
    return Batch(*where, PieceSegments(arguments, arithmetic))

"""Pieces: every token is in exactly one, none crosses a chunk, and a chain visits those of a sequence in order."""

import re
from itertools import pairwise, product
from typing import Any

import pytest
import torch

from titans import decodes_alike, grid
from titans.arguments import Call
from titans.partition import Pieces, block_rows, chunks_per_block, cut, max_pieces

CPU = torch.device("cpu")
CASES = [
    # lengths, packed, chunk size, offsets
    ([7, 7, 7], False, 3, None),
    ([6, 6], False, 3, [0, 0]),
    ([7, 7, 7], False, 3, [0, 1, 2]),
    ([2, 2], False, 5, [1, 3]),
    ([1, 1, 1], False, 1, None),
    ([0, 0], False, 4, [3, 0]),
    ([], False, 4, None),
    ([5, 0, 1, 9, 0], True, 4, None),
    ([5, 0, 1, 9, 0], True, 4, [3, 2, 3, 1, 0]),
    ([0, 0], True, 2, [1, 0]),
    ([], True, 2, None),
]


def cut_lengths(lengths: list[int], packed: bool, C: int, offsets: list[int] | None) -> Pieces:
    B, T = (1, sum(lengths)) if packed else (len(lengths), lengths[0] if lengths else 3)
    bounds = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    return cut(B, T, C, bounds, None if offsets is None else torch.tensor(offsets), CPU)


def wanted(lengths: list[int], C: int, offsets: list[int] | None) -> list[list[list[int]]]:
    """Rows of the tokens of each piece of each sequence, from the definition: a new piece where a chunk begins."""
    row, chains = 0, []
    for n, length in enumerate(lengths):
        pieces: list[list[int]] = []
        for t in range(length):
            if t == 0 or ((offsets or [0] * len(lengths))[n] + t) % C == 0:
                pieces.append([])
            pieces[-1].append(row + t)
        chains.append(pieces)
        row += length
    return chains


def found(pieces: Pieces) -> list[list[int]]:
    """Rows of the tokens of each piece."""
    padding = torch.zeros_like(pieces.index, dtype=torch.bool) if pieces.padding is None else pieces.padding
    return [index[~outside].tolist() for index, outside in zip(pieces.index, padding, strict=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_new_piece_begins_where_a_chunk_begins(case: tuple[list[int], bool, int, list[int] | None]) -> None:
    lengths, _, C, offsets = case
    pieces, chains = cut_lengths(*case), wanted(lengths, C, offsets)
    tokens = found(pieces)
    for step, now in enumerate(pieces.steps):
        sequences = pieces.order[: now.stop - now.start].tolist()
        assert tokens[now] == [chains[n][step] for n in sequences]
    assert sum(map(len, chains)) == len(tokens) == (pieces.steps[-1].stop if pieces.steps else 0)
    assert sorted(pieces.order.tolist()) == list(range(len(lengths)))
    assert all(before.stop == after.start for before, after in pairwise(pieces.steps))
    assert pieces.end.tolist() == [len(piece) - 1 for piece in tokens]
    states = torch.arange(len(lengths))
    assert pieces.ordered(states).tolist() == pieces.order.tolist()
    assert pieces.as_passed(pieces.ordered(states)).tolist() == states.tolist()
    # Sequences that need no other order are not copied back.
    assert (pieces.as_passed(states) is states) == (pieces.order.tolist() == states.tolist())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_anchor_is_refreshed_where_the_last_token_completes_a_chunk(
    case: tuple[list[int], bool, int, list[int] | None],
) -> None:
    lengths, _, C, offsets = case
    ends = [r + length for r, length in zip(offsets or [0] * len(lengths), lengths, strict=True)]
    completed = [length > 0 and end % C == 0 for length, end in zip(lengths, ends, strict=True)]
    assert cut_lengths(*case).refreshed.tolist() == completed


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scatter_undoes_gather(case: tuple[list[int], bool, int, list[int] | None]) -> None:
    lengths, packed, _, _ = case
    pieces, T = cut_lengths(*case), sum(lengths)
    for shape in ((2, 3), (2,)):
        x = torch.arange(1.0, T * torch.Size(shape).numel() + 1).reshape(1, T, *shape)
        x = x if packed else x.reshape(len(lengths), lengths[0] if lengths else 3, *shape)
        gathered = pieces.gather(x)
        assert int((gathered != 0).sum()) == x.numel()
        assert torch.equal(pieces.scatter(gathered, x), x)


def test_what_stands_in_the_padding_is_not_scattered() -> None:
    pieces = cut_lengths([5], False, 4, None)
    x = torch.arange(1.0, 6).reshape(1, 5, 1)
    gathered = pieces.gather(x)
    assert pieces.padding is not None
    gathered.transpose(1, 2)[pieces.padding] = torch.nan
    assert torch.equal(pieces.scatter(gathered, x), x)


def test_full_pieces_need_no_padding() -> None:
    assert cut_lengths([6, 6], False, 3, None).padding is None


def call(lengths: tuple[int, ...], packed: bool, C: int, offset: torch.Tensor | None) -> Call:
    T, N = sum(lengths) if packed else lengths[0], len(lengths)
    q, M = torch.empty(1 if packed else N, T, 1, 1), torch.empty(N, 1, 1, 1)
    bounds = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    gate = q[..., 0]
    return Call(q, q, q, None, None, gate, gate, gate, M, M, M, offset, bounds, 1.0, C, False)


def test_max_pieces_is_a_bound() -> None:
    """Of all small packed calls; a batch without offsets has exactly that many."""
    for C, lengths in product(range(1, 5), product(range(6), repeat=2)):
        for offsets in (None, *product(range(C), repeat=2)):
            bound = max_pieces(call(lengths, True, C, None if offsets is None else torch.tensor(offsets)))
            assert bound >= sum(map(len, wanted(list(lengths), C, offsets and list(offsets))))
    for C, T in product(range(1, 5), range(9)):
        assert max_pieces(call((T, T), False, C, None)) == sum(map(len, wanted([T, T], C, None)))
        for r in range(C):
            bound = max_pieces(call((T, T), False, C, torch.tensor([r, r])))
            assert bound >= sum(map(len, wanted([T, T], C, [r, r])))


def starts_of_blocks(C: int, BC: int, T: int) -> set[int]:
    """Where the blocks of T tokens begin, by the rule of `titans.kernels.block`."""
    NB, PER = -(-C // BC), chunks_per_block(C, BC)
    return {first for i in range(T) if (first := i // NB * C * PER + i % NB * BC) < T}


@pytest.mark.parametrize("D", [16, 64, 65, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_blocks_begin_on_the_grid_and_on_no_finer_one(dtype: torch.dtype, D: int) -> None:
    for C in (*range(1, 140), 192, 200, 256, 512, 1000):
        starts, g = starts_of_blocks(C, block_rows(dtype, D), 12 * max(C, 64)), grid(dtype, D, C)
        finest = min(step for step in range(1, g + 1) if {*range(0, 4 * max(C, 64), step)} <= starts)
        assert (g, g % C == 0 or C % g == 0) == (finest, True)


@pytest.mark.parametrize("device", [None, "nowhere", "cuda:first", 1.0])
def test_decoding_is_asked_about_on_a_device(device: Any) -> None:
    with pytest.raises(ValueError, match="`device` must name a device, got "):
        decodes_alike(torch.float32, 64, 16, device)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("float32", 64, 16), TypeError, "`dtype` must be a torch.dtype, got str"),
        ((torch.float64, 64, 16), ValueError, "`dtype` must be float32, float16 or bfloat16, got float64"),
        ((torch.int64, 64, 16), ValueError, "`dtype` must be float32, float16 or bfloat16, got int64"),
        ((torch.float32, 129, 16), ValueError, "`D` must be at most 128, got 129"),
        ((torch.float32, 0, 16), ValueError, "`D` must be at least 1 and less than 2**63, got 0"),
        ((torch.float32, 64.0, 16), TypeError, "`D` must be an int, got float"),
        ((torch.float32, 64, 0), ValueError, "`chunk_size` must be at least 1 and less than 2**63, got 0"),
        ((torch.float32, 64, True), TypeError, "`chunk_size` must be an int, got bool"),
    ],
)
def test_a_grid_is_asked_for_by_what_the_kernels_take(arguments: Any, error: type[Exception], message: str) -> None:
    for function in (grid, decodes_alike):
        with pytest.raises(error, match=re.escape(message)):
            function(*arguments)


@pytest.mark.parametrize(
    ("dtype", "alike", "others"),
    [
        (torch.float32, [(33, 16), (128, 1), (64, 200)], [(32, 16), (1, 64), (16, 200)]),
        (torch.float16, [(33, 16), (128, 1), (64, 200)], [(32, 16), (1, 64), (16, 200)]),
        (
            torch.bfloat16,
            [(128, 64), (72, 64), (40, 64), (64, 1), (32, 33), (16, 200)],
            [(32, 32), (40, 16), (48, 100), (72, 65), (128, 16), (60, 64), (33, 64), (8, 64)],
        ),
    ],
    ids=str,
)
def test_decoding_is_alike_where_it_was_measured(
    dtype: torch.dtype, alike: list[tuple[int, int]], others: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability in ((9, 0), (8, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, now=capability: now)
        found = [[decodes_alike(dtype, D, C) for D, C in cases] for cases in (alike, others)]
        assert found == [[capability == (9, 0)] * len(alike), [False] * len(others)]
    assert not decodes_alike(dtype, 64, 64, "cpu")

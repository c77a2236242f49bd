"""The geometry on the device: which tokens a program works on.

The parallel kernels cut sequences into *blocks*: at most BC tokens, NB blocks to a chunk of more than BC tokens, or PER
whole chunks to a block. Block i of a sequence covers the positions [i // NB * C PER + i % NB * BC, ...), counted from
the start of the chunk the sequence resumed in. The chain goes in *steps* of at most BS tokens, which are blocks, or the
chunks of one. Buffers with one entry per block have K *slots*, at least one to a block.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Sequence(NamedTuple):
    """Where a sequence lies."""

    n: Any  # its number
    begin: Any  # first token, int64
    length: Any  # in tokens
    offset: Any  # tokens already consumed of the running chunk
    slot: Any  # of its block 0, int64


class Block(NamedTuple):
    """A block of a sequence."""

    i: Any  # its number in the sequence
    h: Any  # head
    H: Any  # rows from one token to the next
    row: Any  # first token * H + h, int64
    first: Any  # first token, counted in the sequence
    length: Any  # in tokens
    index: Any  # slot * H + h, int64
    sequence: Any


class Step(NamedTuple):
    """A step of the chain."""

    H: Any  # rows from one token to the next
    row: Any  # first token * H + h, int64
    length: Any  # in tokens
    index: Any  # slot of its block * H + h, int64
    sub: Any  # which of the block's steps it is
    skip: Any  # tokens of the block before it


@triton.jit
def chunks_per_block(C, tile: tl.constexpr):
    """PER."""
    if tile.SPLIT:
        PER = tile.BC // C
    else:
        PER = 1
    return PER


@triton.jit
def rounding(C, tile: tl.constexpr):
    """Tokens of NB blocks, and tokens that rounding up to them adds to a sequence at most: `titans.partition.slack`."""
    width = C * chunks_per_block(C, tile)
    slack = width - 1
    if tile.RESUMED:
        slack += C - 1
    return width, slack


@triton.jit
def slots_per_sequence(T, C, tile: tl.constexpr):
    """Slots of a sequence of T tokens that is not packed."""
    width, slack = rounding(C, tile)
    return (T + slack) // width * tile.NB


@triton.jit
def sequence_of(n, where, T, C, tile: tl.constexpr):
    """Sequence n. Bounds and offsets out of range, which nobody has read, lead nowhere outside the tensors."""
    if tile.PACKED:
        begin = tl.minimum(tl.maximum(tl.load(where.cu_seqlens + n).to(tl.int64), 0), T)
        end = tl.minimum(tl.maximum(tl.load(where.cu_seqlens + n + 1).to(tl.int64), begin), T)
        length = (end - begin).to(tl.int32)
        # room for the most blocks that the sequences before n can have
        width, slack = rounding(C, tile)
        slot = (begin + n.to(tl.int64) * slack) // width * tile.NB
    else:
        begin = n.to(tl.int64) * T
        length = T.to(tl.int32)
        slot = n.to(tl.int64) * slots_per_sequence(T, C, tile)
    if tile.RESUMED:
        offset = tl.minimum(tl.maximum(tl.load(where.offset + n), 0), C - 1).to(tl.int32)
    else:
        offset = length * 0
    return Sequence(n, begin, length, offset, slot - offset // tile.BC)


@triton.jit
def span(i, sequence, width, ROWS: tl.constexpr, tile: tl.constexpr):
    """First token, counted in the sequence, and number of tokens of part i: ROWS at most, NB parts to `width`."""
    whole = i // tile.NB * width
    inside = i % tile.NB * ROWS
    first = tl.maximum(whole + inside, sequence.offset)
    last = tl.minimum(whole + tl.minimum(inside + ROWS, width), sequence.offset + sequence.length)
    return first - sequence.offset, last - first


@triton.jit
def own_block(where, T, H, C, tile: tl.constexpr):
    """Block of this program of a grid (K H,); its length is 0 or less where the slot holds none."""
    pid = tl.program_id(0)
    slot, h = pid // H, pid % H
    if tile.PACKED:
        owner = tl.load(where.owner + slot)
        n = tl.maximum(owner, 0)
    else:
        n = slot // slots_per_sequence(T, C, tile)
    sequence = sequence_of(n, where, T, C, tile)
    i = (slot - sequence.slot).to(tl.int32)
    first, length = span(i, sequence, C * chunks_per_block(C, tile), tile.BC, tile)
    if tile.PACKED:
        length = tl.where(owner < 0, 0, length)
    row = (sequence.begin + first) * H + h
    return Block(i, h, H, row, first, length, pid.to(tl.int64), sequence)


@triton.jit
def step_count(sequence, C, tile: tl.constexpr):
    """Number of steps of a sequence."""
    last = sequence.offset + sequence.length - 1
    count = last // C * tile.NB + last % C // tile.BS - sequence.offset // tile.BS + 1
    return tl.where(sequence.length > 0, count, 0)


@triton.jit
def own_step(i, sequence, h, H, C, tile: tl.constexpr):
    """Step i of a sequence, counted from the start of the chunk it resumed in."""
    first, length = span(i, sequence, C, tile.BS, tile)
    row = (sequence.begin + first) * H + h
    if tile.SPLIT:
        PER = chunks_per_block(C, tile)
        block = i // PER
        sub = i - block * PER
        skip = tl.maximum(i * C - tl.maximum(block * PER * C, sequence.offset), 0)
    else:
        block, sub, skip = i, i * 0, i * 0
    return Step(H, row, length, (sequence.slot + block) * H + h, sub, skip)


@triton.jit
def chunk_start(t, block, C):
    """First row, in a block, of the chunk that the block's row t is in."""
    # the first block of a resumed sequence begins `offset` tokens into a chunk
    skipped = tl.where(block.i == 0, block.sequence.offset, 0)
    return tl.maximum((skipped + t) // C * C - skipped, 0)

"""How sequences are cut into chunks, pieces and blocks: the geometry of a call on the host.

A *piece* is a run of tokens of one sequence inside one chunk. A sequence that resumes `offset` tokens into a
chunk starts with a shorter piece; the last piece of any sequence may be short as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from titans.arguments import Call
from titans.validation import check_bounds, check_integer, check_offsets, name_of

# the widest heads that the kernels take
LARGEST = 128
# chunks of so many tokens need no `shortened`
LONG = 4096


def slack(call: Call, chunks: int = 1) -> int:
    """Tokens that rounding up to pieces of so many chunks adds to a sequence at most."""
    # at most C - 1 tokens before the first, and those that the last piece lacks
    return chunks * call.chunk_size - 1 + (0 if call.offset is None else call.chunk_size - 1)


def max_pieces(call: Call, chunks: int = 1) -> int:
    """Number of pieces, or an upper bound that is known without looking at `cu_seqlens` and `offset`.

    Parameters
    ----------
    call : Call
    chunks : int
        Of how many chunks a piece is a part.
    """
    T, N, width, extra = call.q.shape[1], call.M.shape[0], chunks * call.chunk_size, slack(call, chunks)
    return N * ((T + extra) // width) if call.cu_seqlens is None else (T + N * extra) // width


@dataclass(frozen=True)
class Layout:
    """How chunks are cut into blocks, or put together to one: the units that the kernels work on.

    `titans.kernels.block` is the same on the device. Buffers with one entry per block have K slots, at least one to a
    block.

    Attributes
    ----------
    slots : int
        Number of slots K, known without looking at `cu_seqlens` and `offset`.
    BC, BS : int
        Tokens of a block at most, and of a step of the chain, which is a block or one of its chunks.
    NB, PER : int
        Blocks per chunk, chunks per block; one of them is 1.
    """

    slots: int
    BC: int
    BS: int
    NB: int
    PER: int


def chunks_per_block(C: int, BC: int) -> int:
    """Whole chunks of C tokens in a block of at most BC; 1 where a chunk takes a block or more."""
    return max(1, BC // C)


def step_rows(C: int, BC: int) -> int:
    """Tokens of a step of the chain at most: those of a block or of a chunk, and 16 for the sake of the products."""
    return min(BC, max(16, 1 << (C - 1).bit_length()))


def block_rows(dtype: torch.dtype, D: int) -> int:
    """Rows of a block of queries of a dtype and width: what fits the multiprocessor, whatever T, B and H are."""
    return 64 if dtype == torch.bfloat16 else (32 if D <= 64 else 16)


def check_sizes(dtype: torch.dtype, D: int, chunk_size: int) -> tuple[int, int]:
    """The kernels must take calls of this dtype, D and C, which are returned as Python's own."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"`dtype` must be a torch.dtype, got {type(dtype).__name__}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"`dtype` must be float32, float16 or bfloat16, got {name_of(dtype)}")
    if check_integer("D", D) > LARGEST:
        raise ValueError(f"`D` must be at most {LARGEST}, got {D}")
    return int(D), check_integer("chunk_size", chunk_size)


def grid(dtype: torch.dtype, D: int, chunk_size: int) -> int:
    """Return the number of tokens at whose multiples a sequence may be cut without changing a bit.

    On the Triton backend, a sequence that is computed by several calls, each of which resumes from the state that the
    call before it left, gets the outputs and states of a single call, in every bit, if every cut is at such a place.
    Places are counted from the start of the chunk in which the sequence began. A cut anywhere else changes roundings
    only.

    Parameters
    ----------
    dtype : torch.dtype
        Of q, k and v: float32, float16 or bfloat16.
    D : int
        Head width, 1 <= D <= 128.
    chunk_size : int
        Tokens per chunk, >= 1.

    Returns
    -------
    int
        A multiple of `chunk_size`, or a divisor of it.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks a rule above; the message gives the argument, the rule and the value.
    """
    D, C = check_sizes(dtype, D, chunk_size)
    BC = block_rows(dtype, D)
    # every multiple must begin a block, and those of a chunk are counted from its first token
    return BC if C % BC == 0 else C * chunks_per_block(C, BC)


def decodes_alike(dtype: torch.dtype, D: int, chunk_size: int, device: torch.device | str | int = "cuda") -> bool:
    """Whether decoding with a `DecodeState` gives the bits of one call.

    On the Triton backend a token is decoded by the operations of the chunk form, and has the bits of one call where the
    compiler orders their sums alike: on a GPU of compute capability 9.0 (H100, H200)

    - in float32 and float16 for D > 32;
    - in bfloat16 for D = 64, for D = 16 and 32 with a `chunk_size` above 32, and for multiples of 8 from 40 to 128 with
      `chunk_size` 64.

    Elsewhere the last bits may differ.

    Parameters
    ----------
    dtype, D, chunk_size
        As in `grid`.
    device : torch.device, str or int
        Where the tokens are.

    Returns
    -------
    bool

    Raises
    ------
    TypeError, ValueError
        As `grid` does.
    """
    D, C = check_sizes(dtype, D, chunk_size)
    try:
        place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (TypeError, RuntimeError):
        raise ValueError(f"`device` must name a device, got {device!r}") from None
    if place.type != "cuda" or not torch.cuda.is_available() or torch.cuda.get_device_capability(place) != (9, 0):
        return False
    if dtype != torch.bfloat16:
        return D > 32
    # the last are those with a kernel of their own
    return D == 64 or (D in (16, 32) and C > 32) or (D > 32 and D % 8 == 0 and C == 64)


def layout_of(call: Call, BC: int) -> Layout:
    """Lay out blocks of at most BC tokens, a power of two, for a call."""
    C = call.chunk_size
    NB, PER = -(-C // BC), chunks_per_block(C, BC)
    return Layout(NB * max_pieces(call, PER), BC, step_rows(C, BC), NB, PER)


def shortened(call: Call, BC: int) -> Call:
    """Return a call with the same blocks of BC tokens and the same results, whose chunks are hardly longer than it is.

    Buffers have a slot for every block of a chunk, also where a sequence of a few tokens is a part of a chunk of
    millions. A call depends on where its tokens lie in their blocks, and on where a chunk ends among them.
    """
    C, T, offset = call.chunk_size, call.q.shape[1], call.offset
    # more than T tokens behind any offset in the first block, so that no chunk ends that did not
    short = (T // BC + 2) * BC + C % BC
    if C <= LONG or C <= short:
        return call
    if offset is not None:
        offset = offset.long().clamp(0, C - 1)
        offset = torch.where(C - offset <= T, short - (C - offset), offset % BC)
    return call._replace(chunk_size=short, offset=offset)


def owners(call: Call, cu_seqlens: Tensor, layout: Layout) -> Tensor:
    """The packed sequence of each slot, -1 for none, (K,): a few small operations on the device of `cu_seqlens`."""
    N = len(cu_seqlens) - 1
    room = torch.arange(N + 1, device=cu_seqlens.device) * slack(call, layout.PER)
    first = (cu_seqlens.long() + room) // (call.chunk_size * layout.PER) * layout.NB
    slot = torch.arange(layout.slots, device=cu_seqlens.device)
    n = torch.searchsorted(first, slot, right=True) - 1
    return torch.where(n < N, n, -1).int()


def final_offset(call: Call) -> Tensor:
    """Tokens consumed of the chunk that runs at the end, shape (N,)."""
    N, T = call.M.shape[0], call.q.shape[1]
    if call.cu_seqlens is not None:
        lengths = call.cu_seqlens.to(call.q.device).diff().long()
        return (lengths if call.offset is None else call.offset + lengths) % call.chunk_size
    if call.offset is not None:
        return (call.offset + T) % call.chunk_size
    return call.M.new_full((N,), T % call.chunk_size, dtype=torch.int64)


@dataclass(frozen=True)
class Pieces:
    """All pieces of a call, ordered by the step of the chain at which they are reached.

    Sequences are taken with the longest chain first: the pieces of one step are then a slice, and their
    sequences are a prefix of `order`.

    Attributes
    ----------
    order : Tensor, shape (N,)
        The sequences, longest chain first.
    as_given : bool
        Whether that is the order in which they are given.
    steps : tuple of slice
        The pieces of each step of the chain.
    index : Tensor, shape (K, L)
        Row of each piece's tokens among all B T tokens, L the length of the longest piece; padding points at row 0.
    padding : Tensor, shape (K, L), or None
        True where `index` stands for no token; None if every piece is full.
    end : Tensor, shape (K,)
        The last token of each piece, counted inside it.
    refreshed : Tensor, shape (N,)
        Whether the final anchor of a sequence, in the order given by the caller, is its final M.
    """

    order: Tensor
    as_given: bool
    steps: tuple[slice, ...]
    index: Tensor
    padding: Tensor | None
    end: Tensor
    refreshed: Tensor

    def ordered(self, x: Tensor) -> Tensor:
        """Copy (N, ...) into the order of the chains."""
        return x.clone() if self.as_given else x[self.order]

    def as_passed(self, x: Tensor) -> Tensor:
        """(N, ...) in the order of the chains -> in that of the caller: the inverse of `ordered`."""
        return x if self.as_given else x[torch.argsort(self.order)]

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, H, ...) -> (K, H, L, ...), zero in the padding."""
        pieces = x.flatten(0, 1)[self.index]  # (K, L, H, ...)
        if self.padding is not None:
            pieces[self.padding] = 0
        return pieces.transpose(1, 2).contiguous()

    def scatter(self, pieces: Tensor, like: Tensor) -> Tensor:
        """(K, H, L, ...) -> (B, T, H, ...) in the shape and dtype of `like`: the inverse of `gather`."""
        x = torch.empty_like(like, memory_format=torch.contiguous_format)
        tokens = pieces.transpose(1, 2).to(like.dtype)  # (K, L, H, ...)
        if self.padding is None:
            x.flatten(0, 1)[self.index] = tokens
        else:
            x.flatten(0, 1)[self.index[~self.padding]] = tokens[~self.padding]
        return x


def cut(
    B: int, T: int, chunk_size: int, cu_seqlens: Tensor | None, offset: Tensor | None, device: torch.device
) -> Pieces:
    """Cut B sequences of T tokens, or the packed ones between `cu_seqlens`, into pieces.

    Reads `cu_seqlens` and `offset` on the host, which synchronises if they live on a GPU.
    """
    if cu_seqlens is None:
        starts, lengths = torch.arange(B) * T, torch.full((B,), T)
    else:
        bounds = cu_seqlens.cpu().long()
        check_bounds(bounds.tolist(), T)
        starts, lengths = bounds[:-1], bounds.diff()
    offset = torch.zeros_like(lengths) if offset is None else offset.cpu().long()
    check_offsets("offset", offset.tolist(), chunk_size)
    # tokens of the first piece at most; no sum below leaves int64, however long a chunk
    room = chunk_size - offset
    counts = torch.where(lengths > 0, 1 - (room - lengths).clamp(max=0) // chunk_size, 0)  # pieces per sequence
    order = torch.sort(counts, descending=True, stable=True).indices

    active = counts[order] > torch.arange(int(counts.max()) if len(counts) else 0)[:, None]  # (steps, N)
    step, place = active.nonzero(as_tuple=True)  # (K,), ordered by step
    sequence = order[place]
    last = torch.minimum(room[sequence] + step * chunk_size, lengths[sequence])
    first = torch.where(step > 0, room[sequence] + (step - 1) * chunk_size, 0)
    length = last - first  # (K,)
    token = first[:, None] + torch.arange(int(length.max()) if len(length) else 0)  # (K, L), inside the sequence
    padding = token >= last[:, None]
    index = torch.where(padding, 0, starts[sequence, None] + token)

    widths = active.sum(1).tolist()
    ends = torch.tensor([0, *widths]).cumsum(0).tolist()
    return Pieces(
        order.to(device),
        bool((counts.diff() <= 0).all()),
        tuple(slice(i, j) for i, j in pairwise(ends)),
        index.to(device),
        padding.to(device) if padding.any() else None,
        (length - 1).to(device),
        ((lengths > 0) & ((offset + lengths) % chunk_size == 0)).to(device),
    )

"""Decoding with a state that carries its block: the state, and a token of it in PyTorch.

Equations are those of ``titans/README.md``. `titans.kernels.decode` is the same on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from titans.arguments import Call, TitansState, compute_dtype, rows_of
from titans.autocast import without_autocast
from titans.backend import Backend, chosen
from titans.gates import linear_gates
from titans.inner import inner_gradient, readout, target
from titans.partition import block_rows, chunks_per_block
from titans.validation import check_backend, check_integer, check_offsets, is_readable, name_of

# beta, f, m, and the sums of the logs of beta and m
DECAYS = 5
# theta, a and eta, and the logs of a and eta
GATES = 5


class DecodeFields(NamedTuple):
    """The tensors of a `DecodeState`.

    A name that begins with another one comes before it: `torch.export` takes `state.M0` for `state.M` and a 0.
    """

    M0: Tensor
    S0: Tensor
    A: Tensor
    M: Tensor
    S: Tensor
    anchor: Tensor
    keys: Tensor
    u_chain: Tensor
    u: Tensor
    weights: Tensor
    gates: Tensor
    decay: Tensor
    place: Tensor


class DecodeState(DecodeFields):
    """The place that sequences have reached, as a start and the tokens since: for decoding.

    `titans_linear_step` takes it in the place of a `TitansState`. A step then reads the memory and the momentum at the
    start of the running block, and writes one token; they move when the block is full. With the Triton kernels the
    outputs are those of one call of `chunk_titans_linear` from where the state was begun, bit for bit.

    A tuple of its fields, N first in each, so that caches may reorder sequences, or put them together, by indexing.
    R is the number of rows of a block, 16 to 64: 64 for bfloat16; else 32, or 16 for D > 64.

    Attributes
    ----------
    M0, S0, A : Tensor, shape (N, H, D, D), bfloat16 for bfloat16 tokens, else as M
        Memory and momentum at the start of the block and the anchor, as products read them.
    M, S, anchor : Tensor, shape (N, H, D, D), float32 (float64 for float64 tokens)
        Where the chain stands: before the tokens of the block, or of its last chunk if chunks share a block.
    keys : Tensor, shape (N, H, R, D), dtype of the tokens
        Keys of the block.
    u_chain : Tensor, shape (N, H, R, D), as M
        Inner gradients (2) as they move M and S.
    u : Tensor, shape (N, H, R, D), as M0
        The same as outputs read them.
    weights : Tensor, shape (N, H, 2, R), as M
        n_tj and G_tj of (7) for the last token t.
    gates : Tensor, shape (N, H, 5, R), as M
        theta, a = 1 - alpha and eta of the block, and the logs of a and eta; of linear gates -inf.
    decay : Tensor, shape (N, H, 2, 5), as M
        beta, f and m of (7) and the sums of the logs of beta and m, since the start of the block, and since that of the
        chunk or of the block, whichever came later.
    place : Tensor, shape (N, H, 3), int32
        The place of the block's first token, counted from the start of the chunk, or of the chunks, that the block is a
        part of; tokens in the block; whether A is M0. The same for all heads of a sequence.
    chunk_size : int or None
        The chunk length, as in `TitansState`.
    """

    chunk_size: int | None = None

    def __new__(cls, *fields: Tensor, chunk_size: int | None = None) -> DecodeState:  # noqa: D102 (see the class)
        self = super().__new__(cls, *fields)
        self.chunk_size = chunk_size
        return self

    @staticmethod
    def begin(state: TitansState, dtype: torch.dtype, chunk_size: int | None = None) -> DecodeState:
        """Begin with the next token.

        Parameters
        ----------
        state : TitansState
            Or a tuple of its fields. It is not modified, nor shared.
        dtype : torch.dtype
            Of the tokens.
        chunk_size : int, optional
            The chunk length, for a state that does not record it.
        """
        if not isinstance(state, tuple) or len(state) != 4:
            raise TypeError(f"`state` must be a TitansState or a tuple of its 4 fields, got {type(state).__name__}")
        C = _chunk_size(state, chunk_size)
        if is_readable(state[3]):
            check_offsets("state.offset", state[3].tolist(), C)
        compute = compute_dtype(dtype)
        M, S, anchor = (x.to(compute).clone(memory_format=torch.contiguous_format) for x in state[:3])
        (N, H, D, _), R, stored = M.shape, block_rows(dtype, M.shape[-1]), storage(dtype)
        M0, S0, A = (x.clone() if x.dtype == stored else x.to(stored) for x in (M, S, anchor))
        k, u_chain, u = (M.new_zeros(N, H, R, D, dtype=x) for x in (dtype, compute, stored))
        place = torch.zeros(N, H, 3, dtype=torch.int32, device=M.device)
        place[..., 0] = state[3].clamp(0, C - 1)[:, None]
        weights, gates, decay = (M.new_zeros(N, H, *x) for x in ((2, R), (GATES, R), (2, DECAYS)))
        decay[..., [0, 2]] = 1
        return DecodeState(M0, S0, A, M, S, anchor, k, u_chain, u, weights, gates, decay, place, chunk_size=C)

    def state(self, chunk_size: int | None = None, *, backend: Backend | None = None) -> TitansState:
        """The `TitansState` after the last token.

        It has no derivative either.

        Parameters
        ----------
        chunk_size : int, optional
            The chunk length, for a state that does not record it.
        backend : {"triton", "chunk", "log", "recurrent"}, optional
            None: the kernels on CUDA where they take such tokens.
        """
        C = _chunk_size(self, chunk_size)
        check_backend(backend)
        check_not_recorded("state", self)
        call = self._call(C)
        if chosen(call, backend, "recurrent") == "triton":
            from titans.kernels.decode import settle as settle_in_kernel

            M, S = settle_in_kernel(call, self)
        else:
            with without_autocast(self.M):
                M, S = settle(self, C)
        begin, count, _ = self.place[:, :1].reshape(-1, 3).long().unbind(-1)
        # what counts is the first head; without heads nothing depends on it
        offset = (begin + count) % C if self.place.shape[1] else self.place.new_zeros(len(self.M), dtype=torch.int64)
        return TitansState(M, S, self.anchor.clone(), offset, C)

    def _call(self, C: int) -> Call:
        """As much of a call of the next token as the choice of a backend needs."""
        q = self.keys[:, None, :, 0]
        gate = self.decay[:, None, :, 0, 0]
        return Call(q, q, q, None, None, gate, gate, gate, self.M, self.S, self.anchor, None, None, 1.0, C, False)

    def _replace(self, **fields: Any) -> DecodeState:
        return DecodeState(*super()._replace(**fields), chunk_size=self.chunk_size)

    def clone(self) -> DecodeState:
        """A copy that shares no memory with the state."""
        return self._each(lambda x: x.clone(memory_format=torch.contiguous_format))

    def detach(self) -> DecodeState:
        """The same state, cut from the autograd graph."""
        return self._each(Tensor.detach)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False, copy: bool = False) -> DecodeState:
        """The same state on another device; its dtypes are those of the tokens, and stay."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"`device` must be a device, got the dtype {name_of(device)}: `begin` makes another state")
        return self._each(lambda x: x.to(device, non_blocking=non_blocking, copy=copy))

    def cpu(self) -> DecodeState:
        """The same state on the CPU."""
        return self.to("cpu")

    def select(self, sequences: Any) -> DecodeState:
        """A copy of some sequences: `x[sequences]` of every field; a single number keeps the axis of sequences."""
        rows = rows_of(sequences)
        # a slice would be a view, and a step of it in place would move this state as well
        return self._each(lambda x: x[rows].clone())

    def _each(self, function: Callable[[Tensor], Tensor]) -> DecodeState:
        return DecodeState(*map(function, self), chunk_size=self.chunk_size)


# so that torch.load(..., weights_only=True), its default, accepts a saved state
torch.serialization.add_safe_globals([DecodeState])
# and torch.export.save a program with one
_register_namedtuple(DecodeState, serialized_type_name="titans.DecodeState")


def _chunk_size(state: Any, chunk_size: int | None) -> int:
    made_with = getattr(state, "chunk_size", None)
    if chunk_size is None and made_with is None:
        raise ValueError("`chunk_size` must be given for a state that does not record it, got None")
    if chunk_size is not None and made_with is not None and chunk_size != made_with:
        raise ValueError(f"`chunk_size` must be that of the state, {made_with}, got {chunk_size}")
    return check_integer("chunk_size", made_with if chunk_size is None else chunk_size)


def _dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    return storage(dtype), compute_dtype(dtype)


def storage(dtype: torch.dtype) -> torch.dtype:
    """The dtype of operands of products that are stored, for tokens of a dtype."""
    return torch.bfloat16 if dtype == torch.bfloat16 else compute_dtype(dtype)


def check_not_recorded(argument: str, inputs: Iterable[Tensor | None]) -> None:
    """A DecodeState has no derivative: `inputs`, its fields and the arguments beside it, must not be recorded."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise ValueError(f"`{argument}` must be a TitansState where gradients are recorded, got a DecodeState")


def check_decode_state(argument: str, state: DecodeState, q_t: Tensor, chunk_size: int, in_place: bool) -> None:
    """The state passed as `argument` must be one of tokens like `q_t`, shape (B, H, D), and of this chunk length."""
    _chunk_size(state, chunk_size)
    (N, H, D), R, stored, compute = q_t.shape, block_rows(q_t.dtype, q_t.shape[-1]), *_dtypes(q_t.dtype)
    square, rows = ((N, H, D, D), "(B, H, D, D)"), ((N, H, R, D), "(B, H, R, D)")
    expected = (
        *((square, stored),) * 3, *((square, compute),) * 3,
        (rows, q_t.dtype), (rows, compute), (rows, stored),
        (((N, H, 2, R), "(B, H, 2, R)"), compute), (((N, H, GATES, R), "(B, H, 5, R)"), compute),
        (((N, H, 2, DECAYS), "(B, H, 2, 5)"), compute),
        (((N, H, 3), "(B, H, 3)"), torch.int32),
    )  # fmt: skip
    for name, x, ((shape, axes), dtype) in zip(DecodeFields._fields, state, expected, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"`{argument}.{name}` must be a torch.Tensor, got {type(x).__name__}")
        if tuple(x.shape) != shape:
            raise ValueError(f"`{argument}.{name}` must have shape {axes} = {shape}, got {tuple(x.shape)}")
        if x.dtype != dtype:
            raise TypeError(
                f"`{argument}.{name}` must have dtype {name_of(dtype)} for tokens in {name_of(q_t.dtype)}, "
                f"got {name_of(x.dtype)}"
            )
        if x.device != q_t.device:
            raise ValueError(f"`{argument}.{name}` must be on the device of `q_t`, {q_t.device}, got {x.device}")
        if in_place and not x.is_contiguous():
            raise ValueError(f"`{argument}.{name}` must be contiguous to be updated in place, got strides {x.stride()}")
    _check_place(argument, state, chunk_size)


def _check_place(argument: str, state: DecodeState, C: int) -> None:
    """The values of `place` must lie inside a block, where they can be read at once."""
    if not is_readable(state.place):
        return
    R = state.keys.shape[2]
    limits = (C * chunks_per_block(C, R), R, 2)
    for i, (name, limit) in enumerate(zip(("begin", "count", "own"), limits, strict=True)):
        values = state.place[..., i].flatten().tolist()
        if values and not 0 <= min(values) <= max(values) < limit:
            raise ValueError(f"`{argument}.place[..., {i}]`, {name}, must lie in [0, {limit}), got {values}")


class Place(NamedTuple):
    """Where each token stands; (N, H) each, but for the rows, (N, H, R)."""

    now: Tensor  # the token's own row
    filled: Tensor  # rows of the block before it
    rows: Tensor  # rows of its step, up to it
    begin: Tensor  # as in `DecodeState.place`, of the block
    filled_rows: Tensor
    ends_block: Tensor
    ends_chunk: Tensor
    width: int  # tokens of the chunk, or of the chunks, that the block is a part of


def place_of(place: Tensor, C: int, BC: int) -> Place:
    """Find the places of the tokens that come next."""
    begin, count = place[..., 0].long(), place[..., 1].long()
    width = C * chunks_per_block(C, BC)
    position = begin + count
    skip = (position // C * C - begin).clamp(min=0)
    row = torch.arange(BC, device=place.device)
    ends_block = position + 1 >= ((begin // BC + 1) * BC).clamp(max=width)
    rows = (row >= skip[..., None]) & (row <= count[..., None])
    return Place(
        row == count[..., None], row < count[..., None], rows, begin, count, ends_block, (position + 1) % C == 0, width
    )


def decode(call: Call, state: DecodeState) -> Tensor:
    """Decode the only token of every sequence: o; moves the state, in place.

    Outputs and inner gradients are taken from the start of the step of the chain, in the compute dtype.
    """
    dtype = compute_dtype(call.q.dtype)
    at = place_of(state.place, call.chunk_size, state.keys.shape[2])
    q, k, v = (x[:, 0, :, None].to(dtype) for x in (call.q, call.k, call.v))  # (N, H, 1, D)
    w, b = (None if x is None else x.to(dtype)[:, None] for x in (call.w, call.b))  # (H, 1, D)
    _coefficients(call, state, at, dtype)
    u = inner_gradient(k @ state.anchor, target(k, v, w), w, b, call.eps)
    for rows, new in ((state.keys, k), (state.u, u), (state.u_chain, u)):
        rows.copy_(torch.where(at.now[..., None], new.to(rows.dtype), rows))

    chunk, (_, G) = _near_one(state.decay[:, :, 1]), state.weights.unbind(2)
    beta, f = (x[..., None, None] for x in chunk[:2])
    # what lies outside the step may overflow, and must not meet the zeros of G there
    scores = torch.where(at.rows, (q @ state.keys.to(dtype).mT)[:, :, 0] * G, 0)[:, :, None]
    values = torch.where(at.rows[..., None], state.u_chain, 0)
    y = beta * (q @ state.M) + f * (q @ state.S) - 2 * (scores @ values)
    _move(state, at, call.chunk_size)
    return readout(y, w, b, call.eps).transpose(1, 2).to(call.q.dtype)


def _coefficients(call: Call, state: DecodeState, at: Place, dtype: torch.dtype) -> None:
    """Equations (7) of one more token."""
    passed = call.theta[:, 0].to(dtype), call.alpha[:, 0].to(dtype), call.eta[:, 0].to(dtype)
    theta, a, eta = linear_gates(passed, call.log_gates)
    # linear gates have no logs: -inf, so that the products count
    logs = passed[1:] if call.log_gates else (torch.full_like(a, -torch.inf),) * 2
    gates = torch.stack((theta, a, eta, *logs), -1)[..., None]
    state.gates.copy_(torch.where(at.now[:, :, None], gates, state.gates))
    n, G = state.weights.unbind(2)
    n = torch.where(at.now, theta[..., None], eta[..., None] * torch.where(at.filled, n, 0))
    G = a[..., None] * torch.where(at.filled, G, 0) + n
    state.weights.copy_(torch.stack([n, G], 2))
    beta, f, m, log_beta, log_m = state.decay.unbind(-1)  # (N, H, 2)
    theta, a, eta = (x[..., None] for x in (theta, a, eta))
    m = eta * m
    decay = a * beta, a * f + m, m, log_beta + logs[0][..., None], log_m + logs[1][..., None]
    state.decay.copy_(torch.stack(decay, -1))


def _near_one(decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """beta, f and m; beta and m from the sums of the logs where these are little, as `titans.kernels` has them."""
    beta, f, m, log_beta, log_m = decay.unbind(-1)
    return torch.where(log_beta > -1, log_beta.exp(), beta), f, torch.where(log_m > -1, log_m.exp(), m)


def _learn(state: DecodeState, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Equations (9) and (10) for the rows of a step."""
    beta, f, m = (x[..., None, None] for x in _near_one(state.decay[:, :, 1]))
    n, G = torch.where(rows[:, :, None], state.weights, 0)[..., None].unbind(2)  # (N, H, R, 1)
    u = torch.where(rows[..., None], state.u_chain, 0)
    k_T = -2 * state.keys.to(u.dtype).mT
    return beta * state.M + f * state.S + k_T @ (G * u), m * state.S + k_T @ (n * u)


def _move(state: DecodeState, at: Place, C: int) -> None:
    """After a token: where it completes a step, move the state; count it."""
    ends_step = at.ends_block | at.ends_chunk
    # on a GPU the look would wait for it
    if ends_step.is_cuda or bool(ends_step.any()):
        M, S = _learn(state, at.rows)
        moves = (
            (ends_step, ((state.M, M), (state.S, S))),
            (at.ends_chunk, ((state.anchor, M), (state.A, M))),
            (at.ends_block, ((state.M0, M), (state.S0, S))),
        )
        for when, fields in moves:
            for old, new in fields:
                old.copy_(torch.where(when[..., None, None], new.to(old.dtype), old))
    nothing = state.decay.new_tensor([1, 0, 1, 0, 0])
    ended = torch.stack([at.ends_block, ends_step], -1)[..., None]
    state.decay.copy_(torch.where(ended, nothing, state.decay))
    begin = torch.where(at.ends_block, (at.begin + at.filled_rows + 1) % at.width, at.begin)
    count = torch.where(at.ends_block, 0, at.filled_rows + 1)
    own = torch.where(at.ends_block, at.ends_chunk, state.place[..., 2].bool() & ~at.ends_chunk)
    state.place.copy_(torch.stack([begin, count, own], -1))


def settle(state: DecodeState, C: int) -> tuple[Tensor, Tensor]:
    """M and S after the last token."""
    at = place_of(state.place, C, state.keys.shape[2])
    return _learn(state, at.rows & ~at.now)

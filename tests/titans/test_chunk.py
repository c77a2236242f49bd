"""The chunk form against the definition, values and gradients; each of its stages against autograd of that stage."""

import weakref
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from properties.harness.comparing import check, is_unsure, radii
from properties.harness.implementations import implementation
from properties.harness.running import run
from properties.problems.problem import Problem
from titans import chunk, chunk_titans_linear
from titans.arguments import Call
from titans.autograd import _chunked, _chunked_backward
from titans.chunk import Tokens
from titans.coefficients import Coefficients
from titans.partition import cut, max_pieces

# Gates with zeros and ones among them, near the ends of their ranges, and anywhere.
GATES = {
    "zeros": {"theta": "alternate 2^-3 0", "alpha": "alternate 0 1", "eta": "spike 2^-1 0 1"},
    "ends": {"theta": "random 2^-40 2^-2", "alpha": "random 2^-20 1-2^-20", "eta": "random 2^-30 1-2^-30"},
    "any": {"theta": "uniform -3", "alpha": "uniform 0", "eta": "uniform 0"},
}


def problems() -> Iterator[Problem]:
    """Every kind of memory and gate, for lengths around multiples of every chunk size, from everywhere in a chunk."""
    kinds = product(("plain", "normalised"), (1, 3, 5), (0, 1, 4, 6, 11), (False, True), (False, True))
    for seed, (memory, C, T, packed, log_gates) in enumerate(kinds):
        lengths = (T // 2, 0, T - T // 2) if packed else (T, T, T)
        # an eps that is not small keeps the bound of the normalised gradient useful over several chunks
        yield Problem(
            lengths, packed, H=2, D=3, C=C, memory=memory, initial="full", offsets=(0, C // 2, C - 1),
            **tuple(GATES.values())[seed % 3], dtype="float64", gate_dtype="float64", log_gates=log_gates,
            eps=2.0**-2, seed=seed,
        )  # fmt: skip


@pytest.mark.parametrize("problem", list(problems()), ids=lambda problem: problem.to_json())
@pytest.mark.parametrize("backend", ["chunk", "log"])
def test_the_chunk_form_is_the_definition(backend: str, problem: Problem) -> None:
    """Both are within their radius of the exact value, so within the sum of each other."""
    inputs, cotangents = problem.inputs(), problem.cotangents()
    both = [implementation(name, "cpu") for name in (backend, "recurrent")]
    x, y = (run(one, inputs, cotangents) for one in both)
    radius, other = (radii(one, inputs, cotangents) for one in both)
    assert torch.equal(x["offset"], y["offset"])
    for name in radius:
        error, bound = (x[name] - y[name]).abs().numpy(), radius[name] + other[name]
        assert (error <= bound).all(), name
        if error.size:
            assert not is_unsure(torch.float64, y[name].abs().numpy(), bound), name


@pytest.mark.parametrize("start", ["none", "zero", "M"])
def test_a_missing_anchor_is_the_memory(start: str) -> None:
    """So is the cotangent of the anchor that of the memory."""
    problem = Problem((7, 7), D=3, C=4, memory="normalised", initial=start, dtype="float64", eps=2.0**-2)
    for backend in ("chunk", "log"):
        check(implementation(backend, "cpu"), problem)


@pytest.mark.parametrize("backend", ["chunk", "log"])
@pytest.mark.parametrize("of_later_token", ["q . k", "do . u"])
def test_what_overflows_above_the_diagonal_reaches_nothing(of_later_token: str, backend: str) -> None:
    """The product of a token with a later one, which the definition never forms, does not exist in the chunk form."""
    zero, one, huge = 0.0, 1.0, 2.0**600
    q, k, v, do = {
        "q . k": ([huge, zero], [zero, huge], [one, one], [one, one]),
        "do . u": ([one, zero], [one, zero], [one, huge], [huge, zero]),
    }[of_later_token]
    half = torch.full((1, 2, 1), 0.5, dtype=torch.float64)
    found = []
    for name in (backend, "recurrent"):
        leaves = [torch.tensor(x, dtype=torch.float64).reshape(1, 2, 1, 1).requires_grad_() for x in (q, k, v)]
        o, state = chunk_titans_linear(*leaves, None, None, half, half, half, 1.0, 2, None, True, backend=name)
        assert state is not None
        inflow = torch.tensor(do, dtype=torch.float64).reshape(1, 2, 1, 1)
        found.append([o, state.M, state.S, *torch.autograd.grad(o, leaves, inflow)])
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(*found, strict=True))


def integers(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=GENERATOR).double()


GENERATOR = torch.Generator().manual_seed(0)
K, H, C, D = 4, 2, 3, 2


def stages() -> tuple[Tokens, Coefficients, Tensor, Tensor, Tensor]:
    """Tokens, coefficients, u, M0 and S0 of small integers, for which float64 is exact in any order."""
    q, k, target, u = (integers(K, H, C, D) for _ in range(4))
    n, G = (integers(C + 1, K, H, C + 2) for _ in range(2))
    # a coefficient of a later token is 0
    later = torch.ones(C + 1, C + 2).triu(2).bool()[:, None, None]
    n, G = n.masked_fill(later, 0), G.masked_fill(later, 0)
    gate = integers(K, H, C)
    pieces = cut(K, C, C, None, None, torch.device("cpu"))
    M0, S0 = integers(K, H, D, D), integers(K, H, D, D)
    return Tokens(q, k, target, None, None, gate, gate, gate, 1.0, pieces), Coefficients(n, G), u, M0, S0


def test_the_reverse_of_output_is_that_of_autograd() -> None:
    x, c, u, M0, S0 = stages()
    leaves = [a.requires_grad_() for a in (x.q, x.k, u, M0, S0, c.G)]
    dy = integers(K, H, C, D)
    expected = torch.autograd.grad(chunk.output(x, c, u, M0, S0), leaves, dy)
    with torch.no_grad():
        grad = chunk.output_vjp(x, c, u, M0, S0, dy)
    *actual, dn, dG = grad
    for one, other in zip((*actual, dG), expected, strict=True):
        assert torch.equal(one, other)
    assert not dn.any()


def test_output_is_the_readout_of_the_memory_after_each_token() -> None:
    """y_t = q_t M_t with M_t = beta_t M0 + f_t S0 - 2 sum_j G_tj k_j^T u_j, written out."""
    x, c, u, M0, S0 = stages()
    y = chunk.output(x, c, u, M0, S0)
    for piece, h, t in np.ndindex(K, H, C):
        row = c.G[t + 1, piece, h]
        M = row[0] * M0[piece, h] + row[1] * S0[piece, h]
        for j in range(t + 1):
            M = M - 2 * row[2 + j] * torch.outer(x.k[piece, h, j], u[piece, h, j])
        assert torch.equal(y[piece, h, t], x.q[piece, h, t] @ M)


@pytest.mark.parametrize("offset", [None, 1])
def test_the_saved_states_are_those_the_pieces_start_from(offset: int | None) -> None:
    """In the exact regime; what is left of the room for them is zero."""
    T, N, C = 8, 2, 3
    gates = (torch.full((N, T, H), gate, dtype=torch.float64) for gate in (0.5, 0.5, 0.5))
    tokens, state = (integers(N, T, H, D) for _ in range(3)), [integers(N, H, D, D) for _ in range(3)]
    offsets = None if offset is None else torch.tensor([offset] * N)
    call = Call(*tokens, None, None, *gates, *state, offsets, None, 1.0, C, False)
    *_, M0, S0 = chunk.forward(call, log_space=False)
    assert len(M0) == len(S0) == max_pieces(call)
    starts = range(0, T, C) if offset is None else [0, *range(C - offset, T, C)]
    for piece, start in enumerate(starts):
        names = ("q", "k", "v", "theta", "alpha", "eta")
        until = call._replace(**{name: getattr(call, name)[:, :start] for name in names})
        _, M, S, *_ = chunk.forward(until, log_space=False)
        mine = slice(piece * N, piece * N + N)
        assert torch.equal(M0[mine], M)
        assert torch.equal(S0[mine], S)
    assert not M0[len(starts) * N :].any()
    assert not S0[len(starts) * N :].any()


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        for x in result if isinstance(result, tuple | list) else [result]:
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
        return result


@pytest.mark.parametrize("log_space", [False, True])
@pytest.mark.parametrize("case", [(100, 7, 1024), (4000, 1, 64), (1, 20, 10**4), (1, 20, 10**9)], ids=str)
def test_work_follows_the_longest_piece_and_not_the_chunk(case: tuple[int, int, int], log_space: bool) -> None:
    """The largest tensors are states, tokens, and the coefficients of pieces of L tokens: (L + 1, K, H, L + 2)."""
    K, L, chunk_size = case
    tokens, gates = (integers(1, K * L, H, D) for _ in range(3)), (integers(1, K * L, H).abs() / 4 for _ in range(3))
    M, S, anchor = (integers(K, H, D, D) for _ in range(3))
    bounds = torch.arange(K + 1) * L
    call = Call(*tokens, None, None, *gates, M, S, anchor, None, bounds, 1.0, chunk_size, False)
    largest = Largest()
    with largest:
        o, *final, M0, S0 = chunk.forward(call, log_space)
        chunk.backward(call, log_space, M0, S0, o, *final)
    assert largest.numel <= max((L + 1) * K * H * (L + 2), K * L * H * D, K * H * D * D)


class Held(TorchDispatchMode):
    """Notes the most bytes that results of operations hold at one time."""

    now = most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **kwargs or {})
        for x in result if isinstance(result, tuple | list) else [result]:
            # a view, or a result in place, holds nothing of its own
            if isinstance(x, Tensor) and (storage := x.untyped_storage()).data_ptr() not in given:
                self.now += storage.nbytes()
                weakref.finalize(storage, self.drop, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def drop(self, size: int) -> None:
        """Note that the memory of a result is free again."""
        self.now -= size


@pytest.mark.parametrize("backend", ["chunk", "log"])
def test_a_call_of_many_short_sequences_holds_few_copies_of_its_states(backend: str) -> None:
    N, D = 300, 64
    tokens, gates = (integers(1, N, 1, D) for _ in range(3)), (integers(1, N, 1).abs() / 4 for _ in range(3))
    state = torch.zeros(N, 1, D, D, dtype=torch.float64)
    call = Call(*tokens, None, None, *gates, state, state, state, None, torch.arange(N + 1), 1.0, 64, False)
    forward, reverse = Held(), Held()
    with forward:
        o, *_, M0, S0, x, r = _chunked(*call, backend)
    with reverse:
        _chunked_backward(*call, backend, M0, S0, x, r, o, None, None, None)
    # three that move from piece to piece, two of every piece, and a product; in the backward the anchor of every piece
    # as well; all else is small
    assert forward.most < 7 * state.nbytes
    assert reverse.most < 8 * state.nbytes

"""How DTensor shards the operators: by batch or by heads, or not at all, without communication in the forward.

On each dimension of a device mesh one of these holds:

========== =================== ========= ============== ==========================
rule        tokens (B, T, H, ..) w, b      states (N, H, ..) their gradients
========== =================== ========= ============== ==========================
replicated  Replicate           Replicate Replicate       Replicate
batch       Shard(0)            Replicate Shard(0)        dw and db are Partial sums
heads       Shard(2)            Shard(0)  Shard(1)        as their inputs
========== =================== ========= ============== ==========================

Packed sequences share the batch entry 0, so they are sharded by heads only. Tokens cannot be sharded along T: a chunk's
anchor comes from the chunk before it, by a function that is not linear.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from titans.arguments import Call
from titans.autograd import chunked, chunked_backward, step


class _Rule(NamedTuple):
    """Placements of one rule; `kept` is that of the states of blocks, `parameters_grad` that of dw and db."""

    tokens: Any
    parameters: Any
    states: Any
    offset: Any
    kept: Any
    parameters_grad: Any


def context_parallel(x: Any, mesh_dim: int = 0) -> Any:
    """Exchange a shard of the tokens for a shard of the heads, or back: one all-to-all.

    Between layers that work along T, context parallelism keeps activations sharded by tokens. Around this op they are
    sharded by heads. Left alone, DTensor would gather all tokens on every rank.

    Parameters
    ----------
    x : DTensor, shape (B, T, H, ...)
        Sharded on this mesh dimension along T (becomes H) or along H (becomes T).
    mesh_dim : int, default 0
        The dimension of `x.device_mesh` to act on.

    Returns
    -------
    DTensor

    Raises
    ------
    ValueError
        If `x` is sharded neither along T nor along H on that mesh dimension.
    """
    from torch.distributed.tensor import Shard

    placements = list(x.placements)
    here = placements[mesh_dim]
    if here not in (Shard(1), Shard(2)):
        raise ValueError(f"`x` must be sharded along dimension 1 (T) or 2 (H), got {here}")
    placements[mesh_dim] = Shard(2) if here == Shard(1) else Shard(1)
    return x.redistribute(placements=placements)


@functools.cache
def register() -> None:
    """Give DTensor the rules, once; called when the op first meets a tensor of another type than `Tensor`."""
    from torch.distributed.tensor.experimental import register_sharding

    for operator, rule in ((chunked, _chunked), (chunked_backward, _chunked_backward), (step, _step)):
        register_sharding(operator)(rule)


def _rules(packed: bool) -> Sequence[_Rule]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    R = Replicate()
    replicated = _Rule(R, R, R, R, R, R)
    batch = _Rule(Shard(0), R, Shard(0), Shard(0), Shard(0), Partial())
    heads = _Rule(Shard(2), Shard(0), Shard(1), R, Shard(1), Shard(0))
    return [replicated, heads] if packed else [replicated, batch, heads]


def _fields(call: Call, rule: _Rule) -> list[Any]:
    """Placements of the fields of a call; None where there is no tensor."""
    at = dict.fromkeys(Call._fields, rule.tokens)
    at |= dict.fromkeys(("w", "b"), rule.parameters) | dict.fromkeys(("M", "S", "anchor"), rule.states)
    # every rank knows all bounds
    from torch.distributed.tensor import Replicate

    at |= {"offset": rule.offset, "cu_seqlens": Replicate()} | dict.fromkeys(("eps", "chunk_size", "log_gates"))
    return [None if value is None else at[name] for name, value in call._asdict().items()]


def _residuals(call: Call, rule: _Rule, backend: str) -> list[Any]:
    """Placements of M0, S0, x and r; x and r are empty but for the kernels, r in the plain memory as well."""
    from torch.distributed.tensor import Replicate

    x = rule.tokens if backend == "triton" else Replicate()
    return [rule.kept, rule.kept, x, Replicate() if call.w is None else x]


def _chunked(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    *fields, backend = arguments
    call = Call(*fields)
    return [
        ([rule.tokens, *[rule.states] * 3, *_residuals(call, rule, backend)], [*_fields(call, rule), None])
        for rule in _rules(call.cu_seqlens is not None)
    ]


def _chunked_backward(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    from torch.distributed.tensor import Replicate

    count = len(Call._fields)
    call, backend, cotangents = Call(*arguments[:count]), arguments[count], arguments[count + 5 :]
    found = []
    for rule in _rules(call.cu_seqlens is not None):
        # without w and b theirs are empty
        parameters = Replicate() if call.w is None else rule.parameters_grad
        gradients = [*[rule.tokens] * 3, *[parameters] * 2, *[rule.tokens] * 3, *[rule.states] * 3]
        flowing = [rule.tokens, *[rule.states] * 3]
        inflow = [None if d is None else at for d, at in zip(cotangents, flowing, strict=True)]
        found.append((gradients, [*_fields(call, rule), None, *_residuals(call, rule, backend), *inflow]))
    return found


def _step(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    call = Call(*arguments)
    return [([rule.tokens, *[rule.states] * 3, rule.offset], _fields(call, rule)) for rule in _rules(packed=False)]

"""The chunk form as the registered operators `titans::chunked` and `titans::chunked_backward`; `titans::step`.

`torch.compile` and CUDA graphs see one opaque operator per direction. What the backward needs beside the inputs
is the memory and the momentum that each piece starts from; the kernels keep x and r of eq. (2), too. They are imported
when they are first needed: Triton exists on Linux only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from titans import chunk
from titans.call import Call

# the fields of `Call`
_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? w, Tensor? b, Tensor theta, Tensor alpha, Tensor eta, "
    "Tensor M, Tensor S, Tensor anchor, Tensor? offset, Tensor? cu_seqlens, "
    "float eps, int chunk_size, bool log_gates"
)
_ARGUMENTS = f"{_CALL}, str backend"
_KEPT = 4  # from this output on
_COTANGENTS = "Tensor M0, Tensor S0, Tensor x, Tensor r, Tensor? do, Tensor? dM, Tensor? dS, Tensor? danchor"


def _tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


@contextmanager
def _alone_with(q: Tensor) -> Iterator[None]:
    """Launch on the device of `q`, whichever is current, and leave autocast outside."""
    with torch.cuda.device(q.device if q.is_cuda else -1), torch.autocast(q.device.type, enabled=False):
        yield


@torch.library.custom_op("titans::chunked", mutates_args=(), schema=f"({_ARGUMENTS}) -> {_tensors(8)}")
def chunked(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute o, the final M, S and anchor, the M0 and S0 of every piece (K, H, D, D), and x and r for the kernels."""
    call, backend = Call(*arguments[:-1]).contiguous(), arguments[-1]
    with _alone_with(call.q):
        if backend == "triton":
            from titans import kernels

            return kernels.forward(call)
        return *chunk.forward(call, log_space=backend == "log"), *(call.M.new_empty(0) for _ in range(2))


@chunked.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    call, backend = Call(*arguments[:-1]), arguments[-1]
    H, D = call.q.shape[-2:]
    pieces, dtype = call.max_pieces(), call.M.dtype
    x, r = call.M.new_empty(0), call.M.new_empty(0)
    if backend == "triton":
        from titans import kernels

        pieces, dtype = kernels.max_slots(call), kernels.storage(call)
        x, r = kernels.kept(call)
    final = [call.M.new_empty(call.M.shape) for _ in range(3)]
    states = [call.M.new_empty(pieces, H, D, D, dtype=dtype) for _ in range(2)]
    return call.q.new_empty(call.q.shape), *final, *states, x, r


@torch.library.custom_op(
    "titans::chunked_backward", mutates_args=(), schema=f"({_ARGUMENTS}, {_COTANGENTS}) -> {_tensors(11)}"
)
def chunked_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute the cotangents of q, k, v, w, b, theta, alpha, eta, M, S and anchor; without w and b theirs are empty."""
    *fields, backend, M0, S0, x, r, do, dM, dS, danchor = arguments
    call = Call(*fields).contiguous()
    do = torch.zeros_like(call.q) if do is None else do.contiguous()
    dM, dS, danchor = (torch.zeros_like(call.M) if d is None else d.contiguous() for d in (dM, dS, danchor))
    with _alone_with(call.q):
        if backend == "triton":
            from titans import kernels

            grads = kernels.backward(call, M0, S0, x, r, do, dM, dS, danchor)
        else:
            grads = chunk.backward(call, backend == "log", M0, S0, do, dM, dS, danchor)
    return tuple(
        call.M.new_empty(0) if x is None or dx is None else dx.to(x.dtype)
        for x, dx in zip(call[:11], grads, strict=True)
    )


@chunked_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments[: len(Call._fields)])
    return tuple(call.M.new_empty(0) if x is None else x.new_empty(x.shape) for x in call[:11])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # without this, autograd would fill (K, H, D, D) zeros for the cotangents of M0 and S0
    ctx.set_materialize_grads(False)
    fields, ctx.options = inputs[:13], inputs[13:]
    ctx.save_for_backward(*fields, *output[_KEPT:])


def _backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    fields, kept = ctx.saved_tensors[:13], ctx.saved_tensors[13:]
    grads = chunked_backward(*fields, *ctx.options, *kept, *cotangents[:_KEPT])
    return *(g if x is not None else None for g, x in zip(grads, fields[:11], strict=True)), *(None,) * 6


chunked.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("titans::step", mutates_args=(), schema=f"({_CALL}) -> {_tensors(5)}")
def step(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute o, and M, S, anchor and offset after it, for a call of one token, in one launch."""
    from titans.kernels.step import step as launch

    call = Call(*arguments).contiguous()
    with _alone_with(call.q):
        return launch(call)


@step.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    states = [call.M.new_empty(call.M.shape) for _ in range(3)]
    offset = call.M.new_empty(len(call.M), dtype=torch.int64 if call.offset is None else call.offset.dtype)
    return call.q.new_empty(call.q.shape), *states, offset


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:13])
    ctx.options = inputs[13:]


def _step_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    # rare, so it need not be fast: the reverse of the chunk form of the same token
    call = (*ctx.saved_tensors, *ctx.options, "triton")
    kept = chunked(*call)[_KEPT:]
    grads = chunked_backward(*call, *kept, *cotangents[:_KEPT])
    return *(g if x is not None else None for g, x in zip(grads, call[:11], strict=True)), *(None,) * 5


step.register_autograd(_step_backward, setup_context=_save_step)

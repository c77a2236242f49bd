"""The chunk form as the registered operators `titans::chunked` and `titans::chunked_backward`; `titans::step`.

`torch.compile` and CUDA graphs see one opaque operator per direction. What the backward needs beside the inputs
is the memory and the momentum that each piece starts from; the kernels keep x and r of eq. (2), too. They are imported
when they are first needed: Triton exists on Linux only.

On a GPU a call is short, so what the host does for it counts: the operators are registered with the dispatcher itself
and not through `torch.library.custom_op`, and a `torch.autograd.Function` stands in for `register_autograd`, which took
four tenths of the host's time in a recorded forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from titans import chunk
from titans.arguments import Call

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


_library = torch.library.Library("titans", "DEF")  # type: ignore[no-untyped-call]


def _define(name: str, arguments: str, results: int, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an operator that returns tensors, and return it."""
    _library.define(f"{name}({arguments}) -> {_tensors(results)}")  # type: ignore[no-untyped-call]
    for device in ("CPU", "CUDA"):
        _library.impl(name, run, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"titans::{name}", fake, lib=_library)
    return getattr(torch.ops.titans, name).default


def _differentiate(name: str, function: type[torch.autograd.Function]) -> None:
    """Make the operator record `function`, whose forward calls it below autograd."""
    operator = getattr(torch.ops.titans, name).default

    def run(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return function.apply(*arguments)  # type: ignore[no-untyped-call]
        return _below_autograd(operator, arguments)

    _library.impl(name, run, "Autograd")  # type: ignore[no-untyped-call]


def _below_autograd(operator: Any, arguments: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


@contextmanager
def _alone_with(q: Tensor) -> Iterator[None]:
    """Launch on the device of `q`, whichever is current, and leave autocast outside."""
    with torch.cuda.device(q.device if q.is_cuda else -1), torch.autocast(q.device.type, enabled=False):
        yield


def _chunked(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute o, the final M, S and anchor, the M0 and S0 of every piece (K, H, D, D), and x and r for the kernels."""
    call, backend = Call(*arguments[:-1]).contiguous(), arguments[-1]
    with _alone_with(call.q):
        if backend == "triton":
            from titans import kernels

            return kernels.forward(call)
        return *chunk.forward(call, log_space=backend == "log"), *(call.M.new_empty(0) for _ in range(2))


def _fake_chunked(*arguments: Any) -> tuple[Tensor, ...]:
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


def _chunked_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute the cotangents of q, k, v, w, b, theta, alpha, eta, M, S and anchor; without w and b theirs are empty."""
    *fields, backend, M0, S0, x, r, do, dM, dS, danchor = arguments
    call = Call(*fields).contiguous()
    do = torch.zeros_like(call.q) if do is None else do.contiguous()
    zeros = torch.zeros_like(call.M)
    dM, dS, danchor = (zeros if d is None else d.contiguous() for d in (dM, dS, danchor))
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


def _fake_chunked_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments[: len(Call._fields)])
    return tuple(call.M.new_empty(0) if x is None else x.new_empty(x.shape) for x in call[:11])


chunked = _define("chunked", _ARGUMENTS, 8, _chunked, _fake_chunked)
chunked_backward = _define(
    "chunked_backward", f"{_ARGUMENTS}, {_COTANGENTS}", 11, _chunked_backward, _fake_chunked_backward
)


def _cotangents(
    grads: tuple[Tensor, ...], fields: tuple[Tensor | None, ...], options: int
) -> tuple[Tensor | None, ...]:
    """What autograd wants: a gradient for every argument that is a tensor, None for all others."""
    return *(g if x is not None else None for g, x in zip(grads, fields[:11], strict=True)), *(None,) * (2 + options)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        # without this, autograd would fill (K, H, D, D) zeros for the cotangents of M0 and S0
        ctx.set_materialize_grads(False)
        output = _below_autograd(chunked, arguments)
        ctx.options = arguments[13:]
        ctx.save_for_backward(*arguments[:13], *output[_KEPT:])
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        fields, kept = saved[:13], saved[13:]
        grads = chunked_backward(*fields, *ctx.options, *kept, *cotangents[:_KEPT])
        return _cotangents(grads, fields, len(ctx.options))


class _ChunkedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        return _below_autograd(chunked_backward, arguments)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        raise RuntimeError('`chunked_backward` has no derivative; backend="recurrent" can be differentiated again')


_differentiate("chunked", _Chunked)
_differentiate("chunked_backward", _ChunkedBackward)


def _step(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute o, and M, S, anchor and offset after it, for a call of one token, in one launch."""
    from titans.kernels.step import step as launch

    call = Call(*arguments).contiguous()
    with _alone_with(call.q):
        return launch(call)


def _fake_step(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    states = [call.M.new_empty(call.M.shape) for _ in range(3)]
    offset = call.M.new_empty(len(call.M), dtype=torch.int64 if call.offset is None else call.offset.dtype)
    return call.q.new_empty(call.q.shape), *states, offset


step = _define("step", _CALL, 5, _step, _fake_step)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        ctx.set_materialize_grads(False)
        output = _below_autograd(step, arguments)
        ctx.mark_non_differentiable(output[-1])
        ctx.options = arguments[13:]
        ctx.save_for_backward(*arguments[:13])
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        # rare, so it need not be fast: the reverse of the chunk form of the same token
        fields = ctx.saved_tensors
        call = (*fields, *ctx.options, "triton")
        grads = chunked_backward(*call, *chunked(*call)[_KEPT:], *cotangents[:_KEPT])
        return _cotangents(grads, fields, len(ctx.options))


_differentiate("step", _Step)

"""The chunk form as the registered operators `titans::chunked` and `titans::chunked_backward`; `titans::step`.

`torch.compile` and CUDA graphs see one opaque operator per direction. The residuals of the forward are the memory M0
and the momentum S0 that each piece starts from, and for the kernels x and r of eq. (2), which are empty for the other
backends. The kernels are imported when they are first needed: Triton exists on Linux only.

On a GPU a call is short, so what the host does for it counts: the operators are registered with the dispatcher itself
and not through `torch.library.custom_op`, and a `torch.autograd.Function` stands in for `register_autograd`, which took
four tenths of the host's time in a recorded forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_type_hints

import torch
from torch import Tensor

from titans import chunk
from titans.arguments import Call
from titans.partition import max_pieces

_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool"}
_CALL = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(Call).items())
_ARGUMENTS = f"{_CALL}, str backend"
_RESIDUALS = "Tensor M0, Tensor S0, Tensor x, Tensor r"
_COTANGENTS = "Tensor? do, Tensor? dM, Tensor? dS, Tensor? danchor"


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
    """Compute o, the final M, S and anchor, and the residuals M0 and S0 of every piece (K, H, D, D), x and r."""
    *fields, backend = arguments
    call = Call(*fields).contiguous()
    with _alone_with(call.q):
        if backend == "triton":
            from titans import kernels

            return kernels.forward(call)
        return *chunk.forward(call, log_space=backend == "log"), *(call.M.new_empty(0) for _ in range(2))


def _fake_chunked(*arguments: Any) -> tuple[Tensor, ...]:
    *fields, backend = arguments
    call = Call(*fields)
    H, D = call.q.shape[-2:]
    pieces, dtype = max_pieces(call), call.M.dtype
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
        for x, dx in zip(call.differentiable, grads, strict=True)
    )


def _fake_chunked_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments[: len(Call._fields)])
    return tuple(call.M.new_empty(0) if x is None else x.new_empty(x.shape) for x in call.differentiable)


chunked = _define("chunked", _ARGUMENTS, 8, _chunked, _fake_chunked)
chunked_backward = _define(
    "chunked_backward", f"{_ARGUMENTS}, {_RESIDUALS}, {_COTANGENTS}", 11, _chunked_backward, _fake_chunked_backward
)


def _gradients(grads: tuple[Tensor, ...], call: Call) -> tuple[Tensor | None, ...]:
    """One gradient for every argument of an operator that takes `call`: None where the argument has no cotangent."""
    wanted = (g if x is not None else None for g, x in zip(grads, call.differentiable, strict=True))
    return *wanted, *(None for _ in call[len(grads) :])


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        # without this, autograd would fill (K, H, D, D) zeros for the cotangents of M0 and S0
        ctx.set_materialize_grads(False)
        *fields, ctx.backend = arguments
        output = _below_autograd(chunked, arguments)
        _, _, _, _, *residuals = output
        call = Call(*fields)
        ctx.options = call.options
        ctx.save_for_backward(*call.tensors, *residuals)
        return output

    @staticmethod
    def backward(ctx: Any, do: Any, dM: Any, dS: Any, danchor: Any, *_: Any) -> Any:
        *tensors, M0, S0, x, r = ctx.saved_tensors
        call = Call(*tensors, *ctx.options)
        grads = chunked_backward(*call, ctx.backend, M0, S0, x, r, do, dM, dS, danchor)
        return *_gradients(grads, call), None


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
        call = Call(*arguments)
        ctx.options = call.options
        ctx.save_for_backward(*call.tensors)
        return output

    @staticmethod
    def backward(ctx: Any, do: Any, dM: Any, dS: Any, danchor: Any, *_: Any) -> Any:
        # rare, so it need not be fast: the reverse of the chunk form of the same token
        call = Call(*ctx.saved_tensors, *ctx.options)
        _, _, _, _, *residuals = chunked(*call, "triton")
        return _gradients(chunked_backward(*call, "triton", *residuals, do, dM, dS, danchor), call)


_differentiate("step", _Step)

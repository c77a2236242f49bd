"""The registered operators: `titans::chunked`, the chunk form, `titans::chunked_backward` and `titans::step`.

`titans::unrecorded` is the chunk form without residuals; where its call is recorded it becomes `titans::chunked`.
`torch.compile` and CUDA graphs see one opaque operator per direction. The residuals of the forward are the memory M0
and the momentum S0 that each piece starts from, and for the kernels x and r of eq. (2), which are empty for the other
backends. The kernels are imported when they are first needed: Triton exists on Linux only.

On a GPU a call is short, so what the host does for it counts: the operators are registered with the dispatcher itself
and not through `torch.library.custom_op`, and a `torch.autograd.Function` stands in for `register_autograd`, which took
four tenths of the host's time in a recorded forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from titans import chunk, decoding, recurrent
from titans.arguments import Call, dense
from titans.autocast import without_autocast
from titans.partition import max_pieces
from titans.transforms import in_forward_mode, over_heads
from titans.validation import check_values

_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool"}
_CALL = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(Call).items())
_ARGUMENTS = f"{_CALL}, str backend"
_RESIDUALS = "Tensor M0, Tensor S0, Tensor x, Tensor r"
_COTANGENTS = "Tensor? do, Tensor? dM, Tensor? dS, Tensor? danchor"
_GRADIENTS = ", ".join(f"Tensor d{name}" for name in Call._make(Call._fields).differentiable)

# The registry outlives this module: loaded again, the module puts its functions in the place of those before.
_operators: Any = torch.ops.titans
if "library" not in vars(_operators):
    _operators.library = torch.library.Library("titans", "DEF")  # type: ignore[no-untyped-call]
_library: Any = _operators.library


def _implement(name: str, run: Callable[..., Any], key: str) -> None:
    with warnings.catch_warnings():
        # that the module was loaded before
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        _library.impl(name, run, key, allow_override=True)


def _define(
    name: str,
    arguments: str,
    results: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any] | None = None,
) -> Any:
    """Register an operator, and return it; without a rule for `vmap`, mapped axes become heads."""
    new = not hasattr(_operators, name)
    if new:
        _library.define(f"{name}({arguments}) -> ({results})")
    # for devices of any kind
    _implement(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"titans::{name}", fake, lib=_library, allow_override=True)
    operator = getattr(_operators, name).default
    if new:
        # torch 2.11 lets nobody replace this rule; that of the module before does the same
        torch.library.register_vmap(f"titans::{name}", vmap or over_heads(operator), lib=_library)
    return operator


def _differentiate(
    operator: Any, save: Callable[..., None], backward: Callable[..., Any], definition: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Make the operator differentiable, and return what it does now.

    Parameters
    ----------
    save : Callable
        Keeps on its first argument, the context, what `backward` needs of the arguments and the output.
    backward : Callable
        From the context and the cotangents of the output, those of the arguments.
    definition : Callable, optional
        The same results by PyTorch's own operations, which forward mode runs instead; None stands for "not this call".
    """
    name = operator._schema.name.removeprefix("titans::")

    def forward(ctx: Any, modes: tuple[bool, bool] | None, *arguments: Any) -> Any:
        output = _below_autograd(operator, arguments, modes)
        save(ctx, arguments, output)
        return output

    def reverse(ctx: Any, *cotangents: Tensor | None) -> Any:
        return None, *backward(ctx, *cotangents)

    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError(f'`{name}` has no forward-mode derivative; backend="recurrent" has one')

    methods = {"forward": staticmethod(forward), "backward": staticmethod(reverse), "jvp": staticmethod(jvp)}
    function: Any = type(name.title().replace("_", ""), (torch.autograd.Function,), methods)
    # here `Function.apply`, which would begin with the transforms of `torch.func`, comes too late: the dispatcher has
    # come down to one of their levels
    record = super(torch.autograd.Function, function).apply

    def run(*arguments: Any) -> Any:
        if _transformed():
            if definition and in_forward_mode() and (results := definition(*arguments)) is not None:
                return results
            with enable_single_level_autograd_function():
                return record((torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()), *arguments)
        if _recorded(arguments):
            return record(None, *arguments)
        return _below_autograd(operator, arguments)

    _implement(name, run, "Autograd")
    return run


def _transformed() -> bool:
    """Whether a transform of `torch.func` or forward mode is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _recorded(arguments: tuple[Any, ...]) -> bool:
    """Whether reverse mode records this call."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def _below_autograd(operator: Any, arguments: tuple[Any, ...], modes: tuple[bool, bool] | None = None) -> Any:
    """Call the operator at the next level, in the modes of reverse and forward derivatives that `record` turned off."""
    with torch._C._AutoDispatchBelowAutograd():
        if modes is None:
            return operator(*arguments)
        with torch.set_grad_enabled(modes[0]), forward_ad._set_fwd_grad_enabled(modes[1]):
            return operator(*arguments)


def _alone_with(q: Tensor) -> AbstractContextManager[Any]:
    """Launch on the device of `q`, whichever is current, and leave autocast outside."""
    apart = without_autocast(q)
    if not q.is_cuda or q.device.index == torch.cuda.current_device():
        return apart
    both = ExitStack()
    both.enter_context(torch.cuda.device(q.device))
    both.enter_context(apart)
    return both


def _chunked(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute o, the final M, S and anchor, and the residuals M0 and S0 of every piece (K, H, D, D), x and r."""
    *fields, backend = arguments
    call = Call(*fields).contiguous()
    with _alone_with(call.q):
        if backend == "triton":
            from titans import kernels

            check_values(call)
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


def _unrecorded(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute o, and the final M, S and anchor."""
    *fields, backend = arguments
    if backend != "triton":
        return _chunked(*arguments)[:4]
    from titans import kernels

    call = Call(*fields).contiguous()
    with _alone_with(call.q):
        check_values(call)
        return kernels.forward(call, recorded=False)[:4]


def _fake_unrecorded(*arguments: Any) -> tuple[Tensor, ...]:
    return _fake_chunked(*arguments)[:4]


def _recorded_or_not(*arguments: Any) -> tuple[Tensor, ...]:
    if _transformed() or _recorded(arguments):
        results: tuple[Tensor, ...] = _differentiable(*arguments)[:4]
        return results
    return _below_autograd(unrecorded, arguments)  # type: ignore[no-any-return]


def _chunked_by_definition(*arguments: Any) -> tuple[Tensor, ...] | None:
    """Do the same token by token, and without residuals; None for the kernels, whose callers count on their speed."""
    *fields, backend = arguments
    if backend == "triton":
        return None
    call = Call(*fields)
    with without_autocast(call.q):
        return *recurrent.forward(call), *(call.M.new_empty(0) for _ in range(4))


def _save_chunked(ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # without this, autograd would fill (K, H, D, D) zeros for the cotangents of M0 and S0
    ctx.set_materialize_grads(False)
    *fields, ctx.backend = arguments
    call = Call(*fields)
    _, _, _, _, *residuals = output
    ctx.options = call.options
    ctx.save_for_backward(*call.tensors, *residuals)


def _differentiate_chunked(ctx: Any, do: Any, dM: Any, dS: Any, danchor: Any, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, M0, S0, x, r = ctx.saved_tensors
    call = Call(*tensors, *ctx.options)
    return *_gradients(call, ctx.backend, M0, S0, x, r, do, dM, dS, danchor), None


def _gradients(call: Call, *others: Any) -> tuple[Tensor | None, ...]:
    """One gradient for every field of the call, None where it has no cotangent."""
    grads = chunked_backward(*call, *others)
    given = (g if x is not None else None for g, x in zip(grads, call.differentiable, strict=True))
    return *given, *(None for _ in call[len(grads) :])


def _chunked_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute the cotangents of q, k, v, w, b, theta, alpha, eta, M, S and anchor; without w and b theirs are empty."""
    *fields, backend, M0, S0, x, r, do, dM, dS, danchor = arguments
    call = Call(*fields).contiguous()
    do = torch.zeros_like(call.q) if do is None else dense(do)
    # only the kernels read every element where it lies
    zeros = torch.zeros_like(call.M) if backend == "triton" else call.M.new_zeros(()).expand_as(call.M)
    dM, dS, danchor = (zeros if d is None else dense(d) for d in (dM, dS, danchor))
    with _alone_with(call.q):
        if backend == "triton":
            from titans import kernels

            check_values(call)
            grads = kernels.backward(call, M0, S0, x, r, do, dM, dS, danchor)
        else:
            grads = chunk.backward(call, backend == "log", M0, S0, do, dM, dS, danchor)
    return tuple(
        call.M.new_empty(0) if x is None or dx is None else dx if dx.dtype == x.dtype else dx.to(x.dtype)
        for x, dx in zip(call.differentiable, grads, strict=True)
    )


def _fake_chunked_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments[: len(Call._fields)])
    return tuple(call.M.new_empty(0) if x is None else x.new_empty(x.shape) for x in call.differentiable)


def _save_nothing(ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _refuse(ctx: Any, *cotangents: Tensor | None) -> Any:
    raise RuntimeError('`chunked_backward` has no derivative; backend="recurrent" can be differentiated again')


def _step(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute o, and M, S, anchor and offset after it, for a call of one token, in one launch."""
    from titans.kernels.step import step as launch

    call = Call(*arguments).contiguous()
    check_values(call)
    with _alone_with(call.q):
        return launch(call)


def _fake_step(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    states = [call.M.new_empty(call.M.shape) for _ in range(3)]
    offset = call.M.new_empty(call.M.shape[0], dtype=torch.int64 if call.offset is None else call.offset.dtype)
    return call.q.new_empty(call.q.shape), *states, offset


def _save_step(ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    *_, offset = output
    ctx.mark_non_differentiable(offset)
    call = Call(*arguments)
    ctx.options = call.options
    ctx.save_for_backward(*call.tensors)


def _differentiate_step(ctx: Any, do: Any, dM: Any, dS: Any, danchor: Any, _: Any) -> tuple[Tensor | None, ...]:
    # rare, so it need not be fast: the reverse of the chunk form of the same token
    call = Call(*ctx.saved_tensors, *ctx.options)
    _, _, _, _, *residuals = chunked(*call, "triton")
    return _gradients(call, "triton", *residuals, do, dM, dS, danchor)


def _decode(*arguments: Any) -> Tensor:
    """Compute o for a call of one token, and move a decode state in place, in one launch by the kernels."""
    call, state, kernels = _decoded(*arguments)
    with _alone_with(call.q):
        if kernels:
            from titans.kernels.decode import decode as launch

            return launch(call, state)
        return decoding.decode(call, state)


def _decoded(*arguments: Any) -> tuple[Call, decoding.DecodeState, bool]:
    given = dict(zip(_DECODED, arguments, strict=True))
    state = decoding.DecodeState(*(given[name] for name in decoding.DecodeFields._fields))
    call = Call(**{name: given.get(name) for name in Call._fields})  # type: ignore[arg-type]
    return call.contiguous(), state, given["kernels"]


def _fake_decode(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _decode_unless_recorded(*arguments: Any) -> Any:
    if in_forward_mode() or _recorded(arguments):
        raise ValueError("`state` must be a TitansState where derivatives are recorded, got a DecodeState")
    return _below_autograd(decode, arguments)


def _decode_mapped(*_: Any) -> Any:
    raise ValueError("`state` must be a TitansState under `vmap`, got a DecodeState")


_STATE = "Tensor M, Tensor S, Tensor anchor"
chunked = _define("chunked", _ARGUMENTS, f"Tensor o, {_STATE}, {_RESIDUALS}", _chunked, _fake_chunked)
unrecorded = _define("unrecorded", _ARGUMENTS, f"Tensor o, {_STATE}", _unrecorded, _fake_unrecorded)
_BACKWARD = f"{_ARGUMENTS}, {_RESIDUALS}, {_COTANGENTS}"
chunked_backward = _define("chunked_backward", _BACKWARD, _GRADIENTS, _chunked_backward, _fake_chunked_backward)
step = _define("step", _CALL, f"Tensor o, {_STATE}, Tensor offset", _step, _fake_step)
_OWN = [name for name in Call._fields if name not in ("M", "S", "anchor", "offset", "cu_seqlens")]
_DECODED = [*_OWN, *decoding.DecodeFields._fields, "kernels"]
_MOVED = ", ".join(f"Tensor({chr(97 + i)}!) {name}" for i, name in enumerate(decoding.DecodeFields._fields))
_GIVEN = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(Call).items() if name in _OWN)
decode = _define("decode", f"{_GIVEN}, {_MOVED}, bool kernels", "Tensor o", _decode, _fake_decode, _decode_mapped)
_differentiable = _differentiate(chunked, _save_chunked, _differentiate_chunked, _chunked_by_definition)
_implement("unrecorded", _recorded_or_not, "Autograd")
_implement("decode", _decode_unless_recorded, "Autograd")
_differentiate(chunked_backward, _save_nothing, _refuse)
_differentiate(step, _save_step, _differentiate_step)

"""`chunk_titans_linear`, as others have it: for some sizes alone, and with operands of half precision."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import titans
from titans import autograd, chunk

WIDTHS, CHUNKS = (16, 64, 128), (16, 64)


def whole_chunks(q: Tensor, *tensors: Any, chunk_size: int, cu_seqlens: Tensor | None = None, **options: Any) -> Any:
    """Take few sizes, and whole chunks alone."""
    lengths = [q.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
    if q.shape[-1] not in WIDTHS or chunk_size not in CHUNKS or any(T % chunk_size for T in lengths):
        raise ValueError(f"D must be in {WIDTHS}, C in {CHUNKS} and T % C == 0, got {tuple(q.shape)} and {chunk_size}")
    return titans.chunk_titans_linear(q, *tensors, chunk_size=chunk_size, cu_seqlens=cu_seqlens, **options)


def few_sizes_step(q: Tensor, *arguments: Any, **options: Any) -> Any:
    """Take one token of the same widths."""
    if q.shape[-1] not in WIDTHS or arguments[-1] not in CHUNKS:
        raise ValueError(f"D must be in {WIDTHS} and C in {CHUNKS}, got {tuple(q.shape)} and {arguments[-1]}")
    return titans.titans_linear_step(q, *arguments, **options)


whole_chunks.domain = "D=16,64,128 C=16,64 T%C=0"  # type: ignore[attr-defined]
whole_chunks.log_space = lambda call: call.log_gates  # type: ignore[attr-defined]
whole_chunks.step = few_sizes_step  # type: ignore[attr-defined]


def never_whole(*arguments: Any, **options: Any) -> Any:
    """Take nothing that it says it takes."""
    raise ValueError("C must be 8")


never_whole.domain = whole_chunks.domain  # type: ignore[attr-defined]


class HalfOperands(TorchFunctionMode):
    """Rounds the operands of products to a dtype, once, and leaves their sums in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        """Compute a product of rounded operands, and anything else as it is."""
        if function.__name__ in ("matmul", "__matmul__"):
            arguments = [x.to(self.dtype).to(x.dtype) for x in arguments]
        return function(*arguments, **options or {})


rounded = threading.local()


def rounding(function: Callable[..., Any]) -> Callable[..., Any]:
    """Round the operands of the products of a function in the threads that ask for it."""

    def run(*arguments: Any, **options: Any) -> Any:
        dtype = getattr(rounded, "dtype", None)
        with HalfOperands(dtype) if dtype else nullcontext():
            return function(*arguments, **options)

    return run


# other threads may be in a call of their own
autograd.chunk = SimpleNamespace(forward=rounding(chunk.forward), backward=rounding(chunk.backward))  # type: ignore


@contextmanager
def half_operands_inside(dtype: torch.dtype) -> Iterator[None]:
    """Let both directions of backend `chunk` round the operands of their products in this thread."""
    rounded.dtype = dtype
    try:
        yield
    finally:
        rounded.dtype = None


class Narrow(torch.autograd.Function):
    """Outputs and final state of a call whose products have operands of half precision, in both directions."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, call: Callable[..., Any], *leaves: Tensor) -> Any:
        with torch.enable_grad(), half_operands_inside(dtype):
            ctx.leaves = [x.detach().requires_grad_() for x in leaves]
            ctx.results = call(*ctx.leaves)
        ctx.dtype = dtype
        return tuple(x.detach() for x in ctx.results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        with half_operands_inside(ctx.dtype):
            gradients = torch.autograd.grad(ctx.results, ctx.leaves, cotangents, allow_unused=True, retain_graph=True)
        return None, None, *gradients


def half_operands(*tensors: Any, eps: float, chunk_size: int, initial_state: Any, **options: Any) -> Any:
    """Compute as backend `chunk` does, but round the operands of products to the dtype of half-precision inputs."""
    dtype = tensors[0].dtype
    parts = (initial_state,) if isinstance(initial_state, Tensor) else tuple(initial_state or ())
    offset = parts[3] if len(parts) == 4 else None
    places = [i for i, x in enumerate(tensors) if x is not None]
    final = options.pop("output_final_state")
    states: list[Any] = []

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = list(tensors)
        for i, x in zip(places, leaves, strict=False):
            given[i] = x
        state: Any = leaves[len(places) :] or None
        state = titans.TitansState(*state, offset) if offset is not None else state and state[0]
        o, left = titans.chunk_titans_linear(
            *given, eps, chunk_size, state, output_final_state=True, backend="chunk", **options
        )
        states.append(left.offset)
        return o, left.M, left.S, left.anchor

    leaves = [*(tensors[i] for i in places), *parts[:3]]
    results = Narrow.apply(dtype, call, *leaves) if dtype.itemsize == 2 else call(*leaves)
    return results[0], titans.TitansState(*results[1:], states[0]) if final else None


half_operands.operands = "inputs"  # type: ignore[attr-defined]
# In float16 operands overflow where the memory is 0 and normalised.
half_operands.domain = "dtype=bfloat16,float32,float64"  # type: ignore[attr-defined]

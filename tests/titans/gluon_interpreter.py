"""Enough of Gluon to run the kernels of `titans.kernels.hopper` on a CPU, in PyTorch, with any order of events.

The roles of a program take turns. A seed decides who goes on at a barrier, and when a copy under way is made: at once,
at some time, or when nobody can go on without it; products are made when they are started, or when they are waited for.
So a flag that is released too early, a slot that is read too late and a wrong parity show in the results, and a
deadlock is reported. Shared memory is addressed as the hardware's 128-byte swizzle lays it out: views of the same
memory mean what they mean there. The tensor cores and the copy engine read only what its writer has fenced, and loads
outside a tensor fail.

Not seen: races between the warps of one role, and the order in which a product sums.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

# what the modules import, before its imports are changed
import titans.kernels

KERNELS = Path(titans.kernels.__file__).parent
GLUON = "triton.experimental.gluon"


class Deadlock(Exception):
    """Every role waits, and no copy is under way."""


class Stop(BaseException):
    """Ends a role, because the program has failed."""


class Role(threading.Thread):
    """A partition of the warps, which runs until it waits."""

    def __init__(self, program: Program, function: Any, arguments: Any) -> None:
        super().__init__(daemon=True)
        self.program, self.function, self.arguments = program, function, arguments
        self.turn, self.done, self.error = threading.Event(), False, None
        self.ready: Callable[[], bool] = lambda: True
        self.products: list[Product] = []
        # stores of the copy engine: how many were started, which have not been read, and which have not been made
        self.started, self.unread, self.unmade = 0, set[int](), set[int]()
        self.polls = 0

    def run(self) -> None:
        try:
            self.wait(lambda: True, first=True)
            self.function(*self.arguments)
        except BaseException as error:
            self.error = error
        self.done = True
        self.program.back.set()

    def wait(self, ready: Callable[[], bool], first: bool = False) -> None:
        """Let others go on, and return when `ready`."""
        self.ready = ready
        if not first:
            self.program.back.set()
        self.turn.wait()
        self.turn.clear()
        if self.program.failed:
            raise Stop


class Alone(Role):
    """All warps of a program without roles: who waits lets copies be made."""

    def __init__(self, program: Program) -> None:
        super().__init__(program, None, None)

    def wait(self, ready: Callable[[], bool], first: bool = False) -> None:
        """Make copies that are under way: all, some, or as many as it takes."""
        program = self.program
        while not ready() or (program.copies and program.wanted(late=False)):
            if not program.copies:
                raise Deadlock("the program waits for ever")
            program.copy()


class Program:
    """One program of the grid, and the copies that it has under way."""

    def __init__(self, pid: int, seed: int) -> None:
        self.pid, self.random, self.policy = pid, random.Random(seed), seed % 3
        self.back, self.failed = threading.Event(), False
        self.roles: list[Role] = [Alone(self)]
        self.copies: list[Callable[[], None]] = []
        # by whom each element of shared memory is not yet fenced
        self.dirty: list[Tensor] = []

    def wanted(self, late: bool) -> bool:
        """Whether a copy is to be made now; `late` where as few as possible are made."""
        return {0: True, 1: self.random.random() < 0.3, 2: late}[self.policy]

    def copy(self) -> None:
        """Make a copy that is under way."""
        self.copies.pop(0 if self.policy == 0 else self.random.randrange(len(self.copies)))()

    def finish(self) -> None:
        """Make all copies."""
        while self.copies:
            self.copy()

    def run(self, roles: Sequence[tuple[Any, Any]]) -> None:
        """Run the roles to their ends."""
        self.roles = [Role(self, *role) for role in roles]
        for role in self.roles:
            role.start()
        try:
            while not all(role.done for role in self.roles):
                self.step([role for role in self.roles if not role.done and role.ready()])
        finally:
            self.failed = True
            for role in self.roles:
                role.turn.set()
        self.finish()

    def step(self, able: list[Role]) -> None:
        """Make a copy that is under way, or let a role go on."""
        if self.copies and (self.wanted(not able) or not able):
            self.copy()
            return
        if not able:
            raise Deadlock(f"roles {[i for i, role in enumerate(self.roles) if not role.done]} wait for ever")
        role = self.random.choice(able)
        role.turn.set()
        self.back.wait()
        self.back.clear()
        if role.error is not None:
            raise role.error


current: list[Program] = []
seeds: list[int] = [0]


def here() -> Role:
    role = threading.current_thread()
    return role if isinstance(role, Role) else current[0].roles[0]


class Constexpr(int):
    """A number that is its own `value`."""

    @property
    def value(self) -> int:
        return int(self)


class Layout:
    """Any layout; only those of shared memory mean something here."""

    def __init__(self, *_: Any, swizzle_byte_width: int = 0, rank: int = 0, order: Any = (0,), **__: Any) -> None:
        self.swizzled, self.rank, self.value = swizzle_byte_width == 128, rank or len(order), self


class Jit:
    """A function of a kernel, or a kernel: `[grid]` launches it."""

    def __init__(self, function: Any, do_not_specialize: Sequence[str] = ()) -> None:
        self.function, self.numbers = function, do_not_specialize
        self.arg_names = list(inspect.signature(function).parameters)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(num_warps: int, **arguments: Any) -> None:
            for name, value in arguments.items():
                number = name in self.numbers
                arguments[name] = torch.tensor(value, dtype=torch.int32) if number else pointers(value)
            for pid in range(*grid):
                current[:] = [Program(pid, seeds[0])]
                self.function(**arguments)
                current[0].finish()

        return launch


def pointers(x: Any) -> Any:
    """Tensors as pointers, also those of a tuple."""
    if isinstance(x, tuple):
        return type(x)(*map(pointers, x))
    return Pointer(x.view(-1)) if isinstance(x, Tensor) else x


class Pointer:
    """An address, or addresses, in a tensor."""

    def __init__(self, flat: Tensor, at: Any = 0) -> None:
        self.flat, self.at = flat, at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.flat, self.at + offset)

    def to(self, dtype: Any) -> Pointer:
        """The address as a number."""
        return self


def _valid(pointer: Pointer, mask: Any) -> tuple[Tensor, Tensor]:
    at = torch.as_tensor(pointer.at).long()
    at, mask = torch.broadcast_tensors(at, torch.as_tensor(True if mask is None else mask))
    inside = (at >= 0) & (at < pointer.flat.numel())
    assert bool((inside | ~mask).all()), "an access outside a tensor"
    return torch.where(mask, at, 0), mask


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    at, mask = _valid(pointer, mask)
    return torch.where(mask, pointer.flat[at], torch.tensor(other, dtype=pointer.flat.dtype))


def store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
    at, mask = _valid(pointer, mask)
    pointer.flat[at[mask]] = torch.broadcast_to(torch.as_tensor(value), mask.shape)[mask].to(pointer.flat.dtype)


class Shared:
    """A view of shared memory: where each of its elements lies in `memory`; `dirty` is by whom it is not yet fenced."""

    def __init__(self, memory: Tensor, dirty: Tensor, at: Tensor, rank: int) -> None:
        self.memory, self.dirty, self.at, self.rank = memory, dirty, at, rank

    @property
    def shape(self) -> torch.Size:
        return self.at.shape

    def view(self, at: Tensor) -> Shared:
        return Shared(self.memory, self.dirty, at, self.rank)

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < len(self.at), "no such slot"
        return self.view(self.at[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return self.view(self.at.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> Shared:
        return self.view(self.at.permute(*order))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Layout) -> Shared:
        assert dtype == self.memory.dtype
        at = _addresses(list(map(int, shape)), layout)
        assert at.numel() <= self.at.numel(), "a view larger than its memory"
        return Shared(self.memory, self.dirty, at + int(self.at.min()), layout.rank)

    def load(self, layout: Any) -> Tensor:
        return self.memory[self.at]

    def store(self, value: Tensor) -> None:
        self.memory[self.at] = torch.broadcast_to(value, self.shape).to(self.memory.dtype)
        self.dirty[self.at] = 1 + current[0].roles.index(here())

    def fenced(self) -> Tensor:
        """What the tensor cores or the copy engine read."""
        assert not bool(self.dirty[self.at].any()), "not fenced"
        return self.memory[self.at]


def _addresses(shape: list[int], layout: Layout) -> Tensor:
    """Where elements lie: a matrix in columns of 128 bytes, whose 16-byte pieces are permuted in every 8 rows."""
    if not layout.swizzled:
        return torch.arange(math.prod(shape)).view(shape)
    slots, tile = shape[: len(shape) - layout.rank], shape[len(shape) - layout.rank :]
    rows, columns = math.prod(tile[:-1]), tile[-1]
    i, j = torch.arange(rows)[:, None], torch.arange(columns)[None]
    at = j // 64 * (rows * 64) + i * 64 + ((j % 64 // 8) ^ (i % 8)) * 8 + j % 8
    return (torch.arange(math.prod(slots))[:, None, None] * (rows * columns) + at).view(shape)


def allocate_shared_memory(dtype: torch.dtype, shape: Sequence[int], layout: Layout) -> Any:
    shape = list(map(int, shape))
    if dtype == torch.int64:
        return Barriers(shape[0])
    memory = torch.full((math.prod(shape),), math.nan, dtype=dtype)
    dirty = torch.zeros(len(memory), dtype=torch.int8)
    current[0].dirty.append(dirty)
    return Shared(memory, dirty, _addresses(shape, layout), layout.rank)


class Barriers:
    """An array of barriers."""

    def __init__(self, count: int) -> None:
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        assert 0 <= int(i) < len(self.barriers), "no such barrier"
        return self.barriers[int(i)]


class Barrier:
    """A phase ends when all have arrived and all bytes have come."""

    def init(self, count: int) -> None:
        self.count = self.missing = int(count)
        self.bytes = self.phase = 0

    def change(self, arrivals: int, expected: int) -> None:
        self.missing -= arrivals
        self.bytes += expected
        assert self.missing >= 0, "more arrivals than the barrier counts"
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count


def _arrive(barrier: Barrier) -> None:
    barrier.change(1, 0)
    here().wait(lambda: True)


def _expect(barrier: Barrier, size: int) -> None:
    barrier.change(1, int(size))


def _wait(barrier: Barrier, parity: Any) -> None:
    here().wait(lambda: barrier.phase % 2 != int(parity))


class TensorDescriptor:
    """Boxes of a tensor; what lies outside it is read as zero and not written."""

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block_shape: list[int], layout: Any) -> None:
        self.base, self.shape, self.strides, self.block = base, shape, strides, block_shape
        assert all(stride * base.element_size() % 16 == 0 for stride in strides[:-1])
        assert strides[-1] == 1

    def box(self, corner: Sequence[Any]) -> tuple[Tensor, Tensor]:
        at, inside = torch.zeros(self.block, dtype=torch.long), torch.ones(self.block, dtype=torch.bool)
        for axis, (start, size, stride) in enumerate(zip(corner, self.shape, self.strides, strict=True)):
            i = int(start) + torch.arange(self.block[axis]).view(-1, *[1] * (len(self.block) - axis - 1))
            inside = inside & (i >= 0) & (i < size)
            at = at + i * stride
        return torch.where(inside, at, 0), inside


def _copy_in(desc: TensorDescriptor, corner: Sequence[Any], barrier: Barrier, tile: Shared) -> None:
    at, inside = desc.box(corner)
    assert tile.shape == at.shape
    tile.memory[tile.at] = math.nan
    tile.dirty[tile.at] = 0

    def copy() -> None:
        tile.memory[tile.at] = torch.where(inside, desc.base.view(-1)[at], 0)
        barrier.change(0, -tile.at.numel() * tile.memory.element_size())

    current[0].copies.append(copy)
    here().wait(lambda: True)


def _copy_out(desc: TensorDescriptor, corner: Sequence[Any], tile: Shared) -> None:
    at, inside = desc.box(corner)
    assert tile.shape == at.shape
    tile.fenced()
    role = here()
    role.started += 1
    number = role.started
    role.unread.add(number)
    role.unmade.add(number)

    def read() -> None:
        value = tile.fenced()[inside]
        role.unread.remove(number)

        def make() -> None:
            desc.base.view(-1)[at[inside]] = value
            role.unmade.remove(number)

        current[0].copies.append(make)

    current[0].copies.append(read)
    role.wait(lambda: True)


def _store_wait(pendings: int) -> None:
    """Wait until all stores but the last ones have been read."""
    role = here()
    role.wait(lambda: all(number > role.started - pendings for number in role.unread))


def _made_wait(pendings: int) -> None:
    """Wait until all stores but the last ones have been made."""
    role = here()
    role.wait(lambda: all(number > role.started - pendings for number in role.unmade))


# more than the steps of any test
POLLS = 1000
# called with the count that is handed over, at the moment when it is
released: list[Callable[[int], None]] = []


def _atomic_xchg(pointer: Pointer, value: Any, sem: str, scope: str) -> None:
    """Hand over a count; what this role has stored is visible, as it would be after a barrier."""
    assert (sem, scope) == ("release", "gpu")
    store(pointer, torch.as_tensor(value))
    for see in released:
        see(int(value))


def _atomic_add(pointer: Pointer, value: Any, sem: str, scope: str) -> Tensor:
    before = load(pointer)
    store(pointer, before + value)
    return before


def _inline_asm(asm: str, constraints: str, args: Sequence[Any], **_: Any) -> Any:
    """The instructions of `handover.py`; others do nothing."""
    if asm.startswith("cp.async.bulk.wait_group "):
        _made_wait(int(asm.split()[1].rstrip(";")))
    if "%smid" in asm:
        return torch.tensor(current[0].random.randrange(132), dtype=torch.int32)
    if not asm.startswith("ld.acquire"):
        return args[0]
    role = here()
    role.polls += 1
    if role.polls > POLLS:
        raise Deadlock("a count is waited for that never comes")
    return load(args[0])


class Product:
    """a b + sum, made when it is started, or when it is waited for."""

    def __init__(self, a: Shared | Tensor, b: Shared, acc: Any, use_acc: Any) -> None:
        self.a, self.b, self.acc = a, b, acc if bool(use_acc) else 0
        self.value: Tensor | None = None
        self.left(), b.fenced()
        if current[0].policy == 0:
            self.make()

    def make(self) -> Tensor:
        if self.value is None:
            acc = self.acc.make() if isinstance(self.acc, Product) else self.acc
            self.value = acc + self.left().float() @ self.b.fenced().float()
        return self.value

    def left(self) -> Tensor:
        """The left operand, which may be in registers."""
        return self.a if isinstance(self.a, Tensor) else self.a.fenced()


def warpgroup_mma(a: Shared | Tensor, b: Shared, acc: Tensor, *, use_acc: Any = True, is_async: bool = False) -> Any:
    product = Product(a, b, acc, use_acc)
    if not is_async:
        return product.make()
    here().products.append(product)
    return product


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    products = here().products
    while len(products) > num_outstanding:
        products.pop(0).make()
    done = tuple(x.value if isinstance(x, Product) and x.value is not None else x for x in deps)
    return done if len(done) > 1 else done[0]


def fence_async_shared() -> None:
    mine = 1 + current[0].roles.index(here())
    for dirty in current[0].dirty:
        dirty[dirty == mine] = 0


def reduce(values: Any, axis: int, combine: Any) -> Any:
    """Fold in halves."""
    parts = tuple(values)
    while parts[0].shape[axis] > 1:
        half = parts[0].shape[axis] // 2
        parts = combine(*(x.narrow(axis, 0, half) for x in parts), *(x.narrow(axis, half, half) for x in parts))
    return tuple(x.squeeze(axis) for x in parts)


def _scan(values: Any, axis: int, combine: Any, reverse: bool = False) -> Any:
    """Fold from the first to the last, or from the last to the first, one by one."""
    parts = values if isinstance(values, tuple) else (values,)
    if reverse:
        return tuple(x.flip(axis) for x in _scan(tuple(x.flip(axis) for x in parts), axis, combine))
    folded = [tuple(x.select(axis, 0) for x in parts)]
    for i in range(1, parts[0].shape[axis]):
        result = combine(*folded[-1], *(x.select(axis, i) for x in parts))
        folded.append(result if isinstance(result, tuple) else (result,))
    sums = tuple(torch.stack(x, axis) for x in zip(*folded, strict=True))
    return sums if isinstance(values, tuple) else sums[0]


def _pairwise(of_tensors: Any, of_numbers: Any) -> Any:
    def function(x: Any, y: Any) -> Any:
        if isinstance(x, Tensor) or isinstance(y, Tensor):
            return of_tensors(*torch.broadcast_tensors(torch.as_tensor(x), torch.as_tensor(y)))
        return of_numbers(x, y)

    return function


def where(condition: Any, x: Any, y: Any) -> Any:
    if isinstance(condition, Tensor):
        return torch.where(condition, x, y)
    return x if condition else y


def _language() -> ModuleType:
    gl = ModuleType(f"{GLUON}.language")
    for name in ("NVMMAShared", "SwizzledShared", "Blocked", "Slice", "NVMMADistributed", "DotOperand"):
        setattr(gl, f"{name}Layout", Layout)
    gl.__dict__.update(
        constexpr=lambda x: Constexpr(x) if isinstance(x, int) else x,
        bfloat16=torch.bfloat16, float32=torch.float32, int32=torch.int32, int64=torch.int64,
        program_id=lambda axis: torch.tensor(current[0].pid, dtype=torch.int32),
        arange=lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
        zeros=lambda shape, dtype, layout=None: torch.zeros(list(map(int, shape)), dtype=dtype),
        expand_dims=torch.unsqueeze, load=load, store=store, where=where, reduce=reduce, static_range=range,
        maximum=_pairwise(torch.maximum, max), minimum=_pairwise(torch.minimum, min), rsqrt=torch.rsqrt,
        sum=lambda x, axis: reduce((x,), axis, lambda a, b: (a + b,))[0],
        allocate_shared_memory=allocate_shared_memory,
        inline_asm_elementwise=_inline_asm, atomic_add=_atomic_add, atomic_xchg=_atomic_xchg, exp=torch.exp,
        convert_layout=lambda x, layout: x, associative_scan=_scan, barrier=lambda: None,
        warp_specialize=lambda roles, warps, registers: current[0].run(roles),
    )  # fmt: skip
    return gl


def _jit(function: Any = None, **options: Any) -> Any:
    return Jit(function) if function else lambda function: Jit(function, **options)


def _modules() -> dict[str, ModuleType]:
    gluon, gl = ModuleType(GLUON), _language()
    gluon.__dict__.update(jit=_jit, language=gl)
    hopper = ModuleType(f"{GLUON}.language.nvidia.hopper")
    mbarrier, tma = ModuleType("mbarrier"), ModuleType("tma")
    mbarrier.__dict__.update(init=Barrier.init, arrive=_arrive, expect=_expect, wait=_wait, MBarrierLayout=Layout)
    tma.__dict__.update(
        async_copy_global_to_shared=_copy_in, async_copy_shared_to_global=_copy_out, store_wait=_store_wait
    )
    hopper.__dict__.update(
        fence_async_shared=fence_async_shared, mbarrier=mbarrier, tma=tma, warpgroup_mma=warpgroup_mma,
        warpgroup_mma_wait=warpgroup_mma_wait,
    )  # fmt: skip
    ampere = ModuleType(f"{GLUON}.language.nvidia.ampere")
    ampere.__dict__.update(async_copy=ModuleType("async_copy"))
    descriptors = ModuleType(f"{GLUON}.nvidia.hopper")
    descriptors.__dict__.update(TensorDescriptor=TensorDescriptor)
    experimental, triton = ModuleType("triton.experimental"), ModuleType("triton")
    experimental.__dict__.update(gluon=gluon)
    triton.__dict__.update(jit=_jit, language=gl)
    named = {m.__name__: m for m in (triton, experimental, gluon, gl, hopper, ampere, descriptors)}
    return named | {"triton.language": gl}


# what a module imports, itself last
PARTS = {
    "state_vjp": ("block", "hopper.common", "hopper.state_vjp"),
    "output": ("block", "hopper.common", "hopper.handover", "hopper.state_vjp", "hopper.ends", "hopper.output"),
}
for name in ("output_vjp", "key_vjp", "coefficients_vjp"):
    PARTS[name] = (*PARTS["output"], "hopper.blocks", f"hopper.{name}")
PARTS["forward"] = (*PARTS["output"], "hopper.state", "hopper.fused", "hopper.forward")


@contextmanager
def interpreted(name: str, change: Callable[[str], str] = lambda text: text, changed: str = "") -> Iterator[Any]:
    """Load a module of `titans.kernels.hopper` for this interpreter, its text `change`d, or that of another one."""
    with patch.dict(sys.modules, _modules()):
        for part in PARTS[name]:
            full = f"titans.kernels.{part}"
            path = KERNELS / f"{part.replace('.', '/')}.py"
            spec = importlib.util.spec_from_file_location(full, path)
            assert spec is not None
            module = sys.modules[full] = importlib.util.module_from_spec(spec)
            text = path.read_text()
            text = change(text) if part == f"hopper.{changed or name}" else text
            exec(compile(text, str(path), "exec"), module.__dict__)
        yield module

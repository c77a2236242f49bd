"""How a program hands its results to another one of the same launch, on another multiprocessor.

Programs take tickets as they begin. Whoever waits has a later ticket than whom it waits for, who has begun by then, and
waits for nobody: so no number of programs has to run at once. A program releases a count when its stores have been
made; who waits for the count reads after that.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# counts are so far apart: those who wait for one must not hold up those who write others
LINE = gl.constexpr(32)
# of the threads of one role; Triton 3.7 changed the name
role_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def take_ticket(ticket_ptr):
    """How many programs have begun before this one."""
    return gl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")


@gluon.jit
def all_stored(x):
    """Wait until the engine has made all stores of this thread; returns x."""
    return gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.u32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def release(count_ptr, count):
    """Hand over what this role's threads stored before their last barrier."""
    gl.atomic_xchg(count_ptr, count, sem="release", scope="gpu")


@gluon.jit
def acquire(count_ptr):
    """Read a count that another multiprocessor releases."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.u32 $0, [$1];", "=r,l", [count_ptr.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def before_engine(x):
    """Let the copy engine see what this thread has seen; returns x."""
    return gl.inline_asm_elementwise(
        "fence.proxy.async; mov.u32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for(count_ptr, seen, wanted):
    """Wait until `wanted` have been handed over, of which `seen` are known; how many are known now."""
    while seen < wanted:
        seen = acquire(count_ptr)
    return before_engine(seen)

"""How a program hands its results to another one of the same launch, on another multiprocessor.

Programs take their roles as they begin. Whoever follows a chain takes one that has begun by then, and that waits for
nobody: so no number of programs has to run at once. A program releases a count when its stores have been made; who
waits for the count reads after that.

Multiprocessors come in pairs. A chain of narrow tiles is slow where the other one of its pair makes outputs, so there
both ask for the same role. Chains of wide tiles are slower side by side.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# counts are so far apart: those who wait for one must not hold up those who write others
LINE = gl.constexpr(32)
# numbers in a line of tickets: chains or programs that have begun, chains that nobody follows yet, and followers
BEGUN, FREE, FOLLOWED = (gl.constexpr(i) for i in range(3))
# how often a program asks for a chain to follow, before it begins one: the programs of a launch begin within one try
TRIES = gl.constexpr(8)
# of the threads of one role; Triton 3.7 changed the name
role_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


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
def multiprocessor(x):
    """The number of the multiprocessor that this program runs on; x is any number."""
    return gl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def follow(tickets_ptr):
    """The number of a chain that has begun, which nobody else follows; -1 if there is none."""
    # an atomic operation, so that all warps see the same
    free = gl.atomic_add(tickets_ptr + FREE, 0, sem="relaxed", scope="gpu")
    if free > 0:
        free = gl.atomic_add(tickets_ptr + FREE, -1, sem="relaxed", scope="gpu")
        # others were faster
        if free <= 0:
            gl.atomic_add(tickets_ptr + FREE, 1, sem="relaxed", scope="gpu")
    pid = free * 0 - 1
    if free > 0:
        pid = gl.atomic_add(tickets_ptr + FOLLOWED, 1, sem="relaxed", scope="gpu")
    return pid


@gluon.jit
def role_of_pair(tickets_ptr, chains):
    """Whether this program is a chain, and its number, or that of the chain which it follows; 2 `chains` programs."""
    tries = multiprocessor(chains) // 2 % 2 * TRIES
    pid = tries * 0 - 1
    while (pid < 0) & (tries > 0):
        pid = follow(tickets_ptr)
        tries -= 1
    is_chain = pid < 0
    if is_chain:
        pid = gl.atomic_add(tickets_ptr + BEGUN, 1, sem="relaxed", scope="gpu")
        is_chain = pid < chains
        if is_chain:
            gl.atomic_add(tickets_ptr + FREE, 1, sem="relaxed", scope="gpu")
        else:
            pid = pid * 0 - 1
            # all chains have begun
            while pid < 0:
                pid = follow(tickets_ptr)
    return is_chain, pid


@gluon.jit
def role_in_turn(tickets_ptr):
    """The same, wherever this program runs: every other one that begins is a chain, the next one follows it."""
    begun = gl.atomic_add(tickets_ptr + BEGUN, 1, sem="relaxed", scope="gpu")
    return begun % 2 == 0, begun // 2


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

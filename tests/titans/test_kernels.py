"""The Triton kernels against the oracle, values and gradients, at sizes that fill no tile: on a GPU if there is one,
else in Triton's interpreter. `make properties` and the GPU runs go much further.
"""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from oracle.bounds import kernel_arithmetic
from properties.harness.comparing import check, same_bits
from properties.harness.implementations import implementation
from properties.harness.running import run
from properties.problems.problem import Problem
from tests.poison import poisoned_memory
from titans import chunk_titans_linear, partition
from titans.kernels import tile
from titans.partition import chunks_per_block

# interpreted, or compiled
pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

ZEROS = Problem((11,), H=2, D=20, C=5, theta="alternate 2^-2 0", alpha="spike 2^-4 1 2", eta="alternate 1 0")
# Of the normalised memory little enough that its bound says something in float16, too: it grows from piece to piece.
NORMALISED = Problem(memory="normalised", theta="constant 2^-4", k="unit -1", state="random -1", w="random -1", eps=2.0)
PROBLEMS = {
    "plain": Problem((20,), H=2, D=16, C=16, initial="M", seed=1),
    "normalised": replace(NORMALISED, lengths=(7, 7), H=2, D=3, C=5, initial="M", seed=2),
    "C = 1": replace(NORMALISED, lengths=(3,), D=20, C=1, initial="M", seed=3),
    "C = 33": Problem((35,), D=3, C=33, initial="M", eta="uniform 0", alpha="random 2^-9 2^-1", seed=4),
    # of the two blocks of a chunk the last chunk fills one
    "normalised, C = 33": replace(NORMALISED, lengths=(34,), D=3, C=33, initial="M", seed=12),
    # chunks of many blocks, and some that no sequence fills
    "C = 200": Problem((60,), D=3, C=200, initial="full", offsets=(180,), theta="random 2^-6 2^-2", seed=13),
    "normalised, C = 256": replace(NORMALISED, lengths=(265,), D=2, C=256, seed=14),
    "packed, T < C = 256": Problem((20, 0, 70), packed=True, D=3, C=256, initial="full", offsets=(250, 1, 5), seed=15),
    "no state": replace(NORMALISED, lengths=(5,), D=20, C=16, seed=5),
    "resumed": replace(NORMALISED, lengths=(9, 9), D=16, C=5, initial="full", offsets=(4, 1), seed=6),
    "packed": Problem((2, 0, 1, 9), packed=True, H=2, D=3, C=5, initial="full", offsets=(4, 0, 4, 2), seed=7),
    "packed in larger chunks": Problem((20, 0, 40), packed=True, D=3, C=33, initial="full", offsets=(32, 1, 5), seed=8),
    "log gates": replace(ZEROS, log_gates=True, seed=9),
    "zero gates": replace(ZEROS, H=1, D=16, seed=10),
    "no tokens": Problem((0, 0), D=3, C=5, initial="full", offsets=(2, 0), seed=11),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_kernels_are_within_the_bound_of_the_oracle_whatever_memory_held(problem: Problem, dtype: str) -> None:
    with poisoned_memory():
        found = check(implementation("triton", DEVICE), replace(problem, dtype=dtype))
    assert not any(one.ill_conditioned for one in found), "the bound is too wide to say anything"


@pytest.mark.parametrize("lengths", [(7, 13), (13, 13)])
@pytest.mark.parametrize("offsets", [(), (149, 137), (143, 138), (33, 64)])
def test_chunks_that_reach_far_beyond_a_call_are_shortened(
    lengths: tuple[int, ...], offsets: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same bits, wherever in its chunk a sequence begins, and whether the chunk ends in it."""
    packed, initial = lengths[0] != lengths[1], "full" if offsets else "M"
    problem = replace(NORMALISED, lengths=lengths, packed=packed, D=3, C=150, initial=initial, offsets=offsets, seed=16)
    results = []
    for long in (150, 149):
        monkeypatch.setattr(partition, "LONG", long)
        results.append(run(implementation("triton", DEVICE), problem.inputs(), problem.cotangents()))
    assert same_bits(*results)


@pytest.mark.parametrize("grad", [True, False])
def test_a_chunk_of_any_length_takes_no_more_memory_than_its_tokens(grad: bool) -> None:
    q = torch.ones(1, 20, 1, 2, device=DEVICE, requires_grad=grad)
    gates = [torch.full((1, 20, 1), x, device=DEVICE) for x in (0.1, 0.1, 0.5)]
    M = torch.ones(1, 1, 2, 2, device=DEVICE)
    results = []
    for C in (10**9, 64):
        o, state = chunk_titans_linear(q, q, q, None, None, *gates, 1e-6, C, M, True, backend="triton")
        results.append([o, *state[:3], *(torch.autograd.grad(o.sum(), q) if grad else ())])
        # the same chunk goes on
        results[-1].append(chunk_titans_linear(q, q, q, None, None, *gates, 1e-6, C, state, backend="triton")[0])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("D", [1, 64, 65, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_error_model_knows_the_blocks(dtype: torch.dtype, D: int) -> None:
    """(B11): which chunks are one polynomial."""
    arithmetic = kernel_arithmetic(dtype, D, tensor_cores=False)
    for C in range(1, 129):
        assert arithmetic.chunks(C) == chunks_per_block(C, tile.block_rows(torch.empty(1, D, dtype=dtype)))


def test_no_two_gradients_share_memory() -> None:
    B, T, H, D = 1, 3, 1, 2
    inputs = [torch.ones(s, device=DEVICE) for s in (*[(B, T, H, D)] * 3, *[(H, D)] * 2, *[(B, T, H)] * 3)]
    given = [x.requires_grad_() for x in (*inputs, torch.ones(B, H, D, D, device=DEVICE))]
    o, _ = chunk_titans_linear(*given[:8], chunk_size=2, initial_state=given[8], backend="triton")
    grads = torch.autograd.grad(o.sum(), given)
    assert len({x.untyped_storage().data_ptr() for x in grads}) == len(given)


def test_log_gates_near_zero_add_up() -> None:
    """Each a rounds to 1 or to 1 - 2^-24; what is left of M after many chunks is the sum of their logs."""
    T, C, log_a = 512, 16, -3e-8
    ones = torch.ones(1, T, 1, device=DEVICE)
    q, M = torch.zeros(1, T, 1, 4, device=DEVICE), torch.ones(1, 1, 4, 4, device=DEVICE)
    gates = (ones * -torch.inf, ones * log_a, -ones)
    _, state = chunk_titans_linear(q, q, q, None, None, *gates, 1e-6, C, M, True, log_gates=True, backend="triton")
    # M is rounded once in every chunk, and so is its factor
    assert abs(state.M.double() - math.exp(T * log_a)).max() <= 2 * T // C * 2.0**-24


@pytest.mark.parametrize("packed", [True, False])
def test_no_bounds_or_offsets_lead_outside_the_tensors(packed: bool) -> None:
    """On a GPU nobody has read them; the process that reads or writes elsewhere dies, so it is one of its own."""
    code = f"""if True:
        import torch
        from titans import kernels
        from titans.arguments import Call

        T, H, D, C = 7, 1, 2, 3
        q, k, v = torch.randn(3, {"1, T" if packed else "2, T"}, H, D, device={DEVICE!r})
        gates = torch.rand(3, *q.shape[:3], device={DEVICE!r})
        M = torch.zeros(2, H, D, D, device={DEVICE!r})
        for bounds in ([0, 3, 10**9], [0, -(10**9), 7], [-(10**9), 2**40, 7]) if {packed} else (None,):
            for offset in (None, [10**9, -(10**9)], [2**33, -(2**40)]):
                bounds_, offset_ = (x and torch.tensor(x, device={DEVICE!r}) for x in (bounds, offset))
                call = Call(q, k, v, None, None, *gates, M, M, M, offset_, bounds_, 0.1, C, False)
                o, *final, M0, S0, x, r = kernels.forward(call)
                kernels.backward(call, M0, S0, x, r, o, *final)
        torch.empty(1, device={DEVICE!r}).tolist()
        print("alive")
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["alive"], run.stderr

"""What only a GPU shows of the Hopper forward: races between programs, and both of its forms. Skipped elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.poison import poisoned_memory
from titans import TitansState, chunk_titans_linear
from titans.kernels import hopper

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")]
DEVICE, C = "cuda", 64


@contextmanager
def form(places: int) -> Iterator[None]:
    """As if the GPU had so many multiprocessors."""
    from titans.kernels.hopper import forward

    with patch.object(forward, "multiprocessors", lambda device: places):
        yield


def inputs(B: int, T: int, H: int, D: int, seed: int = 0) -> list[Tensor]:
    """q, k, v, w, b, theta, alpha, eta and M; the gates keep the recurrence stable."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k = (torch.nn.functional.normalize(normal(B, T, H, D), dim=-1) for _ in range(2))
    tokens, affine = [q, k, normal(B, T, H, D)], [1 + 0.1 * normal(H, D), 0.1 * normal(H, D)]
    gates = [by * normal(B, T, H).sigmoid() for by in (0.02, 0.1, 1)]
    return [x.bfloat16().to(DEVICE) for x in (*tokens, *affine, *gates)] + [normal(B, H, D, D).to(DEVICE)]


def run(x: list[Tensor], **options: object) -> list[Tensor]:
    """o and the final state."""
    *tensors, M = x
    with torch.no_grad(), poisoned_memory():
        o, state = chunk_titans_linear(
            *tensors, chunk_size=C, initial_state=M, output_final_state=True, backend="triton", **options
        )
    assert isinstance(state, TitansState)
    return [o, *state[:3]]


def same(x: list[Tensor], y: list[Tensor]) -> bool:
    """Whether two runs gave the same bits."""
    return all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(
    "shape", [(4, 1024, 16, 64), (8, 512, 33, 64), (2, 1000, 5, 40), (4, 1024, 16, 128), (2, 500, 70, 96)], ids=str
)
def test_fifty_runs_give_the_same_bits(shape: tuple[int, ...]) -> None:
    x = inputs(*shape)
    first = run(x)
    assert not any(value.isnan().any() for value in first)
    assert all(same(run(x), first) for _ in range(50))


@pytest.mark.parametrize("shape", [(2, 1000, 16, 64), (2, 300, 5, 40)], ids=str)
def test_few_and_many_programs_give_the_same_bits(shape: tuple[int, ...]) -> None:
    """Chains and outputs apart; both in one program, with a multiprocessor of its own, or half of one."""
    x = inputs(*shape)
    B, _, H, _ = shape
    with form(2**20):
        few = run(x)
    for places in (B * H, 1):
        with form(places):
            assert same(run(x), few)


@pytest.mark.parametrize("D", [40, 64, 96, 128])
def test_integers_of_the_plain_memory_are_exact(D: int) -> None:
    """So small and so few that every result fits bfloat16: rows with one entry, gates that are 0 or 1."""
    B, T, H = 2, 200, 3
    generator = torch.Generator().manual_seed(D)

    def integers(low: int, *shape: int) -> Tensor:
        return torch.randint(low, 2, shape, generator=generator).float()

    def rows() -> Tensor:
        at = torch.randint(D, (B, T, H), generator=generator)
        return (2 * integers(0, B, T, H, 1) - 1) * torch.nn.functional.one_hot(at, D)

    theta, alpha, eta = integers(0, B, T, H) / 2, integers(0, B, T, H), integers(0, B, T, H)
    x = [rows(), rows(), integers(-1, B, T, H, D), theta, alpha, eta, integers(-1, B, H, D, D)]

    def results(dtype: torch.dtype, backend: str) -> list[Tensor]:
        q, k, v, *gates, M = (t.to(DEVICE, dtype) for t in x)
        o, state = chunk_titans_linear(
            q, k, v, None, None, *gates, chunk_size=C, initial_state=M.to(torch.promote_types(dtype, torch.float32)),
            output_final_state=True, backend=backend,
        )  # fmt: skip
        assert state is not None
        return [o, *state[:3]]

    exact = results(torch.float64, "chunk")
    assert all(torch.equal(value, value.bfloat16().double()) for value in exact)
    assert same([value.double() for value in results(torch.bfloat16, "triton")], exact)


@pytest.mark.parametrize("D", [64, 40, 128])
def test_errors_of_log_gates_are_those_of_the_portable_kernels(D: int) -> None:
    """Up to twice, against the same call in float64."""
    *tokens, theta, alpha, eta, M = inputs(2, 1000, 4, D)
    x = [*tokens, theta.log(), (1 - alpha).log(), eta.log(), M]
    made = run(x, log_gates=True)
    with patch.object(hopper, "choose", lambda *args, **options: hopper.Stages()):
        portable = run(x, log_gates=True)
    o, state = chunk_titans_linear(
        *(t.double() for t in x[:-1]), chunk_size=C, initial_state=M.double(), output_final_state=True,
        log_gates=True, backend="chunk",
    )  # fmt: skip
    assert state is not None
    for value, same_form, exact in zip(made, portable, [o, *state[:3]], strict=True):
        assert (value - exact).norm() <= 2 * (same_form - exact).norm()


@pytest.mark.parametrize("D", [64, 40, 128])
def test_what_is_not_finite_stays_in_its_sequence_and_head(D: int) -> None:
    x = inputs(1, 400, 2, D)
    options = {"cu_seqlens": torch.tensor([0, 100, 230, 400], dtype=torch.int32, device=DEVICE)}
    x[-1] = x[-1].expand(3, -1, -1, -1).contiguous()
    clean = run(x, **options)
    x[1][0, 100, 1], x[2][0, 101, 1] = torch.nan, torch.inf
    o, *states = run(x, **options)
    assert o[0, 100:230, 1].isnan().all()
    for rows in (slice(0, 100), slice(230, 400)):
        assert torch.equal(o[:, rows], clean[0][:, rows])
    assert torch.equal(o[:, :, 0], clean[0][:, :, 0])
    for value, before in zip(states, clean[1:], strict=True):
        assert torch.equal(value[[0, 2]], before[[0, 2]])


def test_these_calls_run_on_the_kernel_under_test() -> None:
    assert hopper.choose(torch.bfloat16, (9, 0), C, 64, packed=False, resumed=False, plain=False).forward

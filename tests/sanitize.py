"""Every kernel once, forward and backward, for compute-sanitizer.

    make sanitize        # on a machine with a GPU; or
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.sanitize

Without torch's cache every tensor is an allocation of its own, so that a step over its end is seen. The shapes fill no
tile: D, C and T divide nothing. One of the calls is packed and resumed, and decodes a token from where it ends.
"""

import torch

from titans import TitansState, chunk_titans_linear, titans_linear_step

DEVICE = "cuda"
H, D = 2, 20


def inputs(dtype: torch.dtype, tokens: tuple[int, ...], N: int) -> list[torch.Tensor]:
    """Draw q, k, v, w, b, theta, alpha, eta, M, S and the anchor."""
    normal = [torch.randn(*tokens, H, D) for _ in range(3)] + [torch.randn(H, D) for _ in range(2)]
    gates = [torch.rand(*tokens, H) for _ in range(3)]
    states = [torch.randn(N, H, D, D) for _ in range(3)]
    given = [x.to(DEVICE, dtype) for x in normal + gates] + [x.to(DEVICE) for x in states]
    return [x.requires_grad_() for x in given]


def run(dtype: torch.dtype, C: int, cu_seqlens: tuple[int, ...] | None) -> None:
    """Run one call, its backward, and a step from its final state."""
    N = 2 if cu_seqlens is None else len(cu_seqlens) - 1
    given = inputs(dtype, (2, 2 * C + 3) if cu_seqlens is None else (1, cu_seqlens[-1]), N)
    *tensors, M, S, anchor = given
    start = TitansState(M, S, anchor, torch.arange(N, device=DEVICE) % C)
    bounds = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=DEVICE)
    initial = M if cu_seqlens is None else start
    o, final = chunk_titans_linear(*tensors, 1e-6, C, initial, True, cu_seqlens=bounds, backend="triton")
    assert final is not None
    ends = [o, *final[:3]]
    torch.autograd.grad(ends, given, [torch.ones_like(x) for x in ends], allow_unused=True)
    token = [x.detach() for x in inputs(dtype, (N,), N)[:8]]
    titans_linear_step(*token, final.detach(), 1e-6, C, backend="triton")


if __name__ == "__main__":
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for C in (5, 70):
            run(dtype, C, None)
            run(dtype, C, (0, 1, 1, 40, 40 + 2 * C))
    torch.cuda.synchronize()
    print("every kernel ran")

"""`NeuralMemory` of titans-pytorch (lucidrains), where it computes the plain memory.

That is so with a memory of one matrix, no norms, a loss that is a sum, chunks of one token that read the memory's state
at the last multiple of `batch_size`, and with projections that let its inputs through.
"""

from collections.abc import Callable
from typing import Any

import torch
from titans_pytorch.memory_models import MemoryMLP
from titans_pytorch.neural_memory import NeuralMemory
from torch import Tensor, nn


class Gate:
    """A gate in the place of the number whose sigmoid it is."""

    def __init__(self, gate: Tensor) -> None:
        self.gate = gate

    def sigmoid(self) -> Tensor:
        """Return the gate."""
        return self.gate


class Pick(nn.Module):
    """In the place of a projection: some of the columns."""

    def __init__(self, pick: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.forward = pick


def squared(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the loss (1')."""
    return (prediction - target).square().sum(-1)


def module(D: int, C: int) -> NeuralMemory:
    """Return a memory for rows of q, k, v, theta, alpha and eta."""
    memory = NeuralMemory(
        D, chunk_size=1, batch_size=C, model=MemoryMLP(D, depth=1), store_memory_loss_fn=squared, pre_rmsnorm=False,
        mem_model_norm_add_residual=False, adaptive_step_transform=lambda theta: theta,
    )  # fmt: skip
    memory.to_queries = Pick(lambda x: x[..., :D])
    memory.to_keys = Pick(lambda x: x[..., D : 2 * D])
    memory.to_values = Pick(lambda x: x[..., 2 * D : 3 * D])
    memory.to_adaptive_step = Pick(lambda x: x[..., 3 * D])
    memory.to_decay_factor = Pick(lambda x: Gate(x[..., 3 * D + 1, None]))
    memory.to_momentum = Pick(lambda x: Gate(x[None, ..., 3 * D + 2, None]))
    return memory


def neural_memory(
    q: Tensor, k: Tensor, v: Tensor, w: None, b: None, theta: Tensor, alpha: Tensor, eta: Tensor, *,
    eps: float, chunk_size: int, initial_state: Tensor | None, output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Run it on (B, T, H, D), each head as a sequence of its own."""
    B, T, H, D = q.shape
    gates = (x if x.ndim == 4 else x[..., None] for x in (theta, alpha, eta))
    rows = torch.cat([q, k, v, *gates], -1).transpose(1, 2).reshape(B * H, T, 3 * D + 3)
    M = rows.new_zeros(B * H, D, D) if initial_state is None else initial_state.reshape(B * H, D, D)
    o = rows[..., :D]
    if T:
        state = (0, {"weights.0": M}, None, None, None)
        o, state = module(D, chunk_size).to(q.device)(rows, state=state)
        M = state.states[0]["weights.0"]
    final = M.reshape(B, H, D, D) if output_final_state else None
    return o.reshape(B, H, T, D).transpose(1, 2), final


neural_memory.lacks = {"normalised", "varlen", "resume", "log_gates", "half", "float64"}  # type: ignore[attr-defined]

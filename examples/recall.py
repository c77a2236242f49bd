"""Recall: a layer that is told pairs of keys and values, and is then asked for the values.

A sequence is ``k_1 v_1 ... k_P v_P`` and then the P keys in another order; the answer to a key is its value. Nothing
but the layer mixes tokens, so an answer is right only if its memory has learnt the pair inside the sequence.
Four models: the normalised and the plain memory, each with the gates of `TitansLinear` and with three sigmoids without
bias, which is customary.

    python examples/recall.py                    # the picture: examples/recall.png
    python examples/recall.py --seeds 0 1 2 --no-picture
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid
from tqdm import tqdm

from titans import TitansLinear

KEYS = VALUES = 32
PAIRS = 12
WIDTH = 64
BATCH = 32
CHANCE = 1 / VALUES


class SigmoidGates(nn.Linear):
    """The customary gates, as logs: theta, alpha and eta are sigmoids of W x."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, 3 * num_heads, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log theta, log(1 - alpha) and log eta, each (B, T, H)."""
        t, a, m = super().forward(x).float().chunk(3, dim=-1)
        return logsigmoid(t), logsigmoid(-a), logsigmoid(m)


class Model(nn.Module):
    """One layer between an embedding and a read-out."""

    def __init__(self, norm_memory: bool, sigmoid_gates: bool, chunk_size: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(KEYS + VALUES, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layer = TitansLinear(WIDTH, num_heads=4, chunk_size=chunk_size, norm_memory=norm_memory)
        if sigmoid_gates:
            self.layer.gates = SigmoidGates(WIDTH, 4)
        self.head = nn.Linear(WIDTH, VALUES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores of the values, (B, T, VALUES)."""
        x = self.embedding(tokens)
        return self.head(x + self.layer(self.norm(x))[0])


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return tokens (BATCH, 3 PAIRS) and the answers to the last PAIRS of them, (BATCH, PAIRS)."""
    keys = torch.rand(BATCH, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(VALUES, (BATCH, PAIRS), generator=generator)
    order = torch.rand(BATCH, PAIRS, generator=generator).argsort(1)
    told = torch.stack([keys, KEYS + values], dim=2).flatten(1)
    return torch.cat([told, keys.gather(1, order)], dim=1), values.gather(1, order)


def train(model: nn.Module, steps: int, seed: int, name: str = "") -> list[float]:
    """Train, and return the accuracy of every step, on sequences that the model has not seen."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    accuracies = []
    for _ in tqdm(range(steps), desc=name, leave=False):
        tokens, answers = batch(generator)
        scores = model(tokens)[:, -PAIRS:]
        loss = cross_entropy(scores.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        accuracies.append((scores.argmax(-1) == answers).float().mean().item())
    return accuracies


def final(accuracies: Sequence[float], last: int = 20) -> float:
    """Mean accuracy of the last steps."""
    return sum(accuracies[-last:]) / min(last, len(accuracies))


def run(norm_memory: bool, sigmoid_gates: bool, steps: int, seed: int) -> list[float]:
    """Train one model and print its accuracy."""
    torch.manual_seed(seed)
    name = f"{'normalised' if norm_memory else 'plain'} memory, {'three sigmoids' if sigmoid_gates else 'our gates'}"
    start = time.perf_counter()
    accuracies = train(Model(norm_memory, sigmoid_gates), steps, seed, name)
    print(f"seed {seed}, {name}: {final(accuracies):.3f} (chance {CHANCE:.3f}), {time.perf_counter() - start:.0f} s")
    return accuracies

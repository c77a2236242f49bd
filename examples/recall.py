"""Recall: a layer that is told pairs of keys and values, and is then asked for the values.

A sequence is ``k_1 v_1 ... k_P v_P`` and then the P keys in another order; the answer to a key is its value. Nothing
but the layer mixes tokens, so an answer is right only if its memory has learnt the pair inside the sequence.
Four models: the normalised and the plain memory, each with the gates of `TitansLinear` and with three sigmoids without
bias, which is customary.

    python examples/recall.py                # draws examples/recall.png
    python examples/recall.py --seeds 0 1 2 --json recall.json     # for `python -m properties atlas recall.json`

It fails unless our gates reach an accuracy of 0.98 and the three sigmoids stay below 0.1.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from datetime import date
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid
from tqdm import tqdm

from titans import TitansLinear

KEYS = VALUES = 32
PAIRS = 12
WIDTH = 64
BATCH = 32


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


def title(norm_memory: bool, sigmoid_gates: bool) -> str:
    """Name of a model."""
    return f"{'normalised' if norm_memory else 'plain'} memory, {'three sigmoids' if sigmoid_gates else 'our gates'}"


def draw(curves: dict[str, list[float]], path: Path, window: int = 10) -> None:
    """Draw accuracy over steps, each point the mean of the last few steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), dpi=100)
    for name, accuracies in curves.items():
        style = "--" if "sigmoids" in name else "-"
        axes.plot([final(accuracies[: i + 1], window) for i in range(len(accuracies))], style, label=name)
    axes.axhline(1 / VALUES, color="grey", linewidth=0.5)
    axes.set(xlabel="step", ylabel="accuracy", title=f"Recall of {PAIRS} pairs", ylim=(0, 1))
    axes.legend(loc="center right", fontsize="small", frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def run(norm_memory: bool, sigmoid_gates: bool, steps: int, seed: int) -> tuple[str, list[float], bool]:
    """Train one model; return its name, its accuracies, and whether they are as they should be."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    name, start = title(norm_memory, sigmoid_gates), time.process_time()
    accuracies = train(Model(norm_memory, sigmoid_gates), steps, seed, name)
    accuracy, seconds = final(accuracies), time.process_time() - start
    print(f"seed {seed}, {name}: {accuracy:.3f}, {seconds:.0f} s of CPU (chance {1 / VALUES:.3f})", flush=True)
    return name, accuracies, accuracy < 0.1 if sigmoid_gates else accuracy >= 0.98


def write(path: Path, runs: Sequence[tuple], results: Sequence[tuple]) -> None:
    """Write the accuracies with date, device, versions and command."""
    about = {
        "date": date.today().isoformat(),
        "device": platform.processor() or platform.machine(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "command": " ".join(["python", "examples/recall.py", *sys.argv[1:]]),
    }
    rows = [
        {"name": name, "seed": seed, "accuracies": [round(x, 4) for x in accuracies]}
        for (*_, seed), (name, accuracies, _) in zip(runs, results, strict=True)
    ]
    path.write_text(json.dumps({"kind": "titans recall", "about": about, "rows": rows}) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the four models with every seed; return the number of those that are not as they should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--picture", type=Path, default=Path(__file__).with_suffix(".png"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the accuracies of every step, too")
    options = parser.parse_args(arguments)
    models = product((True, False), (False, True))
    runs = [(*model, options.steps, seed) for seed, model in product(options.seeds, models)]
    if options.jobs == 1:
        results = [run(*each) for each in runs]
    else:
        with torch.multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            results = pool.starmap(run, runs, chunksize=1)
    # those of the first seed
    draw({name: accuracies for name, accuracies, _ in results[:4]}, options.picture)
    if options.json:
        write(options.json, runs, results)
    return sum(not is_right for _, _, is_right in results)


if __name__ == "__main__":
    raise SystemExit(main())

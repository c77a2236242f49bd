"""A small model of characters: two blocks with `TitansLinear`, on the reference manual that comes with Python.

It prints bits per character of held-out text before and after training, and those of a table of bigrams; samples; and
saves the model with its state in the middle of a sample, from where another process could go on. Minutes on a CPU.

    python examples/char_lm.py
    python examples/char_lm.py --steps 50
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from titans import TitansLinear
from titans.caches import LayerState

WIDTH = 96
LENGTH = 128
BATCH = 16
States = list[LayerState | None]


class Block(nn.Module):
    """A memory, and an MLP, each behind a norm and beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.memory = TitansLinear(WIDTH, num_heads=4)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """Return (B, T, WIDTH) and the state behind the last token."""
        o, _, state = self.memory(self.norm(x), state=state, use_cache=True)
        x = x + o
        return x + self.mlp(self.mlp_norm(x)), state


class Model(nn.Module):
    """Scores of the next character, and the states of the blocks."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, tokens: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """Return scores (B, T, characters) of tokens (B, T), and the states."""
        x, after = self.embedding(tokens), []
        for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
            x, state = block(x, state)
            after.append(state)
        return self.head(self.norm(x)), after


def bigram_bits(train: Tensor, test: Tensor, characters: int) -> float:
    """Bits per character of a table of pairs, with one more of each pair than there is."""
    counts = torch.ones(characters, characters)
    counts.index_put_((train[:-1], train[1:]), torch.ones(len(train) - 1), accumulate=True)
    bits = -(counts / counts.sum(1, keepdim=True)).log2()
    return bits[test[:-1], test[1:]].mean().item()


@torch.no_grad()
def bits_per_character(model: Model, test: Tensor) -> float:
    """Bits per character of a text that is read as one stream, piece by piece."""
    states, total = None, 0.0
    for start in range(0, len(test) - 1, 1024):
        piece = test[start : start + 1025]
        scores, states = model(piece[None, :-1], states)
        total += cross_entropy(scores[0], piece[1:], reduction="sum").item()
    return total / (len(test) - 1) / math.log(2)


def train(model: Model, text: Tensor, steps: int) -> None:
    """Train on streams side by side, whose states go on from window to window without a graph."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    windows = (len(text) // BATCH - 1) // LENGTH
    streams = text[: len(text) // BATCH * BATCH].view(BATCH, -1)
    bar = tqdm(range(steps))
    for step in bar:
        place = step % windows * LENGTH
        if place == 0:
            states = None
        window = streams[:, place : place + LENGTH + 1]
        scores, states = model(window[:, :-1], states)
        states = [state.detach() for state in states]
        loss = cross_entropy(scores.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"{loss.item() / math.log(2):.2f} bits per character")


@torch.no_grad()
def sample(model: Model, token: Tensor, states: States, length: int) -> tuple[Tensor, States]:
    """Decode from a token (1, 1), one character at a time; return (length,) and the states."""
    tokens = [token]
    for _ in range(length):
        scores, states = model(tokens[-1], states)
        tokens.append(torch.multinomial((scores[:, -1] / 0.7).softmax(-1), 1))
    return torch.cat(tokens[1:], 1)[0], states


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, sample, save and resume; return 0 if the model beats the bigrams and the resumed sample is the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=20_000, help="characters")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    manual = "\n".join(topics[name] for name in sorted(topics))
    characters = sorted(set(manual))
    text = torch.tensor([characters.index(c) for c in manual], device=options.device)
    training, test = text[: -options.held_out], text[-options.held_out :]
    model = Model(len(characters)).to(options.device)
    bigrams = bigram_bits(training, test, len(characters))
    before = bits_per_character(model, test)
    train(model, training, options.steps)
    after = bits_per_character(model, test)
    print(
        f"bits per character of {len(test)} held out: {before:.3f} before, {after:.3f} after, {bigrams:.3f} of bigrams"
    )

    def readable(tokens: Tensor) -> str:
        return "".join(characters[i] for i in tokens.tolist())

    prompt = test[None, :200]
    with torch.no_grad():
        _, states = model(prompt[:, :-1])
    first, states = sample(model, prompt[:, -1:], states, 200)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        torch.save({"model": model.state_dict(), "states": states, "token": first[None, -1:]}, file)
        saved = torch.load(file, map_location=options.device)
    torch.manual_seed(1)
    second, _ = sample(model, first[None, -1:], states, 200)
    resumed = Model(len(characters)).to(options.device)
    resumed.load_state_dict(saved["model"])
    torch.manual_seed(1)
    again, _ = sample(resumed, saved["token"], saved["states"], 200)
    print(f"--- a sample\n{readable(first)}\n--- saved, and resumed by another model\n{readable(again)}\n---")
    is_same = torch.equal(second, again)
    print(f"the resumed sample is {'the same' if is_same else 'DIFFERENT'} as without saving")
    return int(after >= bigrams or not is_same)


if __name__ == "__main__":
    raise SystemExit(main())

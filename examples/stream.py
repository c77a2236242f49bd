"""A stream of a million tokens through one layer, piece by piece: constant memory, constant cost per token.

In the middle the state is saved to a file. The second half then runs twice, from the state in memory and from the file,
and both give the same bits.

    python examples/stream.py
    python examples/stream.py --tokens 100000 --device cuda
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from titans import TitansLinear
from titans.caches import LayerState

WIDTH = 32
PIECE = 2048


def piece(index: int, device: str) -> Tensor:
    """Tokens of one piece of the stream, (1, PIECE, WIDTH), the same whenever it is asked for."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(1, PIECE, WIDTH, generator=generator).to(device)


def synchronise(device: str) -> None:
    """Wait for the GPU, so that the clock measures it."""
    if device == "cuda":
        torch.cuda.synchronize()


def run(
    layer: TitansLinear, state: LayerState | None, pieces: range, device: str, name: str
) -> tuple[LayerState | None, str, list[float]]:
    """Return the state after some pieces, a digest of all outputs, and microseconds per token of every piece."""
    digest, costs = hashlib.sha256(), []
    with tqdm(pieces, desc=name, unit_scale=PIECE, unit=" tokens") as bar, torch.no_grad():
        for index in bar:
            x = piece(index, device)
            synchronise(device)
            start = time.perf_counter()
            o, _, state = layer(x, state=state, use_cache=True)
            synchronise(device)
            costs.append((time.perf_counter() - start) / PIECE * 1e6)
            digest.update(o.cpu().numpy().tobytes())
            bar.set_postfix_str(f"{costs[-1]:.1f} us per token, {size(state)} bytes of state")
    return state, digest.hexdigest(), costs


def size(state: LayerState) -> int:
    """Bytes that the state holds, its storage included."""
    return sum(x.untyped_storage().nbytes() for part in state for x in part)


def median(costs: Sequence[float]) -> float:
    """Median cost of some pieces."""
    return sorted(costs)[len(costs) // 2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stream; return 0 if the resumed half equals the other and the state has not grown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    layer = TitansLinear(WIDTH, num_heads=2).to(options.device)
    half = max(1, options.tokens // PIECE // 2)
    middle, _, first_costs = run(layer, None, range(half), options.device, "first half")
    assert middle is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.pt"
        torch.save(middle, file)
        loaded = torch.load(file, map_location=options.device)
    rest = range(half, 2 * half)
    state, wanted, costs = run(layer, middle, rest, options.device, "second half")
    resumed, found, _ = run(layer, loaded, rest, options.device, "second half, from the file")
    assert state is not None
    assert resumed is not None
    tenth = max(1, half // 5)
    print(f"{2 * half * PIECE} tokens on {options.device}")
    print(f"bytes of state: {size(middle)} in the middle, {size(state)} at the end")
    print(
        f"us per token, median: first tenth {median(first_costs[:tenth]):.2f}, last tenth {median(costs[-tenth:]):.2f}"
    )
    print(f"resumed from the file: {'the same bits' if found == wanted else 'DIFFERENT'}")
    return int(found != wanted or size(state) != size(middle))


if __name__ == "__main__":
    raise SystemExit(main())

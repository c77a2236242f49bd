"""Time and peak memory over the length of a sequence, of ours and of peers, for the atlas.

    python -m benchmarks.lengths --json benchmarks.json                 # CPU: the PyTorch backends, fla.ops.titans
    python -m benchmarks.lengths --device cuda --json benchmarks.json   # Triton, and fla-core's TTT-Linear

Peers are timed where the dependency group `peers` is installed. TTT-Linear keeps one state and has neither forgetting
nor momentum, so ours does more work; the values of `fla.ops.titans` are wrong (see `benchmarks.cpu`).
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import fla_titans, passes, peak_memory, runs, titans, ttt
from benchmarks.workload import Inputs, Shape, make_inputs, medians
from properties.atlas.provenance import provenance

# Batch, heads, head width, chunk length, lengths, dtype.
SIZES = {
    "cpu": (1, 4, 64, 64, (256, 512, 1024, 2048, 4096), torch.float32),
    "cuda": (4, 16, 64, 64, (1024, 2048, 4096, 8192, 16384), torch.bfloat16),
}
FACETS = ("forward", "forward + backward")


@dataclass(frozen=True)
class Contender:
    """Something to time, and the longest sequences for which it takes no minutes, forward and with the backward."""

    name: str
    call: Callable[[Inputs], tuple[torch.Tensor, Any]]
    longest: tuple[int, int] = (2**20, 2**20)


def contenders(device: str, C: int) -> list[Contender]:
    """Return the call that is timed."""
    if device == "cuda":
        return [
            Contender("titans", lambda x: titans(x, C, "triton")),
            Contender("fla TTT-Linear", lambda x: ttt(x, C)),
        ]
    return [
        Contender("titans chunk", lambda x: titans(x, C, "chunk")),
        Contender("titans log", lambda x: titans(x, C, "log")),
        Contender("titans token loop", lambda x: titans(x, C, "recurrent"), (4096, 1024)),
        Contender("fla.ops.titans", lambda x: (fla_titans(x, C), None), (1024, 256)),
    ]


def measured(device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Time each contender at each length, all in turn; what does not run here is left out."""
    B, H, D, C, lengths, dtype = SIZES[device]
    for T in lengths:
        x = make_inputs(Shape(B, T, H, D, C), dtype, device)
        for number, facet in enumerate(FACETS):
            able = {
                one.name: call
                for one in contenders(device, C)
                if T <= one.longest[number]
                if (call := ready(one, x, number))
            }
            times = medians(list(able.values()), repeats, warm=0, device=device)
            for (name, call), ms in zip(able.items(), times, strict=True):
                memory = peak_memory(call, device) if device == "cuda" else None
                yield {"name": name, "facet": facet, "T": T, "ms": round(ms, 4), "MiB": memory}


def ready(one: Contender, x: Inputs, number: int) -> Callable[[], Any] | None:
    """Return a pass of a contender that has run once, or None where it does not run."""
    found: list[Callable[[], Any]] = []

    def once() -> None:
        found.append(passes(x, one.call)[number])
        found[0]()

    return None if runs(once) else found[0]


def main() -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=tuple(SIZES))
    parser.add_argument("--repeats", type=int, default=5, help="times each call is timed (5)")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="for `python -m properties atlas`")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # fla warns of packages that are not installed
    B, H, D, C, _, dtype = SIZES[options.device]
    about = provenance(["python", "-m", "benchmarks.lengths", *sys.argv[1:]], options.device)
    about["versions"] += f"; {dtype}, (B, H, D) = {(B, H, D)}, C = {C}, {torch.get_num_threads()} host thread(s)"
    rows = []
    for row in measured(options.device, options.repeats):
        print(*row.values(), flush=True)
        rows.append(row)
        # A run that is cut off has measured something.
        options.json.write_text(json.dumps({"kind": "titans times", "about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The commands `collect` and `atlas` of `python -m properties`."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from properties.atlas import collect, data, page
from properties.atlas.grids import GRIDS, MEMORIES
from properties.atlas.provenance import provenance
from properties.harness.foreign import foreign
from properties.harness.implementations import BACKENDS, Implementation, implementation
from properties.harness.sharding import Shard

IMPLEMENTATIONS = "recurrent,chunk,log,properties.adapters.ratios:chunk_titans_linear"


def describe_collect(parser: argparse.ArgumentParser) -> None:
    """Describe the command `collect`."""
    parser.set_defaults(run=run_collect, command="collect")
    parser.add_argument(
        "--backends",
        default=IMPLEMENTATIONS,
        metavar="NAMES",
        help=f"backends and MODULE:CALLABLEs ({IMPLEMENTATIONS})",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where they run (cpu)")
    parser.add_argument("--maps", default=",".join(GRIDS), metavar="NAMES", help=f"which of {','.join(GRIDS)}")
    parser.add_argument("--memories", default=",".join(MEMORIES), metavar="NAMES", help="plain or normalised (both)")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="measure the I-th of N shares of the cells")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where to write")


def describe_atlas(parser: argparse.ArgumentParser) -> None:
    """Describe the command `atlas`."""
    parser.set_defaults(run=run_atlas, command="atlas")
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="of verdicts, collect, python -m faults, benchmarks, recall"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the page")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also write the picture of the README, as PNG")


def run_collect(options: argparse.Namespace) -> int:
    """Measure, and write the file; print a line for each group as it comes."""
    torch.set_num_threads(1)
    if options.device == "cpu":
        # Triton looks at this when its kernels are imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    subjects = [subject(name, options.device) for name in options.backends.split(",")]
    grids, shard, groups = collect.selected(options.maps), Shard.parse(options.shard), []
    about, begin = provenance(["python", "-m", "properties", *sys.argv[1:]], options.device), time.monotonic()
    for found in collect.collect(subjects, grids, options.memories.split(","), shard):
        groups += found
        # A run that is cut off has measured something.
        collect.write(options.output, groups, about)
        print(f"{time.monotonic() - begin:6.1f} s: {found[0]['grid']}, {found[0]['memory']} memory", flush=True)
    return 0


def subject(name: str, device: str) -> Implementation:
    """Return a backend, or an implementation by its MODULE:CALLABLE."""
    return implementation(name, device) if name in BACKENDS else foreign(name, device)


def run_atlas(options: argparse.Namespace) -> int:
    """Write the page."""
    found: Any = data.read(options.files)
    page.write(options.output, found)
    if options.picture:
        page.write_picture(options.picture, found)
    print(f"{options.output}: {options.output.stat().st_size / 2**20:.2f} MB")
    return 0

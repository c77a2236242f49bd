"""Two processes give the results of one; the checks are in `tests.titans.ranks`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from titans.sharding import context_parallel

ROOT = Path(__file__).parents[2]


def two_ranks(device: str) -> dict[str, str]:
    environment = os.environ | {"DEVICE": device}
    command = [sys.executable, "-m", "tests.titans.ranks"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout[done.stdout.rindex("{") :])
    return found


def test_two_processes_give_the_results_of_one() -> None:
    found = two_ranks("cpu")
    assert "by_batch" in found
    assert not any(found.values()), "\n".join(f"{name}: {text}" for name, text in found.items() if text)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_results_of_one() -> None:
    found = two_ranks("cuda")
    assert not any(found.values()), "\n".join(f"{name}: {text}" for name, text in found.items() if text)


def test_an_exchange_needs_a_shard_of_tokens_or_heads() -> None:
    class Sharded:
        placements = ("Shard(0)",)

    with pytest.raises(ValueError, match=re.escape("`x` must be sharded along dimension 1 (T) or 2 (H), got Shard(0)")):
        context_parallel(Sharded())


def test_the_op_alone_does_not_import_dtensor() -> None:
    code = (
        "import sys, torch, titans; x = torch.zeros(1, 1, 1, 1); g = x[..., 0];"
        "titans.chunk_titans_linear(x, x, x, None, None, g, g, g);"
        "sys.exit('titans.sharding' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

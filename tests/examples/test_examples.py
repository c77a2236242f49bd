"""The examples run, short; and the cost of the gradient formula of `fla.ops.titans` in the task of recall.

`EXAMPLES=whole pytest tests/examples` runs recall whole, three seeds of four models: minutes.
"""

import importlib
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.examples.fla_gradient import gradient_of_fla
from titans import layer, recurrent, titans_linear

pytest.importorskip("tqdm")
WHOLE = pytest.mark.skipif(os.environ.get("EXAMPLES") != "whole", reason="minutes; EXAMPLES=whole runs it")


@pytest.fixture
def recall(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example with fewer keys, values and pairs."""
    module = importlib.import_module("examples.recall")
    for name, value in (("KEYS", 8), ("VALUES", 8), ("PAIRS", 4)):
        monkeypatch.setattr(module, name, value)
    return module


def accuracy(recall: ModuleType, norm_memory: bool, steps: int) -> float:
    torch.manual_seed(0)
    model = recall.Model(norm_memory, sigmoid_gates=False, chunk_size=4)
    return recall.final(recall.train(model, steps, seed=0))


@pytest.mark.parametrize("norm_memory", [True, False], ids=["normalised", "plain"])
def test_either_memory_learns_to_recall(recall: ModuleType, norm_memory: bool) -> None:
    assert accuracy(recall, norm_memory, steps=110) >= 0.98


def test_the_gradient_formula_of_fla_learns_more_slowly(recall: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side, token by token, after as many steps. Training makes up for a part of it: both get there in time."""
    monkeypatch.setattr(layer, "chunk_titans_linear", titans_linear)
    ours = accuracy(recall, norm_memory=True, steps=60)
    monkeypatch.setattr(recurrent, "inner_gradient", gradient_of_fla)
    theirs = accuracy(recall, norm_memory=True, steps=60)
    print(f"accuracy after 60 steps: {ours:.3f} with the gradient of the loss, {theirs:.3f} with fla's formula")
    assert theirs < ours


def test_recall_draws_its_picture(recall: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("agg")
    picture = tmp_path / "recall.png"
    # in two steps no gates reach 0.98, and chance is above 0.1 here
    assert recall.main(["--steps", "2", "--jobs", "1", "--picture", str(picture)]) == 4
    assert picture.stat().st_size > 0


@WHOLE
def test_recall_whole(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("agg")
    module = importlib.import_module("examples.recall")
    assert module.main(["--seeds", "0", "1", "2", "--picture", str(tmp_path / "recall.png")]) == 0


def test_the_character_model_saves_and_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    example = importlib.import_module("examples.char_lm")
    example.main(["--steps", "2", "--held-out", "1100", "--device", "cpu"])
    assert "the resumed sample is the same" in capsys.readouterr().out


def test_the_stream_resumes_and_does_not_grow() -> None:
    example = importlib.import_module("examples.stream")
    assert example.main(["--tokens", str(6 * example.PIECE), "--device", "cpu"]) == 0

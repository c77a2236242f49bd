"""Which tests see a GPU, and kernels that are compiled."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import pytest_configure


@pytest.mark.parametrize(
    ("markexpr", "there_is_one", "hidden"),
    [("", True, True), ("not gpu", True, True), ("gpu", True, False), ("gpu", False, True)],
)
def test_only_those_for_a_gpu_see_one(
    markexpr: str, there_is_one: bool, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_one)
    for name in ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    config: Any = SimpleNamespace(option=SimpleNamespace(markexpr=markexpr), addinivalue_line=lambda *_: None)
    pytest_configure(config)
    found = [os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")]
    assert found == (["", "1"] if hidden else [None, None])

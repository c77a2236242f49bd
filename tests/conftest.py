"""What every run needs: without a GPU Triton's interpreter, known before kernels are imported; the mark of the laws."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "law(*sections, needs): the sections of SPEC.md a property comes from")


@pytest.fixture(scope="session", autouse=True)
def products_of_the_interpreter() -> None:
    """Let products have the bits on every processor: the kernels promise the same ones for rows of any product."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from properties.harness.workarounds import sum_in_order

        sum_in_order()

"""What every run needs: the kernels interpreted, or, with `-m gpu`, compiled; the mark of the laws."""

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # One process cannot do both, so without `-m gpu` no test sees a GPU. Nothing has imported the kernels so far.
    if config.option.markexpr != "gpu" or not torch.cuda.is_available():
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    config.addinivalue_line("markers", "law(*sections, needs): the sections of SPEC.md a property comes from")


@pytest.fixture(scope="session", autouse=True)
def products_of_the_interpreter() -> None:
    """Let products have the bits on every processor: the kernels promise the same ones for rows of any product."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from properties.harness.workarounds import sum_in_order

        sum_in_order()

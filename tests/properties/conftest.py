"""The laws carry a marker that `properties/conftest.py` declares in its own runs."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "law(*sections, needs): the sections of SPEC.md a property comes from")

"""A pytest plugin (`-p tests.properties.broken`) that has the suite verify an op without its factor 2."""

import os
from pathlib import Path
from typing import Any

import pytest

from properties import implementations
from properties.checks import Implementation
from tests.properties.wrong import Half, implementation


def wrong(name: str, device: str) -> Implementation:
    """What stands in for every backend."""
    return implementation(Half())


implementations.implementation = wrong


def pytest_configure(config: pytest.Config) -> None:
    """Save failures elsewhere."""
    for plugin in config.pluginmanager.get_plugins():
        if hasattr(plugin, "FIXTURES"):
            module: Any = plugin
            module.FIXTURES = Path(os.environ["FIXTURES"])

"""A pytest plugin (`-p tests.properties.broken`) that has the suite verify an op without its factor 2."""

import os
from pathlib import Path

from properties.harness import implementations, plugin
from properties.harness.implementations import Implementation
from tests.properties.wrong import Half, implementation


def wrong(name: str, device: str) -> Implementation:
    """What stands in for every backend."""
    return implementation(Half())


implementations.implementation = wrong
# Failures are saved elsewhere.
plugin.FIXTURES = Path(os.environ["FIXTURES"])

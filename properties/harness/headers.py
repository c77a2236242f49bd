"""What a file of verdicts says of its run, beside the verdicts."""

import importlib.metadata
import platform
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from properties.harness.implementations import devices

# The last line of the header, until a run ends.
UNENDED = "the run has not ended"
# Packages that decide what is computed.
PACKAGES = ("torch", "triton", "numpy", "mpmath", "gmpy2", "hypothesis")


def header(
    command: str,
    begin: float,
    about: Iterable[str],
    profile: str,
    seed: str,
    shard: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Return the header of a run that ends now; see `verdicts.schema.json`.

    Parameters
    ----------
    command : str
    begin : float
        When the run began, by `time.monotonic`.
    about : iterable of str
        The header that was printed.
    profile, seed : str
    shard : str or None
    device : str or None
        The devices of the machine; None: this process looks for them.
    """
    return {
        "about": list(about),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begin, 1),
        "command": command,
        "device": devices() if device is None else device,
        "versions": versions(),
        "shard": shard,
        "profile": profile,
        "seed": seed,
    }


def line_of_versions() -> str:
    """Return the versions in a line, as every run prints them."""
    found = {name: version for name, version in versions().items() if name not in ("triton", "gmpy2", "titans-linear")}
    return "titans: " + ", ".join(f"{name} {version}" for name, version in found.items())


def versions() -> dict[str, str]:
    """Return the versions of all that computes, by the name of the package."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if own := getattr(sys.modules.get("titans"), "__version__", None):
        found["titans-linear"] = own
    return found

"""The kernels that Triton compiles in this process: a run that ends with its time says how much they took of it."""

import importlib.util
from typing import Any


class Compiling:
    """Counts from `watch` on.

    Attributes
    ----------
    kernels : int
        How many were compiled, and not found in Triton's cache.
    seconds : float
        How long that took.
    """

    def __init__(self) -> None:
        self.kernels, self.seconds = 0, 0.0

    def watch(self) -> None:
        """Let Triton tell of every kernel; without Triton, or in a version that does not, none is counted."""
        if importlib.util.find_spec("triton") is None:
            return
        import triton

        knobs: Any = getattr(getattr(triton, "knobs", None), "compilation", None)
        if hasattr(knobs, "listener"):
            knobs.listener = self.note

    def note(self, *, times: Any, cache_hit: bool, **others: Any) -> None:
        """Count a kernel."""
        if not cache_hit:
            self.kernels += 1
            self.seconds += times.total * 1e-6

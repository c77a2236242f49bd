"""How many examples Hypothesis draws, and how: the profiles."""

import os
from typing import Any

from hypothesis import HealthCheck, settings

from properties.harness import workarounds

# The first example of a process imports, compiles and warms up: no deadline, and slowness is no sign of ill health. Nor
# are rejected problems: the less an implementation claims, the fewer problems exercise a law.
COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
    "backend": workarounds.INDEPENDENT,
}
settings.register_profile("dev", max_examples=50, **COMMON)
settings.register_profile("smoke", max_examples=4, database=None, **COMMON)
settings.register_profile("ci", max_examples=50, derandomize=True, database=None, print_blob=False, **COMMON)
# Only with its own backend does Hypothesis follow `target`.
settings.register_profile("deep", max_examples=2000, **COMMON | {"backend": "hypothesis"})
# Those with a database of failures.
KEEPING = ("dev", "deep")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

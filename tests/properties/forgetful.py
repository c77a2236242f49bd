"""An implementation whose import forgets modules of others, and where imports look."""

import sys
from typing import Any

import titans

FORGOTTEN = ("pytest", "_pytest", "properties", "hypothesis", "numpy", "torch")


def memory(*arguments: Any, **options: Any) -> Any:
    """Compute the right results."""
    return titans.chunk_titans_linear(*arguments, **options)


memory.state = titans.TitansState  # type: ignore[attr-defined]
for name in [name for name in sys.modules if name.partition(".")[0] in FORGOTTEN]:
    del sys.modules[name]
sys.modules["json"] = None  # type: ignore[assignment]
sys.path.clear()
sys.meta_path.clear()

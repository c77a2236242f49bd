"""Titans linear memory (momentum, forgetting, inner gradient with LayerNorm), chunked and differentiable."""

from titans.api import chunk_titans_linear, titans_linear, titans_linear_step
from titans.arguments import TitansState
from titans.decoding import DecodeState
from titans.gates import check_gates
from titans.layer import TitansLinear
from titans.partition import decodes_alike, grid
from titans.prefill import titans_linear_prefill
from titans.validation import check_layout

__all__ = [
    "DecodeState",
    "TitansLinear",
    "TitansState",
    "__version__",
    "check_gates",
    "check_layout",
    "chunk_titans_linear",
    "decodes_alike",
    "grid",
    "titans_linear",
    "titans_linear_prefill",
    "titans_linear_step",
]
__version__ = "0.1.0"

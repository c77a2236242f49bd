"""Titans linear memory (momentum, forgetting, inner gradient with LayerNorm), chunked and differentiable."""

from titans.api import chunk_titans_linear, titans_linear, titans_linear_step
from titans.arguments import TitansState
from titans.gates import check_gates

__all__ = ["TitansState", "check_gates", "chunk_titans_linear", "titans_linear", "titans_linear_step"]

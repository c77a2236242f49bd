"""Titans linear memory (momentum, forgetting, inner gradient with LayerNorm), chunked and differentiable."""

from titans.call import TitansState
from titans.gates import check_gates
from titans.op import chunk_titans_linear, titans_linear, titans_linear_step

__all__ = ["TitansState", "check_gates", "chunk_titans_linear", "titans_linear", "titans_linear_step"]

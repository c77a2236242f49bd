"""`fla.ops.titans` of fla-core (group `peers`), as it is: whatever else is called here is theirs too.

`chunk_titans_linear` is their export; `token_by_token` their loop, and `chunk_titans_linear_in_linear_space` their
chunks with the coefficients that they have as ratios of products, and do not use.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

from fla.ops.titans import naive
from torch import Tensor


def adapter(use_chunk: bool, coefficients: Callable[..., Any] = naive.combine_params_log) -> Callable[..., Any]:
    """Return one of their forms."""

    def call(
        q: Tensor, k: Tensor, v: Tensor, w: Tensor, b: Tensor, theta: Tensor, alpha: Tensor, eta: Tensor, *,
        initial_state: Any, **options: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        gates = (x if x.ndim == 4 else x[..., None] for x in (theta, alpha, eta))
        # There is no room for a momentum: of a state they take M.
        M = getattr(initial_state, "M", initial_state)
        with mock.patch.object(naive, "combine_params_log", coefficients):
            o, final = naive.chunk_titans_linear_ref(
                q, k, v, w, b, *gates, initial_state=M, use_chunk=use_chunk, **options
            )
        return o.to(q.dtype), final

    # They claim to resume, from M alone.
    call.lacks = {"plain", "varlen", "log_gates", "offset", "float64"}  # type: ignore[attr-defined]
    return call


chunk_titans_linear = adapter(use_chunk=True)
chunk_titans_linear.log_space = True  # type: ignore[attr-defined]
chunk_titans_linear_in_linear_space = adapter(use_chunk=True, coefficients=naive.combine_params)
token_by_token = adapter(use_chunk=False)

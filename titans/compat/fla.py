"""`chunk_titans_linear` with the signature of `fla.ops.titans`: only the import changes.

What differs in the numbers, and why, is in the docstring of the function and, measured, in MIGRATION.md.
"""

from __future__ import annotations

from torch import Tensor

from titans import api


def chunk_titans_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    b: Tensor,
    theta: Tensor,
    alpha: Tensor,
    eta: Tensor,
    eps: float,
    chunk_size: int,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Titans linear memory, head first, as `fla.ops.titans.chunk_titans_linear` of fla-core 0.6.0 takes it.

    The numbers differ from theirs:

    - The inner gradient is that of the loss. Theirs leaves the first term undivided by rstd * D: another vector, D
      times too long at variance 1.
    - T may be any number. Theirs drops the tokens behind the last whole chunk.
    - The gates 0 and 1 are legal. Theirs takes the log of 1 - alpha, eta and theta: NaN at alpha = 1, and NaN gradients
      at eta = 0 and theta = 0.
    - Gates of half precision are raised to float32 first. Theirs computes its coefficients in half precision.
    - float64 is computed in float64. Theirs raises.

    And alike: the returned state is M alone. The momentum and a started chunk are lost, so a sequence that is split
    and resumed differs from one call. `titans.chunk_titans_linear` returns, and takes, a `TitansState`, which resumes
    exactly.

    Parameters
    ----------
    q, k, v : Tensor, shape (B, H, T, D)
    w, b : Tensor, shape (H, D), or any shape of as many elements, as (H, 1, D)
    theta, alpha, eta : Tensor, shape (B, H, T, 1) or (B, H, T)
    eps : float
    chunk_size : int
    initial_state : Tensor, shape (B, H, D, D), or None
        M at the start; None: zeros.
    output_final_state : bool

    Returns
    -------
    o : Tensor, shape (B, H, T, D)
        In the dtype of `v`, as theirs.
    M : Tensor, shape (B, H, D, D), or None

    Raises
    ------
    TypeError, ValueError
        As `titans.chunk_titans_linear`, whose layout (B, T, H, D) the messages give.
    """
    H, D = q.shape[1], q.shape[-1]
    q, k, v, theta, alpha, eta = (x.transpose(1, 2) for x in (q, k, v, theta, alpha, eta))  # (B, T, H, ...)
    w, b = w.reshape(H, D), b.reshape(H, D)
    o, state = api.chunk_titans_linear(
        q, k, v, w, b, theta, alpha, eta, eps, chunk_size, initial_state, output_final_state
    )
    return o.transpose(1, 2), None if state is None else state.M

"""`chunk_titans_linear`, as others would have it: adapters with less and less in them."""

from typing import Any

from torch import Tensor

import titans


def without_backward(*arguments: Any, **options: Any) -> Any:
    """Give results that cannot be differentiated."""
    o, state = titans.chunk_titans_linear(*(x.detach() for x in arguments), **options)
    return o, state if state is None else state.detach()


without_backward.lacks = {"plain", "backward"}  # type: ignore[attr-defined]
# Of its own accord `titans` keeps coefficients as logs where gates are.
without_backward.log_space = lambda call: call.log_gates  # type: ignore[attr-defined]


def resumes_between_chunks(*arguments: Any, initial_state: Any = None, chunk_size: int = 16, **options: Any) -> Any:
    """Take M and S, and know nothing of an anchor."""
    if isinstance(initial_state, tuple):
        M, S, *_ = initial_state
        initial_state = titans.TitansState(M, S, M, M.new_zeros(len(M), dtype=int))
    o, state = titans.chunk_titans_linear(*arguments, chunk_size=chunk_size, initial_state=initial_state, **options)
    return o, None if state is None else (state.M, state.S, None, None)


resumes_between_chunks.lacks = {"offset"}  # type: ignore[attr-defined]
resumes_between_chunks.log_space = without_backward.log_space  # type: ignore[attr-defined]


def memory_alone(*arguments: Any, **options: Any) -> Any:
    """Return M for a final state, and claim that it resumes."""
    o, state = titans.chunk_titans_linear(*arguments, **options | {"initial_state": first(options["initial_state"])})
    return o, state if state is None else state.M


memory_alone.lacks = {"offset", "varlen"}  # type: ignore[attr-defined]
memory_alone.log_space = without_backward.log_space  # type: ignore[attr-defined]


def first(state: Any) -> Any:
    """Return the M of a state."""
    return state[0] if isinstance(state, tuple) else state


def outputs_alone(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Any,
    b: Any,
    theta: Tensor,
    alpha: Tensor,
    eta: Tensor,
    eps: float,
    chunk_size: int,
) -> Tensor:
    """Know neither states nor options."""
    if q.dtype != theta.dtype or str(q.dtype) != "torch.float32":
        raise TypeError("float32 only")
    return titans.chunk_titans_linear(q, k, v, w, b, theta, alpha, eta, eps, chunk_size)[0]


OUTPUTS_ALONE = "initial_state,final_state,varlen,log_gates,half,float64"
NOT_CALLABLE = 1


def token_by_token(*arguments: Any, **options: Any) -> Any:
    """The definition, which could resume at any token with the same bits."""
    return titans.titans_linear(*arguments, **options)


token_by_token.claims = ("prefix_bits", "resume_bits")  # type: ignore[attr-defined]
token_by_token.grid = lambda dtype, D, C: 3  # type: ignore[attr-defined]

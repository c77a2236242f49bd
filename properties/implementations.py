"""The implementations of this repository, with what they claim."""

import functools

import torch

from properties.checks import CLAIMS, Implementation

BACKENDS = ("recurrent", "chunk", "log", "triton")
DEFAULT = "recurrent,chunk,log,triton"


def implementation(backend: str, device: str) -> Implementation:
    """Return one backend of `titans` on one device."""
    import titans

    if backend not in BACKENDS:
        raise ValueError(f"a backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    lacks = {
        "recurrent": {"batch_invariant"},
        "chunk": {"batch_invariant"},
        # The exponential of a sum of logs is not the exact product.
        "log": {"batch_invariant", "exact"},
        # Its interpreter takes bfloat16 for something else, and its time.
        "triton": {"float64"} | (set() if device == "cuda" else {"bfloat16", "large"}),
    }
    call, step = titans.chunk_titans_linear, titans.titans_linear_step
    return Implementation(
        name=backend,
        call=functools.partial(call, backend=backend),
        step=functools.partial(step, backend=backend),
        state=titans.TitansState,
        claims=CLAIMS - lacks[backend],
        device=device,
        log_space=backend == "log",
        blocks=backend == "triton",
        tensor_cores=(backend, device) == ("triton", "cuda"),
        share=0.1 if (backend, device) == ("triton", "cpu") else 1,
    )


def devices() -> str:
    """Name the devices there are."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu only"

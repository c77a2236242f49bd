"""Which backend runs a call: one decision, made once per call."""

from __future__ import annotations

import warnings
from typing import Literal, get_args

import torch

from titans.arguments import Call

Backend = Literal["triton", "chunk", "log", "recurrent"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def choose(call: Call, wanted: Backend | None, otherwise: Backend) -> tuple[Backend, str | None]:
    """Choose the backend of a call.

    Parameters
    ----------
    call : Call
    wanted : Backend, or None
        The caller's choice; None: the kernels for CUDA tensors where they take the call.
    otherwise : Backend
        The backend of all other calls without a choice of the caller's.

    Returns
    -------
    backend : Backend
    against : str, or None
        Why the kernels cannot take the call, as the end of an error message; None if they can, or if the caller chose
        another backend.

    Warns
    -----
    UserWarning
        If the kernels cannot take a call on CUDA without a choice of the caller's.
    """
    if wanted is not None and wanted != "triton":
        return wanted, None
    if wanted is None and not call.q.is_cuda:
        return otherwise, "takes CUDA tensors"
    against = _reason_against_kernels(call)
    # float64 is for the PyTorch backends, and known to be slow
    if wanted is None and against is not None and call.q.dtype != torch.float64 and not torch.compiler.is_compiling():
        warnings.warn(f"backend {otherwise!r} runs this call, slowly: 'triton' {against}", stacklevel=4)
    return ("triton" if wanted or against is None else otherwise), against


def chosen(call: Call, wanted: Backend | None, otherwise: Backend) -> Backend:
    """Choose the backend of a call, or raise ValueError where the kernels are asked for and cannot take it."""
    backend, against = choose(call, wanted, otherwise)
    if backend == "triton" and against:
        raise ValueError(f"`backend` 'triton' {against}")
    return backend


def _reason_against_kernels(call: Call) -> str | None:
    try:
        from titans import kernels
    except ModuleNotFoundError:
        return "needs the package triton, which is not installed"
    return kernels.reason_against(call)

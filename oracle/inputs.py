"""Arguments and results of a call, their cotangents and gradients, and the checks of arguments."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from oracle.precision import AGREED_DIGITS, MOST_DIGITS, RESTING_DIGITS, Numbers, doubles

GATES = ("theta", "alpha", "eta")


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of the op, as torch tensors of any float dtype on any device.

    Parameters
    ----------
    q, k, v : Tensor, shape (B, T, H, D)
    w, b : Tensor, shape (H, D), or None
        Both None: the plain memory.
    theta, alpha, eta : Tensor, shape (B, T, H)
        With `log_gates`: log theta, log(1 - alpha) and log eta, where -inf is the exact zero.
    eps : float
        Enters as the float64 that it is.
    chunk_size : int
    M, S, anchor : Tensor, shape (N, H, D, D), or None
        Initial state. M and S default to zero; an anchor of None is the same variable as M.
    offset : tuple of N int, or None
        Tokens already consumed of the running chunk; None means 0.
    cu_seqlens : tuple of N + 1 int, or None
        Bounds of packed sequences (B = 1); None means N = B sequences of T tokens.
    log_gates : bool
    """

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor | None
    b: Tensor | None
    theta: Tensor
    alpha: Tensor
    eta: Tensor
    eps: float = 1e-6
    chunk_size: int = 16
    M: Tensor | None = None
    S: Tensor | None = None
    anchor: Tensor | None = None
    offset: tuple[int, ...] | None = None
    cu_seqlens: tuple[int, ...] | None = None
    log_gates: bool = False

    @property
    def sequences(self) -> list[tuple[int, int, int]]:
        """Batch row, first token and end of each of the N sequences."""
        B, T = self.q.shape[:2]
        if self.cu_seqlens is None:
            return [(row, 0, T) for row in range(B)]
        return [(0, start, end) for start, end in pairwise(self.cu_seqlens)]

    @property
    def offsets(self) -> tuple[int, ...]:
        """`offset`, or its default."""
        return (0,) * len(self.sequences) if self.offset is None else self.offset

    @property
    def start_digits(self) -> int:
        """Precision of the first run: more than the usual where the inputs span more decades than that."""
        tensors = [self.q, self.k, self.v, self.w, self.b, self.M, self.S, self.anchor]
        if not self.log_gates:
            tensors += [self.theta, self.alpha, self.eta]
        sizes = np.concatenate(
            [np.abs(doubles(x)).ravel() for x in tensors if x is not None] + [np.array([1.0, self.eps])]
        )
        logs = np.log10(sizes[sizes > 0])
        # At most an eighth of the limit, so that three doublings remain.
        return min(max(RESTING_DIGITS, AGREED_DIGITS + math.ceil(float(np.ptp(logs)))), MOST_DIGITS // 8)


@dataclass(frozen=True)
class State:
    """State after the last token: M, S, anchor of shape (N, H, D, D), and N offsets."""

    M: Numbers
    S: Numbers
    anchor: Numbers
    offset: tuple[int, ...]


@dataclass(frozen=True)
class Output:
    """Outputs o, shape (B, T, H, D), and the final state."""

    o: Numbers
    state: State


@dataclass(frozen=True)
class Cotangents:
    """Cotangents of o, shape (B, T, H, D), and of the final M, S and anchor, shape (N, H, D, D); None is zero."""

    o: Tensor
    M: Tensor | None = None
    S: Tensor | None = None
    anchor: Tensor | None = None


@dataclass(frozen=True)
class Gradient:
    """Gradients with the shapes of the tensors in `Inputs`.

    w and b are None for the plain memory. theta, alpha and eta are with respect to the tensors passed: the logs with
    `log_gates`, and 0 there at -inf. M and S are there even if they were not passed. If no anchor was passed it is the
    same variable as M: M has its gradient, and `anchor` is zero.
    """

    q: Numbers
    k: Numbers
    v: Numbers
    w: Numbers | None
    b: Numbers | None
    theta: Numbers
    alpha: Numbers
    eta: Numbers
    M: Numbers
    S: Numbers
    anchor: Numbers


def check(inputs: Inputs) -> None:
    """Raise a ValueError that names the argument if a value is not finite or the parts contradict each other."""
    B, T, H, D = inputs.q.shape
    N, C, bounds = len(inputs.sequences), inputs.chunk_size, inputs.cu_seqlens
    if (inputs.w is None) != (inputs.b is None):
        raise ValueError("`w` and `b` must be given together")
    if C < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {C}")
    if not (math.isfinite(inputs.eps) and inputs.eps >= 0):
        raise ValueError(f"`eps` must be finite and not negative, got {inputs.eps}")
    if bounds is not None and (B != 1 or bounds[0] != 0 or bounds[-1] != T or list(bounds) != sorted(bounds)):
        raise ValueError(f"`cu_seqlens` must rise from 0 to T = {T} with B = 1, got {bounds} with B = {B}")
    if len(inputs.offsets) != N or not all(0 <= offset < C for offset in inputs.offsets):
        raise ValueError(f"`offset` must hold N = {N} numbers from 0 to {C - 1}, got {inputs.offset}")
    for names, shape in (
        (("q", "k", "v"), (B, T, H, D)),
        (("w", "b"), (H, D)),
        (GATES, (B, T, H)),
        (("M", "S", "anchor"), (N, H, D, D)),
    ):
        for name in names:
            check_tensor(name, getattr(inputs, name), shape, inputs.log_gates and name in GATES)


def check_cotangents(cotangents: Cotangents, inputs: Inputs) -> None:
    """Raise a ValueError that names the cotangent if a value is not finite or a shape is wrong."""
    N, (H, D) = len(inputs.sequences), inputs.q.shape[2:]
    check_tensor("cotangents.o", cotangents.o, tuple(inputs.q.shape))
    for name in ("M", "S", "anchor"):
        check_tensor(f"cotangents.{name}", getattr(cotangents, name), (N, H, D, D))


def check_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...], is_log_gate: bool = False) -> None:
    """Raise a ValueError unless the tensor has this shape and only finite values (or the -inf of a log gate)."""
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}")
    x = doubles(tensor)
    wrong = ~np.isfinite(x) & ~(is_log_gate & np.isneginf(x))
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        rule = "finite or -inf" if is_log_gate else "finite"
        raise ValueError(f"`{name}` must be {rule}, got {x[index]} at {index}")

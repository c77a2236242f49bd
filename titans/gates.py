"""The gates, from how the caller passes them to how the stages use them: theta, a = 1 - alpha, eta, or their logs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from titans.validation import check_flags, check_numbers

Gates = tuple[Tensor, Tensor, Tensor]


def linear_gates(passed: Gates, log_gates: bool) -> Gates:
    """theta, a and eta from theta, alpha and eta; with `log_gates`, from log theta, log(1 - alpha) and log eta."""
    theta, alpha, eta = passed
    if log_gates:
        return theta.exp(), alpha.exp(), eta.exp()
    return theta, 1 - alpha, eta


def logs_of_gates(passed: Gates, log_gates: bool) -> Gates:
    """log theta, log a and log eta; a gate of zero has the log -inf."""
    theta, alpha, eta = passed
    if log_gates:
        return theta, alpha, eta
    return theta.log(), torch.log1p(-alpha), eta.log()


def linear_gates_vjp(dgates: Gates, gates: Gates, log_gates: bool) -> Gates:
    """Cotangents of what the caller passed, given those of theta, a and eta; zero at a log of -inf."""
    (dtheta, da, deta), (theta, a, eta) = dgates, gates
    if log_gates:
        return theta * dtheta, a * da, eta * deta
    return dtheta, -da, deta


def check_gates(theta: Tensor, alpha: Tensor, eta: Tensor, *, log_gates: bool = False) -> None:
    """Check the values of the gates, which the op itself never inspects; synchronises the GPU.

    Parameters
    ----------
    theta : Tensor
        Inner learning rate, in [0, inf); with `log_gates`, its log, in [-inf, inf).
    alpha : Tensor
        Forgetting, in [0, 1]; with `log_gates`, log(1 - alpha), in [-inf, 0].
    eta : Tensor
        Momentum decay, in [0, 1]; with `log_gates`, its log, in [-inf, 0].
    log_gates : bool

    Raises
    ------
    TypeError
        If a gate is not a dense tensor in a dtype of the op.
    ValueError
        If a value is NaN or out of its range; the message gives the gate, the range and the first such value. Or if the
        values cannot be read, as those of meta tensors or under `vmap`.
    """
    check_flags(log_gates=log_gates)
    high = 0.0 if log_gates else 1.0
    low = -torch.inf if log_gates else 0.0
    for name, gate, top in (("theta", theta, torch.inf), ("alpha", alpha, high), ("eta", eta, high)):
        check_numbers(name, gate)
        if gate.is_meta or isinstance(gate, FakeTensor) or torch._C._functorch.is_batchedtensor(gate):
            raise ValueError(f"`{name}` must have values to be read, got a meta or fake tensor, or one under vmap")
        inside = (gate >= low) & (gate <= top) & (gate < torch.inf)
        if not bool(inside.all()):
            where = tuple((~inside).nonzero()[0].tolist())
            closing = ")" if top == torch.inf else "]"
            rule = f"{'[' if low == 0 or log_gates else '('}{low:g}, {top:g}{closing}"
            raise ValueError(f"`{name}` must lie in {rule}, got {gate[where].item()} at {where}")

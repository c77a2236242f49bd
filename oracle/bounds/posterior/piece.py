"""One piece, forward and backward, of N problems at once: (B2), (B7) and (B16) on a tape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oracle.bounds.error_model import ErrorModel
from oracle.bounds.piece import OPERANDS, OPERANDS_OF_ROWS, RECALL
from oracle.bounds.posterior.coefficients import coefficients, gates, gates_vjp
from oracle.bounds.posterior.polynomial import Polynomial, concatenate, leaf
from oracle.bounds.posterior.stages import inner_gradient, inner_gradient_vjp, norm, norm_vjp
from oracle.bounds.posterior.tape import Tape
from oracle.bounds.sequence import LOG_GATE_ROUNDINGS


@dataclass(frozen=True)
class Arguments:
    """N pieces of L tokens in float64.

    Attributes
    ----------
    q, k, v : Tensor, shape (N, L, D)
    w, b : Tensor, shape (N, 1, D), or None
    theta, alpha, eta : Tensor, shape (N, L)
        Logs with `log_gates`.
    M, S, anchor : Tensor, shape (N, D, D)
    do : Tensor, shape (N, L, D)
    dM, dS, danchor : Tensor, shape (N, D, D)
        Cotangents of the state that leaves the piece.
    completes : bool
        Whether the last token completes a chunk.
    shared : bool
        Whether the anchor is the same variable as M.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor | None
    b: Tensor | None
    theta: Tensor
    alpha: Tensor
    eta: Tensor
    M: Tensor
    S: Tensor
    anchor: Tensor
    do: Tensor
    dM: Tensor
    dS: Tensor
    danchor: Tensor
    eps: float
    log_gates: bool
    completes: bool
    shared: bool


@dataclass(frozen=True)
class Result:
    """One result of N pieces, shape (N, ...).

    Attributes
    ----------
    polynomial : Polynomial
        The last segment before it is rounded; its value has the graph to all errors.
    size : Tensor
        The error that arises in it.
    radius : Tensor
        The coarse radius, (B15).
    """

    polynomial: Polynomial
    size: Tensor
    radius: Tensor


class PieceSegments:
    """All segments of N pieces; `results` has o, M, S, anchor and dq ... danchor by name."""

    def __init__(self, arguments: Arguments, arithmetic: ErrorModel) -> None:
        self.arguments, self.L, self.D = arguments, arguments.q.shape[1], arguments.q.shape[2]
        # (B13): no monomial of the reverse pass meets more
        self.tape = Tape(arithmetic, 10 * (self.L + self.D) + 100)
        self.gates = gates(arguments.theta, arguments.alpha, arguments.eta, arguments.log_gates, arithmetic)
        self.coefficients = coefficients(self.gates)
        t = torch.arange(1.0, self.L + 1, dtype=torch.float64, device=arguments.q.device)[:, None]
        per_token = self.gates.per_token + 1
        self.row_roundings = per_token * t + self.D + 8
        self.state_roundings = per_token * self.L + 8
        self.gate_roundings = per_token * self.L + max(2 * self.D, min(self.D**2, 2 * self.D + 16)) + 10
        self.q, self.k, self.v, self.M, self.S, self.anchor, self.do, self.dM, self.dS, self.danchor = (
            leaf(getattr(arguments, name)) for name in ("q", "k", "v", "M", "S", "anchor", "do", "dM", "dS", "danchor")
        )
        self.w, self.b = (None if x is None else leaf(x) for x in (arguments.w, arguments.b))
        self.overlap = (self.q @ self.k.mT).map(torch.tril)  # (N, L, L)
        self.results: dict[str, Result] = {}
        self._run()

    def sharp(self, name: str, functionals: Tensor) -> Tensor:
        """Sharp radii of functionals of a result, (B15).

        Parameters
        ----------
        name : str
        functionals : Tensor, shape (F, N, ...)
            Each is one functional of the result for every piece.

        Returns
        -------
        Tensor, shape (F, N)
        """
        result = self.results[name]
        own = (functionals.abs() * result.size).flatten(2).sum(-1)
        return own + self.tape.chained(result.polynomial.value, functionals)

    def _run(self) -> None:
        """Eqs. (2) to (5), then their reverse."""
        tape, G, n = self.tape, self.coefficients.G[:, 1:], self.coefficients.n[:, 1:]
        weights, G_T, n_T = G[..., 2:] * self.overlap, G[:, -1, 2:, None], n[:, -1, 2:, None]
        y = self.k @ self.anchor
        inner = None
        if self.w is None or self.b is None:
            u = tape.local(y - self.v, self.D + 1, RECALL)
        else:
            y = tape.local(y, self.D, RECALL)
            inner = inner_gradient(y, self.v - self.k, self.w, self.b, self.arguments.eps, tape)
            u = inner.u
        u = tape.cut(u)
        self._states(u, G_T, n_T)
        reads = G[..., :1] * (self.q @ self.M) + G[..., 1:2] * (self.q @ self.S) - (weights @ u).times(2)
        dy, read_x = self._outputs(tape.mixed(reads, self.row_roundings, OPERANDS))

        dM = tape.mixed(self.dM + self.danchor, 1) if self.arguments.completes else self.dM
        du = (weights.mT @ dy + G_T * (self.k @ dM) + n_T * (self.k @ self.dS)).times(-2)
        du = tape.mixed(du, self.row_roundings.flip(0), OPERANDS)
        pairs = G[..., 2:] * (dy @ u.mT)  # (N, L, L)
        dk = (pairs.mT @ self.q + G_T * (u @ dM.mT) + n_T * (u @ self.dS.mT)).times(-2)
        d_recall, dv = du, -du
        if inner is not None and self.w is not None and read_x is not None:
            d_recall, dz, dw = inner_gradient_vjp(inner, self.w, du, tape)
            dk, dv = dk + dz, -dz
            self._summed("dw", dw + self.do * read_x)
            self._summed("db", dz + self.do)
        self._segment("dv", dv)
        self._mixed("dk", dk + d_recall @ self.anchor.mT, self.row_roundings.flip(0) + 2, OPERANDS_OF_ROWS)
        dq = G[..., :1] * (dy @ self.M.mT) + G[..., 1:2] * (dy @ self.S.mT) - (pairs @ self.k).times(2)
        self._mixed("dq", dq, self.row_roundings, OPERANDS_OF_ROWS)
        self._states_vjp(dy, dM, d_recall)
        self._gates_vjp(dy, dM, u)

    def _outputs(self, y: Polynomial) -> tuple[Polynomial, Polynomial | None]:
        """Eq. (5) at y = q M, and its reverse: the cotangent of y, cut, and norm(y)."""
        if self.w is None or self.b is None:
            self._segment("o", y)
            return self.do, None
        tape = self.tape
        read = norm(y, self.arguments.eps, tape)
        o = y + read.x * self.w + self.b
        size = tape.size(o, 3)
        self.results["o"] = Result(o, size, size + tape.pulled(o.value))
        dx = tape.local(self.do * self.w, 1)
        # do may be added before the mean is taken away, so that D = 1 is no exception here
        dy = tape.local(self.do + norm_vjp(read, dx, None, tape), self.D + 4)
        return tape.cut(dy), read.x

    def _states(self, u: Polynomial, G_T: Polynomial, n_T: Polynomial) -> None:
        beta, f, m = self._ends()
        M = beta * self.M + f * self.S - (self.k.mT @ (G_T * u)).times(2)
        S = m * self.S - (self.k.mT @ (n_T * u)).times(2)
        self._mixed("M", M, self.state_roundings, OPERANDS)
        self._mixed("S", S, self.state_roundings, OPERANDS)
        self._segment("anchor", self.anchor)
        if self.arguments.completes:
            self.results["anchor"] = self.results["M"]

    def _ends(self) -> tuple[Polynomial, Polynomial, Polynomial]:
        """beta, f and m after the last token, (N, 1, 1)."""
        G, n = self.coefficients.G[:, -1:], self.coefficients.n[:, -1:]
        return G[..., :1], G[..., 1:2], n[..., 1:2]

    def _states_vjp(self, dy: Polynomial, dM: Polynomial, d_recall: Polynomial) -> None:
        beta, f, m = self._ends()
        G = self.coefficients.G[:, 1:]
        dM_0 = beta * dM + self.q.mT @ (G[..., :1] * dy)
        dS_0 = f * dM + m * self.dS + self.q.mT @ (G[..., 1:2] * dy)
        danchor = self.k.mT @ d_recall
        if not self.arguments.completes:
            danchor = danchor + self.danchor
        if self.arguments.shared:
            dM_0, danchor = dM_0 + danchor, leaf(torch.zeros_like(danchor.size))
        self._mixed("dM", dM_0, self.state_roundings, OPERANDS)
        self._mixed("dS", dS_0, self.state_roundings, OPERANDS)
        self._mixed("danchor", danchor, self.state_roundings, OPERANDS)

    def _gates_vjp(self, dy: Polynomial, dM: Polynomial, u: Polynomial) -> None:
        """Bound (B17)."""

        def products(X: Polynomial, d: Polynomial) -> Polynomial:
            return (X * d).sum()

        tokens = (self.overlap * (dy @ u.mT)).times(-2)
        rows = concatenate([products(self.q @ self.M, dy), products(self.q @ self.S, dy), tokens], -1)
        ends = []
        for d in (dM, self.dS):
            whole = [products(X, d).map(lambda x: x.sum(-2)) for X in (self.M, self.S)]
            ends.append(concatenate([*whole, products(self.k @ d, u).times(-2)[..., 0]], -1))
        rows = concatenate([rows[:, :-1], rows[:, -1:] + ends[0][:, None]], 1)
        dgates = gates_vjp(self.gates, self.coefficients, rows, ends[1])
        factors = self.gates.theta, self.gates.a, self.gates.eta
        for name, dgate, gate in zip(("dtheta", "dalpha", "deta"), dgates, factors, strict=True):
            if self.arguments.log_gates:
                self._mixed(name, self.tape.mixed(dgate, self.gate_roundings, OPERANDS) * gate, LOG_GATE_ROUNDINGS)
            else:
                self._mixed(name, -dgate if name == "dalpha" else dgate, self.gate_roundings, OPERANDS)

    def _segment(self, name: str, x: Polynomial) -> None:
        """A result that is a segment already, or an argument."""
        self.results[name] = Result(x, torch.zeros_like(x.size), x.first)

    def _mixed(self, name: str, x: Polynomial, count: float | Tensor, operands: tuple[int, int] = (0, 0)) -> None:
        size = self.tape.size(x, count, operands)
        self.results[name] = Result(x, size, size + x.first)

    def _summed(self, name: str, x: Polynomial) -> None:
        """A sum over tokens, which is rounded when all pieces of a head have been added, (B16)."""
        size = (x.rest + x.drift + self.tape.reverse_unit * x.first).sum(1)
        radius = size + self.tape.pulled(x.value).sum(1)
        self.results[name] = Result(x.map(lambda part: part.sum(1)), size, radius)

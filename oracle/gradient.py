"""The exact adjoint of the recurrence: its equations in reverse, one token after the other."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor

from oracle.formats import Arithmetic, Number, Numbers, doubles, elementwise, evaluate
from oracle.recurrence import (
    Given,
    Inner,
    Inputs,
    Matrix,
    Norm,
    Output,
    Run,
    Step,
    Vector,
    centred,
    check,
    check_tensor,
    collect,
    columns,
    heads,
    outer,
    output,
    product,
    run_head,
)


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


def gradient(inputs: Inputs, cotangents: Cotangents, digits: int | None = None) -> tuple[Output, Gradient]:
    """Outputs, final state and the gradient of <cotangents, (o, M, S, anchor)> for every input, exactly.

    Parameters
    ----------
    inputs : Inputs
    cotangents : Cotangents
    digits : int or None
        As in `forward`.

    Returns
    -------
    Output, Gradient

    Raises
    ------
    Unsettled
        If the values do not settle (only where `digits` is None).
    ValueError
        As in `forward`, and for a cotangent that is not finite or has the wrong shape.
    """
    check(inputs)
    N, (H, D) = len(inputs.sequences), inputs.q.shape[2:]
    check_tensor("cotangents.o", cotangents.o, tuple(inputs.q.shape))
    for name in ("M", "S", "anchor"):
        check_tensor(f"cotangents.{name}", getattr(cotangents, name), (N, H, D, D))

    def run(numbers: Arithmetic) -> dict[str, Numbers]:
        given = Given(inputs, numbers)
        runs = {(n, h): run_head(given, inputs, n, h, numbers) for n, h in heads(inputs)}
        adjoint = Adjoint(inputs, given, cotangents, numbers)
        for (n, h), forward_run in runs.items():
            adjoint.run_head(forward_run, n, h)
        return collect(runs, inputs) | {f"d{name}": x for name, x in adjoint.results().items()}

    results = evaluate(run, inputs.start_digits, digits)
    gradients: dict[str, Any] = {field.name: results.get(f"d{field.name}") for field in fields(Gradient)}
    return output(results, inputs), Gradient(**gradients)


class Adjoint:
    """Cotangents of all that went in, filled while those of M, S and the anchor are carried back through the tokens."""

    def __init__(self, inputs: Inputs, given: Given, cotangents: Cotangents, numbers: Arithmetic) -> None:
        def zeros(*shape: int) -> Numbers:
            return np.full(shape, numbers.number(0.0))

        def exactly(x: Tensor | None) -> Numbers:
            return zeros(*given.M.shape) if x is None else elementwise(numbers.number, doubles(x))

        self.inputs, self.given, self.numbers = inputs, given, numbers
        self.do, self.dM_T = exactly(cotangents.o), exactly(cotangents.M)
        self.dS_T, self.danchor_T = exactly(cotangents.S), exactly(cotangents.anchor)
        B, T, H, D = inputs.q.shape
        self.dq, self.dk, self.dv = zeros(B, T, H, D), zeros(B, T, H, D), zeros(B, T, H, D)
        self.dtheta, self.da, self.deta = zeros(B, T, H), zeros(B, T, H), zeros(B, T, H)
        self.dw, self.db = zeros(H, D), zeros(H, D)
        self.dM, self.dS, self.danchor = zeros(*given.M.shape), zeros(*given.M.shape), zeros(*given.M.shape)

    def run_head(self, run: Run, n: int, h: int) -> None:
        """Go back through one head of one sequence."""
        dM, dS, danchor = columns(self.dM_T[n, h]), columns(self.dS_T[n, h]), columns(self.danchor_T[n, h])
        row, start, _ = self.inputs.sequences[n]
        for t, step in reversed(list(enumerate(run.steps, start))):
            # Eq. (6): the anchor after the token is M_t, or the anchor before it.
            if step.completes_chunk:
                dM, danchor = plus(dM, danchor), times(0, danchor)
            dM = self._output(step, dM, row, t, h)
            dM, dS, dk, du = self._state(step, dM, dS, row, t, h)
            dy, dk_residual = self._inner_gradient(step, du, row, t, h)
            # y = k A
            k = self.given.k[row, t, h]
            self.dk[row, t, h] = add(add(dk, dk_residual), product(dy, transposed(step.anchor), self.numbers))
            danchor = plus(danchor, outer(k, dy))
        if self.inputs.anchor is None:
            dM, danchor = plus(dM, danchor), times(0, danchor)
        for array, matrix in ((self.dM, dM), (self.dS, dS), (self.danchor, danchor)):
            array[n, h].T[...] = matrix

    def _output(self, step: Step, dM: Matrix, row: int, t: int, h: int) -> Matrix:
        """Eq. (5): into dq, dw and db; returns the cotangent of M_t."""
        do = list(self.do[row, t, h])
        dy = do
        if step.inner is not None and step.read is not None:
            w = step.inner.w
            self.dw[h] += [do_i * x_i for do_i, x_i in zip(do, step.read.x, strict=True)]
            self.db[h] += do
            dy = add(do, norm_vjp(step.read, [do_i * w_i for do_i, w_i in zip(do, w, strict=True)], 0, self.numbers))
        self.dq[row, t, h] = product(dy, transposed(step.M), self.numbers)
        return plus(dM, outer(self.given.q[row, t, h], dy))

    def _state(
        self, step: Step, dM: Matrix, dS: Matrix, row: int, t: int, h: int
    ) -> tuple[Matrix, Matrix, Vector, Vector]:
        """Eqs. (4) and (3): into dtheta, da and deta; returns the cotangents of M_{t-1}, S_{t-1}, k_t and u_t."""
        given, numbers, at = self.given, self.numbers, (row, t, h)
        k, theta = list(given.k[at]), given.theta[at]
        # Eq. (4)
        self.da[at] = inner_product(dM, step.M_before, numbers)
        dS = plus(dS, dM)
        dM = times(given.a[at], dM)
        # Eq. (3)
        self.deta[at] = inner_product(dS, step.S_before, numbers)
        k_dS = product(k, dS, numbers)
        self.dtheta[at] = -2 * numbers.dot(k_dS, step.u)
        du = [-2 * theta * entry for entry in k_dS]
        dk = [-2 * theta * entry for entry in product(step.u, transposed(dS), numbers)]
        return dM, times(given.eta[at], dS), dk, du

    def _inner_gradient(self, step: Step, du: Vector, row: int, t: int, h: int) -> tuple[Vector, Vector]:
        """Eq. (2): into dv, dw and db; returns the cotangents of y = k A and of the k in the residual."""
        inner = step.inner
        if inner is None:
            self.dv[row, t, h] = [-entry for entry in du]
            return du, [self.numbers.number(0.0)] * len(du)
        dy, de, dg = inner_vjp(inner, du, self.numbers)
        self.dw[h] += [
            de_i * g_i + dg_i * x_i for de_i, g_i, dg_i, x_i in zip(de, inner.g, dg, inner.norm.x, strict=True)
        ]
        self.db[h] += dg
        self.dv[row, t, h] = [-entry for entry in dg]
        return dy, dg

    def results(self) -> dict[str, Numbers]:
        """The gradients by name; those of the gates for the tensors that were passed."""
        given = self.given
        results = {name: getattr(self, f"d{name}") for name in ("q", "k", "v", "M", "S", "anchor")}
        if self.given.w is not None:
            results |= {"w": self.dw, "b": self.db}
        if self.inputs.log_gates:
            # gate * 0 at -inf is the 0 that the contract asks for.
            gates = {"theta": given.theta * self.dtheta, "alpha": given.a * self.da, "eta": given.eta * self.deta}
        else:
            gates = {"theta": self.dtheta, "alpha": -self.da, "eta": self.deta}
        return results | gates


def norm_vjp(norm: Norm, dx: Vector, dr: Number, numbers: Arithmetic) -> Vector:
    """Cotangent of y from those of x = norm(y) and of r."""
    s, r, _ = norm
    # x = s r;  r = (var + eps)^(-1/2);  var = <s, s> / D;  s = y - mean y
    dr = dr + numbers.dot(dx, s)
    dvar = -(r * r * r) * dr / 2
    ds = [r * dx_i + 2 * s_i * dvar / len(s) for dx_i, s_i in zip(dx, s, strict=True)]
    return centred(ds)


def inner_vjp(inner: Inner, du: Vector, numbers: Arithmetic) -> tuple[Vector, Vector, Vector]:
    """Cotangents of y, e = g * w and g = x * w + b - (v - k) from that of u, eq. (2) backwards."""
    x, r, w, D = inner.norm.x, inner.norm.r, inner.w, len(du)
    # u = r p
    dr = numbers.dot(du, inner.p)
    dp = [r * du_i for du_i in du]
    # p = e - mean e - x c
    dc = -numbers.dot(dp, x)
    dx = [-inner.c * dp_i for dp_i in dp]
    # c = <e, x> / D
    de = [dp_i + dc * x_i / D for dp_i, x_i in zip(centred(dp), x, strict=True)]
    dx = [dx_i + dc * e_i / D for dx_i, e_i in zip(dx, inner.e, strict=True)]
    # e = g w;  g = x w + b - (v - k)
    dg = [de_i * w_i for de_i, w_i in zip(de, w, strict=True)]
    dx = [dx_i + dg_i * w_i for dx_i, dg_i, w_i in zip(dx, dg, w, strict=True)]
    return norm_vjp(inner.norm, dx, dr, numbers), de, dg


def add(x: Vector, y: Vector) -> Vector:
    """X + y."""
    return [x_i + y_i for x_i, y_i in zip(x, y, strict=True)]


def plus(X: Matrix, Y: Matrix) -> Matrix:
    """X + Y."""
    return [add(x, y) for x, y in zip(X, Y, strict=True)]


def times(scale: Number, X: Matrix) -> Matrix:
    """Scale X."""
    return [[scale * entry for entry in column] for column in X]


def transposed(X: Matrix) -> Matrix:
    """X^T."""
    return [list(row) for row in zip(*X, strict=True)]


def inner_product(X: Matrix, Y: Matrix, numbers: Arithmetic) -> Number:
    """<X, Y>."""
    return numbers.dot([entry for column in X for entry in column], [entry for column in Y for entry in column])

"""`forward` and `gradient`: the definition and its adjoint on every head of a call, in a confirmed precision."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor

from oracle.adjoint import HeadGradient, reverse
from oracle.definition import Head, HeadState, Token, run
from oracle.inputs import Cotangents, Gradient, Inputs, Output, State, check, check_cotangents
from oracle.precision import Engine, Numbers, elementwise, evaluate

Runs = Mapping[tuple[int, int], tuple[list[Token], list[HeadState]]]


def forward(inputs: Inputs, digits: int | None = None) -> Output:
    """Outputs and final state, exactly, by eqs. (2) to (6).

    Parameters
    ----------
    inputs : Inputs
    digits : int or None
        Decimal digits of a single run; None chooses them and confirms at twice as many.

    Returns
    -------
    Output

    Raises
    ------
    Unsettled
        If the values do not settle (only where `digits` is None).
    ValueError
        If a value is not finite (-inf in a log gate is all right) or the inputs contradict each other.
    """
    check(inputs)

    def compute(engine: Engine) -> dict[str, Numbers]:
        return _values({at: run(head) for at, head in _heads(inputs, engine).items()}, inputs)

    return _output(evaluate(compute, inputs.start_digits, digits), inputs)


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
    check_cotangents(cotangents, inputs)

    def compute(engine: Engine) -> dict[str, Numbers]:
        heads = _heads(inputs, engine)
        runs = {at: run(head) for at, head in heads.items()}
        do = engine.numbers(cotangents.o)
        dM, dS, danchor = (_states(x, inputs, engine) for x in (cotangents.M, cotangents.S, cotangents.anchor))
        adjoints = {}
        for (n, h), (tokens, states) in runs.items():
            row, start, end = inputs.sequences[n]
            do_head = do[row, start:end, h]
            adjoints[n, h] = reverse(heads[n, h], tokens, states, do_head, dM[n, h], dS[n, h], danchor[n, h])
        return _values(runs, inputs) | {f"d{name}": x for name, x in _gradients(adjoints, inputs, engine).items()}

    results = evaluate(compute, inputs.start_digits, digits)
    gradients: dict[str, Any] = {field.name: results.get(f"d{field.name}") for field in fields(Gradient)}
    return _output(results, inputs), Gradient(**gradients)


def _states(x: Tensor | None, inputs: Inputs, engine: Engine) -> Numbers:
    """Initial states or their cotangents, shape (N, H, D, D); None is zero."""
    N, (H, D) = len(inputs.sequences), inputs.q.shape[2:]
    return np.full((N, H, D, D), engine.number(0.0)) if x is None else engine.numbers(x)


def _linear_gates(inputs: Inputs, engine: Engine) -> tuple[Numbers, Numbers, Numbers]:
    """theta, a = 1 - alpha and eta, shape (B, T, H)."""
    theta, alpha, eta = (engine.numbers(x) for x in (inputs.theta, inputs.alpha, inputs.eta))
    if inputs.log_gates:
        return elementwise(engine.exp, theta), elementwise(engine.exp, alpha), elementwise(engine.exp, eta)
    return theta, 1 - alpha, eta


def _heads(inputs: Inputs, engine: Engine) -> dict[tuple[int, int], Head]:
    """Every head of every sequence, by their numbers."""
    q, k, v = (engine.numbers(x) for x in (inputs.q, inputs.k, inputs.v))
    w, b = (None if x is None else engine.numbers(x) for x in (inputs.w, inputs.b))
    theta, a, eta = _linear_gates(inputs, engine)
    M, S = (_states(x, inputs, engine) for x in (inputs.M, inputs.S))
    anchor = None if inputs.anchor is None else engine.numbers(inputs.anchor)
    eps = engine.number(inputs.eps)
    heads = {}
    for n, (row, start, end) in enumerate(inputs.sequences):
        for h in range(inputs.q.shape[2]):
            at = row, slice(start, end), h
            heads[n, h] = Head(
                q[at], k[at], v[at],
                None if w is None else w[h], None if b is None else b[h],
                theta[at], a[at], eta[at],
                M[n, h], S[n, h], None if anchor is None else anchor[n, h],
                eps, engine.sqrt, inputs.chunk_size, inputs.offsets[n],
            )  # fmt: skip
    return heads


def _values(runs: Runs, inputs: Inputs) -> dict[str, Numbers]:
    """o, shape (B, T, H, D), and M, S, anchor, shape (N, H, D, D), of all heads together."""
    N, (H, D) = len(inputs.sequences), inputs.q.shape[2:]
    o = np.empty(inputs.q.shape, dtype=object)
    M, S, anchor = (np.empty((N, H, D, D), dtype=object) for _ in range(3))
    for (n, h), (tokens, states) in runs.items():
        row, start, _ = inputs.sequences[n]
        for t, token in enumerate(tokens, start):
            o[row, t, h] = token.o
        M[n, h], S[n, h], anchor[n, h] = states[-1]
    return {"o": o, "M": M, "S": S, "anchor": anchor}


def _gradients(adjoints: Mapping[tuple[int, int], HeadGradient], inputs: Inputs, engine: Engine) -> dict[str, Numbers]:
    """Gradients of all heads together, for the tensors that were passed."""
    B, T, H, D = inputs.q.shape
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("q", "k", "v"), (B, T, H, D))
    shapes |= dict.fromkeys(("theta", "a", "eta"), (B, T, H)) | dict.fromkeys(("w", "b"), (H, D))
    shapes |= dict.fromkeys(("M", "S", "anchor"), (len(inputs.sequences), H, D, D))
    d = {name: np.full(shape, engine.number(0.0)) for name, shape in shapes.items()}
    for (n, h), adjoint in adjoints.items():
        row, start, end = inputs.sequences[n]
        for name in ("q", "k", "v", "theta", "a", "eta"):
            d[name][row, start:end, h] = getattr(adjoint, name)
        for name in ("w", "b"):
            d[name][h] += getattr(adjoint, name)
        for name in ("M", "S", "anchor"):
            d[name][n, h] = getattr(adjoint, name)
    da = d.pop("a")
    if inputs.log_gates:
        # The cotangent of a log is the gate times that of the gate: at -inf the 0 that the contract asks for.
        theta, a, eta = _linear_gates(inputs, engine)
        d |= {"theta": theta * d["theta"], "alpha": a * da, "eta": eta * d["eta"]}
    else:
        d["alpha"] = -da
    return d if inputs.w is not None else {name: x for name, x in d.items() if name not in ("w", "b")}


def _output(results: Mapping[str, Numbers], inputs: Inputs) -> Output:
    lengths = [end - start for _, start, end in inputs.sequences]
    offset = tuple((r + T) % inputs.chunk_size for r, T in zip(inputs.offsets, lengths, strict=True))
    return Output(results["o"], State(results["M"], results["S"], results["anchor"], offset))

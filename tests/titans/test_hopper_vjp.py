"""The parallel kernels of the Hopper backward, interpreted on the CPU: each against its equations in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.titans import gluon_copies, gluon_interpreter
from tests.titans.test_hopper_output import all_pieces, logs
from tests.titans.test_hopper_state import PACKED, Case, Draw, integers, norm, normal
from tests.titans.test_hopper_state import given as chain_given
from titans.arguments import Call
from titans.kernels.tile import Affine, BlockState, End, Rows, Saved, block_rows, gates_tile, tile_of, where_of
from titans.partition import layout_of

C, H = 64, 2
# copies at once, at some time, as late as can be
ORDERS = range(3)
CASES = [
    Case(64, 192),
    Case(128, 128),
    Case(64, 133, B=2),
    Case(40, 100),
    Case(96, 5),
    Case(128, 70, offset=(63,)),
    Case(40, 300, cu_seqlens=PACKED, offset=(3, 0, 63, 0, 0, 0, 9)),
]
Rounded = Callable[[Tensor], Tensor]
Change = Callable[[str], str]


class Given(NamedTuple):
    """Arguments of the kernels."""

    call: Call
    saved: Saved
    do: Tensor
    du: Tensor
    dk: Tensor
    dstate: BlockState
    daffine: Affine
    end: End
    drows: Rows
    dend: End


def given(case: Case, draw: Draw, log_gates: bool = False) -> Given:
    """Draw the arguments; `draw` takes the name of what is drawn and a shape."""
    call = chain_given(case, draw, log_gates)
    B, T, D = case.B, case.T, case.D
    K = layout_of(call, block_rows(call.q)).slots
    end = End(draw("theta", K, H, 2, C), draw("alpha", K, H, 3))
    M0, S0, dM, dS = (draw("state", K, H, D, D).bfloat16() for _ in range(4))
    x, do, du, dk = (draw(name, B, T, H, D).bfloat16() for name in ("x", "do", "do", "do"))
    saved = Saved(M0, S0, x, draw("r", B, T, H).abs() + 1, draw("means", B, T, H, 2))
    dw, db, dend = draw("do", K, H, D), draw("do", K, H, D), End(draw("do", K, H, 2, C), draw("do", K, H, 3))
    drows = Rows(draw("do", K, H, 2, C), draw("do", K, H, C, C))
    return Given(call, saved, do, du, dk, BlockState(dM, dS), Affine(dw, db), end, drows, dend)


def poisoned(*tensors: Tensor) -> list[Tensor]:
    """Tensors like these, of NaN."""
    return [torch.full_like(x, torch.nan) for x in tensors]


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


class Piece:
    """What a block is made of, by head, (H, L, ...) in some dtype."""

    def __init__(self, args: Given, slot: int, B: int, rows: slice, dtype: torch.dtype) -> None:
        call, saved = args.call, args.saved
        self.slot, self.B, self.rows, self.dtype, self.L = slot, B, rows, dtype, rows.stop - rows.start
        self.q, self.k, self.v, self.x, self.r = map(self.of, (call.q, call.k, call.v, saved.x, saved.r[..., None]))
        self.w, self.b = (None if x is None else x.to(dtype)[:, None] for x in (call.w, call.b))
        self.M0, self.S0 = (x[slot].to(dtype) for x in saved[:2])
        theta, alpha, eta = (g[B, rows].to(dtype).T for g in (call.theta, call.alpha, call.eta))
        if call.log_gates:
            theta, a, eta = theta.exp(), alpha.exp(), eta.exp()
        else:
            a = 1 - alpha
        self.theta, self.a, self.eta = theta, a, eta

    def of(self, x: Tensor) -> Tensor:
        """The rows of the piece."""
        return x[self.B, self.rows].to(self.dtype).transpose(0, 1)

    def put(self, x: Tensor, value: Tensor) -> None:
        x[self.B, self.rows] = value.transpose(0, 1).to(x.dtype)

    def inner(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """z, e, mean e, c and u of (2)."""
        if self.w is None or self.b is None:
            nothing = torch.zeros_like(self.r)
            return self.x, self.x, nothing, nothing, self.x - self.v
        z = self.x * self.w + self.b - (self.v - self.k)
        e = z * self.w
        mean_e, c = mean(e), mean(e * self.x)
        return z, e, mean_e, c, self.r * (e - mean_e - self.x * c)

    def coefficients(self) -> dict[str, Tensor]:
        """Eq. (7), with the row before the first: (H, L + 1) or (H, L + 1, L)."""
        n, m, beta = torch.zeros_like(self.theta), torch.ones_like(self.theta[:, 0]), torch.ones_like(self.theta[:, 0])
        G, f = n, torch.zeros_like(beta)
        found: dict[str, list[Tensor]] = {name: [] for name in ("n", "G", "m", "f", "beta")}
        for t in range(self.L + 1):
            for name, value in zip(found, (n, G, m, f, beta), strict=True):
                found[name].append(value)
            if t < self.L:
                a, eta = self.a[:, t, None], self.eta[:, t, None]
                n = torch.where(torch.arange(self.L) == t, self.theta, eta * n)
                G, m, beta = a * G + n, eta[:, 0] * m, a[:, 0] * beta
                f = a[:, 0] * f + m
        return {name: torch.stack(values, 1) for name, values in found.items()}


def output_vjp(args: Given, dtype: torch.dtype, rounded: Rounded) -> dict[str, Tensor]:
    """Eq. (14), operands of products and what is stored in bfloat16 `rounded`; NaN where nothing is to be written."""
    call, saved = args.call, args.saved
    K = len(saved.M0)
    (dq, du, dk), (dM0, dS0) = poisoned(*[call.q.to(dtype)] * 3), poisoned(*[saved.M0.to(dtype)] * 2)
    dw, db, dbeta_f, dG = poisoned(*(x.to(dtype) for x in (*args.daffine, *args.drows)))
    (means,) = poisoned(torch.zeros(*call.q.shape[:3], 2, dtype=dtype))
    assert K == len(dG)
    for slot, B, rows in all_pieces(call):
        piece = Piece(args, slot, B, rows, dtype)
        q, k, L = piece.q, piece.k, piece.L
        _, _, mean_e, c, u = piece.inner()
        u = rounded(u)
        c7 = piece.coefficients()
        G, beta, f = -2 * c7["G"][:, 1:], c7["beta"][:, 1:, None], c7["f"][:, 1:, None]
        scores, dy = (q @ k.mT).tril(), piece.of(args.do)
        weights = rounded(G * scores)
        if piece.w is not None:
            y = beta * (q @ piece.M0) + f * (q @ piece.S0) + weights @ u
            x, r = norm(y, call.eps)
            dw[slot], db[slot] = (dy * x).sum(1), dy.sum(1)
            dx = dy * piece.w
            dy = dy + r * (dx - mean(dx) - x * mean(dx * x))
            piece.put(means, torch.cat([mean_e, c], -1))
        dy_op = rounded(dy)
        dy_M, dy_S, dweights = dy_op @ piece.M0.mT, dy_op @ piece.S0.mT, (dy_op @ u.mT).tril()
        dscores = rounded(G * dweights)
        dbeta_f[slot], dG[slot] = 0, 0
        dbeta_f[slot, :, 0, :L], dbeta_f[slot, :, 1, :L] = (dy_M * q).sum(-1), (dy_S * q).sum(-1)
        dG[slot, :, :L, :L] = -2 * dweights * scores
        dG[slot] = dG[slot].masked_fill(torch.ones(C, C).triu(1).bool(), torch.nan)
        piece.put(dq, rounded(beta * dy_M + f * dy_S + dscores @ k))
        piece.put(du, rounded(weights.mT @ dy_op))
        piece.put(dk, rounded(dscores.mT @ q))
        dM0[slot], dS0[slot] = rounded(q.mT @ rounded(beta * dy)), rounded(q.mT @ rounded(f * dy))
    return {
        "dq": dq, "du": du, "dk": dk, "dM0": dM0, "dS0": dS0, "dbeta_f": dbeta_f, "dG": dG,
    } | ({} if call.w is None else {"dw": dw, "db": db, "means": means})  # fmt: skip


def run_output_vjp(args: Given, order: int, change: Change = lambda text: text) -> dict[str, Tensor]:
    """Launch the kernel on poisoned outputs."""
    call, saved = args.call, args.saved
    layout = layout_of(call, block_rows(call.q))
    (dq, du, dk), dstate, daffine = poisoned(*[call.q] * 3), poisoned(*saved[:2]), poisoned(*args.daffine)
    assert saved.means is not None
    drows, (means,) = poisoned(*args.drows), poisoned(saved.means)
    gluon_interpreter.seeds[0] = order
    with gluon_copies.interpreted("output_vjp", change) as module:
        module.launch_output_vjp(
            call, where_of(call, layout), tile_of(call, layout, call.log_gates), layout.slots * H,
            saved._replace(means=means), args.do, Rows(*drows), dq, du, dk, BlockState(*dstate), Affine(*daffine), None,
        )  # fmt: skip
    made = {"dq": dq, "du": du, "dk": dk, "dM0": dstate[0], "dS0": dstate[1], "dbeta_f": drows[0], "dG": drows[1]}
    return made | ({} if call.w is None else {"dw": daffine[0], "db": daffine[1], "means": means})


def key_vjp(args: Given, dtype: torch.dtype, rounded: Rounded) -> dict[str, Tensor]:
    """Eq. (16), as `output_vjp`."""
    call, saved = args.call, args.saved
    dk, dv, dw, db, dweights, dtransition = poisoned(
        *(x.to(dtype) for x in (call.k, call.v, *args.daffine, *args.dend))
    )
    assert saved.means is not None
    for slot, B, rows in all_pieces(call):
        piece = Piece(args, slot, B, rows, dtype)
        k, x, r, L = piece.k, piece.x, piece.r, piece.L
        z, e, _, _, u = piece.inner()
        du, dk_part = piece.of(args.du), piece.of(args.dk)
        dz = dy = du
        if piece.w is not None:
            mean_e, c = piece.of(saved.means).split(1, -1)
            p, dp = e - mean_e - x * c, r * du
            dc = -mean(dp * x)
            de = dp - mean(dp) + dc * x
            dz = de * piece.w
            dx = dz * piece.w + dc * e - c * dp
            dy = r * (dx - mean(dx) - x * mean(dx * x)) - x * r * r * mean(du * p)
            u, dk_part = r * p, dk_part + dz
            dw[slot] = args.daffine[0][slot].to(dtype) + (de * (z + piece.w * x)).sum(1)  # type: ignore[index]
            db[slot] = args.daffine[1][slot].to(dtype) + dz.sum(1)  # type: ignore[index]
        dM, dS = (t[slot].to(dtype) for t in args.dstate)
        n, begins = first_of(call, slot, rows)
        A = call.anchor[n].to(dtype) if begins else piece.M0
        n_L, G_L = args.end.weights[slot, :, :, :L].to(dtype)[..., None].unbind(1)
        u_dM, u_dS = -2 * (rounded(u) @ dM.mT), -2 * (rounded(u) @ dS.mT)
        piece.put(dv, rounded(-dz))
        piece.put(dk, rounded(dk_part + rounded(dy) @ rounded(A).mT + G_L * u_dM + n_L * u_dS))
        dweights[slot] = 0
        dweights[slot, :, 0, :L], dweights[slot, :, 1, :L] = (u_dS * k).sum(-1), (u_dM * k).sum(-1)
        products = dM * piece.M0, dM * piece.S0, dS * piece.S0
        dtransition[slot] = torch.stack([x.sum((-1, -2)) for x in products], -1)
    return {"dk": dk, "dv": dv, "dweights": dweights, "dtransition": dtransition} | (
        {} if call.w is None else {"dw": dw, "db": db}
    )


def first_of(call: Call, slot: int, rows: slice) -> tuple[int, bool]:
    """The sequence of a piece, and whether it begins there."""
    cu, T = call.cu_seqlens, call.q.shape[1]
    if cu is None:
        return slot * len(call.M) // layout_of(call, C).slots, rows.start == 0
    n = max(i for i in range(len(call.M)) if cu[i] <= rows.start and cu[i] < cu[i + 1])
    assert rows.stop <= T
    return n, rows.start == int(cu[n])


def run_key_vjp(args: Given, order: int, change: Change = lambda text: text) -> dict[str, Tensor]:
    """Launch the kernel on poisoned outputs, and its own inputs."""
    call = args.call
    layout = layout_of(call, block_rows(call.q))
    du, dk, daffine, dend = args.du.clone(), args.dk.clone(), [x.clone() for x in args.daffine], poisoned(*args.dend)
    gluon_interpreter.seeds[0] = order
    with gluon_copies.interpreted("key_vjp", change) as module:
        module.launch_key_vjp(
            call, where_of(call, layout), tile_of(call, layout), layout.slots * H, args.end, args.saved, args.dstate,
            du, dk, Affine(*daffine), End(*dend), None,
        )  # fmt: skip
    return {"dk": dk, "dv": du, "dweights": dend[0], "dtransition": dend[1]} | (
        {} if call.w is None else {"dw": daffine[0], "db": daffine[1]}
    )


def coefficients_vjp(args: Given, dtype: torch.dtype, rounded: Rounded) -> dict[str, Tensor]:
    """Eq. (13)."""
    del rounded
    call = args.call
    made = poisoned(*(x.to(dtype) for x in (call.theta, call.alpha, call.eta)))
    for slot, B, rows in all_pieces(call):
        piece = Piece(args, slot, B, rows, dtype)
        L, c7 = piece.L, piece.coefficients()
        dbeta, df = args.drows.beta_f[slot].to(dtype).unbind(1)
        dG = args.drows.G[slot].to(dtype)
        ln, lG = (x[:, :L] for x in args.dend.weights[slot].to(dtype).unbind(1))
        lbeta, lf, lm = args.dend.transition[slot].to(dtype).unbind(-1)
        dtheta, da, deta = torch.zeros(3, H, L, dtype=dtype)
        for t in reversed(range(L)):
            lG = lG + torch.where(torch.arange(L) <= t, dG[:, t, :L], 0)
            ln, lbeta, lf = ln + lG, lbeta + dbeta[:, t], lf + df[:, t]
            lm = lm + lf
            da[:, t] = (lG * c7["G"][:, t]).sum(-1) + lbeta * c7["beta"][:, t] + lf * c7["f"][:, t]
            deta[:, t] = (ln * c7["n"][:, t]).sum(-1) + lm * c7["m"][:, t]
            dtheta[:, t] = ln[:, t]
            a, eta = piece.a[:, t], piece.eta[:, t]
            lG, ln, lbeta, lf, lm = a[:, None] * lG, eta[:, None] * ln, a * lbeta, a * lf, eta * lm
        scale = (piece.theta, piece.a, piece.eta) if call.log_gates else (1, -1, 1)
        for x, value, by in zip(made, (dtheta, da, deta), scale, strict=True):
            piece.put(x, by * value)
    return dict(zip(("dtheta", "dalpha", "deta"), made, strict=True))


def run_coefficients_vjp(args: Given, order: int, change: Change = lambda text: text) -> dict[str, Tensor]:
    """Launch the kernel on poisoned outputs."""
    call = args.call
    layout = layout_of(call, block_rows(call.q))
    made = poisoned(call.theta, call.alpha, call.eta)
    # what is above the diagonal is never written
    dG = args.drows.G.masked_fill(torch.ones(C, C).triu(1).bool(), torch.nan)
    gluon_interpreter.seeds[0] = order
    with gluon_copies.interpreted("coefficients_vjp", change) as module:
        module.launch_coefficients_vjp(
            call, where_of(call, layout), gates_tile(call, layout), layout.slots * H, args.drows._replace(G=dG),
            args.dend, module.Gates(*made), None,
        )  # fmt: skip
    return dict(zip(("dtheta", "dalpha", "deta"), made, strict=True))


KERNELS = {
    "output_vjp": (output_vjp, run_output_vjp),
    "key_vjp": (key_vjp, run_key_vjp),
    "coefficients_vjp": (coefficients_vjp, run_coefficients_vjp),
}


def same(x: Tensor, y: Tensor) -> bool:
    """Whether the bits are the same, or both are NaN."""
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


def bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_integers_of_the_plain_memory_are_exact(case: Case, kernel: str) -> None:
    wanted, run = KERNELS[kernel]
    args = given(Case(**vars(case) | {"plain": True}), integers(0))
    args = args._replace(call=args.call._replace(theta=args.call.theta / 2))
    exact = wanted(args, torch.float64, lambda x: x)
    made = run(args, 1)
    for name, true in exact.items():
        stored = made[name].dtype
        assert torch.equal(true.nan_to_num(), true.to(stored).double().nan_to_num()), name
        # where NaN stands nothing is written
        written = ~true.isnan()
        assert written.any()
        assert torch.equal(made[name][written].double(), true[written]), name
        if name not in ("dk", "dv"):
            assert made[name][~written].isnan().all(), name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_order_of_events_changes_no_bit_and_errors_are_those_of_the_portable_kernel(
    case: Case, kernel: str
) -> None:
    """At most twice those of its arithmetic."""
    wanted, run = KERNELS[kernel]
    log = case.T == 133
    args = given(case, logs(normal(0)) if log else normal(0), log_gates=log)
    exact, portable = wanted(args, torch.float64, lambda x: x), wanted(args, torch.float32, bfloat16)
    made = run(args, 0)
    for name, true in exact.items():
        written = ~true.isnan()
        error = (made[name][written] - true[written]).norm()
        assert error <= 2 * (portable[name][written] - true[written]).norm(), name
    for order in ORDERS[1:]:
        again = run(args, order)
        assert all(same(x, again[name]) for name, x in made.items()), order


WHOLE, PLAIN, RAGGED = Case(64, 128), Case(64, 128, plain=True), Case(40, 200, cu_seqlens=(0, 100, 200), offset=(7, 0))
FAULTS = {
    "x read before it has come": (
        "output_vjp",
        WHOLE,
        "flag_of(3, 1).index(0), flag_of(3, 1)",
        "flag_of(2, 1).index(0), flag_of(3, 1)",
    ),
    "nobody waits for M0": ("output_vjp", WHOLE, "    mbarrier.wait(outer_full, 0)\n", ""),
    "nobody waits for do": (
        "output_vjp",
        PLAIN,
        "        mbarrier.wait(do_full, 0)\n        dy = do_s",
        "        dy = do_s",
    ),
    "dG above the diagonal": ("output_vjp", WHOLE, "mask=offs_j <= offs_t)", "mask=offs_j < C)"),
    "u not fenced": ("output_vjp", WHOLE, "    u_s = v_s\n    fence_async_shared()\n", "    u_s = v_s\n"),
    "dM0 not fenced": ("output_vjp", WHOLE, "    fence_async_shared()\n    put_square(dM0", "    put_square(dM0"),
    "weights above the diagonal": ("output_vjp", PLAIN, "    scores = lower(scores, Y)\n", ""),
    "dweights above the diagonal": ("output_vjp", PLAIN, "    dweights = lower(dweights, Y)\n", ""),
    "G of the token before": ("output_vjp", WHOLE, "later = offs_t > offs_j", "later = offs_t > offs_j + 1"),
    "f without the decay of S": (
        "output_vjp",
        WHOLE,
        "gl.associative_scan((eta, eta, a), 0, then)",
        "gl.associative_scan((eta * 0 + 1, eta, a), 0, then)",
    ),
    "dk over an operand": (
        "output_vjp",
        WHOLE,
        "dq_s, du_s, dk_s = k_s, u_s, dy_s",
        "dq_s, du_s, dk_s = k_s, u_s, bdy_s",
    ),
    "the mean over the padded width": ("output_vjp", RAGGED, "mean(y, tile.D)", "mean(y, tile.BD)"),
    "M0 read before it has come": ("key_vjp", WHOLE, "flag_of(4, 1)", "flag_of(3, 1)"),
    "the anchor of a resumed chunk is its M0": ("key_vjp", RAGGED, "if block.i == 0:", "if block.i < 0:"),
    "the anchor of every chunk is the first": ("key_vjp", WHOLE, "if block.i == 0:", "if block.i >= 0:"),
    "dk without its part through the outputs": (
        "key_vjp",
        WHOLE,
        "dk = dk_s.load(Y).to(gl.float32) + dz",
        "dk = dz",
    ),
    "dv not fenced": ("key_vjp", WHOLE, "    fence_async_shared()\n    dy_s, dv_s", "    dy_s, dv_s"),
    "n_L in the place of G_L": ("key_vjp", WHOLE, "weights + C, 1, block.length", "weights, 1, block.length"),
    "the decays of the token itself": (
        "coefficients_vjp",
        WHOLE,
        "load_a(gates.alpha, block, 1, tile, LINE), 1.0)",
        "load_a(gates.alpha, block, 0, tile, LINE), 1.0)",
    ),
    "lG of a token after the last": ("coefficients_vjp", RAGGED, "(left > t)", "(left > t - 1)"),
    "ln of a token after the last": (
        "coefficients_vjp",
        RAGGED,
        "gl.where(offs_t < block.length, 1.0, 0.0)",
        "gl.where(offs_t <= block.length, 1.0, 0.0)",
    ),
    "bands from the first": ("coefficients_vjp", WHOLE, "band = BANDS - 1 - back", "band = back + 0 * BANDS"),
    "dm without df": ("coefficients_vjp", WHOLE, "gl.where(inside, lf, 0.0)", "gl.where(inside, 0.0, 0.0)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_noticed(name: str) -> None:
    """By wrong results, a deadlock or a read of what is not fenced, in some order."""
    kernel, case, old, new = FAULTS[name]
    assert (gluon_interpreter.KERNELS / "hopper" / f"{kernel}.py").read_text().count(old) == 1
    _, run = KERNELS[kernel]
    args = given(case, normal(0))
    if case.plain:
        # products of token 0 and token 63 overflow
        for x, y in ((args.call.q, args.call.k), (args.do, args.saved.x)):
            x[0, 0], y[0, 63] = 0, 0
            x[0, 0, :, 0], y[0, 63, :, 0] = 2.0**120, 2.0**10
    right = run(args, 0)
    for order in range(4 * len(ORDERS)):
        try:
            wrong = run(args, order, lambda text: text.replace(old, new))
        except (gluon_interpreter.Deadlock, AssertionError):
            return
        if not all(same(x, wrong[name]) for name, x in right.items()):
            return
    pytest.fail("not noticed")


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_finite_stays_in_its_sequence_and_head(kernel: str) -> None:
    """The rows after a tail are another sequence's."""
    _, run = KERNELS[kernel]
    args = given(Case(64, 200, cu_seqlens=(0, 100, 200)), normal(0))
    clean = run(args, 0)
    call, saved = args.call, args.saved
    for x in (call.q, call.k, call.v, call.alpha, args.do, args.du, args.dk, saved.x):
        x[0, 101, 1] = torch.nan
    made = run(args, 0)
    spoiled = 0
    for name, value in made.items():
        by_token = value.shape[:2] == call.q.shape[:2]
        own, other = (value[0], clean[name][0]) if by_token else (value, clean[name])
        # the second sequence begins in slot 2, or at token 100
        begin = 100 if by_token else 2
        assert same(own[:begin], other[:begin]), name
        assert same(own[:, 0], other[:, 0]), name
        spoiled += not same(own[begin:], other[begin:])
    assert spoiled

"""The forward in one launch: the chain and, beside it, the outputs; or both in the same programs, see `fused.py`."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from titans.arguments import Call
from titans.kernels.hopper.common import TILE, Descriptor, aligned, copying, product
from titans.kernels.hopper.fused import hopper_fused_kernel
from titans.kernels.hopper.handover import LINE, role_in_turn, role_of_pair
from titans.kernels.hopper.output import Engine, Tokens, run_outputs
from titans.kernels.hopper.state import run_chain
from titans.kernels.hopper.state_vjp import rows_of_heads, squares
from titans.kernels.launcher import Launcher
from titans.kernels.tile import Affine, Saved, State, Tile, Where


@gluon.jit(do_not_specialize=["T", "H", "chains", "recorded"])
def hopper_forward_kernel(
    k_ptr, v_ptr,  # (B, T, H, D)
    # tokens (B T, H D), states (K H D, D), as the chain moves them
    k_engine, v_engine, x_engine, u_engine, M0_engine, S0_engine,
    # and as the outputs do: tokens (B T, H, D), states (K H, D, D); one by one, as Triton 3.6 wants them
    q_rows, k_rows, u_rows, o_rows, M0_square, S0_square,
    tokens, affine, initial, where,
    saved, final,  # out
    o_ptr,  # out: (B, T, H, D)
    count_ptr,  # (N H + 1, LINE), zeros: in column 0 the chunks that each chain has stored; in the last row tickets
    T, H, chains, recorded, eps, tile: gl.constexpr,
    TOKENS: gl.constexpr, SQUARE: gl.constexpr, CHAIN_COPY: gl.constexpr, OUTPUT_COPY: gl.constexpr,
    CHAIN_REGISTERS: gl.constexpr, OUTPUT_REGISTERS: gl.constexpr,
    STAGES: gl.constexpr, TOGETHER: gl.constexpr, ROWS: gl.constexpr, SQUARES: gl.constexpr, GRAMS: gl.constexpr,
):  # fmt: skip
    """Eq. (8)-(11) and (5): half of the programs are the chains of a sequence and head, the others their outputs.

    Grid: (2 N H,).
    Reads: q, k, v, w, b, gates, the initial state.
    Writes: o, the final state; M0 and S0 of each chunk, u of (2); if `recorded`, x and r.
    """
    if tile.BD <= 64:
        is_chain, pid = role_of_pair(count_ptr + chains * LINE, chains)
    else:
        is_chain, pid = role_in_turn(count_ptr + chains * LINE)
    if is_chain:
        run_chain(
            pid, k_ptr, v_ptr, k_engine, v_engine, x_engine, u_engine, M0_engine, S0_engine, tokens, affine,
            initial, where, saved, final, count_ptr, T, H, recorded, eps, tile,
            TOKENS, SQUARE, CHAIN_COPY, STAGES, TOGETHER, CHAIN_REGISTERS,
        )  # fmt: skip
    else:
        engine = Engine(q_rows, k_rows, u_rows, o_rows, M0_square, S0_square)
        run_outputs(
            pid, engine, tokens, affine, where, count_ptr, o_ptr, T, H, eps, tile,
            TOKENS, OUTPUT_COPY, ROWS, SQUARES, GRAMS, OUTPUT_REGISTERS,
        )  # fmt: skip


@functools.cache
def options(BD: int, whole: bool) -> dict[str, Any]:
    """Constants of the kernel that depend on the width of its tiles, and on whether rows fill them."""
    if BD == 64:
        layout = product([4, 1], 64)
        return {
            "TOKENS": layout, "SQUARE": layout, "CHAIN_COPY": copying(64, 1), "OUTPUT_COPY": copying(64, 4),
            "CHAIN_REGISTERS": 64, "OUTPUT_REGISTERS": 64,
            "STAGES": 4, "TOGETHER": 2, "ROWS": 4, "SQUARES": 3, "GRAMS": 2, "num_warps": 4,
        }  # fmt: skip
    return {
        "TOKENS": product([4, 2], 64), "SQUARE": product([8, 1], 128),
        "CHAIN_COPY": copying(64, 1), "OUTPUT_COPY": copying(128, 8),
        "CHAIN_REGISTERS": 24 if whole else 32, "OUTPUT_REGISTERS": 64,
        "STAGES": 2, "TOGETHER": 1, "ROWS": 2, "SQUARES": 1, "GRAMS": 2, "num_warps": 8,
    }  # fmt: skip


@functools.cache
def fused_options(alone: bool) -> dict[str, Any]:
    """Constants of the fused kernel, which depend on whether each program has a multiprocessor of its own.

    If not, two share one: so they have no more than 128 registers a thread to begin with, of which those of the other
    roles go to the first.
    """
    layouts = {"Y": product([4, 1], 64)}
    if alone:
        return layouts | {"STAGES": 3, "GRAMS": 2, "REGISTERS": 64, "num_warps": 4}
    return layouts | {"STAGES": 2, "GRAMS": 1, "REGISTERS": 40, "num_warps": 4, "maxnreg": 128}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; where there is none, of the GPU tuned for."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


run = Launcher(hopper_forward_kernel)
run_fused = Launcher(hopper_fused_kernel)


def engines(k: Tensor, v: Tensor, u: Tensor, saved: Saved, BS: int) -> dict[str, Descriptor | None]:
    """Tell the copy engine of the tensors that it moves for the chain, if a row fills a tile."""
    (B, T, H, D), tokens, states = k.shape, {"k": k, "v": v, "x": saved.x, "u": u}, {"M0": saved.M0, "S0": saved.S0}
    if D not in (64, 128):
        return {f"{name}_engine": None for name in (*tokens, *states)}
    boxes = {name: (x, [B * T, H * D], [H * D, 1], [BS, D]) for name, x in tokens.items()}
    boxes |= {name: (x, [len(x) * H * D, D], [D, 1], [D, D]) for name, x in states.items()}
    return {f"{name}_engine": Descriptor(*box, TILE.value) for name, box in boxes.items()}


def launch_forward(
    call: Call, where: Where, tile: Tile, slots: int, saved: Saved | None, final: State, o: Tensor, key: Hashable
) -> None:
    """Launch the kernel.

    Parameters
    ----------
    call : Call
    where : Where
    tile : Tile
    slots : int
        K, of the layout.
    saved : Saved or None
        Where to save what the backward needs; None: nowhere.
    final, o
        The results.
    key : Hashable
        Of `Launcher`.
    """
    (N, H, D, _), T, initial = call.M.shape, call.q.shape[1], State(call.M, call.S, call.anchor)
    if T == 0:
        # there is nothing for the copy engine to move
        for new, old in zip(final, initial, strict=True):
            new.copy_(old)
        return
    BD, chains, places = 64 if D <= 64 else 128, N * H, multiprocessors(call.q.device)
    fused = BD == 64 and 2 * chains > places
    q, k, v = aligned(call.q), aligned(call.k), aligned(call.v)
    u = k if fused else torch.empty_like(k)
    recorded = int(saved is not None)
    if saved is None:
        # o and its like are not written through these, but the kernels want tensors; M0 and S0 are handed over
        M0, S0 = (q.new_empty(1 if fused else slots, H, D, D) for _ in range(2))
        saved = Saved(M0, S0, o, final.M)
    states = {"M0_square": squares(saved.M0, BD), "S0_square": squares(saved.S0, BD)}
    shared: dict[str, Any] = {
        "affine": Affine(call.w, call.b), "initial": initial, "where": where,
        "saved": saved, "final": final, "o_ptr": o,
    }  # fmt: skip
    tokens = Tokens(q, k, u, call.theta, call.alpha, call.eta)
    if fused:
        tensors = (("q", q), ("k", k), ("v", v), ("x", saved.x), ("o", o))
        run_fused(
            chains, (key, chains <= places),
            **{f"{name}_rows": rows_of_heads(x, BD) for name, x in tensors}, **states, tokens=tokens, v_ptr=v, **shared,
            T=T, H=H, recorded=recorded, eps=call.eps, tile=tile, **fused_options(chains <= places),
        )  # fmt: skip
        return
    count = call.M.new_zeros(chains + 1, LINE.value, dtype=torch.int32)
    rows = {f"{name}_rows": rows_of_heads(x, BD) for name, x in (("q", q), ("k", k), ("u", u), ("o", o))}
    run(
        2 * chains, key,
        k_ptr=k, v_ptr=v, **engines(k, v, u, saved, call.chunk_size), **rows, **states, tokens=tokens, **shared,
        count_ptr=count, T=T, H=H, chains=chains, recorded=recorded, eps=call.eps, tile=tile, **options(BD, D == BD),
    )  # fmt: skip

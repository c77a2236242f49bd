"""`TitansLinear`: the op as a layer, with projections, convolutions, gates that learn, and states for decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from titans import caches
from titans.api import chunk_titans_linear, titans_linear_step
from titans.arguments import TitansState, compute_dtype
from titans.caches import LayerState
from titans.modules import GatedRMSNorm, Gates, ShortConvolution
from titans.validation import check_integer, name_of

# length of a row of q or k, before it is made a unit vector, below which it has no direction
SHORT = 1e-3


class TitansLinear(nn.Module):
    """A layer around the linear Titans memory: it learns inside the sequence, decodes, and takes other models' caches.

    From x of shape (B, T, hidden_size)::

        q, k = unit(silu(conv(W x)))    v = silu(conv(W x))     log theta, log(1 - alpha), log eta = gates(x)
        o = memory(q, k, v, gates)      y = W_o (rmsnorm(o) * sigmoid(W_g x))

    **The gates.** The C tokens of a chunk all see the anchor, the memory at the start of the chunk. Where their keys
    agree, their gradients add up, each once more for every later token that the momentum carries it to: a chunk
    multiplies the memory's error on that key by about 1 - 2 theta C / (1 - eta). For |1 - 2 theta C / (1 - eta)| < 1
    the layer keeps theta < (1 - eta) / C, in logs, so that nothing saturates: log eta = logsigmoid(m),
    log(1 - alpha) = logsigmoid(a), log theta = logsigmoid(t) + log(1 - eta) - log C, where t, a and m are linear in x.
    Training starts at eta = 0.9, 1 - alpha = 0.99 and theta = (1 - eta) / (2 C), the same for all tokens. Gates by
    three sigmoids without bias, as is customary, break that rule from the start: a plain memory with correlated keys
    overflows.

    **Where it is not the paper's best model.** This memory is one matrix per head. The memory of the paper's best model
    is an MLP of two or more layers.

    Parameters
    ----------
    hidden_size : int
        Size of the last axis of inputs and outputs.
    num_heads : int, default 4
    head_dim : int, optional
        Width of a head, D; None: hidden_size / num_heads.
    chunk_size : int, default 16
        Tokens per chunk, C: part of the model.
    norm_memory : bool, default True
        The memory with an inner LayerNorm, weight `w` and bias `b`; False: the plain memory.
    use_short_conv : bool, default True
        Convolve q, k and v over the last `conv_size` tokens.
    conv_size : int, default 4
    use_gate : bool, default True
        Gate the output with sigmoid(W_g x).
    norm_eps : float, default 1e-5
        Of the norm of the output.
    layer_idx : int, optional
        Place of the layer in `past_key_values`.
    conv : callable, optional
        ``conv(channels, conv_size)`` makes a module that is called as ``module(x, cache=, output_final_state=,
        cu_seqlens=)`` and returns y and its new cache, batch first; it applies its own activation.
        ``fla.modules.ShortConvolution`` is one.
    norm : callable, optional
        ``norm(head_dim, eps=norm_eps)`` makes a module that is called as ``module(o, gate)``, or ``module(o)`` without
        `use_gate`, and applies the gate. ``partial(fla.modules.FusedRMSNormGated, activation="sigmoid")`` is one.

    Attributes
    ----------
    M_0 : Parameter, shape (H, D, D)
        The memory at the start of every sequence, drawn from N(0, 1 / D).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        head_dim: int | None = None,
        chunk_size: int = 16,
        norm_memory: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        use_gate: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        *,
        conv: Callable[..., nn.Module] | None = None,
        norm: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "chunk_size": chunk_size, "conv_size": conv_size}
        hidden_size, num_heads, chunk_size, conv_size = (check_integer(name, size) for name, size in sizes.items())
        if head_dim is not None:
            head_dim = check_integer("head_dim", head_dim)
        elif hidden_size % num_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_heads` = {num_heads} unless `head_dim` is given, "
                f"got {hidden_size}"
            )
        H, D = num_heads, head_dim or hidden_size // num_heads
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, H, D
        self.chunk_size, self.layer_idx = chunk_size, layer_idx
        self.use_short_conv, self.use_gate = use_short_conv, use_gate
        for name in ("q", "k", "v"):
            setattr(self, f"{name}_proj", nn.Linear(hidden_size, H * D, bias=False))
            if use_short_conv:
                setattr(self, f"{name}_conv1d", (conv or ShortConvolution)(H * D, conv_size))
        self.gates = Gates(hidden_size, H, chunk_size)
        self.M_0 = nn.Parameter(torch.empty(H, D, D))
        self.w = nn.Parameter(torch.empty(H, D)) if norm_memory else None
        self.b = nn.Parameter(torch.empty(H, D)) if norm_memory else None
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, H * D, bias=False)
        self.o_norm = (norm or GatedRMSNorm)(D, eps=norm_eps)
        self.o_proj = nn.Linear(H * D, hidden_size, bias=False)
        self._reset_own()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, those of the sub-modules too; for a layer that was made on the meta device."""
        self._reset_own()
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()

    def _reset_own(self) -> None:
        nn.init.normal_(self.M_0, std=self.head_dim**-0.5)
        if self.w is not None and self.b is not None:
            nn.init.ones_(self.w)
            nn.init.zeros_(self.b)
        self._mark()

    def _mark(self) -> None:
        """Say that weight decay is not for these; a copy of a parameter does not keep the mark."""
        for parameter in (self.gates.bias, self.M_0, self.w, self.b):
            if parameter is not None:
                parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def _apply(self, *args: Any, **kwargs: Any) -> TitansLinear:
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._mark()
        return self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark()

    def extra_repr(self) -> str:
        """Sizes that the sub-modules do not show."""
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, chunk_size={self.chunk_size}"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        *,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, None, Any]:
        """Read tokens: each token is stored in the memory and looked up in it.

        Parameters
        ----------
        hidden_states : Tensor, shape (B, T, hidden_size)
        attention_mask : Tensor, shape (B, L) with L >= T, bool or int, optional
            1 for tokens, 0 for padding; of a longer mask the last T columns count. Masked tokens are taken out of
            their sequences, which costs a synchronisation; their outputs are zero.
        past_key_values : cache, optional
            A cache of fla, or one of transformers whose layer `layer_idx` is a
            ``LinearAttentionLayer(number_of_states=4)``. The layer resumes from it and always updates it.
        use_cache : bool, default False
            Without `past_key_values`: return a `LayerState`.
        output_attentions : bool, default False
            There are no attentions: the second result is None.
        state : LayerState, optional
            Where the sequences stand, as an earlier call returned it.
        cu_seqlens : Tensor, shape (N + 1,), optional
            Bounds of sequences packed along T; B must be 1.

        Returns
        -------
        o : Tensor, shape (B, T, hidden_size)
        attentions : None
        cache
            `past_key_values` if it was given; else a `LayerState`, with `use_cache` or `state`; else None.

        Raises
        ------
        TypeError, ValueError
            If an argument breaks a rule above.
        """
        if hidden_states.ndim != 3 or hidden_states.shape[2] != self.hidden_size:
            raise ValueError(
                f"`hidden_states` must have shape (B, T, {self.hidden_size}), got {tuple(hidden_states.shape)}"
            )
        B, T = hidden_states.shape[:2]
        if attention_mask is not None and cu_seqlens is not None:
            raise ValueError("`attention_mask` and `cu_seqlens` must not both be given")
        places, bounds = (None, cu_seqlens) if attention_mask is None else _unpadding(attention_mask, hidden_states)
        if places is None or len(places) == B * T:
            o, final = self._resume(hidden_states, past_key_values, use_cache, state, cu_seqlens, T)
            return o, None, final
        packed = hidden_states.flatten(0, 1).index_select(0, places)[None]
        o, final = self._resume(packed, past_key_values, use_cache, state, bounds, T)
        padded = o.new_zeros(hidden_states.shape).flatten(0, 1)
        return padded.index_copy(0, places, o[0]).view(hidden_states.shape), None, final

    def _resume(
        self, x: Tensor, cache: Any, use_cache: bool, state: LayerState | None, cu_seqlens: Tensor | None, tokens: int
    ) -> tuple[Tensor, Any]:
        """Run the layer from a state or a cache, which counts `tokens`; return outputs and the new state or cache."""
        if cache is None:
            return self._run(x, state, cu_seqlens, use_cache or state is not None)
        if self.layer_idx is None:
            raise ValueError("`past_key_values` needs a layer with a `layer_idx`, got None")
        if state is not None:
            raise ValueError("`past_key_values` and `state` must not both be given")
        o, final = self._run(x, caches.read(cache, self.layer_idx), cu_seqlens, True)
        assert final is not None
        caches.write(cache, self.layer_idx, final, tokens)
        return o, cache

    def _run(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None, output_state: bool
    ) -> tuple[Tensor, LayerState | None]:
        if state is not None:
            memory, conv = state
            memory = memory if isinstance(memory, TitansState) else TitansState(*memory)
            state = LayerState(memory, tuple(conv)).to(x.device)
            if len(state.conv) != 3 * self.use_short_conv:
                raise ValueError(f"the state must have {3 * self.use_short_conv} convolutions, got {len(state.conv)}")
        projected = [self._project(i, x, state, output_state, cu_seqlens) for i in range(3)]
        q, k, v = (self._heads(y) for y, _ in projected)
        o, after = self._remember(_unit(q), _unit(k), v, self.gates(x), state, cu_seqlens, output_state)
        o = self.o_norm(o, self._heads(self.g_proj(x))) if self.use_gate else self.o_norm(o)
        o = self.o_proj(o.flatten(-2))
        if not output_state or after is None:
            return o, None
        return o, LayerState(after, tuple(y for _, y in projected if y is not None))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim)  # (B, T, H, D)

    def _project(
        self, i: int, x: Tensor, state: LayerState | None, output_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The rows of q, k or v, shape (B, T, H * D), and the cache of their convolution."""
        name = "qkv"[i]
        y = getattr(self, f"{name}_proj")(x)
        if not self.use_short_conv:
            return silu(y), None
        # a fused convolution may update its cache in place
        cache = state.conv[i].clone() if state is not None else None
        convolve = getattr(self, f"{name}_conv1d")
        y, cache = convolve(y, cache=cache, output_final_state=output_state, cu_seqlens=cu_seqlens)
        return y, cache

    def _remember(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, Tensor, Tensor],
        state: LayerState | None,
        cu_seqlens: Tensor | None,
        output_state: bool,
    ) -> tuple[Tensor, TitansState | None]:
        """The op on (B, T, H, D), in one step where there is one token of each sequence."""
        memory = self.M_0 if state is None else state.memory
        C = self.chunk_size
        if q.shape[1] == 1 and cu_seqlens is None:
            q_t, k_t, v_t, theta_t, alpha_t, eta_t = (x.squeeze(1) for x in (q, k, v, *gates))
            o_t, final = titans_linear_step(
                q_t, k_t, v_t, self.w, self.b, theta_t, alpha_t, eta_t, memory, chunk_size=C, log_gates=True
            )
            return o_t.unsqueeze(1), final
        return chunk_titans_linear(
            q, k, v, self.w, self.b, *gates, chunk_size=C, initial_state=memory, output_final_state=output_state,
            cu_seqlens=cu_seqlens, log_gates=True,
        )  # fmt: skip


def _unit(x: Tensor) -> Tensor:
    """Unit vectors along the last axis; rows of about `SHORT` and less stay shorter, which bounds the gradient."""
    y = x.to(compute_dtype(x.dtype))
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + SHORT**2)).to(x.dtype)


def _unpadding(mask: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the tokens in the flattened batch, and the bounds of their sequences, from a mask of 0 and 1."""
    B, T = x.shape[:2]
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            "`attention_mask` must mark tokens with 1 and padding with 0, in bool or int; a mask to add to scores of "
            f"attention does not apply, got dtype {name_of(mask.dtype)}"
        )
    if mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] < T:
        raise ValueError(f"`attention_mask` must have shape (B, L) = ({B}, {T} or more), got {tuple(mask.shape)}")
    mask = mask[:, mask.shape[1] - T :].to(x.device)
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"`attention_mask` must hold 0 and 1 alone, got {int(mask.min())} to {int(mask.max())}")
    lengths = mask.long().sum(1)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return mask.flatten().nonzero().squeeze(-1), cu_seqlens

"""The parts of `TitansLinear` that torch does not have: gates in logs, a convolution that resumes, a gated norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid, silu

from titans.arguments import compute_dtype

# where training starts
ETA = 0.9
KEEP = 0.99


def logit(p: float) -> float:
    """The x whose sigmoid is p."""
    return math.log(p / (1 - p))


class Gates(nn.Module):
    """Logs of the three gates of every head, in float32 (float64 for float64 inputs) whatever the parameters' dtype.

    With t, a, m = W x + bias, one of each per head::

        log eta = logsigmoid(m)             log(1 - alpha) = logsigmoid(a)
        log theta = logsigmoid(t) + log(1 - eta) - log C

    `TitansLinear` says why theta stays below (1 - eta) / C. The weights start at zero, so that training starts with
    eta = 0.9, 1 - alpha = 0.99 and theta = 0.05 / C for every token. It is no `nn.Linear`, because the `_init_weights`
    of most model classes sets the bias of every `nn.Linear` to zero.

    Parameters
    ----------
    hidden_size, num_heads, chunk_size : int
    """

    def __init__(self, hidden_size: int, num_heads: int, chunk_size: int) -> None:
        super().__init__()
        self.num_heads, self.chunk_size = num_heads, chunk_size
        self.weight = nn.Parameter(torch.empty(3 * num_heads, hidden_size))
        self.bias = nn.Parameter(torch.empty(3 * num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weights and biases to where training starts."""
        nn.init.zeros_(self.weight)
        with torch.no_grad():
            for part, start in zip(self.bias.chunk(3), (0.0, logit(KEEP), logit(ETA)), strict=True):
                part.fill_(start)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log theta, log(1 - alpha) and log eta.

        Parameters
        ----------
        x : Tensor, shape (B, T, hidden_size)

        Returns
        -------
        tuple of Tensor, shape (B, T, H)
        """
        dtype = compute_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            logits = linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
            t, a, m = logits.chunk(3, dim=-1)  # (B, T, H)
            # 1 - sigmoid(m) = sigmoid(-m)
            log_theta = logsigmoid(t) + logsigmoid(-m) - math.log(self.chunk_size)
            return log_theta, logsigmoid(a), logsigmoid(m)


class ShortConvolution(nn.Module):
    """Causal depthwise convolution and SiLU, resumable from the last kernel_size - 1 inputs.

    A sum of shifted products instead of `conv1d`: it has the same order of operations for any number of tokens.

    Parameters
    ----------
    channels, kernel_size : int
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as `nn.Conv1d` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(
        self,
        x: Tensor,
        cache: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve the tokens of every sequence after those that its cache holds.

        Parameters
        ----------
        x : Tensor, shape (B, T, channels)
        cache : Tensor, shape (N, channels, kernel_size - 1), optional
            The inputs before `x`; None: zeros.
        output_final_state : bool, default False
        cu_seqlens : Tensor, shape (N + 1,), optional
            Bounds of sequences packed along T.

        Returns
        -------
        y : Tensor, shape (B, T, channels)
        cache : Tensor, shape (N, channels, kernel_size - 1), or None
        """
        channels, _, width = self.weight.shape
        N = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        shape = (N, channels, width - 1)
        if cache is not None and cache.shape != shape:
            raise ValueError(
                f"the cache of a convolution must have shape (N, channels, kernel_size - 1) = {shape}, "
                f"got {tuple(cache.shape)}"
            )
        history = (x.new_zeros(shape) if cache is None else cache.to(x.dtype)).transpose(1, 2)  # (N, W - 1, channels)
        if cu_seqlens is None:
            extended = torch.cat([history, x], dim=1)  # (B, W - 1 + T, channels)
            y, final = self._convolve(extended), extended[:, x.shape[1] :]
        else:
            y, final = self._convolve_packed(x[0], history, cu_seqlens.to(x.device))
        # a copy, since a view would keep all tokens alive
        return y, final.transpose(1, 2).clone(memory_format=torch.contiguous_format) if output_final_state else None

    def _convolve(self, extended: Tensor) -> Tensor:
        """Outputs (..., L, channels) of inputs (..., W - 1 + L, channels)."""
        dtype = compute_dtype(extended.dtype)
        weight, x = self.weight.to(dtype), extended.to(dtype)
        length = max(x.shape[-2] - (weight.shape[-1] - 1), 0)
        taps = [x[..., i : i + length, :] * weight[:, 0, i] for i in range(weight.shape[-1])]
        y = taps[0]
        for tap in taps[1:]:
            y = y + tap
        return silu(y).to(extended.dtype)

    def _convolve_packed(self, x: Tensor, history: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve the sequences of x, shape (T, channels), with each one's history written in front of it."""
        T, (N, before, channels) = x.shape[0], history.shape
        tokens, sequences = (torch.arange(size, device=x.device) for size in (T, N))
        sequence = torch.searchsorted(cu_seqlens[1:], tokens.to(cu_seqlens.dtype), right=True)  # (T,)
        places = tokens + (sequence + 1) * before
        offsets = torch.arange(before, device=x.device)
        starts = (cu_seqlens[:-1] + sequences * before)[:, None] + offsets  # (N, W - 1)
        ends = (cu_seqlens[1:] + sequences * before)[:, None] + offsets
        extended = x.new_empty(T + N * before, channels)
        extended = extended.index_copy(0, starts.flatten().long(), history.reshape(-1, channels))
        extended = extended.index_copy(0, places, x)
        y = self._convolve(extended).index_select(0, places - before)
        return y[None], extended.index_select(0, ends.flatten().long()).view(N, before, channels)


class GatedRMSNorm(nn.Module):
    """x / rms(x) * weight * sigmoid(gate), computed in float32 (float64 for float64 inputs).

    Parameters
    ----------
    width : int
        Size of the last axis.
    eps : float
        Added to the mean square.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalise the last axis of `x` and gate it.

        Parameters
        ----------
        x, gate : Tensor, shape (..., width)
            A gate of None is left out.

        Returns
        -------
        Tensor, shape (..., width)
        """
        dtype = compute_dtype(x.dtype)
        y = x.to(dtype)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight.to(dtype)
        return (y if gate is None else y * gate.to(dtype).sigmoid()).to(x.dtype)

"""Where the state of a layer is kept between calls: our own tuple, or the caches of fla and transformers.

Neither package is imported: a cache is known by its methods.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from titans.arguments import TitansState, rows_of

# M, S, anchor, offset: the states that a layer of a transformers cache must have room for
STATES = len(TitansState._fields)


class LayerState(NamedTuple):
    """Where a `TitansLinear` stands in its sequences.

    Attributes
    ----------
    memory : TitansState
    conv : tuple of Tensor
        The caches of the convolutions of q, k and v, each (N, channels, conv_size - 1); empty without convolutions.
    """

    memory: TitansState
    conv: tuple[Tensor, ...]

    def detach(self) -> LayerState:
        """The same state, cut from the autograd graph."""
        return LayerState(self.memory.detach(), tuple(x.detach() for x in self.conv))

    def clone(self) -> LayerState:
        """A copy that shares no memory with the state."""
        return LayerState(self.memory.clone(), tuple(x.clone() for x in self.conv))

    def to(self, *args: Any, **kwargs: Any) -> LayerState:
        """The same state on another device or in another dtype, by the arguments of `torch.Tensor.to`."""
        return LayerState(self.memory.to(*args, **kwargs), tuple(x.to(*args, **kwargs) for x in self.conv))

    def cpu(self) -> LayerState:
        """The same state on the CPU."""
        return self.to("cpu")

    def select(self, sequences: Any) -> LayerState:
        """The state of some sequences, as `TitansState.select`."""
        rows = rows_of(sequences)
        return LayerState(self.memory.select(rows), tuple(x[rows] for x in self.conv))


# so that torch.load(..., weights_only=True), its default, accepts a saved state
torch.serialization.add_safe_globals([LayerState])
# and torch.export.save a program with one
_register_namedtuple(LayerState, serialized_type_name="titans.LayerState")


def read(cache: Any, layer_idx: int) -> LayerState | None:
    """The state that a cache holds for a layer; None before the first call.

    Raises
    ------
    TypeError, ValueError
        If the cache is neither fla's nor one of transformers with room for four states in this layer.
    """
    layer = _linear_attention_layer(cache, layer_idx)
    if layer is not None:
        if not all(layer.has_previous_state[i] for i in range(STATES)):
            return None
        conv = tuple(layer.conv_states[i] for i in range(STATES - 1))
        memory = TitansState(*(layer.recurrent_states[i] for i in range(STATES)))
        # without convolutions, the tensors that stand for their caches have no channels
        return LayerState(memory, tuple(x for x in conv if x.shape[1]))
    state = cache[layer_idx] if len(cache) > layer_idx else None
    if state is None or state["recurrent_state"] is None:
        return None
    # fla maps states with `tuple`
    return LayerState(TitansState(*state["recurrent_state"]), tuple(state["conv_state"] or ()))


def write(cache: Any, layer_idx: int, state: LayerState, tokens: int) -> None:
    """Store the state of a layer after so many more tokens."""
    layer = _linear_attention_layer(cache, layer_idx)
    if layer is None:
        cache.update(
            layer_idx=layer_idx, recurrent_state=tuple(state.memory), conv_state=state.conv or None, offset=tokens
        )
        return
    # an offloaded layer would mix devices
    layer.prefetch()
    # A layer of transformers counts as filled, state by state, once there is a state of a convolution.
    nothing = state.memory.M.new_empty(len(state.memory.M), 0, 0)
    for i, x in enumerate(state.memory):
        conv = state.conv[i] if i < len(state.conv) else nothing
        layer.update_conv_state(conv, i, conv_kernel_size=conv.shape[-1])
        layer.update_recurrent_state(x, i)


def _linear_attention_layer(cache: Any, layer_idx: int) -> Any:
    """The layer of a transformers cache, or None if the cache is fla's."""
    layers = getattr(cache, "layers", ())
    layer: Any = layers[layer_idx] if layer_idx < len(layers) else None
    if hasattr(layer, "update_recurrent_state"):
        if layer.number_of_states != STATES:
            raise ValueError(
                f"layer {layer_idx} of `past_key_values` must have number_of_states = {STATES} "
                f"(M, S, anchor, offset), got {layer.number_of_states}"
            )
        return layer
    if not hasattr(cache, "__getitem__") or not hasattr(cache, "update"):
        raise TypeError(
            f"`past_key_values` must be a cache of fla, or one of transformers whose layer {layer_idx} is a "
            f"LinearAttentionLayer(number_of_states={STATES}), got {type(cache).__name__}"
        )
    return None

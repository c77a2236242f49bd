"""How DTensor shards the operators, by batch or by heads or not at all, and the layer by heads.

The operators send nothing between processes in the forward.

On each dimension of a device mesh one of these holds:

========== =================== ========= ============== ==========================
rule        tokens (B, T, H, ..) w, b      states (N, H, ..) their gradients
========== =================== ========= ============== ==========================
replicated  Replicate           Replicate Replicate       Replicate
batch       Shard(0)            Replicate Shard(0)        dw and db are Partial sums
heads       Shard(2)            Shard(0)  Shard(1)        as their inputs
========== =================== ========= ============== ==========================

Packed sequences share the batch entry 0, so they are sharded by heads only. Tokens cannot be sharded along T: a chunk's
anchor comes from the chunk before it, by a function that is not linear.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call

from titans.arguments import Call
from titans.autograd import chunked, chunked_backward, step, unrecorded
from titans.layer import TitansLinear

# dimension along which a parameter is cut; None: every process has all of it
HEADS = {"o_proj": 1, "o_norm": None, "gates": None}


class _Rule(NamedTuple):
    """Placements of one rule; `kept` is that of the states of blocks, `parameters_grad` that of dw and db."""

    tokens: Any
    parameters: Any
    states: Any
    offset: Any
    kept: Any
    parameters_grad: Any


def context_parallel(x: Any, mesh_dim: int = 0) -> Any:
    """Exchange a shard of the tokens for a shard of the heads, or back: one all-to-all.

    Between layers that work along T, context parallelism keeps activations sharded by tokens. Around this op they are
    sharded by heads. Left alone, DTensor would gather all tokens on every rank.

    Parameters
    ----------
    x : DTensor, shape (B, T, H, ...)
        Sharded on this mesh dimension along T (becomes H) or along H (becomes T).
    mesh_dim : int, default 0
        The dimension of `x.device_mesh` to act on.

    Returns
    -------
    DTensor

    Raises
    ------
    ValueError
        If `x` is sharded neither along T nor along H on that mesh dimension.
    """
    from torch.distributed.tensor import Shard

    placements = list(x.placements)
    here = placements[mesh_dim]
    if here not in (Shard(1), Shard(2)):
        raise ValueError(f"`x` must be sharded along dimension 1 (T) or 2 (H), got {here}")
    placements[mesh_dim] = Shard(2) if here == Shard(1) else Shard(1)
    return x.redistribute(placements=placements)


def tensor_parallel(layer: TitansLinear, mesh: Any) -> TitansLinear:
    """Shard a layer by heads over the processes of a mesh, in place.

    Every process calls the layer with the same tokens and gets the same outputs. The forward sends one all-reduce: the
    outputs'. The backward sends one for the gradient of `hidden_states`, and small ones for the gradients of the
    parameters that every process has, the gates' and the norm's. ::

        mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (2,))
        layer = tensor_parallel(TitansLinear(1024, num_heads=16).cuda(), mesh)

    Parameters
    ----------
    layer : TitansLinear
        With the same parameters on every process. They become DTensors under the same names, so that
        `torch.distributed.checkpoint` saves the whole layer, and any number of processes loads it.
    mesh : DeviceMesh
        One-dimensional.

    Returns
    -------
    TitansLinear
        `layer`. The states and caches that it takes and returns are plain tensors: those of the process's own heads.

    Raises
    ------
    ValueError
        If `num_heads` is not a multiple of the number of processes, or the mesh has more than one dimension.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if mesh.ndim != 1:
        raise ValueError(f"`mesh` must have one dimension, got {mesh.ndim}")
    if layer.num_heads % mesh.size():
        raise ValueError(f"`num_heads` must be a multiple of the {mesh.size()} processes, got {layer.num_heads}")
    on_meta: dict[int, Any] = {id(p): nn.Parameter(p.to("meta")) for p in layer.parameters()}
    own = copy.deepcopy(layer, on_meta)
    own.num_heads = layer.num_heads // mesh.size()
    for name, module in layer.named_modules():
        dim = HEADS.get(name.partition(".")[0], 0)
        at = Replicate() if dim is None else Shard(dim)
        for key, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(
                key, nn.Parameter(distribute_tensor(p.detach(), mesh, [at]), requires_grad=p.requires_grad)
            )
    layer.__class__ = _ByHeads
    # not a sub-module: it has no parameters of its own
    layer.__dict__.update(_mesh=mesh, _own=own)
    layer._mark()
    return layer


class _ByHeads(TitansLinear):
    """A layer whose parameters are DTensors and whose forward is that of a smaller layer on their local parts."""

    _mesh: Any
    _own: TitansLinear

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, None, Any]:
        """As `TitansLinear.forward`."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        parameters = {name: self._local(name, p) for name, p in self.named_parameters()}
        x = _replicated(hidden_states, self._mesh)
        o, _, state = functional_call(self._own, parameters, (x, *arguments), options)
        whole = DTensor.from_local(o, self._mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
        return whole.to_local(), None, state

    def _local(self, name: str, parameter: Any) -> Tensor:
        """The part of a parameter that belongs to the process's own heads."""
        x: Tensor = parameter.to_local()
        module = name.partition(".")[0]
        if HEADS.get(module, 0) is not None:
            return x
        x = _replicated(x, self._mesh)
        if module != "gates":
            return x
        count = self._own.num_heads
        first = count * self._mesh.get_local_rank()
        # the gates' rows are theta's of all heads, then alpha's, then eta's
        return x.view(3, self.num_heads, *x.shape[1:])[:, first : first + count].flatten(0, 1)


def _replicated(x: Tensor, mesh: Any) -> Tensor:
    """Return x, of which every process holds a copy; its gradient is summed over the processes."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


@functools.cache
def register() -> None:
    """Give DTensor the rules, once; called when the op first meets a tensor of another type than `Tensor`."""
    from torch.distributed.tensor.experimental import register_sharding

    rules = ((chunked, _chunked), (unrecorded, _unrecorded), (chunked_backward, _chunked_backward), (step, _step))
    for operator, rule in rules:
        register_sharding(operator)(rule)


def _rules(packed: bool) -> Sequence[_Rule]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    R = Replicate()
    replicated = _Rule(R, R, R, R, R, R)
    batch = _Rule(Shard(0), R, Shard(0), Shard(0), Shard(0), Partial())
    heads = _Rule(Shard(2), Shard(0), Shard(1), R, Shard(1), Shard(0))
    return [replicated, heads] if packed else [replicated, batch, heads]


def _fields(call: Call, rule: _Rule) -> list[Any]:
    """Placements of the fields of a call; None where there is no tensor."""
    at = dict.fromkeys(Call._fields, rule.tokens)
    at |= dict.fromkeys(("w", "b"), rule.parameters) | dict.fromkeys(("M", "S", "anchor"), rule.states)
    # every rank knows all bounds
    from torch.distributed.tensor import Replicate

    at |= {"offset": rule.offset, "cu_seqlens": Replicate()} | dict.fromkeys(("eps", "chunk_size", "log_gates"))
    return [None if value is None else at[name] for name, value in call._asdict().items()]


def _residuals(call: Call, rule: _Rule, backend: str) -> list[Any]:
    """Placements of M0, S0, x and r; x and r are empty but for the kernels, r in the plain memory as well."""
    from torch.distributed.tensor import Replicate

    x = rule.tokens if backend == "triton" else Replicate()
    return [rule.kept, rule.kept, x, Replicate() if call.w is None else x]


def _chunked(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    *fields, backend = arguments
    call = Call(*fields)
    return [
        ([rule.tokens, *[rule.states] * 3, *_residuals(call, rule, backend)], [*_fields(call, rule), None])
        for rule in _rules(call.cu_seqlens is not None)
    ]


def _unrecorded(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    return [(results[:4], given) for results, given in _chunked(*arguments)]


def _chunked_backward(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    from torch.distributed.tensor import Replicate

    count = len(Call._fields)
    call, backend, cotangents = Call(*arguments[:count]), arguments[count], arguments[count + 5 :]
    found = []
    for rule in _rules(call.cu_seqlens is not None):
        # without w and b theirs are empty
        parameters = Replicate() if call.w is None else rule.parameters_grad
        gradients = [*[rule.tokens] * 3, *[parameters] * 2, *[rule.tokens] * 3, *[rule.states] * 3]
        flowing = [rule.tokens, *[rule.states] * 3]
        inflow = [None if d is None else at for d, at in zip(cotangents, flowing, strict=True)]
        found.append((gradients, [*_fields(call, rule), None, *_residuals(call, rule, backend), *inflow]))
    return found


def _step(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    call = Call(*arguments)
    return [([rule.tokens, *[rule.states] * 3, rule.offset], _fields(call, rule)) for rule in _rules(packed=False)]

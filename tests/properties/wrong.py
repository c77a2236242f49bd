"""The definition in plain PyTorch, and versions of it with one mistake each: what the suite must catch."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from properties.harness.implementations import CLAIMS, Implementation


class State(NamedTuple):
    M: Tensor
    S: Tensor
    anchor: Tensor
    offset: Tensor


@dataclass
class Definition:
    """Equations (1) to (6), a token at a time, differentiated by autograd; subclasses change one method."""

    factor: float = 2.0

    def gates(self, theta: Tensor, alpha: Tensor, eta: Tensor, log_gates: bool, dtype: torch.dtype) -> list[Tensor]:
        theta, alpha, eta = (x.to(dtype) for x in (theta, alpha, eta))
        return [theta.exp(), alpha.exp(), eta.exp()] if log_gates else [theta, 1 - alpha, eta]

    def norm(self, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        r = (y.var(-1, correction=0, keepdim=True) + eps).rsqrt()
        return (y - y.mean(-1, keepdim=True)) * r, r

    def layer_norm_vjp(self, e: Tensor, x: Tensor, r: Tensor) -> Tensor:
        return r * (e - e.mean(-1, keepdim=True) - x * (e * x).mean(-1, keepdim=True))

    def inner_gradient(self, k: Tensor, v: Tensor, A: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
        if w is None or b is None:
            return k @ A - v
        x, r = self.norm(k @ A, eps)
        return self.layer_norm_vjp((x * w + b - (v - k)) * w, x, r)

    def anchor(self, A: Tensor, M: Tensor, before: Tensor, place: int, C: int) -> Tensor:
        """The anchor after the token at `place` of its chunk, which made M of `before`."""
        return M if place == C - 1 else A

    def momentum(self, S: Tensor, place: int, C: int) -> Tensor:
        """The momentum that goes on after this token."""
        return S

    def step(self, M: Tensor, S: Tensor, theta: Tensor, a: Tensor, eta: Tensor, k: Tensor, u: Tensor) -> Any:
        S = eta * S - theta * self.factor * k.mT @ u
        return a * M + S, S

    def tail(self, M: Tensor, S: Tensor, a: Tensor, eta: Tensor, missing: int) -> tuple[Tensor, Tensor]:
        """The state after a tail that lacks `missing` tokens of a chunk."""
        return M, S

    def start(self, state: State, n: int, previous: State | None) -> tuple[Tensor, Tensor, Tensor, int]:
        return state.M[n], state.S[n], state.anchor[n], int(state.offset[n])

    def before(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        return o, state

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, b: Tensor | None, theta: Tensor, alpha: Tensor,
        eta: Tensor, eps: float = 1e-6, chunk_size: int = 16, initial_state: Any = None,
        output_final_state: bool = False, *, cu_seqlens: Tensor | None = None, log_gates: bool = False,
    ) -> tuple[Tensor, State | None]:  # fmt: skip
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        passed = [q, k, v, theta, alpha, eta]
        q, k, v, theta, alpha, eta = (x.contiguous() for x in self.before(passed))
        theta, alpha, eta = (x[..., 0] if x.ndim == 4 else x for x in (theta, alpha, eta))
        gates = self.gates(theta, alpha, eta, log_gates, dtype)
        rows = [x.to(dtype)[..., None, :] for x in (q, k, v)]  # (B, T, H, 1, D)
        w, b = (None if x is None else x.to(dtype)[:, None] for x in (w, b))
        bounds = None if cu_seqlens is None else cu_seqlens.tolist()
        N = q.shape[0] if bounds is None else len(bounds) - 1
        state = self.initial(initial_state, N, q, dtype)
        outputs, finals = [], []
        for n in range(N):
            row, span = (n, slice(None)) if bounds is None else (0, slice(bounds[n], bounds[n + 1]))
            begin = self.start(state, n, finals[-1] if finals else None)
            o, final = self.sequence([x[row, span] for x in (*rows, *gates)], w, b, eps, chunk_size, *begin)
            outputs.append(o)
            finals.append(final)
        o = torch.stack(outputs) if bounds is None else torch.cat(outputs)[None]
        last = State(*(torch.stack(x) for x in zip(*finals, strict=True)))
        o, last = self.finish(o.to(q.dtype), last, passed, output_final_state)
        return o, last if output_final_state else None

    def initial(self, given: Any, N: int, q: Tensor, dtype: torch.dtype) -> State:
        if isinstance(given, State):
            return State(*(x.contiguous() for x in given))
        M = (
            torch.zeros(N, *q.shape[2:], q.shape[-1], dtype=dtype, device=q.device)
            if given is None
            else given.to(dtype).contiguous()
        )
        return State(M, torch.zeros_like(M), M, torch.zeros(N, dtype=torch.int64, device=q.device))

    def sequence(
        self, tokens: list[Tensor], w: Tensor | None, b: Tensor | None, eps: float, C: int,
        M: Tensor, S: Tensor, A: Tensor, offset: int,
    ) -> tuple[Tensor, State]:  # fmt: skip
        T, o, a, eta = len(tokens[0]), [], M.new_ones(1), M.new_ones(1)
        for t in range(T):
            q, k, v, theta, a, eta = (x[t] if i < 3 else x[t][:, None, None] for i, x in enumerate(tokens))
            place, before = (offset + t) % C, M
            u = self.inner_gradient(k, v, A, w, b, eps)
            M, S = self.step(M, S, theta, a, eta, k, u)
            A, S = self.anchor(A, M, before, place, C), self.momentum(S, place, C)
            y = q @ M
            o.append((y if w is None or b is None else y + self.norm(y, eps)[0] * w + b)[:, 0])
        M, S = self.tail(M, S, a, eta, -(offset + T) % C)
        rows = torch.stack(o) if o else tokens[0][:, :, 0]
        return rows, State(M, S, A, torch.tensor((offset + T) % C, device=M.device))


class Half(Definition):
    """The factor 2 is missing."""

    def step(self, M: Tensor, S: Tensor, theta: Tensor, a: Tensor, eta: Tensor, k: Tensor, u: Tensor) -> Any:
        return super().step(M, S, theta / 2, a, eta, k, u)


class NoMomentumAcrossChunks(Definition):
    """The momentum is dropped where a chunk ends."""

    def momentum(self, S: Tensor, place: int, C: int) -> Tensor:
        return S * (place != C - 1)


class LateAnchor(Definition):
    """The anchor is refreshed one token late."""

    def anchor(self, A: Tensor, M: Tensor, before: Tensor, place: int, C: int) -> Tensor:
        return M if place == 0 else A


class TailRunsOn(Definition):
    """The state after a tail is that after a whole chunk padded with the last token's gates."""

    def tail(self, M: Tensor, S: Tensor, a: Tensor, eta: Tensor, missing: int) -> tuple[Tensor, Tensor]:
        for _ in range(missing):
            S = eta * S
            M = a * M + S
        return M, S


class UndividedLayerNorm(Definition):
    """The first term of the LayerNorm gradient is not divided by D."""

    def layer_norm_vjp(self, e: Tensor, x: Tensor, r: Tensor) -> Tensor:
        D = e.shape[-1]
        return r * (D * e - e.mean(-1, keepdim=True) - x * (e * x).mean(-1, keepdim=True))


class DetachedState(Definition):
    """Nothing flows back from the final state."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        return o, State(*(x.detach() for x in state))


class WritesItsInput(Definition):
    """The values are overwritten."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        with torch.no_grad():
            tensors[2].detach().neg_()
        return o, state


class LooksAhead(Definition):
    """Keys are scaled by the largest of the whole call and back: no error to speak of, but later tokens show."""

    def before(self, tensors: list[Tensor]) -> list[Tensor]:
        scale = tensors[1].detach().abs().max() * 3 + 1 if tensors[1].numel() else 1
        return [tensors[0], tensors[1] / scale * scale, *tensors[2:]]


class SpreadsNaN(Definition):
    """A sum over everything enters times zero."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        return o + o.detach().sum() * 0, state


class HidesNaN(Definition):
    """What is not a number is called zero."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        return o.nan_to_num(), state


class WholeProducts(Definition):
    """All products of queries and keys are formed, and those with later keys meet a zero."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        q, k = (x.detach().movedim(1, -2).float() for x in tensors[:2])  # (B, H, T, D)
        later = ((q @ k.mT).triu(1) * 0).sum(-1).movedim(-1, 1)
        return o + later[..., None].to(o.dtype), state


class WholeGradients(Definition):
    """All products of cotangents and values are formed in the backward, and those with later values meet a zero."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        v = tensors[2].detach().movedim(1, -2).float()  # (B, H, T, D)

        def with_later(do: Tensor) -> Tensor:
            later = ((do.movedim(1, -2).float() @ v.mT).triu(1) * 0).sum(-1).movedim(-1, 1)
            return do + later[..., None].to(do.dtype)

        if o.requires_grad:
            o.register_hook(with_later)
        return o, state


@dataclass
class Unsteady(Definition):
    """The last bit of the outputs is another one in every other call."""

    calls: int = 0

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        self.calls += 1
        return o * (1 + 2 * torch.finfo(o.dtype).eps * (self.calls % 2)), state


class Sloppy(Definition):
    """The outputs are off by some units in the last place."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        return o * (1 + 64 * torch.finfo(o.dtype).eps), state


class Uninitialised(Definition):
    """Memory that nobody wrote is added times zero."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        return o + torch.empty(o.shape, dtype=o.dtype).nan_to_num(1e-3), state


class GatesInHalf(Definition):
    """Gates are rounded to bfloat16."""

    def gates(self, theta: Tensor, alpha: Tensor, eta: Tensor, log_gates: bool, dtype: torch.dtype) -> list[Tensor]:
        return super().gates(*(x.bfloat16() for x in (theta, alpha, eta)), log_gates, dtype)


class GatesStayHalf(Definition):
    """1 - alpha is computed in the gates' own dtype."""

    def gates(self, theta: Tensor, alpha: Tensor, eta: Tensor, log_gates: bool, dtype: torch.dtype) -> list[Tensor]:
        theta, a, eta = super().gates(theta, alpha, eta, log_gates, dtype)
        return [theta, a if log_gates else (1 - alpha).to(dtype), eta]


class LogOfZero(Definition):
    """eta goes through its log: right where eta is not 0, and NaN in the gradient where it is."""

    def gates(self, theta: Tensor, alpha: Tensor, eta: Tensor, log_gates: bool, dtype: torch.dtype) -> list[Tensor]:
        theta, a, eta = super().gates(theta, alpha, eta, log_gates, dtype)
        return [theta, a, eta.log().exp()]


class FlushesGates(Definition):
    """Gates below 2^-20 count as zero."""

    def gates(self, theta: Tensor, alpha: Tensor, eta: Tensor, log_gates: bool, dtype: torch.dtype) -> list[Tensor]:
        gates = super().gates(theta, alpha, eta, log_gates, dtype)
        return [torch.where(x.detach() < 2.0**-20, x * 0, x) for x in gates]


class ForgetsOffset(Definition):
    """A resumed sequence starts a chunk, and says it did not."""

    def sequence(self, tokens: list[Tensor], *arguments: Any) -> tuple[Tensor, State]:
        o, state = super().sequence(tokens, *arguments[:-1], 0)
        return o, state._replace(offset=torch.tensor((arguments[-1] + len(tokens[0])) % arguments[3]))


class LeaksIntoTheNext(Definition):
    """A sequence starts with the momentum of the one before it."""

    def start(self, state: State, n: int, previous: State | None) -> tuple[Tensor, Tensor, Tensor, int]:
        M, S, A, offset = super().start(state, n, previous)
        return M, S if previous is None else S + previous.S, A, offset


class OneHeadsGates(Definition):
    """All heads decay like the first."""

    def gates(self, theta: Tensor, alpha: Tensor, eta: Tensor, log_gates: bool, dtype: torch.dtype) -> list[Tensor]:
        theta, a, eta = super().gates(theta, alpha, eta, log_gates, dtype)
        return [theta, a[:, :, :1].expand_as(a), eta]


class StateChangesOutputs(Definition):
    """Outputs are a bit off when the final state is wanted."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        return o * (1 + wanted * torch.finfo(o.dtype).eps), state


class DecaysMomentumTwice(Definition):
    """The momentum that enters the memory has decayed once too often."""

    def step(self, M: Tensor, S: Tensor, theta: Tensor, a: Tensor, eta: Tensor, k: Tensor, u: Tensor) -> Any:
        S = eta * S
        M = a * M + eta * S - theta * 2 * k.mT @ u
        return M, S - theta * 2 * k.mT @ u


class KeepsSomeMomentum(Definition):
    """eta is at least 2^-8."""

    def gates(self, theta: Tensor, alpha: Tensor, eta: Tensor, log_gates: bool, dtype: torch.dtype) -> list[Tensor]:
        theta, a, eta = super().gates(theta, alpha, eta, log_gates, dtype)
        return [theta, a, eta.clamp(min=2.0**-8)]


class NotLinear(Definition):
    """The plain memory's residual saturates, far beyond what it usually is."""

    def inner_gradient(self, k: Tensor, v: Tensor, A: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
        return super().inner_gradient(k, v, A, w, b, eps).clamp(-1, 1)


class Exponential(torch.autograd.Function):
    """exp, with a derivative of 1 at -inf."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        return gradients[0] * torch.where(x.isneginf(), 1, x.exp())


class DerivativeAtLogZero(Definition):
    """A log gate of -inf has the derivative that the linear gate has."""

    def gates(self, theta: Tensor, alpha: Tensor, eta: Tensor, log_gates: bool, dtype: torch.dtype) -> list[Tensor]:
        if not log_gates:
            return super().gates(theta, alpha, eta, log_gates, dtype)
        return [Exponential.apply(x.to(dtype)) for x in (theta, alpha, eta)]


class LayoutMatters(Definition):
    """Sums run in the order in which the keys lie in memory."""

    def before(self, tensors: list[Tensor]) -> list[Tensor]:
        k = tensors[1]
        return tensors if k.is_contiguous() else [tensors[0], k * (1 + 2 * torch.finfo(k.dtype).eps), *tensors[2:]]


class IgnoresStrides(Definition):
    """A cotangent is read as if it were contiguous."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        if o.requires_grad:
            o.register_hook(lambda do: do.as_strided(do.shape, torch.empty(do.shape).stride()))
        return o, state


class AxisMatters(Definition):
    """Gates with a last axis are a bit off."""

    def before(self, tensors: list[Tensor]) -> list[Tensor]:
        theta = tensors[3]
        return [
            *tensors[:3],
            theta * (1 + 2 * torch.finfo(theta.dtype).eps) if theta.ndim == 4 else theta,
            *tensors[4:],
        ]


class Scaled(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(context: Any, x: Tensor, scale: Callable[[Tensor], Tensor]) -> Tensor:
        context.scale = scale
        return x.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        return context.scale(gradients[0]), None


class GradModeMatters(Definition):
    """Without gradients the outputs are a bit off."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        return o * (1 + (not torch.is_grad_enabled()) * 2 * torch.finfo(o.dtype).eps), state


class NeedsEveryGradient(Definition):
    """Gradients are halved unless q requires one."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        return (o if tensors[0].requires_grad else Scaled.apply(o, lambda do: do / 2)), state


class HalvesGradientsWithoutState(Definition):
    """All gradients are halved when no final state is asked for."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        return (o if wanted else Scaled.apply(o, lambda do: do / 2)), state


class ReadsExpandedCotangents(Definition):
    """Of an expanded cotangent only the first element is read."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        def read(do: Tensor) -> Tensor:
            if do.numel() < 2 or any(do.stride()):
                return do
            return torch.zeros_like(do, memory_format=torch.contiguous_format).flatten().index_fill(
                0, torch.tensor([0]), float(do.flatten()[0])
            ).view(do.shape)  # fmt: skip

        return Scaled.apply(o, read), state


class SpreadsNaNBackward(Definition):
    """A sum over the whole cotangent enters times zero."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        return Scaled.apply(o, lambda do: do + do.sum() * 0), state


class WritesWhatItKept(Definition):
    """The backward uses up what it kept of the forward."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        kept = torch.ones((), dtype=o.dtype)

        def scale(do: Tensor) -> Tensor:
            scaled = do * kept
            kept.mul_(2)
            return scaled

        return Scaled.apply(o, scale), state


class ExpandedStateMatters(Definition):
    """An expanded initial state is a bit off."""

    def initial(self, given: Any, N: int, q: Tensor, dtype: torch.dtype) -> State:
        state = super().initial(given, N, q, dtype)
        M = given.M if isinstance(given, State) else given
        expanded = M is not None and N > 1 and M.stride(0) == 0
        return state._replace(M=state.M * (1 + expanded * 4 * torch.finfo(dtype).eps))


class DtypeMatters(Definition):
    """1 - alpha is computed in the gates' own dtype, which may be another than that of the inputs."""

    def gates(self, theta: Tensor, alpha: Tensor, eta: Tensor, log_gates: bool, dtype: torch.dtype) -> list[Tensor]:
        theta, a, eta = super().gates(theta, alpha, eta, log_gates, dtype)
        return [theta, a if log_gates else (1 - alpha).to(dtype), eta]


class RoundsToTheDtypeOfQ(Definition):
    """Gates are rounded to the dtype of q first."""

    def before(self, tensors: list[Tensor]) -> list[Tensor]:
        return [x.to(tensors[0].dtype) for x in tensors]


@dataclass
class CachesByAddress(Definition):
    """Values are kept under the address and shape of their tensor."""

    def __post_init__(self) -> None:
        self.kept: dict[Any, tuple[Tensor, Tensor]] = {}

    def before(self, tensors: list[Tensor]) -> list[Tensor]:
        v = tensors[2]
        # The tensor itself is kept, too, so that no other has its address.
        _, old = self.kept.setdefault((v.data_ptr(), v.shape), (v, v.detach().clone()))
        return [*tensors[:2], v + (old - v).detach(), *tensors[3:]]


class ReturnsItsArgument(Definition):
    """Without tokens the initial memory is the final one."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        return o if o.numel() else tensors[0], state

    def __call__(self, *arguments: Any, **options: Any) -> tuple[Tensor, State | None]:
        o, state = super().__call__(*arguments, **options)
        given = arguments[10]
        if o.numel() or state is None or given is None:
            return o, state
        return o, state._replace(M=given.M if isinstance(given, State) else given)


@dataclass
class KeepsGatesOfTheLastCall(Definition):
    """The backward scales by a number of the latest forward."""

    latest: float = 0.0

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        self.latest = now = float(tensors[0].detach().double().sum())
        return Scaled.apply(o, lambda do: do if self.latest == now else do / 2), state


@dataclass
class SharesAmongThreads(Definition):
    """The outputs of a call lie where another thread may write its own."""

    workspace: Any = None

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        self.workspace = mine = tensors[0]
        # Long enough for the others.
        time.sleep(2e-3)
        return o * (1 + (self.workspace is not mine) * 4 * torch.finfo(o.dtype).eps), state


class DefaultDtypeMatters(Definition):
    """A constant is made in the default dtype."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        third = torch.tensor(1 / 3, device=o.device)
        return (o * (third * 3).double()).to(o.dtype) if third.dtype == torch.float64 else o * (1 + 2**-9), state


class LengthMatters(Definition):
    """In calls of an odd number of tokens outputs are a bit off."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        return o * (1 + tensors[0].shape[1] % 2 * 2 * torch.finfo(o.dtype).eps), state


class LengthMattersBackward(Definition):
    """In calls of an odd number of tokens gradients are a bit off."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        odd = tensors[0].shape[1] % 2
        return Scaled.apply(o, lambda do: do * (1 + odd * 2 * torch.finfo(do.dtype).eps)), state


class RoundsTheMomentum(Definition):
    """A momentum that is handed over loses its last bits."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        return o, state._replace(S=state.S.half().to(state.S.dtype))


class PlaceInTheBatchMatters(Definition):
    """Every other sequence starts a bit off."""

    def start(self, state: State, n: int, previous: State | None) -> tuple[Tensor, Tensor, Tensor, int]:
        M, S, A, offset = super().start(state, n, previous)
        return M * (1 + n % 2 * 4 * torch.finfo(M.dtype).eps) + n % 2 * 2.0**-9, S, A, offset


class BatchMattersBackward(Definition):
    """In a batch gradients are a bit off."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        several = len(o) > 1
        return Scaled.apply(o, lambda do: do * (1 + several * 2 * torch.finfo(do.dtype).eps)), state


class StartsElsewhere(Definition):
    """A sequence without an initial state does not start at exactly zero."""

    def initial(self, given: Any, N: int, q: Tensor, dtype: torch.dtype) -> State:
        state = super().initial(given, N, q, dtype)
        return state if given is not None else state._replace(M=state.M + 2.0**-9)


class OneTokenMatters(Definition):
    """In calls of one token outputs are a bit off."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        return o * (1 + (tensors[0].shape[1] == 1) * 2 * torch.finfo(o.dtype).eps), state


class FewPrograms(Definition):
    """Programs are numbered in sixteen bits: what is beyond is not computed."""

    def finish(self, o: Tensor, state: State, tensors: list[Tensor], wanted: bool) -> tuple[Tensor, State]:
        beyond = torch.arange(state.M.shape[0] * o.shape[2]).reshape(-1, o.shape[2], 1, 1) >= 2**16
        return o, state._replace(M=torch.where(beyond, state.M.detach() * 0, state.M))


class NoEps(Definition):
    """eps is left out of the norm."""

    def norm(self, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        r = y.var(-1, correction=0, keepdim=True).rsqrt()
        return (y - y.mean(-1, keepdim=True)) * r, r


def stepper(definition: Callable[..., Any]) -> Callable[..., Any]:
    """A step of one token."""

    def step(q: Tensor, k: Tensor, v: Tensor, w: Any, b: Any, theta: Tensor, alpha: Tensor, eta: Tensor,
             state: Any, eps: float = 1e-6, chunk_size: int = 16, **options: Any) -> Any:  # fmt: skip
        now = (x[:, None] for x in (q, k, v))
        gates = (x[:, None] for x in (theta, alpha, eta))
        o, final = definition(*now, w, b, *gates, eps, chunk_size, state, True, **options)
        return o[:, 0], final

    return step


def implementation(definition: Definition) -> Implementation:
    return Implementation(
        name=type(definition).__name__, call=definition, step=stepper(definition), state=State,
        claims=CLAIMS,
    )  # fmt: skip

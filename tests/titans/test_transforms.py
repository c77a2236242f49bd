"""Derivatives by every road of PyTorch: `torch.func`, dual numbers, `vmap`, tracing; never zeros, never a guess."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from titans import DecodeState, TitansState, check_gates, chunk_titans_linear, titans_linear, titans_linear_step

# of PyTorch itself, the first time that forward mode is used
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

B, T, H, D, C, V = 2, 3, 2, 2, 2, 2
NAMES = ("q", "k", "v", "w", "b", "theta", "alpha", "eta", "M", "S", "anchor")
BACKENDS = ("recurrent", "chunk", "log")
Leaves = dict[str, Tensor]


def leaves(memory: str = "plain", *batch: int, T: int = T, seed: int = 0) -> Leaves:
    """Everything that is differentiable: small integers and gates of 1/2, for which a plain memory is exact."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-2, 3, (*batch, *shape), generator=generator).float()

    tokens = {name: draw(B, T, H, D) for name in "qkv"}
    gates = {name: torch.full((*batch, B, T, H), 0.5) for name in ("theta", "alpha", "eta")}
    parameters = {name: draw(H, D) for name in "wb"} if memory == "normalised" else {}
    return tokens | gates | parameters | {name: draw(B, H, D, D) for name in ("M", "S", "anchor")}


def call(backend: str, offset: Tensor | None = None, **options: Any) -> Callable[[Leaves], Tensor]:
    """The sum of all results of a call, each with a weight of its own."""
    offset = torch.tensor([0, 1]) if offset is None else offset

    def run(x: Leaves) -> Tensor:
        state = (x["M"], x["S"], x["anchor"], offset)
        tokens = [x.get(name) for name in NAMES[:8]]
        o, final = chunk_titans_linear(*tokens, 2.0, C, state, True, backend=backend, **options)  # type: ignore[arg-type]
        assert final is not None
        return sum(weight * part.square().sum() for weight, part in enumerate((o, *final[:3]), 1))  # type: ignore[return-value]

    return run


def decode(backend: str) -> Callable[[Leaves], Tensor]:
    def run(x: Leaves) -> Tensor:
        state = (x["M"], x["S"], x["anchor"], torch.tensor([0, 1]))
        q, k, v, w, b, theta, alpha, eta = (x[name][:, 0] if name not in "wb" else x.get(name) for name in NAMES[:8])
        o, final = titans_linear_step(q, k, v, w, b, theta, alpha, eta, state, 2.0, C, backend=backend)  # type: ignore[arg-type]
        return sum(weight * part.square().sum() for weight, part in enumerate((o, *final[:3]), 1))  # type: ignore[return-value]

    return run


def reverse(function: Callable[[Leaves], Tensor], x: Leaves) -> Leaves:
    """Gradients by plain autograd."""
    x = {name: value.clone().requires_grad_() for name, value in x.items()}
    return dict(zip(x, torch.autograd.grad(function(x), list(x.values())), strict=True))


def same(x: Leaves, y: Leaves) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("way", [call, decode])
def test_reverse_mode_of_torch_func_is_autograd(way: Callable[..., Callable[[Leaves], Tensor]], backend: str) -> None:
    x, function = leaves(), way(backend)
    expected = reverse(way("chunk"), x)
    assert any(value.any() for value in expected.values())
    assert same(grad(function)(x), expected)
    assert same(vjp(function, x)[1](torch.tensor(1.0))[0], expected)
    assert same(jacrev(function)(x), expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("way", [call, decode])
def test_gradients_of_every_sample_are_those_of_separate_calls(
    way: Callable[..., Callable[[Leaves], Tensor]], backend: str
) -> None:
    """`vmap` of `grad`, with everything mapped over, and with the rest shared."""
    function, every = way(backend), leaves("plain", V)
    samples = [{name: x[i] for name, x in every.items()} for i in range(V)]
    expected = [reverse(way("chunk"), sample) for sample in samples]
    mapped = vmap(grad(function))(every)
    assert same(mapped, {name: torch.stack([one[name] for one in expected]) for name in every})

    shared = {name: x[0] for name, x in every.items() if name not in "qkv"}
    tokens = {name: every[name] for name in "qkv"}
    mapped = vmap(grad(lambda rest, tokens: function(rest | tokens)), in_dims=(None, 0))(shared, tokens)
    expected = [reverse(way("chunk"), shared | {name: x[i] for name, x in tokens.items()}) for i in range(V)]
    assert same(mapped, {name: torch.stack([one[name] for one in expected]) for name in shared})


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_a_normalised_memory_and_a_mapped_offset_under_vmap(backend: str) -> None:
    """Not exact, but V calls give the numbers of one with its axis somewhere else, up to the order of the sums."""
    every, offsets = leaves("normalised", V), torch.tensor([[0, 1], [1, 1]])

    def run(x: Leaves, offset: Tensor) -> Tensor:
        return call(backend, offset)(x)

    separate = torch.stack([run({name: x[i] for name, x in every.items()}, offsets[i]) for i in range(V)])
    assert torch.equal(vmap(run)(every, offsets), separate)
    last = {name: x.movedim(0, -1) for name, x in every.items()}
    torch.testing.assert_close(
        vmap(run, in_dims=(-1, None))(last, offsets[0]),
        torch.stack([run({name: x[i] for name, x in every.items()}, offsets[0]) for i in range(V)]),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", [call, decode])
@pytest.mark.parametrize("memory", ["plain", "normalised"])
def test_forward_mode_is_the_definitions(
    memory: str, way: Callable[..., Callable[[Leaves], Tensor]], backend: str
) -> None:
    x, tangents, function = leaves(memory), leaves(memory, seed=1), way(backend)
    expected = jvp(way("recurrent"), (x,), (tangents,))[1]
    assert expected
    assert torch.equal(jvp(function, (x,), (tangents,))[1], expected)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(x[name], tangents[name]) for name in x}
        assert torch.equal(forward_ad.unpack_dual(function(duals)).tangent, expected)
    assert same(jacfwd(function)(x), jacfwd(way("recurrent"))(x))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # of `linearize`
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_of_a_plain_memory_is_reverse_mode(backend: str) -> None:
    """Exactly, so that it is not the definition alone that agrees with itself."""
    x, function = leaves(), call(backend)
    assert same(jacfwd(function)(x), reverse(call("chunk"), x))
    assert torch.equal(linearize(function, x)[1](x), jvp(function, (x,), (x,))[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_over_reverse_is_reverse_over_reverse(backend: str) -> None:
    x = leaves(T=2)
    v = x.pop("v")
    expected = jacrev(jacrev(lambda v: call("recurrent")(x | {"v": v})))(v)
    assert expected.any()
    assert torch.equal(hessian(lambda v: call(backend)(x | {"v": v}))(v), expected)
    assert torch.equal(jacrev(jacfwd(lambda v: call(backend)(x | {"v": v})))(v), expected)


@pytest.mark.parametrize("backend", ["chunk", "log", "triton"])
@pytest.mark.parametrize("way", [call, decode])
def test_reverse_over_reverse_is_refused(way: Callable[..., Callable[[Leaves], Tensor]], backend: str) -> None:
    x, function = leaves(), way(backend)
    for second in (lambda x: grad(lambda y: grad(function)(y)["k"].sum())(x), jacrev(jacrev(function))):
        with pytest.raises(RuntimeError, match='backend="recurrent"'):
            second(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_in_both_modes(backend: str) -> None:
    x = {name: value.double().requires_grad_() for name, value in leaves("normalised", T=2).items()}
    assert torch.autograd.gradcheck(
        lambda *values: call(backend)(dict(zip(x, values, strict=True))),
        tuple(x.values()),
        check_forward_ad=True,
        fast_mode=True,
    )


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("way", [call, decode])
def test_the_kernels_say_who_has_a_forward_mode(way: Callable[..., Callable[[Leaves], Tensor]], backend: str) -> None:
    x, function = leaves(), way(backend)
    for transformed in (jvp, lambda f, x, t: jvp(grad(f), x, t)):
        with pytest.raises(RuntimeError, match='backend="recurrent"'):
            transformed(function, (x,), (x,))
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(value, value) for name, value in x.items()}
        with pytest.raises(RuntimeError, match='backend="recurrent"'):
            function(duals)
        # nobody's tangent is dropped here
        assert torch.equal(function(x), way("chunk")(x))


@pytest.mark.parametrize("backend", ["chunk", "log"])
def test_a_compiled_transform_gives_the_eager_bits(backend: str) -> None:
    x, function = leaves(), call(backend)
    ways: tuple[Callable[[Leaves], Any], ...] = (grad(function), lambda x: jvp(function, (x,), (x,))[1])
    for way in ways:
        torch._dynamo.reset()
        compiled, eager = torch.compile(way, backend="aot_eager")(x), way(x)
        assert same(compiled, eager) if isinstance(eager, dict) else torch.equal(compiled, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad_inside_a_transform_is_kept(backend: str) -> None:
    """At every level: the plain one, too, has nothing to follow where the user said so."""
    x = {name: value.requires_grad_() for name, value in leaves().items()}
    tokens = [x.get(name) for name in NAMES[:8]]

    def constant(scale: Tensor) -> Tensor:
        with torch.no_grad():
            o, _ = chunk_titans_linear(*tokens, 2.0, C, x["M"], backend=backend)  # type: ignore[arg-type]
        assert not o.requires_grad
        return (scale * o).sum()

    found = grad(constant)(torch.tensor(1.0))
    assert found != 0
    assert not found.requires_grad
    # and outside of it, the captured tensors are followed
    followed = grad(lambda scale: scale * call(backend)(x))(torch.tensor(1.0))
    expected = reverse(call(backend), x)
    assert same(dict(zip(x, torch.autograd.grad(followed, list(x.values())), strict=True)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_are_not_there_are_not_read(backend: str) -> None:
    """Fake tensors, traced ones, and a state that is mapped over."""
    x = leaves()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert call(backend)({name: torch.empty_like(value) for name, value in x.items()}).shape == ()
        fake = {name: torch.empty(value.shape) for name, value in x.items()}
        offset = torch.empty(B, dtype=torch.int64)
        assert call(backend, offset)(fake).shape == ()
    traced = make_fx(call(backend), tracing_mode="real")(x)
    assert torch.equal(traced(x), call(backend)(x))


def test_gates_that_are_not_there_are_no_good_gates() -> None:
    gate = torch.full((2, 3), 0.5)

    def checked(gate: Tensor) -> Tensor:
        check_gates(gate, gate, gate)
        return gate.sum()

    with pytest.raises(ValueError, match="`theta` must have values to be read"):
        vmap(checked)(gate)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match="`theta` must have values to be read"):
        checked(mode.from_tensor(gate))
    assert torch.equal(grad(checked)(gate), torch.ones_like(gate))


class Run(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize("strict", [True, False])
def test_the_definition_takes_bounds_that_cannot_be_read(strict: bool) -> None:
    """Traced, fake or mapped over: values, gradients and final states are those of bounds that are read."""
    given, bounds = [x[:1] for x in leaves(T=7).values()], [torch.tensor(x) for x in ([0, 3, 3, 7], [0, 0, 1, 7])]
    tokens, state = given[:6], (*(x.expand(3, -1, -1, -1) for x in given[6:]), torch.tensor([1, 0, 1]))

    def run(cu_seqlens: Tensor, v: Tensor = tokens[2]) -> list[Tensor]:
        q, k, _, *gates = tokens
        o, final = titans_linear(q, k, v, None, None, *gates, 2.0, C, state, True, cu_seqlens=cu_seqlens)
        assert final is not None
        return [o, *final]

    def dv(cu_seqlens: Tensor) -> Tensor:
        return grad(lambda v: sum(x.square().sum() for x in run(cu_seqlens, v)[:4]))(tokens[2])

    def same_lists(found: Any, expected: Any) -> bool:
        return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

    mapped, gradients = vmap(run)(torch.stack(bounds)), vmap(dv)(torch.stack(bounds))
    for i, cu_seqlens in enumerate(bounds):
        assert same_lists([x[i] for x in mapped], run(cu_seqlens))
        assert torch.equal(gradients[i], dv(cu_seqlens))
        assert dv(cu_seqlens).any()
    assert same_lists(make_fx(lambda x: run(x), tracing_mode="real")(bounds[0])(bounds[1]), run(bounds[1]))
    torch._dynamo.reset()
    assert same_lists(torch.compile(run, backend="eager")(bounds[0]), run(bounds[0]))
    exported = torch.export.export(Run(run), (bounds[0],), strict=strict).module()
    assert same_lists(exported(bounds[1]), run(bounds[1]))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert [x.shape for x in run(fake.from_tensor(bounds[0]))] == [x.shape[1:] for x in mapped]


@pytest.mark.parametrize("backend", ["recurrent", "triton"])
def test_a_decode_state_says_that_it_has_no_derivative(backend: str) -> None:
    q, k, v, theta, alpha, eta, *start = leaves().values()
    token = [x[:, 0] for x in (q, k, v, theta, alpha, eta)]
    state = DecodeState.begin(TitansState(*start, torch.zeros(B).long()), torch.float32, C)

    def step(v: Tensor) -> Tensor:
        q, k, _, *gates = token
        return titans_linear_step(q, k, v, None, None, *gates, state, 2.0, C, backend=backend)[0].sum()

    v = token[2]
    for way in (lambda: jvp(step, (v,), (v,)), lambda: grad(step)(v), lambda: vmap(step)(v[None])):
        with pytest.raises(ValueError, match=r"`state` must be a TitansState .*, got a DecodeState"):
            way()
    with forward_ad.dual_level(), pytest.raises(ValueError, match="where derivatives are recorded"):
        step(forward_ad.make_dual(v, v))
    recorded = DecodeState.begin(TitansState(start[0].requires_grad_(), *start[1:], torch.zeros(B).long()), v.dtype, C)
    with pytest.raises(ValueError, match="where gradients are recorded"):
        recorded.state(backend=backend)
    assert torch.equal(recorded.detach().state(backend=backend).M, start[0])
    assert step(v).isfinite()


def test_a_transform_maps_the_tensors_of_a_state() -> None:
    state = TitansState(*(leaves("plain", V)[name] for name in ("M", "S", "anchor")), torch.zeros(V, B).long())
    doubled = vmap(lambda one: one._replace(M=2 * one.M))(state)
    assert isinstance(doubled, TitansState)
    assert torch.equal(doubled.M, 2 * state.M)

"""What only a GPU can show: real sizes, large launches, graphs, streams; skipped elsewhere. `make test-gpu`

What is exact is the chunk form in float64 on the same rounded inputs. At these sizes the derived bounds promise nothing
of the normalised memory; there the rule is section 4.3 of SPEC.md: at most twice the error of the same form in the
arithmetic of the error model, whose products get their operands rounded as the tensor cores' are.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from oracle import Cotangents
from oracle.bounds import FLOAT32, kernel_arithmetic
from oracle.precision import exact as numbers
from properties.harness import running
from properties.harness.comparing import compare, radii
from properties.harness.implementations import implementation
from properties.harness.running import tensors
from properties.harness.subcalls import Part
from properties.problems.problem import Problem
from tests.poison import poisoned_memory
from titans import DecodeState, TitansState, chunk, chunk_titans_linear, decodes_alike, titans_linear_step
from titans.arguments import Call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DEVICE = "cuda"
TENSORS = ("q", "k", "v", "w", "b", "theta", "alpha", "eta", "M", "S", "anchor")


@dataclass(frozen=True)
class Case:
    """Size of a call; `bounds`, of packed sequences, stands for B and T."""

    dtype: torch.dtype
    D: int
    C: int
    B: int = 2
    T: int = 1000
    H: int = 4
    bounds: tuple[int, ...] = ()
    resumed: bool = False
    plain: bool = False
    log_gates: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("resumed", "plain", "log_gates") if getattr(self, name)]
        size = [f"D{self.D}", f"C{self.C}", f"B{self.B}", f"T{self.T}", f"H{self.H}"]
        return "-".join([str(self.dtype)[6:], *size, *(["packed"] if self.bounds else []), *flags])

    @property
    def N(self) -> int:
        """Number of sequences."""
        return len(self.bounds) - 1 if self.bounds else self.B

    def call(self, seed: int = 0) -> Call:
        """Draw a call, on the GPU; the gates keep the recurrence stable."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        B, T = (1, self.bounds[-1]) if self.bounds else (self.B, self.T)
        token, square = (B, T, self.H, self.D), (self.N, self.H, self.D, self.D)

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype, device=DEVICE)

        q, k, v = normalize(normal(*token), dim=-1), normalize(normal(*token), dim=-1), normal(*token)
        w, b = (None, None) if self.plain else (1 + 0.1 * normal(self.H, self.D), 0.1 * normal(self.H, self.D))
        theta, alpha, eta = (by * normal(B, T, self.H).sigmoid() for by in (0.02, 0.1, 1))
        if self.log_gates:
            theta, alpha, eta = theta.log(), (1 - alpha).log(), eta.log()
        M = normal(*square, dtype=torch.float32)
        S, anchor, offset = torch.zeros_like(M), M, None
        if self.resumed:
            S, anchor = 0.1 * normal(*square, dtype=torch.float32), normal(*square, dtype=torch.float32)
            offset = torch.arange(self.N, device=DEVICE) % self.C
            anchor = torch.where((offset == 0)[:, None, None, None], M, anchor)
        cu_seqlens = torch.tensor(self.bounds, dtype=torch.int32, device=DEVICE) if self.bounds else None
        states = (M, S, anchor, offset)
        return Call(q, k, v, w, b, theta, alpha, eta, *states, cu_seqlens, 1e-6, self.C, self.log_gates)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RAGGED = (0, 1, 1, 700, 829, 2000)
CASES = [
    Case(BF16, D=64, C=64, B=4, T=4096, H=16),
    Case(BF16, D=64, C=16, B=32, T=500, H=16),
    Case(BF16, D=128, C=64, B=2, T=2048, H=16),
    Case(BF16, D=64, C=64, bounds=RAGGED, resumed=True),
    Case(BF16, D=128, C=64, bounds=RAGGED, resumed=True),
    Case(BF16, D=96, C=64, bounds=RAGGED),
    Case(BF16, D=40, C=64, resumed=True),
    Case(BF16, D=128, C=64, resumed=True, plain=True),
    Case(BF16, D=128, C=16, bounds=RAGGED, resumed=True),
    Case(BF16, D=100, C=128, resumed=True),
    Case(BF16, D=60, C=33, bounds=RAGGED),
    Case(BF16, D=64, C=256, B=1, T=2100),
    Case(BF16, D=128, C=1024, bounds=RAGGED, resumed=True),
    Case(FP16, D=64, C=200, bounds=RAGGED),
    Case(FP32, D=64, C=512, B=1, T=2000, resumed=True),
    Case(BF16, D=32, C=33, B=1, T=8192, plain=True),
    Case(BF16, D=16, C=1, B=8, T=300, H=8),
    Case(FP16, D=64, C=64, bounds=RAGGED, resumed=True),
    Case(FP16, D=128, C=128, T=2048),
    Case(FP16, D=32, C=1, T=200, log_gates=True),
    Case(FP32, D=64, C=16, B=1, T=8192),
    Case(FP32, D=64, C=64, bounds=RAGGED, resumed=True, plain=True),
    Case(FP32, D=128, C=128, T=1024, H=16),
    Case(FP32, D=100, C=33, log_gates=True),
    Case(FP32, D=16, C=1, T=300, resumed=True),
]
USUAL = Case(BF16, D=64, C=16, B=3, T=200)
HARD = Case(BF16, D=64, C=16, bounds=(0, 1, 1, 90, 200), resumed=True)
# where compute capability 9.0 has kernels of its own
HOPPER = replace(HARD, C=64)


def mapped(call: Call, function: Callable[[Tensor], Tensor]) -> Call:
    """Change every tensor that has a gradient."""
    given = {name: x for name in TENSORS if (x := getattr(call, name)) is not None}
    return call._replace(**{name: function(x) for name, x in given.items()})


def leaves(call: Call) -> list[Tensor]:
    """Everything that has a gradient."""
    return [x for x in call[:11] if x is not None]


def cotangents(call: Call) -> list[Tensor]:
    """What flows into o, M, S and the anchor."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    return [torch.randn(x.shape, generator=generator, device=DEVICE).to(x.dtype) for x in (call.q, *[call.M] * 3)]


def run(call: Call, function: Callable[..., Any] = chunk_titans_linear) -> list[Tensor]:
    """Forward and backward of the op: o, M, S, anchor and the gradients of `leaves`."""
    return compute(mapped(call, lambda x: x.detach().requires_grad_()), cotangents(call), function)


def compute(call: Call, inflow: Sequence[Tensor], function: Callable[..., Any] = chunk_titans_linear) -> list[Tensor]:
    """Forward and backward of a call whose tensors are leaves."""
    offset = torch.zeros(len(call.M), dtype=torch.int64, device=DEVICE) if call.offset is None else call.offset
    start = TitansState(call.M, call.S, call.anchor, offset)
    o, final = function(
        *call[:8], call.eps, call.chunk_size, start, True, cu_seqlens=call.cu_seqlens, log_gates=call.log_gates,
        backend="triton",
    )  # fmt: skip
    ends = [o, *final[:3]]
    return [x.detach() for x in ends] + list(torch.autograd.grad(ends, leaves(call), inflow))


def names(call: Call) -> list[str]:
    """Name what `run` returns."""
    return ["o", "M", "S", "anchor", *(f"d{name}" for name, x in zip(TENSORS, call, strict=False) if x is not None)]


def reference(call: Call, dtype: torch.dtype, inflow: Sequence[Tensor]) -> list[Tensor]:
    """Compute what `run` computes by the chunk form in another dtype."""
    call = mapped(call, lambda x: x.to(dtype))
    o, M, S, anchor, M0, S0 = chunk.forward(call, log_space=False)
    grads = chunk.backward(call, False, M0, S0, *(x.to(dtype) for x in inflow))
    return [o, M, S, anchor, *(dx for dx in grads if dx is not None)]


def cut(x: Tensor) -> Tensor:
    """Cut float32 to the 10 bits of tf32."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


ROUND = {BF16: lambda x: x.bfloat16().float(), FP16: cut, FP32: lambda x: cut(x) + cut(x - cut(x))}
PRODUCTS = (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)


class RoundedOperands(TorchDispatchMode):
    """Round the operands of products as the kernels do for inputs of a dtype: section 4 of the error model."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.round = ROUND[dtype]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept one operation."""
        if function in PRODUCTS:
            args = tuple(self.round(x.contiguous()) for x in args)
        return function(*args, **(kwargs or {}))


def same(x: Sequence[Tensor], y: Sequence[Tensor]) -> bool:
    """Whether two runs gave equal numbers."""
    return len(x) == len(y) and all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


def assert_not_worse(name: str, dtype: torch.dtype, value: Tensor, model: Tensor, exact: Tensor) -> None:
    """Section 4.3 of SPEC.md for the worst row and for all rows together; a gate is a row of its own.

    Tensor cores truncate where they accumulate, says the error model (4 in oracle/README.md), while the sums of `model`
    are rounded: of float32 these make the errors, for its split into two tf32 loses next to nothing, and the model
    allows them the larger unit. Of narrower formats the operands do, and those are rounded alike.
    """
    width = 1 if exact.ndim == 3 else exact.shape[-1]
    unit = kernel_arithmetic(dtype, width, tensor_cores=True).unit / FLOAT32.unit if dtype == FP32 else 1
    errors = (value.double() - exact, unit * (model.double() - exact), exact * (torch.finfo(value.dtype).eps / 2))
    wrong, allowed, rounding = (x.reshape(-1, width).norm(dim=1) for x in errors)
    for how, size in (("worst row", torch.amax), ("norm", torch.linalg.vector_norm)):
        error, bound = size(wrong).item(), 2 * size(allowed).item() + size(rounding).item()
        assert error <= bound, f"{name}, {how}: error {error:.3g}, bound {bound:.3g}, exact {exact.norm():.3g}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_at_real_sizes_errors_are_those_of_the_model_whatever_memory_held(case: Case) -> None:
    call = case.call()
    with poisoned_memory():
        values = run(call)
    exact = reference(call, torch.float64, cotangents(call))
    with RoundedOperands(case.dtype):
        model = reference(call, torch.float32, cotangents(call))
    for name, *results in zip(names(call), values, model, exact, strict=True):
        assert_not_worse(name, case.dtype, *results)


PLAIN = Problem(
    (256,) * 6, H=4, theta="uniform -6", alpha="uniform -4", q="unit 0", state="random -3", initial="M"
)  # fmt: skip
PLAINS = [
    replace(PLAIN, D=64, C=16),
    replace(PLAIN, D=128, C=128, lengths=(256,) * 2),
    replace(PLAIN, D=100, C=33, lengths=(100, 0, 1, 150), packed=True, initial="full", offsets=(5, 0, 32, 7)),
    replace(PLAIN, D=64, C=64, dtype="bfloat16"),
    replace(PLAIN, D=60, C=33, dtype="float16"),
]


@pytest.mark.parametrize("problem", PLAINS, ids=str)
def test_the_plain_memory_is_within_the_derived_bound_at_real_sizes(problem: Problem) -> None:
    """Of the last sequence and head: float64 stands for the oracle, at the price of its own radius."""
    subject, exact = implementation("triton", DEVICE), implementation("chunk", "cpu")
    part = Part(problem.inputs(), (problem.sequences - 1,), (problem.H - 1,))
    results = running.run(subject, part.of, problem.cotangents())
    del results["offset"]
    inputs, inflow = part.inputs(), part.cotangents(problem.cotangents())
    wide = replace(inputs, **{name: x.double() for name, x in tensors(inputs).items()})
    flowing = Cotangents(**{name: None if x is None else x.double() for name, x in vars(inflow).items()})
    values = running.run(exact, wide, flowing)
    del values["offset"]
    own = radii(exact, wide, flowing)
    radius = {name: x + own[name] for name, x in radii(subject, inputs, inflow).items()}
    found = compare(part.select_all(results), {name: numbers(x) for name, x in values.items()}, radius)
    # of half precision the bound on the gradients of gates is too wide, here
    assert problem.dtype != "float32" or not any(one.ill_conditioned for one in found)


def alone(call: Call, n: int) -> Call:
    """Return one sequence of a batch."""
    per_sequence = ("q", "k", "v", "theta", "alpha", "eta", "M", "S", "anchor")
    return call._replace(**{name: getattr(call, name)[n : n + 1].clone() for name in per_sequence})


def assert_alone_is_the_same(call: Call, sequences: Sequence[int], backward: bool = True) -> None:
    """Law 5: a sequence alone gives the same bits as in the batch."""
    inflow = cotangents(call)

    def results(call: Call, inflow: Sequence[Tensor]) -> list[Tensor]:
        if not backward:
            o, final = chunk_titans_linear(*call[:8], call.eps, call.chunk_size, call.M, True, backend="triton")
            return [o, *final[:3]]
        call = mapped(call, lambda x: x.detach().requires_grad_())
        *outputs, dq, dk, dv, _, _, dtheta, dalpha, deta, dM, dS, danchor = compute(call, inflow)
        return [*outputs, dq, dk, dv, dtheta, dalpha, deta, dM, dS, danchor]

    whole = results(call, inflow)
    for n in sequences:
        assert same([x[n : n + 1] for x in whole], results(alone(call, n), [x[n : n + 1] for x in inflow]))


@pytest.mark.parametrize(
    "case", [Case(BF16, D=64, C=16, B=32, T=500, H=16), Case(FP32, D=64, C=64, B=7, T=300)], ids=str
)
def test_a_sequence_alone_gives_the_same_bits(case: Case) -> None:
    assert_alone_is_the_same(case.call(), (0, case.B - 1))


def test_more_sequences_and_heads_than_a_grid_has_rows() -> None:
    case = Case(BF16, D=16, C=16, B=4100, T=20, H=16)
    assert case.B * case.H > 65535
    assert_alone_is_the_same(case.call(), (0, case.B - 1))


@pytest.mark.parametrize(("backward", "needs"), [(False, 60), (True, 125)], ids=["forward", "backward"])
def test_tensors_of_more_than_2_31_elements(backward: bool, needs: int, request: pytest.FixtureRequest) -> None:
    """Alone on the GPU: `pytest tests/ -m gpu -k 2_31`."""
    if getattr(request.config, "workerinput", {}).get("workercount", 1) > 1:
        pytest.skip("needs the GPU for itself: run it without -n")
    if torch.cuda.mem_get_info()[0] < needs * 2**30:
        pytest.skip(f"needs {needs} GiB of free memory")
    case = Case(BF16, D=128, C=64, B=65, T=4096, H=64)
    assert case.B * case.T * case.H * case.D > 2**31
    assert_alone_is_the_same(case.call(), (case.B - 1,), backward)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("case", [USUAL, HARD, HOPPER], ids=str)
# it recommends tf32 for float32 products, of which there are none
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_call_gives_the_eager_bits(case: Case) -> None:
    compiled = torch.compile(chunk_titans_linear, fullgraph=True)
    assert same(run(case.call(), compiled), run(case.call()))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", [USUAL, HARD, HOPPER], ids=str)
def test_a_replayed_graph_gives_the_eager_bits_for_new_inputs(case: Case, backward: bool) -> None:
    call = case.call()
    fixed = mapped(call, Tensor.requires_grad_)
    inflow = cotangents(call)

    def results() -> list[Tensor]:
        with nullcontext() if backward else torch.no_grad():
            if backward:
                return compute(fixed, inflow)
            start = None if fixed.offset is None else TitansState(*fixed[8:12])
            o, final = chunk_titans_linear(
                *fixed[:8], fixed.eps, case.C, start, True, cu_seqlens=fixed.cu_seqlens, backend="triton"
            )
            return [o, *final[:3]]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results()
    for seed in (1, 2):
        with torch.no_grad():
            for x, new in zip(leaves(fixed), leaves(case.call(seed)), strict=True):
                x.copy_(new)
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert same(replayed, results())


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise where the host waits for the GPU."""
    with warnings.catch_warnings():
        # that the mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", [USUAL, HARD, HOPPER, Case(FP32, D=64, C=64)], ids=str)
def test_the_host_never_waits(case: Case) -> None:
    call = case.call()
    call = mapped(call, lambda x: x.detach().requires_grad_())
    inflow = cotangents(call)
    compute(call, inflow)
    with no_synchronisation():
        compute(call, inflow)


def decoding(seed: int = 0) -> tuple[list[Tensor], TitansState]:
    """Return one token of some sequences, with w and b, and their state."""
    call = Case(BF16, D=64, C=4, B=9, T=1, resumed=True).call(seed)
    token, gates = ([x[:, 0] for x in part] for part in (call[:3], call[5:8]))
    return [*token, call.w, call.b, *gates], TitansState(*call[8:12])


def decode(token: Sequence[Tensor], state: TitansState, function: Any = titans_linear_step) -> list[Tensor]:
    """Decode one token."""
    o, final = function(*token, state, chunk_size=4, backend="triton")
    return [o, *final]


def test_the_host_does_not_wait_for_a_step() -> None:
    token, state = decoding()
    decode(token, state)
    with no_synchronisation():
        decode(token, state)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_gives_the_eager_bits() -> None:
    token, state = decoding()
    assert same(decode(token, state, torch.compile(titans_linear_step, fullgraph=True)), decode(token, state))


def test_a_replayed_graph_decodes_with_the_eager_bits() -> None:
    """It feeds the state back to itself, as a decoding loop does."""
    token, state = decoding()
    expected, eager = [], state
    tokens = [decoding(seed)[0] for seed in range(1, 6)]
    for now in tokens:
        o, *after = decode([*now[:3], *token[3:5], *now[5:]], eager)
        eager = TitansState(*after)
        expected.append(o)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, *after = decode(token, state)
        for x, new in zip(state, after, strict=True):
            x.copy_(new)
    for now, wanted in zip(tokens, expected, strict=True):
        for x, new in zip([*token[:3], *token[5:]], [*now[:3], *now[5:]], strict=True):
            x.copy_(new)
        graph.replay()
        assert torch.equal(o, wanted)
    assert same([*state], [*eager])


# of the sizes for which `decodes_alike`
DECODED = [
    *(Case(dtype, D, C, B=5, T=70, H=3) for dtype in (FP32, FP16) for D in (64, 128) for C in (16, 64, 200)),
    *(Case(dtype, D, C, B=5, T=70, H=3) for dtype in (FP32, FP16) for D, C in ((33, 16), (48, 32), (100, 1))),
    *(Case(BF16, 64, C, B=5, T=150, H=3) for C in (1, 16, 32, 200)),
    *(Case(BF16, D, C, B=5, T=150, H=3) for D, C in ((32, 40), (16, 200))),
    *(Case(BF16, D, 64, B=5, T=150, H=3) for D in (32, 40, 64, 72, 128)),
    # so many that a program has four heads
    *(Case(BF16, D, 64, B=36, T=70, H=16) for D in (40, 64)),
]
DECODED_CASES = [
    pytest.param(replace(case, plain=plain, log_gates=plain, resumed=True), id=f"{case}-{plain}")
    for case in DECODED
    for plain in (False, True)
]


@pytest.mark.parametrize("case", DECODED_CASES)
def test_decoding_gives_the_bits_of_one_call(case: Case) -> None:
    """Of sequences at different places, outputs and states, in a step that the host does not wait for."""
    if not decodes_alike(case.dtype, case.D, case.C):
        pytest.skip("not claimed on this GPU")
    call = case.call()
    options: Any = {"chunk_size": case.C, "log_gates": case.log_gates, "backend": "triton"}
    start = TitansState(*call[8:12], chunk_size=case.C)
    with torch.no_grad():
        o, final = chunk_titans_linear(*call[:8], initial_state=start, output_final_state=True, **options)
        state = DecodeState.begin(start, case.dtype)
        for t in range(case.T):
            q, k, v, theta, alpha, eta = (x[:, t] for x in (*call[:3], *call[5:8]))
            with no_synchronisation() if t else nullcontext():
                o_t, _ = titans_linear_step(
                    q, k, v, call.w, call.b, theta, alpha, eta, state, in_place=True, **options
                )  # fmt: skip
            assert torch.equal(o_t, o[:, t]), t
    assert final is not None
    assert same([*state.state()], [*final])


def test_decoding_takes_tensors_that_begin_anywhere() -> None:
    """Tokens and state alike."""
    case = Case(BF16, D=64, C=64, B=2, T=3, H=3, resumed=True)
    call = case.call()
    start = TitansState(*call[8:12], chunk_size=case.C)
    state = DecodeState.begin(start, BF16)
    other = DecodeState(*map(skewed, state), chunk_size=case.C)
    for t in range(case.T):
        token = [x[:, t].contiguous() for x in (*call[:3], *call[5:8])]
        for x, own in ((token, state), (list(map(skewed, token)), other)):
            titans_linear_step(*x[:3], call.w, call.b, *x[3:], own, chunk_size=64, backend="triton", in_place=True)
    assert same([*other], [*state])


def test_a_replayed_graph_moves_a_decode_state() -> None:
    token, start = decoding()
    eager, state = (DecodeState.begin(start, BF16, 4) for _ in range(2))

    def step(state: DecodeState) -> Tensor:
        return titans_linear_step(*token, state, chunk_size=4, backend="triton", in_place=True)[0]

    step(state.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step(state)
    for _ in range(70):
        graph.replay()
        assert torch.equal(o, step(eager))
    assert same([*state], [*eager])


@pytest.mark.parametrize("case", [USUAL, HARD, HOPPER], ids=str)
def test_the_current_stream_is_used(case: Case) -> None:
    """Whatever ran on another one would have read what was there before the other stream woke up."""
    expected, call, inflow = run(case.call()), case.call(seed=1), cotangents(case.call())
    call = mapped(call, lambda x: x.detach().requires_grad_())
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        with torch.no_grad():
            for x, new in zip(leaves(call), leaves(case.call()), strict=True):
                x.copy_(new)
        found = compute(call, inflow)
    stream.synchronize()
    assert same(found, expected)


def test_threads_with_streams_of_their_own_change_no_bit() -> None:
    """Calls of other sizes, and of tensors that begin elsewhere, find the compiled kernels of each other."""
    calls = [replace(case, H=H).call(seed=H) for case in (USUAL, HOPPER) for H in (1, 3)]
    calls += [mapped(call, skewed) for call in calls]
    expected = [run(call) for call in calls]
    torch.cuda.synchronize()

    def repeat(i: int) -> bool:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = [run(calls[i]) for _ in range(5)]
        stream.synchronize()
        return all(same(results, expected[i]) for results in found)

    with ThreadPoolExecutor(len(calls)) as threads:
        assert all(threads.map(repeat, range(len(calls))))


def skewed(x: Tensor) -> Tensor:
    """The same numbers, not at a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def test_memory_may_hold_tensors_of_another_shape_next() -> None:
    """At an address that has been launched before."""
    tall, wide = (Case(BF16, D=64, C=64, B=B, T=2000 // B).call() for B in (1, 2))
    expected = run(wide)
    run(tall)
    here = {
        name: getattr(tall, name).view(x.shape).copy_(x)
        for name in ("q", "k", "v", "theta", "alpha", "eta")
        if (x := getattr(wide, name)) is not None
    }
    assert same(run(wide._replace(**here)), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_is_used() -> None:
    call = USUAL.call()
    o, _ = chunk_titans_linear(*call[:8], backend="triton")
    elsewhere, _ = chunk_titans_linear(*(x.to("cuda:1") for x in call[:8]), backend="triton")
    assert torch.equal(o, elsewhere.to(DEVICE))


def test_autocast_rounds_the_tokens_alone() -> None:
    call = Case(FP32, D=64, C=16, B=3, T=200).call()

    def autocast(*args: Any, **options: Any) -> Any:
        with torch.autocast(DEVICE, BF16):
            return chunk_titans_linear(*args, **options)

    def by_hand(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
        return chunk_titans_linear(q.to(BF16), k.to(BF16), v.to(BF16), *args, **options)

    inflow = [cotangents(call)[0].to(BF16), *cotangents(call)[1:]]
    call = mapped(call, lambda x: x.detach().requires_grad_())
    found = compute(call, inflow, autocast)
    assert found[0].dtype == BF16
    assert same(found, compute(call, inflow, by_hand))

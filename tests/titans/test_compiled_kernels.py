"""What the error model relies on, read off the kernels as they are compiled for sm_90; needs no GPU.

Triton decides between its interpreter and its compiler when it is imported: so it is imported by another process.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BFLOAT16 = [("bfloat16", "highest", 64), ("bfloat16", "highest", 16)]
FLOAT32, TF32, FLOAT16 = ("float32", "highest", 64), ("float32", "high", 64), ("float16", "highest", 64)
# a quarter of a thread's 255 registers of 4 bytes: more is no longer the odd value out
SPILLED = 256

Kernels = list[dict[str, Any]]


@functools.cache
def kernels(dtype: str, precision: str, C: int, *D: int) -> Kernels:
    """Compile the launches of a forward and a backward at D = 64, or of a forward at another D, once in a process."""
    command = [sys.executable, "-m", "tests.titans.compile_kernels", dtype, precision, str(C), *map(str, D)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def operands(kernel: dict[str, Any]) -> set[str]:
    """Dtypes of the operands of the tensor cores' products, all of which must accumulate in float32."""
    found = set()
    for instruction in kernel["mma"]:
        left, right = re.search(r"\.f32\.(\w+)\.(\w+)(?:\.f32)?$", instruction).groups()  # type: ignore[union-attr]
        found |= {left, right}
    return found


def test_every_kernel_is_compiled() -> None:
    written = {
        name
        for path in (ROOT / "titans" / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert {kernel["name"] for case in BFLOAT16 for kernel in kernels(*case)} == written


def test_full_float32_is_three_products_of_tf32_and_never_one() -> None:
    for kernel in kernels(*FLOAT32):
        assert set(kernel["dots"]) <= {"tf32x3"}, kernel["name"]
        assert kernel["products"] == 3 * len(kernel["dots"]), kernel["name"]
        assert operands(kernel) <= {"tf32"}, kernel["name"]
        # hi is the nearest, so that the product lo lo, which is left out, is at most 2^-22 of the whole
        assert bool(kernel["rounded"]) == bool(kernel["dots"]), kernel["name"]


def test_less_is_one_product_of_tf32() -> None:
    for kernel in kernels(*TF32):
        assert set(kernel["dots"]) <= {"tf32"}, kernel["name"]
        assert kernel["products"] == len(kernel["dots"]), kernel["name"]


def test_float16_is_raised_to_tf32_and_cut() -> None:
    for kernel in kernels(*FLOAT16):
        assert kernel["products"] == len(kernel["dots"]), kernel["name"]
        assert operands(kernel) <= {"tf32"}, kernel["name"]
        assert not kernel["rounded"], kernel["name"]


@pytest.mark.parametrize("case", BFLOAT16, ids=str)
def test_bfloat16_is_multiplied_as_it_is_and_summed_in_float32(case: tuple[str, str, int]) -> None:
    for kernel in kernels(*case):
        assert kernel["products"] == len(kernel["dots"]), kernel["name"]
        assert operands(kernel) <= {"bf16"}, kernel["name"]


@pytest.mark.parametrize("case", [*BFLOAT16, FLOAT32, FLOAT16], ids=str)
def test_products_are_made_by_tensor_cores(case: tuple[str, str, int]) -> None:
    assert any(kernel["mma"] for kernel in kernels(*case))
    for kernel in kernels(*case):
        assert bool(kernel["dots"]) == bool(kernel["mma"]), kernel["name"]


@pytest.mark.parametrize("case", [*BFLOAT16, FLOAT32, FLOAT16], ids=str)
def test_there_are_no_atomics(case: tuple[str, str, int]) -> None:
    assert not {kernel["name"]: kernel["atomics"] for kernel in kernels(*case) if kernel["atomics"]}


@pytest.mark.parametrize("case", [*BFLOAT16, FLOAT32, FLOAT16], ids=str)
def test_no_subnormal_is_flushed_but_that_of_a_variance(case: tuple[str, str, int]) -> None:
    """Whose eps makes it normal."""
    assert {x for kernel in kernels(*case) for x in kernel["flushing"]} <= {"rsqrt.approx.ftz.f32"}


@pytest.mark.parametrize("case", BFLOAT16, ids=str)
def test_little_is_spilled(case: tuple[str, str, int]) -> None:
    assert not {kernel["name"]: kernel["STACK"] for kernel in kernels(*case) if kernel["STACK"] > SPILLED}
    assert not any(kernel["LOCAL"] for kernel in kernels(*case))


# Other widths for which `titans.decodes_alike`.
WIDTHS = [(*FLOAT32, 33), (*FLOAT32, 128), (*FLOAT16, 100), (*BFLOAT16[0], 32)]


@pytest.mark.parametrize("case", [*BFLOAT16, FLOAT32, FLOAT16, *WIDTHS], ids=str)
def test_decoding_adds_up_in_the_order_of_the_chain_and_of_the_outputs(case: tuple[Any, ...]) -> None:
    """Without which it could not have their bits."""
    sums = {kernel["name"]: kernel["sums"] for kernel in kernels(*case)}
    assert sums["state_kernel"]
    assert sums["decode_kernel"] == sums["state_kernel"] + sums["output_kernel"]

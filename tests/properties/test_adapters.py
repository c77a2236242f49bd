"""What the suite says of other people's implementations: all they claim holds, or what it found is found again."""

import importlib.util
import re

import pytest

from properties.problems.problem import Problem
from tests.properties.test_laws import run_suite


def needs(package: str) -> pytest.MarkDecorator:
    """Skip where a package is missing."""
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install --group peers")


LAWS = {
    "values": "properties/test_oracle.py::test_values_are_the_oracles",
    "tail": "properties/test_closed_forms.py::test_the_state_after_a_tail_without_learning_has_decayed_so_far",
    "decay": "properties/test_closed_forms.py::test_without_learning_the_memory_only_decays",
    "finite": "properties/test_sequences.py::test_finite_inputs_give_finite_results",
    "gradients": "properties/test_sequences.py::test_gates_of_zero_give_finite_gradients",
    "gates": "properties/test_closed_forms.py::test_gates_are_raised_before_anything_else",
}
NAN = r"`whether {} is finite` must be True, got False"
# alpha in (0.9, 1) in a chunk of 64.
STRONG = {"alpha": "random 1-2^-4 1-2^-8", "lengths": (64,), "C": 64}
WRONG = r"{}\[0, 0, 0, 0\] is wrong"


@needs("titans_pytorch")
def test_the_memory_of_titans_pytorch_is_the_plain_memory() -> None:
    target = "properties.adapters.titans_pytorch:neural_memory"
    output = run_suite(LAWS["values"], LAWS["finite"], "--impl", target, "--hypothesis-profile=smoke")
    assert "2 passed" in output


def still(**fields: object) -> Problem:
    """A memory that learns nothing."""
    return Problem(**{"memory": "normalised", "initial": "M", "theta": "constant 0", **fields})  # type: ignore[arg-type]


@needs("fla")
@pytest.mark.parametrize(
    ("form", "law", "problem", "message"),
    [
        ("chunk_titans_linear", "values", Problem(memory="normalised", q="unit 0", v="unit 0"), WRONG.format("o")),
        ("chunk_titans_linear", "tail", still(C=2), WRONG.format("M")),
        ("chunk_titans_linear", "decay", still(initial="momentum"), WRONG.format("M")),
        ("chunk_titans_linear", "finite", Problem(memory="normalised", alpha="constant 1"), NAN.format("o")),
        ("chunk_titans_linear", "gradients", Problem(memory="normalised", eta="constant 0"), NAN.format("dalpha")),
        ("chunk_titans_linear", "gates", still(alpha="constant 1-2^-2", gate_dtype="float16"), WRONG.format("M")),
        ("chunk_titans_linear", "values", still(dtype="float64"), "RuntimeError: expected .* Float but found Double"),
        ("chunk_titans_linear_in_linear_space", "decay", still(**STRONG), r"M\[.*\] is wrong\n.*\n.*actual nan"),
    ],
)
def test_a_known_defect_of_fla_is_found(form: str, law: str, problem: Problem, message: str) -> None:
    # Section 1 of SPEC.md lists them; these are the smallest problems that Hypothesis found.
    lacks = ("--impl-lacks", "plain,varlen,log_gates,offset") if problem.dtype == "float64" else ()
    target = f"properties.adapters.fla:{form}"
    output = run_suite(LAWS[law], "--impl", target, *lacks, "--replay", problem.to_json(), fails=1)
    assert re.search(message, output), output

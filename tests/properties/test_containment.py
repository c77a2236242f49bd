"""An implementation returns its results or fails; it decides no verdict, and leaves nothing behind."""

import os
import random
import re
import signal
import sys
import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from properties.harness.containment import Misconduct, answering, at_once, heed_interrupts, interrupted, undisturbed
from properties.harness.facts import Recorder
from properties.harness.foreign import foreign
from properties.harness.laws import PROPERTIES
from properties.harness.running import LawBroken
from properties.harness.waiting import Hanging, limited
from properties.problems.problem import Problem
from tests.properties.test_laws import run_suite

VALUES, GRADIENTS = "test_values_are_the_oracles", "test_gradients_are_the_oracles"
PROBLEM = Problem(lengths=(3,), D=2, C=2)


def check(subject: str, law: str = VALUES, recorder: Recorder | None = None) -> Any:
    """Put a problem before an implementation that misbehaves."""
    return PROPERTIES[law].check(foreign(f"tests.properties.misbehaving:{subject}", "cpu"), PROBLEM, recorder)


@pytest.mark.parametrize(
    ("subject", "law", "said"),
    [
        ("skips", VALUES, "Skipped: it is not my day"),
        ("exits", VALUES, "SystemExit: 0"),
        ("leaves", VALUES, r"must not end the process, called os._exit\(0\)"),
        ("leaves_by_the_back_door", VALUES, r"must not end the process, called os._exit\(0\)"),
        ("stops_the_clock", VALUES, "must not replace time.monotonic"),
        ("loads_the_dice", VALUES, "must not replace random.random"),
        ("rejects", VALUES, "UnsatisfiedAssumption"),
        ("is_unsettled", VALUES, "Unsettled: who knows"),
        ("is_outside", VALUES, "OutsideDomain: not here"),
        ("interrupts", VALUES, "KeyboardInterrupt"),
        ("groups", VALUES, "ExceptionGroup"),
        ("skips_backward", GRADIENTS, "Skipped: it is not my day"),
        ("patches", VALUES, "must not replace torch.isfinite"),
        ("hides", VALUES, "must not replace Tensor.cpu"),
        ("has_states_forgotten", VALUES, "must not replace properties.harness.running.STATE"),
        ("fails_without_a_word", VALUES, "raised Unshown, which has no text"),
        ("rewrites_its_report", VALUES, "must not replace TestReport.from_item_and_call"),
    ],
)
def test_an_implementation_does_not_decide_its_own_verdict(subject: str, law: str, said: str) -> None:
    recorder = Recorder()
    with pytest.raises(Misconduct, match=said):
        check(subject, law, recorder)
    assert recorder.facts.failing_call == 1
    assert recorder.facts.failing_problem


def test_an_implementation_does_not_use_the_memory_of_its_results_again() -> None:
    with pytest.raises(LawBroken, match="must not change, but is"):
        check("uses_its_memory_again", "test_other_calls_before_and_between_change_nothing")


def test_a_function_that_was_replaced_is_put_back() -> None:
    before = torch.isfinite
    with pytest.raises(Misconduct):
        check("patches")
    assert torch.isfinite is before


def test_a_function_that_hides_an_inherited_one_is_taken_away() -> None:
    with pytest.raises(Misconduct):
        check("hides")
    assert "cpu" not in vars(torch.Tensor)


def test_pytorch_may_replace_functions_of_its_own() -> None:
    assert check("compiles")


def surroundings() -> tuple[Any, ...]:
    """What an implementation may set."""
    filters, folder = list(warnings.filters), os.getcwd()
    subnormal = torch.tensor(1e-40) * 1
    modes = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_anomaly_enabled(), sys.getrecursionlimit()
    return filters, folder, *modes, signal.getsignal(signal.SIGTERM), torch.Storage, bool(subnormal > 0)


def test_settings_of_an_implementation_end_with_its_call() -> None:
    before = surroundings()
    assert check("settles_in")
    assert surroundings() == before


def test_a_mode_of_an_implementation_ends_with_its_call() -> None:
    bits = oracle.precision.context.prec
    assert check("stays_in_a_mode")
    assert torch.overrides._get_current_function_mode() is None
    assert oracle.precision.context.prec == bits


def test_seeds_that_an_implementation_sets_change_no_problem() -> None:
    before = [PROBLEM.inputs().q, PROBLEM.cotangents().o]
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    assert all(torch.equal(x, y) for x, y in zip(before, [PROBLEM.inputs().q, PROBLEM.cotangents().o], strict=True))


def test_ordinary_errors_stay_what_they_are() -> None:
    error = ValueError("q is too long")
    with pytest.raises(ValueError, match="q is too long") as caught, undisturbed():
        raise error
    assert caught.value is error


def test_who_presses_ctrl_c_ends_the_run() -> None:
    # In the background of a script Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = heed_interrupts()
    try:
        with pytest.raises(KeyboardInterrupt), answering():
            signal.raise_signal(signal.SIGINT)
    finally:
        stop()
        interrupted.clear()
        signal.signal(signal.SIGINT, before)


def test_an_example_that_does_not_end_is_ended_in_time() -> None:
    recorder, start = Recorder(seconds=0.2), time.monotonic()
    with pytest.raises(Hanging, match=r"--example-timeout 0\.2 seconds"):
        check("hangs", recorder=recorder)
    assert time.monotonic() - start < 60
    assert recorder.facts.failing_problem == PROBLEM.to_json()
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_time_limit_of_pytest_timeout_is_no_error_of_the_implementation() -> None:
    source = "def timeout_sigalrm(): fail('Timeout >1.0s')"
    exec(source, timer := {"__name__": "pytest_timeout", "fail": pytest.fail})
    with pytest.raises(Hanging, match=r"Timeout >1\.0s"), answering():
        timer["timeout_sigalrm"]()


def test_an_alarm_of_somebody_else_still_comes() -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with limited(60):
            pass
        time.sleep(0.5)
        assert rung == [signal.SIGALRM]
        # One that comes first is not touched.
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with limited(0.2):
            time.sleep(0.5)
        assert rung == [signal.SIGALRM] * 2
        # One that comes later waits no longer for it.
        signal.setitimer(signal.ITIMER_REAL, 1)
        with pytest.raises(Hanging), limited(0.2):
            time.sleep(60)
        time.sleep(1)
        assert rung == [signal.SIGALRM] * 3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("subject", "said"),
    [
        ("returns_nothing", r"must return \(o, state\), o a tensor, got NoneType"),
        ("returns_text", r"must return \(o, state\), o a tensor, got str"),
        ("returns_no_state", r"must return \(o, state\), got no state without the tensors M, S, anchor, offset"),
        ("returns_half_a_state", "a final state must be M, S, anchor and offset, got 2 things"),
        ("returns_an_early_offset", r"`offset` must be \[1\], got \[0\]"),
        ("returns_offsets_in_floats", r"`offset.is_floating_point\(\)` must be False, got True"),
        ("returns_sparse_outputs", "`o.layout` must be torch.strided, got torch.sparse_coo"),
        ("returns_no_numbers", "`o.is_meta` must be False, got True"),
        ("shows_halves", r"o\[.*\] is wrong"),
        ("returns_wide_outputs", r"`o` must be \(\(1, 3, 1, 2\), torch.float32\), got .*float64"),
        ("returns_heads_first", r"`o` must be \(\(1, 3, 1, 2\), .*, got \(torch.Size\(\[1, 1, 3, 2\]\)"),
    ],
)
def test_an_implementation_that_returns_something_else_is_told(subject: str, said: str) -> None:
    with pytest.raises(LawBroken, match=said):
        check(subject)


def test_a_module_is_a_callable() -> None:
    assert check("module")
    assert check("module", GRADIENTS)


def test_a_module_is_no_instance_of_itself() -> None:
    with pytest.raises(ValueError, match="must be a function or an instance, got the class Module"):
        foreign("tests.properties.misbehaving:Module", "cpu")


@pytest.mark.parametrize("subject", ["exits", "skips", "hangs", "rewrites_its_report"])
def test_a_run_of_an_implementation_that_evades_it_fails(subject: str) -> None:
    law, target = f"properties/test_oracle.py::{VALUES}", f"tests.properties.misbehaving:{subject}"
    run = ("--impl", target, "--replay", PROBLEM.to_json(), "--example-timeout", "1")
    output = run_suite(law, *run, fails=1)
    assert re.search(r"values_are_the_oracles +FAIL", output), output
    assert re.search(r"replay: pytest 'properties/\S+' --impl \S+ --example-timeout 1\.0 --replay", output)


def test_a_thread_that_outlives_its_call_ends_no_run_as_if_all_were_well() -> None:
    law, target = f"properties/test_oracle.py::{VALUES}", "tests.properties.misbehaving:leaves_later"
    run_suite(law, "--impl", target, "--hypothesis-profile=smoke", fails=1)


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_an_implementation_that_ends_its_process_ends_no_run_as_if_all_were_well(workers: tuple[str, ...]) -> None:
    law, target = f"properties/test_oracle.py::{VALUES}", "tests.properties.misbehaving:leaves_through_c"
    output = run_suite(law, "--impl", target, "--replay", PROBLEM.to_json(), *workers, fails=1)
    assert "not complete" in output


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_a_thread_that_never_ends_keeps_no_run_alive(workers: tuple[str, ...]) -> None:
    law, target = f"properties/test_oracle.py::{VALUES}", "tests.properties.misbehaving:stays_in_a_thread"
    assert "1 passed" in run_suite(law, "--impl", target, "--replay", PROBLEM.to_json(), *workers)


@pytest.mark.parametrize("words", [(), ("-s",), ("--capture=sys",), ("-n", "1")], ids=str)
def test_streams_that_an_implementation_closes_stay_open(words: tuple[str, ...]) -> None:
    law, target = f"properties/test_oracle.py::{VALUES}", "tests.properties.misbehaving:closes_its_streams"
    output = run_suite(law, "--impl", target, "--replay", PROBLEM.to_json(), *words)
    assert "1 passed" in output
    assert ("the last word" in output) == ("-s" in words)


def test_modules_that_an_implementation_forgets_are_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    modules, path, finders = dict(sys.modules), list(sys.path), list(sys.meta_path)
    monkeypatch.setattr(sys, "path", [*path])
    monkeypatch.setattr(sys, "meta_path", [*finders])
    with undisturbed():
        monkeypatch.delitem(sys.modules, "json")
        monkeypatch.setitem(sys.modules, "torch", None)
        sys.path[:], sys.meta_path[:] = ["its own"], []
    assert {name: x for name, x in sys.modules.items() if name in modules} == modules
    assert (set(sys.path), sys.meta_path) == ({"its own", *path}, finders)
    law, target = f"properties/test_oracle.py::{VALUES}", "tests.properties.forgetful:memory"
    assert "1 passed" in run_suite(law, "--impl", target, "--replay", PROBLEM.to_json())


def test_calls_of_several_threads_are_contained_together() -> None:
    leave, interval = os._exit, sys.getswitchinterval()
    meeting = threading.Barrier(2)
    assert at_once([lambda: (meeting.wait(), 1)[1], lambda: (meeting.wait(), 2)[1]]) == [1, 2]

    def changes() -> None:
        torch.set_default_dtype(torch.float64)
        with undisturbed():
            time.sleep(0.01)

    at_once([changes, changes])
    assert (os._exit, sys.getswitchinterval(), torch.get_default_dtype()) == (leave, interval, torch.float32)
    for misdeed in (lambda: os._exit(0), lambda: pytest.skip("not in this thread")):
        with pytest.raises(Misconduct):
            at_once([lambda: None, misdeed])


def test_a_sigterm_is_heeded_where_ctrl_c_is_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = heed_interrupts()
    try:
        with pytest.raises(KeyboardInterrupt), answering():
            signal.raise_signal(signal.SIGTERM)
        assert interrupted.is_set()
    finally:
        stop()
        interrupted.clear()
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

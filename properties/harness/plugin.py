"""The suite as a plugin of pytest: options, one test per law and implementation, and the summary."""

import argparse
import functools
import json
import os
import platform
import shlex
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hypothesis
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import settings

from properties.harness import (
    command_line,
    containment,
    crash_isolation,
    draws,
    envelope,
    files,
    headers,
    implementations,
    progress,
    ratchet,
    report,
    sharding,
    waiting,
    watching,
    workarounds,
)
from properties.harness.facts import Recorder
from properties.harness.foreign import foreign
from properties.harness.implementations import BACKENDS, CLAIMS, DEFAULT, Implementation, devices
from properties.harness.laws import PROPERTIES
from properties.harness.ledger import Ledger, now_and_then
from properties.problems.problem import Problem

FIXTURES = Path(__file__).parents[1] / "fixtures"
LEDGER = pytest.StashKey[Ledger]()
SHARD = pytest.StashKey[sharding.Shard | None]()
PROBLEM = pytest.StashKey[Problem | None]()
SUBJECTS = pytest.StashKey[dict[str, Implementation]]()
OPTIONS = pytest.StashKey[Sequence[tuple[str, str]]]()
# What the command line says of `--impl`, instead of the callable itself.
DECLARED = ("--impl-lacks", "--impl-claims", "--impl-domain", "--impl-operands")
RECORDER = pytest.StashKey[Recorder]()
# Whether another process waits for this run.
WATCHED = pytest.StashKey[bool]()
# When the run began, by `time.monotonic`.
BEGIN = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the suite."""
    share_failures()
    group = parser.getgroup("properties")
    group.addoption("--backends", default=DEFAULT, help=f"which of {','.join(BACKENDS)} to verify ({DEFAULT})")
    group.addoption("--impl", metavar="MODULE:CALLABLE", help="verify this instead of the backends")
    group.addoption("--impl-lacks", metavar="CLAIMS", help="missing claims, instead of its own `lacks`")
    group.addoption("--impl-claims", metavar="CLAIMS", help="claims of law 18, instead of its own `claims`")
    group.addoption("--impl-domain", metavar="RULES", help="where it is defined, such as 'D=64,128 C=64 T%%C=0'")
    group.addoption("--impl-operands", metavar="DTYPE", help="inputs: it rounds operands of products to q's dtype")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the implementations run (cpu)")
    group.addoption("--shard", metavar="I/N", help="check the I-th of N shares of the examples of a run")
    group.addoption("--replay", metavar="PROBLEM", help="run the selected laws on this problem alone: JSON or a file")
    group.addoption(
        "--example-timeout", metavar="SECONDS", type=float, default=600, help="an example that takes longer fails (600)"
    )
    group.addoption("--verdicts", metavar="FILE", type=Path, help="write the verdict on each law as JSON")
    group.addoption("--progress", action="store_true", help="show how far the run has come, and how long it may take")
    group.addoption("--progress-to", metavar="DESCRIPTOR", type=int, help=argparse.SUPPRESS)
    group.addoption("--envelope", action="store_true", help="print how many calls there were of each size and way")
    group.addoption("--reports-to", metavar="FILE", help=argparse.SUPPRESS)
    group.addoption("--update-ratchet", action="store_true", help="store the worst errors of this run, none larger")
    group.addoption("--raise-ratchet", action="store_true", help="store the worst errors of this run, larger ones too")
    group.addoption("--save-failures", action="store_true", help="write each failure's problem into fixtures/")


def share_failures() -> None:
    """Let the profiles that keep failures keep them where the environment says."""
    try:
        database = sharding.database()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    if database:
        for name in draws.KEEPING:
            settings.register_profile(name, settings.get_profile(name), **database)
        settings.load_profile(settings.get_current_profile_name())


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Let a child process check somebody's implementation, so that this one has the last word on the exit status."""
    if not config.getoption("--impl") or hasattr(config, "workerinput") or config.stash.get(WATCHED, False):
        return None
    if not watching.is_possible():
        return None
    config.stash[WATCHED] = True
    return watching.in_a_child(lambda: config.hook.pytest_cmdline_main(config=config))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Use one thread in each worker; keep the options that a replay command repeats."""
    config.stash[BEGIN] = time.monotonic()
    with refusing_mistakes():
        command_line.check(config)
    config.addinivalue_line("markers", "law(*sections, needs): the sections of SPEC.md a property comes from")
    torch.set_num_threads(1)
    workarounds.keep_freed_memory()
    if getattr(config.option, "maxschedchunk", 1) is None:
        # Of the dear laws, which come first, no worker has many.
        config.option.maxschedchunk = 1
    config.add_cleanup(containment.heed_interrupts())
    # Nothing is captured yet.
    waiting.STDERR = os.dup(2)
    if config.getoption("--device") == "cpu":
        # Triton looks at this when its kernels are imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
        # NumPy, in the interpreter, warns of inf and NaN, which a GPU makes in silence. Its sums warn from a module of
        # their own.
        for module in ("triton.runtime.interpreter", "numpy._core.fromnumeric"):
            config.addinivalue_line("filterwarnings", f"ignore::RuntimeWarning:{module}")
    else:
        # Without it cuBLAS refuses to be deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Where nothing can be stored, the run goes on: both are said once.
    for warning in (":The database setting is not:hypothesis.errors.HypothesisWarning", "::pytest.PytestCacheWarning"):
        config.addinivalue_line("filterwarnings", f"default{warning}")
    named = {
        "--backends": DEFAULT,
        "--impl": None,
        **dict.fromkeys(DECLARED),
        "--device": "cpu",
        "--example-timeout": 600,
    }
    values = {name: config.getoption(name) for name in named}
    config.stash[OPTIONS] = tuple((name, str(values[name])) for name in named if values[name] != named[name])
    crash_isolation.spread(config.getoption("--device"))
    if reports := config.getoption("--reports-to"):
        config.pluginmanager.register(crash_isolation.Reporter(config, reports), "titans-reporter")
    else:
        config.pluginmanager.register(crash_isolation.Isolation(repeated(config)), "titans-isolation")
    with refusing_mistakes():
        config.stash[SUBJECTS] = subjects(config)
        config.stash[SHARD] = sharding.Shard.parse(text) if (text := config.getoption("--shard")) else None
        config.stash[PROBLEM] = command_line.read_problem(config.getoption("--replay"))
        if not hasattr(config, "workerinput") and not config.getoption("collectonly"):
            command_line.check_files(config)
    config.stash[LEDGER] = Ledger(config.stash[SUBJECTS].values(), config.stash[OPTIONS])
    config.pluginmanager.register(config.stash[LEDGER], "titans-ledger")
    progress.watch(config, waiting.STDERR)
    if (path := config.getoption("--verdicts")) and not hasattr(config, "workerinput") and not files.is_pipe(path):
        config.stash[LEDGER].changed = now_and_then(functools.partial(store_so_far, config, path))


@pytest.hookimpl(tryfirst=True)
def pytest_keyboard_interrupt(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    """Let pytest's own report of an interrupt not fail."""
    workarounds.drop_entries_without_a_line(excinfo)


@contextmanager
def refusing_mistakes() -> Generator[None]:
    """Make pytest's error of usage of a ValueError, and of an import that does not end."""
    try:
        yield
    except (ValueError, waiting.Hanging) as error:
        raise pytest.UsageError(str(error)) from error


def repeated(config: pytest.Config) -> list[str]:
    """Return the options with which another process checks the same."""
    options = [word for option in config.stash[OPTIONS] for word in option]
    options += [f"--hypothesis-profile={settings.get_current_profile_name()}"]
    for name in ("--hypothesis-seed", "--shard", "--replay"):
        if (value := config.getoption(name)) is not None:
            options += [name, str(value)]
    plugins = [name for name in config.getoption("plugins") or () if not name.startswith("no:")]
    return options + [word for name in plugins for word in ("-p", name)]


def subjects(config: pytest.Config) -> dict[str, Implementation]:
    """Return by name the implementations that the options name."""
    target, device = config.getoption("--impl"), config.getoption("--device")
    lacks, more, domain, operands = said = tuple(config.getoption(name) for name in DECLARED)
    if target is None:
        if missing := [name for name, value in zip(DECLARED, said, strict=True) if value is not None]:
            raise ValueError(f"{' and '.join(missing)} needs --impl")
        names = config.getoption("--backends").split(",")
        return {name: implementations.implementation(name, device) for name in names}
    if config.getoption("--backends") != DEFAULT:
        raise ValueError("--impl and --backends exclude each other")
    lacking, claims = (x and [claim for claim in x.split(",") if claim] for x in (lacks, more))
    with waiting.limited(config.getoption("--example-timeout"), f"{target!r} must be imported"):
        return {target: foreign(target, device, lacking, domain, operands, claims)}


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Name the versions and implementations of a run."""
    backend, subjects = mpmath.libmp.BACKEND, config.stash[SUBJECTS]
    about = "" if config.getoption("--impl") else "backends "
    claims = [f"titans: not claimed: {', '.join(sorted(CLAIMS - x.claims))}" for x in subjects.values()]
    claims += [f"titans: defined for {x.domain}" for x in subjects.values() if str(x.domain)]
    return [
        f"titans: python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"mpmath {mpmath.__version__} ({backend}), hypothesis {hypothesis.__version__}",
        f"titans: {about}{','.join(subjects)} on {config.getoption('--device')} ({devices()}), "
        f"profile {settings.get_current_profile_name()} ({settings().max_examples} examples per law)",
        *(claims if config.getoption("--impl") else []),
        *([f"titans: {progress.takes(config)}"] if config.getoption("--progress") else []),
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of each law and implementation; skip where a law needs a missing claim."""
    if "implementation" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("law")
    parameters = []
    for name, subject in metafunc.config.stash[SUBJECTS].items():
        lacking = (mark.kwargs["needs"] if mark else frozenset()) - subject.claims
        skip = [pytest.mark.skip(reason=f"not claimed: {', '.join(sorted(lacking))}")] if lacking else []
        parameters.append(pytest.param(subject, id=name, marks=skip))
    metafunc.parametrize("implementation", parameters)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give the laws the problem to replay, and slow implementations fewer examples; the dearest laws come first."""
    # A worker that begins with one of them when the others have nothing left to do prolongs the run.
    items.sort(key=lambda item: not is_dear(item))
    problem, shard = config.stash[PROBLEM], config.stash[SHARD]
    random_seed, seconds = int(config.getoption("--hypothesis-seed") or 0), config.getoption("--example-timeout")
    for item in items:
        item.stash[RECORDER] = recorder = Recorder(item.nodeid, config.stash[OPTIONS], seconds)
        if not isinstance(item, pytest.Function) or (law := PROPERTIES.get(item.originalname)) is None:
            continue
        implementation = subject(item)
        share = implementation.share * (1.0 if law.any_size else implementation.domain.share)
        if problem:
            item.obj = law.replay(problem, recorder)
        elif shard:
            item.obj = shard.test(law, share, random_seed, recorder)
        else:
            item.obj = law.test(recorder, share)


def is_dear(item: pytest.Item) -> bool:
    """Whether a test is a law of real sizes."""
    law = PROPERTIES.get(getattr(item, "originalname", ""))
    return law is not None and law.any_size


def subject(item: pytest.Function) -> Implementation:
    """Return the implementation that a test is about."""
    found = item.callspec.params["implementation"]
    assert isinstance(found, Implementation)
    return found


@pytest.fixture
def recorder(request: pytest.FixtureRequest) -> Recorder:
    """Return the recorder of the running test, for one that checks laws itself."""
    return request.node.stash[RECORDER]  # type: ignore[no-any-return]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Name the law and the implementation of a test, even of one that is not run."""
    if containment.interrupted.is_set():
        # The exception was lost, as in a callback of the garbage collector.
        raise KeyboardInterrupt
    item.user_properties[:] = report.properties(about(item))


def about(item: pytest.Item) -> dict[str, Any]:
    """Return which law a test puts before which implementation."""
    verified = subject(item) if isinstance(item, pytest.Function) and is_about_one(item) else None
    mark = item.get_closest_marker("law")
    needs = mark.kwargs["needs"] if mark else frozenset()
    return {
        "law": item.name.partition("[")[0],
        "implementation": verified.name if verified else "",
        "device": verified.device if verified else "",
        "sections": list(mark.args) if mark else [],
        "lacking": sorted(needs - verified.claims) if verified else [],
        "domain": str(verified.domain) if verified else "",
    }


def is_about_one(item: pytest.Function) -> bool:
    """Whether a test is about an implementation."""
    return hasattr(item, "callspec") and "implementation" in item.callspec.params


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Keep the facts of the test."""
    recorder = item.stash[RECORDER]
    try:
        result = yield
        if recorder.unclaimed:
            pytest.skip(recorder.unclaimed)
        return result
    except Exception as error:
        recorder.ended(error)
        found, saving = recorder.facts.failing_problem, item.config.getoption("--save-failures")
        if found and saving and isinstance(item, pytest.Function) and "fixture" not in item.fixturenames:
            try:
                save(about(item)["law"], Problem.from_json(found), item.name)
            except OSError as trouble:
                item.add_report_section("call", "fixture", f"the problem could not be saved: {trouble}")
        raise
    finally:
        item.user_properties += report.properties(recorder.facts.as_dict())


def save(law: str, problem: Problem, test: str) -> Path:
    """Write a problem that broke a law as a fixture."""
    while True:
        number = 1 + max((int(path.name[:3]) for path in FIXTURES.glob("[0-9][0-9][0-9]-*.json")), default=0)
        path = FIXTURES / f"{number:03}-{law.removeprefix('test_').replace('_', '-')}.json"
        fields = {"why": f"broke {test}", "laws": [law], "problem": json.loads(problem.to_json())}
        try:
            files.create(path, json.dumps(fields, indent=1) + "\n")
        except FileExistsError:
            continue
        return path


def pytest_collection_finish(session: pytest.Session) -> None:
    """Expect a verdict of every test that was collected."""
    session.config.stash[LEDGER].expect((item.nodeid, about(item)) for item in session.items)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Give every test a verdict, and write them where a file was asked for; a worker leaves that to the controller."""
    config = session.config
    if hasattr(config, "workerinput") or config.getoption("collectonly"):
        return
    ledger = config.stash[LEDGER]
    ledger.complete(config)
    if not ledger.unjudged:
        progress.keep_duration(config, time.monotonic() - config.stash[BEGIN])
    session.exitstatus = session.exitstatus or ledger.exit_status
    try:
        store(config, ledger)
    except OSError as error:
        ledger.trouble = f"the results could not be stored: {error}"
        session.exitstatus = session.exitstatus or pytest.ExitCode.INTERNAL_ERROR


def store_so_far(config: pytest.Config, path: Path) -> None:
    """Write the verdicts there are: of a run that is killed they are all that is left."""
    # In the end the trouble is told.
    with suppress(OSError):
        write_verdicts(config, path, headers.UNENDED)


def store(config: pytest.Config, ledger: Ledger) -> None:
    """Write the files that were asked for."""
    raising = config.getoption("--raise-ratchet")
    if raising or config.getoption("--update-ratchet"):
        ratchet.update(ledger.verdicts, raising)
    if path := config.getoption("--verdicts"):
        write_verdicts(config, path)


def write_verdicts(config: pytest.Config, path: Path, *more: str) -> None:
    """Write the verdicts there are, with more lines in their header."""
    about = headers.header(
        shlex.join(("pytest", *config.invocation_params.args)),
        config.stash[BEGIN],
        [*pytest_report_header(config), *config.stash[LEDGER].left_out, *more],
        profile=settings.get_current_profile_name(),
        seed=str(config.getoption("--hypothesis-seed")),
        shard=config.getoption("--shard"),
    )
    report.write_json(path, config.stash[LEDGER].verdicts, about)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table of verdicts, the failures in full, and how much was checked."""
    seen = config.stash[LEDGER].verdicts
    if trouble := config.stash[LEDGER].trouble:
        terminalreporter.write_line(trouble, red=True)
    if not seen:
        terminalreporter.write_line("not complete: no law was checked", yellow=True)
        return
    terminalreporter.section("verdicts")
    calls = envelope.tables(seen) if config.getoption("--envelope") else []
    for line in (*report.table(seen), *report.failures(seen), *report.summary(seen), *calls):
        terminalreporter.write_line(line)
    if unjudged := config.stash[LEDGER].unjudged:
        of = len(config.stash[LEDGER].collected)
        terminalreporter.write_line(f"not complete: {unjudged} of {of} tests were not run", red=True)
    for line in config.stash[LEDGER].left_out:
        terminalreporter.write_line(line, yellow=True)
    if trouble := report.too_many_ill_conditioned(seen):
        terminalreporter.write_line(f"FAIL: {trouble}", red=True)

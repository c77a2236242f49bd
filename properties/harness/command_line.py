"""Mistakes on the command line, found before anything runs: each is one line of pytest's."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis.errors import InvalidArgument

from properties.harness import files, headers, report
from properties.problems.problem import Problem


def check(config: pytest.Config) -> None:
    """Refuse options that no run can follow, or raise ValueError."""
    if (seed := config.getoption("--hypothesis-seed")) is not None:
        try:
            int(seed)
        except ValueError as error:
            raise ValueError(f"--hypothesis-seed must be an integer, got {seed!r}") from error
    if profile := config.getoption("--hypothesis-profile"):
        try:
            settings.get_profile(profile)
        except InvalidArgument as error:
            raise ValueError(f"--hypothesis-profile must be dev, smoke, ci or deep, got {profile!r}") from error
    if not 0 <= (seconds := config.getoption("--example-timeout")) < math.inf:
        raise ValueError(f"--example-timeout must be a number of seconds, got {seconds}")
    check_device(config.getoption("--device"), uses_it_itself(config))
    lacks = config.getoption("--impl-lacks")
    if lacks is not None and not lacks.strip(", "):
        raise ValueError("--impl-lacks must name claims; leave it out where none is missing")


def check_device(device: str, trying: bool) -> None:
    """Refuse a device that is not there, or raise ValueError."""
    if device == "cuda" and (trouble := without_gpu(trying)):
        raise ValueError(f"--device cuda needs a GPU that PyTorch can use ({trouble}); --device cpu needs none")


def uses_it_itself(config: pytest.Config) -> bool:
    """Whether this process alone verifies: where several do, each takes memory of its own GPU only."""
    return not hasattr(config, "workerinput") and config.getoption("dist", "no") == "no"


def without_gpu(trying: bool) -> str:
    """Return why PyTorch cannot use a GPU, if it cannot."""
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    try:
        if trying:
            torch.ones(1, device="cuda").add(1).item()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""


def check_files(config: pytest.Config) -> None:
    """Refuse results in files that cannot be written, or raise ValueError; a result of an earlier run is removed."""
    if (path := config.getoption("--verdicts")) is not None:
        try:
            files.check(path)
            if not files.is_pipe(path):
                report.write_json(path, [], unended())
        except OSError as error:
            raise ValueError(f"--verdicts must name a file that can be written: {error}") from error
    if path := config.getoption("xmlpath", None):
        try:
            files.check(Path(path))
        except OSError as error:
            raise ValueError(f"--junitxml must name a file that can be written: {error}") from error


def unended() -> dict[str, Any]:
    """Return the header of a run that has not ended."""
    return headers.header("", time.monotonic(), [headers.UNENDED], profile="", seed="")


def read_problem(given: str | None) -> Problem | None:
    """Read a problem, alone or in a fixture: JSON, or a file of it; or raise ValueError."""
    if given is None:
        return None
    try:
        fields = json.loads(given if given.lstrip().startswith("{") else Path(given).read_text())
        problem = typed(Problem.from_json(json.dumps(fields.get("problem", fields))))
        problem.inputs()
    except Exception as error:
        raise ValueError(
            f"--replay must be a problem as JSON, or a file of one: {type(error).__name__}: {error}"
        ) from error
    return problem


def typed(problem: Problem) -> Problem:
    """Return a problem whose fields have the types of their defaults, or raise TypeError: JSON has any."""
    for field in dataclasses.fields(problem):
        value = getattr(problem, field.name)
        wanted = (float, int) if field.name == "eps" else (type(field.default),)
        integers = value if field.name in ("lengths", "offsets", "splits") else ()
        if type(value) not in wanted or any(type(x) is not int for x in integers):
            raise TypeError(f"`{field.name}` must be like {field.default!r}, got {value!r}")
    if not 0 < problem.eps < math.inf:
        raise ValueError(f"`eps` must be positive and finite, got {problem.eps}")
    return problem

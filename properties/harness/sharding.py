"""Runs that are spread over several machines: shares of one stream of examples, and one database of failures."""

import functools
import os
from dataclasses import dataclass
from typing import Any

from hypothesis import Phase, seed, settings
from hypothesis.database import ExampleDatabase

from properties.harness import workarounds
from properties.harness.facts import Recorder
from properties.harness.implementations import Implementation
from properties.harness.laws import Property, Test
from properties.problems.problem import Problem

REDIS = "HYPOTHESIS_REDIS_URL"


@dataclass(frozen=True)
class Shard:
    """One of `of` shares of a run, numbered from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read `i/n`, or raise ValueError."""
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise ValueError(f"a shard must be i/n with 1 <= i <= n, got {text!r}")
        return cls(int(number), int(of))

    def test(self, law: Property, share: float, random_seed: int, recorder: Recorder | None = None) -> Test:
        """Return a law as a test of this shard's problems.

        Every shard draws every problem and passes over those of the others. No example may depend on those
        before it: nothing is taken from a database, steered by `target`, or rejected, so that every example is drawn
        independently, and from the first failure on, when Hypothesis shrinks it, each problem is this shard's.
        """
        drawn, failed = 0, False

        @functools.wraps(law.law)
        def shared(implementation: Implementation, problem: Problem) -> None:
            nonlocal drawn, failed
            drawn += 1
            if not failed and drawn % self.of != self.number % self.of:
                return
            if not (posed := law.posed(implementation, problem)):
                return
            try:
                law.check(implementation, posed, recorder)
            except Exception:
                failed = True
                raise

        phases = [phase for phase in settings().phases if phase not in (Phase.reuse, Phase.target)]
        test = law.drawn(shared, share, phases=phases, backend=workarounds.INDEPENDENT)
        if settings().derandomize:
            return test
        seeded: Test = seed(random_seed)(test)
        return seeded


def database() -> dict[str, ExampleDatabase]:
    """Return as a setting Hypothesis's database in the Redis server that the environment names, if it names one."""
    url = os.environ.get(REDIS)
    if not url:
        return {}
    try:
        from hypothesis.extra.redis import RedisExampleDatabase
        from redis import Redis
    except ImportError as error:
        raise ValueError(f"{REDIS} needs the package redis: {error}") from error
    server: Any = Redis.from_url(url)
    try:
        server.ping()
    except Exception as error:
        raise ValueError(f"{REDIS} must name a Redis server that answers, got {url!r}: {error}") from error
    return {"database": RedisExampleDatabase(server)}

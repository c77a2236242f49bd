"""The worst errors that were ever seen, and the file that stores them."""

import json
import math
from pathlib import Path

from properties.harness import files
from properties.harness.facts import Verdict

RATCHET = Path(__file__).parents[1] / "ratchet.json"
# How many tests replay the cases of an implementation; on a GPU most of them compile kernels of their own.
PARTS = 6
Cases = dict[str, tuple[float, str]]


def subject(implementation: str, device: str) -> str:
    """Return the name under which the worst cases of an implementation are stored."""
    return implementation if device == "cpu" else f"{implementation} on {device}"


def read() -> dict[str, Cases]:
    """Return the stored worst cases: error in ulps and problem, by implementation and "law dtype"."""
    stored = json.loads(RATCHET.read_text()) if RATCHET.exists() else {}
    return {
        name: {key: (x["error"], json.dumps(x["problem"])) for key, x in cases.items()}
        for name, cases in stored.items()
    }


def measured(row: Verdict) -> Cases:
    """Return the worst cases of a test that are a standard: those of a broken law are none, however small they are."""
    if not row.passed and row.law != "test_ratchet":
        return {}
    return {key: case for key, case in row.worst.items() if math.isfinite(case[0])}


def update(verdicts: list[Verdict], raising: bool = False) -> None:
    """Store the worst cases of this run in place of the stored ones; larger errors only where `raising`."""
    stored = read()
    seen: dict[str, Cases] = {}
    for row in verdicts:
        cases = seen.setdefault(subject(row.implementation, row.device), {})
        for key, (error, problem) in measured(row).items():
            cases[key] = max(cases.get(key, (0.0, "")), (error, problem))
    for name, cases in seen.items():
        before = stored.get(name, {})
        kept = {key: case for key, case in before.items() if not raising and case[0] < cases.get(key, case)[0]}
        stored[name] = before | cases | kept
    content = {
        name: {key: {"error": error, "problem": json.loads(problem)} for key, (error, problem) in sorted(cases.items())}
        for name, cases in sorted(stored.items())
    }
    files.write(RATCHET, json.dumps(content, separators=(",", ":")).replace('"test_', '\n"test_') + "\n")

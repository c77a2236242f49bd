"""Planted faults: read them from `mutants/`, and import `titans` with one of them in its source."""

import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
MUTANTS = Path(__file__).parent / "mutants"


@dataclass(frozen=True)
class Hunk:
    """Lines of a source that stand there once, and the lines of the mutant.

    Line numbers do not count: what is found by its text follows the code when lines are added elsewhere.
    """

    before: str
    after: str

    @classmethod
    def parse(cls, text: str) -> "Hunk":
        """Read the lines of a unified diff below its @@ line."""
        lines = text.splitlines(keepends=True)
        return cls(*("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +")))

    def apply(self, source: str, path: str) -> str:
        """Return the source with the mutant's lines, or raise ValueError."""
        if (count := source.count(self.before)) != 1:
            raise ValueError(f"these lines must stand once in {path}, found {count} times:\n{self.before}")
        return source.replace(self.before, self.after)


# Hunks by path, from the root of the repository.
Changes = Mapping[str, tuple[Hunk, ...]]


@dataclass(frozen=True)
class Fault:
    """A mutant of the op: a small change of a kind that is made by mistake.

    Parameters
    ----------
    name : str
        Names the mistake.
    backend : str
        The one to verify.
    laws : tuple of str
        Those that must notice, without their `test_`.
    changes : dict of str: tuple of Hunk
        See `Changes`.
    """

    name: str
    backend: str
    laws: tuple[str, ...]
    changes: Changes

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Read a patch: lines `fault:`, `backend:` and `law:`, then a unified diff."""
        fields, changes = read(text, ("fault", "backend", "law"))
        (name,), (backend,) = fields["fault"], fields["backend"]
        return cls(name, backend, tuple(fields["law"]), changes)

    def sources(self) -> dict[str, str]:
        """Return the changed sources; see `changed`."""
        return changed(self.changes)


def read(text: str, keys: Sequence[str]) -> tuple[dict[str, list[str]], Changes]:
    """Return the lines `key: value` of a patch by their keys, and the hunks of the unified diff below them by path."""
    head, *files = re.split(r"^--- a/", text, flags=re.MULTILINE)
    fields: dict[str, list[str]] = {key: [] for key in keys}
    for line in head.splitlines():
        key, _, value = line.partition(": ")
        fields[key].append(value)
    changes = {}
    for file in files:
        _, *hunks = re.split(r"^@@.*\n", file, flags=re.MULTILINE)
        changes[file.partition("\n")[0]] = tuple(map(Hunk.parse, hunks))
    return fields, changes


def changed(changes: Changes) -> dict[str, str]:
    """Return the changed sources by their paths.

    Raises
    ------
    ValueError
        If a hunk does not fit: the code has changed, and so must the patch.
    """
    sources = {}
    for path, hunks in changes.items():
        source = (ROOT / path).read_text()
        for hunk in hunks:
            source = hunk.apply(source, path)
        sources[path] = source
    return sources


def load() -> tuple[Fault, ...]:
    """Return all planted faults, folder by folder."""
    return tuple(Fault.parse(path.read_text()) for path in sorted(MUTANTS.rglob("*.patch")))


class Planted:
    """A finder of some modules, which takes them from other files."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find a changed module."""
        return importlib.util.spec_from_file_location(name, self.files[name]) if name in self.files else None


def plant(fault: Fault, folder: Path) -> None:
    """Let this process, in which `titans` is not yet imported, have the fault.

    Parameters
    ----------
    fault : Fault
    folder : Path
        Where the changed source may lie: Triton reads the source of its kernels, too.

    Raises
    ------
    RuntimeError
        If it is too late.
    """
    if "titans" in sys.modules:
        raise RuntimeError("`titans` must not be imported before a fault is planted")
    files = {}
    for path, source in fault.sources().items():
        module = path.removesuffix(".py").replace("/", ".")
        files[module] = folder / f"{module}.py"
        files[module].write_text(source)
    finder: Any = Planted(files)
    sys.meta_path.insert(0, finder)

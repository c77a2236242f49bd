"""Plant a fault: import a module from a changed copy of its source."""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fault:
    """A small change of one module, of a kind that is made by mistake.

    Parameters
    ----------
    name : str
        Says what is wrong.
    module : str
        Where, inside `titans`: "chunk" is `titans/chunk.py`.
    changes : tuple of (str, str)
        Fragments of its source, each of which occurs exactly once, and what stands there instead.
    laws : tuple of str
        Those that must notice, without their `test_`.
    backend : str
        The one to verify.
    """

    name: str
    module: str
    changes: tuple[tuple[str, str], ...]
    laws: tuple[str, ...]
    backend: str = "chunk"

    @property
    def path(self) -> Path:
        """The file that is changed."""
        return ROOT / "titans" / f"{self.module.replace('.', '/')}.py"

    def source(self) -> str:
        """Return the changed source.

        Raises
        ------
        ValueError
            If a fragment does not occur exactly once: the module has changed, and so must the catalogue.
        """
        text = self.path.read_text()
        for old, new in self.changes:
            if (count := text.count(old)) != 1:
                raise ValueError(f"{self.name!r}: a fragment must occur once in {self.path}, got {count} of {old!r}")
            text = text.replace(old, new)
        return text


class Planted:
    """A finder of one module, which takes it from another file."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find the changed module."""
        return importlib.util.spec_from_file_location(name, self.path) if name == self.name else None


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
    path = folder / fault.path.name
    path.write_text(fault.source())
    finder: Any = Planted(f"titans.{fault.module}", path)
    sys.meta_path.insert(0, finder)

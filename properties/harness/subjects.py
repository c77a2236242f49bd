"""What is to be verified, as text: the processes that verify it import it themselves."""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from properties.harness import implementations
from properties.harness.foreign import foreign
from properties.harness.implementations import BACKENDS, Implementation


@dataclass(frozen=True)
class Subject:
    """An implementation that has a name, and what is said of it.

    Parameters
    ----------
    target : str
        `package.module:callable`, or a backend of this repository.
    device : str
    lacks, claims, domain, operands : str or None
        Missing claims, claims of law 18, where it is defined, and its operands, instead of the callable's own: as
        `--impl-lacks`, `--impl-claims`, `--impl-domain` and `--impl-operands`.
    """

    target: str
    device: str = "cpu"
    lacks: str | None = None
    claims: str | None = None
    domain: str | None = None
    operands: str | None = None

    def __post_init__(self) -> None:
        """Refuse a target that cannot be a name, or options that a backend does not take."""
        if ":" not in self.target and self.target not in BACKENDS:
            raise ValueError(
                f"an implementation must be package.module:callable, or one of {', '.join(BACKENDS)}, "
                f"got {self.target!r}"
            )
        said = (self.lacks, self.claims, self.domain, self.operands)
        if ":" not in self.target and any(x is not None for x in said):
            raise ValueError(f"claims, domain and operands are a callable's, got the backend {self.target}")

    def load(self) -> Implementation:
        """Import it, or raise ValueError."""
        if ":" not in self.target:
            return implementations.implementation(self.target, self.device)
        lacking, claiming = listed(self.lacks), listed(self.claims)
        return foreign(self.target, self.device, lacking, self.domain, self.operands, claiming)

    @property
    def options(self) -> tuple[tuple[str, str], ...]:
        """The options of pytest that name it."""
        named = (
            ("--impl" if ":" in self.target else "--backends", self.target),
            ("--impl-lacks", self.lacks),
            ("--impl-claims", self.claims),
            ("--impl-domain", self.domain),
            ("--impl-operands", self.operands),
            ("--device", None if self.device == "cpu" else self.device),
        )
        return tuple((name, value) for name, value in named if value is not None)


def listed(claims: str | None) -> list[str] | None:
    """Return the claims that a text names."""
    return None if claims is None else [claim for claim in claims.split(",") if claim]


def name_of(thing: str | Callable[..., Any]) -> str:
    """Return the name by which another process imports a callable.

    Raises
    ------
    ValueError
        If it has none: the message says what to do.
    """
    if isinstance(thing, str):
        return thing
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    cure = "put it into a module, such as my_kernel.py, and verify 'my_kernel:NAME'"
    if not (module and name):
        raise ValueError(f"an object without a name of its own cannot be imported, got {thing!r}: {cure}")
    if module == "__main__":
        raise ValueError(f"`{name}` is defined in the script that runs, which no other process imports: {cure}")
    if "<" in name:
        raise ValueError(f"`{name}` has no name in its module, {module}: {cure}")
    found: Any = None
    with contextlib.suppress(AttributeError):
        found = functools.reduce(getattr, name.split("."), sys.modules.get(module))
    # A bound method is made anew each time.
    if found is not thing and (not inspect.ismethod(thing) or found != thing):
        raise ValueError(f"{module}:{name} is not this object any more, but {found!r}: verify it by another name")
    return f"{module}:{name}"

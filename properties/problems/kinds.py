"""Gates and values as text: the name of a kind and its parameters, such as `spike 2^-1 0 -2`.

Reading a text raises ValueError unless it has the right parameters, each of the right form. The kinds themselves are in
`gate_kinds` and `value_kinds`.
"""

from abc import ABC
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from hypothesis.strategies import SearchStrategy
from numpy.typing import NDArray

Array = NDArray[np.float64]
Text = SearchStrategy[str]


class Kind(ABC):
    """One kind; a subclass is a frozen dataclass whose fields are the parameters in the text."""

    name: ClassVar[str]

    @classmethod
    def read(cls, words: Sequence[str]) -> Self:
        """Read the parameters, or raise ValueError."""
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        if len(words) != len(names):
            raise ValueError(f"`{cls.name}` takes {len(names)} parameters ({' '.join(names)}), got {len(words)}")
        readers: list[Any] = [f.type for f in fields(cls)]  # type: ignore[arg-type]
        return cls(*(reader(word) for reader, word in zip(readers, words, strict=True)))

    def __str__(self) -> str:
        """Return the text that reads as this."""
        return " ".join([self.name, *(str(getattr(self, f.name)) for f in fields(self))])  # type: ignore[arg-type]


K = TypeVar("K", bound=Kind)


def read(kinds: dict[str, type[K]], field: str, text: str) -> K:
    """Read the text of a field, or raise ValueError."""
    name, *words = text.split() or [""]
    if name not in kinds:
        raise ValueError(f"the kind of `{field}` must be one of {', '.join(kinds)}, got {text!r}")
    try:
        return kinds[name].read(words)
    except ValueError as error:
        raise ValueError(f"`{field}` is {text!r}: {error}; the form is {kinds[name].__doc__}") from error

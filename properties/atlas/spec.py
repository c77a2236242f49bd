"""The sections of SPEC.md, so that a law can be read beside the sentence that it checks."""

import re
from collections.abc import Iterator
from pathlib import Path

from properties.harness.facts import Verdict
from properties.harness.report import fixture, shown

SPEC = Path(__file__).parents[2] / "SPEC.md"


def sections(text: str | None = None) -> dict[str, str]:
    """Return the numbered sentences of SPEC.md by their numbers, such as "5.2"."""
    return dict(_sentences(SPEC.read_text() if text is None else text))


def _sentences(text: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"^## ", text, flags=re.MULTILINE):
        heading, _, body = part.partition("\n")
        chapter, _, title = heading.partition(". ")
        if not chapter.isdecimal():
            continue
        yield chapter, title
        for number, sentence in re.findall(r"^(\d+)\. (.*(?:\n   +.*)*)", body, flags=re.MULTILINE):
            yield f"{chapter}.{number}", re.sub(r"\s+", " ", sentence.replace("**", "").replace("`", ""))


def sentence(row: Verdict) -> str:
    """Return the name of a law as the sentence that it is, with its fixture if it replays one."""
    words = shown(row.law).replace("_", " ")
    rest = fixture(row)
    return f"{words[:1].upper()}{words[1:]}{f': {rest.strip()}' if rest else ''}"

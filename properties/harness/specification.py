"""The sentences of `SPEC.md` that laws come from."""

import functools
import re
from pathlib import Path

SPECIFICATION = Path(__file__).parents[2] / "SPEC.md"


@functools.cache
def sentences() -> dict[str, str]:
    """Return the title of each section, by "3", and the text of its numbered items, by "5.1", without their marks."""
    found, text = {}, SPECIFICATION.read_text()
    for number, title, section in re.findall(r"^## (\d+)\. (.*?)\n(.*?)(?=^## |\Z)", text, re.M | re.S):
        found[number] = f"{title}."
        for item, text in re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |\n\n|\Z)", section, re.M | re.S):
            found[f"{number}.{item}"] = re.sub(r"[*`]", "", " ".join(text.split()))
    return found

"""The page of the atlas in a real browser: nothing goes wrong, nothing overflows, every picture is drawn."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from properties.atlas import page, tables
from properties.problems.problem import Problem
from tests.properties.test_atlas import drawn, everything, verdict

pytest.importorskip("vl_convert", reason="vl-convert-python is not installed: pip install --group dev")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file: Path = tmp_path_factory.mktemp("atlas") / "atlas.html"
    page.write(file, everything())
    return file


@pytest.fixture
def url(path: Path) -> str:
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install --group dev")
    with sync_api.sync_playwright() as driver:
        # A container has neither a sandbox nor much shared memory.
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        found = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield found
        found.close()


@pytest.fixture
def trouble() -> list[str]:
    return []


def opened(browser: Any, url: str, trouble: list[str], **options: Any) -> Any:
    """Open the page, and note whatever it complains of or asks the network for."""
    found = browser.new_context(**options).new_page()
    found.on("console", lambda said: trouble.append(said.text) if said.type in ("error", "warning") else None)
    found.on("pageerror", lambda error: trouble.append(str(error)))
    found.on("request", lambda asked: None if asked.url in (url, "data:,") else trouble.append(asked.url))
    found.goto(url)
    found.wait_for_selector("html[data-ready]", timeout=120_000)
    return found


def test_the_page_is_whole_and_small(path: Path) -> None:
    text = path.read_text()
    assert path.stat().st_size < 2e6
    assert "<img" not in text.partition('<script type="application/json"')[0]
    names = re.findall(r'class="picture[^"]*" id="([^"]+)"', text)
    assert sorted(names) == sorted({picture.name for picture in drawn(everything())})
    (content,) = re.findall(r'id="pictures">(.*?)</script>', text)
    assert [picture["name"] for picture in json.loads(content)["pictures"]] == sorted(names, key=names.index)


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1400, "dark")])
def test_every_picture_is_drawn_and_nothing_overflows(
    browser: Any, url: str, trouble: list[str], width: int, scheme: str
) -> None:
    found = opened(browser, url, trouble, viewport={"width": width, "height": 900}, color_scheme=scheme)
    marks = found.eval_on_selector_all(
        ".picture", "all => all.map(x => [x.id, x.querySelectorAll('svg .mark-rect path, svg .mark-line path').length])"
    )
    assert len(marks) == len(drawn(everything()))
    assert all(count > 0 for _, count in marks), marks
    assert found.evaluate("document.documentElement.scrollWidth") <= width
    assert trouble == []
    # A drawn picture keeps its whole place, or the next one would have less room.
    narrower = "all => all.filter(x => x.clientWidth < x.parentElement.clientWidth - 2).map(x => x.id)"
    assert found.eval_on_selector_all(".picture", narrower) == []
    # Only a picture that says so is wider than its place.
    wider = "all => all.filter(x => !x.classList.contains('wide') && x.scrollWidth > x.clientWidth).map(x => x.id)"
    assert found.eval_on_selector_all(".picture", wider) == []
    found.context.close()


def test_the_page_answers(browser: Any, url: str, trouble: list[str]) -> None:
    found = opened(browser, url, trouble, viewport={"width": 1400, "height": 900})
    found.keyboard.press("Tab")
    assert found.evaluate("document.activeElement.className") == "skip"
    assert found.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    found.keyboard.press("Enter")
    found.select_option("form[data-table=verdicts] select[name=verdict]", "fail")
    assert found.locator("#verdicts tbody tr:visible").count() == 1
    found.locator("#verdicts summary:visible").press("Enter")
    found.locator("#verdicts button.copy:visible").press("Enter")
    found.wait_for_function("document.getElementById('said').textContent == 'copied'")
    assert found.locator("form[data-table=verdicts] output").inner_text() == "1 of 3 rows"
    found.select_option("form[data-table=verdicts] select[name=verdict]", "")
    found.fill("form[data-table=verdicts] input", "half")
    assert found.locator("#verdicts tbody tr:visible").get_attribute("data-implementation") == "log"
    worst = found.locator("#worst tbody tr")
    assert (worst.count(), worst.get_attribute("data-dtype")) == (1, "float32")
    assert worst.locator("code").inner_text() == tables.replay(verdict().test, "chunk", "cpu", Problem().to_json())
    found.locator("#map-gates-values .mark-rect path").nth(30).hover()
    tooltip = found.locator("#vg-tooltip-element").inner_text()
    assert re.search(r"error / bound:?\s+0\.\d+", tooltip), tooltip
    assert trouble == []
    found.context.close()

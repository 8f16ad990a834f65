"""The page in a real browser without a network, as wide as a desk and as a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing")
pytest.importorskip("safetensors", reason="safetensors is missing (extra: train)")
pytest.importorskip("yaml", reason="yaml is missing (extra: train)")

from fastlora.report.command import report  # noqa: E402

SYSTEM = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Playwright's own Chromium, or the system's."""
    own = next(filter(None, map(shutil.which, SYSTEM)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=own, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no browser to start: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture
def path(runs: Path, tmp_path: Path) -> Path:
    report([runs], tmp_path / "page.html")
    return tmp_path / "page.html"


def opened(browser: Any, path: Path, width: int, scheme: str = "light") -> tuple[Any, list[str]]:
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme, offline=True)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: request.url.startswith("file:") or said.append(request.url))
    page.goto(path.as_uri())
    return page, said


@pytest.mark.parametrize(("width", "columns"), [(1280, 3), (390, 1)])
def test_layout(browser: Any, path: Path, width: int, columns: int) -> None:
    page, said = opened(browser, path, width)
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") == width, "the page itself never scrolls sideways"
    boxes = [figure.bounding_box() for figure in page.locator("#curves figure").all()]
    assert len(boxes) == 6
    assert sum(box["y"] == boxes[0]["y"] for box in boxes) == columns
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
    # As large as the reader sees it: letters of a chart, in pixels of the screen.
    sizes = page.evaluate(
        """[...document.querySelectorAll('svg')].map(svg =>
           11 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)"""
    )
    assert min(sizes) >= 9.5
    assert max(sizes) <= 15
    hidden = """[...document.querySelectorAll('svg text')].filter(text => {
        const inner = text.getBoundingClientRect(), outer = text.ownerSVGElement.getBoundingClientRect();
        return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
    }).map(text => text.textContent)"""
    assert page.evaluate(hidden) == [], "no text leaves its picture"
    wide = "[...document.querySelectorAll('.tiles dd')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert page.evaluate(wide) == 0, "numbers stay in their tiles"
    for table in page.locator(".scroll").all():
        box = table.bounding_box()
        assert box["x"] + box["width"] <= width


def test_values_are_read_off_the_curves(browser: Any, path: Path) -> None:
    page, said = opened(browser, path, 1280)
    figure = page.locator("#curves figure").first
    figure.scroll_into_view_if_needed()
    box = figure.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 14, box["y"] + box["height"] / 2)
    text = figure.locator(".readout").inner_text()
    assert text.startswith("step 40")
    assert all(name in text for name in ("a ", "b ", "c ", "d <&> e "))
    page.mouse.move(0, 0)
    assert figure.locator(".readout").inner_text() == ""
    assert said == []


def test_contrast_in_both_schemes(browser: Any, path: Path) -> None:
    """Of the text on its background, by the WCAG's formula."""
    script = """() => {
        const parse = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const shine = c => parse(c).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
        const paper = shine(getComputedStyle(document.querySelector('figure')).backgroundColor);
        const contrast = c => (Math.max(shine(c), paper) + .05) / (Math.min(shine(c), paper) + .05);
        return [contrast(getComputedStyle(document.querySelector('svg .tick')).fill),
                contrast(getComputedStyle(document.querySelector('figcaption')).color), paper];
    }"""
    papers = []
    for scheme in ("light", "dark"):
        page, _ = opened(browser, path, 390, scheme)
        tick, caption, paper = page.evaluate(script)
        assert tick >= 4.5
        assert caption >= 7
        papers.append(paper)
    assert papers[0] > 0.9 > 0.1 > papers[1]


def test_tables_scroll_within_their_frame(browser: Any, path: Path) -> None:
    page, _ = opened(browser, path, 390)
    frame = page.locator("#runs .scroll")
    widths = frame.evaluate("frame => [frame.scrollWidth, frame.clientWidth]")
    assert widths[0] > widths[1]
    first = page.locator("#runs tbody th").first
    before = first.bounding_box()
    frame.evaluate("frame => frame.scrollLeft = 200")
    assert first.bounding_box() == before, "the name of a run stays in sight"

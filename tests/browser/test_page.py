"""The report in a real browser: Chromium, without a window."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # forks.py

from forks import run_module

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'lightning-qbn[browser]'")
_FIGURES = 4  # drift, curve, integers, oscillations


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that has everything to show."""
    folder = tmp_path_factory.mktemp("page")
    words = ("qat=short", "debug=steps", "oscillation=freezing", "reestimation.at_epochs=[1]", "hydra.run.dir=run")
    done = run_module("lightning_qbn.train", (*words, "callbacks.progress=null"), folder)
    assert done.returncode == 0, done.stderr
    return folder / "run/report.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with playwright.sync_playwright() as running:
        try:
            browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as cause:
            pytest.skip(f"no Chromium: {cause}")
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_report_is_whole(report: Path, chromium: Any, scheme: str, width: int, tmp_path: Path) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page, messages, asked = context.new_page(), [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert messages == []
    assert asked == [report.as_uri()], "nothing is loaded"
    figures = page.locator("svg")
    assert figures.count() == _FIGURES
    for index in range(_FIGURES):
        box = figures.nth(index).bounding_box()
        assert box["width"] > 200
        assert box["height"] > 80
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the screen"
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert (sum(map(int, ink[4:-1].split(", ")[:3])) > 380) is (scheme == "dark"), "the text can be read"
    page.get_by_text("show", exact=True).click()
    assert page.get_by_text('"weight_bits": 2').first.is_visible()
    context.close()

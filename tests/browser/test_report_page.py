"""The report in a real browser: no complaint, nothing hostile runs, readable by hand, by key and on a phone."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nearfield.reporting import build_report
from tests.browser.chromium import Browser, Page, find_chromium
from tests.reporting.hostile import HOSTILE, PWN
from tests.reporting.runs import write_run, write_suite

pytestmark = pytest.mark.browser

VIEWS = {
    "desktop": {"width": 1280, "height": 900},
    "dark": {"width": 1280, "height": 900, "dark": True},
    "phone": {"width": 360, "height": 740, "phone": True},
    "print": {"width": 800, "height": 1100, "print_": True},
}
CONTRAST = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return rgba("white");
  };
  const bad = new Set();
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.getClientRects().length || ["SCRIPT", "STYLE", "title", "desc"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const ink = rgba(element.tagName === "text" ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(element))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) bad.add(`${element.tagName}.${element.getAttribute("class")}: ${contrast.toFixed(2)}`);
  }
  return [...bad];
})()
"""

BEYOND = """
[...document.querySelectorAll("svg.chart text")].filter((one) => {
  const { left, right } = one.getBoundingClientRect();
  return left < 0 || right > innerWidth;
}).map((one) => one.textContent)
"""


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    """A running Chromium; without one the tests are skipped, and fail where CI is set."""
    program = find_chromium(install=request.config.option.markexpr == "browser")
    if program is None:
        reason = "no Chromium on PATH, and none could be installed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with Browser(program) as running:
        yield running


@pytest.fixture()
def page(browser: Browser) -> Iterator[Page]:
    """A fresh tab."""
    tab = browser.page()
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose every free text is a hostile one."""
    supply = itertools.cycle(HOSTILE)
    return build_report(write_run(tmp_path_factory.mktemp("hostile"), lambda _: next(supply))).path


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of an ordinary run."""
    return build_report(write_run(tmp_path_factory.mktemp("harmless"))).path


@pytest.mark.parametrize("view", VIEWS)
def test_hostile_texts_do_nothing(page: Page, hostile: Path, view: str) -> None:
    """No script runs, no dialog, no request, no complaint in the console, and the page keeps its shape."""
    page.look(**VIEWS[view])
    page.open(hostile)
    page.value("for (const one of document.querySelectorAll('details')) one.open = true")
    page.value("new Promise((done) => setTimeout(done, 300))")
    assert page.value("typeof window.__pwned") == "undefined"
    assert str(page.value("document.title")).endswith("– nearfield report")
    assert page.value("document.querySelectorAll('iframe,object,embed,img,form,base,link,video').length") == 0
    assert page.value("document.scripts.length") == 2
    assert page.value("document.querySelectorAll('main > section').length") == 8
    assert page.value("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
    assert page.value(BEYOND) == [], "words of a chart leave the page"
    assert page.complaints == []


def test_the_policy_is_in_force_and_heard(page: Page, harmless: Path) -> None:
    """A script, a style and a request that are put into the page are stopped, and the complaints arrive here."""
    page.open(harmless)
    assert page.complaints == []
    page.value(f"document.body.append(Object.assign(document.createElement('script'), {{textContent: {PWN!r}}}))")
    page.value(
        "document.body.append(Object.assign(document.createElement('style'), {textContent: 'body{display:none}'}))"
    )
    page.value("document.body.setAttribute('onclick', 'window.__pwned = 2'); document.body.click()")
    assert page.value("fetch('https://example.org/').then(() => 'answered', () => 'stopped')") == "stopped"
    page.wait("true")
    assert page.value("typeof window.__pwned") == "undefined"
    assert page.value("getComputedStyle(document.body).display") == "block"
    told = "\n".join(page.complaints)
    for rule in ("script-src", "style-src", "default-src"):
        assert rule in told, page.complaints


def test_a_complaint_of_the_page_is_heard(page: Page, tmp_path: Path) -> None:
    """The client hears errors, exceptions, dialogs and requests: silence elsewhere means something."""
    file = tmp_path / "bad.html"
    file.write_text(
        "<!doctype html><title>x</title><script>console.error('oh'); setTimeout(() => { throw new Error('no') });"
        "setTimeout(() => alert('hey'), 50)</script><img src='http://example.org/x.png'>"
    )
    page.open(file)
    page.value("new Promise((done) => setTimeout(done, 300))")
    told = "\n".join(page.complaints)
    for sign in ("console error", "exception", "dialog: hey", "request: http://example.org/x.png"):
        assert sign in told, page.complaints


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run that was scored on ten tasks of four types."""
    run = write_run(tmp_path_factory.mktemp("suite"))
    write_suite(run)
    return build_report(run).path


def test_a_suite_fits_a_phone(page: Page, suite: Path) -> None:
    """Tables of scores are read without scrolling; a wider one scrolls in its frame and keeps its first column in sight."""
    page.look(width=390, height=844, phone=True)
    page.open(suite)
    page.value("for (const one of document.querySelectorAll('details')) one.open = true")
    wide = "[...document.querySelectorAll('.scroll')].filter((one) => one.scrollWidth > one.clientWidth + 1)"
    captions = page.value(f"{wide}.map((one) => one.querySelector('caption').textContent)")
    assert set(captions) == {"Values at some steps", "Sources of the store"}
    page.value(f"for (const one of {wide}) one.scrollLeft = 60")
    lefts = page.value(
        f"{wide}.map((one) => [one.getBoundingClientRect().left, ...[...one.querySelectorAll('th:first-child, caption')]"
        ".map((cell) => cell.getBoundingClientRect().left)])"
    )
    assert lefts and all(abs(left - row[0]) < 1 for row in lefts for left in row)
    assert page.value("document.documentElement.scrollWidth") == 390
    assert page.value(BEYOND) == []


def test_the_charts_of_a_suite_are_no_larger_than_the_others(page: Page, suite: Path) -> None:
    """The plot of all differences keeps the size of its letters where there is room for two charts."""
    page.look(**VIEWS["desktop"])
    page.open(suite)
    letters = "(one) => one.getBoundingClientRect().width / one.viewBox.baseVal.width"
    scales = page.value(f"[...document.querySelectorAll('svg.chart')].map({letters})")
    assert max(scales) < 1.2 * min(scales)
    assert page.value("document.querySelectorAll('figure.forest .whisker').length") == 10


def test_a_page_with_the_longest_texts_is_small(hostile: Path, suite: Path) -> None:
    assert max(hostile.stat().st_size, suite.stat().st_size) < 1_000_000


@pytest.mark.parametrize("view", ["desktop", "dark", "phone", "print"])
def test_text_has_contrast(page: Page, harmless: Path, view: str) -> None:
    """At least 4.5 to 1 for every text, in light, in dark and on paper."""
    page.look(**VIEWS[view])
    page.open(harmless)
    page.value("for (const one of document.querySelectorAll('details')) one.open = true")
    assert page.value(CONTRAST) == []


def test_charts_tell_their_values(page: Page, harmless: Path) -> None:
    """By the arrow keys and by the pointer; Escape puts the words away."""
    page.look(**VIEWS["desktop"])
    page.open(harmless)
    page.value("document.querySelector('svg[data-chart=loss]').closest('figure').focus()")
    page.key("Home", 36)
    tip = "document.activeElement.querySelector('.tip')"
    page.wait(f"!{tip}.hidden")
    assert str(page.value(f"{tip}.textContent")).startswith("step 1\nloss")
    page.key("ArrowRight", 39)
    page.key("ArrowRight", 39)
    page.wait(f"{tip}.textContent.startsWith('step 3\\n')")
    page.key("End", 35)
    page.wait(f"{tip}.textContent.startsWith('step 120\\n')")
    assert page.value(f"{tip}.getBoundingClientRect().right <= innerWidth")
    page.key("Escape", 27)
    page.wait(f"{tip}.hidden")
    told = f"!{tip}.hidden && Math.abs(Number({tip}.textContent.match(/step (\\d+)/)[1]) - 53) < 8"
    page.point("document.activeElement", told)
    assert page.complaints == []


def test_maps_tell_their_texts(page: Page, harmless: Path, tmp_path: Path) -> None:
    """By the arrow keys, label by label, and by the pointer; charts over logarithms tell their values too."""
    page.look(**VIEWS["desktop"])
    page.open(harmless)
    page.value("document.querySelector('svg[data-map]').closest('figure').focus()")
    page.key("Home", 36)
    tip = "document.activeElement.querySelector('.tip')"
    page.wait(f"!{tip}.hidden")
    assert str(page.value(f"{tip}.textContent")).startswith("label 0\ntext number ")
    page.key("End", 35)
    page.wait(f"{tip}.textContent.startsWith('label 3')")
    assert page.value("document.querySelectorAll('.mark.chosen').length") == 1
    page.key("Escape", 27)
    page.wait(f"{tip}.hidden")
    page.point("[...document.activeElement.querySelectorAll('.mark')].at(-1)", f"!{tip}.hidden")
    page.value("document.querySelector('svg[data-chart^=truncation]').closest('figure').focus()")
    page.key("End", 35)
    page.wait(f"!{tip}.hidden && {tip}.textContent.startsWith('dimensions 12\\n')")
    assert page.complaints == []


def test_queries_can_be_filtered(page: Page, harmless: Path) -> None:
    """By kind and by words; the count is told."""
    page.open(harmless)
    shown = "[...document.querySelectorAll('[data-query]')].filter((one) => one.checkVisibility()).length"
    whole = page.value(shown)
    assert whole >= 8
    losses = page.value("document.querySelectorAll('[data-query=loss]').length")
    page.value("document.querySelector('button[data-show=loss]').click()")
    assert page.value(shown) == losses
    assert page.value("document.getElementById('query-count').textContent") == f"{losses} of {whole} shown"
    page.value("document.querySelector('button[data-show=all]').click()")
    page.value(
        "{const f = document.getElementById('query-filter'); f.value = ' Query 14 '; f.dispatchEvent(new Event('input'))}"
    )
    assert page.value(shown) == 1
    assert page.complaints == []


def test_the_keyboard_reaches_everything(page: Page, harmless: Path) -> None:
    """The first stop is the link past the navigation; details open by Enter; nothing holds the focus."""
    page.look(**VIEWS["desktop"])
    page.open(harmless)
    stops = []
    for _ in range(200):
        page.key("Tab", 9)
        stop = page.value("document.activeElement.outerHTML.slice(0, 60)")
        if str(stop).startswith("<body"):
            break
        stops.append(stop)
    assert str(stops[0]).startswith('<a class="skip"')
    reachable = page.value(
        "[...document.querySelectorAll('a,button,input,summary,[tabindex]')].filter((one) => one.checkVisibility()).length"
    )
    assert len(stops) == reachable


def test_print_opens_what_is_folded(page: Page, harmless: Path) -> None:
    """Everything is on paper, and the page is as before afterwards."""
    page.open(harmless)
    folded = page.value("document.querySelectorAll('details:not([open])').length")
    page.value(
        "addEventListener('beforeprint', () => { window.__open = document.querySelectorAll('details:not([open])').length })"
    )
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000
    assert folded > 5 and page.value("window.__open") == 0
    assert page.value("document.querySelectorAll('details:not([open])').length") == folded
    assert page.complaints == []

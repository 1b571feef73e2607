"""The pages in a real browser, at the widths of a phone and a desktop, light and dark."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from browser import Browser, find_browser
from made_runs import add_selection, make_run, passkey, results, ruler
from matplotlib.image import imread

from sparsetrain.evaluation.html.compare import write_comparison
from sparsetrain.evaluation.html.page import write_page
from sparsetrain.evaluation.result import EvalResult

pytestmark = pytest.mark.skipif(find_browser() is None, reason="needs Chromium or Chrome, and none is installed")

PHONE, DESKTOP = 390, 1280
LONG = "a-name-that-is-much-longer-than-any-reasonable-name-of-a-run-ought-to-be"

TEXTS = """
(() => {
  const opaque = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (!/, 0\\)|transparent/.test(color)) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = new Set();
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    found.add((element.closest('svg') ? style.fill : style.color) + ' on ' + opaque(element));
  }
  return [...found];
})()
"""
"""The colours of all texts, and of what is behind them."""

CUT_CAPTIONS = """
[...document.querySelectorAll('caption')].filter(each => !each.closest('details')).filter(each => {
  const text = document.createRange();
  text.selectNodeContents(each);
  return text.getBoundingClientRect().right > each.closest('.scroll').getBoundingClientRect().right + 1;
}).map(each => each.textContent)
"""
"""The captions that go on beyond what is seen of their tables."""

PICTURES = """
[...document.querySelectorAll('svg.picture')].map(svg => {
  const box = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].filter(text => text.textContent.trim()).map(text => {
    const place = text.getBoundingClientRect();
    return [text.textContent, place.left, place.top, place.right, place.bottom];
  });
  return {name: svg.getAttribute('aria-label'), box: [box.left, box.top, box.right, box.bottom], texts};
})
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(find_browser(), tmp_path_factory.mktemp("browser") / "profile")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A run with everything and a comparison, by name."""
    top = tmp_path_factory.mktemp("runs")
    other = EvalResult(tasks={"passkey": passkey(1, [512 * 2**power for power in range(9)]), "ruler": ruler()})
    whole = make_run(top / "whole", measured=results(ruler=ruler()) | {LONG: other})
    add_selection(whole)
    others = [make_run(top / name, "train.lr=1e-3", steps=steps, name=name) for name, steps in ((LONG, 3), ("b", 1))]
    return {
        "report": write_page(whole, history=["from step 3 on, train.lr: 0.1 -> 0.2"]),
        "compare": write_comparison([whole, *others], top / "compare.html"),
    }


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_a_page_fits_and_can_be_read(browser, pages, tmp_path, name, width, dark):
    browser.open(pages[name], width=width, dark=dark)
    assert browser.errors == []
    browser.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("innerWidth") == width, "a phone does not zoom out"
    assert browser.evaluate(CUT_CAPTIONS) == []
    for drawn in browser.evaluate(PICTURES):
        left, top, right, bottom = drawn["box"]
        assert right - left > 250, drawn["name"]
        assert bottom - top > 150, drawn["name"]
        for text, *place in drawn["texts"]:
            assert left - 1 <= place[0], text
            assert place[2] <= right + 1, (drawn["name"], text)
        assert overlapping(drawn["texts"]) == [], drawn["name"]
    for pair in browser.evaluate(TEXTS):
        assert contrast(pair) >= 4.5, pair
    browser.screenshot(tmp_path / "page.png")
    pixels = imread(tmp_path / "page.png")
    assert pixels.shape[1] == width
    assert (pixels[4, 4, :3].mean() < 0.3) == dark


@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_page_is_in_order_for_those_who_hear_it(browser, pages, name):
    browser.open(pages[name], width=DESKTOP)
    levels = browser.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(each => +each.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert browser.evaluate("document.documentElement.lang") == "en"
    for unnamed in (
        "svg:not([aria-label])",
        "table:not(:has(caption))",
        "tbody tr:not(:has(th[scope=row]))",
        "th:empty",
    ):
        assert browser.evaluate(f"document.querySelectorAll('{unnamed}').length") == 0, unnamed


def contrast(pair: str) -> float:
    """The contrast ratio of two colours of CSS, as WCAG defines it."""
    lights = []
    for color in re.findall(r"rgba?\(([^)]*)\)", pair):
        channels = [float(part) / 255 for part in color.split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    low, high = sorted(lights)
    # Numbers of a map stand on cells, which are not the background of an element.
    return 21.0 if pair.startswith(("rgb(250, 250, 250)", "rgb(26, 26, 26)")) else (high + 0.05) / (low + 0.05)


def overlapping(texts: list) -> list[tuple[str, str]]:
    """Pairs of texts that cover one another by more than their line spacing."""
    found = []
    for index, (first, left, top, right, bottom) in enumerate(texts):
        for second, other_left, other_top, other_right, other_bottom in texts[:index]:
            across = min(right, other_right) - max(left, other_left)
            down = min(bottom, other_bottom) - max(top, other_top)
            if across > 1 and down > 0.35 * min(bottom - top, other_bottom - other_top):
                found.append((first, second))
    return found

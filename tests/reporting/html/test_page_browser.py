"""The page in headless Chromium: no errors, sortable tables, no overflow, sufficient contrast."""

from __future__ import annotations

import json
import re
from base64 import b64decode

import pytest
from helpers.browser import chromium
from helpers.fake_run import write_run
from helpers.hostile_run import hostile_run

from prunekit.reporting.figures import report_figures
from prunekit.reporting.html.figures import embed_figure
from prunekit.reporting.html.page import render_page
from prunekit.reporting.loader import load_run

pytest.importorskip("selenium", reason="the page's tests need selenium: pip install -e '.[dev]'")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

PAGES = ("one", "several", "half", "hostile")
TELEPHONE, DESK = (390, 844), (1440, 900)

# Elements that exceed the window and are not inside a scrolling box.
OUTSIDE = """
const width = arguments[0], found = [];
if (document.documentElement.scrollWidth > width) found.push(`page: ${document.documentElement.scrollWidth}`);
const scrolls = (e) => e && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
for (const e of document.body.querySelectorAll("*:not(svg *):not(script)")) {
  const box = e.getBoundingClientRect();
  if (box.width && (box.right > width + 1 || box.left < -1) && !scrolls(e.parentElement))
    found.push(`${e.tagName}.${e.className} ${box.left} to ${box.right}: ${e.textContent.slice(0, 40)}`);
}
return found;
"""
# Colours of text and background, for every element with text and for figures.
COLOURS = """
const found = new Map();
const ground = (e) => {
  for (; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (!/^rgba\\(.*, 0\\)$/.test(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
};
for (const e of document.body.querySelectorAll("*:not(svg *):not(script)")) {
  const style = getComputedStyle(e), svg = e.tagName === "svg";
  if (style.display === "none" || !(svg || [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))) continue;
  const pair = [svg ? style.fill : style.color, ground(e)];
  found.set(pair.join(), [...pair, `${e.tagName} ${e.textContent.trim().slice(0, 30)}`]);
}
return [...found.values()];
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Page name → file, rendered once."""
    folder = tmp_path_factory.mktemp("pages")
    first = load_run(write_run(folder / "first", units=("conv1",)))
    second = load_run(write_run(folder / "second", seed=1, units=("conv1",), baseline=True))
    half = load_run(write_run(folder / "half", units=("conv1",), stop="slim"))
    attack = load_run(hostile_run(folder))
    written = {}
    for name, runs in zip(PAGES, ([first], [first, second], [half], [attack, second]), strict=True):
        written[name] = folder / f"{name}.html"
        drawings = report_figures(runs[:1] if name in ("one", "hostile") else [])
        written[name].write_text(render_page(runs, [embed_figure(d) for d in drawings]), encoding="utf-8")
    return written


@pytest.fixture
def show(driver, files):
    """``show(name, size, scheme, media)`` opens a page from disk in a window of that size."""

    def open_page(name, size=DESK, scheme="light", media="screen"):
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        for log in ("browser", "performance"):
            driver.get_log(log)
        driver.get(files[name].as_uri())
        return driver

    return open_page


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio (WCAG 2.2, 1.4.3) of two colours such as ``rgb(0, 10, 255)``."""

    def luminance(colour: str) -> float:
        shares = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", PAGES)
def test_page_loads_without_errors_or_requests(show, name):
    driver = show(name)
    assert driver.execute_script("return document.readyState") == "complete"
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith("file:") for url in asked)
    assert [url for url in asked if not url.startswith(("data:", "file:"))] == []
    assert sum(url.startswith("file:") for url in asked) == 1
    assert driver.execute_script("return window.hit") is None


def test_injected_scripts_do_not_run(show):
    driver = show("one")
    driver.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.hit = 1'; document.body.append(s);"
        "document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=\"window.hit = 1\">');"
    )
    assert driver.execute_async_script("setTimeout(() => arguments[0](window.hit ?? null), 100)") is None
    assert any("Content Security Policy" in entry["message"] for entry in driver.get_log("browser"))


@pytest.mark.parametrize("size", [TELEPHONE, DESK], ids=["390", "1440"])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_overflows(show, name, size):
    assert show(name, size).execute_script(OUTSIDE, size[0]) == []


def plates(driver):
    """Return left, width and scrolled width of each figure."""
    return driver.execute_script(
        "return [...document.querySelectorAll('.plate')].filter((e) => e.clientWidth).map((e) =>"
        " [e.getBoundingClientRect().left, e.clientWidth, e.scrollWidth])"
    )


def test_figures_scale_on_a_telephone(show):
    found = plates(show("one", (420, 900)))
    assert len(found) > 9 and all(scrolled <= width for _, width, scrolled in found)


def test_figures_are_in_two_columns_on_a_desk(show):
    found = plates(show("one", DESK))
    assert len({round(left) for left, _, _ in found}) == 2
    assert all(scrolled <= width for _, width, scrolled in found)


def test_runs_are_folded_below_the_comparison(show):
    driver = show("several")
    state = "return [...document.querySelectorAll('details')].map((e) => e.open)"
    assert driver.execute_script(state) == [False, False]
    tops = "return ['#summary', '#run-1'].map((id) => document.querySelector(id).getBoundingClientRect().top)"
    assert driver.execute_script(tops) == sorted(driver.execute_script(tops))
    driver.find_element(By.CSS_SELECTOR, "nav a[href='#run-2-layers']").click()
    assert driver.execute_script(state) == [False, True]
    driver.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert driver.execute_script(state) == [True, True]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_text_has_sufficient_contrast(show, name, scheme):
    driver = show(name, scheme=scheme)
    pairs = driver.execute_script(COLOURS)
    assert len(pairs) >= 4
    assert [(what, ink, ground) for ink, ground, what in pairs if contrast(ink, ground) < 4.5] == []
    ground = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (contrast(ground, "rgb(0, 0, 0)") > 10) == (scheme == "light")


def column(table, place: int) -> list[str]:
    return table.parent.execute_script(
        "return [...arguments[0].tBodies[0].rows].map((row) => row.cells[arguments[1]].textContent)", table, place
    )


def numbers(texts: list[str]) -> list[float]:
    return [float(text.replace(",", "")) for text in texts if text != "–"]


def heads(table):
    return table.find_elements(By.CSS_SELECTOR, "thead th")


def table_of(driver, section: str):
    return driver.find_element(By.CSS_SELECTOR, f"#{section} table")


def test_numbers_sort_by_value(show):
    table = table_of(show("one"), "layers")
    place = next(i for i, head in enumerate(heads(table)) if head.text.startswith("params after"))
    before = column(table, 0), column(table, place)
    heads(table)[place].find_element(By.TAG_NAME, "button").click()
    up = numbers(column(table, place))
    assert up == sorted(numbers(before[1])) and up != numbers(before[1])
    # As text, 1,600 would precede 180.
    assert [f"{value:,.0f}" for value in up] != sorted(f"{value:,.0f}" for value in up)
    assert heads(table)[place].get_attribute("aria-sort") == "ascending"
    heads(table)[place].find_element(By.TAG_NAME, "button").click()
    assert numbers(column(table, place)) == up[::-1]
    assert heads(table)[place].get_attribute("aria-sort") == "descending"
    heads(table)[place].find_element(By.TAG_NAME, "button").click()
    assert (column(table, 0), column(table, place)) == before
    assert heads(table)[place].get_attribute("aria-sort") is None


def test_missing_values_sort_last(show):
    table = table_of(show("one"), "layers")
    place = next(i for i, head in enumerate(heads(table)) if head.text.startswith("paper FLOPs before"))
    button = heads(table)[place].find_element(By.TAG_NAME, "button")
    for _ in range(2):
        button.click()
        texts = column(table, place)
        known = texts.index("–")
        assert 0 < known < len(texts) and set(texts[known:]) == {"–"}


def test_names_sort_naturally(show):
    table = table_of(show("one"), "layers")
    button = heads(table)[0].find_element(By.TAG_NAME, "button")
    button.click()
    names = column(table, 0)
    assert names == sorted(names, key=lambda n: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", n)])


@pytest.mark.parametrize("key", [Keys.ENTER, Keys.SPACE], ids=["enter", "space"])
def test_sort_by_keyboard(show, key):
    driver = show("several")
    table = table_of(driver, "summary")
    first, second = (head.find_element(By.TAG_NAME, "button") for head in heads(table)[2:4])
    driver.execute_script("arguments[0].focus()", first)
    driver.switch_to.active_element.send_keys(key)
    assert numbers(column(table, 2)) == sorted(numbers(column(table, 2)))
    driver.switch_to.active_element.send_keys(Keys.TAB)
    assert driver.switch_to.active_element == second
    driver.switch_to.active_element.send_keys(key)
    sorted_by = [head.get_attribute("aria-sort") for head in heads(table)]
    assert sorted_by == [None] * 3 + ["ascending"] + [None] * (len(sorted_by) - 4)


def test_wide_table_scrolls_with_sticky_headers(show):
    driver = show("one", TELEPHONE)
    box = driver.find_element(By.CSS_SELECTOR, "#layers .scroll")
    assert box.get_property("scrollWidth") > box.get_property("clientWidth")
    driver.execute_script("arguments[0].scrollTo(200, 300)", box)
    left, top = driver.execute_script("const b = arguments[0].getBoundingClientRect(); return [b.left, b.top]", box)
    head = box.find_element(By.CSS_SELECTOR, "thead th")
    at = driver.execute_script("const b = arguments[0].getBoundingClientRect(); return [b.left, b.top]", head)
    assert at == pytest.approx([left, top], abs=2)


def test_contents_links_have_targets(show):
    driver = show("several")
    for link in driver.find_elements(By.CSS_SELECTOR, "nav a"):
        target = link.get_attribute("href").partition("#")[2]
        assert driver.execute_script("return document.getElementById(arguments[0]) !== null", target), target


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_print_style(show, scheme):
    driver = show("several", (1000, 1400), scheme, "print")
    assert driver.execute_script("return getComputedStyle(document.querySelector('nav')).display") == "none"
    stuck = driver.execute_script(
        "return [...document.querySelectorAll('body *')].filter((e) =>"
        " /sticky|fixed/.test(getComputedStyle(e).position)).length"
    )
    assert stuck == 0
    cut = driver.execute_script(
        "return [...document.querySelectorAll('.scroll, pre, .plate')].filter((e) =>"
        " getComputedStyle(e).overflowY !== 'visible' || getComputedStyle(e).maxHeight !== 'none').length"
    )
    assert cut == 0
    pairs = driver.execute_script(COLOURS)
    assert [p for p in pairs if contrast(p[0], "rgb(255, 255, 255)") < 4.5] == []


def test_wide_tables_print_in_landscape(show):
    driver = show("one", media="print")
    pdf = b64decode(driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    boxes = {tuple(map(float, box.split())) for box in re.findall(rb"/MediaBox \[([^\]]+)\]", pdf)}
    assert {width > height for _, _, width, height in boxes} == {True, False}

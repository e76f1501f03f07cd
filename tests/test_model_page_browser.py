"""The model page in a real browser: no complaint, no network, every figure drawn, copying, phone and print."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import opened, until
from fake_store import FakeStore, claim, example, first_broken, model, protocol, routing

from moebench.report import write_report
from moebench.schema import RoutingLayer

AWKWARD = '<script>alert(1)</script> & 100% "x" 專家'


def wide_layer(experts: int = 20) -> RoutingLayer:
    even = tuple([1 / experts] * experts)
    moves = tuple(tuple(30 if row == column else 1 for column in range(experts)) for row in range(experts))
    return RoutingLayer("blocks.3.moe", 0.9, 0.1, 1.0, 1.1, even, even, moves)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all that a page can have, one with a hostile name, and one of a dense model."""
    store, n = FakeStore(), 60
    full = model("full", paper=replace(model("x").paper, title=AWKWARD))  # type: ignore[type-var]
    names = tuple(f"{AWKWARD} {number}" for number in range(10))
    table = tuple((number, 6 - number % 6, 0, 1) for number in range(10))
    for eps in (0.1, 0.2):
        where = replace(protocol(n=n, eps=eps), class_names=names)
        for attack, broken in (("pgd-50", 20), ("autoattack", 30)):
            layers = (replace(routing(AWKWARD), classes=table), wide_layer())
            hits = first_broken(n, round(broken * eps * 5))
            done = store.add(full, attack, hits, on=where, layers=layers, stage=AWKWARD)
            store.pictures[done.result_id] = (example(1, 1, 2, layer=AWKWARD), example(2, 2, 5))
        store.classes[where.data_sha256] = np.arange(n) % 10
    store.published += [
        claim("full", 61.0),
        claim("full", 62.0, dataset="digits", attack_params="Linf eps=0.2, 50 steps"),
    ]
    other = FakeStore()
    odd = other.add(model(AWKWARD, paper=None), "autoattack", first_broken(n, 9), layers=(routing(AWKWARD),))
    store.stored.append(replace(odd, result_id=5000))
    store.evidence[5000] = other.evidence[1]
    store.add(model("dense", "dense"), "fgsm", first_broken(n, 9))
    out = tmp_path_factory.mktemp("site")
    write_report(store, out)
    return out


def visited(browser: Any, file: Path, width: int = 1440, **context: Any) -> tuple[Any, list[str]]:
    """A page in a window of that width, and all that it complains about or asks a network for."""
    return opened(browser, file, viewport={"width": width, "height": 900}, **context)


def open_all(page: Any) -> None:
    """Unfolds everything and brings every figure into sight."""
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    page.evaluate(
        """async () => {
          for (const one of document.querySelectorAll('figure.chart, img')) {
            one.scrollIntoView();
            await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
          }
        }"""
    )
    until(page, "[...document.querySelectorAll('figure.chart .plot')].every(one => one.querySelector('svg'))")


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_a_page_with_everything_draws_all_figures_without_complaint_or_network(
    browser: Any, site: Path, width: int, scheme: str
) -> None:
    page, problems = visited(browser, site / "models" / "full.html", width, color_scheme=scheme)
    open_all(page)
    assert page.locator("figure.chart").count() >= 12
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    until(page, "[...document.images].every(one => one.complete)")
    assert page.evaluate("[...document.images].every(one => one.naturalWidth === 8 && one.clientWidth >= 64)")
    assert problems == []
    page.context.close()


def test_sparse_and_awkward_pages_open_without_complaint_and_fit_a_phone(browser: Any, site: Path) -> None:
    files = [file for file in sorted((site / "models").glob("*.html")) if file.stem != "full"]
    assert len(files) == 2
    for file in files:
        page, problems = visited(browser, file, 390)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, file.name
        assert problems == [], file.name
        page.context.close()


def test_names_marks_and_error_bars_are_drawn_as_they_should_be(browser: Any, site: Path) -> None:
    page, _ = visited(browser, site / "models" / "full.html")
    assert AWKWARD in page.locator("p.paper cite").inner_text()
    for name in ("attacks", "classes"):
        page.locator(f"#{name} figure.chart").first.scroll_into_view_if_needed()
        page.wait_for_selector(f"#{name} figure.chart svg")
    assert page.locator("#classes svg text", has_text="<script>").count() > 0
    drawn = page.locator("#attacks figure.chart svg").first.inner_html()
    for words in ("95 % interval", "claimed", "claimed, on other data", "autoattack", "whole model"):
        assert words in drawn
    option = page.locator("#attacks figure.chart script").first.evaluate("one => JSON.parse(one.textContent)")
    bars = next(one for one in option["series"] if one["type"] == "custom")
    # Each interval is a line and two caps in the colour of the page's text.
    ink = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()")
    assert drawn.count(f'stroke="{ink}" stroke-width="1.5"') >= 3 * len(bars["data"])
    page.context.close()


@pytest.mark.parametrize("allowed", [True, False])
def test_a_command_is_copied_from_a_page_on_disk(browser: Any, site: Path, allowed: bool) -> None:
    permissions = ["clipboard-read", "clipboard-write"] if allowed else []
    page, problems = visited(browser, site / "models" / "full.html", permissions=permissions)
    if not allowed:
        page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        page.evaluate("document.addEventListener('copy', () => { window.copied = String(getSelection()); })")
    button = page.get_by_role("button", name="Copy command 1", exact=True)
    button.focus()
    page.keyboard.press("Enter")
    until(page, "[...document.querySelectorAll('button.copy')].some(one => one.textContent === 'Copied')")
    told = page.evaluate("navigator.clipboard.readText()" if allowed else "window.copied")
    assert told.strip() == page.locator("#reproduce pre").first.inner_text().strip()
    assert told.startswith("moebench evaluate --model full")
    assert problems == []
    page.context.close()


def test_every_entry_of_the_contents_leads_somewhere(browser: Any, site: Path) -> None:
    page, _ = visited(browser, site / "models" / "full.html")
    for link in page.locator("nav.toc a").all():
        target = link.get_attribute("href")
        assert page.locator(f"section{target} > h2").count() == 1


def test_without_scripts_the_numbers_are_there_as_tables(browser: Any, site: Path) -> None:
    page, _ = visited(browser, site / "models" / "full.html", java_script_enabled=False)
    assert page.get_by_role("button", name="Copy").count() == 0
    summary = page.locator("#attacks figure.chart summary").first
    summary.click()
    assert page.locator("#attacks figure.chart table").first.is_visible()


def test_a_page_prints_with_its_figures(browser: Any, site: Path) -> None:
    page, problems = visited(browser, site / "models" / "full.html")
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    drawn = page.evaluate("[...document.querySelectorAll('figure.chart .plot')].every(one => one.querySelector('svg'))")
    assert drawn
    assert problems == []

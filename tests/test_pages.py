"""The pages beside the leaderboards: names from outside stay text, and what Chromium makes of them from disk."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from browsing import opened
from fake_store import FakeStore, demo, first_broken, model, protocol
from hostile import parsed
from page_stores import add_transfer, broke, everything

from moebench.report import html, render, snapshot, tables, write_report
from moebench.schema import Flag

PAGES = ("transfer", "pareto", "attacks", "method", "changes")
CSVS = ("data/transfer.csv", "data/attacks.csv", "data/overlap.csv")

HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "100% & more_$#{}~^\\input{x}",
    "=cmd()",
    "@SUM(A1)",
    "專家混合 αβ – Łukasz Böhm 🤖",
    "../../etc/passwd",
    "{{ 7 * 7 }}{% raw %}{a|b}",
    "x" * 200,
    "a/expert[zero]",
    "a\nb\r% c",
)


def store_with(name: str, broken: int = 40) -> FakeStore:
    """Models, data sets, attacks, views, sources and flags of that name."""
    store, where = FakeStore(), replace(protocol(), dataset=name)
    done = store.add(model(name), "autoattack", first_broken(200, broken), on=where)
    store.add(model(name, name), name, first_broken(200, 90), name, on=where)
    for source, target in ((name, name), (name, "b"), ("b", name)):
        add_transfer(store, source, target, broke(1, 2, 3, n=200), attack=name)
        store.stored[-1] = replace(store.stored[-1], protocol=where)
    store.add_run(done, flags=(Flag(name, name),))
    return store


@cache
def rendered(name: str) -> dict[str, str]:
    old = store_with(name, 20)
    old.made.clear()
    return render(store_with(name), snapshot.take(old, tables.build(old).boards))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text_on_every_page_and_in_every_file(name: str) -> None:
    files, harmless = rendered(name), rendered("plain")
    for page in PAGES:
        found, known = parsed(files[f"{page}.html"]), parsed(harmless[f"{page}.html"])
        assert set(found.tags) == set(known.tags)
        assert set(found.attributes) <= set(known.attributes)
        if page != "method":
            assert " ".join(name.split()) in " ".join("".join(found.words).split())
    for path in CSVS:
        rows = list(csv.reader(io.StringIO(files[path], newline="")))
        assert len({len(row) for row in rows}) == 1
        assert len(rows) > 1 or "[" in name  # settings of an attack are not compared
        assert not [field for row in rows for field in row if field.lstrip().startswith(("=", "+", "-", "@"))]
    assert snapshot.parse(files["data/snapshot.json"]).boards[0].dataset == name


def test_names_of_a_snapshot_from_outside_are_text_too() -> None:
    store = store_with("plain")
    before = snapshot.take(store, tables.build(store).boards)
    row = replace(before.boards[0].rows[0], model=HOSTILE[0], family=HOSTILE[1], flags=(HOSTILE[0],))
    board = replace(before.boards[0], rows=(row,), suites=(HOSTILE[0],), version=HOSTILE[1])
    page = render(store, snapshot.Snapshot((board,), HOSTILE[0]))["changes.html"]
    assert "<script>alert" not in page
    assert "<img" not in page
    assert HOSTILE[0] in "".join(parsed(page).words)


def test_the_navigation_names_the_pages_that_are_there() -> None:
    files = render(demo(20))
    for page in files:
        if page.endswith(".html"):
            nav = files[page].split('<nav aria-label="Pages">')[1].split("</nav>")[0]
            assert [name for name in PAGES if f"{name}.html" in nav] == ["transfer", "pareto", "attacks", "method"]
    linked = {file.partition("#")[0] for _, file in html.PAGES}
    assert linked - set(files) == {"changes.html"}


def test_the_method_page_says_how_to_cite_this_version() -> None:
    page = render(FakeStore())["method.html"]
    assert "@misc{moebench," in page
    version = next(line for line in Path("CITATION.cff").read_text().splitlines() if line.startswith("version:"))
    assert f"version {version.split()[1]}," in page


# In a browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    old, store = demo(60), everything(60)
    for stored in store_with(HOSTILE[0]).stored:
        settings = next(iter(stored.cell.parameters.values()))
        if isinstance(settings, dict):
            add_transfer(store, settings["source"], stored.model.name, broke(1, n=60), attack=HOSTILE[1])
    write_report(store, out, snapshot.take(old, tables.build(old).boards))
    return out


def drawn(browser: Any, file: Path, **context: Any) -> tuple[Any, list[str]]:
    """A page whose charts are drawn, and all that it complained about or asked the network for."""
    page, problems = opened(browser, file, **context)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    for figure in page.locator("figure.chart").all():
        figure.scroll_into_view_if_needed()
        figure.locator("svg").first.wait_for(timeout=5000)
    return page, problems


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_pages_open_from_disk_without_complaint_and_fit(
    browser: Any, site: Path, name: str, width: int, scheme: str
) -> None:
    size = {"width": width, "height": 800}
    page, problems = drawn(browser, site / f"{name}.html", viewport=size, color_scheme=scheme)
    assert problems == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()")
    if name == "pareto":
        inks = page.evaluate("[...document.querySelectorAll('figure svg text')].map(one => one.getAttribute('fill'))")
        assert ink in inks
    assert page.locator("figure.chart").count() == {"transfer": 2, "pareto": 2, "attacks": 2}.get(name, 0)
    page.context.close()


def test_a_click_on_a_point_opens_its_model(browser: Any, site: Path) -> None:
    page, problems = drawn(browser, site / "pareto.html", viewport={"width": 1440, "height": 900})
    plot = page.locator(".plot").last
    plot.scroll_into_view_if_needed()
    found = plot.evaluate(
        """place => {
          const chart = echarts.getInstanceByDom(place), box = place.getBoundingClientRect();
          const series = chart.getOption().series.find(one => one.type === "scatter");
          const at = chart.convertToPixel({xAxisIndex: 0, yAxisIndex: 0}, series.data[0].value);
          return {x: box.x + at[0], y: box.y + at[1], link: series.data[0].link};
        }"""
    )
    page.mouse.click(found["x"], found["y"])
    page.wait_for_url(f"**/{found['link']}", timeout=5000)
    assert problems == []


def test_the_tip_of_a_cell_names_both_models_and_the_interval(browser: Any, site: Path) -> None:
    page, _ = drawn(browser, site / "transfer.html", viewport={"width": 1440, "height": 900})
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    at = plot.evaluate(
        """place => {
          const chart = echarts.getInstanceByDom(place), box = place.getBoundingClientRect();
          const at = chart.convertToPixel({xAxisIndex: 0, yAxisIndex: 0}, [1, 0]);
          return [box.x + at[0], box.y + at[1]];
        }"""
    )
    page.mouse.move(*at)
    page.get_by_text("rt-er → st-moe").wait_for(timeout=5000)
    assert page.get_by_text("RA 90.0 % (").count() >= 1

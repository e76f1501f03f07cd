"""The leaderboards as a reader uses them, in a real browser, from disk and without a network."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import until
from fake_store import FakeStore, claim, demo, first_broken, model, paper, protocol
from scipy.stats import binomtest

from moebench.metrics import Measure, paired
from moebench.report import boards, tables, write_report
from moebench.report.ranks import p_values, rank_ranges
from moebench.schema import Flag

CHROMIUM = Path("/usr/bin/chromium")
AXE = Path(__file__).parent / "assets" / "axe.min.js"
WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
BOARD = 'main > section.board:has(h2[id^="digits-"])'
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>&amp;",
    "100% & more_$#{}~^\\input{x}",
    "=cmd()",
    "-2",
    "[starts] | with *stars*",
    "專家混合 αβ – Łukasz Böhm 🤖",
    "{{ 7 * 7 }}{% raw %}",
    "x" * 200,
    "a\nb\r% c",
)

# Ranks


def test_the_fast_tests_are_the_exact_ones() -> None:
    draw = np.random.default_rng(3)
    for _ in range(50):
        one, other = draw.random((2, 90)) < draw.random((2, 1))
        found = paired(one, other)
        fast = p_values(np.array([found.only_first]), np.array([found.only_second]))
        assert fast[0] == pytest.approx(found.p, rel=1e-9)
    assert p_values(np.zeros(1, np.int64), np.zeros(1, np.int64))[0] == 1.0


def test_a_rank_counts_who_is_significantly_better_and_ties_do_not_carry_over() -> None:
    # Nested verdicts: five samples apart have p = 0.0625, ten have p = 0.002.
    standing = [np.arange(100) < k for k in (80, 75, 70)]
    assert rank_ranges(standing) == [(1, 2), (1, 3), (2, 3)]
    assert rank_ranges(standing[:1]) == [(1, 1)]
    assert rank_ranges([]) == []


def test_a_rank_never_depends_on_how_the_models_are_listed() -> None:
    draw = np.random.default_rng(5)
    standing = list(draw.random((20, 200)) < draw.random((20, 1)))
    found, mixed = rank_ranges(standing), rank_ranges(standing[::-1])
    assert found == mixed[::-1]
    order = sorted(range(20), key=lambda at: -standing[at].sum())
    assert all(found[at].best <= place <= found[at].worst for place, at in enumerate(order, 1))


def test_ranks_need_the_same_samples() -> None:
    with pytest.raises(ValueError, match="same samples"):
        rank_ranges([np.ones(3, np.bool_), np.ones(4, np.bool_)])


def test_a_gap_stands_only_where_the_claim_asks_what_was_measured() -> None:
    store, cifar = FakeStore(), protocol("cifar10", 200, eps=8 / 255)
    for where in (cifar, protocol()):
        store.add(model("a"), "autoattack", first_broken(200, 120), on=where)
        store.add(model("a"), "pgd-50", first_broken(200, 100), on=where)
    store.published = [claim("a", 69.09), claim("a", 48.0, metric="RA-E")]
    gaps = {board.protocol.dataset: board.rows[0].compared for board in tables.build(store).boards}
    assert gaps["digits"] == ()
    assert [found.difference for found in gaps["cifar10"]] == [pytest.approx(50 - 69.09)]


def test_the_gap_belongs_to_the_claim_beside_it() -> None:
    store, cifar = FakeStore(), protocol("cifar-10", 200, eps=8 / 255)
    store.add(model("a"), "autoattack", first_broken(200, 120), on=cifar)
    store.published = [claim("a", 69.09), claim("a", 54.4, attack="AutoAttack (as named by paper)")]
    for attack, shown, gap in (("fgsm", "AutoAttack", 40 - 54.4), ("pgd-50", "AutoAttack", 40 - 54.4)):
        store.add(model("a"), attack, first_broken(200, 100), on=cifar)
        found, against = boards.headline(tables.build(store).boards[0].rows[0])
        assert found is not None
        assert against is not None
        assert (found.attack, against.difference) == (shown, pytest.approx(gap))
    store.published = [claim("a", 69.09), claim("a", 60.0, dataset="CIFAR-100")]
    found, against = boards.headline(tables.build(store).boards[0].rows[0])
    assert found is not None
    assert against is not None
    assert (found.attack, against.difference) == ("PGD", pytest.approx(50 - 69.09))


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three leaderboards, one of them folded, with flags, gaps, and rows without a rank."""
    store, out = demo(120), tmp_path_factory.mktemp("site")
    store.add(model("rt-er"), "autoattack", first_broken(120, 9), on=replace(protocol(n=120), threat=demo_threat(0.1)))
    write_report(store, out)
    return out


def demo_threat(eps: float) -> Any:
    return protocol(eps=eps).threat


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page; when the test ends, it must have neither complained nor asked a network for anything."""
    problems: list[str] = []
    contexts: list[Any] = []

    def opened(file: Path, address: str = "", viewport: Any = WIDE, before: str = "", **more: Any) -> Any:
        contexts.append(browser.new_context(viewport=viewport, **more))
        page = contexts[-1].new_page()
        page.on("console", lambda message: problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("dialog", lambda dialog: problems.append("dialog"))
        page.on("request", lambda request: problems.extend([request.url][: not local(request.url)]))
        if before:
            page.add_init_script(before)
        page.goto(file.as_uri() + address)
        if more.get("java_script_enabled", True) and page.locator(f"{BOARD} table.ranking").count():
            page.wait_for_selector(f"{BOARD} .toolbar")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def local(url: str) -> bool:
    return url.startswith(("file:", "data:", "blob:null/", "blob:file:"))


def board(page: Any) -> Any:
    """The leaderboard that most tests are about."""
    return page.locator(BOARD)


def digits() -> tables.Board:
    """The same board as rows."""
    return next(one for one in tables.build(demo(120)).boards if one.protocol.dataset == "digits")


def models(page: Any) -> list[str]:
    found: list[str] = board(page).locator("table.ranking tbody tr th a").all_inner_texts()
    return found


def shown(page: Any) -> list[str]:
    found: list[str] = board(page).locator("table.ranking thead tr:last-child th").all_inner_texts()
    return [re.sub(r"\s+", " ", label).strip() for label in found]


def header(page: Any, key: str) -> Any:
    return board(page).locator(f'thead th[data-key="{key}"]')


def sort(page: Any, key: str, direction: str) -> None:
    """Clicks a header, whose table is sorted a moment later."""
    header(page, key).click()
    header(page, key).and_(page.locator(f'[aria-sort="{direction}"]')).wait_for()


def state(page: Any) -> dict[str, Any]:
    """All of a view that a link must bring back."""
    return {
        "models": models(page),
        "columns": shown(page),
        "sorted": board(page).locator("th[aria-sort]").evaluate_all("all => all.map(x => [x.dataset.key, x.ariaSort])"),
        "search": board(page).locator("input[type=search]").input_value(),
        "compared": board(page).locator(".compare h3").all_inner_texts(),
        "picked": board(page).locator(".tools input:checked").evaluate_all("all => all.map(x => x.ariaLabel)"),
        "ticked": board(page).locator(".menu input:checked").evaluate_all("all => all.map(x => x.value)"),
    }


def test_every_page_opens_from_disk_and_fits_both_widths(visit: Callable[..., Any], site: Path) -> None:
    for file in (site / "index.html", site / "method.html", site / "models" / "rt-er.html"):
        for viewport in (WIDE, PHONE):
            page = visit(file, viewport=viewport)
            assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], file.name
            page.context.close()


def test_the_first_column_stays_in_sight_on_a_phone(visit: Callable[..., Any], site: Path) -> None:
    page = visit(site / "index.html", viewport=PHONE)
    region = board(page).locator(".table").first
    region.evaluate("region => { region.scrollLeft = 400; }")
    left = region.bounding_box()["x"]
    assert board(page).locator("tbody th.pin").first.bounding_box()["x"] == pytest.approx(left, abs=2)


def test_sorting_keeps_what_is_missing_and_who_has_no_rank_at_the_end(visit: Callable[..., Any], site: Path) -> None:
    page = visit(site / "index.html")
    unranked = models(page)[-1]
    sort(page, "ra_e", "descending")
    cells = board(page).locator("table.ranking tbody tr")
    at = shown(page).index("RA-E")
    for direction in ("descending", "ascending"):
        header(page, "ra_e").and_(page.locator(f'[aria-sort="{direction}"]')).wait_for()
        found = [row.split("\t")[at].split("\n")[0].strip() for row in cells.all_inner_texts()]
        missing = [text in ("n/a", "—") for text in found]
        assert missing == sorted(missing)
        assert models(page)[-1] == unranked
        numbers = [float(text) for text in found if text not in ("n/a", "—")]
        assert numbers == sorted(numbers, reverse=direction == "descending")
        board(page).locator('th[data-key="ra_e"] .dt-column-order').focus()
        page.keyboard.press("Space")
    assert board(page).locator("table.ranking th[aria-sort]").count() == 1


def test_small_tables_sort_too(visit: Callable[..., Any], site: Path) -> None:
    page = visit(site / "models" / "rt-er.html")
    table = page.locator("table.sortable", has=page.get_by_role("columnheader", name="Accuracy, %")).first
    table.scroll_into_view_if_needed()
    head = table.get_by_role("columnheader", name="Accuracy, %")
    until(page, "document.querySelector('table.sortable.sorting')")
    head.click()
    table.locator('th[aria-sort="descending"]').wait_for()
    column = "rows => rows.map(row => Number(row.cells[3].dataset.sort))"
    found = table.locator("tbody tr").evaluate_all(column)
    assert found == sorted(found, reverse=True)
    assert len(set(found)) > 1


def test_search_and_filters_narrow_the_rows_and_say_so(visit: Callable[..., Any], site: Path) -> None:
    page = visit(site / "index.html")
    everyone = models(page)
    board(page).locator("input[type=search]").fill("resnet")
    assert models(page) == ["resnet-at"]
    assert board(page).locator(".tally").inner_text() == f"1 of {len(everyone)} models"
    board(page).locator("input[type=search]").fill("ROUTING attacked")
    assert "my_defence.py:build" not in models(page)
    board(page).locator("input[type=search]").fill("no such model")
    assert models(page) == []
    assert "No model matches" in board(page).locator("table.ranking tbody").inner_text()
    board(page).get_by_role("button", name="Clear").click()
    assert models(page) == everyone
    board(page).locator(".menu summary", has_text="Family").click()
    for family in ("dual", "dense"):
        board(page).get_by_role("group", name="Family").get_by_label(family).check()
    assert set(models(page)) == {"jtd-moe", "resnet-at"}
    page.keyboard.press("Escape")
    assert board(page).locator("details.menu[open]").count() == 0


def test_columns_can_be_chosen_and_those_without_a_number_start_hidden(visit: Callable[..., Any], site: Path) -> None:
    page = visit(site / "index.html")
    assert "Gap" not in shown(page)
    assert "Training" not in shown(page)
    board(page).locator(".menu summary", has_text="Columns").click()
    menu = board(page).get_by_role("group", name="Columns")
    menu.get_by_label("Training").check()
    menu.get_by_label("fgsm").uncheck()
    assert "Training" in shown(page)
    assert "fgsm" not in shown(page)
    menu.get_by_role("button", name="All").click()
    assert {"Training", "fgsm", "Gap"} <= set(shown(page))
    menu.get_by_role("button", name="Default").click()
    assert "Gap" not in shown(page)
    assert "fgsm" in shown(page)


def test_two_models_are_compared_sample_by_sample(visit: Callable[..., Any], site: Path) -> None:
    page = visit(site / "index.html")
    report = digits()
    rows = {row.label: row for row in report.rows}
    for first, second in (("rt-er", "resnet-at"), ("st-moe", "jtd-moe")):
        for name in (first, second):
            board(page).get_by_label(f"Compare {name}", exact=True).check()
        one, other = rows[first].standing, rows[second].standing
        counts = [int(np.sum(part)) for part in (one & other, one & ~other, other & ~one, ~one & ~other)]
        panel = board(page).locator(".compare")
        assert panel.locator("dd").all_inner_texts()[:4] == [str(count) for count in counts]
        wanted = binomtest(counts[1], counts[1] + counts[2]).pvalue
        assert float(panel.locator("dd[data-p]").get_attribute("data-p")) == pytest.approx(wanted, rel=1e-9)
        alone = np.flatnonzero(one & ~other)
        if alone.size:
            listed = panel.locator("details p").first.text_content()
            assert [int(number) for number in listed.split(", ")] == alone.tolist()
        panel.get_by_role("button", name="Close").click()
        assert panel.count() == 0


def test_the_exact_test_in_the_browser_is_scipys_for_any_counts(visit: Callable[..., Any], site: Path) -> None:
    page = visit(site / "index.html")
    pairs = [(0, 0), (0, 1), (0, 9), (3, 3), (1, 9), (40, 73), (500, 430), (5000, 4700), (0, 900), (12, 1), (0, 5000)]
    found = page.evaluate("pairs => pairs.map(([a, b]) => moebench.mcnemar(a, b))", pairs)
    for (one, other), p in zip(pairs, found, strict=True):
        wanted = binomtest(one, one + other).pvalue if one + other else 1.0
        assert p == pytest.approx(wanted, rel=1e-9, abs=1e-300)
    intervals = page.evaluate("[[0, 9], [9, 9], [3, 70]].map(([k, n]) => moebench.wilson(k, n))")
    wanted = [(Measure(k, n).low, Measure(k, n).high) for k, n in ((0, 9), (9, 9), (3, 70))]
    assert np.allclose(intervals, wanted, atol=1e-9)


def test_a_link_brings_the_same_view_and_back_undoes_each_step(visit: Callable[..., Any], site: Path) -> None:
    page = visit(site / "index.html")
    views = [state(page)]

    def after(step: Callable[[], Any]) -> None:
        step()
        views.append(state(page))
        assert views[-1] != views[-2]

    after(lambda: sort(page, "sa", "descending"))
    after(lambda: board(page).locator("input[type=search]").press_sequentially("moe"))
    board(page).locator(".menu summary", has_text="Family").click()
    after(lambda: board(page).get_by_role("group", name="Family").get_by_label("moe").check())
    board(page).locator(".menu summary", has_text="Columns").click()
    after(lambda: board(page).get_by_role("group", name="Columns").get_by_label("pgd-50").uncheck())
    page.keyboard.press("Escape")
    board(page).get_by_label("Compare rt-er", exact=True).check()
    after(lambda: board(page).get_by_label("Compare trades-moe").check())
    fresh = visit(site / "index.html", "#" + page.url.partition("#")[2])
    assert state(fresh) == views[-1]
    for view in views[-2::-1]:
        page.go_back()
        assert state(page) == view
    for view in views[1:]:
        page.go_forward()
        assert state(page) == view


def test_views_of_several_boards_share_one_address(visit: Callable[..., Any], site: Path) -> None:
    page = visit(site / "index.html")
    page.select_option("#smallest", "1000")
    assert [one.is_visible() for one in page.locator("section.board").all()].count(True) == 1
    page.select_option("#smallest", "0")
    folded = page.locator("details.radius")
    folded.locator("summary").first.click()
    anchor = board(page).locator("h2").get_attribute("id")
    where = f"#n=0&board={anchor}&q=rt-er&board={folded.locator('h2').get_attribute('id')}&sort=model"
    fresh = visit(site / "index.html", where)
    assert models(fresh) == ["rt-er"]
    assert fresh.locator("details.radius").get_attribute("open") is not None
    assert fresh.locator("details.radius th[aria-sort]").get_attribute("data-key") == "model"
    nonsense = visit(site / "index.html", f"#board={anchor}&sort=-nothing&pair=x&pair=y&family=none&board=gone&q=x")
    assert models(nonsense) == []


def test_links_within_the_page_keep_the_view(visit: Callable[..., Any], site: Path) -> None:
    page = visit(site / "index.html", viewport=PHONE)
    board(page).locator("input[type=search]").fill("resnet")
    view, address = state(page), page.url
    page.get_by_role("link", name="Models", exact=True).click()
    assert page.locator("#models").bounding_box()["y"] < PHONE["height"]
    assert (state(page), page.url) == (view, address)


def test_the_theme_is_chosen_kept_and_announced(visit: Callable[..., Any], site: Path) -> None:
    page = visit(site / "index.html", color_scheme="light")
    page.evaluate("window.heard = 0; document.addEventListener('themechange', () => { window.heard += 1; })")
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(ground)
    page.select_option("#theme", "dark")
    dark = page.evaluate(ground)
    assert dark != light
    assert page.evaluate("window.heard") == 1
    page.goto((site / "method.html").as_uri())
    assert page.evaluate(ground) == dark
    assert page.locator("#theme").input_value() == "dark"
    page.select_option("#theme", "")
    assert page.evaluate(ground) == light


def test_a_refused_storage_stops_nothing(visit: Callable[..., Any], site: Path) -> None:
    refuse = "Object.defineProperty(window, 'localStorage', { get() { throw new Error('refused'); } })"
    page = visit(site / "index.html", before=refuse)
    page.select_option("#theme", "dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert models(page)


def test_reasons_are_reached_by_pointer_keyboard_and_without_scripts(visit: Callable[..., Any], site: Path) -> None:
    page = visit(site / "index.html")
    flag = board(page).locator("td.flags a.flag[href^='#']", has_text="gradient masking").first
    flag.hover()
    assert "square breaks 14 samples" in flag.get_attribute("title")
    flag.focus()
    page.keyboard.press("Enter")
    card = page.locator("dialog[open]")
    assert "square breaks 14 samples" in card.inner_text()
    assert "samples stand after" in card.inner_text()
    assert "only a dual model has a standard half" in card.inner_text()
    page.keyboard.press("Escape")
    until(page, "document.querySelector('dialog') === null")
    plain = visit(site / "index.html", java_script_enabled=False)
    plain.locator("td.flags a.flag[href^='#']", has_text="gradient masking").first.click()
    assert plain.get_by_text("square breaks 14 samples").first.is_visible()
    assert plain.get_by_text("rt-er").first.is_visible()


def test_a_row_is_copied_as_latex_markdown_and_bibtex(visit: Callable[..., Any], site: Path) -> None:
    page = visit(site / "index.html", permissions=["clipboard-read", "clipboard-write"])
    row = next(row for row in digits().rows if row.label == "rt-er")
    measured = row.worst.measure
    assert measured is not None
    copies = {}
    board(page).get_by_label("Reasons and citation of rt-er", exact=True).click()
    for kind in ("LaTeX", "Markdown", "BibTeX"):
        page.get_by_role("button", name=kind, exact=True).click()
        until(page, "words => document.querySelector('.status').textContent === words", arg=f"{kind} copied")
        copies[kind] = page.evaluate("navigator.clipboard.readText()")
        assert page.locator("pre.copied").text_content() == copies[kind]
    value, low, high = 100 * measured.value, 100 * measured.low, 100 * measured.high
    assert f"${value:.1f}_{{-{value - low:.1f}}}^{{+{high - value:.1f}}}$" in copies["LaTeX"]
    assert copies["LaTeX"].endswith("\\\\\n")
    assert f"{value:.1f} ({low:.1f}–{high:.1f})" in copies["Markdown"]
    assert len({line.count("|") for line in copies["Markdown"].splitlines()}) == 1
    assert copies["BibTeX"] == paper().bibtex
    page.keyboard.press("Escape")
    board(page).get_by_label("Reasons and citation of my_defence.py:build").click()
    assert page.get_by_role("button", name="BibTeX", exact=True).is_disabled()


def downloaded(page: Any, kind: str) -> str:
    with page.expect_download() as waiting:
        board(page).get_by_role("button", name=kind, exact=True).click()
    found: str = Path(waiting.value.path()).read_text(encoding="utf-8")
    return found


def test_the_view_is_downloaded_as_it_is_seen(visit: Callable[..., Any], site: Path) -> None:
    page = visit(site / "index.html")
    sort(page, "sa", "descending")
    board(page).locator("input[type=search]").fill("moe")
    board(page).locator(".menu summary", has_text="Columns").click()
    board(page).get_by_role("group", name="Columns").get_by_label("fgsm").uncheck()
    rows = {row.label: row for row in digits().rows}
    read = list(csv.DictReader(io.StringIO(downloaded(page, "CSV"), newline="")))
    assert [row["model"] for row in read] == models(page)
    assert "ra[fgsm]" not in read[0]
    for row in read:
        measured = rows[row["model"]].worst.measure
        assert measured is not None
        got = [float(row[name]) for name in ("ra_worst", "ra_worst_low", "ra_worst_high")]
        assert np.allclose(got, (measured.value, measured.low, measured.high), atol=1e-6)
        assert (row["dataset"], row["n"]) == ("digits", "120")
    record = json.loads(downloaded(page, "JSON"))
    assert record["leaderboard"]["norm"] == "Linf"
    assert [row["model"] for row in record["rows"]] == models(page)
    by_name = {row["model"]: row for row in record["rows"]}
    assert by_name["st-moe"]["ra_smoe"] == "n/a"
    assert by_name["st-moe"]["flops"] == 1_330_000_000


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store, out = FakeStore(), tmp_path_factory.mktemp("hostile")
    for number, name in enumerate(HOSTILE):
        facts = replace(paper(name), authors=name, venue=name)
        who = model(name, "moe", summary=name, training=name, routing=name, paper=facts)
        done = store.add(who, "autoattack", first_broken(100, 10 + 5 * number))
        store.add(who, name, first_broken(100, 5))
        store.add_run(done, flags=(Flag(name, name),))
        store.published.append(claim(name, 50.0, flag=name))
    write_report(store, out)
    return out


def test_names_from_outside_stay_text_in_all_that_the_page_does(visit: Callable[..., Any], hostile: Path) -> None:
    page = visit(hostile / "index.html")
    found = board(page).locator(".ranking tbody th a bdi").evaluate_all("all => all.map(x => x.textContent)")
    folded = [" ".join(name.split()) for name in HOSTILE]
    assert [" ".join(name.split()) for name in found] == folded
    assert page.locator("img").count() == 0
    boxes = board(page).locator(".tools input")
    boxes.nth(0).check()
    boxes.nth(1).check()
    title = board(page).locator(".compare h3").inner_text()
    assert title == f"{folded[0]} against {folded[1]}"
    board(page).locator(".menu summary", has_text="Training").click()
    board(page).get_by_role("group", name="Training").locator("input").first.check()
    assert len(models(page)) == 1
    fresh = visit(hostile / "index.html", "#" + page.url.partition("#")[2])
    assert state(fresh) == state(page)
    board(page).get_by_role("button", name="Clear").click()
    board(page).locator("input[type=search]").fill("<img")
    assert [" ".join(name.split()) for name in models(page)] == [folded[1]]
    board(page).locator("button.more").first.click()
    assert folded[1] in " ".join(page.locator("dialog[open]").inner_text().split())
    assert page.locator("dialog img").count() == 0


def test_no_downloaded_field_is_a_formula(visit: Callable[..., Any], hostile: Path) -> None:
    page = visit(hostile / "index.html")
    rows = list(csv.reader(io.StringIO(downloaded(page, "CSV"), newline="")))
    assert len(rows) == 1 + len(HOSTILE)
    assert len({len(row) for row in rows}) == 1
    assert not [field for row in rows for field in row if field.lstrip(" ").startswith(("=", "+", "-", "@"))]
    assert {"'=cmd()", "'-2"} <= {row[rows[0].index("model")] for row in rows}


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_rows_with_any_name_compile(visit: Callable[..., Any], hostile: Path, tmp_path: Path) -> None:
    page = visit(hostile / "index.html")
    copied = page.evaluate(
        "(() => { const one = moebench.boards[0], heads = one.columns();"
        "return one.rows.map(row => moebench.latex(heads, heads.map(head => one.cell(row, head.key)))); })()"
    )
    columns = len(shown(page))
    body = "\n".join(rf"\tiny\begin{{tabular}}{{{'l' * columns}}}{row}\end{{tabular}}\clearpage" for row in copied)
    (tmp_path / "rows.tex").write_text(rf"\documentclass{{article}}\begin{{document}}{body}\end{{document}}", "ascii")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "rows.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def violations(page: Any) -> list[str]:
    """What axe-core calls serious or critical."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, { preload: false, resultTypes: ['violations'] })")["violations"]
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"][:3]
    ]


@pytest.mark.parametrize(("scheme", "viewport"), [("light", WIDE), ("dark", PHONE)])
def test_axe_finds_nothing_serious(visit: Callable[..., Any], site: Path, scheme: str, viewport: Any) -> None:
    page = visit(site / "index.html", viewport=viewport, color_scheme=scheme)
    board(page).get_by_label("Compare rt-er", exact=True).check()
    board(page).get_by_label("Compare trades-moe").check()
    for fold in board(page).locator(".compare summary").all():
        fold.click()
    board(page).locator("details.notes summary").click()
    board(page).locator(".menu summary", has_text="Columns").click()
    assert violations(page) == []
    page.keyboard.press("Escape")
    board(page).get_by_label("Reasons and citation of st-moe").click()
    page.get_by_role("button", name="Markdown", exact=True).click()
    assert violations(page) == []


def test_paper_shows_the_table_and_not_its_furniture(visit: Callable[..., Any], site: Path) -> None:
    page = visit(site / "index.html", color_scheme="dark")
    page.emulate_media(media="print")
    assert not board(page).locator(".toolbar").is_visible()
    assert not board(page).locator(".tools").first.is_visible()
    assert board(page).locator("table.ranking").is_visible()
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"


# Sizes


def test_an_empty_store_opens(visit: Callable[..., Any], tmp_path: Path) -> None:
    write_report(FakeStore(), tmp_path)
    page = visit(tmp_path / "index.html")
    assert "nothing to rank" in page.locator("main").inner_text()
    assert page.locator("table").count() == 0


def test_a_single_model_has_rank_one_and_nobody_to_be_compared_with(visit: Callable[..., Any], tmp_path: Path) -> None:
    store = FakeStore()
    store.add(model("alone", "dense"), "autoattack", first_broken(50, 5))
    write_report(store, tmp_path)
    page = visit(tmp_path / "index.html")
    assert models(page) == ["alone"]
    assert board(page).locator("tbody td").first.inner_text() == "1"
    assert board(page).locator(".tally").inner_text() == "1 model"
    board(page).get_by_label("Compare alone").check()
    assert board(page).locator(".compare").count() == 0


ATTACKS = ("fgsm", "pgd-10", "pgd-20", "pgd-50", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "autoattack")


def test_five_hundred_models_under_ten_attacks(visit: Callable[..., Any], tmp_path: Path) -> None:
    store, draw, n = FakeStore(), np.random.default_rng(0), 1000
    on, common = protocol(n=n), draw.random(n)
    for number in range(500):
        who = model(f"model-{number:03d}", ("moe", "dense", "dual", "ensemble")[number % 4])
        hardness, share = 0.6 * common + 0.4 * draw.random(n), draw.uniform(0.3, 0.9)
        for strength, attack in enumerate(ATTACKS):
            store.add(who, attack, hardness < np.quantile(hardness, share * (0.6 + 0.04 * strength)), on=on)
    started = time.perf_counter()
    write_report(store, tmp_path)
    assert time.perf_counter() - started < 60
    assert (tmp_path / "index.html").stat().st_size < 2_000_000
    page = visit(tmp_path / "index.html")
    assert len(models(page)) == 500
    sort(page, "ra[pgd-50]", "descending")
    assert sorted(models(page)) == sorted(who.model.name for who in tables.build(store).boards[0].rows)
    board(page).locator("input[type=search]").fill("model-3")
    assert len(models(page)) == 100


def test_a_hundred_models_are_light(tmp_path: Path) -> None:
    store, n = FakeStore(), 10_000
    for number in range(100):
        for attack in ATTACKS:
            store.add(model(f"model-{number:03d}"), attack, first_broken(n, 40 * number), on=protocol("cifar-10", n))
    write_report(store, tmp_path)
    assert (tmp_path / "index.html").stat().st_size < 1_000_000


def test_verdicts_are_packed_without_loss() -> None:
    import base64

    standing = np.random.default_rng(1).random(77) < 0.5
    raw = np.frombuffer(base64.b64decode(boards.packed(standing)), np.uint8)
    assert np.unpackbits(raw)[:77].astype(np.bool_).tolist() == standing.tolist()

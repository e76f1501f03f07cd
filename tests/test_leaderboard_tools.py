"""What a reader does with a leaderboard: sort, search, choose, compare, link to it, copy and save it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import opened, until
from fake_store import FakeStore, claim, first_broken, model, paper
from leaderboard import PHONE, board, digits, downloaded, header, models, shown, sort, state
from scipy.stats import binomtest
from typesetting import LATEX, compiled

from moebench.metrics import Measure
from moebench.report import boards, write_report
from moebench.schema import Flag

NAMES = (
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


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store, out = FakeStore(), tmp_path_factory.mktemp("hostile")
    for number, name in enumerate(NAMES):
        facts = replace(paper(name), authors=name, venue=name)
        who = model(name, "moe", summary=name, training=name, routing=name, paper=facts)
        done = store.add(who, "autoattack", first_broken(100, 10 + 5 * number))
        store.add(who, name, first_broken(100, 5))
        store.add_run(done, flags=(Flag(name, name),))
        store.published.append(claim(name, 50.0, flag=name))
    write_report(store, out)
    return out


# Sorting and choosing


def test_sorting_keeps_what_is_missing_and_who_has_no_rank_at_the_end(
    visit: Callable[..., Any], leaderboards: Path
) -> None:
    page = visit(leaderboards / "index.html")
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


def names_in(page: Any) -> list[str]:
    found: list[str] = page.locator("table").first.locator("tbody tr th a").all_inner_texts()
    return found


def sorted_by(page: Any, label: str, direction: str) -> list[str]:
    """The names, once the table says that it is sorted so."""
    head = page.get_by_role("columnheader", name=label, exact=True)
    head.and_(page.locator(f'[aria-sort="{direction}"]')).wait_for()
    return names_in(page)


def test_clicking_a_header_sorts_by_value_and_clicking_again_turns_it_round(browser: Any, tmp_path: Path) -> None:
    store = FakeStore()
    for name, broken, clean in (("a", 10, 0.9), ("b", 190, 1.0), ("c", 100, 0.95)):
        store.add(model(name, "dense"), "autoattack", first_broken(200, broken), clean=clean)
    store.add(model("z-unranked"), "pgd-50", first_broken(200, 0), clean=0.99)
    write_report(store, tmp_path)
    page, problems = opened(browser, tmp_path / "index.html")
    assert sorted_by(page, "RA-worst", "descending") == ["a", "c", "b", "z-unranked"]
    page.locator('th[data-key="sa"]').click()
    assert sorted_by(page, "SA", "descending") == ["b", "c", "a", "z-unranked"]
    page.locator('th[data-key="sa"]').click()
    assert sorted_by(page, "SA", "ascending") == ["a", "c", "b", "z-unranked"]
    page.locator('th[data-key="ra_worst"] .dt-column-order').focus()
    page.keyboard.press("Enter")
    assert sorted_by(page, "RA-worst", "descending") == ["a", "c", "b", "z-unranked"]
    page.keyboard.press("Space")
    assert sorted_by(page, "RA-worst", "ascending") == ["b", "c", "a", "z-unranked"]
    assert page.locator(".ranking th[aria-sort]").count() == 1
    assert problems == []


def test_small_tables_sort_too(visit: Callable[..., Any], leaderboards: Path) -> None:
    page = visit(leaderboards / "models" / "rt-er.html")
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


def test_search_and_filters_narrow_the_rows_and_say_so(visit: Callable[..., Any], leaderboards: Path) -> None:
    page = visit(leaderboards / "index.html")
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


def test_columns_can_be_chosen_and_those_without_a_number_start_hidden(
    visit: Callable[..., Any], leaderboards: Path
) -> None:
    page = visit(leaderboards / "index.html")
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


# Comparing


def test_two_models_are_compared_sample_by_sample(visit: Callable[..., Any], leaderboards: Path) -> None:
    page = visit(leaderboards / "index.html")
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


def test_the_exact_test_in_the_browser_is_scipys_for_any_counts(visit: Callable[..., Any], leaderboards: Path) -> None:
    page = visit(leaderboards / "index.html")
    pairs = [(0, 0), (0, 1), (0, 9), (3, 3), (1, 9), (40, 73), (500, 430), (5000, 4700), (0, 900), (12, 1), (0, 5000)]
    found = page.evaluate("pairs => pairs.map(([a, b]) => moebench.mcnemar(a, b))", pairs)
    for (one, other), p in zip(pairs, found, strict=True):
        wanted = binomtest(one, one + other).pvalue if one + other else 1.0
        assert p == pytest.approx(wanted, rel=1e-9, abs=1e-300)
    intervals = page.evaluate("[[0, 9], [9, 9], [3, 70]].map(([k, n]) => moebench.wilson(k, n))")
    wanted = [(Measure(k, n).low, Measure(k, n).high) for k, n in ((0, 9), (9, 9), (3, 70))]
    assert np.allclose(intervals, wanted, atol=1e-9)


def test_verdicts_are_packed_without_loss() -> None:
    import base64

    standing = np.random.default_rng(1).random(77) < 0.5
    raw = np.frombuffer(base64.b64decode(boards.packed(standing)), np.uint8)
    assert np.unpackbits(raw)[:77].astype(np.bool_).tolist() == standing.tolist()


# Addresses


def test_a_link_brings_the_same_view_and_back_undoes_each_step(visit: Callable[..., Any], leaderboards: Path) -> None:
    page = visit(leaderboards / "index.html")
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
    fresh = visit(leaderboards / "index.html", "#" + page.url.partition("#")[2])
    assert state(fresh) == views[-1]
    for view in views[-2::-1]:
        page.go_back()
        assert state(page) == view
    for view in views[1:]:
        page.go_forward()
        assert state(page) == view


def test_views_of_several_boards_share_one_address(visit: Callable[..., Any], leaderboards: Path) -> None:
    page = visit(leaderboards / "index.html")
    page.select_option("#smallest", "1000")
    assert [one.is_visible() for one in page.locator("section.board").all()].count(True) == 1
    page.select_option("#smallest", "0")
    folded = page.locator("details.radius")
    folded.locator("summary").first.click()
    anchor = board(page).locator("h2").get_attribute("id")
    where = f"#n=0&board={anchor}&q=rt-er&board={folded.locator('h2').get_attribute('id')}&sort=model"
    fresh = visit(leaderboards / "index.html", where)
    assert models(fresh) == ["rt-er"]
    assert fresh.locator("details.radius").get_attribute("open") is not None
    assert fresh.locator("details.radius th[aria-sort]").get_attribute("data-key") == "model"
    nonsense = visit(
        leaderboards / "index.html", f"#board={anchor}&sort=-nothing&pair=x&pair=y&family=none&board=gone&q=x"
    )
    assert models(nonsense) == []


def test_links_within_the_page_keep_the_view(visit: Callable[..., Any], leaderboards: Path) -> None:
    page = visit(leaderboards / "index.html", viewport=PHONE)
    board(page).locator("input[type=search]").fill("resnet")
    view, address = state(page), page.url
    page.get_by_role("link", name="Models", exact=True).click()
    assert page.locator("#models").bounding_box()["y"] < PHONE["height"]
    assert (state(page), page.url) == (view, address)


# Copies and files


def test_a_row_is_copied_as_latex_markdown_and_bibtex(visit: Callable[..., Any], leaderboards: Path) -> None:
    page = visit(leaderboards / "index.html", permissions=["clipboard-read", "clipboard-write"])
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


def test_the_view_is_downloaded_as_it_is_seen(visit: Callable[..., Any], leaderboards: Path) -> None:
    page = visit(leaderboards / "index.html")
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


# Names from outside


def test_names_from_outside_stay_text_in_all_that_the_page_does(visit: Callable[..., Any], hostile: Path) -> None:
    page = visit(hostile / "index.html")
    found = board(page).locator(".ranking tbody th a bdi").evaluate_all("all => all.map(x => x.textContent)")
    folded = [" ".join(name.split()) for name in NAMES]
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
    assert len(rows) == 1 + len(NAMES)
    assert len({len(row) for row in rows}) == 1
    assert not [field for row in rows for field in row if field.lstrip(" ").startswith(("=", "+", "-", "@"))]
    assert {"'=cmd()", "'-2"} <= {row[rows[0].index("model")] for row in rows}


@LATEX
def test_rows_with_any_name_compile(visit: Callable[..., Any], hostile: Path, tmp_path: Path) -> None:
    page = visit(hostile / "index.html")
    copied = page.evaluate(
        "(() => { const one = moebench.boards[0], heads = one.columns();"
        "return one.rows.map(row => moebench.latex(heads, heads.map(head => one.cell(row, head.key)))); })()"
    )
    columns = len(shown(page))
    body = "\n".join(rf"\tiny\begin{{tabular}}{{{'l' * columns}}}{row}\end{{tabular}}\clearpage" for row in copied)
    (tmp_path / "rows.tex").write_text(rf"\documentclass{{article}}\begin{{document}}{body}\end{{document}}", "ascii")
    compiled(tmp_path / "rows.tex")

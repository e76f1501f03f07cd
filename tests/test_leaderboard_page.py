"""The leaderboards as a reader sees them, in a real browser, from disk and without a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import opened, until
from fake_store import FakeStore, demo, first_broken, model, protocol
from hostile import HOSTILE, hostile_store
from leaderboard import PHONE, WIDE, board, models, sort

from moebench.report import tables, write_report

AXE = Path(__file__).parent / "assets" / "axe.min.js"

# Widths, themes and media


def test_pages_open_without_complaint_or_network_and_fit_every_width(browser: Any, tmp_path: Path) -> None:
    store = demo(60)
    awkward = hostile_store(HOSTILE[0])
    store.stored += [replace(one, result_id=1000 + one.result_id) for one in awkward.stored]
    store.evidence |= {1000 + number: one for number, one in awkward.evidence.items()}
    write_report(store, tmp_path)
    for file in [tmp_path / "index.html", tmp_path / "method.html", *sorted((tmp_path / "models").glob("*.html"))]:
        page, problems = opened(browser, file, viewport={"width": 1280, "height": 800})
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, file.name
        assert problems == [], file.name
        page.context.close()


def test_every_page_opens_from_disk_and_fits_both_widths(visit: Callable[..., Any], leaderboards: Path) -> None:
    for file in (leaderboards / "index.html", leaderboards / "method.html", leaderboards / "models" / "rt-er.html"):
        for viewport in (WIDE, PHONE):
            page = visit(file, viewport=viewport)
            assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], file.name
            page.context.close()


def test_the_first_column_stays_in_sight_on_a_phone(visit: Callable[..., Any], leaderboards: Path) -> None:
    page = visit(leaderboards / "index.html", viewport=PHONE)
    region = board(page).locator(".table").first
    region.evaluate("region => { region.scrollLeft = 400; }")
    left = region.bounding_box()["x"]
    assert board(page).locator("tbody th.pin").first.bounding_box()["x"] == pytest.approx(left, abs=2)


def test_the_theme_is_chosen_kept_and_announced(visit: Callable[..., Any], leaderboards: Path) -> None:
    page = visit(leaderboards / "index.html", color_scheme="light")
    page.evaluate("window.heard = 0; document.addEventListener('themechange', () => { window.heard += 1; })")
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(ground)
    page.select_option("#theme", "dark")
    dark = page.evaluate(ground)
    assert dark != light
    assert page.evaluate("window.heard") == 1
    page.goto((leaderboards / "method.html").as_uri())
    assert page.evaluate(ground) == dark
    assert page.locator("#theme").input_value() == "dark"
    page.select_option("#theme", "")
    assert page.evaluate(ground) == light


def test_a_refused_storage_stops_nothing(visit: Callable[..., Any], leaderboards: Path) -> None:
    refuse = "Object.defineProperty(window, 'localStorage', { get() { throw new Error('refused'); } })"
    page = visit(leaderboards / "index.html", before=refuse)
    page.select_option("#theme", "dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert models(page)


def test_paper_shows_the_table_and_not_its_furniture(visit: Callable[..., Any], leaderboards: Path) -> None:
    page = visit(leaderboards / "index.html", color_scheme="dark")
    page.emulate_media(media="print")
    assert not board(page).locator(".toolbar").is_visible()
    assert not board(page).locator(".tools").first.is_visible()
    assert board(page).locator("table.ranking").is_visible()
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"


# For every reader


def test_everything_is_there_without_scripts(browser: Any, leaderboards: Path) -> None:
    page, _ = opened(browser, leaderboards / "index.html", java_script_enabled=False)
    for name in ("rt-er", "st-moe", "Reasons for doubt", "over-stated RA"):
        assert page.get_by_text(name).first.is_visible()


def test_reasons_are_reached_by_pointer_keyboard_and_without_scripts(
    visit: Callable[..., Any], leaderboards: Path
) -> None:
    page = visit(leaderboards / "index.html")
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
    plain = visit(leaderboards / "index.html", java_script_enabled=False)
    plain.locator("td.flags a.flag[href^='#']", has_text="gradient masking").first.click()
    assert plain.get_by_text("square breaks 14 samples").first.is_visible()
    assert plain.get_by_text("rt-er").first.is_visible()


def test_text_has_enough_contrast_in_both_schemes(browser: Any, leaderboards: Path) -> None:
    for scheme in ("light", "dark"):
        page, _ = opened(browser, leaderboards / "index.html", color_scheme=scheme)
        for ink, ground in (
            ("--ink", "--page"),
            ("--soft", "--stripe"),
            ("--link", "--stripe"),
            ("--warn-ink", "--warn-page"),
        ):
            style = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
            assert contrast(page.evaluate(style, ink), page.evaluate(style, ground)) >= 4.5, (scheme, ink, ground)


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2 between two #rrggbb colours."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    channels = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


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
def test_axe_finds_nothing_serious(visit: Callable[..., Any], leaderboards: Path, scheme: str, viewport: Any) -> None:
    page = visit(leaderboards / "index.html", viewport=viewport, color_scheme=scheme)
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


@pytest.mark.slow
def test_five_hundred_models_under_ten_attacks(visit: Callable[..., Any], tmp_path: Path) -> None:
    store, draw, n = FakeStore(), np.random.default_rng(0), 1000
    on, common = protocol(n=n), draw.random(n)
    for number in range(500):
        who = model(f"model-{number:03d}", ("moe", "dense", "dual", "ensemble")[number % 4])
        hardness, share = 0.6 * common + 0.4 * draw.random(n), draw.uniform(0.3, 0.9)
        for strength, attack in enumerate(ATTACKS):
            store.add(who, attack, hardness < np.quantile(hardness, share * (0.6 + 0.04 * strength)), on=on)
    write_report(store, tmp_path)
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

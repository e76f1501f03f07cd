"""A leaderboard in a browser: what it shows, and the hands that use it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from browsing import watched
from fake_store import demo, first_broken, model, protocol

from moebench.report import tables, write_report

WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


BOARD = 'main > section.board:has(h2[id^="digits-"])'


def written(out: Path) -> Path:
    """A report with three leaderboards, one of them folded, with flags, gaps, and rows without a rank."""
    store = demo(120)
    other = replace(protocol(n=120), threat=protocol(eps=0.1).threat)
    store.add(model("rt-er"), "autoattack", first_broken(120, 9), on=other)
    write_report(store, out)
    return out


def opened(
    browser: Any,
    problems: list[str],
    file: Path,
    address: str = "",
    viewport: Any = WIDE,
    before: str = "",
    **context: Any,
) -> Any:
    """A page in a window of its own, once its leaderboard can be used; what it complains about is noted."""
    page = browser.new_context(viewport=viewport, **context).new_page()
    watched(page, problems)
    if before:
        page.add_init_script(before)
    page.goto(file.as_uri() + address)
    if context.get("java_script_enabled", True) and page.locator(f"{BOARD} table.ranking").count():
        page.wait_for_selector(f"{BOARD} .toolbar")
    return page


def board(page: Any) -> Any:
    """The leaderboard that most tests are about."""
    return page.locator(BOARD)


def digits() -> tables.Board:
    """The same board as rows."""
    return next(one for one in tables.build(demo(120)).boards if one.protocol.dataset == "digits")


def models(page: Any) -> list[str]:
    """The names in its rows, from the top."""
    found: list[str] = board(page).locator("table.ranking tbody tr th a").all_inner_texts()
    return found


def shown(page: Any) -> list[str]:
    """The heads of the columns that are seen."""
    found: list[str] = board(page).locator("table.ranking thead tr:last-child th").all_inner_texts()
    return [re.sub(r"\s+", " ", label).strip() for label in found]


def header(page: Any, key: str) -> Any:
    """The head of one column."""
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


def downloaded(page: Any, kind: str) -> str:
    """The file that a button saves."""
    with page.expect_download() as waiting:
        board(page).get_by_role("button", name=kind, exact=True).click()
    found: str = Path(waiting.value.path()).read_text(encoding="utf-8")
    return found

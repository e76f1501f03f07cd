"""What the report makes of a store: a board, a row, a model's page, one series of a chart."""

from __future__ import annotations

from typing import Any

from fake_store import FakeStore, first_broken, model

from moebench.report import render, tables
from moebench.report.charts import Chart
from moebench.report.model_page import SettingPage


def board_of(store: FakeStore, which: int = 0) -> tables.Board:
    """One leaderboard, the first unless told."""
    return tables.build(store).boards[which]


def row_of(store: FakeStore, name: str) -> tables.Row:
    """A model's row on the first leaderboard."""
    return next(row for row in board_of(store).rows if row.model.name == name)


def page_of(store: FakeStore, name: str = "a") -> tables.ModelPage:
    """What is on the page of a model."""
    return next(page for page in tables.build(store).models if page.model.name == name)


def setting_of(store: FakeStore, name: str = "a") -> SettingPage:
    """The part of a model's page on its first data set and threat model."""
    return page_of(store, name).details.settings[0]


def html_of(store: FakeStore, name: str = "a") -> str:
    """The page of a model."""
    content = render(store)[f"models/{name}.html"]
    assert isinstance(content, str)
    return content


def series(chart: Chart, name: str, kind: str) -> Any:
    """The data of the one series of that name and kind."""
    (found,) = (one["data"] for one in chart.option["series"] if (one["name"], one["type"]) == (name, kind))
    return found


def one_model(attacks: tuple[str, ...] = ("pgd-50", "autoattack"), n: int = 200) -> FakeStore:
    """A model that each attack breaks further."""
    store = FakeStore()
    for place, attack in enumerate(attacks):
        store.add(model("a"), attack, first_broken(n, 40 * (place + 1)))
    return store

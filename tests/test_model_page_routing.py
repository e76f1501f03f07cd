"""Experts and routing on a model page: each expert alone, and where samples move under attack."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
from fake_store import FakeStore, first_broken, model, routing
from report_parts import html_of, series, setting_of

from moebench.report import tables
from moebench.report.charts import Chart
from moebench.report.routing_shift import WIDE
from moebench.schema import RoutingLayer, StoredResult


def with_parts() -> tuple[FakeStore, StoredResult]:
    store = FakeStore()
    whole = store.add(model("a"), "autoattack", first_broken(200, 40), layers=(routing("moe"),))
    store.add(model("a"), "pgd-50", first_broken(200, 30), "expert[1]")
    return store, whole


def add_part(store: FakeStore, whole: StoredResult, part: str, broken: int, weights: str | None = None) -> None:
    own = weights or hashlib.sha256(f"{whole.checkpoint.sha256}/{part}".encode()).hexdigest()
    done = store.add(model(f"a/{part}", "part"), "pgd-20", first_broken(200, broken), clean=0.9)
    store.stored[-1] = replace(done, checkpoint=replace(done.checkpoint, sha256=own))


def test_experts_alone_are_on_the_page_of_their_model_and_on_no_board() -> None:
    store, whole = with_parts()
    add_part(store, whole, "expert[1]", 150)
    add_part(store, whole, "expert[2]", 10, weights="0" * 64)
    report = tables.build(store)
    assert [row.model.name for board in report.boards for row in board.rows] == ["a"]
    assert [page.model.name for page in report.models] == ["a"]
    table = setting_of(store).experts
    assert table is not None
    ((layer, rows),) = table.layers
    assert (layer, [row.expert for row in rows]) == ("moe", ["0", "1", "2", "3"])
    second = rows[1]
    assert second.alone is not None
    assert second.alone.sa is not None
    assert second.alone.worst is not None
    assert second.through is not None
    assert (second.alone.sa.k, second.alone.worst.k, second.through.k) == (180, 50, 170)
    assert (second.clean, second.attacked) == (0.25, 0.24)
    assert [row.alone is None for row in rows] == [True, False, True, True]
    assert table.missing == 3
    assert "3 of these have not been evaluated alone" in html_of(store)


def test_halves_of_a_dual_model_and_experts_by_layer_have_rows_of_their_own() -> None:
    store = FakeStore()
    layers = (routing("standard.moe"), routing("robust.moe"))
    whole = store.add(model("a", "dual"), "autoattack", first_broken(200, 40), layers=layers)
    for part in ("robust", "expert[robust.moe:3]"):
        add_part(store, whole, part, 60)
    table = setting_of(store).experts
    assert table is not None
    found = {(layer, row.expert): row.alone is not None for layer, rows in table.layers for row in rows}
    assert [layer for layer, _ in table.layers] == ["", "standard.moe", "robust.moe"]
    assert [place for place, known in found.items() if known] == [("", "robust half"), ("robust.moe", "3")]


def test_a_dense_model_has_neither_experts_nor_routing() -> None:
    store = FakeStore()
    store.add(model("a", "dense"), "autoattack", first_broken(200, 40))
    assert (setting_of(store).experts, setting_of(store).routing) == (None, None)
    assert 'id="experts"' not in html_of(store)
    assert 'id="routing"' not in html_of(store)


def test_the_heat_map_is_each_row_of_the_moves_in_percent_and_its_table_the_counts() -> None:
    store, layer = FakeStore(), replace(routing(), moves=((3, 1, 0, 0), (0, 0, 0, 0), (0, 0, 5, 5), (1, 0, 0, 9)))
    store.add(model("a"), "autoattack", first_broken(200, 40), layers=(layer,))
    shift = setting_of(store).routing
    assert shift is not None
    (found,) = shift.maps
    data = series(found.chart, "share of the row, %", "heatmap")
    cells = {(row, column): share for column, row, share in (one["value"] for one in data)}
    assert cells == {
        **{(0, 0): 75, (0, 1): 25, (0, 2): 0, (0, 3): 0, (2, 0): 0, (2, 1): 0, (2, 2): 50, (2, 3): 50},
        **{(3, 0): 10, (3, 1): 0, (3, 2): 0, (3, 3): 90},
    }
    assert found.chart.rows[3] == ("3", "1", "0", "0", "9")
    assert "17 of 24 samples keep their first expert. The largest move is of 5 from expert 2 to expert 3." in (
        found.chart.words
    )


def test_each_view_shows_its_strongest_attack_and_layers_after_the_first_are_folded() -> None:
    store = FakeStore()
    layers = tuple(routing(f"layer{number}") for number in range(4))
    for attack, view, broken in (("pgd-50", "whole", 60), ("autoattack", "whole", 80), ("pgd-50", "router", 20)):
        store.add(model("a"), attack, first_broken(200, broken), view, layers=layers)
    shift = setting_of(store).routing
    assert shift is not None
    assert len(shift.rows) == 12
    assert [one.title for one in shift.maps][::4] == [
        "layer0: autoattack on the whole model",
        "layer0: pgd-50 on router",
    ]
    assert [one.first for one in shift.maps] == [True] + [False] * 7
    page = html_of(store)
    for layer in layers:
        shown = (layer.iou, layer.entropy_clean, layer.entropy_adv)
        iou, clean, attacked = (f'<td class="num">{value:.3f}</td>' for value in shown)
        row = f'<td>whole</td><td>{layer.name}</td>{iou}<td class="num">19.0</td>{clean}{attacked}</tr>'
        assert f'<th scope="row" class="pin">autoattack</th>{row}' in page


def test_moves_of_tokens_are_called_tokens_and_a_wide_matrix_lists_its_largest_moves() -> None:
    moves = np.full((WIDE + 4, WIDE + 4), 1) + np.diag([40] * (WIDE + 4))
    moves[2, 7] = 99
    even = tuple([1 / (WIDE + 4)] * (WIDE + 4))
    layer = RoutingLayer("blocks.3", 0.9, 0.1, 1.0, 1.1, even, even, tuple(map(tuple, moves.tolist())))
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 40), layers=(layer,))
    shift = setting_of(store).routing
    assert shift is not None
    assert shift.per_token
    chart = shift.maps[0].chart
    assert (chart.head, chart.rows[0]) == (("From expert", "to expert", "count"), ("2", "7", "99"))
    assert "tokens keep their first expert" in chart.words
    assert not series_label(chart)
    page = html_of(store)
    assert "Which expert answers which class is not known" not in page


def series_label(chart: Chart) -> bool:
    shown: bool = chart.option["series"][0]["label"]["show"]
    return shown


def test_classes_by_expert_are_shown_by_name() -> None:
    store = FakeStore()
    layer = replace(routing(), classes=tuple((number, 20 - number, 0, 0) for number in range(10)))
    store.add(model("a"), "autoattack", first_broken(200, 40), layers=(layer,))
    shift = setting_of(store).routing
    assert shift is not None
    (found,) = shift.classes
    assert found.chart.rows[4] == ("4", "4", "16", "0", "0")
    assert {"value": [0, 4, 20], "name": "4 → 0"} in series(found.chart, "share of the row, %", "heatmap")

"""The trade-off page: who is on the front, how large points are, and what is drawn and listed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from fake_store import FakeStore, demo, first_broken, model
from hypothesis import given
from hypothesis import strategies as st

from moebench.report import pareto, render, tables

SHARES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


@given(SHARES)
def test_the_front_is_what_nothing_dominates(values: list[tuple[int, int]]) -> None:
    def beaten(one: tuple[int, int]) -> bool:
        return any(a >= one[0] and b >= one[1] and (a, b) != one for a, b in values)

    assert pareto.front(values) == [not beaten(one) for one in values]


def store_of(**models: tuple[float, int, int]) -> FakeStore:
    """Models by name with clean accuracy, number of broken samples (of 200) and FLOPs."""
    store = FakeStore()
    for name, (clean, broken, flops) in models.items():
        store.add(model(name, "dense"), "autoattack", first_broken(200, broken), clean=clean)
        last = store.stored[-1]
        store.stored[-1] = replace(last, checkpoint=replace(last.checkpoint, flops=flops or None))
    return store


def plot_of(store: FakeStore) -> pareto.Plot:
    (plot,) = pareto.build(tables.build(store).boards)
    return plot


def option_of(plot: pareto.Plot) -> Any:
    assert plot.chart is not None
    return json.loads(json.dumps(plot.chart.option))


def test_points_carry_both_numbers_a_link_and_a_size_by_the_logarithm_of_flops() -> None:
    plot = plot_of(store_of(small=(0.9, 100, 10**6), middle=(0.95, 120, 10**7), large=(0.8, 150, 10**8)))
    by_name = {point.row.label: point for point in plot.points}
    assert {name: point.front for name, point in by_name.items()} == {"small": True, "middle": True, "large": False}
    assert by_name["small"].size == pareto.SMALLEST
    assert by_name["large"].size == pareto.LARGEST
    assert by_name["middle"].size == pytest.approx((pareto.SMALLEST + pareto.LARGEST) / 2)
    assert [flops for flops, _ in plot.legend] == pytest.approx([1e6, 1e7, 1e8])
    (scatter,) = [one for one in option_of(plot)["series"] if one["type"] == "scatter"]
    drawn = {one["link"]: one["value"] for one in scatter["data"]}
    assert drawn == {"models/small.html": [90, 50], "models/middle.html": [95, 40], "models/large.html": [80, 25]}


def test_the_front_line_is_a_staircase_to_the_edges_of_the_plot() -> None:
    option = option_of(plot_of(store_of(a=(0.9, 100, 1), b=(0.95, 120, 1), c=(0.8, 150, 1))))
    (line,) = [one for one in option["series"] if one["type"] == "line"]
    left, bottom = option["xAxis"]["min"], option["yAxis"]["min"]
    assert line["data"] == [[left, 50], [90, 50], [90, 40], [95, 40], [95, bottom]]


def test_intervals_are_those_of_the_numbers() -> None:
    plot = plot_of(store_of(a=(0.9, 100, 1)))
    (point,) = plot.points
    flat, upright = [one["data"][0] for one in option_of(plot)["series"] if one["type"] == "custom"]
    assert flat == pytest.approx([50, 100 * point.sa.low, 100 * point.sa.high], abs=1e-3)
    assert upright == pytest.approx([90, 100 * point.worst.low, 100 * point.worst.high], abs=1e-3)


def test_a_model_without_a_rank_is_hollow_and_on_no_front() -> None:
    store = store_of(a=(0.9, 100, 1))
    store.add(model("untested"), "pgd-50", first_broken(200, 1), clean=0.99)
    points = {point.row.label: point for point in plot_of(store).points}
    assert points["a"].front
    assert not points["untested"].front
    data = [
        one for series in option_of(plot_of(store))["series"] if series["type"] == "scatter" for one in series["data"]
    ]
    assert [one["link"] for one in data if one.get("itemStyle", {}).get("color") == "transparent"] == [
        "models/untested.html"
    ]
    alone = FakeStore()
    alone.add(model("untested"), "pgd-50", first_broken(200, 1))
    assert "None of them is ranked" in render(alone)["pareto.html"]


def test_models_of_about_the_same_cost_look_it_and_unknown_costs_have_a_reason() -> None:
    plot = plot_of(store_of(a=(0.9, 100, 1000), b=(0.8, 90, 1001), c=(0.7, 80, 0)))
    assert max(point.size for point in plot.points) - min(point.size for point in plot.points) < 0.1
    assert len(plot.legend) == 1
    page = render(store_of(c=(0.7, 80, 0)))["pareto.html"]
    assert '<abbr title="not counted for this model; drawn at the smallest size">—</abbr>' in page
    assert "FLOPs per sample:" not in page


def test_every_model_is_in_the_table_with_a_link_and_families_have_shapes_of_their_own() -> None:
    store = demo(60)
    page = render(store)["pareto.html"]
    report = tables.build(store)
    for board in report.boards:
        for row in board.rows:
            assert f'<a href="models/{row.page}"><bdi>{row.label}</bdi></a>' in page
    series = option_of(pareto.build(report.boards)[1])["series"]
    shapes = {one["name"]: (one["symbol"], one["itemStyle"]["color"]) for one in series if one["type"] == "scatter"}
    assert len(shapes) == len(set(shapes.values())) == len({shape for shape, _ in shapes.values()}) == 5


def test_an_empty_store_has_a_page_that_says_so_and_no_chart() -> None:
    page = render(FakeStore())["pareto.html"]
    assert "nothing to draw" in page
    assert "<figure" not in page


def test_a_board_without_eligible_results_has_no_chart() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 20), engine="reference")
    page = render(store)["pareto.html"]
    assert "<figure" not in page
    assert "No result here was made with the native engine" in page

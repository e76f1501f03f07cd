"""The figures of a model page against direct computation: bars, curves, classes and training."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from fake_store import FakeStore, claim, first_broken, model, outcomes, protocol
from report_parts import html_of, one_model, page_of, series, setting_of

from moebench.metrics import wilson
from moebench.report.per_class import MOST

# Bars and curves


def test_bars_are_what_each_attack_leaves_with_its_interval_and_the_worst_case_of_all() -> None:
    store = one_model()
    store.add(model("a"), "pgd-50", first_broken(200, 90)[::-1].copy(), "experts")
    chart = setting_of(store).bars
    found = {one["name"]: one["value"] for one in series(chart, "accuracy left, %", "bar") if one}
    assert found == {
        "clean images": 95.0,
        "all attacks together (RA-worst)": 15.0,
        "pgd-50 on the whole model": 80.0,
        "autoattack on the whole model": 60.0,
        "pgd-50 on experts": 55.0,
    }
    places = [row["value"] for row in chart.option["yAxis"][0]["data"]]
    assert places == ["clean images", "all attacks", "whole model", "pgd-50", "autoattack", "experts", "pgd-50"]
    low, high = wilson(120, 200)
    assert [4, round(100 * low, 2), round(100 * high, 2)] in series(chart, "95 % interval", "custom")
    assert ("autoattack", "whole model", "60.0 (53.1–66.5)", "200", "—") in chart.rows


def test_claims_are_marks_of_their_own_apart_for_other_data_and_only_for_the_same_question() -> None:
    store, cifar = FakeStore(), protocol("cifar10", 200, eps=8 / 255)
    store.add(model("a"), "pgd-50", first_broken(200, 100), on=cifar)
    store.published = [
        claim("a", 69.0),
        claim("a", 51.0, attack_params="Linf eps=2/255, 50 steps"),
        claim("a", 52.0, dataset="TinyImageNet"),
        claim("a", 53.0, metric="RA-E"),
        claim("a", 54.0, architecture="an ablation"),
        claim("a", 55.0, metric="prose: RA gain"),
    ]
    chart = setting_of(store).bars
    assert [one["value"][0] for one in series(chart, "claimed", "scatter")] == [69.0]
    (other,) = series(chart, "claimed, on other data", "scatter")
    assert other["value"][0] == 52.0
    assert other["name"].startswith("claimed 52.00 on TinyImageNet (")
    assert "claimed" in chart.words
    page = html_of(store)
    assert page.index('aria-label="Claims"') < page.index(">69.00<") < page.index('aria-label="More claims"')
    assert page.index(">55.00<") > page.index('aria-label="More claims"')


def test_a_result_without_a_claim_has_no_marks() -> None:
    chart = setting_of(one_model()).bars
    assert {one["type"] for one in chart.option["series"]} == {"bar", "custom"}
    assert "claimed" not in chart.words


def test_a_curve_over_radii_starts_at_the_clean_accuracy_and_keeps_warm_and_cold_apart() -> None:
    store, cold = FakeStore(), []
    for eps, broken in ((0.1, 60), (0.2, 120)):
        cold.append(store.add(model("a"), "pgd-50", first_broken(200, broken), on=protocol(eps=eps)))
    on = {"eps": 0.1, "fingerprint": cold[0].cell.fingerprint}
    warm = store.add(model("a"), "pgd-50", first_broken(200, 130), on=protocol(eps=0.2))
    store.stored[-1] = replace(warm, cell=replace(warm.cell, parameters={**warm.cell.parameters, "warm-start": on}))
    store.stored = [replace(one, checkpoint=cold[0].checkpoint) for one in store.stored]
    (chart,) = page_of(store).details.eps
    assert series(chart, "pgd-50, cold", "line") == [[0.0, 95.0], [0.1, 70.0], [0.2, 40.0]]
    assert series(chart, "pgd-50, warm", "line") == [[0.0, 95.0], [0.1, 70.0], [0.2, 35.0]]
    low, high = wilson(80, 200)
    assert series(chart, "pgd-50, cold", "custom")[-1] == [0.2, round(100 * low, 2), round(100 * high, 2)]
    styles = {one["name"]: one["lineStyle"]["type"] for one in chart.option["series"] if one["type"] == "line"}
    assert styles == {"pgd-50, cold": "solid", "pgd-50, warm": "dashed"}


def test_a_curve_over_steps_has_a_point_per_length_and_a_single_length_says_what_is_missing() -> None:
    store = one_model(("pgd-10", "pgd-50"))
    (chart,) = page_of(store).details.steps
    assert series(chart, "pgd-N, cold, eps 0.2", "line") == [[0, 80.0], [1, 60.0]]
    assert chart.option["xAxis"]["data"] == ["10", "50"]
    page = html_of(one_model(("pgd-50",)))
    assert "No curve over the radius: it needs an attack at two radii" in page
    assert "No curve over the steps: it needs PGD of two lengths" in page


# Classes


def test_numbers_per_class_are_those_of_a_direct_count() -> None:
    store, draw, n = FakeStore(), np.random.default_rng(5), 300
    labels = draw.integers(0, 9, n)
    clean_pred = np.where(draw.random(n) < 0.9, labels, 9)
    broken = [(draw.random(n) < share) | (clean_pred != labels) for share in (0.3, 0.4)]
    for attack, hits in zip(("pgd-50", "autoattack"), broken, strict=True):
        done = store.add(model("a"), attack, hits)
        store.evidence[done.result_id] = replace(outcomes(hits), clean_pred=clean_pred)
    store.classes[done.protocol.data_sha256] = labels
    chart = setting_of(store).classes.chart
    assert chart is not None
    rows = {row[0]: row[1:] for row in chart.rows}
    for number in range(9):
        here = [place for place in range(n) if labels[place] == number]
        right = sum(clean_pred[place] == number for place in here)
        stands = sum(not broken[0][place] and not broken[1][place] for place in here)
        for cell, k in ((rows[str(number)][0], right), (rows[str(number)][1], stands)):
            low, high = wilson(int(k), len(here))
            assert cell == f"{100 * k / len(here):.1f} ({100 * low:.1f}–{100 * high:.1f})"
        assert rows[str(number)][2] == str(len(here))
    assert rows["9"] == ("—", "—", "0")
    assert len(series(chart, "under the worst case", "scatter")) == 9


def test_of_many_classes_the_figure_shows_the_weakest_and_its_table_all() -> None:
    store, n = FakeStore(), 400
    labels = np.arange(n) % 100
    names = tuple(f"class {number}" for number in range(100))
    where = replace(protocol(n=n), num_classes=100, class_names=names)
    done = store.add(model("a"), "autoattack", labels % 50 == 3, on=where)
    store.evidence[done.result_id] = replace(outcomes(labels % 50 == 3), clean_pred=labels)
    store.classes[where.data_sha256] = labels
    chart = setting_of(store).classes.chart
    assert chart is not None
    shown = chart.option["yAxis"]["data"]
    assert (len(shown), len(chart.rows)) == (MOST, 100)
    assert {"class 3", "class 53"} <= set(shown)
    assert f"the {MOST} weakest of 100 classes" in chart.title


def test_without_labels_the_page_says_why_there_are_no_classes() -> None:
    assert setting_of(one_model()).classes.chart is None
    assert "Not shown: the store has no labels of these samples" in html_of(one_model())


# Training


def test_the_training_history_is_the_log_and_too_short_a_log_is_said_to_be() -> None:
    store = one_model(("autoattack",))
    log = tuple({"epoch": at, "loss": 1 / at, "val_clean": 0.1 * at, "val_robust": 0.05 * at} for at in (1, 2, 3))
    odd = {"epoch": 4, "loss": float("nan"), "val_clean": 0.4, "load": [0.5, 0.5]}
    recipe = {"validation": {"epoch": 3}}
    checkpoint = replace(store.stored[0].checkpoint, training_log=(*log, odd), recipe=recipe)
    store.stored[0] = replace(store.stored[0], checkpoint=checkpoint)
    (panel,) = page_of(store).details.histories.values()
    assert panel.chart is not None
    assert series(panel.chart, "clean", "line") == [[1, 10.0], [2, 20.0], [3, 30.0], [4, 40.0]]
    assert len(series(panel.chart, "training loss", "line")) == 3
    assert panel.chart.option["series"][1]["markLine"]["data"] == [{"xAxis": 3}]
    assert panel.chart.head == ("epoch", "loss", "val_clean", "val_robust", "load")
    assert panel.chart.rows[-1] == ("4", "nan", "0.4", "—", "0.5, 0.5")
    for text in re.findall(r'<script type="application/json">(.*?)</script>', html_of(store), re.DOTALL):
        json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    store.stored[0] = replace(store.stored[0], checkpoint=replace(checkpoint, training_log=log[:1]))
    assert "Not shown: the training log has" in html_of(store)

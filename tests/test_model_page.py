"""The model page: its numbers against direct computation, what is escaped, what is absent, and its pictures."""

from __future__ import annotations

import hashlib
import io
import json
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_store import FakeStore, claim, demo, example, first_broken, model, outcomes, protocol, routing
from PIL import Image
from test_report import HOSTILE, hostile_store

from moebench.metrics import wilson
from moebench.report import examples, render, tables, write_report
from moebench.report.charts import Chart
from moebench.report.model_page import SettingPage
from moebench.report.per_class import MOST
from moebench.report.routing_shift import WIDE
from moebench.schema import ExpertChoice, RoutingLayer, StoredResult


def page_of(store: FakeStore, name: str = "a") -> tables.ModelPage:
    return next(page for page in tables.build(store).models if page.model.name == name)


def setting_of(store: FakeStore, name: str = "a") -> SettingPage:
    return page_of(store, name).details.settings[0]


def html_of(store: FakeStore, name: str = "a") -> str:
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


# Experts and routing


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


# Pictures


def with_pictures(**facts: Any) -> FakeStore:
    store = one_model(("autoattack",))
    store.pictures[1] = tuple(replace(example(number, number, number + 1), **facts) for number in range(3))
    return store


@pytest.mark.parametrize("inline", [True, False])
def test_pictures_decode_to_the_images_and_the_magnified_perturbation(
    monkeypatch: pytest.MonkeyPatch, inline: bool
) -> None:
    monkeypatch.setattr(examples, "INLINE", 1024 if inline else 0)
    store = with_pictures()
    page, files = page_of(store), render(store)
    ((gallery,),) = (one.galleries for one in page.details.settings)
    assert gallery.factor == "× 2.5"
    for given, shown in zip(store.pictures[1], gallery.shown, strict=True):
        wanted = (given.clean, 0.5 + 2.5 * (given.adversarial.astype(float) - given.clean), given.adversarial)
        for image, picture in zip(wanted, shown.pictures, strict=True):
            assert picture.path.startswith("data:") == inline
            content = b64decode(picture.path.partition(",")[2]) if inline else files[f"models/{picture.path}"]
            assert isinstance(content, bytes)
            pixels = np.asarray(Image.open(io.BytesIO(content)))
            assert np.array_equal(pixels, np.clip(np.rint(image[0] * 255), 0, 255))
            assert (picture.width, picture.height, picture.tiny) == (96, 96, True)


def test_a_colour_picture_keeps_its_channels_and_a_large_one_is_made_smaller_by_the_page() -> None:
    image = np.random.default_rng(3).random((3, 300, 400)).astype(np.float32)
    pixels = np.asarray(Image.open(io.BytesIO(examples.png(image))))
    assert np.array_equal(pixels, np.rint(image.astype(float) * 255).transpose(1, 2, 0))
    store = with_pictures(clean=image, adversarial=image)
    shown = setting_of(store).galleries[0].shown[0].pictures[0]
    assert (shown.width, shown.height, shown.tiny) == (192, 144, False)


@pytest.mark.parametrize(
    ("norm", "eps", "largest", "factor"),
    [("Linf", 0.2, 0.1, 2.5), ("Linf", 8 / 255, 0.01, 15.0), ("L2", 0.5, 0.07, 7.1), ("L2", 0.5, 0.0, 1.0)],
)
def test_a_perturbation_is_magnified_to_the_range_of_its_ball(
    norm: Any, eps: float, largest: float, factor: float
) -> None:
    clean = np.full((1, 4, 4), 0.5, np.float32)
    moved = clean.copy()
    moved[0, 1, 2] += largest
    one = replace(example(0, 0, 1), clean=clean, adversarial=moved)
    assert examples.magnification(one, protocol(norm=norm, eps=eps).threat) == factor


def test_images_that_are_neither_grey_nor_rgb_are_not_shown_with_the_reason() -> None:
    store = with_pictures(clean=np.zeros((4, 8, 8), np.float32), adversarial=np.zeros((4, 8, 8), np.float32))
    assert "Not shown: images of 4 channels are neither grey nor RGB" in html_of(store)
    assert not [path for path in render(store) if path.endswith(".png")]


def test_an_example_names_its_classes_predictions_and_experts() -> None:
    tokens = ExpertChoice("blocks.1", before=(0, 1, 2), after=(0, 2, 1), per_token=True)
    store = with_pictures(experts=(ExpertChoice("moe", (2, 0), (1, 0)), ExpertChoice("top", (3,), (3,)), tokens))
    page = " ".join(html_of(store).split())
    assert "Sample 1, class 1; broken by apgd-ce, Linf distance 0.2." in page
    assert "clean: <b>1</b>" in page
    assert "adversarial: <b>2</b>" in page
    assert "moe 2, 0 → 1, 0; top 3 (unchanged); blocks.1 2 of 3 tokens go to another first expert" in page
    assert 'alt="sample 1, adversarial: seen as 2"' in page
    assert page.count('loading="lazy"') == 9


def test_pictures_of_an_earlier_report_go_and_foreign_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "INLINE", 0)
    store = with_pictures()
    written = write_report(store, tmp_path)
    pictures = {path for path in written if path.suffix == ".png"}
    assert pictures
    assert all(path.parent == tmp_path / "models" / examples.FOLDER for path in pictures)
    foreign = tmp_path / "models" / examples.FOLDER / "mine.png"
    Image.new("L", (2, 2)).save(foreign)
    store.pictures.clear()
    write_report(store, tmp_path)
    assert list(foreign.parent.iterdir()) == [foreign]


def test_without_pictures_the_page_says_why() -> None:
    assert "Not shown: the store holds no pictures of these results" in html_of(one_model())


# Training, cost, origins


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


def test_losses_are_shown_where_they_were_kept_and_else_a_dash_with_the_reason() -> None:
    store = FakeStore()
    stages = {"clean": {"loss": 0.1234, "loss_attacked": 2.5}}
    store.add(model("a"), "pgd-50", first_broken(200, 40), stages=stages)
    store.add(model("a"), "autoattack", first_broken(200, 50))
    page = html_of(store)
    assert '<td class="num" data-sort="0.1234">0.123</td>' in page
    assert '<td class="num" data-sort="2.5">2.500</td>' in page
    assert page.count('title="this result was made before losses were kept">—</abbr>') == 2


def test_the_cost_of_an_attack_is_also_told_per_sample() -> None:
    page = html_of(one_model(("autoattack",)))
    assert '<td class="num" data-sort="271.605">272</td>' in page
    assert '<td class="num" data-sort="0.0625">62.5 ms</td>' in page


def test_provenance_tells_what_results_share_and_where_they_differ() -> None:
    store = one_model()
    store.stored[1] = replace(store.stored[1], environment={**store.stored[1].environment, "device": "cuda"})
    git = {"commit": "abc123", "dirty": True}
    store.stored = [replace(one, environment={**one.environment, "git": git}) for one in store.stored]
    facts = dict(setting_of(store).origins)
    assert facts["device"] == ("cpu", "cuda")
    assert facts["git commit"] == ("abc123 with changes",)
    assert facts["finished"] == ("2026-01-02 03:04:01 UTC to 2026-01-02 03:04:02 UTC",)
    assert not {"host", "process"} & set(facts)


def test_the_page_reads_from_the_headline_to_the_details() -> None:
    store = demo(60)
    page = html_of(store, "st-moe")
    order = ["standing", "attacks", "curves", "classes", "experts", "routing", "examples", "claims", "results", "cost"]
    order += ["training", "reproduce", "provenance"]
    places = [page.index(f'<section id="{name}">') for name in order]
    assert places == sorted(places)
    assert page.index("RA-worst: all attacks together") < page.index("Reasons for doubt") < places[1]
    links = set(re.findall(r'href="#([\w-]+)"', page)) - {"content"}
    assert links >= set(order)
    assert all(f'id="{link}"' in page for link in links)


def test_other_radii_are_folded_and_the_leading_one_is_first() -> None:
    store = FakeStore()
    for eps in (0.1, 0.2, 0.3):
        store.add(model("a"), "autoattack", first_broken(200, 40), on=protocol(eps=eps))
    own = store.stored[1]
    assert "--eps" not in own.command
    for place in (0, 2):
        one = store.stored[place]
        store.stored[place] = replace(one, command=f"{one.command} --eps {one.protocol.threat.eps}")
    pages = page_of(store).details.settings
    assert [page.setting.protocol.threat.eps for page in pages] == [0.2, 0.1, 0.3]
    assert [page.setting.leads for page in pages] == [True, False, False]
    assert "<summary>digits, Linf 0.1</summary>" in html_of(store)


def test_a_model_that_only_failed_has_a_page() -> None:
    store, scratch = FakeStore(), FakeStore()
    scratch.add(model("a"), "autoattack", first_broken(200, 10))
    store.add_run(scratch.stored[0], "failed", error="loss is NaN")
    page = html_of(store)
    assert "loss is NaN" in page
    assert 'id="attacks"' not in page


def test_results_of_other_engines_alone_make_no_figures() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 10), engine="reference")
    assert page_of(store).details.settings == ()
    assert "not in the leaderboard" in html_of(store)


# Escaping


class Elements(HTMLParser):
    """The elements of a page, its event handlers, and the JSON of its charts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def hostile(names: tuple[str, ...]) -> FakeStore:
    """One model per name, which is also the name of all that is named of it."""
    store = FakeStore()
    for name in names:
        scratch = hostile_store(name)
        for one in scratch.stored:
            classes = tuple(f"{name}{number}" for number in range(10))
            number = len(store.stored) + 1
            stored = replace(one, result_id=number, protocol=replace(one.protocol, class_names=classes))
            store.stored.append(stored)
            store.evidence[number] = scratch.evidence[one.result_id]
            store.classes[one.protocol.data_sha256] = np.arange(200) % 10
            choice = (ExpertChoice(name, (0,), (1,)),)
            store.pictures[number] = (replace(example(1, 1, 2), stage=name, experts=choice),)
        store.published += scratch.published
        store.made += scratch.made
    return store


def texts(value: Any) -> set[str]:
    """All strings inside a JSON value."""
    if isinstance(value, str):
        return {value}
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {text for item in items for text in texts(item)}


def test_hostile_names_are_text_and_their_charts_are_json() -> None:
    files = render(hostile(("plain", *HOSTILE)))
    pages = [page for path, page in files.items() if re.fullmatch(r"models/[^/]*html", path)]
    assert len(pages) == 1 + len(HOSTILE)
    plain = Elements(str(files["models/plain.html"])).seen
    left = set(HOSTILE)
    for page in pages:
        found = Elements(str(page))
        assert (set(found.seen), found.seen.count("script")) == (set(plain), plain.count("script"))
        assert found.handlers == []
        charts = re.findall(r'<script type="application/json">(.*?)</script>', str(page), re.DOTALL)
        written = {text for chart in charts for text in texts(json.loads(chart))}
        left -= {name for name in left if f"{name}3" in written}
    assert left == set()
    assert all(re.fullmatch(r"models/pictures/[0-9a-f]{20}\.png", path) for path in files if path.endswith(".png"))


def test_the_same_store_gives_the_same_pages_in_whatever_order_it_answers() -> None:
    store = demo(60)
    store.pictures = {one.result_id: (example(1, 1, 2), example(2, 2, 5)) for one in store.stored}
    mixed = replace(store, stored=store.stored[::-1], published=store.published[::-1], made=store.made[::-1])
    assert render(store) == render(mixed)

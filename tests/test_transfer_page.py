"""The transfer page: its numbers are those of the outcomes, its words follow from them, and names stay text."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
from fake_store import FakeStore, first_broken, model, protocol
from page_stores import N, add_transfer, broke, transfer_store, wrong_clean
from scipy.stats import binomtest  # type: ignore[import-untyped]

from moebench.metrics import Measure, wilson
from moebench.report import heatmap, render, transfer_page, transfers
from moebench.report.transfers import TransferBoard, attack_title


def board_of(store: FakeStore) -> TransferBoard:
    (board,) = transfers.build(store)
    return board


def names(board: TransferBoard) -> tuple[list[str], list[str]]:
    return [one.name for one in board.sources], [one.name for one in board.targets]


def test_a_pair_is_the_targets_robust_accuracy_on_the_sources_images() -> None:
    board = board_of(transfer_store())
    assert names(board) == (["a", "b", "a/expert[0]"], ["a", "b", "a/expert[0]"])
    left = {at: pair.accuracy.k for at, pair in board.pairs.items()}
    assert left == {
        **{(0, 0): N - 8, (0, 1): N - 4, (0, 2): N - 4},
        **{(1, 0): N - 8, (1, 1): N - 16, (1, 2): N - 8},
        **{(2, 0): N - 12, (2, 1): N - 12, (2, 2): N - 24},
    }
    assert {at for at, pair in board.pairs.items() if pair.white_box} == {(0, 0), (1, 1), (2, 2)}
    assert {at: found.k for at, found in board.together.items()} == {0: N - 12, 1: N - 16, 2: N - 24}


def test_success_counts_samples_that_both_get_right_clean() -> None:
    store = FakeStore()
    add_transfer(store, "a", "a", broke(0, 1, 2))
    wrong_clean(store, broke(0, 1))
    add_transfer(store, "a", "b", broke(1, 2, 3, 4))
    wrong_clean(store, broke(2))
    board = board_of(store)
    pair = board.pairs[0, 1]
    # a is wrong on 0 and 1, b on 2: of the other 37 samples 3 and 4 fall.
    assert pair.success == Measure(2, N - 3)
    assert pair.accuracy == Measure(N - 4, N)
    assert transfer_page.clean(board, 1) == Measure(N - 1, N)
    assert "fool it on 5.4 % " in transfer_page.pair_words(board, (0, 1))


def test_without_the_sources_predictions_there_is_no_success_rate() -> None:
    store = FakeStore()
    add_transfer(store, "elsewhere", "b", broke(1))
    board = board_of(store)
    assert board.pairs[0, 0].success is None
    assert board.white_box_points is None
    page = render(store)["transfer.html"]
    assert "does not know what the source gets right clean" in page


def test_which_source_transfers_best_is_judged_on_the_same_targets() -> None:
    """Source b costs more points than a only because it is judged on the weak target, and a is not."""
    store = FakeStore()
    costs = {
        **{("a", "b"): 6, ("b", "a"): 2, ("c", "a"): 2, ("c", "b"): 4},
        **{("b", "weak"): 30, ("c", "weak"): 30},
    }
    for (source, target), count in costs.items():
        add_transfer(store, source, target, broke(*range(count)))
    board = board_of(store)
    by_name = {reach.source.name: reach for reach in board.reaches}
    assert by_name["a"].points == pytest.approx(100 * 6 / N)
    assert by_name["b"].points == pytest.approx(100 * fmean([2, 30]) / N)
    assert by_name["a"].beyond == pytest.approx(100 * (6 - 5) / N)
    assert by_name["b"].beyond == pytest.approx(0)
    assert board.reaches[0].source.name == "a"
    said = transfer_page.message(board)
    assert said[0].startswith(
        "Images made on a transfer best: they cost one other model 15.0 points of accuracy, 2.5 more"
    )


def test_a_models_own_parts_are_no_other_models_unless_there_is_nothing_else() -> None:
    store = FakeStore()
    add_transfer(store, "a/expert[0]", "a", broke(*range(20)))
    add_transfer(store, "a/expert[0]", "b", broke(*range(2)))
    add_transfer(store, "b", "a", broke(0))
    assert {reach.source.name: reach.targets for reach in board_of(store).reaches} == {"a/expert[0]": 1, "b": 1}
    alone = FakeStore()
    add_transfer(alone, "a/expert[0]", "a/expert[1]", broke(*range(20)))
    assert [reach.points for reach in board_of(alone).reaches] == [50.0]


def test_foreign_images_that_break_more_than_the_own_are_said_with_a_corrected_p() -> None:
    store = FakeStore()
    add_transfer(store, "a", "a", broke(0, 1))
    add_transfer(store, "b", "a", broke(*range(1, 21)))
    add_transfer(store, "c", "a", broke(0, 1, 2))
    (one,) = board_of(store).surprises
    assert (one.source.name, one.target.name) == ("b", "a")
    assert one.p == pytest.approx(2 * binomtest(1, 20, 0.5).pvalue)
    assert "a sign of masked gradients" in render(store)["transfer.html"]


def test_boards_differ_by_samples_attack_and_seed() -> None:
    store = FakeStore()
    add_transfer(store, "a", "b", broke(0))
    add_transfer(store, "a", "b", broke(0), attack="apgd-ce")
    add_transfer(store, "a", "b", broke(0), seed=1)
    add_transfer(store, "a", "b", first_broken(50, 3))
    boards = transfers.build(store)
    assert len(boards) == 4
    assert len({board.anchor for board in boards}) == 4


def test_the_newest_result_of_a_pair_counts_and_other_weights_are_other_models() -> None:
    store = FakeStore()
    add_transfer(store, "a", "b", broke(0))
    add_transfer(store, "a", "b", broke(0, 1))
    old = add_transfer(store, "a", "b", broke(0, 1, 2))
    store.stored[-1] = replace(old, checkpoint=replace(old.checkpoint, sha256="f" * 64))
    board = board_of(store)
    assert len(board.targets) == 2
    assert sorted(pair.accuracy.k for pair in board.pairs.values()) == [N - 3, N - 2]
    assert all(one.label.startswith("b · ") for one in board.targets)


def test_the_page_has_the_matrix_with_intervals_marks_the_diagonal_and_says_what_is_missing() -> None:
    store = transfer_store()
    store.stored = [
        one for one in store.stored if (one.model.name, attack_title(one)) != ("b", "transfer from a (pgd-50)")
    ]
    page = render(store)["transfer.html"]
    low, high = wilson(N - 8, N)
    assert f'<span class="v">80.0</span><span class="ci">{100 * low:.1f}–{100 * high:.1f}</span>' in page
    assert page.count('<td class="num own"') == 6
    assert "not measured: images of this source have not been judged on this target" in page
    option = json.loads(page.split('<script type="application/json">')[1].split("</script>")[0])
    data = option["series"][0]["data"]
    assert len(data) == 8
    assert {tuple(one["value"][:2]) for one in data if "itemStyle" in one} == {(0, 0), (1, 1), (2, 2)}


def test_parts_have_no_page_and_no_link() -> None:
    page = render(transfer_store())["transfer.html"]
    assert '<a href="models/a.html"><bdi>a</bdi></a>' in page
    assert "<bdi>a/expert[0]</bdi>" in page
    assert "expert%5B0%5D" not in page


def test_csv_has_a_row_per_pair_with_fractions() -> None:
    rows = list(csv.DictReader(io.StringIO(render(transfer_store())["data/transfer.csv"])))
    assert len(rows) == 9
    row = next(row for row in rows if (row["source"], row["target"]) == ("b", "a"))
    assert (row["accuracy"], row["success_rate"], row["success_n"], row["white_box"]) == (
        "0.800000",
        "0.200000",
        "40",
        "no",
    )
    assert all(float(row["ci_low"]) <= float(row["accuracy"]) <= float(row["ci_high"]) for row in rows)


def test_without_transfer_results_the_page_says_how_to_get_them() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 40))
    for files in (render(FakeStore()), render(store)):
        assert "The store holds no transfer results yet" in files["transfer.html"]
        assert "<figure" not in files["transfer.html"]
        assert files["data/transfer.csv"].count("\n") == 1


def test_one_model_on_itself_is_a_page_without_a_best_source() -> None:
    store = FakeStore()
    add_transfer(store, "a", "a", broke(0))
    page = render(store)["transfer.html"]
    assert "transfer best" not in page
    assert page.count("<figure") == 1


def test_an_empty_sample_set_makes_no_pair() -> None:
    store = FakeStore()
    add_transfer(store, "a", "b", np.zeros(0, dtype=np.bool_))
    store.stored[-1] = replace(store.stored[-1], protocol=protocol(n=0))
    assert board_of(store).pairs == {}
    assert "transfer.html" in render(store)


def test_inks_are_legible_on_every_colour_of_the_scale() -> None:
    for ramp in (heatmap.RAMP, heatmap.RAMP[::-1]):
        for percent in np.linspace(0, 100, 401):
            ground = heatmap.luminance(heatmap.colour(float(percent), ramp))
            ink = heatmap.luminance(heatmap.channels(heatmap.ink(float(percent), ramp)))
            assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 4.5


def test_a_run_of_several_transfers_names_its_sources() -> None:
    store = transfer_store()
    assert attack_title(store.stored[0]) == "transfer from a (pgd-50)"
    assert attack_title(store.add(model("a"), "fgsm", broke(0))) == "fgsm"

"""Ranks: who takes one, by which number, and over which distance two models count as equal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_store import FakeStore, first_broken, model, protocol, routing
from report_parts import board_of, row_of

from moebench.metrics import Measure, paired
from moebench.report import render, tables
from moebench.report.ranks import p_values, rank_ranges
from moebench.schema import RoutingLayer


def test_ranks_follow_the_worst_case_and_not_the_whole_model() -> None:
    store = FakeStore()
    for name, whole, experts in (("flattered", 40, 90), ("honest", 60, 50)):
        for attack in ("autoattack", "moe-adaptive"):
            store.add(model(name), attack, first_broken(200, whole))
        store.add(model(name), "pgd-50", first_broken(200, experts), "experts")
    board = board_of(store)
    assert [(row.model.name, row.rank) for row in board.ranked] == [("honest", 1), ("flattered", 2)]
    assert board.ranked[1].ra.measure == Measure(160, 200)
    assert board.ranked[1].worst.measure == Measure(110, 200)


def test_ra_is_the_sample_wise_worst_over_whole_view_attacks() -> None:
    store, first = FakeStore(), first_broken(200, 50)
    store.add(model("a"), "autoattack", first)
    store.add(model("a"), "pgd-50", first[::-1].copy())
    row = row_of(store, "a")
    assert row.ra.measure == Measure(100, 200)
    assert [cell.measure for cell in row.attacks] == [Measure(150, 200)] * 2
    assert board_of(store).attacks == ("pgd-50", "autoattack")


def test_equal_numbers_share_a_rank_and_the_next_one_counts_both() -> None:
    store = FakeStore()
    for name, broken in (("a", 10), ("b", 10), ("c", 20)):
        store.add(model(name, "dense"), "autoattack", first_broken(200, broken))
    assert [row.rank for row in board_of(store).ranked] == [1, 1, 3]


@pytest.mark.parametrize("view", ["whole", "experts"])
def test_without_autoattack_on_the_whole_model_there_is_no_rank(view: str) -> None:
    store = FakeStore()
    store.add(model("a"), "pgd-50" if view == "whole" else "autoattack", first_broken(200, 0), view)
    store.add(model("b", "dense"), "autoattack", first_broken(200, 150))
    board = board_of(store)
    assert [(row.model.name, row.rank) for row in board.rows] == [("b", 1), ("a", None)]
    assert board.unranked[0].unranked == "autoattack and moe-adaptive have not been run on the whole model"
    assert "Not ranked: autoattack and moe-adaptive have not been run" in render(store)["index.html"]


@pytest.mark.parametrize(
    ("family", "layers", "routed"),
    [
        *(("moe", (), True), ("dual", (), True), ("external", (routing(),), True)),
        *(("dense", (), False), ("ensemble", (), False), ("external", (), False)),
    ],
)
def test_a_model_with_routing_takes_a_rank_only_with_moe_adaptive_on_the_whole(
    family: str, layers: tuple[RoutingLayer, ...], routed: bool
) -> None:
    store, who = FakeStore(), model("a", family)
    store.add(who, "autoattack", first_broken(200, 20), layers=layers)
    store.add(who, "moe-adaptive", first_broken(200, 20), "experts")
    row = row_of(store, "a")
    assert row.unranked == ("moe-adaptive has not been run on the whole model" if routed else None)
    assert row.rank == (None if routed else 1)
    store.add(who, "moe-adaptive", first_broken(200, 20))
    assert row_of(store, "a").rank == 1


def test_a_board_gives_every_reason_for_having_no_rank() -> None:
    store = FakeStore()
    for name, family, attack in (("a", "moe", "autoattack"), ("b", "dense", "pgd-50"), ("c", "dual", "autoattack")):
        store.add(model(name, family), attack, first_broken(200, 10))
    page = render(store)["index.html"]
    assert "Not ranked: autoattack has not been run on the whole model (1 model, at the end of the table); " in page
    assert "moe-adaptive has not been run on the whole model (2 models)." in page


@pytest.mark.parametrize("cell", [{"engine": "reference"}, {"precision": "bfloat16-only"}])
def test_other_engines_and_quick_looks_stay_out_of_the_table_but_on_the_page(cell: dict[str, Any]) -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 20))
    store.add(model("a"), "autoattack", first_broken(200, 199), **cell)
    assert row_of(store, "a").worst.measure == Measure(180, 200)
    assert board_of(store).left_out == 1
    files = render(store)
    assert "1 result of other engines or of quick looks in bfloat16 is not in this table" in files["index.html"]
    assert "not in the leaderboard" in files["models/a.html"]


@pytest.mark.parametrize(
    "other",
    [
        replace(protocol(), version="2"),
        replace(protocol(), split="train"),
        replace(protocol(), data_sha256="0" * 64),
        protocol("svhn"),
        protocol(norm="L2"),
        protocol(eps=0.1),
    ],
    ids=["version", "split", "data", "dataset", "norm", "eps"],
)
def test_numbers_of_unlike_protocols_are_never_ranked_together(other: Any) -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 20), on=protocol())
    store.add(model("b"), "autoattack", first_broken(200, 30), on=other)
    boards = tables.build(store).boards
    assert [len(board.rows) for board in boards] == [1, 1]
    assert len({board.anchor for board in boards}) == 2


def test_two_checkpoints_of_a_model_are_two_rows_told_apart_by_their_weights() -> None:
    store = FakeStore()
    store.add(model("a", "dense"), "autoattack", first_broken(200, 20), weights="one")
    store.add(model("a", "dense"), "autoattack", first_broken(200, 30), weights="two")
    labels = [row.label for row in board_of(store).ranked]
    assert len(set(labels)) == 2
    assert all(label.startswith("a · ") for label in labels)


def test_a_failed_run_is_on_the_page_and_takes_no_rank() -> None:
    store, scratch = FakeStore(), FakeStore()
    scratch.add(model("a"), "autoattack", first_broken(200, 10))
    store.add_run(scratch.stored[0], "failed", error="loss is NaN at step 3")
    files = render(store)
    assert "loss is NaN at step 3" in files["models/a.html"]
    assert "nothing to rank" in files["index.html"]


# Ranges of ranks


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

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import (
    N,
    finish_cell,
    make_cell,
    make_checkpoint,
    make_chunk,
    make_model,
    make_protocol,
    make_record,
    make_routing,
    make_run_start,
)

from moebench.errors import RunError, UsageError
from moebench.schema import Flag
from moebench.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "r.db", write=True) as opened:
        opened.begin_run(make_run_start())
        yield opened


def change(tmp_path: Path, statement: str, *values: Any) -> None:
    """Edits the database behind the store's back."""
    with sqlite3.connect(tmp_path / "r.db") as connection:
        connection.execute(statement, values)
    connection.close()


def test_what_went_in_comes_out(tmp_path: Path) -> None:
    start, cell = make_run_start(), make_cell()
    chunks = [make_chunk(broken={0}), make_chunk("apgd-ce", range(1, N), broken={3})]
    record = make_record(chunks)
    flags = (Flag("masking", "square beats pgd by 3 points"),)
    with Store.open(tmp_path / "r.db", write=True) as store:
        store.begin_run(start)
        assert store.run("run-1").status == "running"
        result_id = finish_cell(store, "run-1", cell, chunks)
        store.finish_run("run-1", "done", seconds=2.5, flags=flags)
    with Store.open(tmp_path / "r.db", write=False) as store:
        run, (result,) = store.run("run-1"), store.results()
        assert store.runs() == [run]
        assert store.reusable("cell-1") == result
        assert store.reusable("cell-2") is None
    assert run.results == (result,)
    assert (run.status, run.seconds, run.error, run.flags, run.reused) == ("done", 2.5, None, flags, 0)
    assert (run.model, run.checkpoint, run.protocol) == (start.model, start.checkpoint, start.protocol)
    assert (run.environment, run.command) == (start.environment, start.command)
    assert run.finished_at is not None and run.started_at < result.finished_at < run.finished_at
    assert (result.result_id, result.run_id, result.cell, result.record) == (result_id, "run-1", cell, record)
    assert (result.model, result.checkpoint, result.protocol) == (start.model, start.checkpoint, start.protocol)
    assert (result.command, result.environment) == (start.command, start.environment)


def test_undefined_numbers_come_back_undefined(store: Store) -> None:
    (layer,) = make_routing()
    chunks = [make_chunk()]
    routing = (replace(layer, iou=math.nan, load_adv=(math.nan, 1.0)),)
    record = make_record(
        chunks, changed_predictions=math.nan, routing=routing, stages={"gain": math.inf, "k": np.int64(3)}
    )
    result_id, _ = store.open_cell("run-1", make_cell(), resume=False)
    store.append_chunk(result_id, chunks[0])
    store.finish_cell(result_id, record)
    got = store.results()[0].record
    assert math.isnan(got.changed_predictions)
    assert math.isnan(got.routing[0].iou) and math.isnan(got.routing[0].load_adv[0])
    assert (got.routing[0].changed, got.routing[0].load_adv[1]) == (layer.changed, 1.0)
    assert got.stages == {"gain": None, "k": 3}


def test_text_that_is_not_utf8_is_kept_readable(store: Store) -> None:
    store.begin_run(
        make_run_start("run-2", command="moebench evaluate --model caf\udce9.py", environment={"a": "b\x00c"})
    )
    store.finish_run("run-2", "failed", seconds=1, error="no file caf\udce9.py\x00")
    run = store.run("run-2")
    assert run.command == r"moebench evaluate --model caf\udce9.py"
    assert (run.error, run.environment) == (r"no file caf\udce9.py\x00", {"a": r"b\x00c"})


def test_models_that_share_weights_keep_their_own_facts(store: Store) -> None:
    soft = make_checkpoint("toy-soft", active_parameters=7)
    store.begin_run(make_run_start("run-2", model=make_model("toy-soft", routing="soft"), checkpoint=soft))
    assert store.run("run-1").checkpoint == make_checkpoint()
    assert store.run("run-2").checkpoint == soft
    assert store.run("run-2").model.routing == "soft"


def test_same_facts_are_one_row(store: Store, tmp_path: Path) -> None:
    store.begin_run(make_run_start("run-2"))
    with sqlite3.connect(tmp_path / "r.db") as connection:
        for table in ("model", "checkpoint", "protocol"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (1,)
    connection.close()


def test_a_fresh_result_is_a_new_row_and_the_old_one_stays(store: Store) -> None:
    old = finish_cell(store, "run-1", make_cell())
    new = finish_cell(store, "run-1", make_cell(), [make_chunk(broken={0, 1, 2})])
    newest = store.reusable("cell-1")
    assert newest is not None and (newest.result_id, newest.record.accuracy) == (new, 5 / 8)
    assert [result.result_id for result in store.results()] == [new]
    assert [result.result_id for result in store.results(newest_only=False)] == [new, old]
    assert [result.result_id for result in store.run("run-1").results] == [old, new]


def test_a_reused_result_is_shown_by_both_runs(store: Store) -> None:
    result_id = finish_cell(store, "run-1", make_cell())
    store.begin_run(make_run_start("run-2"))
    store.link_reused("run-2", result_id)
    store.link_reused("run-2", result_id)
    own = finish_cell(store, "run-2", make_cell("cell-2"))
    run = store.run("run-2")
    assert [(result.result_id, result.run_id) for result in run.results] == [(result_id, "run-1"), (own, "run-2")]
    assert (run.reused, store.run("run-1").reused) == (1, 0)


def test_an_unfinished_result_is_neither_shown_nor_reused(store: Store) -> None:
    result_id, _ = store.open_cell("run-1", make_cell(), resume=False)
    store.append_chunk(result_id, make_chunk())
    assert store.results() == [] and store.reusable("cell-1") is None and store.run("run-1").results == ()
    with pytest.raises(RunError, match=f"result {result_id} is not finished, so run run-1 cannot reuse it"):
        store.link_reused("run-1", result_id)
    with pytest.raises(RunError, match="result 99 is not finished"):
        store.link_reused("run-1", 99)


def test_results_are_filtered_and_ordered_by_what_they_say(store: Store) -> None:
    other = make_run_start(
        "run-2",
        model=make_model("another"),
        checkpoint=make_checkpoint("another", sha256="ef" * 32),
        protocol=make_protocol(dataset="cifar-10"),
    )
    store.begin_run(other)
    for run_id in ("run-1", "run-2"):
        for attack, view in (("pgd-50", "router"), ("pgd-50", "experts"), ("apgd-ce", "whole")):
            finish_cell(store, run_id, make_cell(f"{run_id} {attack} {view}", attack=attack, view=view))
    by_name = [("apgd-ce", "whole"), ("pgd-50", "experts"), ("pgd-50", "router")]
    shown = [(result.protocol.dataset, result.cell.attack, result.cell.view) for result in store.results()]
    assert shown == [("cifar-10", *pair) for pair in by_name] + [("digits", *pair) for pair in by_name]
    for wanted in ({"dataset": "cifar-10"}, {"model": "another"}, {"checkpoint_sha": "ef" * 32}):
        assert {result.run_id for result in store.results(**wanted)} == {"run-2"}  # type: ignore[arg-type]
    assert store.results(dataset="digits", model="another") == []


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (make_chunk("apgd-ce", [5, 2]), "sample 2 would be in stage 'apgd-ce' twice"),
        (make_chunk("fab-t", [4, 4]), "sample 4 would be in stage 'fab-t' twice"),
        (make_chunk("fab-t", [N]), f"names sample {N}, but the protocol has samples 0 to {N - 1}"),
        (make_chunk("fab-t", [-1]), "index of a chunk of stage 'fab-t' holds a negative number"),
        (make_chunk("fab-t", [1], distance=np.array([np.nan], np.float32)), "distance .* negative number or NaN"),
        (make_chunk("fab-t", [1], forwards=np.array([1, 2])), "flat and equally long"),
        (make_chunk("fab-t", [1], adv_pred=np.array([0.5])), "adv_pred .* must hold whole numbers, got float64"),
    ],
)
def test_a_chunk_that_cannot_be_is_refused_and_leaves_no_trace(store: Store, chunk: Any, message: str) -> None:
    result_id, _ = store.open_cell("run-1", make_cell(), resume=False)
    store.append_chunk(result_id, make_chunk())
    store.append_chunk(result_id, make_chunk("apgd-ce", [1, 2], broken={2}))
    before = store.outcomes(result_id)
    with pytest.raises(RunError, match=message):
        store.append_chunk(result_id, chunk)
    np.testing.assert_array_equal(store.outcomes(result_id).forwards, before.forwards)
    store.append_chunk(result_id, make_chunk("apgd-ce", [3]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": 1.0}, r"accuracy is 1, its samples give 6/8 = 0.75"),
        ({"accuracy": math.nan}, "accuracy is nan"),
        ({"clean_accuracy": 0.5}, r"clean accuracy is 0.5, its samples give 7/8"),
        ({"n": N - 1}, f"n is {N - 1}, its protocol has {N} samples"),
        ({"view": "router"}, "it is of pgd-10 on router"),
    ],
)
def test_an_aggregate_that_contradicts_its_samples_is_refused(store: Store, changes: Any, message: str) -> None:
    chunks = [make_chunk(broken={0}), make_chunk("apgd-ce", range(1, N), broken={3})]
    result_id, _ = store.open_cell("run-1", make_cell(), resume=False)
    for chunk in chunks:
        store.append_chunk(result_id, chunk)
    with pytest.raises(RunError, match=message):
        store.finish_cell(result_id, replace(make_record(chunks), **changes))
    assert store.results() == []
    store.finish_cell(result_id, make_record(chunks))
    with pytest.raises(RunError, match=r"is finished; open a cell"):
        store.append_chunk(result_id, make_chunk("fab-t", [1]))


def test_samples_that_were_never_judged_do_not_count_as_robust(store: Store) -> None:
    chunk = make_chunk(index=range(N - 1))
    result_id, _ = store.open_cell("run-1", make_cell(), resume=False)
    store.append_chunk(result_id, chunk)
    with pytest.raises(RunError, match=f"its chunks cover {N - 1} of {N} samples"):
        store.finish_cell(result_id, make_record([chunk], n=N))


def test_outcomes_of_a_result(store: Store) -> None:
    result_id = finish_cell(store, "run-1", make_cell())
    got = store.outcomes(result_id)
    assert got.index.tolist() == list(range(N))
    assert np.flatnonzero(got.broken).tolist() == [0, 3]
    assert got.stage == ("", "", "", "apgd-ce", "", "", "", "")
    assert got.adv_pred.tolist() == [2, 1, 1, 2, 1, 1, 1, 1]
    assert got.distance.tolist() == pytest.approx([0, 0, 0, 0.03, 0, 0, 0, 0])
    assert got.forwards.tolist() == [1] + [11] * 7 and got.backwards.tolist() == [0] + [10] * 7
    with pytest.raises(UsageError, match=r"no result 99 in '.*r\.db'"):
        store.outcomes(99)


def test_a_run_is_found_by_the_beginning_of_its_id(store: Store) -> None:
    for run_id in ("2024-aa-1", "2024-ab-2", "2024-ab-2-again"):
        store.begin_run(make_run_start(run_id))
    assert store.run("2024-aa").run_id == "2024-aa-1"
    assert store.run("2024-ab-2").run_id == "2024-ab-2"
    with pytest.raises(UsageError, match="run '2024-a' is ambiguous: 2024-aa-1, 2024-ab-2, 2024-ab-2-again; give more"):
        store.run("2024-a")
    with pytest.raises(UsageError, match=r"no run '2024-ac-1' in '.*'; did you mean 2024-aa-1"):
        store.run("2024-ac-1")
    with pytest.raises(UsageError, match=r"no run '' in .*; it has 2024-aa-1, .* and 1 more"):
        store.run("")


def test_run_ids_are_unique_and_a_run_ends_once(store: Store) -> None:
    with pytest.raises(RunError, match="run run-1 is already in"):
        store.begin_run(make_run_start())
    store.finish_run("run-1", "failed", seconds=1.0, error="killed")
    for act in (
        lambda: store.finish_run("run-1", "done", seconds=1.0),
        lambda: store.open_cell("run-1", make_cell(), resume=True),
    ):
        with pytest.raises(RunError, match=r"run run-1 has ended \(failed: killed\)"):
            act()
    with pytest.raises(RunError, match="there is no run run-9"):
        store.open_cell("run-9", make_cell(), resume=False)


def test_check_finds_nothing_in_a_sound_database(store: Store) -> None:
    finish_cell(store, "run-1", make_cell())
    store.open_cell("run-1", make_cell("cell-2"), resume=False)
    assert store.check() == []


@pytest.mark.parametrize(
    ("statement", "value", "problem"),
    [
        ("UPDATE result SET accuracy = ?", 0.9, "accuracy is 0.9, its samples give 6/8 = 0.75"),
        ("UPDATE result SET clean_accuracy = ?", 1.0, "clean accuracy is 1, its samples give 7/8 = 0.875"),
        ("UPDATE result SET forwards = ?", 5, "forwards is 5, its samples give 78"),
        ("UPDATE result SET n = ?", 5, "n is 5, its protocol has 8 samples"),
        ("UPDATE result SET backwards = ?", 5, "backwards is 5, its samples give 70"),
        ("UPDATE result SET ci_low = ?", 0.1, "lower end of its interval is 0.1, its samples give 0.409"),
        ("UPDATE result SET ci_high = ?", None, "upper end of its interval is nan, its samples give 0.928"),
        ("UPDATE result SET seconds = ?", 5.0, "seconds is 5, its samples give 1"),
        (
            "UPDATE result SET changed_predictions = ?",
            0.5,
            "share of changed predictions is 0.5, its samples give 0.125",
        ),
        (
            "UPDATE result SET stages = ?",
            '{"clean": {"attacked": 8}}',
            "its stages are clean, its samples have clean, ap",
        ),
        (
            "UPDATE result SET stages = ?",
            '{"clean": {"attacked": 8}, "apgd-ce": {"broken": 3}}',
            "broken of stage 'apgd-ce' is 3, its samples give 1",
        ),
        ("DELETE FROM chunk WHERE stage = ?", "clean", "its chunks cover 7 of 8 samples"),
        ("DELETE FROM run_result WHERE reused = ?", False, "run run-1 made it but does not show it"),
        ("UPDATE chunk SET n = ? WHERE stage = 'clean'", 3, "a chunk of stage 'clean' holds 8 samples, not 3"),
        ("UPDATE chunk SET arrays = ? WHERE stage = 'clean'", b"\x80\x04pickle", "a chunk of stage 'clean' is damaged"),
    ],
)
def test_check_finds_what_does_not_add_up(
    store: Store, tmp_path: Path, statement: str, value: Any, problem: str
) -> None:
    finish_cell(store, "run-1", make_cell())
    change(tmp_path, statement, value)
    found = store.check()
    assert any(line.startswith("result 1 (pgd-10 on whole): " + problem) for line in found), found


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE model SET family = 'dense'", "model 1 (toy-moe): its digest is not that of its fields"),
        ("UPDATE checkpoint SET flops = 3", "checkpoint 1 (of toy-moe): its digest is not that of its fields"),
        ("UPDATE protocol SET eps = 0.5", "protocol 1 (digits): its digest is not that of its fields"),
        ("UPDATE protocol SET eps = -1", "protocol 1 (digits): eps must be finite and not negative, got -1.0"),
        ("UPDATE protocol SET labels = x'00'", "protocol 1 (digits): labels are damaged"),
    ],
)
def test_check_recomputes_digests(store: Store, tmp_path: Path, statement: str, problem: str) -> None:
    change(tmp_path, statement)
    assert store.check()[0].startswith(problem)


def test_check_compares_labels_with_the_clean_pass(store: Store, tmp_path: Path) -> None:
    """Samples 0 to 7 are predicted as class 1, but for sample 0, which is wrong."""
    finish_cell(store, "run-1", make_cell())
    store.tell_labels(make_protocol(), np.array([0, 1, 1, 1, 1, 1, 1, 1]))
    assert store.check() == []
    change(tmp_path, "UPDATE protocol SET labels = NULL")
    store.tell_labels(make_protocol(), np.array([2, 1, 1, 1, 1, 1, 1, 1]))
    wrong = "result 1 (pgd-10 on whole): which samples are wrong from the start is not what the labels give"
    assert store.check() == [wrong]


def test_check_finds_dangling_references(store: Store, tmp_path: Path) -> None:
    change(tmp_path, "UPDATE run SET model_id = ?", 77)
    assert store.check() == ["run 1 refers to a model that does not exist"]

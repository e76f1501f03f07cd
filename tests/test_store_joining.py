"""Merging databases: all of one that another lacks, once, or nothing."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from builders import (
    N,
    finish_cell,
    make_cell,
    make_chunk,
    make_example,
    make_protocol,
    make_record,
    make_run_start,
    same_examples,
)

from moebench.errors import RunError, UsageError
from moebench.schema import Flag, ThreatModel
from moebench.store import Store
from moebench.store.joining import Merged

LABELS = np.ones(N, np.int64)


def sql(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def fill(path: Path, run_id: str, cell: str = "cell-1", broken: int = 3) -> None:
    """A finished run with one result, its picture, and the labels of its data."""
    chunks = [
        make_chunk(),
        make_chunk("apgd-ce", broken={broken}, examples=[make_example(broken, 1)]),
    ]
    with Store.open(path, write=True) as store:
        store.begin_run(make_run_start(run_id))
        finish_cell(store, run_id, make_cell(cell), chunks)
        store.finish_run(run_id, "done", seconds=1.0, flags=[Flag("code", "words")])


def merge(other: Path, into: Path) -> Merged:
    before = other.read_bytes()
    with Store.open(other, write=False) as source, Store.open(into, write=True) as store:
        merged = store.merge(source)
        assert store.check() == []
    assert other.read_bytes() == before
    return merged


def test_what_is_merged_is_all_there_and_the_second_time_adds_nothing(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.db", tmp_path / "theirs.db"
    fill(ours, "run-1")
    fill(theirs, "run-2", "cell-2")
    fill(theirs, "run-3", "cell-3", broken=5)
    with Store.open(theirs, write=True) as store:
        reused = store.reusable("cell-2")
        assert reused is not None
        store.begin_run(make_run_start("run-4", protocol=make_protocol(threat=ThreatModel("L2", 0.5))), LABELS)
        store.link_reused("run-4", reused.result_id)
        store.finish_run("run-4", "failed", seconds=2.0, error="out of memory")
    assert merge(theirs, ours) == Merged(runs=3, results=2)
    content = ours.read_bytes()
    assert merge(theirs, ours) == Merged(known_runs=3, known_results=2)
    assert ours.read_bytes() == content
    with Store.open(ours, write=False) as store, Store.open(theirs, write=False) as source:
        assert [run.run_id for run in store.runs()] == ["run-1", "run-2", "run-3", "run-4"]
        for run_id in ("run-2", "run-3", "run-4"):
            one, other = store.run(run_id), source.run(run_id)
            for name in set(vars(one)) - {"results"}:
                assert getattr(one, name) == getattr(other, name), name
            for mine, origin in zip(one.results, other.results, strict=True):
                assert {**vars(mine), "result_id": 0} == {**vars(origin), "result_id": 0}
                assert same_examples(store.examples(mine.result_id), source.examples(origin.result_id))
                assert len(store.examples(mine.result_id)) == 1
                for first, second in zip(
                    vars(store.outcomes(mine.result_id)).values(),
                    vars(source.outcomes(origin.result_id)).values(),
                    strict=True,
                ):
                    np.testing.assert_array_equal(first, second)
        # Labels belong to the data: the merged ones serve the run that had none.
        np.testing.assert_array_equal(store.labels(make_protocol()), LABELS)


def test_both_ways_give_the_same_runs(tmp_path: Path) -> None:
    paths = [tmp_path / "a.db", tmp_path / "b.db"]
    for number, path in enumerate(paths):
        fill(path, f"run-{number}", f"cell-{number}")
    merge(paths[0], paths[1])
    assert merge(paths[1], paths[0]) == Merged(runs=1, results=1, known_runs=1, known_results=1)
    found = []
    for path in paths:
        with Store.open(path, write=False) as store:
            found.append({(result.run_id, result.cell, result.record.accuracy) for result in map(_plain, store.runs())})
    assert found[0] == found[1]


def _plain(run: object) -> object:
    (result,) = run.results  # type: ignore[attr-defined]
    return type("Plain", (), {"run_id": result.run_id, "cell": result.cell.fingerprint, "record": result.record})


def test_a_cell_that_both_computed_stays_two_results(tmp_path: Path) -> None:
    ours, theirs, others = (tmp_path / f"{name}.db" for name in ("ours", "theirs", "others"))
    fill(ours, "run-1")
    fill(theirs, "run-2")
    fill(others, "run-3", broken=4)
    assert merge(theirs, ours) == Merged(runs=1, results=1)
    merged = merge(others, ours)
    assert merged.contradictions == ["pgd-10 on whole (cell-1…)"] and merged.results == 1
    with Store.open(ours, write=False) as store:
        assert len(store.results(newest_only=False)) == 3
        assert [result.run_id for result in store.results()] == ["run-3"]


def test_a_run_that_has_not_ended_is_completed_by_a_later_merge(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.db", tmp_path / "theirs.db"
    with Store.open(theirs, write=True) as source:
        source.begin_run(make_run_start("run-2"))
        finish_cell(source, "run-2", make_cell("cell-1"))
        left, _ = source.open_cell("run-2", make_cell("cell-2"), resume=False)
        chunks = [make_chunk(broken={0})]
        source.append_chunk(left, chunks[0])
        with Store.open(ours, write=True) as store:
            assert store.merge(source) == Merged(runs=1, results=1, unfinished=1)
            assert store.run("run-2").status == "running" and store.check() == []
        source.finish_cell(left, make_record(chunks))
        source.finish_run("run-2", "done", seconds=3.0)
    assert merge(theirs, ours) == Merged(known_runs=1, known_results=1, results=1, ended_runs=1)
    with Store.open(ours, write=False) as store:
        run = store.run("run-2")
        assert (run.status, run.seconds, len(run.results)) == ("done", 3.0, 2)


def refused(other: Path, into: Path, message: str) -> None:
    before = into.read_bytes()
    with (
        Store.open(other, write=False) as source,
        Store.open(into, write=True) as store,
        pytest.raises(UsageError, match=message) as caught,
    ):
        store.merge(source)
    assert "\n" not in str(caught.value) and into.read_bytes() == before


def test_what_is_not_sound_is_not_merged(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.db", tmp_path / "theirs.db"
    fill(ours, "run-1")
    fill(theirs, "run-2")
    sql(theirs, "UPDATE result SET accuracy = 0.5")
    refused(theirs, ours, r"theirs\.db' is not sound \(result 1 .*accuracy is 0\.5.*; nothing was changed")


def test_contradictions_between_databases_are_refused_as_a_whole(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.db", tmp_path / "theirs.db"
    fill(ours, "run-1")
    fill(theirs, "run-0", "cell-0")
    fill(theirs, "run-1")
    refused(theirs, ours, "run run-1 is another one in each of the databases; nothing was merged")
    third = tmp_path / "third.db"
    for path, labels in ((ours, LABELS), (third, np.arange(N) % 3)):
        with Store.open(path, write=True) as store:
            store.begin_run(make_run_start(f"labelled {path.name}"), labels)
    refused(third, ours, "the labels of digits differ from those stored for the same data.*; nothing was merged")


def test_a_database_is_not_merged_into_itself(tmp_path: Path) -> None:
    fill(tmp_path / "ours.db", "run-1")
    refused(tmp_path / "ours.db", tmp_path / "ours.db", "is the database to merge into; name another one")


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = tmp_path / "ours.db", tmp_path / "theirs.db"
    fill(ours, "run-1")
    fill(theirs, "run-2")
    before = ours.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("moebench.store.joining._join_links", lambda *words: (_ for _ in ()).throw(RunError("stop")))
        with pytest.raises(RunError, match="stop"):
            merge(theirs, ours)
    assert ours.read_bytes() == before
    assert merge(theirs, ours) == Merged(runs=1, results=1)

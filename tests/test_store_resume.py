from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from builders import HOST, N, assert_same_chunk, make_cell, make_chunk, make_record, make_run_start

from moebench.errors import InWorkError, RunError
from moebench.schema import RunStart
from moebench.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "r.db", write=True) as opened:
        opened.begin_run(make_run_start())
        yield opened


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def living_pid() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate(b"\n")


def run_of(run_id: str, pid: int, host: str = HOST) -> RunStart:
    return make_run_start(run_id, environment={"host": host, "pid": pid})


def test_a_dead_process_is_succeeded(store: Store, dead_pid: int) -> None:
    store.begin_run(run_of("run-dead", dead_pid))
    chunks = [make_chunk(broken={0}), make_chunk("apgd-ce", [1, 2])]
    old_id, _ = store.open_cell("run-dead", make_cell(), resume=False)
    for chunk in chunks:
        store.append_chunk(old_id, chunk)
    result_id, found = store.open_cell("run-1", make_cell(), resume=True)
    assert result_id == old_id
    for one, other in zip(found, chunks, strict=True):
        assert_same_chunk(one, other)
    rest = make_chunk("apgd-ce", range(3, N))
    store.append_chunk(result_id, rest)
    store.finish_cell(result_id, make_record([*chunks, rest]))
    assert [result.run_id for result in store.results()] == ["run-1"]
    old = store.run("run-dead")
    assert (old.status, old.results) == ("failed", ())
    assert old.error is not None and "run run-1 went on with its work" in old.error


def test_a_living_process_keeps_its_cell(store: Store, living_pid: int) -> None:
    store.begin_run(run_of("run-alive", living_pid))
    kept, _ = store.open_cell("run-alive", make_cell(), resume=False)
    with pytest.raises(InWorkError, match=r"run run-alive on .* is at work on the same"):
        store.open_cell("run-1", make_cell(), resume=True)
    result_id, found = store.open_cell("run-1", make_cell(), resume=False)
    assert result_id != kept and found == []
    assert store.run("run-alive").status == "running"


def test_the_newest_abandoned_cell_is_taken_unless_somebody_works_on_another(
    store: Store, dead_pid: int, living_pid: int
) -> None:
    store.begin_run(run_of("run-dead", dead_pid))
    store.begin_run(run_of("run-alive", living_pid))
    store.open_cell("run-alive", make_cell(), resume=False)
    store.open_cell("run-dead", make_cell(), resume=False)
    newest_dead, _ = store.open_cell("run-dead", make_cell(), resume=False)
    with pytest.raises(InWorkError):
        store.open_cell("run-1", make_cell(), resume=True)
    store.finish_run("run-alive", "failed", seconds=1.0, error="interrupted")
    assert store.open_cell("run-1", make_cell(), resume=True)[0] == newest_dead


def test_a_failed_run_gives_up_its_cell_though_its_process_lives(store: Store, living_pid: int) -> None:
    store.begin_run(run_of("run-failed", living_pid))
    left, _ = store.open_cell("run-failed", make_cell(), resume=False)
    store.finish_run("run-failed", "failed", seconds=1, error="out of memory")
    assert store.open_cell("run-1", make_cell(), resume=True)[0] == left
    assert store.run("run-failed").error == "out of memory"


def test_our_own_process_is_no_obstacle_and_neither_is_another_host(store: Store, living_pid: int) -> None:
    store.begin_run(run_of("run-0", os.getpid()))
    store.begin_run(run_of("run-elsewhere", living_pid, socket.gethostname() + "-gone"))
    for run_id, fingerprint in (("run-0", "cell-1"), ("run-elsewhere", "cell-2")):
        left, _ = store.open_cell(run_id, make_cell(fingerprint), resume=False)
        assert store.open_cell("run-1", make_cell(fingerprint), resume=True)[0] == left


def test_without_resume_or_with_another_fingerprint_a_cell_starts_anew(store: Store, dead_pid: int) -> None:
    store.begin_run(run_of("run-dead", dead_pid))
    left, _ = store.open_cell("run-dead", make_cell(), resume=False)
    assert store.open_cell("run-1", make_cell(), resume=False)[0] != left
    assert store.open_cell("run-1", make_cell("cell-2"), resume=True)[0] != left


def test_who_lost_a_cell_cannot_write_to_it(store: Store, tmp_path: Path, dead_pid: int) -> None:
    store.begin_run(run_of("run-slow", dead_pid))
    result_id, _ = store.open_cell("run-slow", make_cell(), resume=False)
    with Store.open(tmp_path / "r.db", write=True) as other:
        assert other.open_cell("run-1", make_cell(), resume=True)[0] == result_id
    with pytest.raises(RunError, match=f"run run-1 has taken over result {result_id}"):
        store.append_chunk(result_id, make_chunk())
    with pytest.raises(RunError, match="run run-slow has ended"):
        store.finish_run("run-slow", "done", seconds=1)


def test_a_run_that_died_before_it_worked_is_closed_by_the_next_of_its_kind(
    store: Store, dead_pid: int, living_pid: int
) -> None:
    store.begin_run(replace(run_of("run-dead", dead_pid), fingerprint="same work"))
    store.begin_run(replace(run_of("run-alive", living_pid), fingerprint="same work"))
    store.begin_run(replace(run_of("run-new", os.getpid()), fingerprint="same work"))
    status = {run.run_id: (run.status, run.error) for run in store.runs()}
    assert status["run-dead"] == ("failed", "its process ended before the run did; run run-alive began anew")
    assert status["run-alive"] == status["run-new"] == ("running", None)

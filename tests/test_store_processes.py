from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import assert_same_chunk, make_cell, make_chunk, make_protocol, make_record, make_run_start

from moebench.store import Store

SAMPLES = 100_000

PREAMBLE = """
import sys
from builders import finish_cell, make_cell, make_chunk, make_protocol, make_run_start
from moebench.store import Store
"""

ENDLESS = """
with Store.open(sys.argv[1], write=True) as store:
    store.begin_run(make_run_start("run-killed", protocol=make_protocol(n=100_000)))
    result_id, _ = store.open_cell("run-killed", make_cell(), resume=False)
    for first in range(0, 100_000, 10):
        store.append_chunk(result_id, make_chunk("clean", range(first, first + 10), {first}))
        print(first + 10, flush=True)
"""

BUSY_WRITER = """
name = sys.argv[2]
with Store.open(sys.argv[1], write=True) as store:
    for number in range(3):
        run_id = f"{name}-{number}"
        store.begin_run(make_run_start(run_id))
        for cell in range(2):
            finish_cell(store, run_id, make_cell(f"{run_id}-{cell}"))
        store.finish_run(run_id, "done", seconds=1.0)
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("wait", [0.0, 0.031])
def test_a_killed_process_loses_nothing_that_it_committed(tmp_path: Path, wait: float) -> None:
    path = tmp_path / "r.db"
    process = start(ENDLESS, path)
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(25)][-1]
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    told = max([told, *map(int, process.stdout.read().split())])
    process.communicate()
    with Store.open(path, write=True) as store:
        assert store.check() == [] and store.run("run-killed").status == "running"
        store.begin_run(make_run_start("run-2", protocol=make_protocol(n=SAMPLES)))
        result_id, chunks = store.open_cell("run-2", make_cell(), resume=True)
        done = sum(map(len, chunks))
        assert told <= done <= told + 10
        for number, chunk in enumerate(chunks):
            assert_same_chunk(chunk, make_chunk("clean", range(10 * number, 10 * number + 10), {10 * number}))
        rest = make_chunk("clean", range(done, SAMPLES))
        store.append_chunk(result_id, rest)
        store.finish_cell(result_id, make_record([*chunks, rest]))
        assert store.check() == []
        assert store.results()[0].record.accuracy == 1 - len(chunks) / SAMPLES
    assert [file.name for file in tmp_path.iterdir()] == ["r.db"]


def test_eight_processes_that_make_and_fill_one_database_together(tmp_path: Path) -> None:
    path = tmp_path / "r.db"
    names = "abcdefgh"
    for process in [start(BUSY_WRITER, path, name) for name in names]:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    with Store.open(path, write=False) as store:
        assert sorted(run.run_id for run in store.runs()) == [f"{name}-{n}" for name in names for n in range(3)]
        assert all(run.status == "done" and len(run.results) == 2 for run in store.runs())
        assert len(store.results()) == 8 * 3 * 2 and store.check() == []
    assert [file.name for file in tmp_path.iterdir()] == ["r.db"]
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*) FROM model").fetchone() == (1,)
    connection.close()


def test_a_reader_sees_whole_transactions_while_another_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "r.db"
    with Store.open(path, write=True):
        writer = start(BUSY_WRITER, path, "w")
        seen = []
        while writer.poll() is None:
            with Store.open(path, write=False) as store:
                seen.append(len(store.results()))
                assert store.check() == []
        _, errors = writer.communicate()
        assert writer.returncode == 0, errors
    assert seen == sorted(seen) and len(set(seen)) > 1

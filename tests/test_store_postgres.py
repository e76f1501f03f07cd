"""The store on a real PostgreSQL server, started for this file with the binaries of the operating system."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alembic import command
from alembic.config import Config
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
from commands import DENSE
from sqlalchemy import URL, create_engine, text
from sqlalchemy.orm import Session
from test_store_processes import BUSY_WRITER, start

from moebench.claims import load_claims
from moebench.cli import main
from moebench.errors import InWorkError, RunError, UsageError
from moebench.schema import Chunk, Example, Flag
from moebench.store import Store, address, connect, migrate, pictures
from moebench.store.joining import Merged

PASSWORD = "s3cret/pass word"
QUOTED = "s3cret%2Fpass%20word"


def _binaries() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("no PostgreSQL server in /usr/lib/postgresql")
    return found[-1].parent


Restart = Callable[[], None]


@pytest.fixture(scope="module")
def restart(running: tuple[Path, Restart]) -> Restart:
    """Stops the server as a loss of power would, and starts it again."""
    return running[1]


@pytest.fixture(scope="module")
def server(running: tuple[Path, Restart]) -> Path:
    """The socket folder of a running server whose superuser is `tester`."""
    return running[0]


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Path, Restart]]:
    """The socket folder of a running server, and what restarts it."""
    if find_spec("psycopg") is None:
        pytest.skip("no psycopg; `pip install psycopg[binary]` adds it")
    binaries = _binaries()
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    secret = folder / "password"
    secret.write_text(PASSWORD)
    prefix: list[str] = []
    if os.geteuid() == 0:
        # The server refuses to run as root.
        user = pwd.getpwnam("postgres")
        for path in (folder, secret):
            os.chown(path, user.pw_uid, user.pw_gid)
        prefix = ["runuser", "-u", "postgres", "--"]

    def call(name: str, *arguments: str) -> None:
        done = subprocess.run([*prefix, str(binaries / name), *arguments], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    data = str(folder / "data")
    call("initdb", "-D", data, "-U", "tester", "-A", "scram-sha-256", "--pwfile", str(secret), "-E", "UTF8", "-N")
    options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off -c shared_buffers=16MB"

    def begin() -> None:
        words = [str(binaries / "pg_ctl"), "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start"]
        subprocess.run([*prefix, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)

    def restart() -> None:
        call("pg_ctl", "-D", data, "-m", "immediate", "stop")
        begin()

    begin()
    yield folder, restart
    call("pg_ctl", "-D", data, "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.fixture
def url(server: Path) -> str:
    """An empty database of its own."""
    execute(server, "DROP DATABASE IF EXISTS bench WITH (FORCE)", "postgres")
    execute(server, "CREATE DATABASE bench", "postgres")
    return f"postgresql+psycopg://tester:{QUOTED}@/bench?host={server}"


def execute(server: Path, statement: str, database: str = "bench") -> None:
    address = URL.create("postgresql+psycopg", "tester", PASSWORD, database=database, query={"host": str(server)})
    engine = create_engine(address, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


def test_what_went_in_comes_out(url: str) -> None:
    start, cell = make_run_start(command="caf\udce9\x00"), make_cell()
    chunks = [make_chunk(broken={0}), make_chunk("apgd-ce", range(1, N), broken={3})]
    record = make_record(chunks)
    with Store.open(url, write=True) as store:
        store.begin_run(start)
        result_id = finish_cell(store, "run-1", cell, chunks)
        store.finish_run("run-1", "done", seconds=2.5, flags=[Flag("code", "words")])
    with Store.open(url.replace("+psycopg", ""), write=False) as store:
        run, (result,) = store.run("run-1"), store.results()
        assert (run.model, run.checkpoint, run.protocol) == (start.model, start.checkpoint, start.protocol)
        assert (run.status, run.results, run.flags) == ("done", (result,), (Flag("code", "words"),))
        assert (result.result_id, result.cell, result.record) == (result_id, cell, record)
        assert np.flatnonzero(store.outcomes(result_id).broken).tolist() == [0, 3]
        assert store.check() == [] and store.claims() == load_claims()
        with pytest.raises(UsageError, match="was opened for reading"):
            store.begin_run(start)


def test_no_password_in_any_message(url: str, server: Path) -> None:
    with Store.open(url, write=True) as store:
        assert store.where == "postgresql+psycopg://tester@/bench"
    wrong = {
        url.replace(QUOTED, "wr0ng"): "password authentication failed",
        url.replace("/bench", "/nothing"): 'database "nothing" does not exist',
        url.replace(str(server), "/no/such/folder"): "cannot reach postgresql",
        url + "&password=wr0ng": "password authentication failed",
        url + "&sslpassword=wr0ng&nonsense=1": 'invalid connection option "nonsense"',
        url + "&sslmode=sometimes": "invalid sslmode value",
    }
    for where, message in wrong.items():
        with pytest.raises(UsageError, match=message) as caught:
            Store.open(where, write=True)
        line = str(caught.value)
        assert "\n" not in line and "s3cret" not in line and "wr0ng" not in line


def test_databases_of_others_newer_ones_and_empty_ones(url: str, server: Path) -> None:
    with pytest.raises(UsageError, match="holds no results yet"):
        Store.open(url, write=False)
    execute(server, "CREATE TABLE users (id int)")
    with pytest.raises(UsageError, match=r"is a database of something else .*users"):
        Store.open(url, write=True)
    execute(server, "DROP TABLE users")
    Store.open(url, write=True).close()
    execute(server, "UPDATE alembic_version SET version_num = '0999'")
    with pytest.raises(UsageError, match="has schema 0999, newer than"):
        Store.open(url, write=True)


def test_a_user_who_may_only_read(url: str, server: Path) -> None:
    with Store.open(url, write=True) as store:
        store.begin_run(make_run_start())
    execute(server, "DROP ROLE IF EXISTS reader")
    execute(server, "CREATE ROLE reader LOGIN PASSWORD 'wr0ng'")
    execute(server, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
    reader = f"postgresql+psycopg://reader:wr0ng@/bench?host={server}"
    with Store.open(reader, write=False) as store:
        assert len(store.runs()) == 1
    with pytest.raises(UsageError, match=r"cannot be written \(permission denied for table \w+\); ask for the right"):
        Store.open(reader, write=True)
    execute(server, "REVOKE SELECT ON ALL TABLES IN SCHEMA public FROM reader")
    with pytest.raises(UsageError, match=r"cannot be read \(permission denied for table \w+\)"):
        Store.open(reader, write=False)
    execute(server, "DROP OWNED BY reader")


def test_eight_drivers_that_make_and_fill_one_database_together(url: str) -> None:
    for process in [start(BUSY_WRITER, url, name) for name in "abcdefgh"]:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    with Store.open(url, write=False) as store:
        assert len(store.runs()) == 8 * 3 and len(store.results()) == 8 * 3 * 2 and store.check() == []
        assert all(run.status == "done" and len(run.results) == 2 for run in store.runs())


EVALUATE = ["evaluate", "--model", DENSE, "--attack", "fgsm,pgd-10", "--n", "20", "--no-trust", "--view", "whole"]


def undisturbed(tmp_path: Path) -> list[Any]:
    path = str(tmp_path / "undisturbed.db")
    assert main([*EVALUATE, "--db", path]) == 0
    return verdicts(path)


def verdicts(where: str) -> list[Any]:
    with Store.open(where, write=False) as store:
        assert store.check() == []
        found = [store.outcomes(one.result_id) for one in store.results(newest_only=False)]
    names = ("broken", "adv_pred", "distance", "forwards", "backwards")
    return [[getattr(out, name).tolist() for name in names] for out in found]


def test_a_server_that_is_restarted_between_two_commits_is_waited_for(
    url: str, restart: Restart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, commits = Store.append_chunk, 0

    def append(store: Store, result_id: int, chunk: Chunk) -> None:
        nonlocal commits
        commits += 1
        if commits == 2:
            restart()
        real(store, result_id, chunk)

    expected = undisturbed(tmp_path)
    monkeypatch.setattr(Store, "append_chunk", append)
    assert main([*EVALUATE, "--db", url]) == 0
    assert commits > 2 and verdicts(url) == expected


def test_a_connection_that_is_cut_inside_a_commit_costs_that_commit_alone(
    url: str, server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, commits = pictures.keep, 0

    def keep(session: Session, result_id: int, examples: Sequence[Example]) -> None:
        nonlocal commits
        commits += 1
        if commits == 4:
            others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'bench'"
            execute(server, others, "postgres")
        real(session, result_id, examples)

    expected = undisturbed(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(pictures, "keep", keep)
        capsys.readouterr()
        assert main([*EVALUATE, "--db", url]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "s3cret" not in said.err
    assert "lost the connection to postgresql" in said.err and "what was committed is kept" in said.err
    with Store.open(url, write=False) as store:
        assert store.check() == [] and [len(run.results) for run in store.runs()] == [1]
        assert [run.status for run in store.runs()] == ["failed"]
    assert main([*EVALUATE, "--db", url]) == 0
    assert verdicts(url) == expected


def test_a_server_that_stays_away_is_waited_for_once(
    url: str, server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, commits, since = Store.append_chunk, 0, 0.0

    def append(store: Store, result_id: int, chunk: Chunk) -> None:
        nonlocal commits, since
        commits += 1
        if commits == 2:
            execute(server, "ALTER DATABASE bench ALLOW_CONNECTIONS false", "postgres")
            others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'bench'"
            execute(server, others, "postgres")
            since = time.monotonic()
        real(store, result_id, chunk)

    expected = undisturbed(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Store, "append_chunk", append)
        patched.setattr(connect, "_WAIT", 6)
        capsys.readouterr()
        assert main([*EVALUATE, "--db", url]) == 1
        assert 6 <= time.monotonic() - since < 11  # the run, too, cannot be marked as failed; that is tried once
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "s3cret" not in said.err
    assert "lost the connection to postgresql" in said.err and "the same command goes on" in said.err
    execute(server, "ALTER DATABASE bench ALLOW_CONNECTIONS true", "postgres")
    assert main([*EVALUATE, "--db", url]) == 0
    assert verdicts(url) == expected


def test_two_drivers_that_do_the_same_work_at_once_end_alike(url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moebench", *EVALUATE, "--db", url]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    expected, found = undisturbed(tmp_path), verdicts(url)
    assert sorted(found) == sorted(expected)  # each cell once
    with Store.open(url, write=False) as store:
        assert [(run.status, len(run.results)) for run in store.runs()] == [("done", 2)] * 2
        assert not any("s3cret" in run.command + str(run.environment) for run in store.runs())


def test_an_address_that_leads_nowhere_is_one_line(
    url: str, server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    execute(server, "DROP ROLE IF EXISTS nobody")
    execute(server, "CREATE ROLE nobody LOGIN PASSWORD 'wr0ng'")
    places = {
        "postgresql://me:s3cret@127.0.0.1:1/x": "cannot reach postgresql",
        "postgresql://me:s3cret@no-such-host.invalid/x": "cannot reach postgresql",
        url.replace(QUOTED, "wr0ng"): "password authentication failed",
        f"postgresql://nobody:wr0ng@/bench?host={server}": "permission denied",
    }
    for where, message in places.items():
        for words in (["runs"], ["evaluate", "--model", DENSE, "--attack", "fgsm", "--n", "4"]):
            if message == "permission denied" and words == ["runs"]:
                continue  # an empty database can be looked at
            assert main([*words, "--db", where]) == 2
            said = capsys.readouterr()
            assert said.out == "" and said.err.count("\n") == 1 and message in said.err, said.err
            assert "s3cret" not in said.err and "wr0ng" not in said.err
        assert main(["evaluate", "--model", DENSE, "--n", "4", "--db", where, "--dry-run"]) == 2 or "nobody" in where
        said = capsys.readouterr()
        assert "s3cret" not in said.err and "wr0ng" not in said.err
    assert not list(tmp_path.iterdir())
    execute(server, "DROP OWNED BY nobody")


def test_a_server_that_says_nothing_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg", reason="no psycopg")
    assert address.PATIENCE["connect_timeout"] <= 15
    monkeypatch.setitem(address.PATIENCE, "connect_timeout", 2)  # the least that libpq takes
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"postgresql://me:s3cret@127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(UsageError, match=r"cannot reach postgresql\+psycopg://me@127.0.0.1.*timeout"):
            Store.open(where, write=True)
    own = address.Address.read("postgresql://me@host/x?connect_timeout=60")
    assert "connect_timeout" not in own.patience() and "keepalives_idle" in own.patience()


def test_a_driver_on_another_machine_keeps_its_cell_while_it_commits(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(url, write=True) as store:
        store.begin_run(make_run_start("run-far", environment={"host": "far-away", "pid": 1}))
        store.begin_run(make_run_start())
        far, _ = store.open_cell("run-far", make_cell(), resume=False)
        assert store.open_cell("run-1", make_cell("cell-2"), resume=True)[0] != far
        with pytest.raises(InWorkError, match="run run-far on far-away is at work"):
            store.open_cell("run-1", make_cell(), resume=True)
        again, _ = store.open_cell("run-far", make_cell("cell-3"), resume=False)
        monkeypatch.setattr("moebench.store.owner.LEASE", timedelta(0))
        assert store.open_cell("run-1", make_cell("cell-3"), resume=True)[0] == again


def test_a_lock_that_is_not_released_ends_in_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(url, write=True) as store, Store.open(url, write=True) as other:
        monkeypatch.setattr(connect, "_WAIT", 1)
        with other._database.writing(), pytest.raises(RunError, match="is busy: another process has been writing"):
            store.begin_run(make_run_start())
        store.begin_run(make_run_start())


def test_an_older_database_is_upgraded_in_place_and_not_read(url: str, server: Path) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", "moebench.store:migrations")
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    engine.dispose()
    with pytest.raises(UsageError, match="has the older schema 0001; `moebench db upgrade` brings it up to date"):
        Store.open(url, write=False)
    with Store.open(url, write=True, create=False) as store:
        assert store.found == "0001"
        store.begin_run(make_run_start(), np.ones(N, np.int64))
    with Store.open(url, write=False) as store:
        assert store.found == migrate.REVISIONS[-1] and store.labels(make_protocol()) is not None


def test_merging_between_a_file_and_a_server(url: str, tmp_path: Path) -> None:
    path = tmp_path / "r.db"
    chunks = [make_chunk(), make_chunk("apgd-ce", broken={3}, examples=[make_example(3, 1)])]
    for where, run_id in ((path, "run-1"), (url, "run-2")):
        with Store.open(where, write=True) as store:
            store.begin_run(make_run_start(run_id), np.ones(N, np.int64) if where is path else None)
            finish_cell(store, run_id, make_cell(f"cell of {run_id}"), chunks)
            store.finish_run(run_id, "done", seconds=1.0)
    for other, into in ((path, url), (url, path)):
        for added in (1, 0):
            with Store.open(other, write=False) as source, Store.open(into, write=True) as store:
                known = 1 - added + (into is path)
                assert store.merge(source) == Merged(added, added, known_runs=known, known_results=known)
    for where in (path, url):
        with Store.open(where, write=False) as store:
            assert store.check() == [] and store.labels(make_protocol()) is not None
            assert {result.run_id for result in store.results()} == {"run-1", "run-2"}
            for result in store.results():
                assert same_examples(store.examples(result.result_id), [make_example(3, 1)])

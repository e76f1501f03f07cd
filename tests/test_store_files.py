from __future__ import annotations

import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from builders import finish_cell, make_cell, make_run_start
from sqlalchemy import create_engine

from moebench.errors import MoebenchError, RunError, UsageError
from moebench.store import Store, connect, migrate
from moebench.store.orm import Base

NOBODY = 65534


def filled(path: Path) -> Path:
    """A database with one finished run."""
    with Store.open(path, write=True) as store:
        store.begin_run(make_run_start())
        finish_cell(store, "run-1", make_cell())
        store.finish_run("run-1", "done", seconds=1.0)
    return path


def sql(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def refuse(path: str | Path, message: str, *, write: bool) -> None:
    """Opening fails with one line that matches, and leaves the folder as it was."""
    folder = Path(path).parent
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} if folder.is_dir() else None
    with pytest.raises(UsageError, match=message) as caught:
        Store.open(path, write=write)
    assert "\n" not in str(caught.value)
    if before is not None:
        assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


def test_one_file_is_left_when_a_store_closes(tmp_path: Path) -> None:
    path = filled(tmp_path / "r.db")
    assert [file.name for file in tmp_path.iterdir()] == ["r.db"]
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("write", [False, True])
def test_opening_without_writing_does_not_change_the_file(tmp_path: Path, write: bool) -> None:
    path = filled(tmp_path / "r.db")
    before = path.read_bytes()
    with Store.open(path, write=write) as store:
        assert len(store.runs()) == 1 and store.claims() and store.check() == []
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["r.db"]


def test_where_the_database_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOEBENCH_DB", raising=False)
    for where, name in ((None, "results.db"), ("sqlite:///a.db", "a.db"), (f"sqlite:///{tmp_path}/b.db", "b.db")):
        with Store.open(where, write=True):
            assert (tmp_path / name).exists()
    monkeypatch.setenv("MOEBENCH_DB", "c%20d #?é.db")
    with Store.open(write=True) as store:
        store.begin_run(make_run_start())
    with Store.open(tmp_path / "c%20d #?é.db", write=False) as store:
        assert [run.run_id for run in store.runs()] == ["run-1"]
    monkeypatch.setenv("MOEBENCH_DB", "")
    with Store.open(write=False) as store:
        assert store.where == "'results.db'"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("sqlite:///r.db?mode=memory", "names a file and nothing else"),
        ("sqlite://", "names a file and nothing else, such as sqlite:///results.db"),
        ("mysql://root:secret@host/db", "unknown kind of database 'mysql'; name a file, sqlite:///FILE or postgresql"),
        ("postgresql+psycopg://me:secret@host:port/db", r"cannot read the postgresql\+psycopg:// address"),
        ("postgresql://me:pass@secret@host/db", "with %40 for each @ in the password"),
        ("postgresql://me:pa@se/cr@secret/db", "with %40 for each @ in the password"),
        ("postgresql:/me:secret@host/db", "reads like the address of a server, but is none"),
        ("postgresql:me:secret@host/db", "reads like the address of a server, but is none"),
        ("me:secret@host", "reads like the address of a server, but is none"),
        ("r\0.db", "cannot name a file"),
        ("x" * 300, "cannot name a file .*too long"),
        ("/dev/null", "is no ordinary file"),
    ],
)
def test_addresses_that_name_nothing(where: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Store.open(where, write=True)
    assert "secret" not in str(caught.value)


def test_a_file_whose_name_reads_like_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Store.open("sqlite:///a:b@c.db", write=True).close()
    Store.open("a:b@c.db", write=False).close()


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UsageError, match=r'pip install "moebench\[postgres\]"') as caught:
        Store.open("postgresql+psycopg://me:secret@host/db", write=True)
    assert "secret" not in str(caught.value)


def test_there_must_be_something_to_read(tmp_path: Path) -> None:
    refuse(tmp_path / "r.db", r"there is no database '.*r\.db'; `moebench evaluate .*` makes one", write=False)
    (tmp_path / "empty.db").touch()
    refuse(tmp_path / "empty.db", "holds no results yet; `moebench evaluate", write=False)
    filled(tmp_path / "empty.db")


@pytest.mark.parametrize("write", [False, True])
def test_folders_and_missing_folders(tmp_path: Path, write: bool) -> None:
    refuse(tmp_path, "is a folder; name a file, such as '.*results.db'", write=write)
    refuse(tmp_path / "no" / "r.db", "there is no folder '.*no' for the database 'r.db'; make it", write=write)


@pytest.mark.parametrize("write", [False, True])
def test_a_file_that_is_no_database(tmp_path: Path, write: bool) -> None:
    (tmp_path / "r.db").write_text("version https://example.org/pointer\n" * 40)
    refuse(tmp_path / "r.db", "is damaged or no SQLite database", write=write)


def test_a_damaged_file_is_not_written_to(tmp_path: Path) -> None:
    path = filled(tmp_path / "r.db")
    content = bytearray(path.read_bytes())
    content[8192:-4096] = bytes(len(content) - 12288)
    path.write_bytes(content)
    refuse(path, "is damaged .*; restore", write=True)
    with pytest.raises(UsageError, match="is damaged"), Store.open(path, write=False) as store:
        store.results()


def test_a_truncated_file(tmp_path: Path) -> None:
    path = filled(tmp_path / "r.db")
    path.write_bytes(path.read_bytes()[:5000])
    for write in (False, True):
        refuse(path, "is damaged", write=write)


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("tables", [("users",), ("alembic_version", "users"), ("model", "run")])
def test_databases_of_others_are_left_alone(tmp_path: Path, tables: tuple[str, ...], write: bool) -> None:
    path = tmp_path / "app.db"
    sql(path, *(f"CREATE TABLE {name} (version_num TEXT)" for name in tables))
    if "alembic_version" in tables:
        sql(path, "INSERT INTO alembic_version VALUES ('0001')")
    refuse(path, f"is a database of something else .*{tables[0]}", write=write)


@pytest.mark.parametrize("write", [False, True])
def test_a_newer_schema_is_refused(tmp_path: Path, write: bool) -> None:
    path = filled(tmp_path / "r.db")
    sql(path, "UPDATE alembic_version SET version_num = '0999'")
    refuse(path, f"has schema 0999, newer than {migrate.REVISIONS[-1]} of this moebench; upgrade moebench", write=write)


@pytest.mark.parametrize("write", [False, True])
def test_a_lost_table_is_noticed(tmp_path: Path, write: bool) -> None:
    path = filled(tmp_path / "r.db")
    sql(path, "DROP TABLE chunk")
    refuse(path, "is damaged: it lacks the table chunk", write=write)


def test_migrations_make_exactly_the_tables_of_the_code(tmp_path: Path) -> None:
    config = Config()
    config.set_main_option("script_location", "moebench.store:migrations")
    revisions = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert tuple(reversed(revisions)) == migrate.REVISIONS
    engine = create_engine(f"sqlite:///{filled(tmp_path / 'r.db')}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_a_failed_migration_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(connection: object) -> None:
        upgrade(connection)  # type: ignore[arg-type]
        raise OSError("stopped after the tables were made")

    upgrade = migrate.upgrade
    monkeypatch.setattr(migrate, "upgrade", fail)
    (tmp_path / "old.db").touch()
    for name in ("old.db", "new.db"):
        with pytest.raises(OSError, match="stopped"):
            Store.open(tmp_path / name, write=True)
    assert {file.name: file.stat().st_size for file in tmp_path.iterdir()} == {"old.db": 0}
    monkeypatch.undo()
    filled(tmp_path / "old.db")


def test_outdated_claims_are_replaced_when_the_store_is_written(tmp_path: Path) -> None:
    path = filled(tmp_path / "r.db")
    with Store.open(path, write=False) as store:
        claims = store.claims()
    sql(path, "UPDATE claim SET value = 12.5 WHERE id = 3", "DELETE FROM claim WHERE id = 5")
    with Store.open(path, write=False) as store:
        assert store.claims() != claims
    with Store.open(path, write=True) as store:
        assert store.claims() == claims and len(store.results()) == 1


def test_a_store_opened_for_reading_does_not_write(tmp_path: Path) -> None:
    with Store.open(filled(tmp_path / "r.db"), write=False) as store:
        with pytest.raises(UsageError, match="was opened for reading"):
            store.begin_run(make_run_start("run-2"))
        assert [run.run_id for run in store.runs()] == ["run-1"]


def test_settings_of_a_connection(tmp_path: Path) -> None:
    with Store.open(filled(tmp_path / "r.db"), write=True) as store, store._database.reading() as session:
        wanted = {"foreign_keys": 1, "busy_timeout": 30_000, "journal_mode": "wal", "synchronous": 2}
        assert {name: session.connection().exec_driver_sql(f"PRAGMA {name}").scalar() for name in wanted} == wanted


def test_a_lock_that_is_not_released_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path / "r.db")
    monkeypatch.setattr(connect, "_WAIT", 0.2)
    with Store.open(path, write=True) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunError, match=r"r\.db' is busy: another process has been writing for 0.2 s; try again"):
            store.begin_run(make_run_start("run-2"))
        with pytest.raises(MoebenchError, match="is busy"):
            Store.open(path, write=True)
        other.close()
        store.begin_run(make_run_start("run-2"))


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter; pytest's own are private."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Permissions bind even where the tests run as root."""
    if sys.platform == "win32":
        pytest.skip("POSIX permissions")
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    yield
    os.seteuid(0)


@pytest.fixture(params=["folder", "file", "both"])
def sealed(request: pytest.FixtureRequest, open_folder: Path) -> Path:
    path = filled(open_folder / "r.db")
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
        os.chown(open_folder, NOBODY, NOBODY)
    if request.param != "folder":
        path.chmod(0o444)
    if request.param != "file":
        open_folder.chmod(0o555)
    return path


def test_what_is_read_only_can_be_read(sealed: Path, unprivileged: None) -> None:
    with Store.open(sealed, write=False) as store:
        assert [run.run_id for run in store.runs()] == ["run-1"]
        assert len(store.results()) == 1 and store.claims() and store.check() == []
    assert [file.name for file in sealed.parent.iterdir()] == ["r.db"]


def test_what_is_read_only_is_refused_before_any_work(sealed: Path, unprivileged: None) -> None:
    refuse(sealed, "is read-only; make it writable|cannot be written .*; make it and its folder writable", write=True)


def test_nothing_can_be_made_in_a_read_only_folder(unmerged: Path, unprivileged: None) -> None:
    refuse(unmerged.with_name("new.db"), "cannot be opened .*; check the permissions", write=True)


@pytest.fixture
def unmerged(open_folder: Path) -> Path:
    """What a killed process leaves, in a folder that cannot be written: a log beside the file, and no index of it."""
    with Store.open(open_folder / "live.db", write=True) as store:
        store.begin_run(make_run_start())
        for suffix in ("", "-wal"):
            shutil.copy(open_folder / f"live.db{suffix}", open_folder / f"r.db{suffix}")
    open_folder.chmod(0o555)
    return open_folder / "r.db"


def test_unmerged_changes_in_a_read_only_folder_are_not_passed_over(unmerged: Path, unprivileged: None) -> None:
    refuse(unmerged, "has unmerged changes in 'r.db-wal' but is read-only; copy both", write=False)


def test_unmerged_changes_are_merged_where_that_is_possible(unmerged: Path) -> None:
    unmerged.parent.chmod(0o755)
    with Store.open(unmerged, write=False) as store:
        assert [run.run_id for run in store.runs()] == ["run-1"]
    assert sorted(file.name for file in unmerged.parent.iterdir()) == ["live.db", "r.db"]

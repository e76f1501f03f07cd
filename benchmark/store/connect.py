"""Opening a database: where it is, whether it is ours, whether it can be written, and what went wrong in one line."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, QueuePool, create_engine, event, insert, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from moebench.errors import GoneError, MoebenchError, RunError, UsageError
from moebench.store import migrate
from moebench.store.address import Address
from moebench.store.older import Copy
from moebench.store.orm import ModelRow
from moebench.store.records import dumps

DEFAULT = "results.db"
VARIABLE = "MOEBENCH_DB"

_WAIT = 30
"""Seconds to wait for another process that writes."""

_WRITING = (
    sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC,
    sqlite3.SQLITE_IOERR_TRUNCATE, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_SHMMAP,
)  # fmt: skip
"""What SQLite says where a disk takes no more; other troubles with a file that was never opened are of the file."""

_PAUSE = 0.5
"""Seconds between two attempts to reach a server that was there before."""

_LOCK = 0x6D6F6562
"""The advisory lock that makes PostgreSQL admit one writing transaction at a time, as SQLite does."""

_CONNECTING = ("08", "28", "3D", "53", "57")
"""What the states of PostgreSQL begin with that say that nobody can connect, or this user cannot."""

_MAKE = "`moebench evaluate --model rt-er --attack pgd-10` makes one"


class DamagedError(UsageError):
    """The file is no SQLite database, or one with broken pages."""


class MissingError(UsageError):
    """There is no database there, or an empty one."""


class BusyError(RunError):
    """Another process holds the database."""


class Database:
    """An open database of the current schema; hands out sessions, one transaction each.

    `found` is the schema that it had, None for one that was made.

    Raises:
        UsageError: it cannot be opened, is not ours or too new, or shall be written and cannot be.
    """

    def __init__(self, where: str | Path | None, *, write: bool, create: bool = True) -> None:
        where = where if where is not None else os.environ.get(VARIABLE) or DEFAULT
        self.write = write
        self.create = write and create
        self.found: str | None = None
        self._copy: Copy | None = None
        self._ready = self._lost = False
        address = Address.read(where)
        self.path, self.shown, self._secrets = address.path, address.shown, address.secrets
        before = _beside(self.path)
        try:
            with self.explained():
                self._engine = (
                    _postgres(address) if self.path is None else _sqlite(self.path, self.shown, write, self.create)
                )
                try:
                    self._prepare()
                except BaseException:
                    self._engine.dispose()
                    raise
            self._ready = True
        except BaseException as error:
            if not isinstance(error, BusyError):  # then another process may be making the file
                _tidy(_beside(self.path) - before, damaged=isinstance(error, DamagedError))
            raise

    @property
    def backend(self) -> str:
        """The name of the SQL dialect: "sqlite" or "postgresql"."""
        return self._engine.dialect.name

    def is_file_of(self, other: Database) -> bool:
        """Whether both are the same SQLite file."""
        return self.path is not None and other.path is not None and self.path.samefile(other.path)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that sees one state of the database and changes nothing."""
        with self.explained(), self._session(self._engine) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session that holds the write lock from its start and commits as a whole.

        Raises:
            UsageError: the database was opened for reading.
            RunError: another process kept the lock too long, the disk is full, or the connection was lost.
        """
        if not self.write:
            raise UsageError(f"{self.shown} was opened for reading; open it with write=True to change it")
        with self.explained(), self._session(self._writer) as session:
            yield session

    @contextmanager
    def _session(self, engine: Engine) -> Iterator[Session]:
        """A session whose transaction has begun; a server that is being restarted is waited for, once in vain."""
        deadline = time.monotonic() + (0 if self._lost else _WAIT)
        while True:
            session = Session(engine)
            try:
                transaction = session.begin()
                session.connection()  # a session begins with its first statement; the lock is wanted now
                break
            except BaseException as error:
                session.close()
                waiting = self._ready and isinstance(error, DBAPIError) and _is_lost(error)
                self._lost = waiting
                if not waiting or time.monotonic() > deadline:
                    raise
                time.sleep(_PAUSE)
        self._lost = False
        with session, transaction:
            yield session

    def close(self) -> None:
        """Closes all connections; the last process to do so leaves one file, nothing beside it."""
        if self.write and self.path is not None:
            with suppress(DBAPIError, sqlite3.Error), self._engine.connect() as connection:
                connection.connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._engine.dispose()
        if self._copy is not None:
            self._copy.close()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turns the driver's errors that a user can cause into one line."""
        try:
            yield
        except DBAPIError as error:
            reason = " ".join(str(error.orig).split())
            for secret in self._secrets:
                reason = reason.replace(secret, "***")
            explanation = _explain(error, self.shown, reason, ready=self._ready, write=self.write)
            if explanation is None:
                raise
            raise explanation from None

    @property
    def _writer(self) -> Engine:
        return self._engine.execution_options(moebench_write=True)

    def _prepare(self) -> None:
        with self._engine.begin() as connection:
            found = self.found = migrate.revision(connection, self.shown)
            if self.write and found is not None and self.path is not None:
                _refuse_damage(connection, self.shown)
        if found is None and not self.create:
            raise MissingError(f"{self.shown} holds no results yet; {_MAKE}")
        if not self.write:
            if found is not None and found != migrate.REVISIONS[-1]:
                self._read_older(found)
            return
        with self._writer.begin() as connection:
            if migrate.revision(connection, self.shown) != migrate.REVISIONS[-1]:
                migrate.upgrade(connection)
        if self.path is not None:
            _enter_wal(self._engine)
        with self._writer.connect() as connection:
            # A file that cannot be written says so only when a row is: try one, and take it back.
            connection.execute(insert(ModelRow).values(digest="probe", name="probe", family="", summary=""))
            connection.rollback()

    def _read_older(self, found: str) -> None:
        """Has an older file read through a copy in the newest schema; the file stays as it is."""
        if self.path is None:
            raise UsageError(f"{self.shown} has the older schema {found}; `moebench db upgrade` brings it up to date")
        original = self._engine
        self._copy = Copy(original, lambda path: _sqlite_engine(path, "mode=rw", write=True))
        original.dispose()
        self._engine = _sqlite_engine(self._copy.path, "mode=rw", write=False)


def _sqlite(path: Path, shown: str, write: bool, create: bool) -> Engine:
    if path.is_dir():
        raise UsageError(f"{shown} is a folder; name a file, such as {str(path / DEFAULT)!r}")
    if path.exists() and not path.is_file():
        raise UsageError(f"{shown} is no ordinary file; name another with --db")
    if not path.parent.is_dir():
        raise UsageError(
            f"there is no folder {str(path.parent)!r} for the database {path.name!r}; make it or change --db"
        )
    if not path.exists():
        if not create:
            raise MissingError(f"there is no database {shown}; {_MAKE}, or name another with --db or {VARIABLE}")
        return _sqlite_engine(path, "mode=rwc", write=True)
    if write:
        if not _writable(path):
            raise UsageError(f"{shown} is read-only; make it writable, or name another database with --db")
        return _sqlite_engine(path, "mode=rw", write=True)
    return _sqlite_engine(path, _reading_mode(path, shown), write=False)


def _beside(path: Path | None) -> set[Path]:
    """The files of a database that are there: itself, its log, and the index of the log."""
    if path is None or not path.name:
        return set()
    names = (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm"))
    return {name for name in names if name.exists()}


def _tidy(made: set[Path], *, damaged: bool) -> None:
    """Removes what a failed opening made: an empty file, and what SQLite leaves beside a file that it cannot read."""
    if damaged and any(path.name.endswith("-wal") and path.stat().st_size for path in made):
        return
    for path in made:
        if damaged or not (path.name.endswith(("-wal", "-shm")) or path.stat().st_size):
            path.unlink(missing_ok=True)


def _reading_mode(path: Path, shown: str) -> str:
    """How to open a file for reading: as others do if that is possible, else as a file that nobody changes."""
    log = path.with_name(path.name + "-wal")
    if _writable(path) or log.exists():
        mode = "mode=rw" if _writable(path) else "mode=ro"
        engine = _sqlite_engine(path, mode, write=False)
        try:
            with engine.connect() as connection:
                connection.execute(text("SELECT count(*) FROM sqlite_master"))
            return mode
        except DBAPIError as error:
            if _code(error) not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
                raise
        finally:
            engine.dispose()
    if log.exists() and log.stat().st_size:
        raise UsageError(
            f"{shown} has unmerged changes in {log.name!r} but is read-only; copy both to a writable folder"
        )
    return "mode=ro&immutable=1"


def _writable(path: Path) -> bool:
    try:
        with path.open("r+b"):
            return True
    except OSError:
        return False


def _sqlite_engine(path: Path, mode: str, *, write: bool) -> Engine:
    address = f"{path.absolute().as_uri()}?{mode}"

    def connect() -> sqlite3.Connection:
        # isolation_level=None leaves BEGIN to the listener below; the driver's own one starts too late to lock.
        connection = sqlite3.connect(address, uri=True, timeout=_WAIT, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA foreign_keys=ON")
        # What a commit wrote is on the disk when it returns: NORMAL keeps the file whole, but may lose the last ones.
        connection.execute("PRAGMA synchronous=FULL")
        if not write:
            connection.execute("PRAGMA query_only=ON")
        return connection

    engine = create_engine(
        "sqlite://", creator=connect, poolclass=QueuePool, json_serializer=dumps, hide_parameters=True
    )

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get("moebench_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def _enter_wal(engine: Engine) -> None:
    """Switches a file to write-ahead logging, waiting for others: the busy timeout does not cover this switch."""
    deadline = time.monotonic() + _WAIT
    while True:
        connection: Any = engine.raw_connection()
        try:
            connection.cursor().execute("PRAGMA journal_mode=WAL").fetchall()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise DBAPIError("PRAGMA journal_mode=WAL", None, error) from None
            time.sleep(0.05)
        finally:
            connection.close()


def _refuse_damage(connection: Connection, shown: str) -> None:
    found = connection.execute(text("PRAGMA quick_check(1)")).scalar()
    if found != "ok":
        raise DamagedError(f"{shown} is damaged ({str(found).splitlines()[-1]}); restore it from a copy")


def _postgres(address: Address) -> Engine:
    try:
        engine = create_engine(
            address.url,
            connect_args=address.patience(),
            json_serializer=dumps,
            hide_parameters=True,
            pool_pre_ping=True,
        )
    except ImportError:
        raise UsageError('PostgreSQL needs the driver psycopg; `pip install "moebench[postgres]"` adds it') from None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get("moebench_write", False):
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_WAIT}s'")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
        else:
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")

    return engine


def _code(error: DBAPIError) -> int | None:
    code: int | None = getattr(error.orig, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _is_lost(error: DBAPIError) -> bool:
    """Whether a server cannot be reached, or has cut the connection; nothing of the kind happens to a file."""
    if not _is_postgres(error):
        return False
    state = getattr(error.orig, "sqlstate", None)
    unreachable = state is None and _is_kind(error, "OperationalError")
    return error.connection_invalidated or unreachable or state in ("57P01", "57P02", "57P03")


def _is_postgres(error: DBAPIError) -> bool:
    return type(error.orig).__module__.startswith("psycopg")


def _is_kind(error: DBAPIError, name: str) -> bool:
    """Whether the driver's error is of a class of that name, or of one below it."""
    return any(kind.__name__ == name for kind in type(error.orig).__mro__)


def _explain(error: DBAPIError, shown: str, reason: str, *, ready: bool, write: bool) -> MoebenchError | None:
    """The one line for an error that is not a mistake of this package, else None.

    `ready` says that the database had been opened before: then it is no wrong address. `write` says for what it was.
    """
    state = getattr(error.orig, "sqlstate", None)
    code = _code(error)
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return DamagedError(f"{shown} is damaged or no SQLite database ({reason}); restore a copy, or change --db")
    if state in ("42501", "25006"):
        said = getattr(getattr(error.orig, "diag", None), "message_primary", None) or reason
        return UsageError(
            f"{shown} cannot be {'written' if write else 'read'} ({said}); ask for the right, or change --db"
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return UsageError(f"{shown} cannot be written ({reason}); make it and its folder writable, or change --db")
    if code == sqlite3.SQLITE_CANTOPEN:
        return UsageError(f"{shown} cannot be opened ({reason}); check the permissions of the file and its folder")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or state == "55P03":
        return BusyError(f"{shown} is busy: another process has been writing for {_WAIT} s; try again when it is done")
    if code == sqlite3.SQLITE_IOERR and not ready and getattr(error.orig, "sqlite_errorcode", None) not in _WRITING:
        return UsageError(f"{shown} cannot be opened ({reason}); name another with --db")
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR) or state == "53100":
        return GoneError(f"{shown} could not be written ({reason}); is the disk full?")
    if ready and _is_lost(error):
        return GoneError(
            f"lost the connection to {shown} ({reason}); what was committed is kept, and the same command goes on"
        )
    # An option of the address that no server knows is a ProgrammingError without a state.
    strange = state is None and not ready and _is_kind(error, "ProgrammingError")
    if _is_postgres(error) and (
        strange or (_is_kind(error, "OperationalError") and (state or "08")[:2] in _CONNECTING)
    ):
        return UsageError(f"cannot reach {shown} ({reason}); check the address, the server and the user")
    return None

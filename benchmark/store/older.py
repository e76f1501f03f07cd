"""Reading a file of an older schema without changing it: through a copy that is brought up to date."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from moebench.store import migrate


class Copy:
    """A temporary copy of an SQLite database in the newest schema; `close` removes it.

    Args:
        source: an engine that reads the older database.
        writer: makes an engine that writes to a file.

    Raises:
        DBAPIError: the copy cannot be written, or the original cannot be read.
    """

    def __init__(self, source: Engine, writer: Callable[[Path], Engine]) -> None:
        self._folder = TemporaryDirectory(prefix="moebench-", ignore_cleanup_errors=True)
        self.path = Path(self._folder.name) / "copy.db"
        try:
            _copy(source, self.path)
            engine = writer(self.path)
            try:
                with engine.begin() as connection:
                    migrate.upgrade(connection)
            finally:
                engine.dispose()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Removes the copy."""
        self._folder.cleanup()


def _copy(source: Engine, path: Path) -> None:
    raw: Any = source.raw_connection()
    target = sqlite3.connect(path)
    try:
        raw.driver_connection.backup(target)
    except sqlite3.Error as error:
        raise DBAPIError("backup", None, error) from None
    finally:
        target.close()
        raw.close()

"""Where a database is: a file or the address of a server, read from what a user wrote, and shown without a password."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from moebench.errors import UsageError

_FORM = "user:password@host:port/name"

_SERVER = re.compile(r"[^:/\\]{2,}:.*@.|[A-Za-z][A-Za-z0-9+]+:/+[^/\\]", re.DOTALL)
"""Text without :// that reads like an address all the same, and may hold a password."""

PATIENCE: dict[str, int] = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
"""After how many seconds (the last one: milliseconds) a server that says nothing counts as gone; an address may say
otherwise in its query. Without these, the operating system waits for minutes to hours."""


@dataclass(frozen=True)
class Address:
    """A database: an SQLite file `path`, or the server at `url` where there is none.

    Attributes:
        url: what SQLAlchemy takes.
        path: the file.
        shown: what messages call it, never with a password.
        secrets: what no message may hold.
    """

    url: URL
    path: Path | None
    shown: str
    secrets: tuple[str, ...] = ()

    @classmethod
    def read(cls, where: str | Path) -> Address:
        """Reads a path or an address.

        Raises:
            UsageError: it is neither.
        """
        if isinstance(where, Path) or "://" not in where:
            if isinstance(where, str):
                _refuse_almost(where)
            return cls._of_file(str(where))
        url = _parse(where)
        if url.drivername == "sqlite":
            return cls._of_file(url.database or "")
        public = URL.create(url.drivername, url.username, host=url.host, port=url.port, database=url.database)
        return cls(url, None, public.render_as_string(), _secrets(url))

    @classmethod
    def _of_file(cls, name: str) -> Address:
        try:
            path = Path(name).expanduser()
            if "\0" in name:
                raise ValueError("it has a null byte")
            path.is_file()  # fails for names that are too long, and in folders that are closed
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error).strip(".")
            short = name if len(name) < 80 else f"{name[:77]}..."
            raise UsageError(f"{short!r} cannot name a file ({reason}); change --db") from None
        return cls(URL.create("sqlite", database=name), path, repr(str(path)))

    def patience(self) -> dict[str, int]:
        """The settings of `PATIENCE` about which neither the address nor the environment says anything."""
        told = set(self.url.query) | ({"connect_timeout"} if os.environ.get("PGCONNECT_TIMEOUT") else set())
        return {name: value for name, value in PATIENCE.items() if name not in told}


def _refuse_almost(where: str) -> None:
    """Refuses the misspelt address of a server, which must not be taken for a file: messages show the names of files.

    Raises:
        UsageError: it reads like one, and there is no such file.
    """
    if _SERVER.match(where) and not os.path.lexists(where):
        raise UsageError(
            f"the database reads like the address of a server, but is none; write postgresql+psycopg://{_FORM}, or "
            "sqlite:///FILE for a file of such a name"
        )


def _parse(where: str) -> URL:
    scheme = where.split("://", 1)[0]
    unreadable = f"cannot read the {scheme}:// address of the database; write {scheme}://{_FORM}"
    try:
        url = make_url(where)
    except (ArgumentError, ValueError):
        raise UsageError(unreadable) from None
    if url.drivername in ("sqlite", "sqlite+pysqlite"):
        if url.query or url.host or url.database in (None, "", ":memory:"):
            raise UsageError("a sqlite:/// address names a file and nothing else, such as sqlite:///results.db")
        return url.set(drivername="sqlite")
    if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        if "@" in f"{url.host}{url.database}":
            # The rest of a password, which would be shown.
            raise UsageError(f"{unreadable}, with %40 for each @ in the password and %2F for each /")
        return url.set(drivername="postgresql+psycopg")
    raise UsageError(
        f"unknown kind of database {scheme!r}; name a file, sqlite:///FILE or postgresql+psycopg://user@host/name"
    )


def _secrets(url: URL) -> tuple[str, ...]:
    asked = [value for name, value in url.query.items() if "password" in name]
    words = (word for value in asked for word in ((value,) if isinstance(value, str) else value))
    return tuple(filter(None, (url.password, *words)))

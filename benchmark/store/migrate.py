"""What a database holds, and the steps that bring an older one up to date.

Alembic is imported only when there is a step to take: most commands find the newest schema and should not wait for it.
"""

from __future__ import annotations

from sqlalchemy import Connection, inspect, text

from moebench.errors import UsageError

REVISIONS = ("0001", "0002")
"""All revisions in order; the last one is the schema of `orm.py`."""

_FIRST = frozenset(
    {"alembic_version", "model", "checkpoint", "protocol", "run", "result", "run_result", "chunk", "claim"}
)
_TABLES = {"0001": _FIRST, "0002": _FIRST | {"example"}}


def revision(connection: Connection, shown: str) -> str | None:
    """The revision of a database, None for an empty one.

    Args:
        connection: an open connection.
        shown: what messages call the database.

    Raises:
        UsageError: it holds tables that are not ours, or was written by a newer moebench.
    """
    tables = set(inspect(connection).get_table_names())
    if not tables:
        return None
    found = None
    if "alembic_version" in tables and len(tables & _FIRST) > len(_FIRST) // 2:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    if found is None:
        names = ", ".join(sorted(tables)[:3])
        raise UsageError(
            f"{shown} is a database of something else (with tables such as {names}); name another with --db"
        )
    if found not in REVISIONS:
        raise UsageError(
            f"{shown} has schema {found}, newer than {REVISIONS[-1]} of this moebench; upgrade moebench, or name "
            "another database with --db"
        )
    if not tables >= _TABLES[found]:
        lost = ", ".join(sorted(_TABLES[found] - tables))
        raise UsageError(f"{shown} is damaged: it lacks the table {lost}; restore it from a copy")
    return str(found)


def upgrade(connection: Connection) -> None:
    """Takes all steps that are missing, in the connection's transaction: either all of them are taken or none."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "moebench.store:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")

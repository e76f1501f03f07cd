"""Whether the process that left a cell unfinished may still be at work on it."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from moebench.provenance import process_identity
from moebench.schema import Json

LEASE = timedelta(minutes=10)
"""How long after its last commit a process on another machine counts as alive: nobody can look there."""


def is_busy(owner: Json, ours: Json, touched_at: str, *, shared: bool) -> bool:
    """Whether a cell should be left to its owner.

    Args:
        owner: environment of the run that holds the cell, with `host`, `pid` and, since it is kept, `process`.
        ours: environment of the run that asks.
        touched_at: time of the owner's last commit, ISO 8601.
        shared: whether several machines may write to this database. The writers of an SQLite file share one machine, so
            another host name there is that of an earlier container or job.
    """
    host, pid = owner.get("host"), owner.get("pid")
    if host is None or not isinstance(pid, int):
        return False
    if host == ours.get("host"):
        return pid != os.getpid() and _at_work(owner, pid)
    return shared and datetime.now(UTC) - datetime.fromisoformat(touched_at) < LEASE


def state(owner: Json, host: str) -> Literal["alive", "gone", "elsewhere"]:
    """Whether the process that a run names is at work on this machine, called `host`, is not, or would be on another.

    Where a run does not say when its process began, a later one of the same number passes for it.
    """
    if owner.get("host") != host or not isinstance(owner.get("pid"), int):
        return "elsewhere"
    return "alive" if _at_work(owner, owner["pid"]) else "gone"


def _at_work(owner: Json, pid: int) -> bool:
    """Whether the process lives and is no later one of the same number, as there are after a restart."""
    was, found = owner.get("process"), process_identity(pid)
    return _alive(pid) and (was is None or found is None or was == found)


def _alive(pid: int) -> bool:
    if sys.platform == "win32":
        return True  # os.kill would end the process there; a cell too many is computed instead
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    try:
        # A killed process that its parent has not collected yet answers signals, but works no more.
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in ("Z", "X")

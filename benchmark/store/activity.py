"""What runs that are not over are doing: the cell at hand, how far it is, and whether its process still is."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from moebench.store.orm import ChunkRow, ResultRow, RunRow
from moebench.store.owner import state


@dataclass(frozen=True)
class Working:
    """A run that is not over.

    Attributes:
        process: whether its process is alive or gone, if that can be seen from this machine.
        attack, view: the cell that it has begun and not finished; None between cells.
        decisions: how many samples have been decided in the stages of that cell, each stage counted.
        touched_at: time of its last commit, ISO 8601 in UTC.
    """

    process: Literal["alive", "gone", "elsewhere"]
    attack: str | None
    view: str | None
    decisions: int
    touched_at: str


def working(session: Session) -> dict[str, Working]:
    """By run id, how far each run that is not over has come."""
    found = {}
    host = socket.gethostname()
    for run in session.scalars(select(RunRow).where(RunRow.status == "running").order_by(RunRow.id)):
        query = select(ResultRow).where(ResultRow.run_id == run.id).order_by(ResultRow.touched_at.desc())
        newest = session.scalars(query.limit(1)).first()
        attack = view = None
        decisions = 0
        if newest is not None and newest.status == "running":
            attack, view = newest.attack, newest.view
            decisions = session.scalar(select(func.sum(ChunkRow.n)).where(ChunkRow.result_id == newest.id)) or 0
        touched = run.started_at if newest is None else newest.touched_at
        found[run.run_id] = Working(state(run.environment, host), attack, view, int(decisions), touched)
    return found

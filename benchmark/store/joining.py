"""Adding the content of one database to another: what is there already is known by its identity and left alone.

A model, a set of weights and a protocol are the same if their digests are; a run if its id is; a result if run,
fingerprint and time of its end are. A cell that both databases computed, by runs of their own, stays two results, as it
would if one database had computed it twice; where their verdicts differ, that is said.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sqlalchemy import Table, insert, select, update
from sqlalchemy.orm import Session

from moebench.errors import RunError, UsageError
from moebench.schema import BoolArray
from moebench.store import packing, queries, records
from moebench.store.orm import Base, ProtocolRow, ResultRow

Row = dict[str, Any]
Key = tuple[int, str, str | None]

_RANK = {"running": 0, "failed": 1, "done": 2}
"""Of two states of one run, the later is the higher: a run that went on elsewhere may have come to its end there."""

_ENDING = ("status", "finished_at", "seconds", "error", "flags")


@dataclass
class Merged:
    """What a merge did.

    Attributes:
        runs, results: how many were added.
        known_runs, known_results: how many were here already.
        ended_runs: how many were here as running, and have ended there.
        unfinished: results that are not finished there, and were left out.
        contradictions: cells that both computed with other verdicts, in words.
    """

    runs: int = 0
    results: int = 0
    known_runs: int = 0
    known_results: int = 0
    ended_runs: int = 0
    unfinished: int = 0
    contradictions: list[str] = field(default_factory=list)


def join(source: Session, target: Session) -> Merged:
    """Adds runs, finished results, their samples and pictures, and labels of `source` to `target`.

    Raises:
        UsageError: two different runs have one id, or two sets of labels belong to the same data.
    """
    merged = Merged()
    ids = {name: _join_shared(source, target, name) for name in ("model", "checkpoint", "protocol")}
    _join_labels(source, target)
    runs = _join_runs(source, target, ids, merged)
    results = _join_results(source, target, runs, merged)
    _join_links(source, target, runs, results)
    return merged


def _table(name: str) -> Table:
    return Base.metadata.tables[name]


def _rows(session: Session, name: str, **equal: Any) -> list[Row]:
    table = _table(name)
    query = select(table).order_by(table.c.id)
    for column, value in equal.items():
        query = query.where(table.c[column] == value)
    return [dict(row) for row in session.execute(query).mappings()]


def _add(session: Session, name: str, row: Row, **changes: Any) -> int:
    """Inserts a row of another database under a number of its own; returns that."""
    values = {**row, **changes}
    del values["id"]
    key = session.execute(insert(_table(name)).values(values)).inserted_primary_key  # type: ignore[attr-defined]
    return int(key[0])


def _join_shared(source: Session, target: Session, name: str) -> dict[int, int]:
    """Rows that are one per digest; their numbers there and here."""
    table = _table(name)
    known = {digest: at for digest, at in target.execute(select(table.c.digest, table.c.id))}
    ids = {}
    for row in _rows(source, name):
        changes = {"labels": None} if name == "protocol" else {}
        ids[row["id"]] = known[row["digest"]] if row["digest"] in known else _add(target, name, row, **changes)
    return ids


def _join_labels(source: Session, target: Session) -> None:
    """Labels that either database knows, for all protocols on the same data."""
    for row in source.scalars(select(ProtocolRow).order_by(ProtocolRow.id)):
        protocol = records.protocol_record(row)
        for session in (source, target):
            labels = queries.labels(session, protocol)
            if labels is not None:
                try:
                    queries.keep_labels(target, protocol, labels)
                except RunError as error:
                    raise UsageError(f"{error}; nothing was merged") from None


def _join_runs(source: Session, target: Session, ids: dict[str, dict[int, int]], merged: Merged) -> dict[int, int]:
    known = {row["run_id"]: row for row in _rows(target, "run")}
    runs = {}
    for row in _rows(source, "run"):
        own = known.get(row["run_id"])
        if own is None:
            changes = {f"{name}_id": numbers[row[f"{name}_id"]] for name, numbers in ids.items()}
            runs[row["id"]] = _add(target, "run", row, **changes)
            merged.runs += 1
            continue
        if any(own[name] != row[name] for name in ("fingerprint", "started_at", "command")):
            raise UsageError(f"run {row['run_id']} is another one in each of the databases; nothing was merged")
        runs[row["id"]] = own["id"]
        merged.known_runs += 1
        if _RANK[row["status"]] > _RANK[own["status"]]:
            table = _table("run")
            ending = {name: row[name] for name in _ENDING}
            target.execute(update(table).where(table.c.id == own["id"]).values(ending))
            merged.ended_runs += own["status"] == "running"
    return runs


def _join_results(source: Session, target: Session, runs: dict[int, int], merged: Merged) -> dict[int, int]:
    """Finished results with their samples and pictures; their numbers there and here."""
    table = _table("result")
    known: dict[Key, int] = {}
    finished: dict[str, int] = {}
    columns = select(table.c.id, table.c.run_id, table.c.fingerprint, table.c.finished_at)
    for at, run_id, fingerprint, time in target.execute(columns.where(table.c.status == "done").order_by(table.c.id)):
        known[run_id, fingerprint, time] = finished[fingerprint] = at
    results = {}
    for row in _rows(source, "result"):
        if row["status"] != "done":
            merged.unfinished += 1
            continue
        key = runs[row["run_id"]], row["fingerprint"], row["finished_at"]
        if key in known:
            results[row["id"]] = known[key]
            merged.known_results += 1
            continue
        twin = finished.get(row["fingerprint"])
        if twin is not None and not np.array_equal(_broken(source, row["id"]), _broken(target, twin)):
            merged.contradictions.append(f"{row['attack']} on {row['view']} ({row['fingerprint'][:16]}…)")
        at = results[row["id"]] = _add(target, "result", row, run_id=runs[row["run_id"]])
        for part in ("chunk", "example"):
            for piece in _rows(source, part, result_id=row["id"]):
                arrays = {"arrays": packing.press(piece["arrays"])} if part == "chunk" else {}
                _add(target, part, piece, result_id=at, **arrays)
        merged.results += 1
    return results


def _join_links(source: Session, target: Session, runs: dict[int, int], results: dict[int, int]) -> None:
    known = {(row["run_id"], row["result_id"]) for row in _rows(target, "run_result")}
    for row in _rows(source, "run_result"):
        pair = runs[row["run_id"]], results[row["result_id"]]
        if pair not in known:
            _add(target, "run_result", row, run_id=pair[0], result_id=pair[1])


def _broken(session: Session, result_id: int) -> BoolArray:
    row = session.get_one(ResultRow, result_id)
    broken = packing.merge(queries.chunks(row)).broken
    session.expunge(row)
    return broken

"""The queries behind the methods of the store."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TypeVar

import numpy as np
from sqlalchemy import Select, select, update
from sqlalchemy.orm import Session, selectinload

from moebench.errors import InWorkError, RunError, UsageError
from moebench.schema import Chunk, IntArray, Json, ProtocolRecord, StoredResult
from moebench.store import packing
from moebench.store.orm import CheckpointRow, ChunkRow, ModelRow, ProtocolRow, ResultRow, RunResultRow, RunRow
from moebench.store.owner import is_busy

Shared = TypeVar("Shared", ModelRow, CheckpointRow, ProtocolRow)


def now() -> str:
    """The time as the tables hold it: ISO 8601 in UTC, of fixed width."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def finished() -> Select[ResultRow]:
    """The finished results, newest first."""
    return (
        select(ResultRow).where(ResultRow.status == "done").order_by(ResultRow.finished_at.desc(), ResultRow.id.desc())
    )


def all_runs() -> Select[RunRow]:
    """The runs, oldest first, with their results."""
    return select(RunRow).order_by(RunRow.id).options(selectinload(RunRow.links).joinedload(RunResultRow.result))


def shared(session: Session, row: Shared) -> Shared:
    """The row of the same content if there is one, else the given row, added."""
    kind = type(row)
    known = session.scalars(select(kind).where(kind.digest == row.digest)).one_or_none()
    if known is not None:
        return known
    session.add(row)
    return row


def labels(session: Session, protocol: ProtocolRecord) -> IntArray | None:
    """The labels of a protocol's samples: of any protocol on the same data, for its hash covers them."""
    query = select(ProtocolRow.labels).where(ProtocolRow.data_sha256 == protocol.data_sha256)
    blob = session.scalars(query.where(ProtocolRow.labels.is_not(None)).order_by(ProtocolRow.id).limit(1)).first()
    return None if blob is None else packing.unpack_labels(blob)


def keep_labels(session: Session, protocol: ProtocolRecord, told: IntArray) -> None:
    """Writes labels to all protocols on the same data that lack them.

    Raises:
        RunError: they are not one class per sample, or differ from those that are known.
    """
    told = np.asarray(told)
    check_labels(protocol, told)
    known = labels(session, protocol)
    if known is not None and not np.array_equal(known, told):
        raise RunError(f"the labels of {protocol.dataset} differ from those stored for the same data; check the store")
    same = update(ProtocolRow).where(ProtocolRow.data_sha256 == protocol.data_sha256, ProtocolRow.labels.is_(None))
    session.execute(same.values(labels=packing.pack_labels(told)))


def check_labels(protocol: ProtocolRecord, told: IntArray) -> None:
    """Refuses labels that are not one class per sample.

    Raises:
        RunError: their shape, type or range is wrong.
    """
    whole = told.shape == (protocol.n,) and told.dtype.kind in "iu"
    if not whole or not 0 <= told.min() <= told.max() < protocol.num_classes:
        raise RunError(
            f"labels of {protocol.dataset} must be {protocol.n} numbers from 0 to {protocol.num_classes - 1}"
        )


def unfinished(session: Session, run: RunRow, fingerprint: str) -> ResultRow | None:
    """The newest unfinished result of a cell, for `run` to go on with; None if there is none.

    Raises:
        InWorkError: another process is at work on the cell, or has finished it.
    """
    done = session.scalars(finished().where(ResultRow.fingerprint == fingerprint).limit(1)).first()
    if done is not None:
        raise InWorkError(done.run.run_id, str(done.run.environment.get("host")))
    query = (
        select(ResultRow)
        .where(ResultRow.status == "running", ResultRow.fingerprint == fingerprint)
        .order_by(ResultRow.id.desc())
    )
    rows = session.scalars(query).all()
    many_machines = session.get_bind().dialect.name != "sqlite"
    for row in rows:
        owner = row.run
        if owner.status == "running" and is_busy(
            owner.environment, run.environment, row.touched_at, shared=many_machines
        ):
            raise InWorkError(owner.run_id, str(owner.environment.get("host")))
    return rows[0] if rows else None


def close_gone(session: Session, run_id: str, fingerprint: str, environment: Json) -> None:
    """Marks as failed the earlier runs of the same work whose process ended before it held any of it.

    A run that holds an unfinished cell is left to the one that goes on with that cell.
    """
    holding = select(ResultRow.run_id).where(ResultRow.status == "running")
    query = select(RunRow).where(
        RunRow.status == "running", RunRow.fingerprint == fingerprint, RunRow.id.not_in(holding)
    )
    many_machines = session.get_bind().dialect.name != "sqlite"
    for row in session.scalars(query):
        if not is_busy(row.environment, environment, row.started_at, shared=many_machines):
            row.status, row.finished_at = "failed", now()
            row.error = f"its process ended before the run did; run {run_id} began anew"


def chunks(row: ResultRow) -> list[Chunk]:
    """The chunks of a result in the order of their commits."""
    return [_chunk(chunk) for chunk in row.chunks]


def holder(result_id: int) -> Select[str, str, str, str | None, int]:
    """Of a result its status, the id, status and error of the run that holds it, and the size of its protocol.

    Asked at every commit, so that no more is read than is needed.
    """
    columns = (ResultRow.status, RunRow.run_id, RunRow.status.label("run_status"), RunRow.error, ProtocolRow.n)
    joined = select(*columns).join(RunRow, ResultRow.run_id == RunRow.id)
    return joined.join(ProtocolRow, RunRow.protocol_id == ProtocolRow.id).where(ResultRow.id == result_id)


def newest(found: Sequence[StoredResult]) -> list[StoredResult]:
    """The first result of each fingerprint."""
    first: dict[str, StoredResult] = {}
    for result in found:
        first.setdefault(result.cell.fingerprint, result)
    return list(first.values())


def place(result: StoredResult) -> tuple[str, ...]:
    """Where a result stands among others: by what it says, so that every database gives the same order."""
    protocol, cell = result.protocol, result.cell
    return protocol.dataset, protocol.split, result.model.name, cell.attack, cell.view, cell.fingerprint


def resolve(prefix: str, run_ids: Sequence[str], shown: str) -> str:
    """The run id that is the given text, or alone begins with it.

    Raises:
        UsageError: none or several do.
    """
    if prefix in run_ids:
        return prefix
    matches = [run_id for run_id in run_ids if prefix and run_id.startswith(prefix)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UsageError(f"run {prefix!r} is ambiguous: {_some(matches)}; give more of the id")
    close = difflib.get_close_matches(prefix, run_ids, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}" if close else f"it has {_some(run_ids) if run_ids else 'no runs'}"
    raise UsageError(f"no run {prefix!r} in {shown}; {hint}")


def _chunk(row: ChunkRow) -> Chunk:
    chunk = packing.unpack(row.stage, row.seconds, row.arrays)
    if len(chunk) != row.n:
        raise RunError(f"a chunk of stage {row.stage!r} holds {len(chunk)} samples, not {row.n}")
    return chunk


def _some(run_ids: Sequence[str]) -> str:
    return ", ".join(run_ids[-3:]) + (f" and {len(run_ids) - 3} more" if len(run_ids) > 3 else "")

"""Imported results in the database: ordinary rows whose names and fingerprints keep them apart from ours.

A run's environment says where it comes from, its id and the fingerprints of its cells begin with `external:`, and the
model's name ends with the lab. So nothing that looks results up by fingerprint or by model finds an imported one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from moebench.errors import UsageError
from moebench.schema import (
    IMPORTED,
    BoolArray,
    CellSpec,
    Chunk,
    IntArray,
    Outcomes,
    ResultRecord,
    StoredRun,
    is_protocol,
)
from moebench.store import packing, queries, records
from moebench.store.orm import ChunkRow, ResultRow, RunResultRow, RunRow

PREFIX = "external:"


@dataclass(frozen=True)
class ExternalResult:
    """One imported cell with its evidence."""

    cell: CellSpec
    record: ResultRecord
    finished_at: str
    outcomes: Outcomes


@dataclass(frozen=True)
class ExternalRun:
    """One imported run as it will be stored; `original_id` is its id in the store that it comes from.

    `labels` are what the lab holds the labels to be; they are compared with ours and not stored.
    """

    run: StoredRun
    original_id: str
    results: tuple[ExternalResult, ...]
    labels: IntArray | None = None


def of_lab(
    run: StoredRun, evidence: Sequence[Outcomes], labels: IntArray | None, lab: str, origin: Mapping[str, Any]
) -> ExternalRun:
    """A run under names that tell it apart from ours and from other labs'.

    Args:
        run: as the lab's file tells it.
        evidence: the samples of its results, in their order.
        labels: of the samples, None where the file does not tell them.
        lab: who measured.
        origin: what to say of the file, kept in the run's environment.
    """
    mark = f"{PREFIX}{hashlib.sha256(lab.encode()).hexdigest()[:12]}:"
    name = f"{run.model.name} (external: {lab})"
    mine = replace(
        run,
        run_id=f"{mark}{run.run_id}",
        model=replace(run.model, name=name),
        checkpoint=replace(run.checkpoint, model=name),
        environment={**run.environment, IMPORTED: {**origin, "run_id": run.run_id}},
    )
    results = tuple(
        ExternalResult(
            replace(one.cell, fingerprint=f"{mark}{one.cell.fingerprint}"), one.record, one.finished_at, outcomes
        )
        for one, outcomes in zip(run.results, evidence, strict=True)
    )
    return ExternalRun(mine, run.run_id, results, labels)


def add(session: Session, runs: Iterable[ExternalRun], shown: str) -> int:
    """Adds what is not there yet; returns how many results that were.

    Raises:
        UsageError: a result of that run and cell is there with other samples, or the same file under another name.
    """
    wanted = list(runs)
    labs = {run.run.environment[IMPORTED]["file_sha256"]: run.run.environment[IMPORTED]["from"] for run in wanted}
    for environment in session.scalars(select(RunRow.environment).where(RunRow.run_id.startswith(PREFIX))):
        before = environment.get(IMPORTED, {})
        lab = labs.get(before.get("file_sha256"), before.get("from"))
        if lab != before.get("from"):
            raise UsageError(f"this file was imported into {shown} before, as {before.get('from')!r}, not {lab!r}")
    return sum(_add_run(session, external, shown) for external in wanted)


def _add_run(session: Session, external: ExternalRun, shown: str) -> int:
    run = external.run
    ours = queries.labels(session, run.protocol)
    if ours is not None and external.labels is not None and not np.array_equal(ours, external.labels):
        raise UsageError(
            f"run {external.original_id!r} has other labels than {shown} for the same data "
            f"(sha256 {run.protocol.data_sha256[:16]}…)"
        )
    row = session.scalars(select(RunRow).where(RunRow.run_id == records.storable(run.run_id))).one_or_none()
    known = {} if row is None else {link.result.fingerprint: link.result for link in row.links}
    new = []
    for one in external.results:
        there = known.get(one.cell.fingerprint)
        if there is None:
            new.append(one)
        elif not _same(packing.merge(queries.chunks(there)), one.outcomes):
            raise UsageError(
                f"{one.cell.attack} on {one.cell.view} of run {external.original_id!r} was imported into {shown} "
                "before, with other samples; one of the two files is not what that lab measured"
            )
    if not new:
        return 0
    if row is None:
        row = _run_row(session, run)
    for one in new:
        _add_result(session, row, one)
    return len(new)


def _run_row(session: Session, run: StoredRun) -> RunRow:
    row = RunRow(
        run_id=records.storable(run.run_id),
        fingerprint=f"{PREFIX}{hashlib.sha256(run.run_id.encode('utf-8', 'replace')).hexdigest()}",
        status="done",
        command=records.storable(run.command),
        environment=records.plain(run.environment),
        model=queries.shared(session, records.model_row(run.model)),
        checkpoint=queries.shared(session, records.checkpoint_row(run.checkpoint)),
        protocol=queries.shared(session, records.protocol_row(run.protocol)),
        started_at=run.started_at,
        finished_at=run.finished_at,
        seconds=run.seconds,
        flags=[records.plain(asdict(flag)) for flag in run.flags],
    )
    session.add(row)
    return row


def _add_result(session: Session, run: RunRow, one: ExternalResult) -> None:
    cell = {name: records.plain(getattr(one.cell, name)) for name in records.CELL_FIELDS}
    times = dict.fromkeys(("started_at", "touched_at", "finished_at"), one.finished_at)
    row = ResultRow(run=run, status="done", **times, **cell, **records.result_values(one.record))
    session.add(row)
    chunks = (
        _protocol_chunks(one) if is_protocol(one.cell.attack) else evidence_chunks(one.outcomes, one.record.seconds)
    )
    row.chunks = [
        ChunkRow(stage=chunk.stage, seq=seq, n=len(chunk), seconds=chunk.seconds, arrays=packing.pack(chunk))
        for seq, chunk in enumerate(chunks)
    ]
    session.add(RunResultRow(run=run, result=row, reused=False))


def evidence_chunks(outcomes: Outcomes, seconds: float) -> list[Chunk]:
    """Chunks that merge into exactly this evidence: what was decided from the start, then what each stage broke.

    All passes of a sample are in the chunk that decides it; how they were spread over stages is in the aggregate alone.
    """
    stages = np.array(outcomes.stage, dtype=object)
    hit: BoolArray = stages != ""
    clean = _chunk(outcomes, packing.CLEAN, np.ones_like(hit), 0.0 if np.isnan(seconds) else seconds)
    at_first = replace(
        clean,
        broken=clean.broken & ~hit,
        adv_pred=np.where(hit, clean.clean_pred, clean.adv_pred),
        distance=np.where(hit, np.float32(0), clean.distance).astype(np.float32),
        forwards=np.where(hit, 0, clean.forwards),
        backwards=np.where(hit, 0, clean.backwards),
    )
    named = dict.fromkeys(stage for stage in outcomes.stage if stage)
    return [at_first, *(_chunk(outcomes, stage, stages == stage, 0.0) for stage in named)]


def _protocol_chunks(one: ExternalResult) -> list[Chunk]:
    """The evidence of a published protocol, which scores all samples itself: none is decided from the start."""
    stages = np.array([stage or one.cell.attack for stage in one.outcomes.stage], dtype=object)
    first, *others = dict.fromkeys(stages.tolist())
    seconds = 0.0 if np.isnan(one.record.seconds) else one.record.seconds
    return [
        _chunk(one.outcomes, first, stages == first, seconds),
        *(_chunk(one.outcomes, stage, stages == stage, 0.0) for stage in others),
    ]


def _chunk(outcomes: Outcomes, stage: str, at: BoolArray, seconds: float) -> Chunk:
    return Chunk(
        stage=stage,
        index=outcomes.index[at],
        broken=outcomes.broken[at],
        clean_pred=outcomes.clean_pred[at],
        adv_pred=outcomes.adv_pred[at],
        distance=outcomes.distance[at],
        forwards=outcomes.forwards[at],
        backwards=outcomes.backwards[at],
        seconds=seconds,
    )


def _same(one: Outcomes, other: Outcomes) -> bool:
    arrays = ("index", "broken", "clean_pred", "adv_pred", "distance")
    return one.stage == other.stage and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)

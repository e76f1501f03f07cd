"""What can be wrong in a database: damage, dangling references, and hashes and aggregates that its rows contradict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from sqlalchemy import select, text
from sqlalchemy.orm import Session, undefer

from moebench.errors import RunError, UsageError
from moebench.identity import expected_fingerprint, expected_run_fingerprint
from moebench.metrics import wilson
from moebench.schema import IMPORTED, Chunk, Example, IntArray, Outcomes, ResultRecord, StoredResult
from moebench.store import packing, pictures, queries, records
from moebench.store.orm import CheckpointRow, ModelRow, ProtocolRow, ResultRow, RunResultRow
from moebench.store.routing_audit import routing_problems

_TOLERANCE = 1e-9


def findings(session: Session, *, sqlite: bool) -> Iterator[str]:
    """Everything that is wrong, one line each.

    Args:
        session: a session that sees one state of the database.
        sqlite: whether the database can check its own pages and references; PostgreSQL does so by itself.
    """
    if sqlite:
        yield from _damage(session)
    yield from _hashes(session)
    for row in session.scalars(select(ResultRow).order_by(ResultRow.id)):
        name = f"result {row.id} ({row.attack} on {row.view})"
        yield from (f"{name}: {problem}" for problem in _result(session, row))
        session.expire(row, ["chunks"])
    for run in session.scalars(queries.all_runs()):
        try:
            expected = expected_run_fingerprint(records.stored_run(run))
        except UsageError as error:
            yield f"run {run.run_id}: {error}"
            continue
        if expected not in (None, run.fingerprint):
            yield f"run {run.run_id}: its fingerprint is not that of the results that it shows"


def _damage(session: Session) -> Iterator[str]:
    """What SQLite itself finds wrong: broken pages, and references to rows that are not there."""
    for line in session.scalars(text("PRAGMA integrity_check(10)")):
        if line != "ok":
            yield f"damaged file: {line}"
    for table, rowid, parent, _ in session.execute(text("PRAGMA foreign_key_check")):
        yield f"{table} {rowid} refers to a {parent} that does not exist"


def _hashes(session: Session) -> Iterator[str]:
    """Models, weights and protocols whose digest is not that of their fields, and labels that cannot be."""
    for model in session.scalars(select(ModelRow).order_by(ModelRow.id)):
        if records.digest(records.model_record(model)) != model.digest:
            yield f"model {model.id} ({model.name}): its digest is not that of its fields"
    for weights in session.scalars(select(CheckpointRow).order_by(CheckpointRow.id)):
        if records.digest(records.checkpoint_record(weights)) != weights.digest:
            yield f"checkpoint {weights.id} (of {weights.model}): its digest is not that of its fields"
    query = select(ProtocolRow).order_by(ProtocolRow.id).options(undefer(ProtocolRow.labels))
    for row in session.scalars(query):
        name = f"protocol {row.id} ({row.dataset})"
        try:
            protocol = records.protocol_record(row)
        except UsageError as error:
            yield f"{name}: {error}"
            continue
        if records.digest(protocol) != row.digest:
            yield f"{name}: its digest is not that of its fields"
        try:
            known = queries.labels(session, protocol)
            if known is not None:
                queries.check_labels(protocol, known)
                if row.labels is not None and not np.array_equal(packing.unpack_labels(row.labels), known):
                    yield f"{name}: its labels differ from those of another protocol on the same data"
        except RunError as error:
            yield f"{name}: {error}"


def _result(session: Session, row: ResultRow) -> Iterator[str]:
    """Where a result differs from its samples or its hash, or is not shown by the run that made it."""
    try:
        samples, shown = queries.chunks(row), pictures.examples(session, row.id)
        labels = queries.labels(session, records.protocol_record(row.run.protocol))
    except (RunError, UsageError) as error:
        yield str(error)
        return
    yield from example_problems(shown, packing.merge(samples), labels)
    if row.status != "done":
        return
    link = select(RunResultRow.id).where(RunResultRow.run_id == row.run_id, RunResultRow.result_id == row.id)
    if session.scalar(link) is None:
        yield f"run {row.run.run_id} made it but does not show it"
    stored = records.stored_result(row)
    expected = expected_fingerprint(stored)
    if expected not in (None, row.fingerprint):
        yield "its fingerprint is not that of its weights, data, attack and settings"
    yield from aggregate_problems(stored, samples, labels)


def aggregate_problems(stored: StoredResult, chunks: Sequence[Chunk], labels: IntArray | None) -> Iterator[str]:
    """Where the aggregate of a finished result is not what its samples give, in words."""
    record, n = stored.record, stored.protocol.n
    found = packing.contradictions(record, chunks, n)
    yield from found
    if found:
        return
    outcomes = packing.merge(chunks)
    standing = int(np.count_nonzero(~outcomes.broken))
    low, high = wilson(standing, n)
    told = {
        "lower end of its interval": (record.ci_low, low),
        "upper end of its interval": (record.ci_high, high),
        "seconds": (record.seconds, sum(chunk.seconds for chunk in chunks)),
        "share of changed predictions": (
            record.changed_predictions,
            float(np.mean(outcomes.adv_pred != outcomes.clean_pred)),
        ),
        "forwards": (record.forwards, int(outcomes.forwards.sum())),
        "backwards": (record.backwards, int(outcomes.backwards.sum())),
    }
    for name, (has, gives) in told.items():
        if gives is not None and not abs(has - gives) <= _TOLERANCE * max(1.0, abs(gives)):
            yield f"{name} is {has:.6g}, its samples give {gives:.6g}"
    if IMPORTED in stored.environment:
        # Another laboratory's file tells what became of each sample, not in which stage and at what cost.
        return
    yield from stage_problems(record, chunks)
    yield from routing_problems(record, chunks)
    if labels is not None:
        wrong = outcomes.clean_pred != labels
        clean = [chunk for chunk in chunks if chunk.stage == packing.CLEAN]
        for chunk in clean:
            if not np.array_equal(chunk.broken, wrong[chunk.index]):
                yield "which samples are wrong from the start is not what the labels give"


def stage_problems(record: ResultRecord, chunks: Sequence[Chunk]) -> Iterator[str]:
    """Where the account of a stage is not the sum over its chunks, and losses are not the means of their samples'."""
    names = dict.fromkeys(chunk.stage for chunk in chunks)
    if record.stages and set(record.stages) != set(names):
        yield f"its stages are {', '.join(record.stages)}, its samples have {', '.join(names)}"
        return
    for stage, account in record.stages.items():
        own = [chunk for chunk in chunks if chunk.stage == stage]
        sums = {
            "attacked": sum(map(len, own)),
            "broken": sum(int(chunk.broken.sum()) for chunk in own),
            "forwards": sum(int(chunk.forwards.sum()) for chunk in own),
            "backwards": sum(int(chunk.backwards.sum()) for chunk in own),
        }
        for name, gives in sums.items():
            if name in account and account[name] != gives:
                yield f"{name} of stage {stage!r} is {account[name]}, its samples give {gives}"
    for name, has, mean in zip(("before", "after"), record.losses, _losses(chunks, record.n), strict=True):
        if has is not None and mean is not None and not abs(has - mean) <= 1e-6 * max(1.0, abs(mean)):
            yield f"loss {name} the attack is {has:.6g}, its samples give {mean:.6g}"


def _losses(chunks: Sequence[Chunk], n: int) -> tuple[float | None, float | None]:
    """Mean cross-entropy on clean and on last images; None where a sample's is not stored."""
    clean, last = np.full(n, np.nan), np.full(n, np.nan)
    for chunk in chunks:
        if "loss" in chunk.extras:
            last[chunk.index] = chunk.extras["loss"]
            if chunk.stage == packing.CLEAN:
                clean[chunk.index] = chunk.extras["loss"]
    before, after = (None if bool(np.isnan(values).any()) else float(values.mean()) for values in (clean, last))
    return before, after


def example_problems(examples: Sequence[Example], outcomes: Outcomes, labels: IntArray | None) -> Iterator[str]:
    """Where a picture says other than the samples of its result."""
    rows = {int(index): row for row, index in enumerate(outcomes.index)}
    for example in examples:
        row = rows.get(example.index)
        says = (True, example.clean_pred, example.adv_pred, np.float32(example.distance), example.stage)
        if row is None or says != (
            bool(outcomes.broken[row]),
            int(outcomes.clean_pred[row]),
            int(outcomes.adv_pred[row]),
            outcomes.distance[row],
            outcomes.stage[row],
        ):
            yield f"the picture of sample {example.index} says other than the sample"
        elif example.label != example.clean_pred or (labels is not None and example.label != labels[example.index]):
            yield f"the picture of sample {example.index} has another label than the sample"

"""What the rest of moebench sees of the database: records in, records out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from moebench.claims import load_claims
from moebench.errors import GoneError, RunError, UsageError
from moebench.schema import (
    CellSpec,
    Chunk,
    Claim,
    Example,
    Flag,
    IntArray,
    Outcomes,
    ProtocolRecord,
    ResultRecord,
    RunStart,
    StoredResult,
    StoredRun,
)
from moebench.store import activity, external, packing, pictures, queries, records
from moebench.store.activity import Working
from moebench.store.connect import Database
from moebench.store.orm import CheckpointRow, ChunkRow, ClaimRow, ModelRow, ProtocolRow, ResultRow, RunResultRow, RunRow

if TYPE_CHECKING:
    from moebench.store.joining import Merged

CANCELLED = "cancelled"


class Store:
    """The results database. Every method is one transaction; what it returns stays valid after the store is closed.

    Use `Store.open`, as a context manager. Rows are only added: a correction or a repeated cell is a new row.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._opened: dict[int, str] = {}
        self._known: dict[int, packing.Known] = {}
        self._sound = False

    @classmethod
    def open(cls, where: str | Path | None = None, *, write: bool, create: bool = True) -> Self:
        """Opens a database, and for writing makes or upgrades it.

        Args:
            where: a file, `sqlite:///FILE` or `postgresql+psycopg://...`; None means the environment variable
                MOEBENCH_DB, or `results.db`.
            write: whether it will be written to; that this is possible is verified here, before any work.
            create: whether a database that is not there or empty is made.

        Raises:
            UsageError: there is nothing to read, it cannot be written, or it is damaged, foreign or too new.
        """
        database = Database(where, write=write, create=create)
        store = cls(database)
        try:
            if write:
                store._refresh_claims()
        except BaseException:
            database.close()
            raise
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def where(self) -> str:
        """The database as messages name it; never with a password."""
        return self._database.shown

    @property
    def found(self) -> str | None:
        """The schema that the database had when it was opened, None for one that was made."""
        return self._database.found

    def close(self) -> None:
        """Ends all connections; of an SQLite database one file is left."""
        self._database.close()

    def begin_run(self, start: RunStart, labels: IntArray | None = None) -> None:
        """Records that a run has started; one of the same cells whose process is gone from this machine has failed.

        Args:
            start: what is known of it.
            labels: of the protocol's samples, (n,); kept for all protocols on the same data that lack them.

        Raises:
            RunError: the run id is taken, or the labels are not those of such data.
        """
        with self._database.writing() as session:
            if session.scalar(select(RunRow.id).where(RunRow.run_id == start.run_id)) is not None:
                raise RunError(f"run {start.run_id} is already in {self.where}; every run needs an id of its own")
            queries.close_gone(session, start.run_id, start.fingerprint, start.environment)
            session.add(
                RunRow(
                    run_id=start.run_id,
                    fingerprint=start.fingerprint,
                    status="running",
                    command=records.storable(start.command),
                    environment=records.plain(start.environment),
                    model=queries.shared(session, records.model_row(start.model)),
                    checkpoint=queries.shared(session, records.checkpoint_row(start.checkpoint)),
                    protocol=queries.shared(session, records.protocol_row(start.protocol)),
                    started_at=queries.now(),
                    flags=[],
                )
            )
            if labels is not None:
                queries.keep_labels(session, start.protocol, labels)

    def order_results(self, run_id: str, fingerprints: Sequence[str]) -> None:
        """Puts the results that a run shows into the order of its cells, where they came in another.

        Raises:
            RunError: the run is not running.
        """
        with self._database.writing() as session:
            run = self._running(session, run_id)
            shown = sorted(run.links, key=lambda link: fingerprints.index(link.result.fingerprint))
            facts = [(link.result, link.reused) for link in shown]
            for link in shown:
                session.delete(link)
            session.flush()
            session.add_all(RunResultRow(run=run, result=result, reused=reused) for result, reused in facts)

    def finish_run(
        self,
        run_id: str,
        status: Literal["done", "failed"],
        *,
        seconds: float,
        flags: Sequence[Flag] = (),
        error: str | None = None,
    ) -> None:
        """Records how a run ended, with the reasons to distrust it.

        Raises:
            RunError: there is no such run, or it has ended before.
        """
        with self._database.writing() as session:
            run = self._running(session, run_id)
            run.status, run.seconds, run.finished_at = status, seconds, queries.now()
            run.flags = [records.plain(asdict(flag)) for flag in flags]
            run.error = None if error is None else records.storable(error)

    def cancel_runs(self, prefixes: Sequence[str]) -> list[StoredRun]:
        """Ends runs that are running; a process that works on one stops at its next commit, and keeps what it has.

        Raises:
            UsageError: no run or several runs have an id that begins so, or a run has ended; then none is cancelled.
        """
        with self._database.writing() as session:
            known = session.scalars(select(RunRow.run_id).order_by(RunRow.id)).all()
            rows = []
            for run_id in dict.fromkeys(queries.resolve(prefix, known, self.where) for prefix in prefixes):
                row = session.scalars(queries.all_runs().where(RunRow.run_id == run_id)).one()
                if row.status != "running":
                    raise UsageError(
                        f"run {run_id} has ended already ({row.status}); only running ones can be cancelled"
                    )
                rows.append(row)
            for row in rows:
                row.status, row.finished_at, row.error = "failed", queries.now(), CANCELLED
            return [records.stored_run(row) for row in rows]

    def working(self) -> dict[str, Working]:
        """By run id, how far each run that is not over has come."""
        with self._database.reading() as session:
            return activity.working(session)

    def merge(self, other: Store) -> Merged:
        """Adds all runs and finished results of another database that are not here; all of them or, on errors, none.

        Raises:
            UsageError: the other database is this one, or damaged, or contradicts this one.
        """
        from moebench.store import joining

        if self._database.is_file_of(other._database):
            raise UsageError(f"{other.where} is the database to merge into; name another one")
        if not other._sound:
            other.refuse_unsound()
        with other._database.reading() as source, self._database.writing() as target:
            return joining.join(source, target)

    def unlabelled(self) -> list[ProtocolRecord]:
        """The protocols whose labels are not known."""
        with self._database.reading() as session:
            rows = session.scalars(select(ProtocolRow).where(ProtocolRow.labels.is_(None)).order_by(ProtocolRow.id))
            return [records.protocol_record(row) for row in rows]

    def tell_labels(self, protocol: ProtocolRecord, labels: IntArray) -> None:
        """Keeps the labels (n,) of a protocol's samples, for all protocols on the same data that lack them.

        Raises:
            RunError: they are not one class per sample, or differ from those that are known.
        """
        with self._database.writing() as session:
            queries.keep_labels(session, protocol, labels)

    def open_cell(self, run_id: str, cell: CellSpec, *, resume: bool) -> tuple[int, list[Chunk]]:
        """Starts a cell, or goes on with one that a dead process left unfinished.

        Args:
            run_id: the run that will work on it.
            cell: what will be computed.
            resume: whether to take over the newest unfinished result of the same fingerprint.

        Returns: the result's id, and the chunks committed so far in the order of their commits.

        Raises:
            InWorkError: the cell is to be resumed, and a living process is at work on it or has finished it.
            RunError: the run is not running.
        """
        with self._database.writing() as session:
            run = self._running(session, run_id)
            row = queries.unfinished(session, run, cell.fingerprint) if resume else None
            if row is None:
                values = {name: records.plain(getattr(cell, name)) for name in records.CELL_FIELDS}
                row = ResultRow(run=run, status="running", started_at=queries.now(), touched_at=queries.now(), **values)
                session.add(row)
            elif row.run is not run:
                if row.run.status == "running":
                    row.run.status, row.run.finished_at = "failed", queries.now()
                    row.run.error = f"its process ended before the run did; run {run_id} went on with its work"
                row.run, row.touched_at = run, queries.now()
            session.flush()
            self._opened[row.id] = run_id
            self._known.pop(row.id, None)
            return row.id, queries.chunks(row)

    def append_chunk(self, result_id: int, chunk: Chunk) -> None:
        """Commits finished samples of one stage, and of their examples those that are worth keeping so far.

        Raises:
            RunError: a sample is in that stage already, the arrays are malformed, or the result is finished or another
                run's by now.
        """
        self.append_chunks(result_id, [chunk])

    def append_chunks(self, result_id: int, chunks: Sequence[Chunk]) -> None:
        """Commits several chunks in one transaction, all or none; errors as in `append_chunk`."""
        blobs = [packing.pack(chunk) for chunk in chunks]
        with self._database.writing() as session:
            n = self._refuse_others(session, result_id)
            known = self._known.get(result_id)
            if known is None:
                known = packing.Known(n, queries.chunks(session.get_one(ResultRow, result_id)))
            known = known.with_(chunks)
            last = session.scalar(select(func.max(ChunkRow.seq)).where(ChunkRow.result_id == result_id))
            rows = [
                {
                    "result_id": result_id,
                    "stage": chunk.stage,
                    "seq": seq,
                    "n": len(chunk),
                    "seconds": float(chunk.seconds),
                    "arrays": blob,
                }
                for seq, (chunk, blob) in enumerate(zip(chunks, blobs, strict=True), 0 if last is None else last + 1)
            ]
            session.execute(insert(ChunkRow), rows)
            pictures.keep(session, result_id, [example for chunk in chunks for example in chunk.examples])
            session.execute(update(ResultRow).where(ResultRow.id == result_id).values(touched_at=queries.now()))
        if result_id in self._opened:
            # Nobody else adds to a cell that this store has opened: `_unfinished` sees who holds it.
            self._known[result_id] = known

    def finish_cell(self, result_id: int, record: ResultRecord) -> None:
        """Commits the aggregate of a cell and shows it in its run.

        Raises:
            RunError: the aggregate contradicts the samples, or the result is finished or another run's by now.
        """
        with self._database.writing() as session:
            self._refuse_others(session, result_id)
            row = session.get_one(ResultRow, result_id)
            found = packing.contradictions(record, queries.chunks(row), row.run.protocol.n)
            if (record.attack, record.view) != (row.attack, row.view):
                found.append(f"it is of {record.attack} on {record.view}")
            if found:
                name = f"result {result_id} ({row.attack} on {row.view})"
                raise RunError(f"{name} cannot be finished: {'; '.join(found)}; its samples are kept")
            for name, value in records.result_values(record).items():
                setattr(row, name, value)
            row.status = "done"
            row.finished_at = row.touched_at = queries.now()
            pictures.trim(session, result_id)
            self._known.pop(result_id, None)
            session.add(RunResultRow(run=row.run, result=row, reused=False))

    def link_reused(self, run_id: str, result_id: int) -> None:
        """Shows a finished result of an earlier run in this run too.

        Raises:
            RunError: the run is not running, or the result is not finished.
        """
        with self._database.writing() as session:
            run = self._running(session, run_id)
            row = session.get(ResultRow, result_id)
            if row is None or row.status != "done":
                raise RunError(f"result {result_id} is not finished, so run {run_id} cannot reuse it")
            known = select(RunResultRow.id).where(RunResultRow.run_id == run.id, RunResultRow.result_id == result_id)
            if session.scalar(known) is None:
                session.add(RunResultRow(run=run, result=row, reused=True))

    def add_external(self, runs: Sequence[external.ExternalRun]) -> int:
        """Adds another lab's results, all or none; returns how many were not there yet.

        Raises:
            UsageError: one of them is there with other samples.
        """
        with self._database.writing() as session:
            return external.add(session, runs, self.where)

    def reusable(self, fingerprint: str) -> StoredResult | None:
        """The newest finished result of a cell, None if there is none."""
        with self._database.reading() as session:
            row = session.scalars(queries.finished().where(ResultRow.fingerprint == fingerprint).limit(1)).first()
            return None if row is None else records.stored_result(row)

    def twin_runs(self, fingerprint: str) -> list[StoredRun]:
        """The finished runs of exactly these cells, newest first."""
        query = queries.all_runs().where(RunRow.fingerprint == fingerprint, RunRow.status == "done")
        with self._database.reading() as session:
            return [records.stored_run(row) for row in session.scalars(query)][::-1]

    def results(
        self,
        *,
        dataset: str | None = None,
        model: str | None = None,
        checkpoint_sha: str | None = None,
        newest_only: bool = True,
    ) -> list[StoredResult]:
        """Finished results, ordered by data set, model, attack and view, then by fingerprint, newest first.

        Args:
            dataset: only those measured on this data set.
            model: only those of the model of this name.
            checkpoint_sha: only those of the weights with this hash.
            newest_only: one per fingerprint.
        """
        query = queries.finished().join(ResultRow.run)
        if dataset is not None:
            query = query.where(RunRow.protocol.has(ProtocolRow.dataset == dataset))
        if model is not None:
            query = query.where(RunRow.model.has(ModelRow.name == model))
        if checkpoint_sha is not None:
            query = query.where(RunRow.checkpoint.has(CheckpointRow.sha256 == checkpoint_sha))
        with self._database.reading() as session:
            found = [records.stored_result(row) for row in session.scalars(query)]
        return sorted(queries.newest(found) if newest_only else found, key=queries.place)

    def runs(self) -> list[StoredRun]:
        """All runs, oldest first."""
        with self._database.reading() as session:
            return [records.stored_run(row) for row in session.scalars(queries.all_runs())]

    def run(self, prefix: str) -> StoredRun:
        """The run whose id is, or alone begins with, the given text.

        Raises:
            UsageError: no run or several runs do; close ids are offered.
        """
        with self._database.reading() as session:
            known = session.scalars(select(RunRow.run_id).order_by(RunRow.id)).all()
            run_id = queries.resolve(prefix, known, self.where)
            return records.stored_run(session.scalars(queries.all_runs().where(RunRow.run_id == run_id)).one())

    def outcomes(self, result_id: int) -> Outcomes:
        """The evidence per sample of a result; of an unfinished one, what has been committed so far.

        Raises:
            UsageError: there is no such result.
        """
        with self._database.reading() as session:
            row = session.get(ResultRow, result_id)
            if row is None:
                raise UsageError(f"no result {result_id} in {self.where}; `moebench show RUN` lists those of a run")
            return packing.merge(queries.chunks(row))

    def labels(self, protocol: ProtocolRecord) -> IntArray | None:
        """The labels (n,) of a protocol's samples, None where no run has told them.

        Label i belongs to sample i of the protocol: to the row of `Outcomes` whose `index` is i. A finished result has
        all samples, so there `labels[outcomes.index]` is `labels`.

        Raises:
            RunError: they are damaged.
        """
        with self._database.reading() as session:
            return queries.labels(session, protocol)

    def examples(self, result_id: int) -> tuple[Example, ...]:
        """Up to 8 samples that a result broke, with both images; of an unfinished one, those committed so far.

        The first of each class come first, by their number in the data, then the second of each class, and so on. None
        are kept where images have more than 3 × 64 × 64 values, of published protocols, and of results from before.

        Raises:
            RunError: one is damaged.
        """
        with self._database.reading() as session:
            return pictures.examples(session, result_id)

    def claims(self, registry_name: str | None = None, dataset: str | None = None) -> list[Claim]:
        """The published numbers of the database, of one model or one data set if asked for, in the order of the CSV."""
        query = select(ClaimRow).order_by(ClaimRow.id)
        if registry_name is not None:
            query = query.where(ClaimRow.registry_name == registry_name)
        if dataset is not None:
            query = query.where(ClaimRow.dataset == dataset)
        with self._database.reading() as session:
            return [records.claim(row) for row in session.scalars(query)]

    def check(self) -> list[str]:
        """All that is wrong, one line each: damage, dangling references, hashes and aggregates."""
        from moebench.store import audit

        with self._database.reading() as session:
            return list(audit.findings(session, sqlite=self._database.backend == "sqlite"))

    def refuse_unsound(self) -> None:
        """Looks whether all adds up.

        Raises:
            UsageError: something does not.
        """
        problems = self.check()
        if problems:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise UsageError(f"{self.where} is not sound ({problems[0]}{more}); nothing was changed")
        self._sound = True

    def _refresh_claims(self) -> None:
        packaged = load_claims()
        if self.claims() == packaged:
            return
        with self._database.writing() as session:
            session.execute(delete(ClaimRow))
            rows = [{"id": place, **vars(claim)} for place, claim in enumerate(packaged, start=1)]
            # All rows in one statement: the session would make one for each run of rows that have a flag.
            session.connection().execute(insert(ClaimRow), rows)

    def _running(self, session: Session, run_id: str) -> RunRow:
        run = session.scalars(select(RunRow).where(RunRow.run_id == run_id)).one_or_none()
        if run is None:
            raise RunError(f"there is no run {run_id} in {self.where}; a run begins before it has results")
        if run.status != "running":
            raise _ended(run.run_id, run.status, run.error)
        return run

    def _refuse_others(self, session: Session, result_id: int) -> int:
        """Looks whether a result is this store's to write to; returns how many samples its protocol has."""
        found = session.execute(queries.holder(result_id)).one_or_none()
        if found is None or found.status != "running":
            raise RunError(f"result {result_id} in {self.where} is {'finished' if found else 'unknown'}; open a cell")
        opener = self._opened.get(result_id)
        if opener is not None and opener != found.run_id:
            raise RunError(f"run {found.run_id} has taken over result {result_id}; start again when it is done")
        if found.run_status != "running":
            raise _ended(found.run_id, found.run_status, found.error)
        return int(found.n)


def _ended(run_id: str, status: str, error: str | None) -> RunError:
    if error == CANCELLED:
        kept = "what was finished is kept, and the same command goes on from there"
        return GoneError(f"run {run_id} was cancelled; {kept}")
    return RunError(f"run {run_id} has ended ({status}{f': {error}' if error else ''})")

"""Between the records of `moebench.schema` and the rows of the database."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from moebench.schema import (
    CellSpec,
    CheckpointRecord,
    Claim,
    Flag,
    ModelRecord,
    PaperCard,
    ProtocolRecord,
    ResultRecord,
    RoutingLayer,
    StoredResult,
    StoredRun,
    ThreatModel,
)
from moebench.store.orm import CheckpointRow, ClaimRow, ModelRow, ProtocolRow, ResultRow, RunRow

CELL_FIELDS = tuple(field.name for field in fields(CellSpec))
CLAIM_FIELDS = tuple(field.name for field in fields(Claim))


def dumps(value: Any) -> str:
    """JSON text that every database accepts: numbers that are not finite become null."""
    return json.dumps(plain(value), allow_nan=False)


def plain(value: Any) -> Any:
    """The value in lists, string-keyed dicts and Python scalars; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return storable(value) if isinstance(value, str) else value


def storable(text: str) -> str:
    """The text without what PostgreSQL or UTF-8 cannot hold (NUL, and the surrogates of undecodable file names)."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\x00", "\\x00")


def digest(record: ModelRecord | CheckpointRecord | ProtocolRecord) -> str:
    """A hash over all fields of a record."""
    return hashlib.sha256(json.dumps(plain(asdict(record)), sort_keys=True).encode("utf-8")).hexdigest()


def model_row(record: ModelRecord) -> ModelRow:
    """A new row for a model."""
    return ModelRow(digest=digest(record), **plain(asdict(record)))


def checkpoint_row(record: CheckpointRecord) -> CheckpointRow:
    """A new row for a set of weights."""
    return CheckpointRow(digest=digest(record), **plain(asdict(record)))


def protocol_row(record: ProtocolRecord) -> ProtocolRow:
    """A new row for a protocol, its threat model in columns."""
    values = plain(asdict(record))
    return ProtocolRow(digest=digest(record), **values.pop("threat"), **values)


def result_values(record: ResultRecord) -> dict[str, Any]:
    """The columns of a finished result that its record fills."""
    values: dict[str, Any] = plain(asdict(record))
    del values["attack"], values["view"]
    return values


def model_record(row: ModelRow) -> ModelRecord:
    """The model of a row."""
    paper = PaperCard(**row.paper) if row.paper is not None else None
    return ModelRecord(row.name, row.family, row.summary, row.training, row.routing, paper)


def checkpoint_record(row: CheckpointRow) -> CheckpointRecord:
    """The set of weights of a row."""
    return CheckpointRecord(
        sha256=row.sha256,
        model=row.model,
        dataset=row.dataset,
        origin=row.origin,
        parameters=row.parameters,
        active_parameters=row.active_parameters,
        flops=row.flops,
        recipe=row.recipe,
        training_log=tuple(row.training_log),
    )


def protocol_record(row: ProtocolRow) -> ProtocolRecord:
    """The protocol of a row."""
    return ProtocolRecord(
        dataset=row.dataset,
        split=row.split,
        data_sha256=row.data_sha256,
        n=row.n,
        num_classes=row.num_classes,
        class_names=tuple(row.class_names),
        threat=ThreatModel(row.norm, row.eps, row.lower, row.upper),  # type: ignore[arg-type]  # validated by ThreatModel
        version=row.version,
    )


def result_record(row: ResultRow) -> ResultRecord:
    """The aggregate of a finished result; what was not defined is NaN."""
    return ResultRecord(
        attack=row.attack,
        view=row.view,
        accuracy=_number(row.accuracy),
        ci_low=_number(row.ci_low),
        ci_high=_number(row.ci_high),
        n=row.n or 0,
        seconds=_number(row.seconds),
        forwards=row.forwards or 0,
        backwards=row.backwards or 0,
        clean_accuracy=_number(row.clean_accuracy),
        changed_predictions=_number(row.changed_predictions),
        routing=tuple(_layer(layer) for layer in row.routing or ()),
        stages=row.stages or {},
    )


def stored_result(row: ResultRow) -> StoredResult:
    """A finished result with all that its run says about it."""
    run = row.run
    return StoredResult(
        result_id=row.id,
        run_id=run.run_id,
        command=run.command,
        finished_at=row.finished_at or "",
        cell=CellSpec(**{name: getattr(row, name) for name in CELL_FIELDS}),
        record=result_record(row),
        model=model_record(run.model),
        checkpoint=checkpoint_record(run.checkpoint),
        protocol=protocol_record(run.protocol),
        environment=run.environment,
    )


def stored_run(row: RunRow) -> StoredRun:
    """A run with the results that it shows, in the order in which it got them."""
    return StoredRun(
        run_id=row.run_id,
        status=row.status,
        command=row.command,
        started_at=row.started_at,
        finished_at=row.finished_at,
        seconds=row.seconds,
        error=row.error,
        model=model_record(row.model),
        checkpoint=checkpoint_record(row.checkpoint),
        protocol=protocol_record(row.protocol),
        environment=row.environment,
        results=tuple(stored_result(link.result) for link in row.links),
        flags=tuple(Flag(**flag) for flag in row.flags),
        reused=sum(link.reused for link in row.links),
    )


def claim(row: ClaimRow) -> Claim:
    """The published number of a row."""
    return Claim(**{name: getattr(row, name) for name in CLAIM_FIELDS})


def run_from_json(run: Mapping[str, Any]) -> StoredRun:
    """A run of an exported document, its results numbered from 0; what was not defined is NaN.

    Raises:
        UsageError: its threat model is impossible.
    """
    card = run["model"]["paper"]
    model = ModelRecord(**{**run["model"], "paper": None if card is None else PaperCard(**card)})
    threat = ThreatModel(**run["protocol"]["threat"])
    protocol = ProtocolRecord(
        **{**run["protocol"], "threat": threat, "class_names": tuple(run["protocol"]["class_names"])}
    )
    checkpoint = CheckpointRecord(**run["checkpoint"])
    where = (run["run_id"], run["command"])
    results = tuple(
        StoredResult(
            *(at, *where, one["finished_at"], CellSpec(**one["cell"]), _record(one["record"])),
            *(model, checkpoint, protocol, run["environment"]),
        )
        for at, one in enumerate(run["results"])
    )
    last = max(one.finished_at for one in results)
    return StoredRun(
        *(run["run_id"], "done", run["command"], run["started_at"] or last, last, run["seconds"], None),
        *(model, checkpoint, protocol, run["environment"], results),
        *(tuple(Flag(**flag) for flag in run["flags"]), 0),
    )


def _record(record: Mapping[str, Any]) -> ResultRecord:
    undefined = {name: _number(record[name]) for name in ("seconds", "changed_predictions")}
    return ResultRecord(**{**record, **undefined, "routing": tuple(map(_layer, record["routing"]))})


def _layer(layer: Mapping[str, Any]) -> RoutingLayer:
    return RoutingLayer(
        name=layer["name"],
        **{name: _number(layer[name]) for name in ("iou", "changed", "entropy_clean", "entropy_adv")},
        load_clean=tuple(map(_number, layer["load_clean"])),
        load_adv=tuple(map(_number, layer["load_adv"])),
        moves=tuple(map(tuple, layer["moves"])),
        classes=tuple(map(tuple, layer.get("classes", ()))),
    )


def _number(value: float | None) -> float:
    """A stored number, NaN where it was not defined."""
    return math.nan if value is None else value

"""The tables. Rows are added, never edited, but for the status and the aggregate of what is still running.

Times are ISO 8601 in UTC with microseconds, so that text order is time order. A model, a checkpoint or a protocol is
one row per distinct record, found by the `digest` of all its fields: weights that two models share are two checkpoints.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    LargeBinary,
    MetaData,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

JsonObject = dict[str, Any]
JsonList = list[Any]

_NAMES = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """Declares how Python types become columns of every table."""

    metadata = MetaData(naming_convention=_NAMES)
    type_annotation_map = {  # noqa: RUF012 (read by SQLAlchemy, which declares it so)
        str: Text(),
        float: Double(),
        JsonObject: JSON(none_as_null=True),
        JsonList: JSON(none_as_null=True),
    }


class ModelRow(Base):
    """A registered or external model."""

    __tablename__ = "model"

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str] = mapped_column(index=True)
    family: Mapped[str]
    summary: Mapped[str]
    training: Mapped[str | None]
    routing: Mapped[str | None]
    paper: Mapped[JsonObject | None]


class CheckpointRow(Base):
    """One set of weights, as one model uses it."""

    __tablename__ = "checkpoint"

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    sha256: Mapped[str] = mapped_column(index=True)
    model: Mapped[str]
    dataset: Mapped[str | None]
    origin: Mapped[str]
    parameters: Mapped[int] = mapped_column(BigInteger)
    active_parameters: Mapped[int | None] = mapped_column(BigInteger)
    flops: Mapped[int | None] = mapped_column(BigInteger)
    recipe: Mapped[JsonObject]
    training_log: Mapped[JsonList]


class ProtocolRow(Base):
    """The data, the threat model and the version of the rules.

    `labels` are those of the samples, read only when asked for; NULL where no run since the second schema told them.
    """

    __tablename__ = "protocol"

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    dataset: Mapped[str] = mapped_column(index=True)
    split: Mapped[str]
    data_sha256: Mapped[str]
    n: Mapped[int]
    num_classes: Mapped[int]
    class_names: Mapped[JsonList]
    norm: Mapped[str]
    eps: Mapped[float]
    lower: Mapped[float]
    upper: Mapped[float]
    version: Mapped[str]
    labels: Mapped[bytes | None] = mapped_column(LargeBinary, deferred=True)


class RunRow(Base):
    """One command's work on one checkpoint under one protocol."""

    __tablename__ = "run"
    __table_args__ = (CheckConstraint("status IN ('running', 'done', 'failed')", name="status"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(unique=True)
    fingerprint: Mapped[str] = mapped_column(index=True)
    status: Mapped[str]
    command: Mapped[str]
    environment: Mapped[JsonObject]
    model_id: Mapped[int] = mapped_column(ForeignKey("model.id"))
    checkpoint_id: Mapped[int] = mapped_column(ForeignKey("checkpoint.id"))
    protocol_id: Mapped[int] = mapped_column(ForeignKey("protocol.id"))
    started_at: Mapped[str]
    finished_at: Mapped[str | None]
    seconds: Mapped[float | None]
    error: Mapped[str | None]
    flags: Mapped[JsonList]

    model: Mapped[ModelRow] = relationship(lazy="joined", innerjoin=True)
    checkpoint: Mapped[CheckpointRow] = relationship(lazy="joined", innerjoin=True)
    protocol: Mapped[ProtocolRow] = relationship(lazy="joined", innerjoin=True)
    links: Mapped[list[RunResultRow]] = relationship(order_by="RunResultRow.id", back_populates="run")


class ResultRow(Base):
    """A cell: one attack on one view. The aggregate is NULL until it is done; an undefined number stays NULL.

    `run_id` is the run that works on it or finished it, `touched_at` the time of its last commit.
    """

    __tablename__ = "result"
    __table_args__ = (CheckConstraint("status IN ('running', 'done')", name="status"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("run.id"), index=True)
    fingerprint: Mapped[str] = mapped_column(index=True)
    attack: Mapped[str]
    parameters: Mapped[JsonObject]
    view: Mapped[str]
    seed: Mapped[int] = mapped_column(BigInteger)
    engine: Mapped[str]
    precision: Mapped[str]
    suite: Mapped[str]
    status: Mapped[str]
    started_at: Mapped[str]
    touched_at: Mapped[str]
    finished_at: Mapped[str | None]
    accuracy: Mapped[float | None]
    ci_low: Mapped[float | None]
    ci_high: Mapped[float | None]
    n: Mapped[int | None]
    seconds: Mapped[float | None]
    forwards: Mapped[int | None] = mapped_column(BigInteger)
    backwards: Mapped[int | None] = mapped_column(BigInteger)
    clean_accuracy: Mapped[float | None]
    changed_predictions: Mapped[float | None]
    routing: Mapped[JsonList | None]
    stages: Mapped[JsonObject | None]

    run: Mapped[RunRow] = relationship(lazy="joined", innerjoin=True)
    chunks: Mapped[list[ChunkRow]] = relationship(order_by="ChunkRow.seq", back_populates="result")


class RunResultRow(Base):
    """Which run shows which result; `reused` marks a result that an earlier run had finished."""

    __tablename__ = "run_result"
    __table_args__ = (UniqueConstraint("run_id", "result_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("run.id"))
    result_id: Mapped[int] = mapped_column(ForeignKey("result.id"), index=True)
    reused: Mapped[bool]

    run: Mapped[RunRow] = relationship(back_populates="links")
    result: Mapped[ResultRow] = relationship()


class ChunkRow(Base):
    """Finished samples of one stage of a result; `seq` counts its chunks in the order of their commits."""

    __tablename__ = "chunk"
    __table_args__ = (UniqueConstraint("result_id", "seq"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    result_id: Mapped[int] = mapped_column(ForeignKey("result.id"))
    stage: Mapped[str]
    seq: Mapped[int]
    n: Mapped[int]
    seconds: Mapped[float]
    arrays: Mapped[bytes] = mapped_column(LargeBinary)

    result: Mapped[ResultRow] = relationship(back_populates="chunks")


class ExampleRow(Base):
    """A sample that a result broke, as pictures; `sample` is its number in the protocol's data."""

    __tablename__ = "example"
    __table_args__ = (UniqueConstraint("result_id", "sample"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    result_id: Mapped[int] = mapped_column(ForeignKey("result.id"))
    sample: Mapped[int]
    label: Mapped[int]
    clean_pred: Mapped[int]
    adv_pred: Mapped[int]
    distance: Mapped[float]
    stage: Mapped[str]
    experts: Mapped[JsonList]
    images: Mapped[bytes] = mapped_column(LargeBinary)


class ClaimRow(Base):
    """A published number; the table is the packaged CSV, replaced as a whole when that changes."""

    __tablename__ = "claim"

    id: Mapped[int] = mapped_column(primary_key=True)
    arxiv: Mapped[str]
    model: Mapped[str]
    registry_name: Mapped[str] = mapped_column(index=True)
    dataset: Mapped[str]
    architecture: Mapped[str]
    attack: Mapped[str]
    attack_params: Mapped[str]
    metric: Mapped[str]
    value: Mapped[float]
    source: Mapped[str]
    flag: Mapped[str | None]

"""Records with sensible values, so that a test states only what it is about."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moebench.metrics import wilson
from moebench.schema import (
    CellSpec,
    CheckpointRecord,
    Chunk,
    Example,
    ModelRecord,
    PaperCard,
    ProtocolRecord,
    ResultRecord,
    RoutingLayer,
    RunStart,
    ThreatModel,
)
from moebench.store import Store, merge

N = 8
"""Samples of the protocol that `make_protocol` describes."""

HOST = "test-host"


def make_model(name: str = "toy-moe", **changes: Any) -> ModelRecord:
    paper = PaperCard("On Toys", "A. Author", "Venue", 2024, "2401.00001", "@misc{author2024toys,\n title={On Toys}}")
    model = ModelRecord(name, "moe", "a toy", training="adversarial", routing="top-1", paper=paper)
    return replace(model, **changes)


def make_checkpoint(model: str = "toy-moe", **changes: Any) -> CheckpointRecord:
    checkpoint = CheckpointRecord(
        sha256="ab" * 32,
        model=model,
        dataset="digits",
        origin="weights/toy-moe.safetensors",
        parameters=3_000_000_000,
        active_parameters=1_000,
        flops=2**40,
        recipe={"epochs": 3, "optimizer": {"name": "sgd", "lr": 0.1}},
        training_log=({"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}),
    )
    return replace(checkpoint, **changes)


def make_protocol(**changes: Any) -> ProtocolRecord:
    protocol = ProtocolRecord(
        dataset="digits",
        split="test",
        data_sha256="cd" * 32,
        n=N,
        num_classes=3,
        class_names=("zero", "one", "zwölf"),
        threat=ThreatModel("Linf", 8 / 255),
    )
    return replace(protocol, **changes)


def make_run_start(run_id: str = "run-1", **changes: Any) -> RunStart:
    start = RunStart(
        run_id=run_id,
        fingerprint="fingerprint of " + run_id,
        command="moebench evaluate --model toy-moe --attack pgd-10",
        model=make_model(),
        checkpoint=make_checkpoint(),
        protocol=make_protocol(),
        environment={"host": HOST, "pid": os.getpid(), "packages": {"torch": "2.4"}},
    )
    return replace(start, **changes)


def make_cell(fingerprint: str = "cell-1", **changes: Any) -> CellSpec:
    cell = CellSpec(
        fingerprint=fingerprint,
        attack="pgd-10",
        parameters={"steps": 10, "step_size": 2 / 255, "random_start": True},
        view="whole",
        seed=2**40,
    )
    return replace(cell, **changes)


def make_chunk(
    stage: str = "clean", index: Iterable[int] = range(N), broken: Collection[int] = (), **changes: Any
) -> Chunk:
    """A chunk of the given samples, of which those in `broken` are predicted as class 2 and all others as 1."""
    samples = np.asarray(list(index), dtype=np.int64)
    falls = np.isin(samples, list(broken))
    clean = stage == "clean"
    chunk = Chunk(
        stage=stage,
        index=samples,
        broken=falls,
        clean_pred=np.where(falls & clean, 2, 1).astype(np.int64),
        adv_pred=np.where(falls, 2, 1).astype(np.int64),
        distance=np.where(clean, 0.0, 0.03).astype(np.float32) * np.ones(samples.size, np.float32),
        forwards=np.full(samples.size, 1 if clean else 10, dtype=np.int64),
        backwards=np.full(samples.size, 0 if clean else 10, dtype=np.int64),
        seconds=0.5,
    )
    return replace(chunk, **changes)


def make_example(index: int = 3, label: int = 1, shape: tuple[int, ...] = (1, 2, 2), **changes: Any) -> Example:
    clean = np.full(shape, index % 17, np.float32) / np.float32(16)
    facts = {"clean_pred": label, "adv_pred": 2, "distance": 0.03, "stage": "apgd-ce", "clean": clean}
    adversarial = np.clip(clean + np.float32(0.03), 0, 1)
    return Example(index, label, **{**facts, "adversarial": adversarial, **changes})


def same_examples(one: Sequence[Example], other: Sequence[Example]) -> bool:
    def facts(example: Example) -> tuple[Any, ...]:
        scalars = {name: value for name, value in vars(example).items() if name not in ("clean", "adversarial")}
        return scalars, example.clean.tobytes(), example.adversarial.tobytes(), example.clean.shape

    return [facts(example) for example in one] == [facts(example) for example in other]


def make_routing() -> tuple[RoutingLayer, ...]:
    layer = RoutingLayer("block1.moe", 0.75, 0.25, 0.5, 0.6, (0.5, 0.5), (0.25, 0.75), ((3, 1), (0, 4)))
    return (layer,)


def make_record(
    chunks: Sequence[Chunk], *, attack: str = "pgd-10", view: str = "whole", **changes: Any
) -> ResultRecord:
    """The aggregate that the chunks give."""
    outcomes = merge(chunks)
    clean = np.concatenate([np.zeros(0, np.bool_), *(chunk.broken for chunk in chunks if chunk.stage == "clean")])
    stages: Counter[str] = Counter()
    for chunk in chunks:
        stages[chunk.stage] += len(chunk)
    low, high = wilson(int(np.count_nonzero(~outcomes.broken)), outcomes.index.size)
    record = ResultRecord(
        attack=attack,
        view=view,
        accuracy=float(np.mean(~outcomes.broken)),
        ci_low=low,
        ci_high=high,
        n=outcomes.index.size,
        seconds=sum(chunk.seconds for chunk in chunks),
        forwards=int(outcomes.forwards.sum()),
        backwards=int(outcomes.backwards.sum()),
        clean_accuracy=float(np.mean(~clean)),
        changed_predictions=float(np.mean(outcomes.adv_pred != outcomes.clean_pred)),
        routing=make_routing(),
        stages={stage: {"attacked": count} for stage, count in stages.items()},
    )
    return replace(record, **changes)


def finish_cell(store: Store, run_id: str, cell: CellSpec, chunks: Sequence[Chunk] | None = None) -> int:
    """Opens a cell, appends the chunks (two samples of eight broken unless told), and finishes it."""
    chunks = chunks or (make_chunk(broken={0}), make_chunk("apgd-ce", range(1, N), broken={3}))
    result_id, _ = store.open_cell(run_id, cell, resume=False)
    for chunk in chunks:
        store.append_chunk(result_id, chunk)
    store.finish_cell(result_id, make_record(chunks, attack=cell.attack, view=cell.view))
    return result_id


def assert_same_chunk(one: Chunk, other: Chunk) -> None:
    assert (one.stage, one.seconds) == (other.stage, other.seconds)
    for name in ("index", "broken", "clean_pred", "adv_pred", "distance", "forwards", "backwards"):
        first, second = getattr(one, name), getattr(other, name)
        assert first.dtype == second.dtype, name
        np.testing.assert_array_equal(first, second, err_msg=name)

"""The evaluation protocol: load, check, attack cell by cell, judge, store, summarise."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moebench.attacks import load_attack
from moebench.attacks._base import AttackPlan
from moebench.attacks._engine import Samples, to_samples
from moebench.attacks._fuse import fused_copy
from moebench.attacks._library import bind_library
from moebench.attacks._reference import check_reference
from moebench.attacks._views import check_view, default_views
from moebench.cells import CellOutcome, CellWork, run_cell
from moebench.checks import clean_logits
from moebench.datasets import Dataset, load_dataset
from moebench.errors import MoebenchError, RunError, UsageError
from moebench.loading import LoadedModel, load
from moebench.provenance import environment, fingerprint
from moebench.schema import (
    PROTOCOL_VERSION,
    CellSpec,
    Norm,
    ProtocolRecord,
    ResultRecord,
    RunStart,
    ThreatModel,
)
from moebench.store import Store
from moebench.summary import Summary, summarise


@dataclass(frozen=True)
class EvalSpec:
    """What to evaluate; the fields are the options of `moebench evaluate`.

    `batch_size` None fits the image size. `views` is empty for the model's default views, `eps` None for the data
    set's default radius, `n` None for all samples.
    """

    model: str
    dataset: str = "digits"
    attacks: tuple[str, ...] = ("autoattack",)
    views: tuple[str, ...] = ()
    norm: Norm = "Linf"
    eps: float | None = None
    n: int | None = None
    batch_size: int | None = None
    device: str = "cpu"
    seed: int = 0
    engine: str = "native"
    db: str | None = None
    weights: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False
    save_adv: Path | None = None
    command: str = ""


@dataclass(frozen=True)
class Progress:
    """Where an evaluation stands: cell `number` of `total`, `done` of `n` samples decided in its current stage."""

    number: int
    total: int
    attack: str
    view: str
    stage: str
    done: int
    n: int
    standing: int


Listener = Callable[[Progress], None]


@dataclass(frozen=True)
class Prepared:
    """An evaluation that has passed every check and not yet attacked anything."""

    spec: EvalSpec
    dataset: Dataset
    loaded: LoadedModel
    search: nn.Module
    batch_size: int
    threat: ThreatModel
    samples: Samples
    clean_pred: torch.Tensor
    protocol: ProtocolRecord
    cells: tuple[tuple[AttackPlan, CellSpec], ...]


def evaluate(spec: EvalSpec, listener: Listener | None = None) -> Summary:
    """Evaluates a model and stores what it finds.

    Args:
        spec: model, data, attacks, views, threat model and where to store.
        listener: told after each batch of decided samples.
    Returns: the numbers of this command, with where they are stored.

    Raises:
        UsageError: something that was asked for cannot be done; nothing is written.
        RunError: the work failed on the way; what was finished is kept.
    """
    prepared = prepare(spec, parse_attacks(spec.attacks))
    if spec.save_adv is not None:
        _check_writable(spec.save_adv)
    with Store.open(spec.db, write=True) as store:
        return run_prepared(prepared, store, listener)


def parse_attacks(names: Sequence[str]) -> list[AttackPlan]:
    """The plans of the named attacks, each once, in the given order."""
    if not names:
        raise UsageError("no attack given; `moebench list attacks` shows all")
    return [load_attack(name) for name in dict.fromkeys(names)]


def prepare(spec: EvalSpec, plans: Sequence[AttackPlan]) -> Prepared:
    """Loads data and model, refuses what cannot work, and lists the cells."""
    if spec.batch_size is not None and spec.batch_size < 1:
        raise UsageError(f"batch size must be at least 1, got {spec.batch_size}")
    dataset = load_dataset(spec.dataset, n=spec.n)
    threat = dataset.default_threat(spec.norm) if spec.eps is None else ThreatModel(spec.norm, spec.eps)
    torch.manual_seed(spec.seed)
    loaded = load(spec.model, dataset, weights=spec.weights, settings=spec.settings, device=spec.device)
    samples = to_samples(dataset.images, dataset.labels, dataset.ids, spec.device)
    batch_size = spec.batch_size or fitting_batch(dataset.shape, spec.device)
    logits = clean_logits(loaded.module, samples, dataset.num_classes, batch_size)
    plans = [fit_plan(plan, threat, dataset.shape, logits.shape[1], batch_size) for plan in plans]
    protocol = ProtocolRecord(
        dataset.name, dataset.split, dataset.sha256, len(dataset), dataset.num_classes, dataset.class_names, threat
    )
    cells = plan_cells(spec, plans, loaded, protocol)
    search = fused_copy(loaded.module, samples.x[:batch_size]) if spec.engine == "native" else loaded.module
    return Prepared(spec, dataset, loaded, search, batch_size, threat, samples, logits.argmax(dim=1), protocol, cells)


def fit_plan(
    plan: AttackPlan, threat: ThreatModel, shape: tuple[int, int, int], classes: int, batch_size: int
) -> AttackPlan:
    """The attack with all that it takes from the evaluation.

    Raises:
        UsageError: it does not work for these images, so many classes or this threat model.
    """
    if classes < plan.min_classes:
        raise UsageError(f"attack {plan.name!r} needs at least {plan.min_classes} classes; this model has {classes}")
    return bind_library(plan, threat, shape, classes, batch_size)


def fitting_batch(shape: tuple[int, int, int], device: str) -> int:
    """Rows that run together where the user does not say: small images need many to keep the device busy."""
    pixels = shape[0] * shape[1] * shape[2]
    budget = 2**18 if device == "cpu" else 2**22
    return max(16, min(1024, budget // pixels))


def plan_cells(
    spec: EvalSpec, plans: Sequence[AttackPlan], loaded: LoadedModel, protocol: ProtocolRecord
) -> tuple[tuple[AttackPlan, CellSpec], ...]:
    """Every (attack, view) that the command asks for, with its fingerprint."""
    cells = []
    for plan in plans:
        for view in _views_of(plan, spec, loaded):
            check_view(view, loaded.module)
            if spec.engine == "reference":
                check_reference(plan, view)
            cells.append((plan, _cell(plan, view, spec, loaded, protocol)))
    return tuple(cells)


def _views_of(plan: AttackPlan, spec: EvalSpec, loaded: LoadedModel) -> Sequence[str]:
    through_routing = plan.views not in (None, ("whole",)) or any(stage.view is not None for stage in plan.stages)
    if through_routing and default_views(loaded.module) == ["whole"]:
        raise UsageError(f"attack {plan.name!r} needs a model with routing; {loaded.record.name} has none")
    if plan.views is None:
        return list(dict.fromkeys(spec.views)) or default_views(loaded.module)
    wrong = [view for view in spec.views if view not in plan.views]
    if wrong and len(spec.attacks) == 1:
        raise UsageError(f"attack {plan.name!r} runs on view {', '.join(plan.views)}, not on {wrong[0]!r}")
    return plan.views


def _cell(plan: AttackPlan, view: str, spec: EvalSpec, loaded: LoadedModel, protocol: ProtocolRecord) -> CellSpec:
    parameters = plan.parameters()
    facts = {
        "model": loaded.record.name,
        "weights": loaded.checkpoint.sha256,
        "code": loaded.code,
        "data": protocol.data_sha256,
        "threat": protocol.threat,
        "attack": plan.name,
        "parameters": parameters,
        "view": view,
        "seed": spec.seed,
        "engine": spec.engine,
        "protocol": PROTOCOL_VERSION,
    }
    return CellSpec(fingerprint(facts), plan.name, parameters, view, spec.seed, spec.engine)


def run_prepared(prepared: Prepared, store: Store, listener: Listener | None) -> Summary:
    """Runs or reuses every cell inside one stored run."""
    spec, begin = prepared.spec, time.perf_counter()
    run_id = uuid.uuid4().hex[:12]
    store.begin_run(
        RunStart(
            run_id,
            fingerprint({"cells": [cell.fingerprint for _, cell in prepared.cells]}),
            spec.command,
            prepared.loaded.record,
            prepared.loaded.checkpoint,
            prepared.protocol,
            {
                **environment(spec.device, torch.get_num_threads()),
                "seed": spec.seed,
                "batch_size": prepared.batch_size,
                "code": prepared.loaded.code,
            },
        )
    )
    records: list[ResultRecord] = []
    outcomes: list[CellOutcome] = []
    reused = 0
    try:
        for number, (plan, cell) in enumerate(prepared.cells, start=1):
            stored = None if spec.fresh else store.reusable(cell.fingerprint)
            work = _work(prepared, plan, cell, number, listener)
            if stored is not None:
                store.link_reused(run_id, stored.result_id)
                records.append(stored.record)
                reused += 1
                if spec.save_adv is not None:
                    outcomes.append(run_cell(work, None, run_id, resume=False)[1])
                continue
            record, outcome = run_cell(work, store, run_id, resume=not spec.fresh and spec.save_adv is None)
            records.append(record)
            outcomes.append(outcome)
        if spec.save_adv is not None:
            save_adversarial(spec.save_adv, prepared, outcomes)
        seconds = time.perf_counter() - begin
        summary = summarise(store, run_id, prepared, records, reused, seconds)
        store.finish_run(run_id, "done", seconds=seconds, flags=summary.flags)
    except BaseException as error:
        _fail(store, run_id, error, time.perf_counter() - begin)
        raise
    return summary


def _fail(store: Store, run_id: str, error: BaseException, seconds: float) -> None:
    """Marks the run as failed; if even that fails, the first error is the one to report."""
    text = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    with ExitStack() as stack:
        stack.push(lambda kind, value, trace: isinstance(value, MoebenchError))
        store.finish_run(run_id, "failed", seconds=seconds, error=text.splitlines()[0])


def _work(prepared: Prepared, plan: AttackPlan, cell: CellSpec, number: int, listener: Listener | None) -> CellWork:
    def tell(stage: str, done: int, n: int, standing: int) -> None:
        if listener is not None:
            listener(Progress(number, len(prepared.cells), plan.name, cell.view, stage, done, n, standing))

    return CellWork(
        plan=plan,
        cell=cell,
        model=prepared.loaded.module,
        search=prepared.search,
        samples=prepared.samples,
        clean_pred=prepared.clean_pred,
        threat=prepared.threat,
        batch_size=prepared.batch_size,
        tell=tell,
    )


def save_adversarial(path: Path, prepared: Prepared, outcomes: Sequence[CellOutcome]) -> None:
    """Writes the images of `--save-adv`: per sample that of the first cell that broke it, else of the last cell.

    Raises:
        RunError: the file cannot be written.
    """
    x_adv, pred = outcomes[-1].x_adv.clone(), outcomes[-1].adv_pred.clone()
    robust = ~outcomes[-1].broken
    for outcome in reversed(outcomes[:-1]):
        broke = outcome.broken
        x_adv[broke], pred[broke] = outcome.x_adv[broke], outcome.adv_pred[broke]
        robust &= ~broke
    arrays: dict[str, Any] = {
        "x_adv": x_adv.cpu().numpy().astype(np.float32),
        "y": prepared.dataset.labels,
        "clean_pred": prepared.clean_pred.cpu().numpy(),
        "adv_pred": pred.cpu().numpy(),
        "robust": robust.cpu().numpy(),
        "index": prepared.dataset.ids,
    }
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; the results are stored") from None
    finally:
        temporary.unlink(missing_ok=True)


def _check_writable(path: Path) -> None:
    """Refuses an output file that could not be written after hours of work."""
    if path.is_dir():
        raise UsageError(f"--save-adv takes a file, and {path} is a folder")
    if path.exists() and not path.is_file():
        raise UsageError(f"--save-adv takes an ordinary file, and {path} is none; name another")
    probe = path.with_name(f".{path.name}.probe")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}; choose another place for --save-adv"
        ) from None


@dataclass(frozen=True)
class PlannedCell:
    """A cell that a command would compute: the most passes it can take, and whether the database has it already."""

    attack: str
    view: str
    n: int
    forwards: int
    backwards: int
    stored: bool

    def to_json(self) -> dict[str, Any]:
        """As `--dry-run --json` prints it."""
        return asdict(self)


def plan_only(spec: EvalSpec) -> list[PlannedCell]:
    """What `evaluate` would do, without doing or writing anything."""
    prepared = prepare(spec, parse_attacks(spec.attacks))
    correct = int((prepared.clean_pred == prepared.samples.y).sum())
    stored = _stored_fingerprints(spec) if not spec.fresh else set()
    planned = []
    for plan, cell in prepared.cells:
        forwards, backwards = (sum(passes) for passes in zip(*(stage.budget() for stage in plan.stages), strict=True))
        there = cell.fingerprint in stored
        planned.append(
            PlannedCell(plan.name, cell.view, len(prepared.samples), correct * forwards, correct * backwards, there)
        )
    return planned


def _stored_fingerprints(spec: EvalSpec) -> set[str]:
    try:
        with Store.open(spec.db, write=False) as store:
            return {result.cell.fingerprint for result in store.results()}
    except UsageError:
        # No database yet is the usual case of a first dry run.
        return set()

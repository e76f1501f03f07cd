"""The evaluation protocol: load, check, attack cell by cell, judge, store, summarise."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moebench import interrupt
from moebench.attacks._base import AttackPlan
from moebench.attacks._engine import Samples, to_samples
from moebench.attacks._memory import fitting_rows, keep_freed_memory
from moebench.attacks._search import SearchCopy, search_copy
from moebench.booking import CellOutcome
from moebench.cells import UnfinishedCell, run_cell
from moebench.checks import clean_logits, expected_logits
from moebench.datasets import Dataset, load_dataset
from moebench.errors import InWorkError, MoebenchError, RunError
from moebench.fitting import load_training
from moebench.flags import RANDOM_FORWARD
from moebench.identity import run_fingerprint
from moebench.loading import LoadedModel, load
from moebench.planning import check_numbers, check_protocols, fit_plan, parse_attacks, plan_cells
from moebench.probes import VERSION, active_flags
from moebench.provenance import environment
from moebench.saving import check_writable, save_adversarial
from moebench.schema import (
    CellSpec,
    Flag,
    Norm,
    Precision,
    ProtocolRecord,
    ResultRecord,
    RunStart,
    ThreatModel,
    is_protocol,
)
from moebench.store import Store
from moebench.store.pictures import pictures_note
from moebench.summary import Summary, summarise
from moebench.turns import Turns
from moebench.warm import WarmStarts
from moebench.work import CellWork

if TYPE_CHECKING:
    from moebench.cluster.engine import RayEngine


@dataclass(frozen=True)
class EvalSpec:
    """What to evaluate; the fields are the options of `moebench evaluate`.

    `batch_size` None fits the device. `draws` are the passes averaged for a model that is random; `compiled` tries
    torch.compile on the search. `views` is empty for the model's default views, `eps` None for the data
    set's default radius, `n` None for all samples. `trust` has the model probed after the attacks. `train_data` names
    what attacks that need training data are made on (None for the train split of `dataset`), and `train_n` how much of
    it. `routing` overrides the routing of every MoE layer, as `top-k=1` or `drop-best`. `cluster` does the searches of
    the native engine on other machines, with the same verdicts; None for this process.
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
    precision: Precision = "float32"
    draws: int = 1
    compiled: bool = False
    db: str | None = None
    weights: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False
    trust: bool = True
    save_adv: Path | None = None
    command: str = ""
    train_data: str | None = None
    train_n: int | None = None
    routing: str | None = None
    cluster: RayEngine | None = None


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
    """An evaluation that has passed every check and not yet attacked anything.

    `findings` are doubts, not refusals. `training` is None where no attack needs training data.
    """

    spec: EvalSpec
    dataset: Dataset
    loaded: LoadedModel
    search: SearchCopy
    batch_size: int
    threat: ThreatModel
    samples: Samples
    clean_pred: torch.Tensor
    protocol: ProtocolRecord
    cells: tuple[tuple[AttackPlan, CellSpec], ...]
    findings: tuple[Flag, ...] = ()
    training: Dataset | None = None


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
    return run_prepared(prepare(spec, parse_attacks(spec.attacks)), listener)


def run_prepared(prepared: Prepared, listener: Listener | None = None) -> Summary:
    """Runs or reuses the cells of a prepared evaluation, and stores what comes out; errors as in `evaluate`."""
    spec = prepared.spec
    if spec.save_adv is not None:
        check_writable(spec.save_adv)
    prepare_cluster(prepared)
    with Store.open(spec.db, write=True) as store:
        return run(prepared, store, listener)


def prepare_cluster(prepared: Prepared) -> None:
    """Sends the model to the cluster, if there is one; done before anything is written.

    Raises:
        UsageError: the model cannot be sent, or no worker can build it.
    """
    if prepared.spec.cluster is not None:
        prepared.spec.cluster.send(prepared.loaded.module, prepared.search.module)


def prepare(spec: EvalSpec, plans: Sequence[AttackPlan]) -> Prepared:
    """Loads data and model, refuses what cannot work, and lists the cells."""
    check_numbers(spec)
    dataset = load_dataset(spec.dataset, n=spec.n)
    threat = dataset.default_threat(spec.norm) if spec.eps is None else ThreatModel(spec.norm, spec.eps)
    check_protocols(spec, plans)
    training = load_training(plans, dataset, spec.train_data, spec.train_n)
    torch.manual_seed(spec.seed)
    loaded = load(
        spec.model, dataset, weights=spec.weights, settings=spec.settings, routing=spec.routing, device=spec.device
    )
    samples = to_samples(dataset.images, dataset.labels, dataset.ids, spec.device)
    if spec.device == "cpu":
        keep_freed_memory()
    batch_size = spec.batch_size or fitting_rows(loaded.module, dataset.shape, spec.device)
    logits, findings = clean_logits(loaded.module, samples, dataset.num_classes, batch_size)
    if not any(finding.code == RANDOM_FORWARD for finding in findings):
        spec = replace(spec, draws=1)
    elif spec.draws > 1:
        logits = expected_logits(loaded.module, samples.x, spec.draws, batch_size)
    plans = [fit_plan(plan, threat, dataset.shape, logits.shape[1], batch_size) for plan in plans]
    protocol = ProtocolRecord(
        dataset.name, dataset.split, dataset.sha256, len(dataset), dataset.num_classes, dataset.class_names, threat
    )
    cells = plan_cells(spec, plans, loaded, protocol, training)
    search = SearchCopy(loaded.module, {})
    if spec.engine == "native":
        search = search_copy(loaded.module, samples.x[:batch_size], compiled=spec.compiled)
    clean_pred = logits.argmax(dim=1)
    return Prepared(
        spec, dataset, loaded, search, batch_size, threat, samples, clean_pred, protocol, cells, findings, training
    )


def run(prepared: Prepared, store: Store, listener: Listener | None, warm: WarmStarts | None = None) -> Summary:
    """Runs or reuses every cell inside one stored run; `warm` knows what was found at smaller radii."""
    spec, begin = prepared.spec, time.perf_counter()
    run_id = uuid.uuid4().hex[:12]
    identity = run_fingerprint([cell for _, cell in prepared.cells])
    store.begin_run(
        RunStart(
            run_id,
            identity,
            spec.command,
            prepared.loaded.record,
            prepared.loaded.checkpoint,
            prepared.protocol,
            {
                **environment(spec.device, torch.get_num_threads()),
                "seed": spec.seed,
                "batch_size": prepared.batch_size,
                "search": prepared.search.notes,
                "code": prepared.loaded.code,
                "probes": VERSION if spec.trust else None,
                **({} if spec.cluster is None else {"cluster": spec.cluster.facts()}),
                **pictures_note(prepared.dataset.shape),
            },
        ),
        prepared.dataset.labels,
    )
    unmark = interrupt.at_forced_end(lambda: _fail(store, run_id, KeyboardInterrupt(), time.perf_counter() - begin))
    records: dict[int, ResultRecord] = {}
    outcomes: dict[int, CellOutcome] = {}
    unfinished: list[UnfinishedCell] = []
    reused = 0
    turns = Turns(len(prepared.cells), lambda number, holder: _tell_of(holder, prepared, number, listener))
    try:
        for number in turns:
            plan, cell = prepared.cells[number]
            stored = None if spec.fresh else store.reusable(cell.fingerprint)
            work = cell_work(prepared, plan, cell, number + 1, listener)
            chain = None if is_protocol(cell.attack) else warm
            work = replace(work, images=work.images or chain is not None)
            if chain is not None:
                work = chain.given(work)
            if stored is not None:
                store.link_reused(run_id, stored.result_id)
                records[number] = stored.record
                reused += 1
                if chain is not None:
                    chain.note_stored(work, store.outcomes(stored.result_id))
                if spec.save_adv is not None:
                    outcomes[number] = run_cell(work, None, run_id, resume=False)[1]
                continue
            try:
                record, outcome = run_cell(work, store, run_id, resume=not spec.fresh and spec.save_adv is None)
            except InWorkError as holder:
                turns.put_off(number, holder)
                continue
            except UnfinishedCell as gap:
                unfinished.append(gap)
                continue
            records[number], outcomes[number] = record, outcome
            if chain is not None:
                chain.note(work, outcome)
        if unfinished:
            raise RunError(
                f"{'; '.join(map(str, unfinished))}; all else is kept, and the same command tries them again"
            )
        if turns.changed:
            store.order_results(run_id, [cell.fingerprint for _, cell in prepared.cells])
        if spec.save_adv is not None:
            save_adversarial(spec.save_adv, prepared, [outcomes[number] for number in sorted(outcomes)])
        probed = active_flags(prepared, store, run_fingerprint=identity, all_reused=reused == len(prepared.cells))
        seconds = time.perf_counter() - begin
        summary = summarise(
            store,
            run_id,
            prepared,
            [records[number] for number in sorted(records)],
            reused,
            seconds,
            (*prepared.findings, *probed),
        )
        store.finish_run(run_id, "done", seconds=seconds, flags=summary.flags)
    except BaseException as error:
        _fail(store, run_id, error, time.perf_counter() - begin)
        raise
    finally:
        unmark()
    return summary


def _fail(store: Store, run_id: str, error: BaseException, seconds: float) -> None:
    """Marks the run as failed; if even that fails, the first error is the one to report."""
    text = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    with ExitStack() as stack:
        stack.push(lambda kind, value, trace: isinstance(value, MoebenchError))
        store.finish_run(run_id, "failed", seconds=seconds, error=text.splitlines()[0])


def _tell_of(holder: InWorkError, prepared: Prepared, number: int, listener: Listener | None) -> None:
    """Says that the cell `number` is waited for."""
    plan, cell = prepared.cells[number]
    stage = f"waiting for run {holder.run_id} on {holder.host}"
    cell_work(prepared, plan, cell, number + 1, listener).tell(stage, 0, len(prepared.samples), len(prepared.samples))


def cell_work(prepared: Prepared, plan: AttackPlan, cell: CellSpec, number: int, listener: Listener | None) -> CellWork:
    """What it takes to run one of the prepared cells, the `number`-th."""

    def tell(stage: str, done: int, n: int, standing: int) -> None:
        if listener is not None:
            listener(Progress(number, len(prepared.cells), plan.name, cell.view, stage, done, n, standing))

    # A published protocol is scored here: what it does to a sample may hang on the others.
    cluster = None if is_protocol(plan.name) else prepared.spec.cluster
    return CellWork(
        plan=plan,
        cell=cell,
        model=prepared.loaded.module,
        search=prepared.search.module,
        samples=prepared.samples,
        clean_pred=prepared.clean_pred,
        threat=prepared.threat,
        batch_size=prepared.batch_size,
        tell=tell,
        draws=prepared.spec.draws,
        training=prepared.training,
        cluster=cluster,
        images=cluster is None or prepared.spec.save_adv is not None,
    )

"""The evaluation protocol: load, check, attack cell by cell, judge, store, summarise."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moebench import interrupt
from moebench.attacks import load_attack
from moebench.attacks._base import AttackPlan
from moebench.attacks._engine import Samples, to_samples
from moebench.attacks._library import bind_library
from moebench.attacks._memory import fitting_rows, keep_freed_memory
from moebench.attacks._reference import check_reference
from moebench.attacks._search import SearchCopy, search_copy
from moebench.attacks._views import check_view, default_views
from moebench.bill import Cost
from moebench.cells import CellOutcome, CellWork, UnfinishedCell, most_passes, run_cell, searches
from moebench.checks import clean_logits, expected_logits
from moebench.datasets import Dataset, load_dataset
from moebench.errors import InWorkError, MoebenchError, RunError, UsageError
from moebench.fitting import fit_budget, is_trained, load_training
from moebench.flags import RANDOM_FORWARD
from moebench.identity import cell_fingerprint, run_fingerprint
from moebench.loading import LoadedModel, load
from moebench.probes import VERSION, active_flags
from moebench.provenance import environment
from moebench.schema import (
    WARM_START,
    CellSpec,
    Flag,
    Norm,
    Precision,
    ProtocolRecord,
    ResultRecord,
    RunStart,
    StoredResult,
    ThreatModel,
    is_protocol,
)
from moebench.store import Store
from moebench.store.connect import MissingError
from moebench.store.pictures import pictures_note
from moebench.summary import Summary, summarise
from moebench.turns import Turns
from moebench.warm import WarmStarts

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


def parse_attacks(names: Sequence[str]) -> list[AttackPlan]:
    """The plans of the named attacks, each once, in the given order."""
    if not names:
        raise UsageError("no attack given; `moebench list attacks` shows all")
    return list({plan.name: plan for plan in map(load_attack, names)}.values())


def prepare(spec: EvalSpec, plans: Sequence[AttackPlan]) -> Prepared:
    """Loads data and model, refuses what cannot work, and lists the cells."""
    _check_numbers(spec)
    dataset = load_dataset(spec.dataset, n=spec.n)
    threat = dataset.default_threat(spec.norm) if spec.eps is None else ThreatModel(spec.norm, spec.eps)
    _check_protocols(spec, plans)
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


def _check_numbers(spec: EvalSpec) -> None:
    """Refuses sizes that mean nothing, and options of the native engine with the reference engine."""
    if spec.batch_size is not None and spec.batch_size < 1:
        raise UsageError(f"batch size must be at least 1, got {spec.batch_size}")
    if spec.draws < 1:
        raise UsageError(f"--eot takes the number of passes to average, at least 1, got {spec.draws}")
    own = {"--precision": spec.precision != "float32", "--eot": spec.draws > 1, "--compile": spec.compiled}
    for option, used in own.items():
        if used and spec.engine != "native":
            raise UsageError(f"{option} belongs to our engine; leave out --engine {spec.engine}")


def _check_protocols(spec: EvalSpec, plans: Sequence[AttackPlan]) -> None:
    """Refuses what makes no sense of a published protocol, which decides everything about its passes itself."""
    protocols = [plan.name for plan in plans if is_protocol(plan.name)]
    if not protocols:
        return
    own = {
        "--norm L2": spec.norm != "Linf",
        f"--engine {spec.engine}": spec.engine != "native",
        f"--precision {spec.precision}": spec.precision != "float32",
        "--eot": spec.draws > 1,
        "--save-adv": spec.save_adv is not None,
    }
    for option, used in own.items():
        if used:
            raise UsageError(f"{protocols[0]!r} is a protocol with a rule of its own, for Linf; leave out {option}")


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


def plan_cells(
    spec: EvalSpec,
    plans: Sequence[AttackPlan],
    loaded: LoadedModel,
    protocol: ProtocolRecord,
    training: Dataset | None = None,
) -> tuple[tuple[AttackPlan, CellSpec], ...]:
    """Every (attack, view) that the command asks for, with its fingerprint."""
    cells = []
    for wanted in plans:
        plan = wanted.fitted(loaded.module)
        for view in _views_of(plan, spec, loaded):
            check_view(view, loaded.module)
            if spec.engine == "reference":
                check_reference(plan, view)
            cells.append((plan, _cell(plan, view, spec, loaded, protocol, training)))
    return tuple(cells)


def applies(plan: AttackPlan, loaded: LoadedModel) -> bool:
    """Whether an attack has something to do on a model: those on the routing need some."""
    try:
        fitted = plan.fitted(loaded.module)
    except UsageError:
        return False
    return not (_through_routing(fitted) and default_views(loaded.module) == ["whole"])


def _through_routing(plan: AttackPlan) -> bool:
    return plan.views not in (None, ("whole",)) or any(stage.view is not None for stage in plan.stages)


def _views_of(plan: AttackPlan, spec: EvalSpec, loaded: LoadedModel) -> Sequence[str]:
    if _through_routing(plan) and default_views(loaded.module) == ["whole"]:
        raise UsageError(f"attack {plan.name!r} needs a model with routing; {loaded.record.name} has none")
    if plan.views is None:
        return list(dict.fromkeys(spec.views)) or default_views(loaded.module)
    wrong = [view for view in spec.views if view not in plan.views]
    if wrong and len(spec.attacks) == 1:
        raise UsageError(f"attack {plan.name!r} runs on view {', '.join(plan.views)}, not on {wrong[0]!r}")
    return plan.views


def _cell(
    plan: AttackPlan,
    view: str,
    spec: EvalSpec,
    loaded: LoadedModel,
    protocol: ProtocolRecord,
    training: Dataset | None,
) -> CellSpec:
    parameters = plan.parameters()
    if spec.draws > 1:
        parameters["eot"] = spec.draws
    if is_trained(plan):
        assert training is not None
        parameters["training data"] = {"sha256": training.sha256, "n": len(training)}
    identity = cell_fingerprint(
        model=loaded.record.name,
        weights=loaded.checkpoint.sha256,
        code=loaded.code,
        protocol=protocol,
        attack=plan.name,
        parameters=parameters,
        view=view,
        seed=spec.seed,
        engine=spec.engine,
        precision=spec.precision,
    )
    return CellSpec(identity, plan.name, parameters, view, spec.seed, spec.engine, spec.precision)


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


def check_writable(path: Path, option: str = "--save-adv") -> None:
    """Refuses an output file that could not be written after hours of work."""
    if path.is_dir():
        raise UsageError(f"{option} takes a file, and {path} is a folder")
    if path.exists() and not path.is_file():
        raise UsageError(f"{option} takes an ordinary file, and {path} is none; name another")
    probe = path.with_name(f".{path.name}.probe")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; choose another place for {option}") from None


@dataclass(frozen=True)
class PlannedCell:
    """A cell that a command would compute: the most passes it can take, and whether the database has it already.

    `cost` is what it will probably take, None where nobody has looked.
    """

    attack: str
    view: str
    n: int
    forwards: int
    backwards: int
    stored: bool
    cost: Cost | None = None

    def to_json(self) -> dict[str, Any]:
        """As `--dry-run --json` prints it."""
        return asdict(self)


def plan_only(spec: EvalSpec) -> list[PlannedCell]:
    """What `evaluate` would do, without doing or writing anything."""
    return planned_cells(prepare(spec, parse_attacks(spec.attacks)))


def planned_cells(prepared: Prepared) -> list[PlannedCell]:
    """The cells of a prepared evaluation, with what each can cost and whether it is stored."""
    spec = prepared.spec
    correct = int((prepared.clean_pred == prepared.samples.y).sum())
    stored = stored_fingerprints(spec) if not spec.fresh else set()
    planned = []
    for plan, cell in prepared.cells:
        budgets = [most_passes(stage, cell.view) for stage, _ in searches(plan, spec.precision)]
        forwards, backwards = (spec.draws * sum(passes) for passes in zip(*budgets, strict=True))
        # An image that is taken over is judged in one pass.
        forwards += WARM_START in cell.parameters
        there = cell.fingerprint in stored
        more = fit_budget(plan, prepared.training)
        # A protocol attacks what is wrong already, too.
        rows = len(prepared.samples) if is_protocol(plan.name) else correct
        passes = rows * forwards + more[0], rows * backwards + more[1]
        planned.append(PlannedCell(plan.name, cell.view, len(prepared.samples), *passes, there))
    return planned


def stored_fingerprints(spec: EvalSpec) -> set[str]:
    """The fingerprints of all finished cells of the database that a command names."""
    return {result.cell.fingerprint for result in stored_results(spec)}


def stored_results(spec: EvalSpec) -> list[StoredResult]:
    """The finished cells of the database that a command names; none if there is no database yet.

    Raises:
        UsageError: the database cannot be read.
    """
    try:
        with Store.open(spec.db, write=False) as store:
            return store.results()
    except MissingError:
        # No database yet is the usual case of a first dry run; any other trouble would meet the real one too.
        return []

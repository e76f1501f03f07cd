"""Transfer: adversarial examples made on one model, judged on another, for every pair of sources and targets.

Of a source the attack sees the source alone, never the target. Every sample is attacked, and no attack stops at its
first success, because what just fools the source transfers badly: the image of highest loss counts. On a target the
images are judged as those of any attack, so each pair is a stored result of the target, and RA-worst counts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moebench import __version__
from moebench.attacks import load_attack
from moebench.attacks._base import Attack, AttackPlan
from moebench.attacks._engine import Engine, Finished
from moebench.attacks._given import Given
from moebench.attacks._library import LibraryAttack
from moebench.attacks._reference import run_reference
from moebench.attacks._search import SearchCopy
from moebench.attacks._views import make_view
from moebench.attacks.fab import FAB
from moebench.errors import UsageError
from moebench.evaluation import EvalSpec, Listener, Prepared, Progress, prepare, run
from moebench.example_cache import keep_examples, read_examples
from moebench.metrics import wilson
from moebench.planning import fit_plan, plan_cells
from moebench.schema import PROTOCOL_VERSION, SUITE_VERSION, BoolArray, Norm, ResultRecord, is_protocol
from moebench.store import Store
from moebench.summary import Summary
from moebench.threat import within

ATTACK = "transfer"
"""Name under which the pairs are stored."""


@dataclass(frozen=True)
class TransferSpec:
    """What to measure; the fields are the options of `moebench transfer`.

    `targets` is empty where they are the sources, `eps` None for the data set's default radius, `n` None for all
    samples, `batch_size` None to fit the image size. `fresh` makes examples and judges them anew.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...] = ()
    attack: str = "pgd-50"
    dataset: str = "digits"
    norm: Norm = "Linf"
    eps: float | None = None
    n: int | None = None
    batch_size: int | None = None
    device: str = "cpu"
    seed: int = 0
    db: str | None = None
    fresh: bool = False
    command: str = ""


@dataclass(frozen=True)
class Pair:
    """One source's examples on one target. Accuracies are fractions with their 95 % Wilson intervals.

    `accuracy` is the share of all `n` samples that the target gets right both clean and attacked: its robust accuracy.
    `success_rate` is the share of the `success_n` samples that source and target both get right clean on which the
    target is then wrong; None where there is no such sample. A pair of a model with itself is `white_box`.
    """

    source: str
    target: str
    white_box: bool
    accuracy: float
    ci_low: float
    ci_high: float
    n: int
    success_rate: float | None
    success_ci_low: float | None
    success_ci_high: float | None
    success_n: int
    run_id: str

    def to_json(self) -> dict[str, Any]:
        """One entry of the matrix that `moebench transfer --json` prints."""
        return dict(vars(self))


@dataclass(frozen=True)
class ModelFacts:
    """A source or target: its weights, its clean accuracy, and for a target the worst case over all stored attacks."""

    name: str
    weights_sha256: str
    clean_accuracy: float
    run_id: str | None
    ra_worst: float | None


@dataclass(frozen=True)
class TransferSummary:
    """What one command measured. `examples` says per source whether they were made, kept from before, or not needed."""

    attack: str
    dataset: str
    n: int
    norm: str
    eps: float
    seed: int
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    models: tuple[ModelFacts, ...]
    matrix: tuple[Pair, ...]
    examples: Mapping[str, str]
    notes: tuple[str, ...]
    reused: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The object that `moebench transfer --json` prints."""
        plain = {key: value for key, value in vars(self).items() if key not in ("models", "matrix")}
        return {
            **plain,
            "suite": SUITE_VERSION,
            "sources": list(self.sources),
            "targets": list(self.targets),
            "examples": dict(self.examples),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
            "models": [dict(vars(model)) for model in self.models],
            "matrix": [pair.to_json() for pair in self.matrix],
        }


@dataclass
class Source:
    """A model with the attack on it; makes the examples when they are first asked for."""

    prepared: Prepared
    plan: AttackPlan
    fresh: bool
    tell: Listener | None
    examples: str = "not needed"
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The model's name in the store."""
        return self.prepared.loaded.record.name

    @property
    def origin(self) -> dict[str, Any]:
        """All that decides the examples, but for data and threat model: the parameters of the stored cells."""
        loaded = self.prepared.loaded
        return {
            "source": self.name,
            "source_weights": loaded.checkpoint.sha256,
            "source_code": loaded.code,
            "source_view": self.view,
            "attack": self.plan.name,
            "attack_parameters": self.plan.parameters(),
            "crafting": "no stop at the first success, image of highest loss",
        }

    @property
    def view(self) -> str:
        """What of the source the attack sees: the whole of it, unless the attack is defined on another view."""
        return "whole" if self.plan.views is None else self.plan.views[0]

    @cached_property
    def images(self) -> Tensor:
        """The examples (N, C, H, W) of all samples."""
        prepared = self.prepared
        facts = {
            **self.origin,
            "data": prepared.protocol.data_sha256,
            "ids": prepared.samples.ids.tolist(),
            "threat": prepared.threat,
            "seed": prepared.spec.seed,
            "protocol": PROTOCOL_VERSION,
            "suite": SUITE_VERSION,
            "version": __version__,
        }
        clean = prepared.samples.x
        kept = None if self.fresh else read_examples(facts, tuple(clean.shape))
        if kept is not None:
            kept = kept.to(clean.device)
            if bool(within(kept, clean, prepared.threat).all()):
                self.examples = "kept from before"
                return kept
        x_adv = craft(prepared, self.plan.stages[0], self.view, self.tell)
        self.examples = "made"
        try:
            keep_examples(facts, x_adv)
        except OSError as error:
            self.notes.append(f"the examples of {self.name} could not be kept ({error.strerror or error})")
        return x_adv


def transfer(spec: TransferSpec, listener: Listener | None = None) -> TransferSummary:
    """Makes examples on every source, judges them on every target, and stores each pair.

    Args:
        spec: models, attack, data, threat model and where to store.
        listener: told after each batch of finished samples.

    Raises:
        UsageError: something that was asked for cannot be done; nothing is written.
        RunError: the work failed on the way; what was finished is kept.
    """
    begin = perf_counter()
    source_names, target_names, models = _load_all(spec)
    plan = source_plan(spec.attack)
    first = models[source_names[0]]
    sources = [Source(models[name], _fitted(plan, models[name]), spec.fresh, listener) for name in source_names]
    targets = [_target(models[name], sources) for name in target_names]
    pairs: list[Pair] = []
    summaries: dict[str, Summary] = {}
    with Store.open(spec.db, write=True) as store:
        for target in targets:
            summary = run(target, store, listener)
            summaries[target.loaded.record.name] = summary
            for source, (_, cell), record in zip(sources, target.cells, summary.results, strict=True):
                stored = store.reusable(cell.fingerprint)
                assert stored is not None
                broken = store.outcomes(stored.result_id).broken
                pairs.append(_pair(source, target, record, broken, summary.run_id))
    order = {source.name: place for place, source in enumerate(sources)}
    return TransferSummary(
        attack=spec.attack,
        dataset=first.protocol.dataset,
        n=first.protocol.n,
        norm=first.threat.norm,
        eps=first.threat.eps,
        seed=spec.seed,
        sources=tuple(order),
        targets=tuple(summaries),
        models=tuple(_facts(model, summaries) for model in models.values()),
        matrix=tuple(sorted(pairs, key=lambda pair: order[pair.source])),
        examples={source.name: source.examples for source in sources},
        notes=tuple(note for source in sources for note in source.notes),
        reused=sum(summary.reused for summary in summaries.values()),
        seconds=perf_counter() - begin,
    )


def source_plan(name: str) -> AttackPlan:
    """The attack of that name, if examples for other models can be made with it.

    Raises:
        UsageError: unknown name, or an attack that has several stages or does not look for a high loss.
    """
    plan = load_attack(name)
    why = None
    if is_protocol(plan.name):
        why = "it is a published protocol, whose images need not be valid"
    elif len(plan.stages) > 1:
        why = f"it runs {len(plan.stages)} attacks one after the other on what still stands"
    elif isinstance(plan.stages[0], FAB):
        why = "it looks for the nearest boundary of its model, not for a high loss"
    elif plan.stages[0].view is not None:
        why = "it attacks the routing of its model"
    if why is not None:
        raise UsageError(
            f"attack {name!r} makes no examples for other models: {why}; choose one such as pgd-50, apgd-ce, apgd-t or "
            "torchattacks:MIFGSM"
        )
    return plan


@torch.no_grad()
def _classes(prepared: Prepared) -> int:
    return int(prepared.loaded.module(prepared.samples.x[:1]).shape[1])


def _fitted(plan: AttackPlan, prepared: Prepared) -> AttackPlan:
    fitted = fit_plan(plan, prepared.threat, prepared.dataset.shape, _classes(prepared), prepared.batch_size)
    if plan.views is not None:
        # The attack's own view must exist on the source; asking for it says so in one line if not.
        make_view(plan.views[0], prepared.loaded.module)
    return fitted


def _load_all(spec: TransferSpec) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, Prepared]]:
    """Every model once, checked on the clean data, by the name that the user gave."""
    if not spec.sources:
        raise UsageError("no source model given; --models takes names such as rt-er,st-moe,rt-er/expert[0]")
    sources = tuple(dict.fromkeys(spec.sources))
    targets = tuple(dict.fromkeys(spec.targets)) or sources
    models: dict[str, Prepared] = {}
    for name in dict.fromkeys((*sources, *targets)):
        models[name] = prepare(
            EvalSpec(
                model=name,
                dataset=spec.dataset,
                attacks=(ATTACK,),
                norm=spec.norm,
                eps=spec.eps,
                n=spec.n,
                batch_size=spec.batch_size,
                device=spec.device,
                seed=spec.seed,
                db=spec.db,
                fresh=spec.fresh,
                command=spec.command,
            ),
            (),
        )
    shown: dict[str, str] = {}
    classes = {name: _classes(prepared) for name, prepared in models.items()}
    for name, prepared in models.items():
        if classes[name] != classes[sources[0]]:
            raise UsageError(
                f"{name} has {classes[name]} classes and {sources[0]} has {classes[sources[0]]}; transfer is measured "
                "between models of the same classes"
            )
        record = prepared.loaded.record.name
        same = shown.setdefault(record, name)
        if same != name:
            raise UsageError(f"{same} and {name} are both called {record} in tables; give one of them another name")
    return sources, targets, models


def craft(prepared: Prepared, stage: Attack, view: str, listener: Listener | None = None) -> Tensor:
    """Adversarial examples of all samples on a model, for other models to be fooled by: (N, C, H, W) in the ball.

    Args:
        prepared: the source model with its samples and threat model.
        stage: the attack; a class of torchattacks gives its last image, any other the one of highest loss.
        view: what of the source it sees.
        listener: told after each batch of finished samples.
    """
    samples, name = prepared.samples, prepared.loaded.record.name
    shown = make_view(view, prepared.search.module)
    shown.prepare(samples.x)
    engine = Engine(
        prepared.loaded.module,
        shown,
        samples,
        prepared.threat,
        batch_size=prepared.batch_size,
        seed=prepared.spec.seed,
        screen=prepared.search.module,
        stop_when_broken=False,
    )
    x_adv, done = samples.x.clone(), 0

    def sink(finished: Finished) -> None:
        nonlocal done
        x_adv[finished.index] = finished.x_adv
        done += len(finished.index)
        if listener is not None:
            listener(Progress(0, 0, f"{stage.stage} for transfer", name, "examples", done, len(samples), len(samples)))

    everything = torch.arange(len(samples), device=samples.x.device)
    if isinstance(stage, LibraryAttack):
        run_reference(stage, engine, everything, sink)
    else:
        engine.run_stage(stage, everything, sink)
    return x_adv


def _target(prepared: Prepared, sources: Sequence[Source]) -> Prepared:
    """A target with one cell per source."""
    plans = [
        AttackPlan(
            ATTACK,
            f"examples of {source.name}",
            (Given(f"from {source.name}", source.origin, partial(getattr, source, "images")),),
            views=("whole",),
        )
        for source in sources
    ]
    cells = plan_cells(prepared.spec, plans, prepared.loaded, prepared.protocol)
    # One pass per image: there is no search to be faster in, so the model itself is asked.
    return replace(prepared, cells=cells, search=SearchCopy(prepared.loaded.module, {}))


def _pair(source: Source, target: Prepared, record: ResultRecord, broken: BoolArray, run_id: str) -> Pair:
    labels = target.samples.y
    right = ((source.prepared.clean_pred == labels) & (target.clean_pred == labels)).cpu().numpy()
    n, k = int(np.count_nonzero(right)), int(np.count_nonzero(broken & right))
    low, high = wilson(k, n) if n else (None, None)
    return Pair(
        source=source.name,
        target=target.loaded.record.name,
        white_box=source.name == target.loaded.record.name,
        accuracy=record.accuracy,
        ci_low=record.ci_low,
        ci_high=record.ci_high,
        n=record.n,
        success_rate=k / n if n else None,
        success_ci_low=low,
        success_ci_high=high,
        success_n=n,
        run_id=run_id,
    )


def _facts(prepared: Prepared, summaries: Mapping[str, Summary]) -> ModelFacts:
    name = prepared.loaded.record.name
    summary = summaries.get(name)
    right = int((prepared.clean_pred == prepared.samples.y).sum())
    return ModelFacts(
        name=name,
        weights_sha256=prepared.loaded.checkpoint.sha256,
        clean_accuracy=right / len(prepared.samples),
        run_id=None if summary is None else summary.run_id,
        ra_worst=None if summary is None else summary.ra_worst,
    )

"""Transfer: adversarial examples made on one model, judged on another, for every pair of sources and targets.

Of a source the attack sees the source alone, never the target (`crafting`). On a target the images are judged as those
of any attack, so each pair is a stored result of the target, and RA-worst counts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch

from moebench.attacks._base import AttackPlan
from moebench.attacks._given import Given
from moebench.attacks._search import SearchCopy
from moebench.attacks._views import make_view
from moebench.crafting import Source, source_plan
from moebench.errors import UsageError
from moebench.evaluation import EvalSpec, Listener, Prepared, prepare, run
from moebench.metrics import wilson
from moebench.planning import fit_plan, plan_cells
from moebench.schema import SUITE_VERSION, BoolArray, Norm, ResultRecord
from moebench.store import Store
from moebench.summary import Summary

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

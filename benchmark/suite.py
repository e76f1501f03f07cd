"""`moebench sweep`: every model on every data set under a suite's attacks, as far as the store lacks them.

A model's attacks are one run. Where one of them fails the others go on without it, and the failure is told at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moebench.attacks._base import AttackPlan
from moebench.bill import Bill
from moebench.dry_run import PlannedCell, planned_cells
from moebench.errors import GoneError, MoebenchError, UsageError
from moebench.estimate import planned_with_costs
from moebench.evaluation import EvalSpec, Listener, Prepared, evaluate, prepare
from moebench.models import MODELS
from moebench.models._weights import shipped_weights
from moebench.planning import applies, parse_attacks
from moebench.schema import SUITES, WHOLE_ONLY
from moebench.store import Store
from moebench.summary import Summary

Command = Callable[[EvalSpec], str]
"""From what is evaluated to the command that repeats it."""


@dataclass(frozen=True)
class Failure:
    """What could not be done, and why; `attack` is empty where it was the model or its data."""

    model: str
    dataset: str
    attack: str
    error: str

    def __str__(self) -> str:
        what = f"{self.attack} on {self.model}" if self.attack else self.model
        return f"{what}, {self.dataset}: {self.error}"


@dataclass(frozen=True)
class ModelPlan:
    """Attacks of the suite on one model and data set, their cells, and what a pass costs (FLOPs, 1 unknown).

    `bill` is what they cost altogether, where that was asked for.
    """

    spec: EvalSpec
    cells: tuple[PlannedCell, ...]
    flops: int
    bill: Bill | None = None

    @property
    def missing(self) -> tuple[PlannedCell, ...]:
        """The cells that the store lacks."""
        return tuple(cell for cell in self.cells if not cell.stored)

    @property
    def work(self) -> float:
        """FLOPs at most; a backward pass counts as two forward passes."""
        return float(sum(cell.forwards + 2 * cell.backwards for cell in self.missing)) * self.flops

    def to_json(self) -> dict[str, Any]:
        """As `moebench sweep --dry-run --json` prints it."""
        return {
            "model": self.spec.model,
            "dataset": self.spec.dataset,
            "cells": [cell.to_json() for cell in self.cells],
            **({} if self.bill is None else {"total": self.bill.to_json()}),
        }


@dataclass(frozen=True)
class Planned:
    """All that a sweep would do, and what cannot even be planned."""

    plans: tuple[ModelPlan, ...]
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class Swept:
    """What a sweep did; `complete` counts the plans of which the store had everything."""

    summaries: tuple[Summary, ...]
    failures: tuple[Failure, ...]
    complete: int


class Watcher:
    """Told what a sweep does; the default tells nobody."""

    def planning(self, number: int, total: int, model: str) -> None:
        """Model `number` of `total` is loaded to see what it lacks."""

    def starting(self, plan: ModelPlan, number: int, total: int, left: float | None) -> Listener | None:
        """An evaluation begins; `left` seconds are left at the pace so far, None where nothing is known of it."""

    def finished(self, plan: ModelPlan, summary: Summary) -> None:
        """It is done."""

    def failed(self, failure: Failure) -> None:
        """Something could not be done; the sweep goes on."""


def models_with_weights(dataset: str) -> list[str]:
    """The registered models whose weights for a data set are shipped."""
    return [name for name in MODELS.names() if shipped_weights(dataset, name).exists()]


def plan_suite(
    base: EvalSpec,
    suite: str,
    models: Sequence[str],
    datasets: Sequence[str],
    watcher: Watcher | None = None,
    *,
    costs: bool = False,
    price_per_hour: float | None = None,
) -> Planned:
    """What a suite asks of some models, and what of it the store lacks; nothing is written.

    Args:
        base: everything but model, data and attacks.
        suite: its version.
        models: names, or none for all whose weights for the data set are shipped.
        datasets: names.
        watcher: told of each model.
        costs: find out what the missing cells cost, by trying them.
        price_per_hour: of the device.

    Raises:
        UsageError: there is no such suite, nothing to do, or one reason that none of the models can be planned.
    """
    if suite not in SUITES:
        raise UsageError(f"unknown suite {suite!r}; there is {', '.join(SUITES)}")
    attacks = parse_attacks(SUITES[suite])
    pairs = [(model, dataset) for dataset in datasets for model in (models or models_with_weights(dataset))]
    if not pairs:
        raise UsageError(f"no weights are shipped for {', '.join(datasets)}; name models with --models")
    plans, failures = [], []
    for number, (model, dataset) in enumerate(dict.fromkeys(pairs), start=1):
        if watcher is not None:
            watcher.planning(number, len(pairs), model)
        try:
            for plan, prepared in _plans(replace(base, model=model, dataset=dataset), attacks):
                if costs:
                    cells, bill = planned_with_costs(prepared, price_per_hour)
                    plan = replace(plan, cells=tuple(cells), bill=bill)
                plans.append(plan)
        except MoebenchError as error:
            failures.append(Failure(model, dataset, "", str(error)))
    if not plans and len({failure.error for failure in failures}) == 1:
        # What is wrong with all of them is wrong with the command.
        raise UsageError(failures[0].error)
    return Planned(tuple(plans), tuple(failures))


def _plans(spec: EvalSpec, attacks: Sequence[AttackPlan]) -> list[tuple[ModelPlan, Prepared]]:
    """One plan for the attacks on all headline views, and one for those on the whole model alone."""
    clean = prepare(replace(spec, attacks=()), [])
    fitting = [plan for plan in attacks if applies(plan, clean.loaded)]
    found = []
    for only, views in ((False, ()), (True, ("whole",))):
        chosen = [plan for plan in fitting if (plan.name in WHOLE_ONLY) == only]
        if chosen:
            own = replace(spec, attacks=tuple(plan.name for plan in chosen), views=views)
            prepared = prepare(own, chosen)
            flops = prepared.loaded.checkpoint.flops or 1
            found.append((ModelPlan(own, tuple(planned_cells(prepared)), flops), prepared))
    return found


def run_suite(planned: Planned, command: Command, watcher: Watcher | None = None) -> Swept:
    """Evaluates what is missing, model by model; errors are collected, an interruption is passed on.

    Raises:
        UsageError: the database cannot be written.
        GoneError: the database or the cluster is gone, or a run was cancelled.
    """
    watcher = Watcher() if watcher is None else watcher
    todo = [plan for plan in planned.plans if plan.missing]
    if todo:
        # What is wrong with the database is wrong with the command, not with each of its cells.
        Store.open(todo[0].spec.db, write=True).close()
    failures = list(planned.failures)
    for failure in failures:
        watcher.failed(failure)
    summaries, done, begin = [], 0.0, time.perf_counter()
    total = sum(plan.work for plan in todo)
    for number, plan in enumerate(todo, start=1):
        left = (time.perf_counter() - begin) * (total - done) / done if done else None
        listener = watcher.starting(plan, number, len(todo), left)
        summary, broken = _run(plan.spec, command, listener)
        for failure in broken:
            watcher.failed(failure)
        failures += broken
        if summary is not None:
            summaries.append(summary)
            watcher.finished(plan, summary)
        done += plan.work
    return Swept(tuple(summaries), tuple(failures), len(planned.plans) - len(todo))


def _run(spec: EvalSpec, command: Command, listener: Listener | None) -> tuple[Summary | None, list[Failure]]:
    """One model's attacks in one run; after a failure, a further run of those that are left."""
    failures: list[Failure] = []
    while spec.attacks:
        spec = replace(spec, command=command(spec))
        try:
            return evaluate(spec, listener), failures
        except GoneError:
            raise
        except Exception as error:
            # Any error: the next model may well work.
            text = str(error) if isinstance(error, MoebenchError) else f"{type(error).__name__}: {error}"
            attack = _unfinished(spec)
            failures.append(Failure(spec.model, spec.dataset, attack or "", " ".join(text.split())))
            if attack is None:
                return None, failures
            spec = replace(spec, attacks=tuple(name for name in spec.attacks if name != attack))
    return None, failures


def _unfinished(spec: EvalSpec) -> str | None:
    """The first attack of a failed run that the store lacks a result of; None where it cannot be told."""
    try:
        cells = planned_cells(prepare(spec, parse_attacks(spec.attacks)))
    except Exception:
        return None
    return next((cell.attack for cell in cells if not cell.stored), None)

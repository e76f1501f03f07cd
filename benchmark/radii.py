"""Robustness curves: one evaluation at several radii, with the model and the data loaded once.

Every radius is a threat model, a protocol and a run of its own in the store, as if it had been evaluated alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moebench.bill import Bill, together
from moebench.dry_run import PlannedCell, planned_cells
from moebench.errors import UsageError
from moebench.estimate import planned_with_costs
from moebench.evaluation import EvalSpec, Listener, Prepared, Progress, prepare, prepare_cluster, run
from moebench.planning import parse_attacks, plan_cells
from moebench.schema import SUITE_VERSION, WARM_START, CellSpec, ResultRecord, ThreatModel, format_eps, is_protocol
from moebench.store import Store
from moebench.summary import Summary
from moebench.warm import WarmStarts, warm_started


@dataclass(frozen=True)
class Sweep:
    """The summaries of a sweep in the order of its radii; `cells` are, per radius, the cells behind its results."""

    summaries: tuple[Summary, ...]
    cells: tuple[tuple[CellSpec, ...], ...]

    @property
    def curves(self) -> dict[tuple[str, str], list[ResultRecord]]:
        """Per attack and view the results, in the order of the radii."""
        return {
            (record.attack, record.view): [summary.results[place] for summary in self.summaries]
            for place, record in enumerate(self.summaries[0].results)
        }

    def to_json(self) -> dict[str, Any]:
        """The object that `moebench evaluate --json` prints for several radii."""
        first = self.summaries[0]
        return {
            "model": first.model,
            "dataset": first.dataset,
            "n": first.n,
            "norm": first.norm,
            "suite": SUITE_VERSION,
            "runs": [_run_json(*pair) for pair in zip(self.summaries, self.cells, strict=True)],
            "curves": [
                {"attack": attack, "view": view, "points": list(map(_point, self.summaries, records))}
                for (attack, view), records in self.curves.items()
            ],
        }


def _run_json(summary: Summary, cells: Sequence[CellSpec]) -> dict[str, Any]:
    """As a single evaluation prints it; a result with a warm start says where it comes from."""
    made = summary.to_json()
    for result, cell in zip(made["results"], cells, strict=True):
        if WARM_START in cell.parameters:
            result["warm_start"] = dict(cell.parameters[WARM_START])
    return made


def _point(summary: Summary, record: ResultRecord) -> dict[str, Any]:
    return {
        "eps": summary.eps,
        "accuracy": record.accuracy,
        "ci_low": record.ci_low,
        "ci_high": record.ci_high,
        "n": record.n,
        "run_id": summary.run_id,
    }


def sweep(
    spec: EvalSpec,
    radii: Sequence[float],
    *,
    cold: bool = False,
    commands: Mapping[float, str] | None = None,
    listener: Listener | None = None,
) -> Sweep:
    """Evaluates a model at several radii, smallest first, and stores what it finds.

    Args:
        spec: everything but the radius; its `eps` is not read.
        radii: at least one; sorted, and each once, before anything is done.
        cold: attack every radius for itself, instead of taking over what smaller ones broke. The reference engine
            always does.
        commands: what the run of each radius is repeated with [default: the spec's command].
        listener: told after each batch of decided samples.

    Raises:
        UsageError: something that was asked for cannot be done; nothing is written.
        RunError: the work failed on the way; what was finished is kept.
    """
    levels = prepare_levels(spec, radii, cold=cold, commands=commands)
    warm = None if cold or spec.engine != "native" else WarmStarts()
    done: list[Summary] = []
    prepare_cluster(levels[0])
    with Store.open(spec.db, write=True) as store:
        for number, level in enumerate(levels):
            done.append(run(level, store, _placed(listener, levels, number), warm))
    return Sweep(tuple(done), tuple(tuple(cell for _, cell in level.cells) for level in levels))


def plan_sweep(spec: EvalSpec, radii: Sequence[float], *, cold: bool = False) -> dict[float, list[PlannedCell]]:
    """What `sweep` would do at each radius, without doing or writing anything."""
    return {level.threat.eps: planned_cells(level) for level in prepare_levels(spec, radii, cold=cold)}


def plan_sweep_with_costs(
    spec: EvalSpec, radii: Sequence[float], *, cold: bool = False, price_per_hour: float | None = None
) -> tuple[dict[float, list[PlannedCell]], Bill]:
    """As `plan_sweep`, with what it costs; that a warm start spares samples the attack is not taken into account."""
    planned, bills = {}, []
    for level in prepare_levels(spec, radii, cold=cold):
        planned[level.threat.eps], bill = planned_with_costs(level, price_per_hour)
        bills.append(bill)
    return planned, replace(together(bills), images=bills[0].images)


def prepare_levels(
    spec: EvalSpec, radii: Sequence[float], *, cold: bool, commands: Mapping[float, str] | None = None
) -> list[Prepared]:
    """One prepared evaluation per radius, all of the same model and samples."""
    if not radii:
        raise UsageError("a sweep needs at least one eps")
    if spec.save_adv is not None and len(set(radii)) > 1:
        raise UsageError("--save-adv takes the images of one eps; give a single --eps with it")
    threats = [ThreatModel(spec.norm, eps) for eps in sorted(set(radii))]
    plans = parse_attacks(spec.attacks)
    levels: list[Prepared] = []
    for threat in threats:
        own = replace(spec, eps=threat.eps, command=(commands or {}).get(threat.eps, spec.command))
        if not levels:
            levels.append(prepare(own, plans))
            continue
        smaller = levels[-1]
        protocol = replace(smaller.protocol, threat=threat)
        cells = plan_cells(own, plans, smaller.loaded, protocol)
        if not cold and spec.engine == "native":
            pairs = zip(cells, smaller.cells, strict=True)
            cells = tuple(
                (plan, cell if is_protocol(plan.name) else warm_started(cell, known, smaller.threat.eps))
                for (plan, cell), (_, known) in pairs
            )
        levels.append(replace(smaller, spec=own, threat=threat, protocol=protocol, cells=cells))
    return levels


def _placed(listener: Listener | None, levels: Sequence[Prepared], number: int) -> Listener | None:
    """A listener that is told where in the whole sweep a radius stands."""
    if listener is None:
        return None
    before = sum(len(level.cells) for level in levels[:number])
    total = sum(len(level.cells) for level in levels)
    radius = format_eps(levels[number].threat.eps)

    def tell(step: Progress) -> None:
        listener(replace(step, number=before + step.number, total=total, attack=f"eps {radius}: {step.attack}"))

    return tell

"""Robustness curves from the store: accuracy over the radius, and over the steps of PGD.

Two results are points of one curve where they agree in everything but the radius (or the steps): model, weights, code,
data, norm, attack, view, seed and engine. Radii that were attacked each for itself ("cold") and radii that take over
what smaller ones broke ("warm") make curves of their own.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moebench.metrics import Measure, from_accuracy
from moebench.report.evidence import STEPS, is_warm, newest, result_key
from moebench.report.text import safe
from moebench.schema import WARM_START, StoredResult, is_protocol

Axis = Literal["eps", "steps"]

COLUMNS = (
    *("axis", "start", "model", "attack", "view", "norm", "eps", "steps", "accuracy", "ci_low", "ci_high", "n"),
    *("dataset", "split", "protocol", "suite", "engine", "seed", "data_sha256", "checkpoint_sha256", "command"),
)


@dataclass(frozen=True)
class Curve:
    """Two or more results along one axis, in its order. `attack` is "pgd-N" where the axis is the steps."""

    axis: Axis
    start: Literal["cold", "warm"]
    attack: str
    points: tuple[StoredResult, ...]


def steps_of(stored: StoredResult) -> int | None:
    """The number of steps in the name of a result's attack, None where it has none."""
    match = STEPS.fullmatch(stored.cell.attack)
    return int(match["steps"]) if match else None


def curves(results: Iterable[StoredResult]) -> list[Curve]:
    """All curves that the results make, in a fixed order; a single point is no curve."""
    groups: dict[tuple[Any, ...], list[StoredResult]] = {}
    attacks = (one for one in results if not is_protocol(one.cell.attack))
    for stored in sorted(attacks, key=result_key):
        groups.setdefault(_setting(stored), []).append(stored)
    found: list[Curve] = []
    for group in groups.values():
        by_attack: dict[str, list[StoredResult]] = {}
        by_radius: dict[tuple[str, float, float], list[StoredResult]] = {}
        for stored in group:
            by_attack.setdefault(stored.cell.attack, []).append(stored)
            match = STEPS.fullmatch(stored.cell.attack)
            if match:
                where = (match["family"], stored.protocol.threat.eps, _source(stored))
                by_radius.setdefault(where, []).append(stored)
        for attack, same in by_attack.items():
            cold = _newest_of_each([one for one in same if not is_warm(one)], "eps")
            found += [Curve("eps", "cold", attack, cold), Curve("eps", "warm", attack, _longest_chain(same))]
        for (family, _, source), same in by_radius.items():
            found.append(Curve("steps", "warm" if source else "cold", f"{family}-N", _newest_of_each(same, "steps")))
    return [curve for curve in found if len(curve.points) > 1]


def curves_csv(results: Iterable[StoredResult]) -> str:
    """The curves as one table, a row per point: fractions; of measurements only, never of published numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for curve in curves(results):
        for stored in curve.points:
            writer.writerow(map(safe, _row(curve, stored)))
    return text.getvalue()


def _row(curve: Curve, stored: StoredResult) -> list[Any]:
    protocol, cell = stored.protocol, stored.cell
    found = from_accuracy(stored.record.accuracy, stored.record.n)
    return [
        *(curve.axis, curve.start, stored.model.name, curve.attack, cell.view),
        *(protocol.threat.norm, protocol.threat.eps, steps_of(stored), *_numbers(found), protocol.n),
        *(protocol.dataset, protocol.split, protocol.version, cell.suite, cell.engine, cell.seed),
        *(protocol.data_sha256, stored.checkpoint.sha256, stored.command),
    ]


def _numbers(found: Measure | None) -> tuple[str | None, ...]:
    if found is None:
        return (None, None, None)
    return tuple(f"{value:.6f}" for value in (found.value, found.low, found.high))


def _setting(stored: StoredResult) -> tuple[Any, ...]:
    """What the points of a curve share, whatever its axis."""
    protocol, threat, cell = stored.protocol, stored.protocol.threat, stored.cell
    what = (stored.model.name, stored.checkpoint.sha256, str(stored.environment.get("code")))
    data = (protocol.dataset, protocol.split, protocol.data_sha256, protocol.n, protocol.version)
    return (*what, *data, threat.norm, threat.lower, threat.upper, cell.view, cell.engine, cell.precision, cell.seed)


def _source(stored: StoredResult) -> float:
    """The radius whose images a result took over, 0 for none."""
    source: float = stored.cell.parameters.get(WARM_START, {"eps": 0.0})["eps"]
    return source


def _newest_of_each(same: Sequence[StoredResult], axis: Axis) -> tuple[StoredResult, ...]:
    """The newest result at each place of the axis, in its order."""
    places: dict[float, list[StoredResult]] = {}
    for stored in same:
        places.setdefault(stored.protocol.threat.eps if axis == "eps" else steps_of(stored) or 0, []).append(stored)
    return tuple(newest(places[place]) for place in sorted(places))


def _longest_chain(same: Sequence[StoredResult]) -> tuple[StoredResult, ...]:
    """A warm result with the results that it builds on, smallest radius first: the longest chain, then the newest."""
    known = {stored.cell.fingerprint: stored for stored in same}
    chains = []
    for last in filter(is_warm, same):
        chain = [last]
        while is_warm(chain[-1]):
            before = known.get(chain[-1].cell.parameters[WARM_START]["fingerprint"])
            if before is None:
                break
            chain.append(before)
        chains.append(tuple(reversed(chain)))
    return max(chains, key=lambda chain: (len(chain), chain[-1].finished_at, chain[-1].result_id), default=())

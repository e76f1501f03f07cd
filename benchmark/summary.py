"""The numbers of one command: headline metrics, flags, and the object that `--json` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moebench.metrics import standing, worst_case
from moebench.schema import (
    OVERSTATED_RA,
    SUITE_VERSION,
    BoolArray,
    Flag,
    Outcomes,
    Precision,
    ProtocolRecord,
    ResultRecord,
    StoredResult,
    is_protocol,
)
from moebench.store import Store
from moebench.trust import passive_flags

if TYPE_CHECKING:
    from moebench.evaluation import Prepared

HEADLINES = {"ra": "whole", "ra_e": "experts", "ra_r": "router", "ra_smoe": "standard", "ra_rmoe": "robust"}
"""Headline metric -> the view whose attacks it is the per-sample worst case of."""


@dataclass(frozen=True)
class Summary:
    """What one command measured. Accuracies are fractions, None where they do not apply or were not measured.

    `ra`, `ra_e`, … are the share of samples that none of the command's attacks on that view breaks; `ra_worst` the
    share that no attack recorded for these weights and this protocol breaks, on any view. Published protocols are
    scored by their own rules and count in none of these; `ra_worst` is None where nothing else is recorded.
    """

    run_id: str
    model: str
    dataset: str
    n: int
    norm: str
    eps: float
    seconds: float
    sa: float
    headlines: dict[str, float | None]
    ra_worst: float | None
    flags: tuple[Flag, ...]
    results: tuple[ResultRecord, ...]
    reused: int
    precision: Precision = "float32"

    def to_json(self) -> dict[str, Any]:
        """The object that `moebench evaluate --json` prints."""
        return {
            "run_id": self.run_id,
            "model": self.model,
            "dataset": self.dataset,
            "n": self.n,
            "norm": self.norm,
            "eps": self.eps,
            "suite": SUITE_VERSION,
            "precision": self.precision,
            "seconds": round(self.seconds, 3),
            "sa": self.sa,
            "ra": self.headlines["ra"],
            "ra_e": self.headlines["ra_e"],
            "ra_r": self.headlines["ra_r"],
            "ra_worst": self.ra_worst,
            "flags": [{"code": flag.code, "evidence": flag.evidence} for flag in self.flags],
            "results": [
                {
                    "attack": record.attack,
                    "view": record.view,
                    "accuracy": record.accuracy,
                    "ci_low": record.ci_low,
                    "ci_high": record.ci_high,
                    "n": record.n,
                    "seconds": round(record.seconds, 3),
                    "forwards": record.forwards,
                    "backwards": record.backwards,
                }
                for record in self.results
            ],
        }


def summarise(
    store: Store,
    run_id: str,
    prepared: Prepared,
    records: Sequence[ResultRecord],
    reused: int,
    seconds: float,
    seen: Sequence[Flag] = (),
) -> Summary:
    """Headline metrics from the per-sample outcomes in the store; `seen` are the flags of checks and probes."""
    stored, elsewhere = comparable(store, prepared)
    outcomes = {result.cell.fingerprint: store.outcomes(result.result_id) for result in stored}
    wanted = [cell for _, cell in prepared.cells if not is_protocol(cell.attack)]
    by_view: dict[str, list[Outcomes]] = {}
    for cell in wanted:
        by_view.setdefault(cell.view, []).append(outcomes[cell.fingerprint])
    headlines = {name: _share(by_view.get(view)) for name, view in HEADLINES.items()}
    passive = passive_flags(
        [(result, outcomes[result.cell.fingerprint]) for result in stored],
        [(result, store.outcomes(result.result_id)) for result in elsewhere],
    )
    return Summary(
        run_id=run_id,
        model=prepared.loaded.record.name,
        dataset=prepared.protocol.dataset,
        n=prepared.protocol.n,
        norm=prepared.threat.norm,
        eps=prepared.threat.eps,
        seconds=seconds,
        sa=records[0].clean_accuracy,
        headlines=headlines,
        ra_worst=_share(list(outcomes.values())),
        flags=(*overstated(by_view), *passive, *seen),
        results=tuple(records),
        reused=reused,
        precision=prepared.spec.precision,
    )


def comparable(store: Store, prepared: Prepared) -> tuple[list[StoredResult], list[StoredResult]]:
    """Every finished result of these weights on these samples, whatever command made it.

    Results of the same weights in another program, by a setting or a change of the model's file, are another model's.

    Returns: those under this threat model, and those of this command's attacks at other radii.
    """
    loaded, protocol = prepared.loaded, prepared.protocol
    wanted = _measured_on(protocol), loaded.code
    attacks = {(cell.attack, cell.view) for _, cell in prepared.cells}
    here, elsewhere = [], []
    for result in store.results(model=loaded.record.name, checkpoint_sha=loaded.checkpoint.sha256):
        if (_measured_on(result.protocol), result.environment.get("code", loaded.code)) != wanted:
            continue
        if is_protocol(result.cell.attack):
            continue
        if result.protocol.threat == protocol.threat:
            here.append(result)
        elif (result.cell.attack, result.cell.view) in attacks and result.protocol.threat.norm == protocol.threat.norm:
            elsewhere.append(result)
    return here, elsewhere


def _measured_on(protocol: ProtocolRecord) -> tuple[str, str]:
    """What makes the samples and rules of two protocols the same; the data is what it holds, not where it was read."""
    return protocol.data_sha256, protocol.version


def overstated(by_view: dict[str, list[Outcomes]]) -> list[Flag]:
    """A component attack that leaves fewer samples standing than all attacks on the whole model: RA was over-stated."""
    if "whole" not in by_view:
        return []
    whole = worst_case(by_view["whole"])
    flags = []
    for view, outcomes in by_view.items():
        component = worst_case(outcomes)
        if view != "whole" and component.sum() < whole.sum():
            flags.append(
                Flag(
                    OVERSTATED_RA,
                    f"attacks on view {view} leave {int(component.sum())} of {whole.size} samples standing, "
                    f"those on the whole model {int(whole.sum())}; only the lower number bounds the robustness",
                )
            )
    return flags


def _share(outcomes: list[Outcomes] | None) -> float | None:
    if not outcomes:
        return None
    left: BoolArray = standing(outcomes[0]) if len(outcomes) == 1 else worst_case(outcomes)
    return float(np.mean(left))

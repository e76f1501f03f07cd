"""Fixed-expert evaluation: every expert of one MoE layer, forced for all images, beside the model with its gate.

Attacks see the fixed path and are judged on it, so a row says what the network is worth if that expert always answered;
the other MoE layers route as usual (Pavlitska et al., 2025, arXiv 2509.05086).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moebench.attacks._passes import batches
from moebench.errors import UsageError
from moebench.evaluation import EvalSpec, Listener, Prepared, prepare, run
from moebench.metrics import Measure, Paired, measure, paired, standing, worst_case
from moebench.models._moe import moe_layers, route
from moebench.planning import parse_attacks
from moebench.schema import SUITE_VERSION, BoolArray, is_protocol, split_part
from moebench.store import Store

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class ExpertRow:
    """The network with one expert forced, or with its gate (`expert` None).

    Attributes:
        model: its name in the store.
        expert: which expert, None for the gate.
        load: the share of clean images (or of their tokens) that the gate sends to this expert, by routing weight; 1
            for the gate.
        sa, ra: clean accuracy, and the share that none of the attacks breaks.
        attacks: what each attack leaves.
        sa_test, ra_test: against the gated model on the same images, `only_first` being what only the gate loses; None
            for the gate.
        run_id: the run in the store.
    """

    model: str
    expert: int | None
    load: float
    sa: Measure
    ra: Measure
    attacks: dict[str, Measure]
    sa_test: Paired | None
    ra_test: Paired | None
    run_id: str

    def to_json(self) -> dict[str, Any]:
        """As `moebench experts --json` prints it; accuracies and intervals are fractions."""
        return {
            "model": self.model,
            "expert": self.expert,
            "load": self.load,
            "sa": _numbers(self.sa),
            "ra": _numbers(self.ra),
            "attacks": {name: _numbers(found) for name, found in self.attacks.items()},
            "sa_p": None if self.sa_test is None else self.sa_test.p,
            "ra_p": None if self.ra_test is None else self.ra_test.p,
            "run_id": self.run_id,
        }


@dataclass(frozen=True)
class ExpertTable:
    """The gate's row first, then one row per expert of `layer`; `layers` are all MoE layers of the model."""

    layer: str
    layers: tuple[str, ...]
    dataset: str
    n: int
    norm: str
    eps: float
    rows: tuple[ExpertRow, ...]
    reused: int

    def above(self, metric: str) -> tuple[list[int], list[int]]:
        """The experts whose "sa" or "ra" is above the gate's, and those of them where p is below 0.05."""
        gate, *experts = self.rows
        better = [row for row in experts if getattr(row, metric).k > getattr(gate, metric).k]
        sure = [row for row in better if getattr(row, f"{metric}_test").p < SIGNIFICANT]
        return [row.expert for row in better if row.expert is not None], [
            row.expert for row in sure if row.expert is not None
        ]

    def to_json(self) -> dict[str, Any]:
        """The object that `moebench experts --json` prints."""
        facts = ("layer", "dataset", "n", "norm", "eps", "reused")
        return {
            **{name: getattr(self, name) for name in facts},
            "layers": list(self.layers),
            "suite": SUITE_VERSION,
            "rows": [row.to_json() for row in self.rows],
        }


def _numbers(found: Measure) -> dict[str, float]:
    return {"value": found.value, "ci_low": found.low, "ci_high": found.high}


def fixed_experts(
    spec: EvalSpec,
    layer: str | None = None,
    *,
    command: Callable[[str], str] = lambda model: "",
    listener: Listener | None = None,
) -> ExpertTable:
    """Evaluates a model and each expert of one of its layers, computing only what the store lacks.

    Args:
        spec: model, attacks, data and threat model; its views are not read, every attack sees the whole fixed path.
        layer: the MoE layer whose experts are forced [default: the last one].
        command: gives the command that repeats the evaluation of a model.
        listener: told after each batch of decided samples.

    Raises:
        UsageError: something that was asked for cannot be done; nothing is written.
        RunError: the work failed on the way; what was finished is kept.
    """
    _refuse_protocols(spec.attacks)
    gated = _prepare(spec, spec.model, command)
    layers = moe_layers(gated.loaded.module)
    layer = _layer(spec.model, tuple(layers), layer)
    prefix = f"{layer}:" if len(layers) > 1 else ""
    names = [f"{spec.model}/expert[{prefix}{number}]" for number in range(len(layers[layer].experts))]
    prepared = [gated, *(_prepare(spec, name, command) for name in names)]
    loads = [1.0, *_loads(gated, layer)]
    rows: list[ExpertRow] = []
    reused = 0
    with Store.open(spec.db, write=True) as store:
        correct: list[BoolArray] = []
        stands: list[BoolArray] = []
        for place, one in enumerate(prepared):
            summary = run(one, store, listener)
            reused += summary.reused
            outcomes = [_outcomes(store, cell.fingerprint) for _, cell in one.cells]
            correct.append((one.clean_pred == one.samples.y).cpu().numpy())
            stands.append(worst_case(outcomes))
            rows.append(
                ExpertRow(
                    model=one.loaded.record.name,
                    expert=place - 1 if place else None,
                    load=loads[place],
                    sa=_measure(correct[-1]),
                    ra=_measure(stands[-1]),
                    attacks={
                        cell.attack: _measure(standing(found))
                        for (_, cell), found in zip(one.cells, outcomes, strict=True)
                    },
                    sa_test=paired(correct[0], correct[-1]) if place else None,
                    ra_test=paired(stands[0], stands[-1]) if place else None,
                    run_id=summary.run_id,
                )
            )
    threat = gated.threat
    return ExpertTable(
        layer, tuple(layers), gated.protocol.dataset, gated.protocol.n, threat.norm, threat.eps, tuple(rows), reused
    )


def _prepare(spec: EvalSpec, model: str, command: Callable[[str], str]) -> Prepared:
    one = replace(spec, model=model, views=("whole",), trust=False, save_adv=None, command=command(model))
    return prepare(one, parse_attacks(spec.attacks))


def _refuse_protocols(attacks: Sequence[str]) -> None:
    published = [name for name in attacks if is_protocol(name)]
    if published:
        raise UsageError(
            f"{published[0]!r} is scored by a rule of its own and counts nowhere as robust accuracy; run it on one "
            "expert by `moebench evaluate --model 'NAME/expert[LAYER:i]'`"
        )


def _layer(model: str, layers: Sequence[str], wanted: str | None) -> str:
    if split_part(model)[1] is not None:
        raise UsageError(f"{model} is a part already; give the whole model, and its layer with --layer")
    if not layers:
        raise UsageError(f"{model} has no MoE layer, so there is no expert to fix; `moebench list models` shows MoEs")
    if wanted is not None and wanted not in layers:
        raise UsageError(f"{model} has no MoE layer {wanted!r}; it has {', '.join(layers)}")
    return layers[-1] if wanted is None else wanted


@torch.no_grad()
def _loads(gated: Prepared, layer: str) -> list[float]:
    module: nn.Module = gated.loaded.module
    parts = batches(gated.samples.x, gated.batch_size)
    loads: list[float] = torch.cat([route(module, part)[layer].load() for part in parts]).mean(dim=0).tolist()
    return loads


def _outcomes(store: Store, fingerprint: str) -> Any:
    stored = store.reusable(fingerprint)
    assert stored is not None
    return store.outcomes(stored.result_id)


def _measure(hits: BoolArray) -> Measure:
    found = measure(hits)
    assert found is not None
    return found

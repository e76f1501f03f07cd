"""Single experts on their model's page: what each is worth alone, and how much of the routing weight it gets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from moebench.metrics import Measure, from_accuracy, measure, worst_case
from moebench.report.evidence import Evidence, eligible, group_key, names, newest
from moebench.report.settings import Setting
from moebench.report.text import split_name
from moebench.schema import EXPERT_VIEW, PARTS, RoutingLayer

ALL_LAYERS = ""
"""The layer of `expert[i]`, which stands in the place of every MoE layer."""


@dataclass(frozen=True)
class Alone:
    """One part of a model evaluated as a network of its own; `attacks` names what `worst` is made from."""

    sa: Measure | None
    worst: Measure | None
    attacks: str


@dataclass(frozen=True)
class ExpertRow:
    """One expert, or one half of a dual model; what has not been measured is None.

    `clean` and `attacked` are shares of routing weight. `through` is what the whole model keeps of its accuracy under
    attacks on this expert's logits (`through_attacks`).
    """

    layer: str
    expert: str
    clean: float | None
    attacked: float | None
    alone: Alone | None
    through: Measure | None
    through_attacks: str


@dataclass(frozen=True)
class ExpertTable:
    """The experts of one setting by layer; `loads_of` names the result whose routing the loads are from."""

    layers: tuple[tuple[str, tuple[ExpertRow, ...]], ...]
    loads_of: str
    missing: int


def expert_table(setting: Setting, parts: Sequence[Evidence]) -> ExpertTable | None:
    """All that is known of single experts; None for a model without any.

    Args:
        setting: the whole model's results.
        parts: results of parts of models, of any model.
    """
    routed = _routed(setting)
    layers = routed.stored.record.routing if routed is not None else ()
    alone = _alone(setting, parts)
    views = {one.view for one in setting.cells if EXPERT_VIEW.fullmatch(one.view)}
    places = {(layer.name, str(number)) for layer in layers for number in range(len(layer.load_clean))}
    one_layer = layers[0].name if len(layers) == 1 else ALL_LAYERS
    keyed_alone = {_place(part, one_layer): found for part, found in alone.items()}
    keyed_views = {_place(view, one_layer): view for view in views}
    places |= set(keyed_alone) | set(keyed_views)
    if not places:
        return None
    loads = {layer.name: layer for layer in layers}
    by_layer: dict[str, list[ExpertRow]] = {}
    for layer, expert in sorted(
        places, key=lambda place: (list(loads).index(place[0]) if place[0] in loads else -1, *_natural(place))
    ):
        cells = [one for one in setting.cells if one.view == keyed_views.get((layer, expert))]
        clean, attacked = _loads(loads.get(layer), expert)
        by_layer.setdefault(layer, []).append(
            ExpertRow(
                layer=layer,
                expert=expert,
                clean=clean,
                attacked=attacked,
                alone=keyed_alone.get((layer, expert)),
                through=measure(worst_case([one.outcomes for one in cells])) if cells else None,
                through_attacks=names(cells) if cells else "",
            )
        )
    rows = [row for group in by_layer.values() for row in group]
    return ExpertTable(
        layers=tuple((layer, tuple(group)) for layer, group in by_layer.items()),
        loads_of=names([routed]) if routed is not None else "",
        missing=sum(row.alone is None for row in rows),
    )


def _routed(setting: Setting) -> Evidence | None:
    """The strongest result on the whole model that has kept its routing, else the first of any view."""
    routed = [one for one in setting.cells if one.stored.record.routing]
    whole = [one for one in routed if one.view == "whole"]
    return min(
        whole or routed, key=lambda one: (one.stored.record.accuracy, one.attack, one.stored.result_id), default=None
    )


def _alone(setting: Setting, parts: Sequence[Evidence]) -> dict[str, Alone]:
    """The parts of this checkpoint on these samples under this threat model, by what they are called."""
    found: dict[str, list[Evidence]] = {}
    model = setting.cells[0].stored.model.name
    for one in parts:
        stored = one.stored
        name, part = split_name(stored.model.name)
        if part is None or name != model or not eligible(stored):
            continue
        own = hashlib.sha256(f"{setting.checkpoint.sha256}/{part}".encode()).hexdigest()
        if stored.checkpoint.sha256 == own and group_key(stored.protocol) == group_key(setting.protocol):
            found.setdefault(part, []).append(one)
    return {part: _measured(cells) for part, cells in found.items()}


def _measured(cells: Sequence[Evidence]) -> Alone:
    record = newest(one.stored for one in cells).record
    return Alone(
        sa=from_accuracy(record.clean_accuracy, record.n),
        worst=measure(worst_case([one.outcomes for one in cells])),
        attacks=names(cells),
    )


def _place(part: str, one_layer: str) -> tuple[str, str]:
    """The layer and the expert that a part or a view is of; halves are of no layer."""
    match = EXPERT_VIEW.fullmatch(part)
    if match is None:
        assert part in PARTS
        return (ALL_LAYERS, f"{part} half")
    return (match["layer"] or one_layer, match["number"])


def _loads(layer: RoutingLayer | None, expert: str) -> tuple[float | None, float | None]:
    number = int(expert) if expert.isdecimal() else -1
    if layer is None or not 0 <= number < len(layer.load_clean):
        return None, None
    return layer.load_clean[number], layer.load_adv[number] if number < len(layer.load_adv) else None


def _natural(place: tuple[str, str]) -> tuple[str, int, str]:
    layer, expert = place
    return (layer, int(expert) if expert.isdecimal() else -1, expert)

"""What the figures of a model's page are drawn from: one checkpoint on one sample set under one threat model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moebench.metrics import Measure, from_accuracy, measure, worst_case
from moebench.report.evidence import WHOLE, Evidence, attack_key, eligible, group_key, newest
from moebench.report.text import digest
from moebench.schema import VIEWS, BoolArray, CheckpointRecord, ProtocolRecord

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Setting:
    """The results that one row of a leaderboard is made from; at least one.

    `leads` says that its board is the first of its data set, `label` tells it from the model's other settings.
    """

    protocol: ProtocolRecord
    checkpoint: CheckpointRecord
    cells: tuple[Evidence, ...]
    leads: bool
    anchor: str
    label: str

    @property
    def key(self) -> Key:
        """What tells two settings of a model apart."""
        return setting_key(self.protocol, self.checkpoint.sha256)

    @property
    def stands(self) -> BoolArray:
        """Which samples no attack breaks, (n,)."""
        return worst_case([one.outcomes for one in self.cells])

    @property
    def worst(self) -> Measure | None:
        """The share that no attack breaks; None where there are no samples."""
        return measure(self.stands)

    @property
    def clean(self) -> Measure | None:
        """The accuracy on unperturbed images."""
        last = newest(one.stored for one in self.cells)
        return from_accuracy(last.record.clean_accuracy, last.record.n)

    @property
    def views(self) -> tuple[str, ...]:
        """The attacked views, the whole model first."""
        return tuple(sorted({one.view for one in self.cells}, key=view_key))

    def strongest(self, view: str = WHOLE) -> Evidence | None:
        """The result on a view that leaves fewest samples standing; of equals the first by name."""
        own = [one for one in self.cells if one.view == view]
        return min(own, key=lambda one: (left(one), attack_key(one.attack), one.stored.result_id), default=None)


def setting_key(protocol: ProtocolRecord, sha256: str) -> Key:
    """Of which setting a result of one model is."""
    return (*group_key(protocol), sha256)


def view_key(view: str) -> tuple[int, str]:
    """Views in the order in which the method names them, single experts after them."""
    return (VIEWS.index(view) if view in VIEWS else len(VIEWS), view)


def left(one: Evidence) -> int:
    """How many samples a result leaves standing."""
    return int((~one.outcomes.broken).sum())


def settings(own: Sequence[Evidence], leaders: Sequence[Key]) -> tuple[Setting, ...]:
    """The settings of one model, those that lead first.

    Args:
        own: all its results; those that enter no table are left out.
        leaders: keys of the settings whose boards lead, in their order.
    """
    groups: dict[Key, list[Evidence]] = {}
    for one in filter(lambda one: eligible(one.stored), own):
        groups.setdefault(setting_key(one.stored.protocol, one.stored.checkpoint.sha256), []).append(one)
    several = len({key[-1] for key in groups}) > 1
    sizes = {(key[0], key[1], key[6]) for key in groups}
    found = []
    order = {key: place for place, key in enumerate(leaders)}
    for key in sorted(groups, key=lambda key: (order.get(key, len(order)), key)):
        last = newest(one.stored for one in groups[key])
        words = [last.protocol.dataset, str(last.protocol.threat)]
        words += [f"n = {last.protocol.n}"] if len(sizes) > 1 else []
        words += [f"weights {last.checkpoint.sha256[:8]}"] if several else []
        found.append(
            Setting(
                protocol=last.protocol,
                checkpoint=last.checkpoint,
                cells=tuple(sorted(groups[key], key=_order)),
                leads=key in order,
                anchor=digest(repr(key)),
                label=", ".join(words),
            )
        )
    return tuple(found)


def _order(one: Evidence) -> Key:
    cell = one.stored.cell
    return (view_key(one.view), attack_key(one.attack), one.warm, cell.seed, one.stored.result_id)

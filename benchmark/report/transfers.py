"""Transfer from the store: whose adversarial images fool whom, and which source does it best.

A result of the attack `transfer` belongs to its target and names its source in its parameters. Parts of models (single
experts, halves of dual models) are sources and targets like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np

from moebench.metrics import Measure, Paired, measure, paired, worst_case
from moebench.report.evidence import ReadableStore, group_key, newest, result_key
from moebench.report.text import digest, slug, without_part
from moebench.schema import BoolArray, Json, Outcomes, ProtocolRecord, StoredResult

TRANSFER = "transfer"
"""Name under which pairs of source and target are stored."""

ALPHA = 0.05
"""Over all pairs of a board (Bonferroni): how likely it is to name a surprise where there is none."""

Key = tuple[str, str]
"""Name and weights of a model or of a part of one."""


def origin(stored: StoredResult) -> Json | None:
    """What the images of a transfer result were made on and with; None for other attacks."""
    if stored.cell.attack != TRANSFER:
        return None
    for settings in stored.cell.parameters.values():
        if isinstance(settings, Mapping) and "source" in settings:
            return settings
    return None


def attack_title(stored: StoredResult) -> str:
    """An attack's name, for a transfer with its source: "transfer from rt-er (pgd-50)"."""
    source = origin(stored)
    if source is None:
        return stored.cell.attack
    return f"{TRANSFER} from {source['source']} ({source.get('attack', 'unknown attack')})"


def right_clean(outcomes: Outcomes) -> BoolArray:
    """Which samples the model gets right without an attack, (n,): a sample that falls changes its prediction."""
    right: BoolArray = ~outcomes.broken | (outcomes.adv_pred != outcomes.clean_pred)
    return right


@dataclass(frozen=True)
class Party:
    """A source or target. `right` says which clean samples it gets right, None where the store does not know."""

    name: str
    weights: str
    label: str
    right: BoolArray | None

    @property
    def key(self) -> Key:
        """What tells it from others."""
        return self.name, self.weights

    @property
    def kin(self) -> str:
        """The model that it is, or is a part of; what is of one kin shares weights."""
        return without_part(self.name)


@dataclass(frozen=True)
class Pair:
    """One source's images on one target.

    `accuracy` is the target's robust accuracy on them, of all samples; `success` the share of samples that both get
    right clean on which the target is wrong then, None where there is none or the source's predictions are unknown.
    """

    stored: StoredResult
    left: BoolArray
    accuracy: Measure
    success: Measure | None
    white_box: bool


@dataclass(frozen=True)
class Reach:
    """What a source's images cost other models: points of accuracy, the mean over `targets` of them.

    `beyond` is how many of them are more than the average source costs the same targets: targets differ in how easily
    they fall, and no source is judged on itself.
    """

    source: Party
    points: float
    beyond: float
    targets: int


@dataclass(frozen=True)
class Surprise:
    """A source whose images break more of a target than the target's own images do; `p` counts all comparisons."""

    source: Party
    target: Party
    foreign: Measure
    own: Measure
    test: Paired
    p: float


@dataclass(frozen=True)
class TransferBoard:
    """All pairs of one data set, sample set, threat model, source attack and seed; `pairs` by (source, target)."""

    protocol: ProtocolRecord
    anchor: str
    attack: str
    view: str
    seed: int
    sources: tuple[Party, ...]
    targets: tuple[Party, ...]
    pairs: Mapping[tuple[int, int], Pair]

    @cached_property
    def together(self) -> dict[int, Measure]:
        """Per target, the share of samples that the images of no source break."""
        found = {}
        for at in range(len(self.targets)):
            left = [pair.left for (_, target), pair in self.pairs.items() if target == at]
            share = measure(np.logical_and.reduce(left)) if left else None
            if share is not None:
                found[at] = share
        return found

    @cached_property
    def reaches(self) -> tuple[Reach, ...]:
        """The sources by what they cost other models beyond the average source, most first.

        A source that was judged on no other model is left out. Parts of a model and the model itself are no others,
        unless the board has nothing else.
        """
        strangers = {at for at in self.pairs if self._kin_of(at)}
        others = strangers or {at for at, pair in self.pairs.items() if not pair.white_box}
        by_target: dict[int, list[float]] = {}
        for at in sorted(others):
            by_target.setdefault(at[1], []).append(self._drop(at))
        average = {target: fmean(drops) for target, drops in by_target.items()}
        found = []
        for number, source in enumerate(self.sources):
            own = [at for at in sorted(others) if at[0] == number]
            if own:
                points = fmean(self._drop(at) for at in own)
                beyond = fmean(self._drop(at) - average[at[1]] for at in own)
                found.append(Reach(source, 100 * points, 100 * beyond, len(own)))
        return tuple(sorted(found, key=lambda reach: (-reach.beyond, reach.source.key)))

    @cached_property
    def white_box_points(self) -> float | None:
        """The mean cost of images to their own sources, in points; None where no source was judged on itself."""
        drops = [self._drop(at) for at, pair in sorted(self.pairs.items()) if pair.white_box]
        return 100 * sum(drops) / len(drops) if drops else None

    @cached_property
    def surprises(self) -> tuple[Surprise, ...]:
        """Where foreign images break significantly more than a target's own (exact McNemar, Bonferroni)."""
        own = {target: pair for (_, target), pair in self.pairs.items() if pair.white_box}
        compared = [(at, pair) for at, pair in sorted(self.pairs.items()) if not pair.white_box and at[1] in own]
        found = []
        for (source, target), pair in compared:
            mine = own[target]
            test = paired(mine.left, pair.left)
            p = min(1.0, test.p * len(compared))
            if test.only_second > test.only_first and p < ALPHA:
                parties = self.sources[source], self.targets[target]
                found.append(Surprise(*parties, pair.accuracy, mine.accuracy, test, p))
        return tuple(sorted(found, key=lambda one: (one.p, one.target.key, one.source.key)))

    def _kin_of(self, at: tuple[int, int]) -> bool:
        return self.sources[at[0]].kin != self.targets[at[1]].kin

    def _drop(self, at: tuple[int, int]) -> float:
        """The share of all samples that fall: SA minus RA."""
        right = self.targets[at[1]].right
        assert right is not None
        return float(np.mean(right & ~self.pairs[at].left))


def build(store: ReadableStore, counts: Callable[[StoredResult], bool] = lambda _: True) -> tuple[TransferBoard, ...]:
    """The boards that the transfer results of a store make, largest first; none where it holds no such result.

    Args:
        store: what to read.
        counts: which of its results count.
    """
    results = sorted(filter(counts, store.results(newest_only=True)), key=result_key)
    groups: dict[tuple[Any, ...], list[StoredResult]] = {}
    for stored in results:
        source = origin(stored)
        if source is not None:
            key = (group_key(stored.protocol), str(source.get("attack")), str(source.get("source_view")))
            groups.setdefault((*key, stored.cell.seed), []).append(stored)
    # Any result of a model on these samples says which of them it gets right.
    known: dict[tuple[Any, ...], int] = {}
    for stored in results:
        where = (group_key(stored.protocol), stored.model.name, stored.checkpoint.sha256)
        known.setdefault(where, stored.result_id)
    boards = [_board(store, key, groups[key], known) for key in sorted(groups)]
    return tuple(sorted(boards, key=lambda board: -len(board.pairs)))


def _board(
    store: ReadableStore, key: tuple[Any, ...], group: Sequence[StoredResult], known: Mapping[tuple[Any, ...], int]
) -> TransferBoard:
    where, attack, view, seed = key
    cells: dict[tuple[Key, Key], list[StoredResult]] = {}
    for stored in group:
        source = origin(stored)
        assert source is not None
        ends = (str(source["source"]), str(source.get("source_weights", ""))), _target_key(stored)
        cells.setdefault(ends, []).append(stored)

    def parties(keys: set[Key]) -> tuple[Party, ...]:
        names = [name for name, _ in keys]
        found = []
        # Whole models first, then parts; each with its kin.
        for name, weights in sorted(keys, key=lambda one: (without_part(one[0]) != one[0], one)):
            number = known.get((where, name, weights))
            right = None if number is None else right_clean(store.outcomes(number))
            label = f"{name} · {weights[:8]}" if names.count(name) > 1 else name
            found.append(Party(name, weights, label, right))
        return tuple(found)

    sources, targets = parties({ends[0] for ends in cells}), parties({ends[1] for ends in cells})
    rows = {party.key: number for number, party in enumerate(sources)}
    columns = {party.key: number for number, party in enumerate(targets)}
    pairs = {}
    for (source_key, target_key), same in cells.items():
        at = rows[source_key], columns[target_key]
        made = _pair(newest(same), store, sources[at[0]], targets[at[1]])
        if made is not None:
            pairs[at] = made
    protocol = newest(group).protocol
    anchor = f"{slug(protocol.dataset)}-{digest(repr(key))}"
    return TransferBoard(protocol, anchor, attack, view, seed, sources, targets, pairs)


def _pair(stored: StoredResult, store: ReadableStore, source: Party, target: Party) -> Pair | None:
    outcomes = store.outcomes(stored.result_id)
    left = worst_case([outcomes])
    accuracy = measure(left)
    if accuracy is None:
        return None
    success = None
    if source.right is not None and source.right.shape == left.shape:
        both = source.right & right_clean(outcomes)
        success = measure(~left[both])
    return Pair(stored, left, accuracy, success, source.key == target.key)


def _target_key(stored: StoredResult) -> Key:
    return stored.model.name, stored.checkpoint.sha256

"""Models held against each other on the same samples, attack by attack, by what the store has of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from moebench.errors import UsageError
from moebench.metrics import Measure, Paired, measure, paired, right_at_first, standing, worst_case
from moebench.report.evidence import (
    WHOLE,
    Evidence,
    ReadableStore,
    attack_key,
    cold_if_any,
    eligible,
    group_key,
    has_column,
    newest,
    protocol_facts,
)
from moebench.report.suggest import one_of
from moebench.schema import BoolArray, ProtocolRecord, StoredResult

CLEAN = "clean"
WORST = "RA-worst"
"""What is compared beside the attacks: the accuracy on clean images, and what stands after all stored attacks."""


@dataclass(frozen=True)
class Wanted:
    """What to compare: at least two models, and what the samples and the threat model must be; None leaves it open."""

    models: tuple[str, ...]
    attacks: tuple[str, ...] = ()
    view: str = WHOLE
    dataset: str | None = None
    norm: str | None = None
    eps: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Contest:
    """Two models under one attack; `test.only_first` samples are wrong for the first of them alone."""

    attack: str
    models: tuple[str, str]
    accuracies: tuple[Measure, Measure]
    test: Paired


@dataclass(frozen=True)
class Comparison:
    """All contests on one protocol, attack by attack; attacks saw `view`, but for those behind RA-worst."""

    protocol: ProtocolRecord
    view: str
    contests: tuple[Contest, ...]

    def to_json(self) -> dict[str, Any]:
        """The object of `moebench compare --json`."""
        return {
            **protocol_facts(self.protocol),
            "view": self.view,
            "contests": [
                {
                    "attack": one.attack,
                    "models": list(one.models),
                    "accuracies": [{"value": m.value, "ci": [m.low, m.high]} for m in one.accuracies],
                    "wrong_alone": [one.test.only_first, one.test.only_second],
                    "p": one.test.p,
                }
                for one in self.contests
            ],
        }


def compare(store: ReadableStore, wanted: Wanted) -> Comparison:
    """Holds every two of the models against each other.

    Of several protocols that all models were measured on, that with most attacks in common counts, then that with most
    samples; of several weights of one model those that were measured last. Published protocols, quick looks and other
    engines are left out, as on the leaderboards.

    Raises:
        UsageError: a model, an attack or a protocol is not in the store, or not for all of the models.
    """
    results = [one for one in store.results() if eligible(one)]
    names = [one_of("model", name, (one.model.name for one in results)) for name in wanted.models]
    if len(set(names)) < max(2, len(names)):
        raise UsageError(f"a comparison takes two different models or more, got {', '.join(wanted.models)}")
    groups: dict[tuple[Any, ...], dict[str, list[StoredResult]]] = {}
    for one in results:
        if one.model.name in names and _fits(one.protocol, wanted):
            groups.setdefault(group_key(one.protocol), {}).setdefault(one.model.name, []).append(one)
    shared = [by_model for by_model in groups.values() if len(by_model) == len(names)]
    if not shared:
        raise UsageError(f"nothing was measured on the same samples and threat model for all of {', '.join(names)}")
    by_model = max(shared, key=lambda found: (len(_common(found, wanted.view)), _protocol(found).n))
    cells = {name: _latest_weights(store, by_model[name]) for name in names}
    attacks = _attacks(cells, wanted)
    lines = {CLEAN: {name: right_at_first(found[0].outcomes) for name, found in cells.items()}}
    lines |= {attack: {name: _left(found, attack, wanted.view) for name, found in cells.items()} for attack in attacks}
    lines[WORST] = {name: worst_case([one.outcomes for one in found]) for name, found in cells.items()}
    pairs = list(combinations(names, 2))
    contests = tuple(_contest(line, pair, left) for line, left in lines.items() for pair in pairs)
    return Comparison(_protocol(by_model), wanted.view, contests)


def _fits(protocol: ProtocolRecord, wanted: Wanted) -> bool:
    threat = protocol.threat
    asked = ((wanted.dataset, protocol.dataset), (wanted.norm, threat.norm), (wanted.eps, threat.eps))
    return all(want in (None, have) for want, have in (*asked, (wanted.n, protocol.n)))


def _protocol(by_model: dict[str, list[StoredResult]]) -> ProtocolRecord:
    return next(iter(by_model.values()))[0].protocol


def _common(by_model: dict[str, list[StoredResult]], view: str) -> set[str]:
    """The attacks that all models have on a view."""
    return set.intersection(
        *({one.cell.attack for one in found if one.cell.view == view} for found in by_model.values())
    )


def _latest_weights(store: ReadableStore, results: Sequence[StoredResult]) -> list[Evidence]:
    weights = newest(results).checkpoint.sha256
    return [Evidence(one, store.outcomes(one.result_id)) for one in results if one.checkpoint.sha256 == weights]


def _attacks(cells: dict[str, list[Evidence]], wanted: Wanted) -> list[str]:
    """Those asked for, else those of the leaderboards that all models have.

    Raises:
        UsageError: an attack is missing.
    """
    have = {name: {one.attack for one in found if one.view == wanted.view} for name, found in cells.items()}
    for attack in wanted.attacks:
        lacking = [name for name, known in have.items() if attack not in known]
        if lacking:
            raise UsageError(
                f"there is no result of {attack} on the view {wanted.view} for {', '.join(lacking)}; "
                f"`moebench evaluate --model {lacking[0]} --attack '{attack}'` measures it"
            )
    return list(wanted.attacks) or sorted(filter(has_column, set.intersection(*have.values())), key=attack_key)


def _left(cells: Sequence[Evidence], attack: str, view: str) -> BoolArray:
    found = cold_if_any([one for one in cells if (one.attack, one.view) == (attack, view)])
    return standing(max(found, key=lambda one: (one.stored.finished_at, one.stored.result_id)).outcomes)


def _contest(line: str, pair: tuple[str, str], left: dict[str, BoolArray]) -> Contest:
    one, other = (measure(left[name]) for name in pair)
    assert one is not None and other is not None, "a protocol has samples"
    return Contest(line, pair, (one, other), paired(left[pair[0]], left[pair[1]]))

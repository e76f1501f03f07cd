"""Claim, published protocol and moebench's own numbers side by side, read from what is stored of one model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moebench.attack_names import AttackName, base_name
from moebench.metrics import Measure, measure, worst_case
from moebench.published import ProtocolCard, card_of, shared_settings, variants
from moebench.report.evidence import WHOLE, Evidence, cold_if_any, eligible
from moebench.schema import Claim, StoredRun

PUBLISHED = "published protocol"
EVERYTHING = "moebench: RA-worst, every stored attack"


@dataclass(frozen=True)
class Line:
    """One number: `measure` is None where there is none, and `text` then says what there is instead."""

    label: str
    measure: Measure | None = None
    text: str = ""


@dataclass(frozen=True)
class SideBySide:
    """A protocol on one model: what the paper claims, the stored variants, and what moebench's attacks leave.

    `name` is the protocol with the settings that all variants share, `attacks` those of the run.
    """

    card: ProtocolCard
    name: str
    attacks: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def published(self) -> Measure | None:
        """What the protocol gives as published; None where that is not stored."""
        return next((line.measure for line in self.lines if line.label == PUBLISHED), None)


def side_by_side(run: StoredRun, own: Sequence[Evidence], claims: Sequence[Claim]) -> list[SideBySide]:
    """A comparison for each protocol that a run shows.

    Args:
        run: the run.
        own: all results of the run's weights on the run's samples, of other runs too.
        claims: the published numbers, of all models.

    Raises:
        UsageError: a protocol has a setting that this version does not know.
    """
    shared: dict[str, list[str]] = {}
    for attack in (one.cell.attack for one in run.results if card_of(one.cell.attack) is not None):
        shared.setdefault(str(AttackName(base_name(attack), shared_settings(attack))), []).append(attack)
    seeds = {one.cell.seed for one in run.results}
    alike = [one for one in own if one.stored.cell.seed in seeds]
    worst = _left(EVERYTHING, [one for one in own if eligible(one.stored)])
    return [_compared(name, attacks, run.model.name, alike, worst, claims) for name, attacks in shared.items()]


def _compared(
    name: str, attacks: Sequence[str], model: str, own: Sequence[Evidence], worst: Line, claims: Sequence[Claim]
) -> SideBySide:
    card = card_of(name)
    assert card is not None
    stored = {one.attack: measure(~one.outcomes.broken) for one in own if card_of(one.attack) is not None}
    labels: dict[str, str] = {}
    for row in variants(card, shared_settings(name)):
        labels.setdefault(row.attack, row.label)
    lines = [Line(f"claimed (arXiv {card.arxiv}; other data)", text=claimed(card, model, claims))]
    lines += [Line(labels[attack], stored[attack]) for attack in labels if attack in stored]
    lines += [Line(attack, stored.get(attack)) for attack in attacks if attack not in labels]
    same = [one for one in own if eligible(one.stored) and (one.attack, one.view) == (card.counterpart, WHOLE)]
    lines += [_left(f"moebench: {card.counterpart}", cold_if_any(same)), worst]
    return SideBySide(card, name, tuple(attacks), tuple(lines))


def _left(label: str, cells: Sequence[Evidence]) -> Line:
    found = measure(worst_case([one.outcomes for one in cells])) if cells else None
    return Line(label, found, "" if found else "not run on these samples")


def claimed(card: ProtocolCard, model: str, claims: Iterable[Claim]) -> str:
    """A model's published numbers by data set, in percent as published.

    A number that the paper repeats stands first, with the span of the others; where none is repeated more than once,
    as in a table of variants, only the span can be told.
    """
    by_data: dict[str, list[float]] = {}
    for claim in claims:
        if card.covers(claim) and claim.registry_name == model.partition("[")[0]:
            by_data.setdefault(claim.dataset, []).append(claim.value)
    spans = []
    for dataset, values in by_data.items():
        (value, times), span = Counter(values).most_common(1)[0], f"{min(values):g}–{max(values):g}"
        if len(set(values)) == 1:
            spans.append(f"{value:g} ({dataset})")
        elif times > 2:
            spans.append(f"{value:g} ({dataset}, {span} over its variants)")
        else:
            spans.append(f"{span} ({dataset}, {len(values)} variants)")
    return ", ".join(spans) or "—"

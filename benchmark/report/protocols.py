"""Published protocols on a model's page: the claim, what the paper's own rule gives here, and what moebench gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moebench.metrics import Measure, measure, worst_case
from moebench.published import ProtocolCard, card_of
from moebench.report.claims import ClaimRange, claim_range, same_name
from moebench.report.evidence import WHOLE, Evidence, cold_if_any, eligible, group_key
from moebench.schema import Claim, StoredResult


@dataclass(frozen=True)
class ProtocolRow:
    """One protocol, under one choice of its switches, on one checkpoint and sample set.

    `measure` is the share of samples that the protocol's rule calls right, no robust accuracy. `counterpart` is that of
    moebench's attack of the same kind (`kind`), `worst` what all attacks on these samples leave; None where there are
    none. `words` say what the settings are; `number` is that of the command which made it.
    """

    stored: StoredResult
    arxiv: str
    rule: str
    departures: str
    words: str
    claims: tuple[ClaimRange, ...]
    measure: Measure | None
    kind: str
    counterpart: Measure | None
    worst: Measure | None
    number: int


def protocol_rows(own: Sequence[Evidence], claims: Sequence[Claim], commands: Sequence[str]) -> tuple[ProtocolRow, ...]:
    """The protocols among one model's results, in their order.

    Args:
        own: all results of the model.
        claims: the published numbers, of all models.
        commands: the commands of the model's page, in their order.
    """
    rows = []
    for one in own:
        card = card_of(one.attack)
        if card is not None:
            rows.append(_row(one, card, own, claims, commands))
    return tuple(rows)


def _row(
    one: Evidence, card: ProtocolCard, own: Sequence[Evidence], claims: Sequence[Claim], commands: Sequence[str]
) -> ProtocolRow:
    stored = one.stored
    where = (group_key(stored.protocol), stored.checkpoint.sha256)
    attacks = [
        other
        for other in own
        if eligible(other.stored) and (group_key(other.stored.protocol), other.stored.checkpoint.sha256) == where
    ]
    same = cold_if_any([other for other in attacks if (other.attack, other.view) == (card.counterpart, WHOLE)])
    covered = [claim for claim in claims if claim.registry_name == stored.model.name.partition("[")[0]]
    return ProtocolRow(
        stored=stored,
        arxiv=card.arxiv,
        rule=card.rule,
        departures=_departures(card, stored),
        words=_words(card, stored),
        claims=_ranges(card, covered, stored.protocol.dataset),
        measure=measure(~one.outcomes.broken),
        kind=card.counterpart,
        counterpart=_left(same),
        worst=_left(attacks),
        number=1 + commands.index(stored.command),
    )


def _left(cells: Sequence[Evidence]) -> Measure | None:
    return measure(worst_case([one.outcomes for one in cells])) if cells else None


def _ranges(card: ProtocolCard, claims: Sequence[Claim], dataset: str) -> tuple[ClaimRange, ...]:
    """The claims that were made with a protocol, by data set; those on `dataset` first."""
    found: dict[tuple[bool, str], list[Claim]] = {}
    for claim in filter(card.covers, claims):
        found.setdefault((not same_name(claim.dataset, dataset), claim.dataset), []).append(claim)
    return tuple(claim_range(found[key], card.claimed[0], same_dataset=not key[0]) for key in sorted(found))


def _taken_away(card: ProtocolCard, stored: StoredResult) -> list[str]:
    """The departures that the settings of a result take away."""
    settings = next((value for value in stored.cell.parameters.values() if isinstance(value, Mapping)), {})
    return [
        switch.label
        for switch in card.switches
        if all(settings.get(key) == value for key, value in switch.corrected.items())
    ]


def _departures(card: ProtocolCard, stored: StoredResult) -> str:
    left = len(card.switches) - len(_taken_away(card, stored))
    return f"{left} of {len(card.switches)} departures"


def _words(card: ProtocolCard, stored: StoredResult) -> str:
    """What is as published in a result and what is not, in one sentence."""
    away = _taken_away(card, stored)
    left = [switch for switch in card.switches if switch.label not in away]
    there = (
        "; ".join(f"{switch.label} ({switch.does}: {switch.changes})" for switch in left) or "none of its departures"
    )
    gone = f". Taken away: {', '.join(away)}" if away else ""
    return f"{stored.cell.attack}: {card.rule}. As published: {there}{gone}."

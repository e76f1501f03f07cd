"""Published numbers beside ours: which claim may be compared with which result."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moebench.metrics import Measure, from_accuracy, measure, worst_case
from moebench.report.evidence import WHOLE, Evidence, cold_if_any, eligible, group_key, names
from moebench.schema import Claim, ThreatModel

HEADLINE_ATTACKS = {"PGD": "PGD", "AutoAttack (as named by paper)": "AutoAttack"}
VIEWS = {"RA": WHOLE, "RA-E": "experts", "RA-R": "router", "RA-SMoE": "standard", "RA-RMoE": "robust"}


@dataclass(frozen=True)
class ClaimRange:
    """The published values of one metric on one data set under one kind of attack, in percent."""

    dataset: str
    attack: str
    low: float
    high: float
    same_dataset: bool
    flagged: bool


@dataclass(frozen=True)
class ClaimRow:
    """A published number beside ours; `difference` is ours minus theirs, in points.

    `why` says what ours is made from, or why there is none.
    """

    claim: Claim
    measured: Measure | None
    difference: float | None
    why: str


def claim_key(claim: Claim) -> tuple[Any, ...]:
    """Orders claims by what they are about."""
    where = (claim.registry_name, claim.dataset, claim.arxiv, claim.model, claim.architecture)
    return (*where, claim.metric, claim.attack, claim.attack_params, claim.source, claim.value, claim.flag or "")


def of_main_configuration(claims: Sequence[ClaimRow]) -> tuple[ClaimRow, ...]:
    """Accuracies of the configuration that a paper reports most on a data set; ablations and prose are left out."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    numbers = [row for row in claims if row.claim.metric in ("SA", *VIEWS)]
    for row in numbers:
        counts.setdefault((row.claim.arxiv, row.claim.dataset), Counter())[row.claim.architecture] += 1
    main = {key: min(found, key=lambda name: (-found[name], name)) for key, found in counts.items()}
    return tuple(row for row in numbers if main[row.claim.arxiv, row.claim.dataset] == row.claim.architecture)


def same_name(one: str, other: str) -> bool:
    """Whether two data set names differ in case and punctuation only ("CIFAR-10", "cifar10")."""
    return re.sub(r"[\W_]", "", one).lower() == re.sub(r"[\W_]", "", other).lower()


def is_headline(claim: Claim) -> bool:
    """Whether a claim is a robust accuracy of the kind that papers lead with."""
    return claim.metric == "RA" and claim.attack in HEADLINE_ATTACKS


def headline_ranges(claims: Sequence[Claim], dataset: str) -> tuple[ClaimRange, ...]:
    """Published robust accuracies by data set and attack; those on `dataset` first."""
    found: dict[tuple[bool, str, str], list[Claim]] = {}
    for claim in filter(is_headline, claims):
        key = (not same_name(claim.dataset, dataset), claim.dataset, HEADLINE_ATTACKS[claim.attack])
        found.setdefault(key, []).append(claim)
    return tuple(claim_range(found[key], key[2], same_dataset=not key[0]) for key in sorted(found))


def claim_range(claims: Sequence[Claim], attack: str, same_dataset: bool) -> ClaimRange:
    """The span of some claims (at least one) on one data set."""
    values = [claim.value for claim in claims]
    flagged = any(claim.flag for claim in claims)
    return ClaimRange(claims[0].dataset, attack, min(values), max(values), same_dataset, flagged)


def compare(claim: Claim, cells: Sequence[Evidence]) -> ClaimRow:
    """A claim beside the result that asks the same question, of the model that the claim is about.

    Same question means the same data set and, for robust accuracies, the same norm, radius, view and attack. Where
    there are several, the one with the most samples counts, then the newest.
    """
    here = [one for one in cells if eligible(one.stored) and same_name(one.stored.protocol.dataset, claim.dataset)]
    if not here:
        return ClaimRow(claim, None, None, f"not measured on {claim.dataset}")
    if claim.metric != "SA":
        view, attack = VIEWS.get(claim.metric), our_attack(claim)
        if view is None or attack is None:
            return ClaimRow(claim, None, None, "no attack or metric of moebench corresponds to it")
        views = (WHOLE, "smooth") if attack.startswith("smooth") else (view,)
        here = [one for one in here if one.attack == attack and one.view in views]
        here = [one for one in here if same_threat(claim.attack_params, one.stored.protocol.threat)]
    found = _best(here, clean=claim.metric == "SA")
    if found is None:
        return ClaimRow(claim, None, None, "not measured with this attack and threat model")
    ours, why = found
    return ClaimRow(claim, ours, 100 * ours.value - claim.value, why)


def _best(cells: Sequence[Evidence], clean: bool) -> tuple[Measure, str] | None:
    if not cells:
        return None
    order = sorted(cells, key=lambda one: (one.stored.protocol.n, one.stored.finished_at, one.stored.result_id))
    best = order[-1].stored
    key = (group_key(best.protocol), best.checkpoint.sha256)
    same = [one for one in cells if (group_key(one.stored.protocol), one.stored.checkpoint.sha256) == key]
    if clean:
        found = from_accuracy(best.record.clean_accuracy, best.record.n)
        return (found, f"{found.k} of {found.n} samples") if found else None
    same = cold_if_any(same)
    left = measure(worst_case([one.outcomes for one in same]))
    return (left, f"{names(same)}, {best.protocol.threat}; {left.k} of {left.n} samples") if left else None


def our_attack(claim: Claim) -> str | None:
    """The attack of ours that a published number asks for."""
    if claim.attack.startswith("AutoAttack"):
        return "autoattack"
    if claim.attack == "smooth PGD":
        return "smooth-pgd-50"
    if claim.attack == "AutoPGD":
        return "apgd-ce"
    if claim.attack == "PGD":
        steps = re.search(r"(\d+) (?:steps|iterations)", claim.attack_params)
        return f"pgd-{steps[1]}" if steps else None
    return claim.attack.lower() if re.fullmatch(r"FGSM|PGD-\d+", claim.attack) else None


def same_threat(attack_params: str, threat: ThreatModel) -> bool:
    """Whether a claim's description names the norm and the radius of a threat model."""
    found = re.search(r"(Linf|L2)\b.*?\beps ?= ?(\d+(?:\.\d+)?)(?:/(\d+))?", attack_params)
    if found is None or found[1] != threat.norm or (found[3] and not int(found[3])):
        return False
    return abs(float(found[2]) / float(found[3] or 1) - threat.eps) < 1e-6

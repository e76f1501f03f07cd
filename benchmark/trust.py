"""Signs of gradient masking in stored outcomes: pure functions, nothing is run again.

The signs are those of Athalye, Carlini and Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018
(arXiv 1802.00420), section 3.1. Each is a paired comparison of two attacks on the same samples; docs/trust.md has the
tests, their false-alarm rates and what they cannot see.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.special import betainc, betaincinv  # type: ignore[import-untyped]

from moebench.flags import ADAPTIVE_WINS, BLACK_BOX_WINS, FEWER_STEPS_WIN, SMALLER_EPS_WINS
from moebench.metrics import CONFIDENCE, wilson, worst_case
from moebench.schema import BoolArray, Flag, Outcomes, StoredResult, format_eps, is_protocol

ALPHA = 0.01
"""Largest false-alarm rate of a flag, over all the comparisons that can raise it (Bonferroni)."""

TOLERANCE = 0.01
"""Share of what a strong attack leaves standing that a second one may break on an honest model.

On the four dense models shipped Square breaks 6 of the 1,372 samples that AutoAttack's gradient stages leave; 1 % is
the upper end of the 95 % interval of that share.
"""

WEAK_TOLERANCE = 0.20
"""The same where only the cross-entropy was climbed: AutoAttack breaks 8 to 15 % of what pgd-50 leaves of them."""

ITERATED = 10
"""Steps from which an attack counts as one that climbs."""

WHOLE = "whole"
SOFT_VIEWS = ("smooth", "straight-through")
GRADIENT_STAGES = frozenset({"fgsm", "pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t"})
MARGIN_STAGES = frozenset({"apgd-dlr", "apgd-t"})
"""Stages whose loss does not saturate: with one of them a gradient attack counts as strong."""
BLACK_BOX_STAGES = frozenset({"square"})
ADAPTIVE_ATTACKS = ("moe-adaptive", "region", "route-flip", "smooth-")
"""How the names of attacks through routing begin."""


@dataclass(frozen=True)
class Cell:
    """A finished cell with its outcomes per sample."""

    stored: StoredResult
    outcomes: Outcomes

    @property
    def name(self) -> str:
        """The attack, with its view unless that is the whole model."""
        spec = self.stored.cell
        return spec.attack if spec.view == WHOLE else f"{spec.attack} on {spec.view}"

    @property
    def stages(self) -> frozenset[str]:
        """The stages of the attack."""
        return frozenset(self.stored.cell.parameters)

    @property
    def steps(self) -> int | None:
        """Steps of FGSM or PGD, None for other attacks."""
        parameters = self.stored.cell.parameters
        if len(parameters) != 1 or not self.stages <= {"fgsm", "pgd"}:
            return None
        (settings,) = parameters.values()
        return int(settings["steps"])

    @property
    def climbs(self) -> bool:
        """Whether gradients are followed for more than a few steps."""
        return bool(self.stages & GRADIENT_STAGES) and (self.steps is None or self.steps >= ITERATED)

    @property
    def eps(self) -> float:
        """The radius."""
        return self.stored.protocol.threat.eps


@dataclass(frozen=True)
class Duel:
    """A comparison of two attacks on n samples, of which the one that should be stronger leaves `left` standing.

    `won` are samples that only the other one breaks, `lost` those that only the expected one breaks; None where the
    other one saw nothing but what was left. The null hypothesis is that the other one is no better, or breaks no more
    than `tolerance` of what was left.
    """

    words: str
    n: int
    left: int
    won: int
    lost: int | None
    tolerance: float = 0.0

    @property
    def p(self) -> float:
        """The larger p-value of McNemar's exact test, one-sided, and of the exact binomial test of the tolerance."""
        beyond = at_least(self.won, self.left, self.tolerance)
        return beyond if self.lost is None else max(mcnemar(self.won, self.lost), beyond)

    def evidence(self) -> str:
        """The counts, their interval, and the p-value."""
        if self.lost is None:
            low, high = wilson(self.won, self.left)
            return (
                f"{self.words}: {self.won / self.left:.1%}, 95 % interval [{100 * low:.1f}, {100 * high:.1f}]; "
                f"{self.tolerance:.0%} could be chance, p = {self.p:.1g}"
            )
        low, high = paired_interval(self.won, self.lost, self.n)
        lead = (self.won - self.lost) / self.n
        return (
            f"{self.words}; lead {100 * lead:.1f} points of {self.n} samples, 95 % paired interval "
            f"[{100 * low:.1f}, {100 * high:.1f}], p = {self.p:.1g}"
        )


def mcnemar(won: int, lost: int) -> float:
    """One-sided exact p-value that an attack is better than another, from the samples that only one of them breaks."""
    return at_least(won, won + lost, 0.5)


def at_least(k: int, n: int, share: float) -> float:
    """Exact probability that k or more of n samples fall where each falls with probability `share`."""
    return float(betainc(k, n - k + 1, share)) if k > 0 else 1.0


def paired_interval(won: int, lost: int, n: int) -> tuple[float, float]:
    """The 95 % interval of the lead (won - lost) / n, from the exact (Clopper-Pearson) one of won of won + lost."""
    pairs = won + lost
    if pairs == 0:
        return 0.0, 0.0
    outside = (1 - CONFIDENCE) / 2
    low = float(betaincinv(won, lost + 1, outside)) if won else 0.0
    high = float(betaincinv(won + 1, lost, 1 - outside)) if lost else 1.0
    return (2 * low - 1) * pairs / n, (2 * high - 1) * pairs / n


def passive_flags(
    results: Iterable[tuple[StoredResult, Outcomes]], elsewhere: Iterable[tuple[StoredResult, Outcomes]] = ()
) -> list[Flag]:
    """What the stored outcomes of one model's weights on one protocol say against its numbers.

    Args:
        results: finished cells of the same weights, samples and threat model.
        elsewhere: cells of the same weights, samples and norm at other radii.
    Returns: at most one flag per code, with the clearest of its comparisons as evidence.
    """
    cells = [Cell(*one) for one in results if _standard(one[0])]
    others = [Cell(*one) for one in elsewhere if _standard(one[0])]
    found = []
    for code, duels in (
        (BLACK_BOX_WINS, [*_inside_attacks(cells), *_black_box_attacks(cells)]),
        (FEWER_STEPS_WIN, list(_fewer_steps(cells))),
        (SMALLER_EPS_WINS, list(_smaller_eps(cells, others))),
        (ADAPTIVE_WINS, list(_adaptive(cells))),
    ):
        best = min(duels, key=lambda duel: (duel.p, -duel.won, duel.words), default=None)
        if best is not None and best.p * len(duels) <= ALPHA:
            found.append(Flag(code, best.evidence()))
    return found


def _standard(stored: StoredResult) -> bool:
    """Whether an attack is one that the tests below were made for.

    Published protocols are no attacks, and one with settings of its own may be as weak as its user likes.
    """
    return not is_protocol(stored.cell.attack) and "[" not in stored.cell.attack


def _inside_attacks(cells: Sequence[Cell]) -> Iterator[Duel]:
    """Square at the end of an attack, on the samples that the attack's gradient stages left standing."""
    for cell in cells:
        stages = cell.stored.record.stages
        before = cell.stages - BLACK_BOX_STAGES
        if cell.stored.cell.view != WHOLE or not before or not cell.climbs:
            continue
        for name in sorted(cell.stages & BLACK_BOX_STAGES & stages.keys()):
            left, won = int(stages[name]["attacked"]), int(stages[name]["broken"])
            words = f"in {cell.name}, {name} breaks {won} of the {left} samples that gradient stages leave standing"
            yield Duel(words, cell.outcomes.index.size, left, won, None, _tolerance(before))


def _black_box_attacks(cells: Sequence[Cell]) -> Iterator[Duel]:
    """Attacks without gradients against all attacks by gradient together."""
    for cell in cells:
        if not cell.stages or not cell.stages <= BLACK_BOX_STAGES or cell.stored.cell.view != WHOLE:
            continue
        white = [one for one in _plain(cells, cell) if one.climbs and one.stages <= GRADIENT_STAGES]
        yield from _against(cell, white)


def _fewer_steps(cells: Sequence[Cell]) -> Iterator[Duel]:
    """FGSM and shorter PGD against longer PGD."""
    climbers = [cell for cell in cells if cell.steps is not None and cell.stored.cell.view == WHOLE]
    for one, other in combinations(climbers, 2):
        fewer, more = sorted((one, other), key=lambda cell: cell.steps or 0)
        if fewer.steps != more.steps and (more.steps or 0) >= ITERATED and _alike(fewer, more):
            yield _duel(fewer, fewer.name, [more], 0.0)


def _smaller_eps(cells: Sequence[Cell], others: Sequence[Cell]) -> Iterator[Duel]:
    """The same attack at a smaller and at a larger radius."""
    for cell in cells:
        for other in others:
            small, large = sorted((cell, other), key=lambda one: one.eps)
            spec, its = cell.stored.cell, other.stored.cell
            same = (spec.attack, spec.parameters, spec.seed) == (its.attack, its.parameters, its.seed)
            if same and small.eps < large.eps and spec.view == its.view == WHOLE and _alike(cell, other):
                yield _duel(small, f"{small.name} at eps {format_eps(small.eps)}", [large], 0.0, _at_eps(large))


def _adaptive(cells: Sequence[Cell]) -> Iterator[Duel]:
    """Attacks through routing against the same attack without it, and against all plain ones together."""
    for cell in cells:
        spec = cell.stored.cell
        through = spec.view in SOFT_VIEWS or (spec.view == WHOLE and spec.attack.startswith(ADAPTIVE_ATTACKS))
        if not through:
            continue
        plain = [one for one in _plain(cells, cell) if one.climbs]
        for twin in plain:
            if twin.stored.cell.parameters == spec.parameters:
                yield _duel(cell, cell.name, [twin], TOLERANCE)
        if spec.view == WHOLE:
            yield from _against(cell, plain)


def _plain(cells: Sequence[Cell], to: Cell) -> list[Cell]:
    """Attacks on the whole model that know nothing of routing, on the samples of `to` by the same engine."""
    known = GRADIENT_STAGES | BLACK_BOX_STAGES
    return [
        cell
        for cell in cells
        if cell.stored.cell.view == WHOLE and cell.stages and cell.stages <= known and _alike(cell, to)
    ]


def _against(cell: Cell, expected: Sequence[Cell]) -> Iterator[Duel]:
    """An attack against several together; none where there are none."""
    if expected:
        yield _duel(cell, cell.name, expected, _tolerance(frozenset().union(*(one.stages for one in expected))))


def _duel(cell: Cell, name: str, expected: Sequence[Cell], tolerance: float, rivals: str | None = None) -> Duel:
    broken: BoolArray = cell.outcomes.broken
    stands = worst_case([one.outcomes for one in expected])
    won, lost = int(np.sum(broken & stands)), int(np.sum(~broken & ~stands))
    rivals = rivals or " and ".join(sorted(one.name for one in expected))
    leaves = "leaves" if len(expected) == 1 else "together leave"
    left = int(stands.sum())
    words = f"{name} breaks {won} of the {left} samples that {rivals} {leaves} standing, and misses {lost} others"
    return Duel(words, broken.size, left, won, lost, tolerance)


def _at_eps(cell: Cell) -> str:
    return f"eps {format_eps(cell.eps)}"


def _tolerance(stages: frozenset[str]) -> float:
    return TOLERANCE if stages & MARGIN_STAGES else WEAK_TOLERANCE


def _alike(one: Cell, other: Cell) -> bool:
    """Whether two cells were made by the same engine on the same samples."""
    same_engine = one.stored.cell.engine == other.stored.cell.engine
    return same_engine and np.array_equal(one.outcomes.index, other.outcomes.index)

"""What AutoAttack misses: how far an attack that knows of the routing gets beyond it, on the same samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from moebench.metrics import Measure, Paired, measure, paired, worst_case
from moebench.report.evidence import WHOLE, Evidence, is_routed

STANDARD, ADAPTIVE = "autoattack", "moe-adaptive"


@dataclass(frozen=True)
class Missed:
    """One checkpoint under both attacks; a number that has not been measured is None, and `why` says so.

    `paired.only_first` counts samples that AutoAttack alone breaks, `paired.only_second` those that it misses; `found`
    says which stages of the adaptive attack broke the latter, most first.
    """

    label: str
    page: str
    standard: Measure | None
    adaptive: Measure | None
    paired: Paired | None
    found: tuple[tuple[str, int], ...]
    why: str

    @property
    def points(self) -> float | None:
        """RA under the adaptive attack minus RA under AutoAttack, in points."""
        if self.standard is None or self.adaptive is None:
            return None
        return 100 * (self.adaptive.value - self.standard.value)


def missed(label: str, page: str, cells: Sequence[Evidence]) -> Missed | None:
    """Both attacks on the whole model, from one checkpoint's results on one sample set.

    None for a dense model, and where neither has been run.

    Args:
        label: what the checkpoint is called in tables.
        page: its model's page.
        cells: all its results on these samples.
    """
    whole = [one for one in cells if one.view == WHOLE]
    standard, adaptive = ([one for one in whole if one.attack == name] for name in (STANDARD, ADAPTIVE))
    if not adaptive and not (standard and is_routed(cells)):
        return None
    measures = [
        measure(worst_case([one.outcomes for one in group])) if group else None for group in (standard, adaptive)
    ]
    absent = [name for name, group in ((STANDARD, standard), (ADAPTIVE, adaptive)) if not group]
    if absent:
        return Missed(label, page, measures[0], measures[1], None, (), f"{' and '.join(absent)} has not been run")
    before = worst_case([one.outcomes for one in standard])
    # Also refuses results on different samples.
    worst_case([one.outcomes for one in (*standard, *adaptive)])
    after = worst_case([one.outcomes for one in adaptive])
    found: Counter[str] = Counter()
    left = before.copy()
    # A sample counts once: under several results (other seeds, an earlier plan) for the newest that breaks it.
    for one in sorted(adaptive, key=lambda one: one.stored.result_id, reverse=True):
        found.update(stage for stage, was_left in zip(one.outcomes.stage, left, strict=True) if stage and was_left)
        left &= ~one.outcomes.broken
    ranked = tuple(sorted(found.items(), key=lambda item: (-item[1], item[0])))
    why = f"{ADAPTIVE} against {STANDARD} on the same {before.size} samples"
    return Missed(label, page, measures[0], measures[1], paired(before, after), ranked, why)

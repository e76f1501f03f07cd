"""The results of one model as rows of its page: what each left, what it cost, which stage broke what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moebench.metrics import Measure, first_breaker, measure, worst_case
from moebench.report.evidence import Evidence, eligible
from moebench.report.text import plain
from moebench.schema import StoredResult


@dataclass(frozen=True)
class ResultRow:
    """A finished cell on a model's page; `number` is that of the command which made it.

    `skipped` names the stages that have nothing to do on this model, with the reasons.
    """

    stored: StoredResult
    measure: Measure | None
    number: int
    listed: bool
    stages: tuple[tuple[str, int], ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def each(self, total: float) -> float | None:
        """A cost per sample; None where there are no samples."""
        return total / self.stored.record.n if self.stored.record.n else None


def result_row(one: Evidence, commands: Sequence[str]) -> ResultRow:
    """One result; `commands` are those of the page, in their order."""
    broke = first_breaker(one.outcomes)
    order = dict.fromkeys([*one.stored.record.stages, *sorted(broke)])
    return ResultRow(
        stored=one.stored,
        measure=measure(worst_case([one.outcomes])),
        number=1 + commands.index(one.stored.command),
        listed=eligible(one.stored),
        stages=tuple((stage, broke.get(stage, 0)) for stage in order),
        skipped=tuple(
            (stage, plain(settings["skipped"]))
            for stage, settings in sorted(one.stored.cell.parameters.items())
            if isinstance(settings, Mapping) and "skipped" in settings
        ),
    )

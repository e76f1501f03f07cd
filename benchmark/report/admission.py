"""What a checkpoint must have gone through before it takes a rank."""

from __future__ import annotations

from collections.abc import Sequence

from moebench.report.evidence import WHOLE, Evidence, is_routed, newest
from moebench.report.external import external_words
from moebench.report.missed import ADAPTIVE, STANDARD


def required(cells: Sequence[Evidence]) -> tuple[str, ...]:
    """The attacks on the whole model that a rank takes: a router hides from AutoAttack what moe-adaptive finds.

    Args:
        cells: all results of one checkpoint on one sample set.
    """
    return (STANDARD, ADAPTIVE) if is_routed(cells) else (STANDARD,)


def unranked_because(cells: Sequence[Evidence]) -> str | None:
    """Why a checkpoint takes no rank, in words; None where it takes one."""
    foreign = external_words(newest(one.stored for one in cells))
    run = {one.attack for one in cells if one.view == WHOLE}
    lacking = [attack for attack in required(cells) if attack not in run]
    if foreign is not None or not lacking:
        return foreign
    return f"{' and '.join(lacking)} {'has' if len(lacking) == 1 else 'have'} not been run on the whole model"

"""Ranks that admit ties: a model stands behind another only where a paired test on the same samples says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moebench.metrics import p_values
from moebench.schema import BoolArray

LEVEL = 0.05
"""A paired difference with a p of at most this sets two models apart.

No correction for many comparisons is made: each pair is judged by itself, so that whether one model is ahead of another
depends on the two alone and not on who else is listed (Holm's correction over all pairs would move ranks whenever a
model is added). The price, which the page states: of the pairs that do not differ, up to one in twenty is set apart.
"""


class RankRange(NamedTuple):
    """The ranks that the tests leave open, 1 <= `best` <= `worst` <= number of models.

    `best`, which tables print as the rank, is one more than the number of models that are significantly better;
    `worst` counts all but those that are significantly worse. "Not apart" is not transitive (a may tie with b and b
    with c while a is ahead of c), so ranks are counted and not grouped: every model is held against every other.
    """

    best: int
    worst: int


def rank_ranges(standing: Sequence[BoolArray]) -> list[RankRange]:
    """The rank of each model among all of them.

    Args:
        standing: per model, which samples no attack breaks, (n,); all on the same samples in the same order.

    Raises:
        ValueError: the arrays have different lengths.
    """
    if not standing:
        return []
    if len({one.shape for one in standing}) > 1:
        raise ValueError(f"ranks need the same samples for all, got {sorted({one.size for one in standing})}")
    only = only_one_stands(np.stack(standing))
    better = (p_values(only, only.T) <= LEVEL) & (only > only.T)
    behind, ahead = better.sum(axis=0), better.sum(axis=1)
    return [RankRange(1 + int(lost), len(standing) - int(won)) for lost, won in zip(behind, ahead, strict=True)]


def only_one_stands(standing: BoolArray) -> NDArray[np.int64]:
    """How many samples row i survives and row j does not, (m, m), from verdicts (m, n)."""
    # float32 products are exact up to 2**24 samples, and a matrix product beats comparing the pairs one by one.
    stands = standing.astype(np.float32)
    found: NDArray[np.int64] = np.rint(stands @ (1 - stands).T).astype(np.int64)
    return found

"""Shares with their intervals, the worst case over attacks, and paired tests: pure functions over stored outcomes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, ndtri  # type: ignore[import-untyped]

from moebench.schema import BoolArray, Outcomes

CONFIDENCE = 0.95


@lru_cache(maxsize=4096)
def wilson(k: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of the share k/n.

    Returns: (low, high), both in [0, 1], with low <= k/n <= high.

    Raises:
        ValueError: n is not positive, or k is not in [0, n].
    """
    if n <= 0 or not 0 <= k <= n:
        raise ValueError(f"an interval needs 0 <= k <= n and n > 0, got k={k}, n={n}")
    z2 = float(ndtri((1 + CONFIDENCE) / 2)) ** 2
    center, reach = (k + z2 / 2) / (n + z2), math.sqrt(z2 * (k * (n - k) / n + z2 / 4)) / (n + z2)
    low, high = 0.0 if k == 0 else center - reach, 1.0 if k == n else center + reach
    return max(0.0, min(low, k / n)), min(1.0, max(high, k / n))


def share(k: int, n: int) -> float | None:
    """k/n, or None where there is nothing to count."""
    return k / n if n > 0 else None


@dataclass(frozen=True)
class Measure:
    """A share of `n` > 0 samples, of which `k` count; with its 95 % Wilson interval."""

    k: int
    n: int

    def __post_init__(self) -> None:
        wilson(self.k, self.n)

    @property
    def value(self) -> float:
        """The fraction k/n."""
        return self.k / self.n

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return wilson(self.k, self.n)[0]

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return wilson(self.k, self.n)[1]


def measure(hits: BoolArray) -> Measure | None:
    """The share of true entries of a (n,) array; None for an empty one."""
    return Measure(int(np.count_nonzero(hits)), int(hits.size)) if hits.size else None


def from_accuracy(accuracy: float, n: int) -> Measure | None:
    """The measure behind a stored fraction of n samples; None where n is 0 or the fraction is undefined."""
    if n <= 0 or not np.isfinite(accuracy):
        return None
    return Measure(min(n, max(0, round(accuracy * n))), n)


def standing(outcomes: Outcomes) -> BoolArray:
    """Which samples one attack leaves right, (n,), in the order of `outcomes.index`."""
    return np.logical_not(outcomes.broken)


def right_at_first(outcomes: Outcomes) -> BoolArray:
    """Which samples are right before the attack, (n,), in the order of `outcomes.index`: no stage broke the others.

    Not for published protocols, which score all samples themselves.
    """
    decided = np.array([bool(stage) for stage in outcomes.stage], dtype=np.bool_)
    right: BoolArray = ~outcomes.broken | decided
    return right


def worst_case(outcomes: Sequence[Outcomes]) -> BoolArray:
    """Which samples no attack breaks, (n,), in the order of the shared index.

    Args:
        outcomes: cells of one checkpoint on one protocol; each must cover the same samples.

    Raises:
        ValueError: there is no cell, or the cells cover different samples.
    """
    if not outcomes:
        raise ValueError("the worst case over attacks needs at least one attack")
    first = outcomes[0]
    if any(not np.array_equal(first.index, other.index) for other in outcomes[1:]):
        raise ValueError("the worst case over attacks needs attacks on the same samples; the indices differ")
    left: BoolArray = np.logical_and.reduce([standing(one) for one in outcomes])
    return left


def first_breaker(outcomes: Outcomes) -> dict[str, int]:
    """How many samples each stage of an attack broke; stages that broke none are not listed."""
    counts: dict[str, int] = {}
    for stage in outcomes.stage:
        if stage:
            counts[stage] = counts.get(stage, 0) + 1
    return counts


@dataclass(frozen=True)
class Paired:
    """How many samples only one of two attacks breaks; the samples on which they agree say nothing about the two.

    `p` is the exact McNemar test's, two-sided: how likely so uneven a split of the discordant samples is if each were
    as likely to fall to the one as to the other; 1 where there is none.
    """

    only_first: int
    only_second: int

    @property
    def discordant(self) -> int:
        """Samples that one of the two breaks and the other does not."""
        return self.only_first + self.only_second

    @property
    def p(self) -> float:
        """The exact two-sided p-value (McNemar, 1947, by the binomial distribution)."""
        return float(p_values(np.int64(self.only_first), np.int64(self.only_second)))


def p_values(
    only_first: NDArray[np.int64] | np.int64, only_second: NDArray[np.int64] | np.int64
) -> NDArray[np.float64] | np.float64:
    """Exact two-sided McNemar tests, element by element, from the samples that only one of two attacks breaks."""
    low, total = np.minimum(only_first, only_second), only_first + only_second
    tail = bdtr(low.astype(np.float64), total, 0.5)
    found: NDArray[np.float64] = np.where(total == 0, 1.0, np.minimum(1.0, 2 * tail))
    return found


def paired(first: BoolArray, second: BoolArray) -> Paired:
    """Compares what two attacks leave standing.

    Args:
        first: which samples the first attack leaves right, (n,).
        second: the same of the second attack, on the same samples in the same order.

    Raises:
        ValueError: the arrays have different lengths.
    """
    if first.shape != second.shape:
        raise ValueError(f"a paired test needs the same samples twice, got {first.size} and {second.size}")
    return Paired(int(np.count_nonzero(second & ~first)), int(np.count_nonzero(first & ~second)))

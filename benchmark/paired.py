"""Two attacks on the same samples, compared sample by sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest  # type: ignore[import-untyped]

from moebench.schema import BoolArray


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
        return float(binomtest(self.only_first, self.discordant, 0.5).pvalue) if self.discordant else 1.0


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

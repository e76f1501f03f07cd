"""Shares, intervals and worst cases."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from fake_store import first_broken, outcomes
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binomtest  # type: ignore[import-untyped]

from moebench.metrics import (
    Measure,
    first_breaker,
    from_accuracy,
    measure,
    right_at_first,
    share,
    standing,
    wilson,
    worst_case,
)
from moebench.schema import BoolArray

counts = st.integers(1, 100_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
tables = st.tuples(st.integers(1, 5), st.integers(1, 40)).flatmap(lambda shape: arrays(np.bool_, shape))


def test_wilson_gives_the_textbook_interval() -> None:
    low, high = wilson(15, 20)
    assert low == pytest.approx(0.5313, abs=5e-5)
    assert high == pytest.approx(0.8881, abs=5e-5)


@given(counts)
def test_wilson_is_the_interval_of_scipy(pair: tuple[int, int]) -> None:
    wanted = binomtest(*pair).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(*pair) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


@given(counts)
def test_interval_contains_the_share_and_stays_a_share(pair: tuple[int, int]) -> None:
    k, n = pair
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high


@given(counts)
def test_interval_of_the_failures_is_the_mirror_image(pair: tuple[int, int]) -> None:
    k, n = pair
    low, high = wilson(k, n)
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@given(st.integers(1, 2000), st.data())
def test_more_samples_of_the_same_share_narrow_the_interval(n: int, data: st.DataObject) -> None:
    few = Measure(data.draw(st.integers(0, n)), n)
    many = Measure(4 * few.k, 4 * n)
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"got k={k}, n={n}"):
        wilson(k, n)
    with pytest.raises(ValueError, match="needs 0 <= k <= n"):
        Measure(k, n)


def test_nothing_to_count_is_none_and_never_zero() -> None:
    assert share(0, 0) is None
    assert measure(np.zeros(0, dtype=np.bool_)) is None
    assert from_accuracy(0.5, 0) is None
    assert from_accuracy(float("nan"), 10) is None
    assert share(0, 4) == 0.0
    assert share(3, 4) == 0.75


@given(counts)
def test_a_stored_fraction_gives_back_its_count(pair: tuple[int, int]) -> None:
    k, n = pair
    assert from_accuracy(k / n, n) == Measure(k, n)


@given(tables)
def test_worst_case_is_never_above_any_single_attack(broken: BoolArray) -> None:
    cells = [outcomes(row) for row in broken]
    left = worst_case(cells)
    assert all(not np.any(left & ~standing(cell)) for cell in cells)
    assert np.array_equal(left, ~broken.any(axis=0))
    assert int(left.sum()) <= min(int(standing(cell).sum()) for cell in cells)


@given(tables, st.randoms(use_true_random=False))
def test_worst_case_ignores_order_and_repetition(broken: BoolArray, random: Random) -> None:
    cells = [outcomes(row) for row in broken]
    mixed = cells + cells[:1]
    random.shuffle(mixed)
    assert np.array_equal(worst_case(mixed), worst_case(cells))


def test_worst_case_of_complementary_attacks_is_below_both() -> None:
    first = first_broken(10, 4)
    left = worst_case([outcomes(first), outcomes(first[::-1].copy())])
    assert measure(left) == Measure(2, 10)


def test_worst_case_needs_cells_of_the_same_samples() -> None:
    with pytest.raises(ValueError, match="at least one attack"):
        worst_case([])
    with pytest.raises(ValueError, match="the indices differ"):
        worst_case([outcomes(first_broken(4, 1)), outcomes(first_broken(5, 1))])


def test_what_no_stage_broke_was_wrong_at_first() -> None:
    broken = first_broken(4, 3)
    found = replace(outcomes(broken), stage=("", "pgd", "", ""))
    assert right_at_first(found).tolist() == [False, True, False, True]
    assert right_at_first(outcomes(first_broken(0, 0))).tolist() == []


def test_first_breaker_counts_each_stage_and_leaves_out_survivors() -> None:
    one = outcomes(first_broken(9, 4), stage="apgd-ce")
    assert first_breaker(one) == {"apgd-ce": 4}
    assert first_breaker(outcomes(first_broken(9, 0), stage="apgd-ce")) == {}

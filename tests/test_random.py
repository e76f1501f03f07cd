"""Random numbers that belong to a sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor

from moebench.attacks._random import normal, sample_keys, uniform

seeds = st.integers(0, 2**63 - 1)


def keys(n: int, seed: int = 0, stream: str = "pgd/0") -> Tensor:
    return sample_keys(seed, stream, torch.arange(n))


@settings(deadline=None, max_examples=50)
@given(seeds, st.text(max_size=10), st.integers(0, 10_000), st.integers(1, 40))
def test_uniform_numbers_are_in_the_half_open_unit_interval(seed: int, stream: str, counter: int, size: int) -> None:
    u = uniform(keys(5, seed, stream), counter, size)
    assert u.shape == (5, size) and u.dtype == torch.float32
    assert bool((u >= 0).all()) and bool((u < 1).all())


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_uniform_numbers_look_uniform_along_and_across_samples(seed: int) -> None:
    u = uniform(keys(400, seed), 3, 50).double().numpy()
    for values in (u.ravel(), u[0], u[:, 0], u[:, 1]):
        assert stats.kstest(values, "uniform").pvalue > 1e-4
    # The first numbers of consecutive samples, counters and positions are unrelated.
    across_counters = np.stack([uniform(keys(400, seed), counter, 1).numpy()[:, 0] for counter in range(20)])
    for table in (u, u.T, across_counters):
        pairs = np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]
        assert abs(pairs) < 4 / np.sqrt(table[1:].size)


def test_uniform_numbers_use_all_their_bits() -> None:
    u = uniform(keys(2000), 0, 50) * 2**24
    assert torch.equal(u, u.round())
    odd = (u.long() % 2).double().mean()
    assert float(odd) == pytest.approx(0.5, abs=0.01)
    assert len(set(u.flatten().tolist())) > 0.99 * u.numel()


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_normal_numbers_have_the_moments_of_a_normal(size: int) -> None:
    z = normal(keys(40_000 // size), 0, size).double().numpy()
    assert z.shape == (40_000 // size, size)
    assert np.isfinite(z).all()
    assert z.mean() == pytest.approx(0, abs=0.025)
    assert z.var() == pytest.approx(1, abs=0.04)
    assert stats.skew(z.ravel()) == pytest.approx(0, abs=0.06)
    assert stats.kurtosis(z.ravel()) == pytest.approx(0, abs=0.15)
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-4
    if size > 1:
        between = np.corrcoef(z.T) - np.eye(size)
        assert np.abs(between).max() < 6 / np.sqrt(len(z))


@settings(deadline=None, max_examples=30)
@given(seeds, st.lists(st.integers(0, 2**40), min_size=1, max_size=9, unique=True), st.randoms())
def test_a_sample_draws_the_same_whatever_its_neighbours(seed: int, ids: list[int], random: object) -> None:
    index = torch.tensor(ids)
    all_keys = sample_keys(seed, "square/0", index)
    together = uniform(all_keys, 5, 6)
    for row, number in enumerate(ids):
        alone = uniform(sample_keys(seed, "square/0", torch.tensor([number])), 5, 6)
        assert torch.equal(alone[0], together[row])
        assert torch.equal(normal(all_keys[row : row + 1], 5, 7)[0], normal(all_keys, 5, 7)[row])


def test_each_row_may_be_at_a_counter_of_its_own() -> None:
    mixed = uniform(keys(3), torch.tensor([4, 0, 9]), 8)
    for row, counter in enumerate((4, 0, 9)):
        assert torch.equal(mixed[row], uniform(keys(3), counter, 8)[row])


def test_a_longer_draw_starts_like_a_shorter_one() -> None:
    assert torch.equal(uniform(keys(3), 1, 20)[:, :6], uniform(keys(3), 1, 6))


def test_seed_stream_sample_and_counter_all_change_the_numbers() -> None:
    base = uniform(keys(50), 0, 4)
    others = [
        uniform(keys(50, seed=1), 0, 4),
        uniform(keys(50, stream="pgd/1"), 0, 4),
        uniform(keys(50, stream="fab-t/0"), 0, 4),
        uniform(sample_keys(0, "pgd/0", torch.arange(50) + 50), 0, 4),
        uniform(keys(50), 1, 4),
    ]
    for other in others:
        assert float((base == other).float().mean()) < 0.01


def test_no_two_samples_share_a_key() -> None:
    assert len(set(keys(20_000).tolist())) == 20_000


def test_the_numbers_are_those_of_the_first_release() -> None:
    """Stored verdicts hang on them: whoever changes the generator must raise the protocol version."""
    u = uniform(sample_keys(0, "apgd-ce/0", torch.tensor([0, 1796])), 0, 3)
    assert (u * 2**24).long().tolist() == [[8432594, 10113222, 15381979], [3772727, 2238024, 3075657]]

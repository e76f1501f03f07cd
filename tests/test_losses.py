"""Losses against their formulas, written out in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import make_rows

from moebench.attacks._base import Loss
from moebench.attacks._engine import Samples
from moebench.attacks._losses import cross_entropy, dlr, margin, margin_to_target, targeted_dlr

Formula = Callable[[list[float], int, int], float]


def cross_entropy_formula(z: list[float], y: int, t: int) -> float:
    top = max(z)
    return top + math.log(sum(math.exp(value - top) for value in z)) - z[y]


def margin_formula(z: list[float], y: int, t: int) -> float:
    return max(value for i, value in enumerate(z) if i != y) - z[y]


def dlr_formula(z: list[float], y: int, t: int) -> float:
    ordered = sorted(z, reverse=True)
    return margin_formula(z, y, t) / (ordered[0] - ordered[2] + 1e-12)


def margin_to_target_formula(z: list[float], y: int, t: int) -> float:
    return z[t] - z[y]


def targeted_dlr_formula(z: list[float], y: int, t: int) -> float:
    ordered = sorted(z, reverse=True)
    return (z[t] - z[y]) / (ordered[0] - (ordered[2] + ordered[3]) / 2 + 1e-12)


# Eighths are exact in float32 and keep the ratios well defined: no two logits are closer than that, or they are equal.
cases = st.integers(4, 8).flatmap(
    lambda classes: st.tuples(
        st.lists(st.integers(-80, 80).map(lambda i: i / 8), min_size=classes, max_size=classes, unique=True),
        st.integers(0, classes - 1),
        st.integers(0, classes - 1),
    )
)


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        (cross_entropy, cross_entropy_formula),
        (margin, margin_formula),
        (dlr, dlr_formula),
        (margin_to_target, margin_to_target_formula),
        (targeted_dlr, targeted_dlr_formula),
    ],
)
@settings(deadline=None, max_examples=60)
@given(case=cases)
def test_loss_is_its_formula(loss: Loss, formula: Formula, case: tuple[list[float], int, int]) -> None:
    z, y, t = case
    logits = torch.tensor([z, z[::-1]])
    last = len(z) - 1
    samples = Samples(torch.zeros(2, 1, 1, 1), torch.tensor([y, last - y]), torch.arange(2))
    values = loss(logits, make_rows(samples, target=torch.tensor([t, last - t])))
    assert values.shape == (2,)
    expected = formula(z, y, t)
    assert values.tolist() == pytest.approx([expected, expected], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("loss", [margin, dlr])
def test_an_untargeted_loss_is_positive_exactly_where_the_prediction_is_wrong(loss: Loss) -> None:
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    samples = Samples(torch.zeros(200, 1, 1, 1), torch.arange(200) % 5, torch.arange(200))
    assert torch.equal(loss(logits, make_rows(samples)) > 0, logits.argmax(dim=1) != samples.y)


@pytest.mark.parametrize("loss", [dlr, targeted_dlr])
def test_dlr_does_not_change_when_logits_are_scaled_or_shifted(loss: Loss) -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    samples = Samples(torch.zeros(50, 1, 1, 1), torch.arange(50) % 6, torch.arange(50))
    rows = make_rows(samples, target=(samples.y + 1) % 6)
    torch.testing.assert_close(loss(1000 * logits + 3, rows), loss(logits, rows), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", [cross_entropy, dlr, targeted_dlr, margin, margin_to_target])
def test_losses_are_finite_where_all_logits_are_equal(loss: Loss) -> None:
    samples = Samples(torch.zeros(3, 1, 1, 1), torch.arange(3), torch.arange(3))
    rows = make_rows(samples, target=(samples.y + 1) % 5)
    for value in (0.0, 1e4):
        logits = torch.full((3, 5), value, requires_grad=True)
        values = loss(logits, rows)
        (gradient,) = torch.autograd.grad(values.sum(), logits)
        assert bool(torch.isfinite(values).all()) and bool(torch.isfinite(gradient).all())

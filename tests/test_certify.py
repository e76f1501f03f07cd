"""Margins, estimated radii and interval bounds, on models of which the truth is known."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Terminal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import LinearClassifier, TinyMoE, frozen

from moebench.errors import UsageError
from moebench.intervals import Interval, IntervalNetwork, margin_bounds
from moebench.margins import (
    certifiable,
    certified_radius,
    estimated_radius,
    lipschitz_estimate,
    margins,
    rivals,
    slopes,
)
from moebench.models import MODELS
from moebench.models.rt_er import ClassifierMoE
from moebench.schema import NORMS, Norm, ThreatModel

SHAPE = (1, 8, 8)


def images(n: int = 6, seed: int = 0) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def fresh(name: str, **options: Any) -> nn.Module:
    """A model with random weights and lively BatchNorm statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = MODELS.get(name).make(10, SHAPE, **options).train()
        model(images(64, seed=5))
        return frozen(model)


# --- margins and estimates


def test_margin_is_the_lead_over_the_best_other_class() -> None:
    outputs = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert margins(outputs, torch.tensor([0, 2])).tolist() == [1.0, -1.0]
    assert rivals(outputs, torch.tensor([0, 2])).tolist() == [[0, 2, 1], [2, 0, 1]]


@pytest.mark.parametrize("norm", NORMS)
def test_on_a_linear_model_the_slopes_are_the_constants(norm: Norm) -> None:
    """There the paper's radius is a lower bound of the distance to the boundary, and for two classes it is close."""
    generator = torch.Generator().manual_seed(0)
    model = LinearClassifier(torch.randn(4, 16, generator=generator), torch.randn(4, generator=generator))
    x = torch.rand(8, 1, 4, 4, generator=generator)
    y = model(x).argmax(dim=1)
    classes = rivals(model(x), y)
    weight = model.weight[classes]
    exact = weight.abs().sum(2) if norm == "Linf" else weight.square().sum(2).sqrt()
    torch.testing.assert_close(slopes(model, x, classes, norm), exact)
    threat = ThreatModel(norm, 0.1)
    fastest = lipschitz_estimate(model, x, classes, threat, torch.arange(8), points=2, seed=0)
    torch.testing.assert_close(fastest, exact)
    radius = estimated_radius(model(x), classes, fastest)
    assert bool((radius > 0).all()) and bool((radius <= model.distance(x, norm) * (1 + 1e-5)).all())


def test_radius_of_the_dual_model_needs_its_margin() -> None:
    outputs = torch.tensor([[0.9, 0.1], [0.7, 0.3]])
    classes, lipschitz = torch.tensor([[0, 1], [0, 1]]), torch.full((2, 2), 2.0)
    # alpha = 0.7: the margin must be 0.4286; 0.8 gives (0.56 - 0.3) / (0.7 · 4), and 0.4 nothing.
    found = estimated_radius(outputs, classes, lipschitz, alpha=0.7)
    torch.testing.assert_close(found, torch.tensor([0.26 / 2.8, 0.0]))


# --- interval bounds


MODELS_WITH_BOUNDS = (
    ("resnet-at", {}),
    ("resnet18-at", {"width": 4}),
    ("wrn-at", {"depth": 10}),
    ("vgg-at", {"width": 4}),
    ("ensemble-mean", {"members": 2}),
    ("rt-er", {}),
    ("rt-er-top2", {}),
    ("rt-er", {"top_k": 4}),
    ("dual-moe", {}),
    ("dual-moe", {"alpha": 1.0}),
    ("dual-moe", {"mixing": "probabilities"}),
)


@pytest.mark.parametrize(("name", "options"), MODELS_WITH_BOUNDS)
@pytest.mark.parametrize("radius", [0.0, 2e-3])
def test_no_image_of_the_box_is_below_the_bound(name: str, options: dict[str, Any], radius: float) -> None:
    model = fresh(name, **options)
    x, y = images().double(), torch.arange(6)
    low = certifiable(model)(Interval(x, torch.full_like(x, radius)), y)
    reference = model.double()
    is_label = nn.functional.one_hot(y, 10).bool()
    assert bool(torch.isinf(low[is_label]).all()) and bool(torch.isfinite(low[~is_label]).all())
    generator = torch.Generator().manual_seed(3)
    for _ in range(8):
        corner = torch.rand(x.shape, generator=generator, dtype=torch.float64).round() * 2 - 1
        z = reference(x + radius * corner)
        z = z.exp() if options.get("mixing") == "probabilities" else z
        lead = z.gather(1, y.unsqueeze(1)) - z
        assert bool((lead[~is_label] >= low[~is_label] - 1e-9).all())
    if radius == 0.0 and name in ("resnet-at", "wrn-at", "vgg-at", "resnet18-at"):
        # Room for rounding grows by a factor per layer, as all intervals do.
        torch.testing.assert_close(lead[~is_label], low[~is_label], rtol=2e-3, atol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = fresh("rt-er")
    certifiable(model)
    assert next(model.parameters()).dtype == torch.float32


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), radius=st.floats(0, 0.3))
def test_bound_of_a_linear_network_is_its_minimum(seed: int, radius: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).double()
    x = torch.rand(3, 1, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 3, 4])
    low = margin_bounds(IntervalNetwork(network), Interval(x, torch.full_like(x, radius)), y)
    layer = network[1]
    assert isinstance(layer, nn.Linear)
    rows = layer.weight[y].unsqueeze(1) - layer.weight
    for other in range(5):
        worst = x - radius * rows[:, other].sign().view(-1, 1, 4, 4)
        z = network(worst)
        reached = z.gather(1, y.unsqueeze(1)).squeeze(1) - z[:, other]
        assert torch.allclose(low[:, other], reached) or bool((y == other).any())


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 1000), radius=st.sampled_from([0.0, 1e-12, 1e-3, 0.1]), scale=st.sampled_from([1.0, 1e6, 1e12])
)
def test_bound_holds_in_exact_arithmetic_where_float64_cancels(seed: int, radius: float, scale: float) -> None:
    """Two layers whose large weights cancel but for a rest that rounding swallows; minima in rational numbers."""
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for layer in (network[1], network[3]):
            assert isinstance(layer, nn.Linear)
            half = scale * torch.randn(layer.weight.shape[0], layer.weight.shape[1] // 2, generator=generator).double()
            layer.weight.copy_(torch.cat((half, -half), dim=1) + torch.randn(layer.weight.shape, generator=generator))
    pixels = torch.rand(1, 1, 1, 2, generator=generator, dtype=torch.float64).repeat(1, 1, 1, 2)
    box = Interval(pixels, torch.full_like(pixels, radius))
    low = margin_bounds(IntervalNetwork(network), box, torch.tensor([0]))[0]
    for corner in ((0, 0, 0, 0), (1, 1, 1, 1), (1, -1, -1, 1), (-1, 1, 1, -1)):
        z = [Fraction(p) + sign * Fraction(radius) for p, sign in zip(pixels.flatten().tolist(), corner, strict=True)]
        hidden = [max(value, Fraction(0)) for value in exactly(network[1], z)]
        logits = exactly(network[3], hidden)
        for other in (1, 2):
            assert Fraction(low[other].item()) <= logits[0] - logits[other]


def exactly(layer: nn.Module, x: list[Fraction]) -> list[Fraction]:
    """What a linear layer gives for rational inputs, without rounding."""
    assert isinstance(layer, nn.Linear)
    rows, biases = layer.weight.tolist(), layer.bias.tolist()
    return [
        sum((Fraction(w) * value for w, value in zip(row, x, strict=True)), Fraction(bias))
        for row, bias in zip(rows, biases, strict=True)
    ]


def test_an_expert_that_cannot_be_reached_does_not_count() -> None:
    """A router that sends everything to expert 0 by its bias makes the bound that of expert 0."""
    model = fresh("rt-er")
    assert isinstance(model, ClassifierMoE)
    router = model.moe.router.get_submodule("1")
    assert isinstance(router, nn.Linear)
    router.bias.data = torch.tensor([1e4, 0.0, 0.0, 0.0])
    x, y = images().double(), torch.arange(6)
    box = Interval(x, torch.full_like(x, 1e-4))
    low = certifiable(model)(box, y)
    alone = certifiable(model)
    expert = IntervalNetwork(model.moe.experts[0].double())
    normalized = Interval(2 * x - 1, 2 * box.radius)
    torch.testing.assert_close(low, margin_bounds(expert, normalized, y))
    router.weight.data.zero_()
    router.bias.data = torch.zeros(4)
    assert bool((certifiable(model)(box, y) <= alone(box, y)).all())


def test_certified_radius_lies_below_what_an_attack_needs() -> None:
    """On a linear model interval bounds are exact, so the radius is the distance to the boundary."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    x = 0.5 + 0.05 * torch.randn(9, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = network(x).argmax(dim=1)
    bounded = IntervalNetwork(network)
    radius = certified_radius(lambda box, label: margin_bounds(bounded, box, label), x, y)
    layer = network[1]
    assert isinstance(layer, nn.Linear)
    exact = LinearClassifier(layer.weight.detach(), layer.bias.detach()).distance(x, "Linf")
    inside = exact < 0.2  # where the box of [0, 1] plays no part
    assert bool(inside.any())
    ratio = radius[inside] / exact[inside]
    assert bool((ratio <= 1).all()) and bool((ratio > 0.999).all())
    wrong = certified_radius(lambda box, label: margin_bounds(bounded, box, label), x, (y + 1) % 3)
    assert not bool(wrong.any())


@pytest.mark.parametrize("model", [TinyMoE(), nn.Linear(3, 3)])
def test_models_without_a_bound_are_told_so(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="no certificate for a model of this kind"):
        certifiable(model)
    with pytest.raises(UsageError, match="no interval bounds for a layer Sigmoid"):
        IntervalNetwork(nn.Sequential(nn.Sigmoid(), nn.Linear(2, 2))).run(Interval(torch.zeros(1, 2), torch.ones(1, 2)))


# --- the command


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal(tmp_path, capsys)


QUICK = ("--n", "12", "--points", "1", "--attack", "pgd-2")


def test_command_measures_an_moe(terminal: Terminal) -> None:
    found = terminal("certify", "--model", "rt-er", *QUICK, "--json").json
    assert (found["model"], found["n"], found["norm"], found["eps"]) == ("rt-er", 12, "Linf", 0.2)
    assert found["sa"] == found["margins"]["clean"]["reaching"]
    assert found["standing"] == found["margins"]["attacked"]["reaching"] <= found["sa"]
    assert found["dual"] == {} and found["why"] is None
    proven, estimated = found["certified"]["percentiles"], found["estimated"]["percentiles"]
    assert 0 < proven["p50"] < estimated["p50"]
    assert terminal.files() == {}


def test_command_measures_a_dual_model(terminal: Terminal) -> None:
    found = terminal("certify", "--model", "dual-moe", "--set", "alpha=0.8", *QUICK, "--json").json
    assert found["model"] == "dual-moe[alpha=0.8]"
    assert math.isclose(found["dual"]["margin of F_R, clean"]["threshold"], 0.25)
    said = terminal("certify", "--model", "dual-moe", *QUICK).out
    assert "estimated radius (proves nothing): p5 " in said and "dual bound: margin of F_R, clean: p5 " in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "rt-err"), "unknown model 'rt-err'"),
        (("--model", "rt-er", "--attack", "pdg-5"), "unknown attack 'pdg-5'"),
        (("--model", "rt-er", "--attack", "pgd-2,fgsm"), "unknown attack 'pgd-2,fgsm'"),
        (("--model", "rt-er", "--points", "-1"), "--points must be at least 0, got -1"),
        (("--model", "rt-er", "--eps", "much"), "eps must be a positive number"),
    ],
)
def test_bad_usage_is_one_line(terminal: Terminal, words: tuple[str, ...], message: str) -> None:
    assert message in terminal.refuses("certify", *words)

"""Balancing losses in closed form, and that they are taken from the very passes of the loss that they balance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LayeredMoE, Shift
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.models import MODELS
from moebench.models._balancing import (
    Hearing,
    balanced,
    column_entropy_loss,
    entropy_loss,
    switch_loss,
    variance_loss,
)
from moebench.models._base import Adversary, Phase, Recipe
from moebench.models._moe import moe_layers, record, route, top_experts
from moebench.models._objectives import ADVERSARIAL, STANDARD, TRADES

RECIPE = Recipe(epochs=1, balance=0.5)


def softmaxes(batch: int, experts: int, seed: int) -> Tensor:
    return (3 * torch.randn(batch, experts, generator=torch.Generator().manual_seed(seed))).double().softmax(1)


@pytest.mark.parametrize("experts", [2, 4, 7])
def test_values_at_the_extremes(experts: int) -> None:
    log = math.log(experts)
    undecided = torch.full((3 * experts, experts), 1 / experts)
    decided = torch.eye(experts).repeat(3, 1)
    collapsed = torch.eye(experts)[:1].repeat(3 * experts, 1)
    found = {
        "entropy": [float(entropy_loss(probs)) for probs in (undecided, decided, collapsed)],
        "column": [float(column_entropy_loss(probs)) for probs in (undecided, decided, collapsed)],
        "variance": [float(variance_loss(probs)) for probs in (undecided, decided, collapsed)],
    }
    # The spread of a column with a share 1/E of ones, over 3E images.
    std = math.sqrt((1 / experts) * (1 - 1 / experts) * 3 * experts / (3 * experts - 1))
    assert found["entropy"] == pytest.approx([0, -log, 0], abs=1e-5)
    assert found["column"] == pytest.approx([-log, -log, 0], abs=1e-5)
    assert found["variance"] == pytest.approx([1, 1 - std, experts], abs=1e-5)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 6), st.integers(2, 5), st.integers(0, 1000))
def test_losses_are_their_formulas(batch: int, experts: int, seed: int) -> None:
    probs = softmaxes(batch, experts, seed)
    rows = probs.tolist()
    mean = [sum(row[i] for row in rows) / batch for i in range(experts)]
    of_mean = -sum(p * math.log(p) for p in mean)
    of_rows = sum(-sum(p * math.log(p) for p in row) for row in rows) / batch
    assert float(entropy_loss(probs)) == pytest.approx(of_rows - of_mean)
    assert float(column_entropy_loss(probs)) == pytest.approx(-of_mean)
    assert float(column_entropy_loss(probs)) == pytest.approx(
        sum(p * math.log(p * experts) for p in mean) - math.log(experts)
    )
    first = [max(range(experts), key=row.__getitem__) for row in rows]
    switch = experts * sum(first.count(i) / batch * mean[i] for i in range(experts)) - 1
    spread = (
        sum(math.sqrt(sum((row[i] - mean[i]) ** 2 for row in rows) / (batch - 1)) for i in range(experts)) / experts
    )
    assert float(variance_loss(probs)) == pytest.approx(switch - spread + 1, abs=1e-6)
    assert -math.log(experts) - 1e-9 <= float(entropy_loss(probs)) <= 1e-9


def test_gradients_stay_finite_where_a_softmax_is_exact() -> None:
    logits = torch.tensor([[200.0, 0, -200], [0, 300, 0]], requires_grad=True)
    for loss in (entropy_loss, column_entropy_loss, variance_loss):
        (gradient,) = torch.autograd.grad(loss(logits.softmax(1)), logits)
        assert bool(torch.isfinite(gradient).all())


def test_steps_down_the_entropy_loss_decide_and_spread() -> None:
    logits = (
        0.1 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.5, 0, 0, 0])
    ).requires_grad_()
    assert float(top_experts(logits, 1).float().mean(0)[0]) > 0.95
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        entropy_loss(logits.softmax(1)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    probs = logits.softmax(1)
    assert probs.amax(1).min().item() > 0.95
    load = top_experts(probs, 1).float().mean(0)
    assert 0.1 < load.min().item() <= load.max().item() < 0.5


# --- heard in the pass itself


class Normed(nn.Module):
    """Two MoE layers with BatchNorm before, in the first one's experts, and in its router."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(5)
        self.layered = LayeredMoE()
        self.layered.first.router = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layered(self.bn(x))
        return logits


class Ascent(Shift):
    """A shift that runs the model a few times before, as an attack does."""

    def __call__(self, forward: object, x: Tensor, loss: object, **options: object) -> Tensor:  # type: ignore[override]
        model = forward
        assert isinstance(model, nn.Module)
        training = model.training
        model.eval()
        for _ in range(3):
            model(x)
        model.train(training)
        return x + 0.1


def terms(model: nn.Module, x: Tensor) -> list[Tensor]:
    soft, hard = record(model, x, soft=True), record(model, x)
    return [switch_loss(soft[name].weights, hard[name].selected) for name in soft]


def test_the_loss_of_a_layered_model_comes_from_its_own_pass() -> None:
    model = LayeredMoE().eval()
    x, y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    for phases, seen in ((STANDARD, x), (ADVERSARIAL, x + 0.1)):
        (phase,) = balanced(phases)
        found = phase.loss(model, x, y, Ascent(), RECIPE)
        expected = F.cross_entropy(model(seen), y) + 0.5 * torch.stack(terms(model, seen)).sum()
        torch.testing.assert_close(found, expected)
        gradients = torch.autograd.grad(found, [*model.first.router.parameters(), *model.second.router.parameters()])
        assert all(float(gradient.abs().max()) > 0 for gradient in gradients)


def test_trades_is_balanced_on_clean_and_adversarial_images_at_once() -> None:
    model = LayeredMoE().eval()
    x, y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    (phase,), (plain,) = balanced(TRADES), TRADES
    found = phase.loss(model, x, y, Ascent(), RECIPE) - plain.loss(model, x, y, Ascent(), RECIPE)
    torch.testing.assert_close(found, 0.5 * torch.stack(terms(model, torch.cat((x, x + 0.1)))).sum())


def test_several_passes_count_by_their_mean() -> None:
    def twice(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
        return F.cross_entropy(model(x), y) + F.cross_entropy(model(x + 1), y)

    model = LayeredMoE().eval()
    x, y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    (phase,) = balanced((Phase(twice),))
    found = phase.loss(model, x, y, Ascent(), RECIPE) - twice(model, x, y, Ascent(), RECIPE)
    one, two = terms(model, x), terms(model, x + 1)
    torch.testing.assert_close(found, 0.25 * (torch.stack(one).sum() + torch.stack(two).sum()))


@pytest.mark.parametrize("phases", [STANDARD, ADVERSARIAL, TRADES])
def test_batch_norm_sees_each_image_once(phases: tuple[Phase, ...]) -> None:
    model = Normed().train()
    x, y = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    (phase,) = balanced(phases)
    phase.loss(model, x, y, Ascent(), RECIPE)
    router = model.layered.first.router.get_submodule("1")
    assert isinstance(router, nn.BatchNorm1d)
    assert int(model.bn.num_batches_tracked) == int(router.num_batches_tracked) == 1  # type: ignore[arg-type]
    assert all(layer.policy is None for layer in moe_layers(model).values())


def test_without_weight_nothing_is_heard() -> None:
    model = LayeredMoE().eval()
    x, y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    (phase,) = balanced(STANDARD)
    assert phase.loss(model, x, y, Ascent(), Recipe(epochs=1)).item() == F.cross_entropy(model(x), y).item()


def test_an_attack_that_fails_leaves_the_ears_open() -> None:
    def failing(*args: object, **options: object) -> Tensor:
        raise RuntimeError("inside")

    hearing, model = Hearing(), LayeredMoE()
    x = torch.randn(4, 5)
    with hearing.listening(model):
        with pytest.raises(RuntimeError, match="inside"):
            hearing.deaf_to(failing)(model, x, lambda logits: logits.sum(1))
        model(x)
    assert {name: len(passes) for name, passes in hearing.passes.items()} == {"first": 1, "second": 1}


def test_classifier_moes_are_balanced_on_clean_images_by_their_router_alone() -> None:
    torch.manual_seed(0)
    model = MODELS.get("at-moe").make(10, (1, 8, 8)).train()
    x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    (phase,) = balanced((Phase(lambda *_: torch.tensor(1.25)),))
    found = phase.loss(model, x, y, Ascent(), RECIPE)
    soft, hard = route(model, x, soft=True)["moe"].weights, route(model, x)["moe"].selected
    assert found.item() == (1.25 + 0.5 * switch_loss(soft, hard)).item()
    assert torch.equal(hard, top_experts(soft, 1))
    assert all(
        int(module.num_batches_tracked or 0) == 0 for module in model.modules() if isinstance(module, nn.BatchNorm2d)
    )

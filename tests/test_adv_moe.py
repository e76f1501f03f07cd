from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import Noted
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.attacks._regions import list_regions
from moebench.errors import UsageError
from moebench.models import MODELS
from moebench.models._image_moe import ImageMoE
from moebench.models._moe import forced_forward, moe_layers, record, replay, smooth_forward
from moebench.models._objectives import kl_divergence
from moebench.models._resnet import PadShortcut
from moebench.models.adv_moe import (
    ALTERNATING,
    AdvMoERecipe,
    PathwayLayer,
    divergence_adversary,
    logits_and_gate,
    network_loss,
    router_loss,
)
from moebench.schema import ThreatModel
from moebench.training_adversary import TrainingAdversary

SHAPE = (1, 8, 8)
RECIPE = AdvMoERecipe(epochs=1, beta=3.0)
BOTH = pytest.mark.parametrize("name", ["adv-moe", "adv-moe-cnn"])


def make(name: str, seed: int = 1, **settings: Any) -> ImageMoE:
    """In eval mode, with a router that sends images to several experts."""
    torch.manual_seed(seed)
    model = MODELS.get(name).make(10, SHAPE, **settings).eval()
    assert isinstance(model, ImageMoE)
    with torch.no_grad():
        gate = model.moe.router(model.normalize(images(64, seed=9)))
        last = [part for part in model.moe.router.modules() if isinstance(part, nn.Linear)][-1]
        last.weight.mul_(30)
        last.bias.sub_(gate.mean(0)).mul_(30)
    return model


def images(batch: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(batch, *SHAPE, generator=torch.Generator().manual_seed(seed))


def labels(batch: int = 12) -> Tensor:
    return torch.arange(batch) % 10


def sure(model: ImageMoE) -> ImageMoE:
    """With large logits, so that the divergence of p from q is not nearly that of q from p."""
    with torch.no_grad():
        for name, part in model.moe.named_modules():
            if name.endswith("fc") and not name.startswith("router"):
                part.get_parameter("weight").mul_(100)
    with torch.no_grad():
        clean, adv = model(images()), model((images() + 0.3).clamp(0, 1))
    assert abs(float((kl_divergence(clean, adv) - kl_divergence(adv, clean)).mean())) > 0.05
    return model


def trades(model: ImageMoE, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    divergence = F.kl_div(model(x_adv).log_softmax(1), model(x).softmax(1), reduction="batchmean")
    return F.cross_entropy(model(x), y) + beta * divergence


# --- the channel-level network


def by_hand(model: ImageMoE, x: Tensor, choice: list[int]) -> Tensor:
    """The definition, image by image: all E·w filters of every convolution, then the w of the chosen expert."""
    layer = model.moe
    assert isinstance(layer, PathwayLayer)
    rows = []
    for b, expert in enumerate(choice):

        def convolve(number: int, h: Tensor, expert: int = expert) -> Tensor:
            convs = [filters[number] for filters in layer.experts]  # type: ignore[index]
            every = F.conv2d(h, torch.cat([c.weight for c in convs]), stride=convs[0].stride, padding=1)
            width = convs[0].out_channels
            return every[:, expert * width : (expert + 1) * width]

        rows.append(layer.shared(2 * x[b : b + 1] - 1, convolve)[0])
    return torch.stack(rows)


@torch.no_grad()
def test_each_image_passes_through_the_filters_of_its_expert() -> None:
    model, x = make("adv-moe-cnn", experts=3), images()
    choice = model.moe.router(2 * x - 1).argmax(1).tolist()
    assert len(set(choice)) > 1
    torch.testing.assert_close(model(x), by_hand(model, x, choice), rtol=1e-4, atol=1e-5)
    for expert in range(3):
        torch.testing.assert_close(
            forced_forward(model, x, expert), by_hand(model, x, [expert] * 12), rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
def test_soft_routing_mixes_in_every_convolution() -> None:
    model, x = make("adv-moe-cnn"), images(4)
    weights = model.moe.router(2 * x - 1).softmax(1)
    layer = model.moe
    assert isinstance(layer, PathwayLayer)

    def convolve(number: int, h: Tensor) -> Tensor:
        parts = [weights[:, e].view(-1, 1, 1, 1) * layer._filters(e)[number](h) for e in range(2)]
        return torch.stack(parts).sum(0)

    torch.testing.assert_close(smooth_forward(model, x), layer.shared(2 * x - 1, convolve))


def test_one_decision_holds_for_all_layers() -> None:
    model, x = make("adv-moe-cnn", experts=3), images()
    seen: list[int] = []
    model.moe.router.register_forward_hook(lambda *_: seen.append(1))
    model(x)
    assert len(seen) == 1, "the router runs once for all convolutions"
    assert list(moe_layers(model)) == list(record(model, x)) == ["moe"]
    assert list_regions(model, x).count == 3
    other = record(model, images(seed=5))
    torch.testing.assert_close(
        replay(model, x, other), by_hand(model, x, other["moe"].selected.long().argmax(1).tolist())
    )


def test_an_expert_at_ratio_one_over_e_has_its_share_of_the_filters() -> None:
    for experts, ratio in ((2, 0.5), (4, 0.25)):
        layer = MODELS.get("adv-moe-cnn").make(10, SHAPE, experts=experts, ratio=ratio).get_submodule("moe")
        assert isinstance(layer, PathwayLayer)
        widths = [conv.out_channels for conv in layer._filters(0)]  # type: ignore[union-attr]
        assert [experts * width for width in widths] == [32, 32, 32, 32, 64, 64]


@pytest.mark.parametrize("ratio", [0.0, 0.01, -1.0])
def test_ratio_that_leaves_no_filter_is_refused(ratio: float) -> None:
    with pytest.raises(UsageError, match="ratio must leave at least one filter of 32"):
        MODELS.get("adv-moe-cnn").make(10, SHAPE, ratio=ratio)


def test_padded_shortcut_takes_every_second_pixel_and_fills_channels() -> None:
    x = torch.arange(2 * 16, dtype=torch.float32).view(1, 2, 4, 4)
    out = PadShortcut(2, 5, 2)(x)
    assert out.shape == (1, 5, 2, 2)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert float(out[:, [0, 3, 4]].abs().max()) == 0


# --- the attack in training


@BOTH
def test_attack_raises_both_divergences(name: str) -> None:
    model, x = make(name), images()
    noted = Noted(0.0, eps=0.16)
    divergence_adversary(model, x, noted, RECIPE)
    assert noted.asked == [{"steps": 2, "step_size": pytest.approx(0.1), "random_start": False}]
    clean, gate = model(x), model.moe.router(2 * x - 1)
    other, other_gate = images(seed=3), None
    both = noted.forwards[0](other)
    other_gate = model.moe.router(2 * other - 1)
    # The forward sees the image with a little noise.
    torch.testing.assert_close(both, torch.cat((model(other), other_gate), 1), rtol=0.3, atol=0.5)
    exact = torch.cat((model(other), other_gate), 1)
    expected = kl_divergence(clean, model(other)) + kl_divergence(gate, other_gate)
    torch.testing.assert_close(noted.losses[0](exact), expected)


@BOTH
def test_attack_stays_in_the_ball_and_moves_away(name: str) -> None:
    model, x = make(name).train(), images()
    adversary = TrainingAdversary(model, ThreatModel("Linf", 0.1), RECIPE, seed=0)
    torch.manual_seed(0)
    x_adv = divergence_adversary(model, x, adversary, RECIPE)
    assert model.training
    assert float((x_adv - x).abs().max()) <= 0.1 + 1e-6
    assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1
    model.eval()

    @torch.no_grad()
    def divergence(z: Tensor) -> float:
        gate, moved = (model.moe.router(2 * one - 1) for one in (x, z))
        return float((kl_divergence(model(x), model(z)) + kl_divergence(gate, moved)).mean())

    random = (x + 0.1 * torch.randn(x.shape).sign()).clamp(0, 1)
    assert divergence(x_adv) > divergence(random) > 0


@BOTH
def test_gradient_passes_through_the_winners_weight(name: str) -> None:
    model, x = make(name), images(4)
    logits, gate = logits_and_gate(model, x)
    torch.testing.assert_close(logits, model(x))
    torch.testing.assert_close(gate, model.moe.router(2 * x - 1))
    gradients = torch.autograd.grad(logits.square().sum(), list(model.moe.router.parameters()), allow_unused=True)
    assert any(gradient is not None and float(gradient.abs().max()) > 0 for gradient in gradients)


# --- the two steps


@BOTH
def test_network_step_is_its_formula_and_leaves_the_router_alone(name: str) -> None:
    model, x, y = sure(make(name)), images(), labels()
    found = network_loss(model, x, y, Noted(0.3), RECIPE)
    torch.testing.assert_close(found, trades(model, x, (x + 0.3).clamp(0, 1), y, 3.0), rtol=1e-4, atol=1e-5)
    torch.autograd.backward(found)
    assert all(parameter.grad is None for parameter in model.moe.router.parameters())
    assert any(parameter.grad is not None for parameter in model.moe.experts.parameters())


@BOTH
def test_router_step_is_the_same_formula_with_a_gradient_to_the_router(name: str) -> None:
    model, x, y = sure(make(name)), images(), labels()
    found = router_loss(model, x, y, Noted(0.3), RECIPE)
    torch.testing.assert_close(found, trades(model, x, (x + 0.3).clamp(0, 1), y, 3.0), rtol=1e-4, atol=1e-5)
    model.train()
    torch.autograd.backward(router_loss(model, x, y, Noted(0.3), RECIPE))
    reached = [parameter.grad for parameter in model.moe.router.parameters()]
    assert all(gradient is not None for gradient in reached)
    assert any(float(gradient.abs().max()) > 0 for gradient in reached if gradient is not None)


@BOTH
def test_label_mod_is_the_published_codes_formula(name: str) -> None:
    model, x, y = make(name), images(), labels()
    recipe = replace(RECIPE, router_target="label-mod", label_weight=0.4)
    found = router_loss(model, x, y, Noted(0.3), recipe)
    gate, adv = (model.moe.router(2 * z - 1) for z in (x, (x + 0.3).clamp(0, 1)))
    experts = len(model.moe.experts)
    divergence = F.kl_div(adv.log_softmax(1), gate.softmax(1), reduction="batchmean")
    wanted = torch.tensor([int(label) % experts for label in y])
    torch.testing.assert_close(found, 0.4 * F.cross_entropy(gate, wanted) + 3.0 * divergence)
    torch.autograd.backward(found)
    assert all(parameter.grad is None for parameter in model.moe.experts.parameters())


@BOTH
def test_the_steps_share_the_model_between_them(name: str) -> None:
    model = make(name)
    network, router = ({id(one) for one in phase.parameters(model)} for phase in ALTERNATING)
    assert not network & router
    assert network | router == {id(one) for one in model.parameters()}
    assert router == {id(one) for one in model.moe.router.parameters()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router_target": "label"}, "router_target of a recipe must be none or label-mod, got 'label'"),
        ({"inner_steps": -1}, "inner_steps of a recipe must be a whole number >= 0, got -1"),
        ({"inner_fraction": float("inf")}, "inner_fraction of a recipe must be a finite number >= 0, got inf"),
    ],
)
def test_impossible_recipes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(RECIPE, **change)

"""The dense baselines, the vote and the RT-ER family: sizes at full scale, and what is peculiar to each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import Flat, Shift
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.errors import UsageError
from moebench.models import MODELS
from moebench.models._moe import moe_layers
from moebench.models._objectives import kl_divergence
from moebench.models.ensemble import Ensemble, majority_vote
from moebench.models.rt_er import ClassifierMoE, DualModel, all_experts_loss
from moebench.schema import ThreatModel
from moebench.training_adversary import TrainingAdversary

DIGITS, CIFAR, LARGE = (1, 8, 8), (3, 32, 32), (3, 224, 224)
RESNET18, ROUTER = 11_173_962, 12_292


def images(batch: int, shape: tuple[int, int, int] = DIGITS, seed: int = 0) -> Tensor:
    return torch.rand(batch, *shape, generator=torch.Generator().manual_seed(seed))


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- the papers' sizes, counted without allocating them


@pytest.mark.parametrize(
    ("name", "shape", "classes", "settings", "expected"),
    [
        ("resnet18-at", CIFAR, 10, {}, RESNET18),
        ("resnet34-at", CIFAR, 10, {}, 21_282_122),
        ("resnet50-at", CIFAR, 10, {}, 23_520_842),
        # torchvision's own, with the stem for large images
        ("resnet18-at", LARGE, 1000, {}, 11_689_512),
        ("resnet50-at", LARGE, 1000, {}, 25_557_032),
        ("wrn-at", CIFAR, 10, {}, 36_479_194),
        ("wrn-at", CIFAR, 10, {"depth": 34}, 46_160_474),
        ("vgg-at", CIFAR, 10, {}, 14_728_266),
        ("vgg-at", LARGE, 1000, {}, 138_365_992),
        ("rt-er", CIFAR, 10, {}, 4 * RESNET18 + ROUTER),
        ("rt-er-e3", CIFAR, 10, {}, 3 * RESNET18 + 3 * 3073),
        ("rt-er-e5", CIFAR, 10, {}, 5 * RESNET18 + 5 * 3073),
        ("dual-moe", CIFAR, 10, {}, 8 * RESNET18 + 2 * ROUTER),
        ("jtd-moe-official", CIFAR, 10, {}, 8 * RESNET18 + 2 * ROUTER),
        # ViT-S/16 of 21,742,664 parameters for 200 classes, router 150,528 -> 4
        ("rt-er", LARGE, 200, {}, 4 * 21_742_664 + 4 * 150_529),
        ("dual-moe", LARGE, 200, {}, 8 * 21_742_664 + 8 * 150_529),
        ("rt-er", LARGE, 200, {"expert": "resnet"}, 4 * (RESNET18 + 190 * 513) + 4 * 150_529),
        ("ensemble-vote", CIFAR, 10, {}, 4 * RESNET18),
    ],
)
def test_full_size(
    name: str, shape: tuple[int, int, int], classes: int, settings: dict[str, Any], expected: int
) -> None:
    with torch.device("meta"):
        model = MODELS.get(name).make(classes, shape, **settings).eval()
        assert parameters(model) == expected
        if not moe_layers(model):
            assert model(torch.empty(2, *shape)).shape == (2, classes)


def test_the_dual_model_is_of_89_million() -> None:
    assert round((8 * RESNET18 + 2 * ROUTER) / 1e6, 1) == 89.4


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("st-moe", 2),
        ("at-moe-top2", 3),
        ("trades-moe", 2),
        ("rt-er", 4),
        ("rt-er-official", 2),
        pytest.param("jtd-moe", 4, marks=pytest.mark.slow),
        pytest.param("jtd-moe-official", 4, marks=pytest.mark.slow),
    ],
)
def test_one_training_step_at_full_size(name: str, experts: int) -> None:
    """Two images of 3×32×32 through ResNet-18 experts; an attack of one step."""
    torch.manual_seed(0)
    entry = MODELS.get(name)
    assert entry.recipe is not None
    recipe = replace(entry.recipe, attack_steps=1)
    model = entry.make(10, CIFAR, experts=experts).train()
    adversary = TrainingAdversary(model, ThreatModel("Linf", 8 / 255), recipe, seed=0)
    for phase in entry.objective:
        loss = phase.loss(model, images(2, CIFAR), torch.tensor([3, 7]), adversary, recipe)
        assert torch.isfinite(loss)
        torch.autograd.backward(loss)
        gradients = [parameter.grad for parameter in phase.parameters(model) if parameter.grad is not None]
        assert gradients and all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        assert any(bool((gradient != 0).any()) for gradient in gradients)


# --- settings


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet18-at", {"depth": 20}, "depth of a ResNet must be 18, 34 or 50, got 20"),
        ("resnet18-at", {"width": 0}, "width of a ResNet must be at least 1 channel, got 0"),
        ("wrn-at", {"depth": 20}, r"must be 6n \+ 4 \(10, 16, 22, 28, …\), got 20"),
        ("wrn-at", {"width": 0}, "widening factor of a WideResNet must be at least 1, got 0"),
        ("vgg-at", {"depth": 12}, "depth of a VGG must be 11, 13, 16 or 19, got 12"),
        ("vgg-at", {"width": 0}, "width of a VGG must be at least 1 channel, got 0"),
        ("rt-er", {"expert": "mlp"}, "expert must be 'auto', 'resnet' or 'vit', got 'mlp'"),
    ],
)
def test_impossible_setting_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        MODELS.get(name).make(10, DIGITS, **settings)
    assert "\n" not in str(caught.value)


def test_a_transformer_needs_square_images_of_whole_patches() -> None:
    for shape in ((3, 32, 30), (3, 30, 30), (1, 7, 7)):
        with pytest.raises(UsageError, match="a ViT needs square images whose side is a multiple of its patch"):
            MODELS.get("rt-er").make(10, shape, expert="vit")


def test_experts_are_transformers_on_large_images_or_on_request() -> None:
    def kind(shape: tuple[int, int, int], **settings: Any) -> str:
        with torch.device("meta"):
            model = MODELS.get("rt-er").make(10, shape, **settings)
        assert isinstance(model, ClassifierMoE)
        return type(model.moe.experts[0]).__name__

    assert kind(DIGITS) == kind(CIFAR) == kind((3, 64, 64)) == kind(LARGE, expert="resnet") == "ResNet"
    assert kind(LARGE) == kind((3, 96, 96)) == kind(CIFAR, expert="vit") == "VisionTransformer"


def test_dual_model_takes_its_alphas() -> None:
    torch.manual_seed(0)
    x, base = images(3), MODELS.get("dual-moe").make(10, DIGITS).eval()
    assert isinstance(base, DualModel)
    for alpha in (0.7, 0.8, 0.9):
        model = MODELS.get("dual-moe").make(10, DIGITS, alpha=alpha).eval()
        model.load_state_dict(base.state_dict())
        torch.testing.assert_close(model(x), (1 - alpha) * base.standard(x) + alpha * base.robust(x))


# --- JTDMoE as its code has it


def test_official_joint_loss_is_its_formula() -> None:
    """In eval mode, where BatchNorm does not couple the images, the one pass must equal a pass each."""
    torch.manual_seed(0)
    entry = MODELS.get("jtd-moe-official")
    assert entry.recipe is not None
    model = entry.make(10, DIGITS, experts=3).eval()
    assert isinstance(model, DualModel)
    x, y = images(6), torch.arange(6)
    adversary = Shift(0.1, -0.05, 0.02, 0.2)
    found = all_experts_loss(model, x, y, adversary, entry.recipe)  # type: ignore[arg-type]
    assert len(adversary.forwards) == 4
    expected = F.cross_entropy(model.robust((x + 0.1).clamp(0, 1)), y)
    for expert, delta in zip(model.robust.moe.experts, (-0.05, 0.02, 0.2), strict=True):
        clean, attacked = (expert(model.robust.normalize(z)) for z in (x, (x + delta).clamp(0, 1)))
        expected = expected + 6.0 * kl_divergence(clean, attacked).mean()
    torch.testing.assert_close(found, expected)
    for number, forward in enumerate(adversary.forwards[1:]):
        torch.testing.assert_close(forward(x), model.robust.moe.experts[number](model.robust.normalize(x)))


# --- the vote


def test_majority_counts_and_ties_go_to_the_likelier_class() -> None:
    members = torch.tensor([
        # three votes for class 2; two each for 0 and 1, of which the voters for 1 are surer
        [[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]],
        [[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]],
        [[0.0, 0.0, 1.0], [0.0, 9.0, 0.0]],
        [[99.0, 0.0, 0.0], [0.0, 9.0, 0.0]],
    ])  # fmt: skip
    out = majority_vote(members)
    assert out.argmax(dim=1).tolist() == [2, 1]
    torch.testing.assert_close(out, out.floor() + members.softmax(2).mean(0))
    assert out.floor().tolist() == [[1, 0, 3], [2, 2, 0]]


def test_unanimous_members_have_a_gradient_however_sure_they_are() -> None:
    members = torch.tensor([[[80.0, 0.0, 0.0, 0.0]], [[200.0, 0.0, 0.0, 0.0]]], requires_grad=True)
    F.cross_entropy(majority_vote(members), torch.tensor([0])).backward()  # type: ignore[no-untyped-call]
    assert members.grad is not None
    assert bool((members.grad[:, 0, 0] < -1e-4).all()) and bool((members.grad[:, 0, 1:] > 1e-5).all())


def test_vote_of_the_model_is_that_of_its_members() -> None:
    members: list[nn.Module] = [Flat(64, 10, seed) for seed in range(5)]
    model, x = Ensemble(members, "vote").eval(), images(64)
    choices = model.member_logits(x).argmax(dim=2)
    votes = F.one_hot(choices, 10).sum(dim=0)
    predicted = model(x).argmax(dim=1)
    assert bool((votes.gather(1, predicted.unsqueeze(1)).squeeze(1) == votes.amax(dim=1)).all())
    assert len(set(predicted.tolist())) > 1

"""The dense baselines, the vote and the RT-ER family: sizes at full scale, and what is peculiar to each."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Flat, Shift
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.datasets import load_dataset
from moebench.errors import UsageError
from moebench.models import MODELS, ModelEntry
from moebench.models._moe import moe_layers
from moebench.models._objectives import kl_divergence
from moebench.models.ensemble import Ensemble, majority_vote
from moebench.models.rt_er import ClassifierMoE, DualModel, all_experts_loss
from moebench.schema import ThreatModel
from moebench.train import Trainer, TrainSpec
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


FAMILY = {f"moebench.models.{name}" for name in ("adv_moe", "ensemble", "resnet", "rt_er", "soe")}


def trained_alike() -> list[str]:
    """One name for each way to train each network of the family; only numbers of the recipe may differ from it."""
    first: dict[Any, str] = {}
    for name in MODELS.names():
        entry = MODELS.get(name)
        if entry.build.__module__ in FAMILY and entry.objective:
            losses = tuple((str(phase.loss), phase.part) for phase in entry.objective)
            first.setdefault((entry.build, tuple(sorted(entry.settings.items())), losses), name)
    return list(first.values())


def take_a_step(model: nn.Module, entry: ModelEntry, shape: tuple[int, int, int]) -> None:
    """Every phase of the objective takes its step on two images, and moves its own part of the model alone."""
    assert entry.recipe is not None
    brief = {"attack_steps": 1, **({"inner_steps": 1} if hasattr(entry.recipe, "inner_steps") else {})}
    recipe = replace(entry.recipe, **brief)
    adversary = TrainingAdversary(model.train(), ThreatModel("Linf", 8 / 255), recipe, seed=0)
    x, y = images(2, shape), torch.tensor([3, 7])
    for phase in entry.objective:
        own = {id(parameter) for parameter in phase.parameters(model)}
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        loss = phase.loss(model, x, y, adversary, recipe)
        assert torch.isfinite(loss)
        torch.autograd.backward(loss)
        torch.optim.SGD(phase.parameters(model), lr=0.1).step()
        moved = 0
        for name, parameter in model.named_parameters():
            assert bool(torch.isfinite(parameter).all()), name
            changed = not torch.equal(before[name], parameter)
            assert id(parameter) in own or not changed, name
            moved += changed
        assert moved > 0


@pytest.mark.parametrize("name", trained_alike())
def test_one_training_step_at_full_size(name: str) -> None:
    """3×32×32 images through the networks of the papers, with all their experts; an attack of one step."""
    torch.manual_seed(0)
    entry = MODELS.get(name)
    take_a_step(entry.make(10, CIFAR), entry, CIFAR)


def test_one_training_step_of_two_trunks_at_full_size() -> None:
    torch.manual_seed(0)
    entry = MODELS.get("soe")
    model = entry.make(10, CIFAR, confidence="complex")
    # Of ResNet-20 and its 64 -> 1 instead of 64 -> 10, without the stem.
    assert parameters(model) == 3 * (272_474 + 272_474 - 9 * 65 - 3 * 16 * 9 - 2 * 16)
    take_a_step(model, entry, CIFAR)


@pytest.mark.parametrize("name", ["st-moe", "rt-er"])
def test_one_training_step_of_vit_small_experts(name: str) -> None:
    torch.manual_seed(0)
    entry = MODELS.get(name)
    take_a_step(entry.make(200, LARGE), entry, LARGE)


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


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.5, 0.7, 0.9, 1.0])
def test_dual_model_mixes_probabilities_on_request(alpha: float) -> None:
    torch.manual_seed(0)
    x, model = images(5), MODELS.get("dual-moe").make(10, DIGITS, alpha=alpha, mixing="probabilities").eval()
    assert isinstance(model, DualModel)
    for half in (model.standard, model.robust):
        for expert in half.moe.experts:
            expert.get_parameter("fc.weight").mul_(10)
    standard, robust = model.standard(x), model.robust(x)
    mixed = (1 - alpha) * standard.softmax(1) + alpha * robust.softmax(1)
    torch.testing.assert_close(model(x).exp(), mixed)
    torch.testing.assert_close(model.mix(model.expert_outputs(x), model.route(x)), model(x))
    logits = (1 - alpha) * standard + alpha * robust
    assert alpha == 1 or not torch.allclose(model(x).exp(), logits.softmax(1), atol=1e-3)


def test_a_sure_standard_half_outvotes_the_robust_one_in_logits_only() -> None:
    """What the certificate presumes: a margin of F_R above (1 - alpha) / alpha decides, whatever F_S says."""
    robust, standard = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 90.0]])
    for mixing, winner in (("logits", 1), ("probabilities", 0)):
        model = MODELS.get("dual-moe").make(2, DIGITS, alpha=0.7, mixing=mixing)
        assert isinstance(model, DualModel)
        assert int(model._combine(standard, robust).argmax(1)) == winner
    with pytest.raises(UsageError, match="mixing must be 'logits' or 'probabilities', got 'votes'"):
        MODELS.get("dual-moe").make(10, DIGITS, mixing="votes")


def test_what_the_paper_says_is_the_default_and_what_the_code_does_is_named() -> None:
    """Router, experts, k, beta and alpha of every registered variant."""
    for name in MODELS.names():
        entry = MODELS.get(name)
        if entry.build.__module__ != "moebench.models.rt_er":
            continue
        official = name.endswith("-official")
        model = entry.make(10, DIGITS)
        assert not isinstance(model, DualModel) or (model.alpha, model.mixing) == (0.7, "logits")
        for layer in moe_layers(model).values():
            count = re.search(r"-e(\d)$", name)
            assert len(layer.experts) == (int(count[1]) if count else 4)
            assert layer.top_k == (2 if name.endswith("top2") else 1)
            assert layer.router_mode == ("frozen" if official else "trained")
            assert all(parameter.requires_grad != official for parameter in layer.router.parameters())
        assert entry.recipe is not None
        sweep = re.search(r"-beta(\d)$", name)
        assert entry.recipe.beta == (float(sweep[1]) if sweep else 6.0)
        assert entry.recipe.attack_steps * entry.recipe.step_fraction == 2.5, "PGD-10 with steps of eps / 4"
        assert entry.recipe.balance == (0.0 if official or not entry.objective else 0.1)
        started = {"standard": "st-moe", "robust": "rt-er"} if name in ("dual-moe", "jtd-moe") else {}
        assert dict(entry.recipe.init_from) == started


# --- JTDMoE, and as its code has it


def test_joint_training_moves_each_half_by_its_own_step_alone(tmp_path: Path) -> None:
    """Nothing of the standard half's gradient or momentum is left over for the next robust step, and vice versa."""
    sets = load_dataset("digits", split="train"), load_dataset("digits", split="val")
    torch.manual_seed(0)
    entry = MODELS.get("jtd-moe")
    assert entry.recipe is not None
    recipe = replace(entry.recipe, epochs=1, cycles=1, attack_steps=1)
    model = entry.make(10, DIGITS, experts=3).train()
    trainer = Trainer(model, entry, recipe, *sets, TrainSpec("jtd-moe", "digits", tmp_path), {})
    x, y = trainer.x[:20], trainer.y[:20]
    trainer.learner.step(x, y, [True, True])
    for active, still in (([True, False], "standard"), ([False, True], "robust")):
        # Buffers too: a half that is not trained keeps the BatchNorm statistics of its own training.
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer.learner.step(x, y, active)
        moved = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
        assert moved and not any(name.startswith(still) for name in moved)


def test_official_joint_loss_is_its_formula() -> None:
    """In eval mode, where BatchNorm does not couple the images, the one pass must equal a pass each."""
    torch.manual_seed(0)
    entry = MODELS.get("jtd-moe-official")
    assert entry.recipe is not None
    model = entry.make(10, DIGITS, experts=3).eval()
    assert isinstance(model, DualModel)
    with torch.no_grad():
        # Large logits, so that the divergence of p from q is not nearly that of q from p.
        for expert in model.robust.moe.experts:
            expert.get_parameter("fc.weight").mul_(30)
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

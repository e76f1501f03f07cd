"""BlockMoE and ConvMoE: architecture at full size, training steps, and routing in depth."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import Noted
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.attacks._views import applicable_views, make_view
from moebench.commands._options import parse_settings
from moebench.errors import UsageError
from moebench.models import MODELS, robust_experts
from moebench.models._balancing import switch_loss
from moebench.models._moe import MoELayer, forced_forward, moe_layers, record, soft_route, split_forward, top_experts
from moebench.models._output_variance import output_variance_loss
from moebench.models.robust_experts import BALANCING, LayerMoE, LayerMoERecipe
from moebench.optimizers import make_optimizer, make_schedule
from moebench.parts import part_of
from moebench.schema import ThreatModel
from moebench.train import split_settings
from moebench.training_adversary import TrainingAdversary

DIGITS, CIFAR, IMAGENET = (1, 8, 8), (3, 32, 32), (3, 224, 224)
NAMES = [name for name in MODELS.names() if MODELS.get(name).build.__module__ == "moebench.models.robust_experts"]
LOSSES = {"switch": "switch", "entropy": "entropy", "colent": "column-entropy"}


def make(name: str, shape: tuple[int, int, int] = DIGITS, classes: int = 10, **settings: Any) -> LayerMoE:
    torch.manual_seed(0)
    model = MODELS.get(name).make(classes, shape, **settings)
    assert isinstance(model, LayerMoE)
    return model


def images(batch: int, shape: tuple[int, int, int] = DIGITS, seed: int = 0) -> Tensor:
    return torch.rand(batch, *shape, generator=torch.Generator().manual_seed(seed))


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def lively(name: str, **settings: Any) -> LayerMoE:
    """In eval mode, with BatchNorm statistics that are not those of the start."""
    model = make(name, **settings).train()
    with torch.no_grad():
        model(images(64, seed=9))
    return model.eval()


def undecided(name: str) -> LayerMoE:
    """Gates that favour no expert, so that images differ in their routes; those of fresh gates are all the same."""
    model = lively(name, gate="gap-fc")
    with torch.no_grad():
        for layer_name, layer in moe_layers(model).items():
            bias = layer.router.get_parameter("2.bias")
            bias -= record(model, images(64, seed=9), soft=True)[layer_name].weights.log().mean(0)
    return model


def recipe_of(name: str, **changes: Any) -> LayerMoERecipe:
    recipe = MODELS.get(name).recipe
    assert isinstance(recipe, LayerMoERecipe)
    return replace(recipe, **changes)


# --- architecture

BLOCKS = {
    # ResNet-18, last stage: 256 -> 512 with a shortcut, and 512 -> 512; two 3×3 convolutions and BatchNorms each.
    "resnet18": (
        11_220_132,
        (9 * 256 * 512 + 9 * 512 * 512 + 256 * 512 + 3 * 1024, 2 * 9 * 512 * 512 + 2 * 1024),
        (256, 512),
    ),
    # ResNet-50: three bottlenecks of width 512 (WideResNet-50-2: 1024) and 2048 outputs.
    "resnet50": (
        23_705_252,
        (
            1024 * 512 + 9 * 512 * 512 + 512 * 2048 + 1024 * 2048 + 2 * 1024 + 2 * 4096,
            *2 * (2048 * 512 + 9 * 512 * 512 + 512 * 2048 + 2 * 1024 + 4096,),
        ),
        (1024, 2048, 2048),
    ),
    "wide-resnet50": (
        67_031_460,
        (
            1024 * 1024 + 9 * 1024 * 1024 + 1024 * 2048 + 1024 * 2048 + 2 * 2048 + 2 * 4096,
            *2 * (2048 * 1024 + 9 * 1024 * 1024 + 1024 * 2048 + 2 * 2048 + 4096,),
        ),
        (1024, 2048, 2048),
    ),
}  # fmt: skip


@pytest.mark.parametrize("backbone", BLOCKS)
@pytest.mark.parametrize(("gate", "per_channel"), [("gap-fc", 4), ("conv-gap", 36)])
def test_full_size_block_moes_have_the_papers_parameters(backbone: str, gate: str, per_channel: int) -> None:
    dense, blocks, channels = BLOCKS[backbone]
    with torch.device("meta"):
        model = make("block-moe-switch", CIFAR, 100, backbone=backbone, gate=gate)
    gates = per_channel * sum(channels) + (4 * len(channels) if gate == "gap-fc" else 0)
    assert parameters(model) == dense + 3 * sum(blocks) + gates
    assert list(moe_layers(model)) == [f"network.layer4.{number}" for number in range(len(blocks))]


def test_full_size_conv_moe_mixes_every_convolution_of_the_last_stage() -> None:
    with torch.device("meta"):
        model = make("conv-moe", CIFAR, 100, gate="gap-fc")
        alone = make("conv-moe", CIFAR, 100, gate="gap-fc", shortcut=False)
    convolutions = 9 * 256 * 512 + 3 * 9 * 512 * 512
    assert parameters(model) == 11_220_132 + 3 * (convolutions + 256 * 512) + 4 * (2 * 256 + 3 * 512) + 5 * 4
    assert parameters(alone) == 11_220_132 + 3 * convolutions + 4 * (256 + 3 * 512) + 4 * 4
    assert list(moe_layers(model)) == [
        "network.layer4.0.conv1", "network.layer4.0.conv2", "network.layer4.0.downsample.0",
        "network.layer4.1.conv1", "network.layer4.1.conv2",
    ]  # fmt: skip
    # BatchNorm stays outside, one for all experts.
    assert not any(isinstance(part, nn.BatchNorm2d) for layer in moe_layers(model).values() for part in layer.modules())


@pytest.mark.parametrize(
    ("name", "where", "expected"),
    [
        ("block-moe-switch", "last-1st", ["layer3.0"]),
        ("block-moe-switch", "last-2nd", ["layer3.1"]),
        ("block-moe-switch", "last-both", ["layer3.0", "layer3.1"]),
        ("block-moe-switch", "prev-2nd", ["layer2.1"]),
        ("block-moe-switch", "prev-all", ["layer2.0", "layer2.1"]),
        ("conv-moe", "last-1st", ["layer3.0.conv1"]),
        ("conv-moe", "last-4th", ["layer3.1.conv2"]),
        ("conv-moe", "prev-both", ["layer2.0.conv1", "layer2.0.conv2"]),
    ],
)
def test_where_says_what_is_mixed(name: str, where: str, expected: list[str]) -> None:
    model = make(name, where=where)
    assert list(moe_layers(model)) == [f"network.{part}" for part in expected]
    assert model(images(2)).shape == (2, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"where": "last"}, "where must be last- or prev- .* got 'last'"),
        ({"where": 3}, "where must be"),
        ({"where": "last-3rd"}, "where='last-3rd' is not there: layer3 has 2 blocks"),
        ({"backbone": "resnet34"}, "backbone must be one of auto, small"),
        ({"gate": "linear"}, "gate must be one of"),
        ({"top_k": 5}, "top_k must be between 1 and the 4 experts"),
        ({"experts": "four"}, "cannot be built with experts='four'"),
        ({"noise": "much"}, "cannot be built with noise='much'"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make("block-moe-switch", **settings)
    assert "\n" not in str(caught.value)


class Reached(Exception):
    """The MoE layer has been reached."""


def test_the_image_size_picks_network_and_stem() -> None:
    sides: list[int] = []

    def stop(layer: nn.Module, given: tuple[Tensor]) -> None:
        sides.append(given[0].shape[2])
        raise Reached

    for shape in (DIGITS, CIFAR, (3, 64, 64), IMAGENET, (1, 96, 96)):
        with torch.device("meta"):
            model = make("block-moe-single", shape).eval()
            (layer,) = moe_layers(model).values()
            layer.register_forward_pre_hook(stop)
            with pytest.raises(Reached):
                model(torch.zeros(2, *shape))
    assert sides == [4, 4, 8, 7, 3]


def test_experts_are_fresh_copies() -> None:
    for name in ("block-moe-switch", "conv-moe"):
        for layer in moe_layers(make(name)).values():
            kernels = [
                next(part for part in expert.modules() if isinstance(part, nn.Conv2d)) for expert in layer.experts
            ]
            assert len({kernel.weight.sum().item() for kernel in kernels}) == len(kernels) == 4
            shape = kernels[0].weight.shape
            wanted = (2 / (shape[0] * shape[2] * shape[3])) ** 0.5
            assert all(kernel.weight.std().item() == pytest.approx(wanted, rel=0.15) for kernel in kernels)


def test_names_say_loss_and_training() -> None:
    assert len(NAMES) == 14
    for name in NAMES:
        entry = MODELS.get(name)
        recipe = recipe_of(name)
        loss = next(
            (full for short, full in LOSSES.items() if short in name), "switch" if "single" in name else "entropy"
        )
        assert (recipe.balance_loss, recipe.balance) == (loss, 0.1 if name == "conv-moe" else 0.5)
        assert (entry.settings.get("noise", 0.0) == 0) == (loss == "entropy")
        training = next((how for how in ("fast-at", "free-at") if name.endswith(how)), "adversarial")
        assert (entry.training, recipe.select) == (
            ("standard", "clean") if name.endswith("-st") else (training, "robust")
        )
        assert recipe.attack_steps == 7 and recipe.step_fraction == 0.25 and recipe.batch_size >= 16 * 4


def test_settings_of_model_and_recipe_are_told_apart() -> None:
    given = {"gate": "gap-fc", "balance_loss": "variance", "noise": 0.2, "attack_mode": "train"}
    model, recipe = split_settings("block-moe-switch", given)
    assert (set(model), set(recipe)) == ({"gate", "noise"}, {"balance_loss", "attack_mode"})
    for key, value in (("balance_loss", "swich"), ("attack_mode", "both"), ("output_variance", "much")):
        with pytest.raises(UsageError, match=f"{key} .*must be .*got '{value}'"):
            recipe_of("conv-moe", **{key: value})


# --- training


def adversary_for(model: nn.Module, recipe: LayerMoERecipe) -> TrainingAdversary:
    return TrainingAdversary(model, ThreatModel("Linf", 0.2), recipe, seed=0)


@pytest.mark.parametrize("balance_loss", BALANCING)
def test_loss_is_cross_entropy_plus_alpha_times_the_balancing_losses(balance_loss: str) -> None:
    model = lively("block-moe-entropy")
    recipe = recipe_of("block-moe-entropy", balance_loss=balance_loss, attack_steps=2)
    x, y = images(32), torch.arange(32) % 10
    (phase,) = MODELS.get("block-moe-entropy").objective
    found = phase.loss(model, x, y, adversary_for(model, recipe), recipe)
    x_adv = adversary_for(model, recipe)(model, x, lambda logits: F.cross_entropy(logits, y, reduction="none"))
    tape = record(model, x_adv, soft=True)
    assert list(tape) == ["network.layer3.0", "network.layer3.1"]
    extra = sum(BALANCING[balance_loss](routing.weights) for routing in tape.values())
    torch.testing.assert_close(found, F.cross_entropy(model(x_adv), y) + 0.5 * extra)


def test_load_of_the_switch_loss_is_that_of_the_likeliest_expert() -> None:
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    chosen = torch.tensor([[True, False, False], [False, True, False]])
    assert float(BALANCING["switch"](probs)) == pytest.approx(float(switch_loss(probs, chosen)))
    assert float(BALANCING["switch"](probs)) == pytest.approx(3 * (0.5 * 0.4 + 0.5 * 0.4) - 1)


@pytest.mark.parametrize("name", ["block-moe-switch", "conv-moe-colent"])
@pytest.mark.parametrize(("mode", "seen"), [("eval", 1), ("train", 4)])
def test_batch_norm_sees_each_image_once_unless_asked_otherwise(name: str, mode: str, seen: int) -> None:
    model = make(name, gate="double-conv-gap").train()
    recipe = recipe_of(name, attack_steps=3, attack_mode=mode)
    rows = {layer: [0] * 4 for layer in moe_layers(model)}

    def count(layer: str, number: int) -> Any:
        def hook(expert: nn.Module, given: tuple[Tensor]) -> None:
            rows[layer][number] += len(given[0]) * expert.training

        return hook

    for layer_name, layer in moe_layers(model).items():
        for number, expert in enumerate(layer.experts):
            expert.register_forward_pre_hook(count(layer_name, number))
    x, y = images(64), torch.arange(64) % 10
    (phase,) = MODELS.get(name).objective
    phase.loss(model, x, y, adversary_for(model, recipe), recipe)
    outside = [part for key, part in model.named_modules() if isinstance(part, nn.BatchNorm2d) and "experts" not in key]
    assert len(outside) > 5
    assert {int(part.num_batches_tracked or 0) for part in outside} == {seen}
    assert all(sum(counts) == seen * 64 for counts in rows.values())
    assert model.training


@pytest.mark.parametrize("name", ["block-moe-single", "conv-moe"])
def test_one_step_on_random_images_of_32_pixels(name: str) -> None:
    where = "last-2nd" if name == "block-moe-single" else "last-1st"
    model = make(name, CIFAR, 100, where=where, experts=2).train()
    recipe = recipe_of(name, attack_steps=1)
    x, y = images(4, CIFAR), torch.tensor([3, 14, 15, 92])
    (phase,) = MODELS.get(name).objective
    optimizer = torch.optim.SGD(phase.parameters(model), lr=0.01)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    loss = phase.loss(model, x, y, adversary_for(model, recipe), recipe)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    moved = {key for key, value in model.named_parameters() if not torch.equal(before[key], value)}
    (layer,) = moe_layers(model)
    assert torch.isfinite(loss)
    assert {"network.conv1.weight", "network.fc.weight", f"{layer}.router.conv.weight"} <= moved
    assert all(bool(torch.isfinite(value).all()) for value in model.parameters())


class Asked(Noted):
    """Notes the images that Free AT carries as well."""

    def carried(self, x: Tensor) -> Tensor:
        self.asked.append({"carried": True})
        return x


@pytest.mark.parametrize(
    ("name", "asked", "radius", "replays"),
    [
        ("block-moe-switch-st", [], 8, 1),
        ("conv-moe-st", [], 8, 1),
        # PGD-7 with steps of 2/255 from a random start: nothing is asked for but what the recipe says.
        ("block-moe-switch", [{}], 8, 1),
        ("block-moe-single", [{}], 8, 1),
        ("conv-moe", [{}], 8, 1),
        ("block-moe-switch-fast-at", [{"steps": 1, "step_size": 4 / 255, "from_clean": True}], 4, 1),
        ("block-moe-switch-free-at", [{"carried": True}], 4, 4),
    ],
)
def test_training_is_the_papers_at_its_radius(
    name: str, asked: list[dict[str, Any]], radius: int, replays: int
) -> None:
    entry, recipe = MODELS.get(name), recipe_of(name)
    adversary = Asked(0.0, eps=recipe.eps_fraction * 8 / 255)
    (phase,) = entry.objective
    phase.loss(make(name).eval(), images(8), torch.arange(8), adversary, recipe)
    assert len(adversary.asked) == len(asked)
    for found, expected in zip(adversary.asked, asked, strict=True):
        assert found == pytest.approx(expected)
    assert adversary.eps == pytest.approx(radius / 255) and recipe.replays == replays
    assert recipe.step_fraction * 8 / 255 == pytest.approx(2 / 255) and recipe.attack_steps == 7


def test_documented_command_is_the_papers_recipe() -> None:
    (words,) = re.findall(r"moebench train ((?:.*\n)(?: {8}.*\n)*)", robust_experts.__doc__ or "")
    parts = shlex.split(words)
    pairs = [parts[place + 1] for place, word in enumerate(parts) if word == "--set"]
    model, changes = split_settings(parts[1], parse_settings(tuple(pairs)))
    recipe = recipe_of(parts[1], **changes, epochs=int(parts[parts.index("--epochs") + 1]))
    assert (parts[1], model) == ("block-moe-switch", {})
    assert (recipe.optimizer, recipe.nesterov, recipe.momentum, recipe.weight_decay) == ("sgd", True, 0.9, 5e-4)
    assert (recipe.epochs, recipe.batch_size, recipe.balance, recipe.attack_steps) == (200, 640, 0.5, 7)
    assert (recipe.translate, recipe.flip) == (4, True)
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))], recipe)
    schedule = make_schedule(optimizer, recipe, steps=10)
    for step in range(10):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * (1 - step / 10) ** 0.9)
        optimizer.step()
        schedule.step()


# --- expert-output variance


def test_output_variance_is_its_formula() -> None:
    means = torch.tensor([0.1, -0.4, 0.7, 0.2])
    mean = (0.1 - 0.4 + 0.7 + 0.2) / 4
    variance = sum((one - mean) ** 2 for one in (0.1, -0.4, 0.7, 0.2)) / 3
    assert float(output_variance_loss(means)) == pytest.approx(1 - math.sqrt(variance + 1e-4))
    assert float(output_variance_loss(torch.zeros(4))) == pytest.approx(0.99)
    assert float(output_variance_loss(torch.tensor([-2.0, 2.0]))) == 0


@pytest.mark.parametrize(("name", "attack_mode"), [("block-moe-entropy", "eval"), ("block-moe-entropy-st", "train")])
def test_output_variance_is_of_the_experts_mean_outputs(name: str, attack_mode: str) -> None:
    model = undecided(name)
    recipe = recipe_of(name, attack_steps=2, attack_mode=attack_mode)
    x, y = images(32), torch.arange(32) % 10
    (phase,) = MODELS.get(name).objective
    plain = phase.loss(model, x, y, adversary_for(model, recipe), recipe)
    found = phase.loss(model, x, y, adversary_for(model, recipe), replace(recipe, output_variance=2.0))
    seen = x
    if not name.endswith("-st"):
        seen = adversary_for(model, recipe)(model, x, lambda logits: F.cross_entropy(logits, y, reduction="none"))
    expected = 0.0
    network, first, second = modules_of(model)
    features = trunk(network, seen)
    for layer in (first, second):
        chosen = layer.router(features).argmax(1)
        outputs = one_by_one(layer, features, chosen)
        groups = [outputs[chosen == number] for number in range(4)]
        means = torch.stack([group.mean() if len(group) else torch.zeros(()) for group in groups])
        expected += max(0.0, 1 - math.sqrt(means.detach().var().item() + 1e-4))
        features = outputs
    assert expected > 0
    assert (found - plain).item() == pytest.approx(2 * expected, abs=1e-4)
    torch.autograd.backward(found - plain)
    gradients = [parameter.grad for parameter in second.experts.parameters() if parameter.grad is not None]
    assert any(float(gradient.abs().max()) > 0 for gradient in gradients)
    assert not any(part._forward_hooks for part in model.modules())


# --- evaluation


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_judged_alone_as_in_a_batch(name: str) -> None:
    model = lively(name, capacity=1.0, noise=0.5).double()
    x = images(24).double()
    together = model(x)
    torch.testing.assert_close(torch.cat([model(x[i : i + 1]) for i in range(24)]), together)
    torch.testing.assert_close(model(x.flip(0)).flip(0), together)
    assert torch.equal(model(x), together)


def modules_of(model: LayerMoE) -> tuple[nn.Module, MoELayer, MoELayer]:
    first, second = moe_layers(model).values()
    return model.network, first, second


@torch.no_grad()
def trunk(network: nn.Module, x: Tensor) -> Tensor:
    """What the last stage of the digits' network gets, written out."""
    out = F.relu(network.get_submodule("bn1")(network.get_submodule("conv1")(2 * x - 1)))
    return network.get_submodule("layer2")(network.get_submodule("layer1")(out))  # type: ignore[no-any-return]


@torch.no_grad()
def one_by_one(layer: MoELayer, features: Tensor, chosen: Tensor) -> Tensor:
    return torch.cat([layer.experts[int(i)](features[b : b + 1]) for b, i in enumerate(chosen)])


@torch.no_grad()
def test_split_forward_in_depth_is_its_definition() -> None:
    """RA-R and RA-E of layers behind each other: the router's image decides in both layers, by its own features."""
    model = undecided("block-moe-switch")
    network, first, second = modules_of(model)
    a, b = images(40, seed=1), images(40, seed=2)
    # The route of image a, along its own path.
    at_first = trunk(network, a)
    one = first.router(at_first).argmax(1)
    two = second.router(one_by_one(first, at_first, one)).argmax(1)
    # Image b on the route of image a.
    through = one_by_one(second, one_by_one(first, trunk(network, b), one), two)
    torch.testing.assert_close(split_forward(model, a, b), network.get_submodule("fc")(through.mean((2, 3))))
    own_one = first.router(trunk(network, b)).argmax(1)
    own_two = second.router(one_by_one(first, trunk(network, b), own_one)).argmax(1)
    assert not torch.equal(own_one, one) and not torch.equal(own_two, two), "the two images must differ in both layers"
    assert len(set(one.tolist())) > 1 and len(set(two.tolist())) > 1
    torch.testing.assert_close(split_forward(model, b, b), model(b))


def test_soft_routing_in_depth_has_a_gradient_through_the_first_layers_choice() -> None:
    model = undecided("block-moe-switch").requires_grad_(False)
    x = images(6).requires_grad_()
    soft, hard = soft_route(model, x), record(model, x)
    for name, routing in soft.items():
        assert torch.equal(top_experts(routing.weights, 1), hard[name].selected)
    first, second = soft.values()
    weight = second.weights[torch.arange(6), first.weights.argmax(1)]
    (whole,) = torch.autograd.grad(weight.sum(), x, retain_graph=True)
    # Cut where the first layer chooses, the gradient is another one.
    (cut,) = torch.autograd.grad(
        record(model, x, soft=True)["network.layer3.1"].weights[torch.arange(6), first.weights.argmax(1)].sum(), x
    )
    assert bool(torch.isfinite(whole).all()) and float((whole - cut).abs().max()) > 0


@pytest.mark.parametrize("name", ["block-moe-switch", "conv-moe"])
def test_soft_routing_without_a_gradient_is_the_same_and_runs_selected_experts_alone(name: str) -> None:
    model, x = undecided(name).requires_grad_(False), images(20)
    layers = moe_layers(model)
    runs = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal runs
        runs += len(output)

    for layer in layers.values():
        for expert in layer.experts:
            expert.register_forward_hook(count)
    with_gradient, runs_with = soft_route(model, x.requires_grad_()), runs
    runs = 0
    with torch.no_grad():
        without = soft_route(model, x)
    for layer_name, routing in without.items():
        torch.testing.assert_close(routing.weights, with_gradient[layer_name].weights)
    assert (runs_with, runs) == (4 * 20 * len(layers), 20 * len(layers))


@torch.no_grad()
@pytest.mark.parametrize("name", ["block-moe-switch", "conv-moe"])
def test_a_fixed_expert_is_a_view_and_a_model_of_its_own(name: str) -> None:
    model, x = undecided(name), images(20)
    views = [view for view in applicable_views(model) if view.startswith("expert[")]
    assert len(views) == 4 * len(moe_layers(model))
    last = list(moe_layers(model))[-1]
    for number in range(4):
        part = f"expert[{last}:{number}]"
        assert part in views
        alone = part_of(model, part, name)
        forced = forced_forward(model, x, number, last)
        torch.testing.assert_close(make_view(part, model).logits(x, torch.arange(20)), forced)
        torch.testing.assert_close(alone(x), forced)
        assert len(moe_layers(alone)) == len(moe_layers(model)) - 1
        assert parameters(alone) < parameters(model)
    routed = record(model, x)[last].weights.argmax(1)
    assert len(set(routed.tolist())) > 1
    answers = torch.stack([forced_forward(model, x, number, last) for number in range(4)])
    torch.testing.assert_close(answers[routed, torch.arange(20)], model(x))

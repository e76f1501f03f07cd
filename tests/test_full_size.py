"""The networks of the papers at their own size: parameters as published or counted by hand, and one step of training.

Everything is allocated, at most 0.2 billion parameters at a time; two or four random images, an attack of one step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moebench.models import MODELS
from moebench.models._base import Phase, Recipe
from moebench.models._moe import moe_layers
from moebench.schema import ThreatModel
from moebench.training_adversary import TrainingAdversary

CIFAR = (3, 32, 32)
RESNET18 = 11_173_962

# torchvision's networks with a 3×3 stem and 100 classes.
DENSE = {"resnet18": 11_220_132, "resnet50": 23_705_252, "wide-resnet50": 67_031_460}


def bottlenecks(width: int) -> tuple[int, int]:
    """Convolutions and BatchNorms of the last stage of a ResNet-50 whose 3×3 convolutions have `width` channels."""
    first = 1024 * width + 9 * width**2 + width * 2048 + 1024 * 2048
    others = 2 * (2048 * width + 9 * width**2 + width * 2048)
    return first + others, 3 * 2 * (2 * width + 2048) + 2 * 2048


def stage(backbone: str) -> tuple[int, int]:
    """Convolutions and BatchNorms of the last stage."""
    if backbone == "resnet18":
        return 9 * 256 * 512 + 3 * 9 * 512 * 512 + 256 * 512, 5 * 2 * 512
    return bottlenecks(512 if backbone == "resnet50" else 1024)


def gate_channels(backbone: str, kind: str) -> tuple[int, ...]:
    """Input channels of every gate."""
    if backbone == "resnet18":
        return (256, 512) if kind == "block" else (256, 512, 512, 512, 256)
    width = 512 if backbone == "resnet50" else 1024
    if kind == "block":
        return 1024, 2048, 2048
    return 1024, width, width, 1024, *2 * (2048, width, width)


def mixed(backbone: str, kind: str) -> int:
    """Parameters with four experts and Conv-GAP gates: BatchNorm is copied in blocks only."""
    convolutions, norms = stage(backbone)
    copied = convolutions + (norms if kind == "block" else 0)
    return DENSE[backbone] + 3 * copied + 4 * 9 * sum(gate_channels(backbone, kind))


def quick(recipe: Recipe) -> Recipe:
    """The recipe with attacks of one step."""
    changes = {"attack_steps": 1, "pgd_unit": 1, "pgd_levels": 1}
    return replace(recipe, **{key: value for key, value in changes.items() if hasattr(recipe, key)})


def step(model: nn.Module, phase: Phase, recipe: Recipe, batch: int, classes: int) -> None:
    """One optimiser step on random images, which must move the phase's weights and keep all of them finite."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(batch, *CIFAR, generator=generator), torch.randint(classes, (batch,), generator=generator)
    adversary = TrainingAdversary(model, ThreatModel("Linf", 8 / 255), recipe, seed=0)
    own = phase.parameters(model)
    model.zero_grad(set_to_none=True)
    before = [sample(parameter) for parameter in own]
    loss = phase.loss(model, x, y, adversary, recipe)
    assert loss.dim() == 0 and torch.isfinite(loss)
    torch.autograd.backward(loss)
    reached = [parameter.grad is not None for parameter in own]
    torch.optim.SGD(own, lr=0.1).step()
    moved = [not torch.equal(one, sample(parameter)) for one, parameter in zip(before, own, strict=True)]
    # Experts without an image have no gradient; everything that has one moves, but for dead units and exact zeros.
    assert not any(one for one, had in zip(moved, reached, strict=True) if not had)
    assert sum(moved) > 0.9 * sum(reached) > 0
    assert all(bool(torch.isfinite(parameter).all()) for parameter in own)
    for layer in moe_layers(model).values():
        reached = [parameter.grad is not None for parameter in layer.experts.parameters()]
        assert any(reached) == (phase.part != "moe.router"), "the phase of the gate alone leaves the experts alone"


def sample(parameter: nn.Parameter) -> Tensor:
    """Enough of a parameter to see whether it moved, without a second copy of the whole model."""
    return parameter.detach().flatten()[:4096].clone()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet-at", RESNET18),
        ("resnet18-at", RESNET18),
        ("resnet34-at", 21_282_122),
        ("resnet50-at", 23_520_842),
        # WRN-28-10, 36.5 million in the paper's table 5
        ("wrn-at", 36_479_194),
        ("vgg-at", 14_728_266),
    ],
)
def test_dense_networks(name: str, expected: int) -> None:
    torch.manual_seed(0)
    entry = MODELS.get(name)
    assert entry.recipe is not None
    model = entry.make(10, CIFAR).train()
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    step(model, entry.objective[-1], quick(entry.recipe), 2, 10)


@pytest.mark.parametrize("backbone", DENSE)
@pytest.mark.parametrize("name", ["block-moe-switch", "conv-moe"])
def test_sparse_layers(name: str, backbone: str) -> None:
    """A hundred classes, four experts, in the stage conv5_x."""
    torch.manual_seed(0)
    entry = MODELS.get(name)
    assert entry.recipe is not None
    model = entry.make(100, CIFAR, backbone=backbone).train()
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == mixed(backbone, name.partition("-")[0])
    (phase,) = entry.objective
    step(model, phase, quick(entry.recipe), 4, 100)


@pytest.mark.parametrize("name", ["dwf", "dwf-frozen"])
def test_nine_networks_under_a_soft_gate(name: str) -> None:
    """About 100 million parameters; every phase, that before the gate's alone being the same for both models."""
    torch.manual_seed(0)
    entry = MODELS.get(name)
    assert entry.recipe is not None
    recipe: Any = quick(entry.recipe)
    model = entry.make(10, CIFAR).train()
    assert sum(parameter.numel() for parameter in model.parameters()) == 9 * RESNET18 + 5_433
    for phase in entry.objective[1:] if name == "dwf-frozen" else entry.objective:
        step(model, phase, recipe, 2, 10)

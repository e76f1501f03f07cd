"""Operations and parameters of every kind of model, against counts made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moebench.datasets import Dataset, load_dataset
from moebench.flops import count_flops
from moebench.loading import idle_parameters
from moebench.models import MODELS
from moebench.models._moe import moe_layers

DIGITS, CIFAR, LARGE = (1, 8, 8), (3, 32, 32), (3, 224, 224)
ROUTER = 2 * 64 * 4
"""Operations of a linear router from 64 pixels to 4 experts; a multiplication and an addition are two."""


def conv(inputs: int, outputs: int, side: int, kernel: int = 3) -> int:
    """Operations of a convolution that gives maps of side × side."""
    return 2 * inputs * outputs * kernel**2 * side**2


EXPERT = (
    conv(1, 16, 8)
    + 2 * conv(16, 16, 8)
    + 2 * conv(16, 16, 4)
    + conv(16, 16, 4, 1)
    + conv(16, 32, 2)
    + conv(32, 32, 2)
    + conv(16, 32, 2, 1)
    + 2 * 32 * 10
)
"""Operations of ResNet-8 on a digit: BatchNorm, ReLU, sums and means are not counted."""

EXPERT_SIZE, ROUTER_SIZE = 24_666, 65 * 4


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", n=2)


@pytest.mark.parametrize(
    ("name", "settings", "operations", "total", "active"),
    [
        ("resnet-at", {}, EXPERT, EXPERT_SIZE, EXPERT_SIZE),
        ("rt-er", {}, ROUTER + EXPERT, ROUTER_SIZE + 4 * EXPERT_SIZE, ROUTER_SIZE + EXPERT_SIZE),
        ("rt-er-top2", {}, ROUTER + 2 * EXPERT, ROUTER_SIZE + 4 * EXPERT_SIZE, ROUTER_SIZE + 2 * EXPERT_SIZE),
        ("rt-er", {"top_k": 4}, ROUTER + 4 * EXPERT, ROUTER_SIZE + 4 * EXPERT_SIZE, ROUTER_SIZE + 4 * EXPERT_SIZE),
        ("rt-er-e3", {}, 2 * 64 * 3 + EXPERT, 65 * 3 + 3 * EXPERT_SIZE, 65 * 3 + EXPERT_SIZE),
        ("rt-er-e5", {}, 2 * 64 * 5 + EXPERT, 65 * 5 + 5 * EXPERT_SIZE, 65 * 5 + EXPERT_SIZE),
        ("dual-moe", {}, 2 * (ROUTER + EXPERT), 2 * (ROUTER_SIZE + 4 * EXPERT_SIZE), 2 * (ROUTER_SIZE + EXPERT_SIZE)),
        ("ensemble-mean", {}, 4 * EXPERT, 4 * EXPERT_SIZE, 4 * EXPERT_SIZE),
        ("ensemble-max", {}, 4 * EXPERT, 4 * EXPERT_SIZE, 4 * EXPERT_SIZE),
        ("ensemble-vote", {"members": 5}, 5 * EXPERT, 5 * EXPERT_SIZE, 5 * EXPERT_SIZE),
    ],
)
def test_costs_are_those_of_the_experts_that_run(
    name: str, settings: dict[str, Any], operations: int, total: int, active: int
) -> None:
    model = MODELS.get(name).make(10, DIGITS, **settings)
    assert count_flops(model, DIGITS) == operations
    assert parameters(model) == total
    assert total - idle_parameters(model) == active


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", MODELS.names())
def test_active_parameters_are_some_and_at_most_all(name: str) -> None:
    model = MODELS.get(name).make(10, DIGITS)
    idle, total = idle_parameters(model), parameters(model)
    assert 0 <= idle < total
    # SoE's confidences come from the experts themselves, so all of them run.
    sparse = any(layer.active < len(layer.experts) for layer in moe_layers(model).values())
    assert (idle > 0) == sparse
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *DIGITS))
    assert count_flops(model, DIGITS) == counter.get_total_flops() > 0

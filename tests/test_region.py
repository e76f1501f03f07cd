"""Attacks on hard routing, against a model whose weak spot is the router alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moebench.attacks import load_attack
from moebench.attacks._engine import Engine, Samples
from moebench.attacks._views import make_view
from moebench.models._moe import MoELayer, RoutedModel
from moebench.schema import ThreatModel

CLASSES = 4
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 0.25])


class Constant(nn.Module):
    """An expert that says the same of every image; its gradient exists and is zero."""

    def __init__(self, says: int) -> None:
        super().__init__()
        self.says = says

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), CLASSES)
        logits[:, self.says] = 3.0
        return logits + 0.0 * x.flatten(1).sum(dim=1, keepdim=True)


class TwoMinds(RoutedModel):
    """Right wherever w·x + b > 0, where expert 0 answers, and wrong elsewhere."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        linear = nn.Linear(4, 2)
        with torch.no_grad():
            linear.weight.copy_(torch.stack((WEIGHTS, torch.zeros(4))))
            linear.bias.copy_(torch.tensor([bias, 0.0]))
        self.moe = MoELayer([Constant(0), Constant(1)], nn.Sequential(nn.Flatten(), linear), top_k=1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.moe(x)
        return logits


def samples() -> Samples:
    """Images in the middle of the box, so that the ball alone limits the attack; all of class 0."""
    x = 0.4 + 0.2 * torch.rand(40, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    return Samples(x, torch.zeros(40, dtype=torch.int64), torch.arange(40))


def standing(name: str, model: nn.Module, threat: ThreatModel) -> Tensor:
    data = samples()
    view = make_view("whole", model)
    view.prepare(data.x)
    engine = Engine(model, view, data, threat, batch_size=16)
    for stage in load_attack(name).stages:
        engine.run_stage(stage, (~engine.broken).nonzero().squeeze(1), lambda finished: None)
    return ~engine.broken


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", ["region", "route-flip"])
def test_breaks_exactly_the_samples_whose_router_can_be_turned(name: str, norm: str) -> None:
    model = TwoMinds(bias=1.2).eval().requires_grad_(False)
    x = samples().x.flatten(1)
    assert bool((model(samples().x).argmax(1) == 0).all())
    lead = x @ WEIGHTS + 1.2
    distance = lead / (WEIGHTS.abs().sum() if norm == "Linf" else WEIGHTS.norm())
    eps = float(distance.median()) + 1e-4
    threat = ThreatModel("Linf" if norm == "Linf" else "L2", eps)
    assert torch.equal(standing(name, model, threat), distance > eps)


def test_the_whole_view_never_finds_the_border() -> None:
    """Why these attacks exist: neither the selected expert nor the selection has a gradient."""
    model = TwoMinds(bias=1.2).eval().requires_grad_(False)
    lead = samples().x.flatten(1) @ WEIGHTS + 1.2
    distance = lead / WEIGHTS.abs().sum()
    threat = ThreatModel("Linf", float(distance.median()) + 1e-4)
    broken_by_gradients = int((~standing("apgd-ce", model, threat)).sum())
    broken_by_region = int((~standing("region", model, threat)).sum())
    assert broken_by_gradients < broken_by_region == 20


def test_region_of_a_top_2_router_is_a_pair() -> None:
    layer = MoELayer([Constant(i) for i in range(4)], nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), top_k=2)

    class Four(RoutedModel):
        def __init__(self) -> None:
            super().__init__()
            self.moe = layer

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.moe(x)
            return logits

    model = Four().eval().requires_grad_(False)
    data = samples()
    view = make_view("region", model)
    view.prepare(data.x)
    everything = view.logits(data.x, torch.arange(40))
    assert everything.shape == (40, 6, CLASSES + 1)
    own = everything[:, :, -1].argmax(dim=1)
    assert bool((everything[:, :, -1] > 0).sum(dim=1).eq(1).all()), "the router selects exactly one region"
    mine = everything[torch.arange(40), own]
    assert torch.allclose(mine[:, :-1], model(data.x), atol=1e-6)
    aimed = view.aimed(data.x, torch.arange(40), own * CLASSES + 2)
    assert torch.allclose(aimed, mine, atol=1e-6)


def test_moe_adaptive_contains_autoattack() -> None:
    stages = load_attack("moe-adaptive").stages
    for stage in load_attack("autoattack").stages:
        assert stage in stages

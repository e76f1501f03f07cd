"""Every registered model under an attack on each of its views; a new model is covered once it is registered."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import nn
from toys import attack, frozen

from moebench.attacks._engine import Samples
from moebench.attacks._views import applicable_views, make_view
from moebench.attacks.pgd import PGD
from moebench.models import MODELS
from moebench.models._moe import moe_layers
from moebench.schema import ThreatModel
from moebench.threat import distances

SHAPE = (1, 8, 8)
THREAT = ThreatModel("Linf", 0.3)
N = 3


def architectures() -> list[str]:
    """One name for each builder and its settings; recipes do not matter here."""
    first: dict[str, str] = {}
    for name in MODELS.names():
        entry = MODELS.get(name)
        first.setdefault(f"{entry.build.__qualname__} {sorted(entry.settings.items())}", name)
    return list(first.values())


@lru_cache(maxsize=1)
def fresh(name: str) -> nn.Module:
    """A model with random weights and lively BatchNorm statistics, ready to be attacked."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = MODELS.get(name).make(10, SHAPE).train()
        for parameter in model.parameters():
            # A transformer's head starts at zero, where nothing has a gradient.
            if parameter.dim() > 1 and not bool(parameter.any()):
                nn.init.normal_(parameter, std=0.1)
        model(torch.rand(64, *SHAPE))
        return frozen(model)


def samples_of(model: nn.Module) -> Samples:
    """Images with the labels that the model gives them, so that there is something to break."""
    x = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(2))
    return Samples(x, model(x).argmax(dim=1), torch.arange(N))


CELLS = [(name, view) for name in architectures() for view in applicable_views(fresh(name))]


@pytest.mark.parametrize(("name", "view"), CELLS)
def test_two_steps_on_every_view_of_every_model(name: str, view: str) -> None:
    model = fresh(name)
    samples = samples_of(model)
    out = attack(model, samples, THREAT, (PGD(steps=2),), view)

    assert out.x_adv.shape == samples.x.shape and bool(torch.isfinite(out.x_adv).all())
    assert float(out.x_adv.min()) >= 0 and float(out.x_adv.max()) <= 1
    moved = distances(out.x_adv, samples.x, THREAT)
    assert float(moved.max()) <= THREAT.eps * (1 + 1e-5)
    assert bool((moved > 0).all())
    # What counts is the whole model, whatever the view.
    prediction = model(out.x_adv).argmax(dim=1)
    assert torch.equal(out.adv_pred[out.broken], prediction[out.broken])
    assert bool((prediction[out.broken] != samples.y[out.broken]).all())
    assert all(layer.policy is None for layer in moe_layers(model).values())


@pytest.mark.parametrize(("name", "view"), CELLS)
def test_every_view_has_a_gradient_to_the_image(name: str, view: str) -> None:
    model = fresh(name)
    samples = samples_of(model)
    shown = make_view(view, model)
    shown.prepare(samples.x)
    x = samples.x.clone().requires_grad_()
    logits = shown.logits(x, torch.arange(N))
    assert logits.shape == (N, 10) and bool(torch.isfinite(logits).all())
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, samples.y), x)
    assert bool((gradient.flatten(1) != 0).any(dim=1).all())


def test_the_matrix_holds_every_registered_architecture() -> None:
    built = {(MODELS.get(name).build, tuple(sorted(MODELS.get(name).settings.items()))) for name, _ in CELLS}
    assert built == {
        (MODELS.get(name).build, tuple(sorted(MODELS.get(name).settings.items()))) for name in MODELS.names()
    }

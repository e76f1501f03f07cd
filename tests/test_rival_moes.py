"""What holds for DWF, SoE and AdvMoE alike: sizes, views under attack, independence, documented recipes."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn
from toys import attack, digits, frozen, reduced

from moebench.attacks._views import applicable_views
from moebench.models import MODELS
from moebench.models._image_moe import ImageMoE
from moebench.models._moe import forced_forward, moe_layers
from moebench.parts import part_of
from moebench.schema import ThreatModel
from moebench.train import split_settings

DIGITS, CIFAR = (1, 8, 8), (3, 32, 32)
NAMES = ["dwf", "soe", "adv-moe", "adv-moe-cnn"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dwf": ("dwf", {"experts": 5}),
    "soe": ("soe", {}),
    "soe complex": ("soe", {"confidence": "complex"}),
    "adv-moe": ("adv-moe", {}),
    "adv-moe-cnn": ("adv-moe-cnn", {"experts": 3}),
}


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@lru_cache
def lively(kind: str) -> ImageMoE:
    """Fresh weights, BatchNorm statistics of the digits, in eval mode."""
    name, settings = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = MODELS.get(name).make(10, DIGITS, **settings)
        # A few digits only, and momentum of one: running statistics that fit the images.
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = 1.0
        model.train()
        with torch.no_grad():
            model(digits(60).x)
            for expert in range(len(next(iter(moe_layers(model).values())).experts)):
                forced_forward(model, digits(60).x, expert)
    assert isinstance(model, ImageMoE)
    frozen(model)
    return model


# --- sizes


@pytest.mark.parametrize(
    ("name", "total", "router"),
    [
        ("dwf", 9 * 11_173_962 + 5_433, 5_433),
        ("dwf-frozen", 9 * 11_173_962 + 5_433, 5_433),
        ("soe", 3 * 272_539, 0),
        ("adv-moe", 4 * 11_173_962 + 12_292, 12_292),
        ("adv-moe-cnn", 5_565_450 + 269_202, 269_202),
    ],
)
def test_full_size_is_the_papers(name: str, total: int, router: int) -> None:
    with torch.device("meta"):
        model = MODELS.get(name).make(10, CIFAR)
    (layer,) = moe_layers(model).values()
    assert (parameters(model), parameters(layer.router)) == (total, router)


def test_small_router_is_much_smaller_than_its_network() -> None:
    layer = lively("adv-moe-cnn").moe
    assert parameters(layer.router) < 0.05 * parameters(layer)


# --- documented recipes


def commands() -> list[tuple[str, str]]:
    """Every `moebench train` of the papers' files, with its model."""
    found = []
    for module in ("dwf", "soe", "adv_moe", "rt_er"):
        text = importlib.import_module(f"moebench.models.{module}").__doc__ or ""
        for words in re.findall(r"moebench train ((?:.*\n)(?: {8}.*\n)*)", text):
            line = " ".join(words.split())
            found.append((shlex.split(line)[1], line))
    return found


def test_every_model_documents_how_the_papers_network_is_trained() -> None:
    assert [name for name, _ in commands()] == ["dwf", "soe", "adv-moe-cnn", "adv-moe", "rt-er"]


@pytest.mark.parametrize(("name", "line"), commands())
def test_documented_commands_are_valid_recipes(name: str, line: str) -> None:
    words = shlex.split(line)
    pairs = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    given: dict[str, Any] = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        try:
            given[key] = ast.literal_eval(text)
        except ValueError:
            given[key] = text
    of_model, of_recipe = split_settings(name, given)
    entry = MODELS.get(name)
    assert entry.recipe is not None and not of_model
    recipe = replace(entry.recipe, **of_recipe)
    assert recipe.flip
    if name == "rt-er":
        assert (recipe.optimizer, recipe.lr_low, recipe.lr_high, recipe.batch_size) == ("adam", 5e-5, 1e-4, 512)
        # Half a triangle is 500 of the paper's steps: 97 per epoch of CIFAR-10.
        assert recipe.epochs * 97 / (2 * recipe.cycles) == pytest.approx(500, rel=0.05)
    else:
        assert (recipe.optimizer, recipe.lr_high, recipe.batch_size) == ("sgd", 0.1, 128)


# --- routing


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_do_not_depend_on_the_neighbours(kind: str) -> None:
    model, x = lively(kind), digits(12).x
    everything = model(x)
    alone = torch.cat([model(x[i : i + 1]) for i in range(12)])
    torch.testing.assert_close(everything, alone, rtol=1e-4, atol=1e-5)
    assert len(set(everything.argmax(1).tolist())) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_each_part_is_the_model_with_that_expert_forced(kind: str) -> None:
    model, x = lively(kind), digits(8).x
    logits = [forced_forward(model, x, expert) for expert in range(len(model.moe.experts))]
    for number, expected in enumerate(logits):
        part = part_of(model, f"expert[{number}]", kind)
        assert moe_layers(part) == {}
        torch.testing.assert_close(part(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_view_can_be_attacked(kind: str) -> None:
    model, threat = lively(kind), ThreatModel("Linf", 0.3)
    samples = right(kind)
    names = applicable_views(model)
    assert {"router", "experts", "smooth", "straight-through", "expert[0]", "expert[1]"} <= set(names)
    for view in names:
        done = attack(model, samples, threat, reduced("pgd-10", steps=2).stages, view, batch_size=16)
        moved = (done.x_adv - samples.x).abs().amax(dim=(1, 2, 3))
        assert bool((moved > 0).any()) and float(moved.max()) <= 0.3 + 1e-6
        assert torch.equal(done.broken, model(done.x_adv).argmax(1) != samples.y)


@pytest.mark.parametrize("kind", KINDS)
def test_adaptive_attack_has_all_its_stages(kind: str) -> None:
    model, samples = lively(kind), right(kind)
    plan = reduced("moe-adaptive").fitted(model)
    stages = [stage.stage for stage in plan.stages]
    assert ("joint" in stages) == (kind == "dwf")
    assert ("region" in stages) == (kind != "dwf")
    for stage in plan.stages:
        done = attack(model, samples, ThreatModel("Linf", 0.3), [stage], stage.view or "whole", batch_size=16)
        assert torch.equal(done.broken, model(done.x_adv).argmax(1) != samples.y)


def right(kind: str) -> Any:
    """Digits that count as right: the labels are what the model says."""
    samples = digits(5)
    with torch.no_grad():
        return replace(samples, y=lively(kind)(samples.x).argmax(1))

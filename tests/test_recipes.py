"""Which recipes a model takes, what they do in one step, and how their models are called afterwards."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Terminal
from small_models import Flat
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.attacks._random import sample_keys, uniform
from moebench.datasets import load_dataset
from moebench.errors import UsageError
from moebench.loading import load
from moebench.models import MODELS
from moebench.models._balancing import balanced
from moebench.models._base import Adversary, Phase, PhaseLoss, Recipe, Shape, register_model
from moebench.models._objectives import (
    OBJECTIVES,
    fast_adversarial_loss,
    free_adversarial_loss,
)
from moebench.models._weights import read_weights
from moebench.recipes import TrainingPlan, plan_training
from moebench.registry import check_recipe_name, objective_registry, recipes_of
from moebench.schema import ThreatModel
from moebench.train import Trainer, TrainSpec, train
from moebench.training_adversary import TrainingAdversary

GENERAL = ["standard", "at", "trades", "fast-at", "free-at"]
EPS = 0.25


@pytest.fixture
def moebench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal(tmp_path, capsys)


def plan(model: str, name: str | None, **changes: Any) -> TrainingPlan:
    return plan_training(MODELS.get(model), name, changes)


# --- what a model takes


def test_general_recipes_fit_every_model() -> None:
    assert objective_registry().names() == GENERAL
    for model in MODELS.names():
        assert recipes_of(model)[: len(GENERAL)] == GENERAL


def test_models_of_one_builder_lend_each_other_their_recipes() -> None:
    assert recipes_of("resnet-at")[len(GENERAL) :] == ["resnet-st", "resnet-at", "resnet-trades", "resnet-fast-at"]
    assert {"rt-er", "rt-er-official", "st-moe"} <= set(recipes_of("at-moe"))
    assert recipes_of("dual-moe")[len(GENERAL) :] == ["jtd-moe", "jtd-moe-official"]


@pytest.mark.parametrize(
    ("model", "recipe", "message"),
    [
        (
            "resnet-at",
            "rt-er",
            "recipe 'rt-er' does not fit resnet-at, a model of another kind; resnet-at takes standard",
        ),
        (
            "at-moe",
            "jtd-moe",
            "recipe 'jtd-moe' does not fit at-moe, a model of another kind; at-moe takes standard, at",
        ),
        ("jtd-moe", "dual-moe", "recipe 'dual-moe' does not fit jtd-moe"),
        (
            "resnet-at",
            "free",
            "unknown recipe 'free'; did you mean free-at? resnet-at takes standard, at, trades, fast",
        ),
        ("resnet-at", "nonsense!", "unknown recipe 'nonsense!'; resnet-at takes standard, at"),
    ],
)
def test_wrong_combination_is_one_line(moebench: Terminal, model: str, recipe: str, message: str) -> None:
    assert moebench.refuses("train", "--model", model, "--recipe", recipe).startswith(f"moebench: {message}")
    with pytest.raises(UsageError) as caught:
        plan(model, recipe)
    assert str(caught.value).startswith(message)


def test_names_are_known_without_torch() -> None:
    code = (
        "import sys; from moebench.registry import check_recipe_name; check_recipe_name('at-moe', 'rt-er'); "
        "from moebench.cli import main; main(['train', '--model', 'resnet-at', '--recipe', 'soe']); "
        "main(['list', 'recipes']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    *listed, torch_there = done.stdout.splitlines()
    assert torch_there == "False", done.stderr
    assert [line.split()[0] for line in listed[: len(GENERAL)]] == GENERAL
    assert done.stderr.startswith("moebench: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("declaration", objective_registry().declarations(), ids=lambda one: one.name)
def test_facts_read_from_the_source_are_those_of_the_objective(declaration: Any) -> None:
    objective = OBJECTIVES.get(declaration.name)
    for key, value in declaration.facts.items():
        assert getattr(objective, key) == value
    Recipe(epochs=1, **objective.defaults)


# --- the plan


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("resnet-at", None),
        ("resnet-at", "at"),
        ("resnet-at", "resnet-at"),
        ("resnet-st", "standard"),
        ("trades-moe", "trades"),
        ("ensemble-max", "ensemble-mean"),
        ("rt-er-top2", "rt-er"),
    ],
)
def test_a_models_own_recipe_is_no_variant(model: str, name: str | None) -> None:
    entry, found = MODELS.get(model), plan(model, name)
    assert (found.recipe, found.objective, found.training) == (entry.recipe, entry.objective, entry.training)
    assert found.variant is None


def test_a_general_recipe_keeps_what_is_the_models() -> None:
    found = plan("st-moe", "trades", beta=2.0)
    assert (found.recipe.balance, found.recipe.epochs) == (0.1, 200)
    assert (found.recipe.beta, found.recipe.select) == (2.0, "robust")
    assert (found.variant, found.training) == ("trades", "trades")


def test_free_at_divides_the_epochs_by_its_replays() -> None:
    assert (plan("resnet-at", "free-at").recipe.replays, plan("resnet-at", "free-at").recipe.epochs) == (8, 25)
    assert plan("resnet-at", "free-at", replays=4).recipe.epochs == 50
    assert plan("resnet-at", "free-at", epochs=7).recipe.epochs == 7
    assert plan("resnet-at", "free-at", epochs=7).full == 25


def test_the_recipe_of_a_sibling_comes_whole() -> None:
    other = MODELS.get("rt-er-official")
    found = plan("st-moe", "rt-er-official", epochs=3)
    assert (found.recipe, found.objective) == (plan("rt-er-official", None, epochs=3).recipe, other.objective)
    assert (found.variant, found.training, found.full) == ("rt-er-official", "rt-er-official", 200)
    assert plan("dual-moe", "jtd-moe").variant == "jtd-moe"


def test_composed_models_get_the_epochs_of_the_objective() -> None:
    assert plan("dual-moe", "at").recipe.epochs == 200
    assert dict(plan("dual-moe", "at").recipe.init_from) == {"standard": "st-moe", "robust": "rt-er"}


FACTS: dict[str, Any] = {"summary": "a test's", "family": "dense", "training": "none"}


def heavier(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    def wrap(loss: PhaseLoss) -> PhaseLoss:
        return lambda model, x, y, adversary, recipe: loss(model, x, y, adversary, recipe) + 100

    return tuple(Phase(wrap(phase.loss), phase.part, phase.span) for phase in phases)


@register_model("test-regularized", regularize=heavier, **FACTS)
def flat(num_classes: int, shape: Shape) -> nn.Module:
    return Flat(64, num_classes)


def test_a_model_adds_its_own_terms_to_a_general_objective() -> None:
    found = plan("test-regularized", "standard")
    assert found.recipe.epochs == 200, "it has no recipe of its own"
    x, y, model = images(4), torch.arange(4), Flat(64, 10)
    loss = found.objective[0].loss(model, x, y, adversary_of(model), found.recipe)
    torch.testing.assert_close(loss, F.cross_entropy(model(x), y) + 100)
    with pytest.raises(UsageError, match="has no training recipe; --recipe takes standard, at, trades"):
        plan("test-regularized", None)


@pytest.mark.parametrize("name", ["block-moe-entropy", "v-moe-at"])
@pytest.mark.parametrize("recipe", ["standard", "trades", "fast-at"])
def test_models_with_losses_of_their_own_keep_them_under_a_general_objective(name: str, recipe: str) -> None:
    """Twice the weight, twice the term: on a fixed seed the loss is linear in the balancing weight."""
    entry, x, y = MODELS.get(name), images(8), torch.arange(8)
    values = []
    for balance in (0.0, 1.0, 2.0):
        found = plan(name, recipe, balance=balance)
        torch.manual_seed(0)
        model = entry.make(10, (1, 8, 8)).train()
        torch.manual_seed(1)
        values.append(found.objective[0].loss(model, x, y, adversary_of(model), found.recipe).item())
    assert values[1] != values[0]
    assert values[2] - values[1] == pytest.approx(values[1] - values[0], rel=1e-3, abs=1e-5)
    switch = balanced((Phase(OBJECTIVES.get(recipe).loss),))[0]
    torch.manual_seed(0)
    model = entry.make(10, (1, 8, 8)).train()
    torch.manual_seed(1)
    general = switch.loss(model, x, y, adversary_of(model), plan(name, recipe, balance=1.0).recipe).item()
    assert general != pytest.approx(values[1], rel=1e-4), "the switch loss is not what the paper adds"


# --- one step, written by hand


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def adversary_of(model: nn.Module, seed: int = 0) -> TrainingAdversary:
    return TrainingAdversary(model, ThreatModel("Linf", EPS), Recipe(epochs=1), seed)


@pytest.mark.parametrize(("start", "step"), [("start", 1.25), ("clean", 1.0)])
def test_fast_at_by_hand(start: str, step: float) -> None:
    x, y = images(6), torch.arange(6)
    model = Flat(64, 10)
    recipe = Recipe(epochs=1, fast_from=start, fast_step=step)  # type: ignore[arg-type]
    loss = fast_adversarial_loss(model, x, y, adversary_of(model), recipe)
    noise = (2 * uniform(sample_keys(0, "train/0", torch.arange(6)), 0, 64) - 1).view_as(x) * EPS
    point = (x + noise).clamp(0, 1).requires_grad_()
    F.cross_entropy(model(point), y, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert point.grad is not None
    origin = x if start == "clean" else point.detach()
    x_adv = (origin + step * EPS * point.grad.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    torch.testing.assert_close(loss, F.cross_entropy(model(x_adv), y))
    assert loss > F.cross_entropy(model(x), y)


def test_free_at_by_hand(tmp_path: Path) -> None:
    """Two batches of three replays: gradients of one backward pass move weights and δ, and δ is carried on."""
    sets = load_dataset("digits", split="train"), load_dataset("digits", split="val")
    recipe = Recipe(
        epochs=1,
        batch_size=500,
        replays=3,
        optimizer="sgd",
        momentum=0.0,
        schedule="constant",
        lr_high=0.01,
        translate=0,
    )
    entry = MODELS.get("resnet-st")
    objective = (Phase(free_adversarial_loss),)
    trainer = Trainer(
        Flat(64, 10), replace(entry, objective=objective), recipe, *sets, TrainSpec("resnet-st", "digits", tmp_path), {}
    )
    eps = trainer.threat.eps
    torch.manual_seed(5)
    mean = trainer._train_epoch()

    torch.manual_seed(5)
    order = torch.randperm(1000)
    start = Flat(64, 10).linear
    weight, bias = start.weight.detach(), start.bias.detach()
    delta, losses = torch.zeros(500, 1, 8, 8), []
    for batch in order.split(500):
        x, y = trainer.x[batch], trainer.y[batch]
        for _ in range(3):
            w, b, z = weight.requires_grad_(), bias.requires_grad_(), (x + delta).clamp(0, 1).requires_grad_()
            loss = F.cross_entropy(z.flatten(1) @ w.t() + b, y)
            losses.append(loss.item())
            grad_w, grad_b, grad_z = torch.autograd.grad(loss, (w, b, z))
            weight, bias = w.detach() - 0.01 * grad_w, b.detach() - 0.01 * grad_b
            delta = (delta + eps * grad_z.sign()).clamp(-eps, eps)
    torch.testing.assert_close(trainer.learner.model.get_parameter("linear.weight").detach(), weight)
    torch.testing.assert_close(trainer.learner.model.get_parameter("linear.bias").detach(), bias)
    assert mean == pytest.approx(sum(losses) / 6)
    assert trainer.learner.adversary.delta is not None
    # A gradient next to 0 may have either sign.
    assert (trainer.learner.adversary.delta == delta).double().mean() > 0.999
    assert delta.abs().amax() == pytest.approx(eps)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_carried_images_stay_in_the_threat_model(norm: Any) -> None:
    model, threat = Flat(64, 10), ThreatModel(norm, EPS)
    adversary = TrainingAdversary(model, threat, Recipe(epochs=1), 0)
    for seed in range(5):
        x = images(7, seed)
        x_adv = adversary.carried(x)
        distance = (x_adv - x).detach().flatten(1)
        size = distance.abs().amax(1) if norm == "Linf" else distance.norm(dim=1)
        assert size.max() <= EPS * (1 + 1e-5) and x_adv.min() >= 0 and x_adv.max() <= 1
        assert (size.max() == 0) == (seed == 0), "δ begins at 0 and is carried on"
        F.cross_entropy(model(x_adv), torch.arange(7)).backward()  # type: ignore[no-untyped-call]
    adversary.carried(x).backward(torch.full_like(x, float("nan")))
    assert adversary.delta is not None and torch.isfinite(adversary.delta).all()


def test_radius_in_training_is_a_share_of_the_threat_models(tmp_path: Path) -> None:
    sets = load_dataset("digits", split="train"), load_dataset("digits", split="val")
    recipe, wanted = Recipe(epochs=1, eps_fraction=0.5), TrainSpec("resnet-at", "digits", tmp_path)
    trainer = Trainer(Flat(64, 10), MODELS.get("resnet-at"), recipe, *sets, wanted, {})
    assert (trainer.learner.adversary.eps, trainer.threat.eps) == (0.1, 0.2)
    x = trainer.x[:20]
    found = trainer.learner.adversary(
        trainer.learner.model, x, lambda z: F.cross_entropy(z, trainer.y[:20], reduction="none")
    )
    assert (found - x).abs().max().item() == pytest.approx(0.1)


@pytest.mark.parametrize("name", MODELS.names())
@pytest.mark.parametrize("recipe", ["fast-at", "free-at"])
def test_general_recipes_train_every_model(name: str, recipe: str) -> None:
    torch.manual_seed(0)
    model = MODELS.get(name).make(10, (1, 8, 8)).train()
    found = plan(name, recipe)
    adversary: Adversary = adversary_of(model)
    # A model may come to its own recipe by steps; the last phase is the recipe in force.
    phase = found.objective[-1]
    loss = phase.loss(model, images(8), torch.arange(8), adversary, found.recipe)
    assert loss.dim() == 0 and torch.isfinite(loss)
    torch.autograd.backward(loss)
    gradients = [parameter.grad for parameter in phase.parameters(model) if parameter.grad is not None]
    assert any(gradient.abs().sum() > 0 for gradient in gradients)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


# --- files and names

QUICK: dict[str, Any] = {
    "epochs": 2,
    "cycles": 1,
    "attack_steps": 1,
    "batch_size": 100,
    "lr_low": 2e-3,
    "lr_high": 8e-3,
}


def test_a_recipe_makes_the_model_that_is_registered_with_it(tmp_path: Path) -> None:
    quick = {**QUICK, "batch_size": 250, "epochs": 2}
    path, card = train(TrainSpec("resnet-st", "digits", tmp_path, recipe=quick, objective="at"))
    own, _ = train(TrainSpec("resnet-at", "digits", tmp_path, recipe=quick))
    assert path.read_bytes() == own.read_bytes()
    assert path.name == "resnet-st.at.safetensors"
    assert (card["objective"], card["training"]) == ("at", "adversarial")
    assert card["command"].startswith("moebench train --model resnet-st --dataset digits --seed 0 --recipe at --set ")


def test_a_variant_has_files_and_a_name_of_its_own(moebench: Terminal) -> None:
    changes = [part for key, value in QUICK.items() for part in ("--set", f"{key}={value}")]
    own = moebench("train", "--model", "resnet-at", "--out", "runs", *changes)
    assert own.code == 0, own.err
    before = moebench.files()
    said = moebench(
        "train", "--model", "resnet-at", "--recipe", "free-at", "--out", "runs", *changes, "--set", "replays=2"
    )
    assert said.code == 0, said.err
    after = moebench.files()
    assert all(after[name] == data for name, data in before.items()), "the model's own weights are still there"
    new = sorted(set(after) - set(before))
    assert new == [f"runs/resnet-at.free-at.{end}" for end in ("json", "log.jsonl", "safetensors")]
    (hint,) = (line for line in said.out.splitlines() if line.startswith("next: moebench "))
    words = hint.removeprefix("next: moebench ").replace("autoattack", "fgsm").split()
    found = moebench(*words, "--n", 20, "--json").json
    assert found["model"] == "resnet-at[recipe=free-at]"
    data = load_dataset("digits")
    loaded = load("resnet-at", data, weights=Path("runs/resnet-at.free-at.safetensors"))
    assert (loaded.record.name, loaded.record.training) == ("resnet-at[recipe=free-at]", "free-at")
    assert loaded.checkpoint.recipe["objective"] == "free-at"
    assert (
        load("resnet-at", data, weights=Path("runs/resnet-at.safetensors")).record == MODELS.get("resnet-at").record()
    )


def test_settings_and_recipe_share_the_brackets(tmp_path: Path) -> None:
    quick = {**QUICK, "epochs": 1, "batch_size": 50}
    wanted = TrainSpec("st-moe", "digits", tmp_path, settings={"experts": 2}, recipe=quick, objective="fast-at")
    path, card = train(wanted)
    assert read_weights(path)[1] == card
    assert load("st-moe", load_dataset("digits"), weights=path).record.name == "st-moe[experts=2,recipe=fast-at]"


def test_show_names_the_recipes_of_a_model(moebench: Terminal) -> None:
    said = moebench("show", "rt-er")
    assert f"  --recipe takes {', '.join(recipes_of('rt-er'))}" in said.out.splitlines()


@pytest.mark.parametrize("name", GENERAL)
def test_check_lets_general_recipes_pass(name: str) -> None:
    check_recipe_name("rt-er", name)

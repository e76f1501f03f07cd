from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Noted
from torch import Tensor
from torch.nn import functional as F

from moebench.datasets import load_dataset
from moebench.errors import UsageError
from moebench.models import MODELS
from moebench.models._weights import read_weights
from moebench.models.dwf import (
    DWF,
    DWFRecipe,
    experts_alone_loss,
    gate_loss,
    joint_loss,
    random_fgsm,
    random_pgd,
)
from moebench.schema import ThreatModel
from moebench.train import EpochLog, TrainSpec, train
from moebench.training_adversary import TrainingAdversary

SHAPE = (1, 8, 8)
RECIPE = DWFRecipe(epochs=1)
QUICK: dict[str, Any] = {
    "epochs": 5,
    "batch_size": 25,
    "lr_low": 4e-3,
    "lr_high": 8e-3,
    "attack_steps": 1,
    "pgd_unit": 1,
    "pgd_levels": 2,
    "cycles": 1,
}


def dwf(experts: int = 5, seed: int = 0) -> DWF:
    """In eval mode: without batch statistics, one pass over joined batches equals a pass for each."""
    torch.manual_seed(seed)
    return DWF(10, SHAPE, experts=experts).eval()


def images(batch: int = 6, seed: int = 0) -> Tensor:
    return torch.rand(batch, *SHAPE, generator=torch.Generator().manual_seed(seed))


def labels(batch: int = 6) -> Tensor:
    return torch.arange(batch) % 10


# --- experts


@pytest.mark.parametrize("experts", [5, 7, 9])
def test_one_clean_expert_and_equally_many_of_the_others(experts: int) -> None:
    kinds = dwf(experts).kinds
    assert len(kinds) == len(dwf(experts).moe.experts) == experts
    assert kinds[0] == "clean"
    assert kinds.count("fgsm") == kinds.count("pgd") == (experts - 1) // 2


@pytest.mark.parametrize("experts", [1, 3, 4, 8, 5.0, "nine"])
def test_other_ratios_are_refused(experts: Any) -> None:
    with pytest.raises(UsageError, match="experts must be an odd number >= 5"):
        MODELS.get("dwf").make(10, SHAPE, experts=experts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pgd_unit": 0}, "pgd_unit of a recipe must be a whole number >= 1, got 0"),
        ({"fgsm_levels": 1.5}, "fgsm_levels of a recipe must be a whole number >= 1, got 1.5"),
        ({"fgsm_unit": 0}, "fgsm_unit of a recipe must be a finite number > 0, got 0"),
        ({"joint_rate": "x"}, "joint_rate of a recipe must be a finite number > 0, got 'x'"),
        ({"batch_size": 0}, "batch_size of a recipe must be a whole number >= 1, got 0"),
    ],
)
def test_impossible_recipes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(RECIPE, **change)


def test_logits_are_the_sum_of_the_definition() -> None:
    model, x = dwf(), images()
    z = 2 * x - 1
    weights = model.moe.router(z).softmax(1)
    expected = sum(weights[:, i : i + 1] * expert(z) for i, expert in enumerate(model.moe.experts))
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(x)))


# --- strengths


def test_strengths_are_the_papers_at_its_radius() -> None:
    model, x, y = dwf(), images(2), labels(2)
    recipe = replace(RECIPE, pgd_unit=10)
    radii, iterations = set(), set()
    torch.manual_seed(0)
    for _ in range(60):
        adversary = Noted(0.0, eps=8 / 255)
        joint_loss(model, x, y, adversary, recipe)
        fgsm, pgd = adversary.asked
        assert (fgsm["steps"], fgsm["random_start"], fgsm["step_size"]) == (1, False, fgsm["eps"])
        radii.add(round(fgsm["eps"], 6))
        assert set(pgd) == {"steps"}
        iterations.add(pgd["steps"])
    assert radii == {round(0.01 * level, 6) for level in range(1, 10)}
    assert iterations == {10, 20, 30, 40, 50}


def test_attacks_are_fgsm_of_that_radius_and_pgd_within_the_threat_model() -> None:
    model, x, y = dwf(), 0.3 + 0.4 * images(4), labels(4)
    recipe = replace(RECIPE, fgsm_levels=1, fgsm_unit=2.5, pgd_unit=3, pgd_levels=1)
    threat = ThreatModel("Linf", 8 / 255)
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), y), point)
    found = random_fgsm(model, x, y, TrainingAdversary(model, threat, recipe, seed=0), recipe)
    # The radius may be larger than the threat model's; no random start, no step beside the sign.
    torch.testing.assert_close(found, x + 2.5 * 8 / 255 * gradient.sign())
    adversary = TrainingAdversary(model, threat, recipe, seed=0)
    passes = 0

    def counted(z: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        logits: Tensor = model(z)
        return logits

    moved = (random_pgd(counted, x, y, adversary, recipe) - x).abs()
    assert passes == 3
    assert float(moved.max()) == pytest.approx(8 / 255, rel=1e-4)


def test_each_expert_draws_its_own_strength() -> None:
    drawn = []
    for _ in range(20):
        adversary = Noted(0.0)
        experts_alone_loss(dwf(), images(2), labels(2), adversary, RECIPE)
        drawn.append(tuple(asked.get("eps", asked["steps"]) for asked in adversary.asked))
    assert any(first != second for first, second, *_ in drawn)
    assert any(third != fourth for *_, third, fourth in drawn)


def test_strengths_come_from_torchs_generator() -> None:
    def drawn() -> list[dict[str, Any]]:
        adversary = Noted(0.0)
        model, x, y = dwf(), images(2), labels(2)
        torch.manual_seed(11)
        for _ in range(5):
            joint_loss(model, x, y, adversary, RECIPE)
        return adversary.asked

    assert drawn() == drawn()


# --- objectives


def test_experts_alone_is_the_sum_of_their_cross_entropies() -> None:
    model, x, y = dwf(), images(), labels()
    deltas = [0.1, -0.2, 0.3, -0.4]
    adversary = Noted(*deltas)
    found = experts_alone_loss(model, x, y, adversary, RECIPE)
    seen = [x, *((x + delta).clamp(0, 1) for delta in deltas)]
    terms = [F.cross_entropy(e(2 * z - 1), y) for e, z in zip(model.moe.experts, seen, strict=True)]
    torch.testing.assert_close(found, torch.stack(terms).sum())
    # FGSM for two experts, then PGD for two, each on the expert itself.
    assert ["eps" in asked for asked in adversary.asked] == [True, True, False, False]
    for forward, expert in zip(adversary.forwards, list(model.moe.experts)[1:], strict=True):
        torch.testing.assert_close(forward(x), expert(2 * x - 1))
    torch.testing.assert_close(adversary.losses[0](model(x)), F.cross_entropy(model(x), y, reduction="none"))
    # An expert's gradient is that of its own term, and the gate has none.
    torch.autograd.backward(found)
    for number, expert in enumerate(model.moe.experts):
        own = torch.autograd.grad(F.cross_entropy(expert(2 * seen[number] - 1), y), list(expert.parameters()))
        for parameter, expected in zip(expert.parameters(), own, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected)
    assert all(parameter.grad is None for parameter in model.moe.router.parameters())


@pytest.mark.parametrize("loss", [joint_loss, gate_loss])
def test_second_phase_is_cross_entropy_over_mixed_images(loss: Any) -> None:
    model, x, y = dwf(), images(), labels()
    adversary = Noted(0.2, -0.3)
    found = loss(model, x, y, adversary, RECIPE)
    kinds = [x, (x + 0.2).clamp(0, 1), (x - 0.3).clamp(0, 1)]
    torch.testing.assert_close(found, torch.stack([F.cross_entropy(model(z), y) for z in kinds]).mean())
    assert adversary.forwards == [model, model]
    torch.autograd.backward(found)
    for parameter in model.moe.router.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
    reached = [parameter.grad is not None for parameter in model.moe.experts.parameters()]
    assert all(reached) if loss is joint_loss else not any(reached)


# --- phases


def gate_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.startswith("moe.router")}


def experts_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.startswith("moe.experts")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


class Stop:
    """Interrupts after an epoch, so that the checkpoint stays."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def __call__(self, line: EpochLog, epochs: int) -> None:
        if line.epoch == self.epoch:
            raise KeyboardInterrupt


def states(name: str, out: Path) -> list[dict[str, Tensor]]:
    """The model after epochs 1, 3 (where the first phase ends) and 4."""
    found = []
    for epoch in (1, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            train(TrainSpec(name, "digits", out, settings={"experts": 5}, recipe=QUICK), Stop(epoch))
        found.append(torch.load(out / f".{name}.training.pt", weights_only=True)["model"])
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both models on a few digits, interrupted three times, the joint one also without interruption."""
    out = tmp_path_factory.mktemp("dwf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "moebench.datasets._training.load_dataset", lambda name, split: load_dataset(name, split=split, n=100)
        )
        return train_all(out)


def train_all(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: states(name, out) for name in ("dwf", "dwf-frozen")}
    for name in ("dwf", "dwf-frozen"):
        path, _ = train(TrainSpec(name, "digits", out, settings={"experts": 5}, recipe=QUICK))
        found[f"{name} weights"] = path
    found["undisturbed"] = train(TrainSpec("dwf", "digits", out / "u", settings={"experts": 5}, recipe=QUICK))[0]
    return found


def test_phases_train_what_they_say(trained: dict[str, Any]) -> None:
    for name in ("dwf", "dwf-frozen"):
        first, alone, later = trained[name]
        assert same(gate_of(first), gate_of(alone)) and not same(experts_of(first), experts_of(alone))
        assert not same(gate_of(alone), gate_of(later))
        # The statistics of BatchNorm count as well.
        assert same(experts_of(alone), experts_of(later)) == (name == "dwf-frozen")
    assert same(trained["dwf"][1], trained["dwf-frozen"][1]), "pre-training is the same for both"


def test_interrupted_training_ends_in_the_same_bits(trained: dict[str, Any]) -> None:
    assert trained["dwf weights"].read_bytes() == trained["undisturbed"].read_bytes()
    logs = [read_weights(trained[key])[1]["log"] for key in ("dwf weights", "undisturbed")]
    assert logs[0] == logs[1]


def test_the_kept_epoch_is_of_the_last_phase(trained: dict[str, Any]) -> None:
    for name in ("dwf", "dwf-frozen"):
        assert read_weights(trained[f"{name} weights"])[1]["validation"]["epoch"] > 3


def test_second_phase_learns_at_its_own_rate() -> None:
    entry = MODELS.get("dwf")
    recipe = DWFRecipe(epochs=10, joint_rate=0.1, lr_low=0.01, lr_high=0.1)
    rates = [(phase.paced(recipe).lr_low, phase.paced(recipe).lr_high) for phase in entry.objective]
    assert rates[0] == (0.01, 0.1)
    assert rates[1] == pytest.approx((0.001, 0.01))
    assert [phase.span for phase in entry.objective] == [(0.0, 0.6), (0.6, 1.0)]

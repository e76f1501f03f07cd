"""The parts of training by themselves: adversary, rates, phases, averages, replays, precision, the same bits."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Flat
from torch import Tensor, nn
from torch.nn import functional as F
from toys import PlainOracle, digits, make_rows

from moebench.attacks._engine import Samples
from moebench.attacks.pgd import PGD
from moebench.augmentation import augmented
from moebench.datasets import load_dataset
from moebench.models import MODELS
from moebench.models._base import Adversary, Phase, Recipe
from moebench.models._objectives import STANDARD
from moebench.models._resnet import resnet8
from moebench.optimizers import make_optimizer, make_schedule
from moebench.schema import ThreatModel
from moebench.threat import within
from moebench.train import EpochLog, Trainer, TrainSpec, train
from moebench.training_adversary import TrainingAdversary

# --- the parts


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return resnet8(10, 1)


def rise(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64), reduction="none")


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_adversary_stays_in_the_threat_model_and_raises_the_loss(norm: Any) -> None:
    model, threat = resnet().train(), ThreatModel(norm, 0.3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    attack = TrainingAdversary(model, threat, Recipe(epochs=1), seed=0)
    x_adv = attack(model, x, rise)
    assert within(x_adv, x, threat).all()
    assert not x_adv.requires_grad
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        assert rise(model(x_adv)).sum() > rise(model(x)).sum()
    again = attack(model, x, rise)
    assert not torch.equal(x_adv, again), "each call starts elsewhere"
    assert torch.equal(x_adv, TrainingAdversary(model, threat, Recipe(epochs=1), seed=0)(model, x, rise))
    assert not torch.equal(x_adv, TrainingAdversary(model, threat, Recipe(epochs=1), seed=1)(model, x, rise))


def test_adversary_restores_the_mode_after_an_exception() -> None:
    model = resnet().train()

    def fail(z: Tensor) -> Tensor:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        TrainingAdversary(model, ThreatModel("Linf", 0.1), Recipe(epochs=1), 0)(fail, torch.rand(2, 1, 8, 8), rise)
    assert model.training


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    sets = load_dataset("digits", split="train"), load_dataset("digits", split="val")

    def make(**changes: Any) -> Trainer:
        entry, recipe = MODELS.get("resnet-st"), Recipe(**{"epochs": 3, **changes})
        return Trainer(resnet(), entry, recipe, *sets, TrainSpec("resnet-st", "digits", tmp_path), {})

    yield make


@pytest.mark.parametrize("reach", [0, 1, 2])
def test_augmentation_shifts_and_fills_with_zeros(reach: int) -> None:
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    shifted = augmented(x, Recipe(epochs=1, translate=reach))
    seen = set()
    for image, found in zip(x, shifted, strict=True):
        padded = F.pad(image, (reach,) * 4)
        places = [(dy, dx) for dy in range(2 * reach + 1) for dx in range(2 * reach + 1)]
        (place,) = [(dy, dx) for dy, dx in places if torch.equal(padded[:, dy : dy + 8, dx : dx + 8], found)]
        seen.add(place)
    assert len(seen) > reach
    if reach:
        assert {0, 2 * reach} <= {dy for dy, _ in seen}
        assert {0, 2 * reach} <= {dx for _, dx in seen}


@pytest.mark.parametrize(
    ("select", "chosen"), [("clean", 2), ("robust", 3), ("mean", 1)], ids=["clean", "robust", "mean"]
)
def test_the_epoch_is_chosen_by_the_recipe(trainer: Callable[..., Trainer], select: str, chosen: int) -> None:
    run_ = trainer(select=select)
    log = [
        EpochLog(1, 1.0, 0.8, 0.5),
        EpochLog(2, 1.0, 0.9, 0.2),
        EpochLog(3, 1.0, 0.5, 0.6),
        EpochLog(4, 1.0, 0.5, 0.6),
    ]
    kept = []
    for line in log:
        run_.log.append(line)
        parameter = next(run_.learner.model.parameters())
        parameter.data.fill_(line.epoch)
        run_._keep_best()
        kept.append(next(iter(run_.best.values())).flatten()[0].item())
    assert kept[-1] == chosen, "the earliest of equals"
    assert run_.choice.chosen(log).epoch == chosen


def test_standard_objective_lowers_its_loss(trainer: Callable[..., Trainer]) -> None:
    run_ = trainer(attack_steps=0, epochs=2)
    assert run_.entry.objective == STANDARD
    _, log = run_.run(None)
    assert log[1].loss < log[0].loss


# --- optimisers, schedules and phases, by hand


def rates(steps: int, **changes: Any) -> list[float]:
    """The learning rate of each step."""
    recipe = Recipe(**{"epochs": 1, "lr_low": 0.1, "lr_high": 0.5, "optimizer": "sgd", **changes})
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))], recipe)
    schedule = make_schedule(optimizer, recipe, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_triangular_rate() -> None:
    wave = [abs((step / 10) % 2 - 1) for step in range(40)]
    assert rates(40, schedule="triangular", cycles=2) == pytest.approx([0.5 - 0.4 * one for one in wave])


def test_cosine_rate() -> None:
    curve = [0.1 + 0.4 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    assert rates(20, schedule="cosine") == pytest.approx(curve)


def test_poly_rate() -> None:
    assert rates(20, schedule="poly") == pytest.approx([0.1 + 0.4 * (1 - step / 20) ** 0.9 for step in range(20)])


def test_constant_rate() -> None:
    assert rates(20, schedule="constant") == [0.5] * 20


@pytest.mark.parametrize("schedule", ["cosine", "poly", "constant"])
def test_warm_up_rises_to_the_highest_rate_and_the_rest_follows(schedule: str) -> None:
    found = rates(25, schedule=schedule, warmup=0.2)
    assert found[:5] == pytest.approx([0.5 * (step + 1) / 6 for step in range(5)])
    assert found[5:] == pytest.approx(rates(20, schedule=schedule))


def test_optimisers_of_the_recipes() -> None:
    weights = [nn.Parameter(torch.zeros(1))]
    adam = make_optimizer(weights, Recipe(epochs=1, weight_decay=0.3))
    assert isinstance(adam, torch.optim.Adam) and adam.defaults["weight_decay"] == 0.3
    given: dict[str, Any] = {"momentum": 0.8, "nesterov": True, "weight_decay": 0.2}
    sgd = make_optimizer(weights, Recipe(epochs=1, optimizer="sgd", **given))
    assert isinstance(sgd, torch.optim.SGD)
    assert {key: sgd.defaults[key] for key in given} == given


class Calls:
    """A loss that moves every weight by a known amount and remembers when it was asked."""

    def __init__(self, slope: float = 1.0) -> None:
        self.slope = slope
        self.modes: list[bool] = []

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
        self.modes.append(model.training)
        return self.slope * torch.stack([parameter.sum() for parameter in model.parameters()]).sum()


Build = Callable[..., Trainer]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A trainer of a linear model by given phases; SGD of rate 1, so that a step subtracts the gradient."""
    sets = load_dataset("digits", split="train"), load_dataset("digits", split="val")
    plain = {"batch_size": 250, "optimizer": "sgd", "momentum": 0.0, "lr_high": 1.0, "schedule": "constant"}

    def make(*phases: Phase, model: nn.Module | None = None, **changes: Any) -> Trainer:
        recipe = Recipe(**{"epochs": 1, "attack_steps": 1, **plain, **changes})
        entry = replace(MODELS.get("resnet-st"), objective=phases)
        start = model if model is not None else Flat(64, 10)
        return Trainer(start, entry, recipe, *sets, TrainSpec("resnet-st", "digits", tmp_path), {})

    return make


def test_phases_are_active_in_their_span_with_a_schedule_of_their_own(build: Build) -> None:
    first, second, both = Calls(), Calls(), Calls()
    phases = Phase(first, span=(0, 0.6)), Phase(second, span=(0.6, 1)), Phase(both)
    trainer = build(*phases, epochs=5, schedule="poly", lr_low=0.0)
    lengths = {"first": 12, "second": 8, "both": 20}
    counts = []
    for _ in range(5):
        before = [len(calls.modes) for calls in (first, second, both)]
        trainer._train_epoch()
        trainer.epoch += 1
        counts.append([len(calls.modes) - old for calls, old in zip((first, second, both), before, strict=True)])
    assert counts == [[4, 0, 4]] * 3 + [[0, 4, 4]] * 2
    steps = [scheduler.last_epoch for scheduler in trainer.learner.schedulers]
    assert steps == list(lengths.values())
    # Each has come to the end of its own fall.
    assert [optimizer.param_groups[0]["lr"] for optimizer in trainer.learner.optimizers] == [0.0, 0.0, 0.0]


def test_the_kept_epoch_comes_from_the_last_phase(build: Build) -> None:
    trainer = build(Phase(Calls(), span=(0, 0.5)), Phase(Calls(), span=(0.5, 1)), epochs=4)
    log = [
        EpochLog(1, 0.0, 0.9, 0.9),
        EpochLog(2, 0.0, 0.8, 0.8),
        EpochLog(3, 0.0, 0.3, 0.4),
        EpochLog(4, 0.0, 0.3, 0.3),
    ]
    assert trainer.choice.chosen(log).epoch == 3


@pytest.mark.parametrize(("clip", "norm"), [(0.0, 5 * math.sqrt(650)), (2.0, 2.0)])
def test_gradients_are_clipped(build: Build, clip: float, norm: float) -> None:
    trainer = build(Phase(Calls(5.0)), clip=clip)
    before = torch.cat([parameter.detach().flatten().clone() for parameter in trainer.learner.model.parameters()])
    trainer.learner.step(trainer.x[:10], trainer.y[:10], [True])
    after = torch.cat([parameter.detach().flatten() for parameter in trainer.learner.model.parameters()])
    assert (before - after).norm().item() == pytest.approx(norm, rel=1e-5)


def test_average_of_the_weights_is_what_is_validated_and_kept(build: Build) -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    trainer = build(Phase(STANDARD[0].loss), model=model, ema=0.9, epochs=2, lr_high=0.1)
    expected: dict[str, Tensor] = {}
    step = trainer.learner.step

    def watched(*batch: Any) -> list[float]:
        losses = step(*batch)
        for key, value in model.state_dict().items():
            earlier = expected.get(key)
            fresh = value.clone() if earlier is None or not value.is_floating_point() else 0.9 * earlier + 0.1 * value
            expected[key] = fresh
        return losses

    trainer.learner.step = watched  # type: ignore[method-assign]
    best, log = trainer.run(None)
    shown = trainer.learner.shown.state_dict()
    assert set(shown) == set(model.state_dict())
    for key, value in shown.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[key])
            assert not torch.equal(value, model.state_dict()[key])
    trainer.learner.shown.eval()
    right = (trainer.learner.shown(trainer.x_val).argmax(1) == trainer.y_val).double().mean().item()
    assert right == log[-1].val_clean
    if trainer.choice.chosen(log).epoch == 2:
        assert all(torch.equal(best[key], value) for key, value in shown.items())


def test_replays_take_the_batch_again(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    trainer = build(Phase(calls), replays=3, schedule="poly", lr_low=0.0)
    seen: list[Tensor] = []

    def watched(x: Tensor, recipe: Recipe) -> Tensor:
        seen.append(x)
        return augmented(x, recipe)

    monkeypatch.setattr("moebench.trainer.augmented", watched)
    trainer._train_epoch()
    assert (len(seen), len(calls.modes)) == (4, 12)
    assert trainer.learner.optimizers[0].param_groups[0]["lr"] == 0.0, "the schedule counts replays"


def test_large_validation_splits_go_in_parts(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(Phase(Calls()))
    whole = trainer.validate()
    sizes: list[int] = []
    trainer.learner.model.register_forward_hook(lambda module, x, out: sizes.append(len(x[0])))
    monkeypatch.setattr("moebench.trainer.VALIDATION_BATCH", 100)
    clean, robust = trainer.validate()
    assert max(sizes) == 100 and 97 in sizes
    assert clean == whole[0] and robust == pytest.approx(whole[1], abs=0.05)


# --- mixed precision


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_trains_with_attacks_in_float32(tmp_path: Path, build: Build, precision: str) -> None:
    inside: list[torch.dtype] = []
    outside: list[torch.dtype] = []

    def loss(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
        def per_sample(logits: Tensor) -> Tensor:
            inside.append(logits.dtype)
            return F.cross_entropy(logits, y, reduction="none")

        logits = model(adversary(model, x, per_sample))
        outside.append(logits.dtype)
        return F.cross_entropy(logits.float(), y)

    trainer = build(Phase(loss), precision=precision, epochs=3, lr_high=0.1)
    best, log = trainer.run(None)
    assert set(inside) == {torch.float32} and set(outside) == {getattr(torch, precision)}
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in best.values())
    assert log[-1].loss < log[0].loss
    assert trainer.learner.scaler.is_enabled() == (precision == "float16")
    assert not trainer.learner.scaler.is_enabled() or trainer.learner.scaler.get_scale() > 1


def test_a_weight_cast_without_gradients_still_learns(build: Build) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
        with torch.no_grad():
            model(x)
        return F.cross_entropy(model(x).float(), y)

    trainer = build(Phase(loss), precision="bfloat16")
    before = copy.deepcopy(trainer.learner.model.state_dict())
    trainer.learner.step(trainer.x[:50], trainer.y[:50], [True])
    assert not any(torch.equal(before[key], value) for key, value in trainer.learner.model.state_dict().items())


# --- one mathematics, and the same bits as ever


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_adversary_takes_the_iterates_of_the_attack(norm: Any) -> None:
    model, threat, steps = resnet().eval(), ThreatModel(norm, 0.3), 4
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    samples = digits(12)
    samples = Samples(samples.x, samples.y, torch.arange(12))
    rows = make_rows(samples, stream="train")
    oracle, attack = PlainOracle(model, threat), PGD(steps=steps)
    state = attack.start(rows, oracle)
    for count in range(steps + 1):
        adversary = TrainingAdversary(model, threat, Recipe(epochs=1, attack_steps=count), seed=0)
        x_adv = adversary(model, samples.x, lambda logits: F.cross_entropy(logits, samples.y, reduction="none"))
        assert torch.equal(x_adv, state.x), f"after {count} steps"
        if count < steps:
            attack.step(state, rows, oracle)
    assert not torch.equal(state.x, attack.start(rows, oracle).x)


SINCE_THE_FIRST_WEIGHTS = {
    ("rt-er", "triangular"): "3af7645c1759d96885cd37ec6ede323afb83a4de5bc629e610409516c6ad1525",
    ("resnet-trades", "cosine"): "3eef8914d87d3f8778dcd4cfe47bef7aba2953a3cc6256ee6665c271eb38697f",
}
"""Hashes of two-epoch weights, made by the loop that trained the shipped models, before it learnt anything more."""


@pytest.mark.skipif(
    torch.__version__.split("+")[0] != "2.15.0" or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="other versions and processors round otherwise",
)
@pytest.mark.parametrize(("model", "schedule"), SINCE_THE_FIRST_WEIGHTS)
def test_defaults_train_the_same_bits_as_ever(tmp_path: Path, model: str, schedule: str) -> None:
    recipe: dict[str, Any] = {"epochs": 2, "attack_steps": 2}
    if schedule == "cosine":
        recipe |= {"optimizer": "sgd", "schedule": "cosine", "lr_high": 0.05, "clip": 1.0, "warmup": 0.2}
    path, _ = train(TrainSpec(model, "digits", tmp_path, recipe=recipe))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SINCE_THE_FIRST_WEIGHTS[model, schedule]


def test_step_schedule_falls_to_a_tenth_at_half_and_again_at_three_quarters() -> None:
    recipe = Recipe(epochs=1, optimizer="sgd", schedule="step", lr_low=0.0, lr_high=0.1)
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))], recipe)
    scheduler = make_schedule(optimizer, recipe, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1] * 50 + [0.01] * 25 + [0.001] * 25)

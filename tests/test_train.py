from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import Flat
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.datasets import load_dataset
from moebench.errors import RunError, UsageError
from moebench.models import MODELS
from moebench.models._base import Adversary, Phase, Recipe, Shape, register_model
from moebench.models._objectives import STANDARD
from moebench.models._resnet import resnet8
from moebench.models._weights import read_weights
from moebench.schema import ThreatModel
from moebench.threat import within
from moebench.train import (
    EpochLog,
    Trainer,
    TrainingAdversary,
    TrainSpec,
    make_optimizer,
    make_schedule,
    split_settings,
    train,
)

# Fewer steps than the recipes: the loop is the same and an epoch takes a fraction of a second.
# One cycle, or the learning rate would be the same at the start of every epoch.
QUICK: dict[str, Any] = {"cycles": 1, "attack_steps": 1, "batch_size": 100, "lr_low": 2e-3, "lr_high": 8e-3}


def spec(out: Path, model: str = "resnet-at", *, epochs: int = 2, **changes: Any) -> TrainSpec:
    recipe = {**QUICK, "epochs": epochs, **changes.pop("recipe", {})}
    return TrainSpec(model, "digits", out, recipe=recipe, **changes)


def refused(wanted: TrainSpec, progress: Callable[[EpochLog, int], None] | None = None) -> str:
    """The one line of the error that training must end in."""
    with pytest.raises(UsageError) as caught:
        train(wanted, progress)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def command(out: Path, *words: str, model: str = "resnet-at", epochs: int = 4) -> list[str]:
    line = [sys.executable, "-m", "moebench", "train", "--model", model, "--epochs", str(epochs), "--out", str(out)]
    return [*line, *(part for key, value in QUICK.items() for part in ("--set", f"{key}={value}")), *words]


def run(line: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, capture_output=True, text=True, timeout=200, check=False, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs without an interruption."""
    out = tmp_path_factory.mktemp("undisturbed")
    path, _ = train(spec(out, epochs=4))
    return path


# --- what training writes


def test_weights_and_card(undisturbed: Path) -> None:
    assert sorted(os.listdir(undisturbed.parent)) == ["resnet-at.json", "resnet-at.safetensors"]
    state, card = read_weights(undisturbed)
    assert (card["model"], card["dataset"], card["seed"]) == ("resnet-at", "digits", 0)
    assert (card["num_classes"], card["shape"]) == (10, [1, 8, 8])
    assert card["recipe"] == {**card["recipe"], **QUICK, "epochs": 4}
    assert card["threat"] == {"norm": "Linf", "eps": 0.2, "lower": 0.0, "upper": 1.0}
    assert card["data_sha256"] == {split: load_dataset("digits", split=split).sha256 for split in ("train", "val")}
    assert [line["epoch"] for line in card["log"]] == [1, 2, 3, 4]
    best = max(card["log"], key=lambda line: (line["val_robust"], -line["epoch"]))
    chosen = card["validation"]
    assert (chosen["epoch"], chosen["clean"], chosen["robust"]) == (
        best["epoch"],
        best["val_clean"],
        best["val_robust"],
    )
    model = MODELS.get("resnet-at").make(10, (1, 8, 8)).eval()
    model.load_state_dict(state)
    data = load_dataset("digits", split="val")
    with torch.no_grad():
        right = model(torch.from_numpy(data.images)).argmax(1) == torch.from_numpy(data.labels)
    assert right.double().mean().item() == chosen["clean"]


def test_the_cards_command_trains_it_again(tmp_path: Path, undisturbed: Path) -> None:
    words = read_weights(undisturbed)[1]["command"].split()
    assert words[:2] == ["moebench", "train"]
    done = run([sys.executable, "-m", *words, "--out", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "resnet-at.safetensors").read_bytes() == undisturbed.read_bytes()
    assert "chosen on the validation split" in done.stdout
    assert "epoch 4/4" in done.stderr


def test_same_seed_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    first, _ = train(spec(tmp_path / "a", "resnet-st"))
    torch.rand(7)  # training must not depend on what was drawn before it
    second, _ = train(spec(tmp_path / "b", "resnet-st"))
    assert first.read_bytes() == second.read_bytes()
    other, _ = train(spec(tmp_path / "c", "resnet-st", seed=1))
    assert not torch.equal(load_file(first)["network.conv1.weight"], load_file(other)["network.conv1.weight"])


def test_another_recipe_trains_other_weights(tmp_path: Path, undisturbed: Path) -> None:
    path, card = train(spec(tmp_path, epochs=1, recipe={"translate": 0, "select": "mean"}))
    assert card["validation"]["selected_by"] == "mean"
    assert path.read_bytes() != undisturbed.read_bytes()


def test_progress_is_told_each_epoch(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    train(spec(tmp_path, "resnet-st"), lambda line, epochs: told.append((line.epoch, epochs)))
    assert told == [(1, 2), (2, 2)]


# --- interruptions


class Interrupt:
    """Interrupts after the given epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.seen: list[int] = []

    def __call__(self, line: EpochLog, epochs: int) -> None:
        self.seen.append(line.epoch)
        if line.epoch == self.epoch:
            raise KeyboardInterrupt


def test_goes_on_after_each_interruption_as_if_there_had_been_none(tmp_path: Path, undisturbed: Path) -> None:
    for epoch in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            train(spec(tmp_path, epochs=4), Interrupt(epoch))
        assert os.listdir(tmp_path) == [".resnet-at.training.pt"]
    last = Interrupt(0)
    path, card = train(spec(tmp_path, epochs=4), last)
    assert last.seen == [4]
    assert path.read_bytes() == undisturbed.read_bytes()
    assert card["log"] == read_weights(undisturbed)[1]["log"]
    assert sorted(os.listdir(tmp_path)) == ["resnet-at.json", "resnet-at.safetensors"]


def test_goes_on_after_a_kill_as_if_there_had_been_none(tmp_path: Path, undisturbed: Path) -> None:
    checkpoint = tmp_path / ".resnet-at.training.pt"
    with subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not checkpoint.exists():
            assert process.poll() is None, "it ended before its first checkpoint"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "resnet-at.safetensors").exists()
    assert torch.load(checkpoint, weights_only=True)["epoch"] < 4
    done = run(command(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "resnet-at.safetensors").read_bytes() == undisturbed.read_bytes()


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A folder with the checkpoint of one epoch of two."""
    with pytest.raises(KeyboardInterrupt):
        train(spec(tmp_path), Interrupt(1))
    return tmp_path / ".resnet-at.training.pt"


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"recipe": {"beta": 1.0}}, {"epochs": 3}, {"recipe": {"batch_size": 50}}]
)
def test_checkpoint_of_another_run_is_refused(interrupted: Path, changes: dict[str, Any]) -> None:
    before = interrupted.read_bytes()
    message = refused(spec(interrupted.parent, **changes))
    assert "belongs to a run with another recipe or seed; delete it or use --fresh" in message
    assert interrupted.read_bytes() == before
    assert os.listdir(interrupted.parent) == [interrupted.name]


def test_fresh_starts_over(interrupted: Path) -> None:
    listen = Interrupt(0)
    train(spec(interrupted.parent, seed=1, fresh=True), listen)
    assert listen.seen == [1, 2]
    assert not interrupted.exists()


def garbage(path: Path) -> None:
    path.write_bytes(b"no checkpoint")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def something_else(path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, path)


def a_pickle(path: Path) -> None:
    torch.save(Flat(2, 2), path)


@pytest.mark.parametrize("damage", [garbage, truncated, empty, something_else, a_pickle])
def test_damaged_checkpoint_is_refused(interrupted: Path, damage: Callable[[Path], None]) -> None:
    damage(interrupted)
    message = refused(spec(interrupted.parent))
    assert message.startswith(f"cannot read {interrupted}")
    assert message.endswith("delete it or use --fresh")
    assert os.listdir(interrupted.parent) == [interrupted.name]


# --- what cannot be written


def small_files() -> None:
    """A full disk, as far as a process can tell: no file may grow past 20 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    done = run(command(tmp_path / "out", epochs=1), preexec_fn=small_files)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("moebench: cannot write ")
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path / "out") == []


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    assert refused(spec(tmp_path / "out", epochs=1)).startswith(f"cannot write {tmp_path / 'out'}")
    assert (tmp_path / "out").read_text() == "a file"


# --- starting from other weights


def test_missing_start_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    wanted = TrainSpec("jtd-moe", "digits", tmp_path, recipe={"init_from": {"robust": "rt-er-top2-nowhere"}})
    message = refused(wanted)
    assert message == (
        "jtd-moe starts from a trained rt-er-top2-nowhere; "
        f"run `moebench train --model rt-er-top2-nowhere --dataset digits --out {tmp_path}` first"
    )
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained MoE, and the same weights under the name of the other half."""
    out = tmp_path_factory.mktemp("halves")
    path, card = train(spec(out, "st-moe", recipe={"balance": 0.0}))
    (out / "rt-er.safetensors").write_bytes(path.read_bytes())
    (out / "rt-er.json").write_text(json.dumps({**card, "model": "rt-er"}))
    return out


def test_composition_of_trained_parts(halves: Path) -> None:
    path, card = train(TrainSpec("dual-moe", "digits", halves))
    part, dual = load_file(halves / "st-moe.safetensors"), load_file(path)
    assert set(dual) == {f"{half}.{key}" for half in ("standard", "robust") for key in part}
    for key, value in part.items():
        assert torch.equal(dual[f"standard.{key}"], value)
        assert torch.equal(dual[f"robust.{key}"], value)
    sha256 = read_weights(halves / "st-moe.safetensors")[1]["sha256"]
    assert card["initialised_from"] == {"standard": f"st-moe {sha256}", "robust": f"rt-er {sha256}"}
    assert [line["epoch"] for line in card["log"]] == [0]
    assert card["validation"]["clean"] > 0.2


def test_start_trained_on_something_else_is_refused(tmp_path: Path, halves: Path) -> None:
    for name in ("st-moe", "rt-er"):
        (tmp_path / f"{name}.safetensors").write_bytes((halves / f"{name}.safetensors").read_bytes())
        card = json.loads((halves / f"{name}.json").read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps({**card, "dataset": "npz:other.npz"}))
    message = refused(TrainSpec("dual-moe", "digits", tmp_path))
    assert "st-moe.safetensors holds st-moe trained on npz:other.npz" in message
    assert not (tmp_path / "dual-moe.safetensors").exists()


def test_checkpoint_of_another_start_is_refused(tmp_path: Path, halves: Path) -> None:
    for file in halves.glob("*-*.*"):
        if file.stem in ("st-moe", "rt-er"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    wanted = spec(tmp_path, "jtd-moe", recipe={"batch_size": 500})
    with pytest.raises(KeyboardInterrupt):
        train(wanted, Interrupt(1))
    weights = tmp_path / "rt-er.safetensors"
    train(spec(tmp_path, "st-moe", seed=1, epochs=1, recipe={"balance": 0.0}))
    weights.write_bytes((tmp_path / "st-moe.safetensors").read_bytes())
    card = json.loads((tmp_path / "st-moe.json").read_text())
    weights.with_suffix(".json").write_text(json.dumps({**card, "model": "rt-er"}))
    assert "belongs to a run with another recipe or seed" in refused(wanted)


# --- runs that fail


def not_a_number(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    """Cross-entropy that becomes NaN in the second epoch."""
    steps = getattr(model, "steps", 0) + 1
    model.steps = steps  # type: ignore[assignment]
    return F.cross_entropy(model(x), y) * (float("nan") if steps > 10 else 1.0)


def learns_nothing(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    logits: Tensor = model(x)
    return logits.sum() * 0.0


FACTS: dict[str, Any] = {"summary": "a test's", "family": "dense", "training": "none"}


@register_model("test-nan", recipe=Recipe(epochs=2), objective=(Phase(not_a_number),), **FACTS)
@register_model("test-collapse", recipe=Recipe(epochs=2), objective=(Phase(learns_nothing),), **FACTS)
@register_model("test-untrained", **FACTS)
def flat(num_classes: int, shape: Shape) -> nn.Module:
    return Flat(64, num_classes)


def test_nan_stops_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    listen = Interrupt(0)
    with pytest.raises(RunError, match="the loss of test-nan became nan in epoch 2; nothing was saved"):
        train(spec(tmp_path, "test-nan"), listen)
    assert listen.seen == [1]
    assert os.listdir(tmp_path) == []


def test_collapse_stops_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="test-collapse collapsed: validation accuracy never passed 20%; nothing was"):
        train(spec(tmp_path, "test-collapse"))
    assert os.listdir(tmp_path) == []


def test_collapse_of_a_real_recipe(tmp_path: Path) -> None:
    done = run(command(tmp_path, "--set", "lr_high=1e9", "--set", "lr_low=1e9", model="resnet-st", epochs=1))
    assert done.returncode == 1
    assert "nothing was saved" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


# --- what cannot be asked for


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet-aat"}, "unknown model 'resnet-aat'; did you mean resnet-at"),
        ({"model": "test-untrained"}, "model 'test-untrained' has no training recipe"),
        ({"recipe": {"epoch": 3}}, "a recipe has no epoch; it has epochs, batch_size,"),
        ({"settings": {"width": 3}}, "model 'resnet-at' has no setting 'width'"),
        ({"dataset": "digit"}, "unknown data set 'digit'; did you mean digits"),
        ({"recipe": {"epochs": "three"}}, "epochs of a recipe must be a whole number >= 0, got 'three'"),
        ({"recipe": {"epochs": True}}, "epochs of a recipe must be a whole number >= 0, got True"),
        ({"recipe": {"batch_size": 0}}, "batch_size of a recipe must be a whole number >= 1, got 0"),
        ({"recipe": {"cycles": 0}}, "cycles of a recipe must be a whole number >= 1, got 0"),
        ({"recipe": {"attack_steps": 1.5}}, "attack_steps of a recipe must be a whole number >= 0, got 1.5"),
        ({"recipe": {"translate": -1}}, "translate of a recipe must be a whole number >= 0, got -1"),
        ({"recipe": {"lr_low": "x"}}, "lr_low of a recipe must be a finite number >= 0, got 'x'"),
        ({"recipe": {"beta": float("nan")}}, "beta of a recipe must be a finite number >= 0, got nan"),
        ({"recipe": {"select": "best"}}, "select of a recipe must be clean, robust or mean, got 'best'"),
        ({"recipe": {"init_from": "rt-er"}}, "init_from of a recipe must map parts to model names, got 'rt-er'"),
        ({"seed": -1}, "the seed must be between 0 and 4294967295, got -1"),
        ({"model": "dual-moe", "recipe": {"epochs": 3}}, "dual-moe is composed of trained models"),
    ],
)
def test_bad_request_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    wanted: dict[str, Any] = {"model": "resnet-at", "dataset": "digits", "out": tmp_path / "out", **changes}
    assert message in refused(TrainSpec(**wanted))
    assert not (tmp_path / "out").exists()


def test_settings_are_split_between_model_and_recipe() -> None:
    given = {"experts": 2, "beta": 3.0, "router": "frozen", "nonsense": 1}
    assert split_settings("rt-er", given) == ({"experts": 2, "router": "frozen"}, {"beta": 3.0, "nonsense": 1})


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
def test_augmentation_shifts_and_fills_with_zeros(trainer: Callable[..., Trainer], reach: int) -> None:
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    shifted = trainer(translate=reach)._augment(x)
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
        parameter = next(run_.model.parameters())
        parameter.data.fill_(line.epoch)
        run_._keep_best()
        kept.append(next(iter(run_.best.values())).flatten()[0].item())
    assert kept[-1] == chosen, "the earliest of equals"
    assert run_.validation(run_.best, log)["epoch"] == chosen


def test_standard_objective_lowers_its_loss(trainer: Callable[..., Trainer]) -> None:
    run_ = trainer(attack_steps=0, epochs=2)
    assert run_.entry.objective == STANDARD
    _, log = run_.run(None)
    assert log[1].loss < log[0].loss


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


def test_a_phase_leaves_out_what_it_should() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 2), "c": nn.Linear(3, 3)}), "d": nn.Linear(4, 4)})
    phase = Phase(learns_nothing, part="a", without="a.c")
    assert [parameter.shape[0] for parameter in phase.parameters(model)] == [2, 2]

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import Flat
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.cli import main
from moebench.datasets import load_dataset
from moebench.errors import RunError, UsageError
from moebench.models import MODELS
from moebench.models._base import Adversary, Phase, Recipe, Shape, register_model
from moebench.models._objectives import STANDARD
from moebench.models._weights import read_weights
from moebench.train import EpochLog, TrainSpec, split_settings, train

# Fewer steps than the recipes: the loop is the same and an epoch takes a fraction of a second.
# One cycle, or the learning rate would be the same at the start of every epoch.
FILES = ["resnet-at.json", "resnet-at.log.jsonl", "resnet-at.safetensors"]
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
    assert sorted(os.listdir(undisturbed.parent)) == FILES
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
        assert sorted(os.listdir(tmp_path)) == [".resnet-at.training.pt", "resnet-at.log.jsonl"]
    last = Interrupt(0)
    path, card = train(spec(tmp_path, epochs=4), last)
    assert last.seen == [4]
    assert path.read_bytes() == undisturbed.read_bytes()
    assert card["log"] == read_weights(undisturbed)[1]["log"]
    assert sorted(os.listdir(tmp_path)) == FILES


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


DIES = """
import os, signal, sys
import torch
from moebench.cli import main

whole, written = torch.save, 0


def half(state, path):
    global written
    whole(state, path)
    written += 1
    if written == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


torch.save = half
main(sys.argv[1:])
"""


def test_a_kill_while_the_checkpoint_is_written_costs_one_epoch(tmp_path: Path, undisturbed: Path) -> None:
    died = run([sys.executable, "-c", DIES, *command(tmp_path)[3:]])
    assert died.returncode == -signal.SIGKILL
    draft, checkpoint = sorted(name for name in os.listdir(tmp_path) if name.startswith("."))
    assert re.fullmatch(r"\.resnet-at\.training\.\d+", draft) and checkpoint == ".resnet-at.training.pt"
    goes_on = Interrupt(0)
    path, _ = train(spec(tmp_path, epochs=4), goes_on)
    assert goes_on.seen == [2, 3, 4]
    assert path.read_bytes() == undisturbed.read_bytes()
    assert sorted(os.listdir(tmp_path)) == FILES


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
    assert "belongs to a run with another recipe or seed, or on other data; delete it or use --fresh" in message
    assert interrupted.read_bytes() == before
    assert sorted(os.listdir(interrupted.parent)) == [interrupted.name, "resnet-at.log.jsonl"]


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
    assert sorted(os.listdir(interrupted.parent)) == [interrupted.name, "resnet-at.log.jsonl"]


# --- what cannot be written


def small_files() -> None:
    """A full disk, as far as a process can tell: no file may grow past 20 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    done = run(command(tmp_path / "out", epochs=1), preexec_fn=small_files)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("moebench: cannot write ")
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path / "out") == []


@contextmanager
def no_room(limit: int = 100) -> Iterator[None]:
    """No file of this process may grow past so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("filled", [1, 2])
def test_a_disk_that_fills_costs_one_epoch_at_most(tmp_path: Path, filled: int) -> None:
    """After the first of two epochs the next checkpoint has no room, after the second the weights have none."""
    whole, _ = train(spec(tmp_path / "whole", "resnet-st"))
    room = ExitStack()
    with room, pytest.raises(RunError) as caught:
        train(
            spec(tmp_path / "out", "resnet-st"), lambda line, _: line.epoch == filled and room.enter_context(no_room())
        )
    lost = tmp_path / "out" / (".resnet-st.training.pt" if filled == 1 else "resnet-st.safetensors")
    assert re.fullmatch(rf"cannot write {re.escape(str(lost))}: .*; the checkpoint .*", str(caught.value))
    assert sorted(os.listdir(tmp_path / "out")) == [".resnet-st.training.pt", "resnet-st.log.jsonl"]
    goes_on = Interrupt(0)
    path, card = train(spec(tmp_path / "out", "resnet-st"), goes_on)
    assert goes_on.seen == ([2] if filled == 1 else [])
    assert path.read_bytes() == whole.read_bytes() and card["log"] == read_weights(whole)[1]["log"]
    assert sorted(os.listdir(tmp_path / "out")) == ["resnet-st.json", "resnet-st.log.jsonl", "resnet-st.safetensors"]


@pytest.mark.parametrize("place", ["out", "out/deeper/still"])
def test_folder_that_is_a_file_is_refused_before_any_work(tmp_path: Path, place: str) -> None:
    (tmp_path / "out").write_text("a file")
    listen = Interrupt(0)
    message = refused(spec(tmp_path / place, epochs=1), listen)
    assert message == f"cannot write to {tmp_path / place}: Not a directory; choose another place for --out"
    assert listen.seen == [] and (tmp_path / "out").read_text() == "a file"


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


# --- what lies there already


def test_weights_of_another_variant_are_not_written_over(tmp_path: Path) -> None:
    quick = {"recipe": {"batch_size": 50, "balance": 0.0}, "epochs": 1}
    path, _ = train(spec(tmp_path, "st-moe", settings={"experts": 2}, **quick))
    before = path.read_bytes()
    message = refused(spec(tmp_path, "st-moe", **quick))
    assert message == (
        f"{path} holds st-moe[experts=2] trained on digits; choose another --out, or --fresh to replace it"
    )
    assert path.read_bytes() == before
    train(spec(tmp_path, "st-moe", settings={"experts": 2}, seed=1, **quick))
    assert path.read_bytes() != before, "another seed is the same model"
    train(spec(tmp_path, "st-moe", fresh=True, **quick))
    assert read_weights(path)[1]["settings"] == {}


def test_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    mine, living = os.getpid(), os.getppid()
    stale = [f".resnet-st.training.{gone.pid}", f".resnet-st.training.{mine}", f".resnet-st.safetensors.{gone.pid}"]
    stale += [f".resnet-st.json.{gone.pid}"]
    kept = [f".resnet-st.training.{living}", f".resnet-at.training.{gone.pid}", ".resnet-st.training.x", "notes"]
    for name in (*stale, *kept):
        (tmp_path / name).write_text("a part")
    train(spec(tmp_path, "resnet-st"))
    assert sorted(os.listdir(tmp_path)) == sorted(
        [*kept, "resnet-st.json", "resnet-st.log.jsonl", "resnet-st.safetensors"]
    )


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


SURE: dict[str, Any] = {"optimizer": "sgd", "schedule": "constant", "lr_high": 0.5, "momentum": 0.0}
"""Teaches a linear model the digits in two epochs."""


def then_nothing(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    """Drives the weights to where all images get the same answer."""
    logits: Tensor = model(x)
    return -1e3 * logits[:, 3].mean()


LATE = (Phase(STANDARD[0].loss, span=(0.0, 0.5)), Phase(then_nothing, span=(0.5, 1.0)))


@register_model("test-fragile", recipe=Recipe(epochs=4), objective=STANDARD, **FACTS)
@register_model("test-late", recipe=Recipe(epochs=4), objective=LATE, **FACTS)
@register_model("test-nan", recipe=Recipe(epochs=2), objective=(Phase(not_a_number),), **FACTS)
@register_model("test-collapse", recipe=Recipe(epochs=2), objective=(Phase(learns_nothing),), **FACTS)
@register_model("test-untrained", **FACTS)
def flat(num_classes: int, shape: Shape) -> nn.Module:
    return Flat(64, num_classes)


@register_model("test-unused", recipe=Recipe(epochs=2), objective=STANDARD, **FACTS)
def unused(num_classes: int, shape: Shape) -> nn.Module:
    model = Flat(64, num_classes)
    model.register_buffer("unused", torch.full((2,), float("nan")))
    return model


def test_nan_stops_the_run_and_leaves_its_log(tmp_path: Path) -> None:
    listen = Interrupt(0)
    with pytest.raises(RunError, match=r"the loss of test-nan became nan in epoch 2; nothing was saved but .*jsonl$"):
        train(spec(tmp_path, "test-nan"), listen)
    assert listen.seen == [1]
    assert os.listdir(tmp_path) == ["test-nan.log.jsonl"]


def test_nan_in_the_first_epoch_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the loss of test-nan became nan in epoch 1; nothing was saved$"):
        train(spec(tmp_path, "test-nan", recipe={"batch_size": 50}))
    assert os.listdir(tmp_path) == []


def test_collapse_stops_the_run_and_leaves_its_log(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="test-collapse collapsed: validation accuracy never passed 20%; nothing was"):
        train(spec(tmp_path, "test-collapse"))
    assert os.listdir(tmp_path) == ["test-collapse.log.jsonl"]


def test_a_trial_that_learnt_nothing_is_told_to_train_longer(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"never passed 20%; nothing .* \(train longer, or try another seed"):
        train(spec(tmp_path, "test-collapse", epochs=1))


def test_an_unused_part_that_is_no_number_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^weights of test-unused are no numbers, unused first; nothing was saved but"):
        train(spec(tmp_path, "test-unused", recipe={**SURE, "select": "clean"}))
    assert os.listdir(tmp_path) == ["test-unused.log.jsonl"]


def test_collapse_after_pre_training_is_a_collapse(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="test-late collapsed: validation accuracy never passed 20%"):
        train(spec(tmp_path, "test-late", epochs=4, recipe={**SURE, "batch_size": 10}))
    log = [json.loads(line) for line in (tmp_path / "test-late.log.jsonl").read_text().splitlines()]
    assert max(line["val_clean"] for line in log[:2]) > 0.5 > max(line["val_clean"] for line in log[2:])


@pytest.mark.parametrize("select", ["clean", "robust", "mean"])
def test_robust_accuracy_at_chance_is_no_success(tmp_path: Path, select: str) -> None:
    # Four epochs are all that this registered recipe has.
    wanted = spec(tmp_path, "test-fragile", epochs=4, recipe={**SURE, "select": select, "attack_steps": 10})
    if select == "clean":
        assert "warning" not in train(wanted)[1]["validation"]
        return
    with pytest.raises(RunError, match=r"test-fragile collapsed: robust validation accuracy \d\.\d%, and a constant"):
        train(wanted)
    assert os.listdir(tmp_path) == ["test-fragile.log.jsonl"]


def test_trial_with_robust_accuracy_at_chance_is_saved_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(tmp_path, "--set", "attack_steps=10", "--set", "select=robust", model="resnet-st", epochs=2)[3:]
    assert main(words) == 0
    warning = read_weights(tmp_path / "resnet-st.safetensors")[1]["validation"]["warning"]
    assert warning.startswith("robust validation accuracy ")
    assert warning.endswith("and a constant answer gets 10.1%: train longer")
    assert f"warning: {warning}" in capsys.readouterr().err.splitlines()


def test_collapse_of_a_real_recipe(tmp_path: Path) -> None:
    done = run(command(tmp_path, "--set", "lr_high=1e9", "--set", "lr_low=1e9", model="resnet-st", epochs=1))
    assert done.returncode == 1
    assert "nothing was saved" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) in ([], ["resnet-st.log.jsonl"])


# --- what cannot be asked for


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet-aat"}, "unknown model 'resnet-aat'; did you mean resnet-at"),
        ({"model": "test-untrained"}, "model 'test-untrained' has no training recipe"),
        ({"recipe": {"epoch": 3}}, "a recipe has no epoch; did you mean epochs? it has epochs, batch_size,"),
        ({"model": "rt-er", "recipe": {"routr": "frozen"}}, "a recipe has no routr; did you mean router"),
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
        ({"recipe": {"epochs": 0}}, "resnet-at is not composed of trained models: it needs at least 1 epoch, got 0"),
        ({"objective": "at", "recipe": {"epochs": 0}}, "resnet-at is not composed of trained models"),
        ({"objective": "trades", "recipe": {"epochs": 0}}, "recipe 'trades' needs at least 1 epoch, got 0"),
        ({"recipe": {"ema": 1.0}}, "ema of a recipe must be less than 1, got 1.0"),
        ({"recipe": {"replays": 0}}, "replays of a recipe must be a whole number >= 1, got 0"),
        ({"recipe": {"precision": "half"}}, "precision of a recipe must be float32, float16 or bfloat16, got 'half'"),
        ({"recipe": {"fast_from": "x"}}, "fast_from of a recipe must be start or clean, got 'x'"),
        ({"model": "test-late", "recipe": {"epochs": 1}}, "would get none of 1; use more epochs"),
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


# --- resuming with more state, and on other data


@pytest.mark.parametrize(
    ("model", "objective", "recipe"),
    [
        ("resnet-at", None, {"optimizer": "sgd", "schedule": "cosine", "ema": 0.9, "lr_high": 0.1, "nesterov": True}),
        ("resnet-at", "free-at", {"replays": 2, "batch_size": 250}),
        ("test-fragile", None, {**SURE, "precision": "float16", "validate_every": 2, "select": "clean"}),
    ],
    ids=["sgd-ema", "free-at", "float16"],
)
def test_all_state_survives_an_interruption(
    tmp_path: Path, model: str, objective: str | None, recipe: dict[str, Any]
) -> None:
    whole, _ = train(spec(tmp_path / "a", model, epochs=3, objective=objective, recipe=recipe))
    wanted = spec(tmp_path / "b", model, epochs=3, objective=objective, recipe=recipe)
    for epoch in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            train(wanted, Interrupt(epoch))
    path, card = train(wanted)
    assert path.read_bytes() == whole.read_bytes()
    assert card["log"] == read_weights(whole)[1]["log"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_checkpoint_on_other_data_is_refused(interrupted: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    def changed(name: str, **options: Any) -> Any:
        data = load_dataset(name, **options)
        return replace(data, sha256="0" * 64) if options["split"] == split else data

    monkeypatch.setattr("moebench.datasets._training.load_dataset", changed)
    assert "or on other data; delete it or use --fresh" in refused(spec(interrupted.parent))


def test_the_log_of_a_run_killed_before_its_last_line_is_whole(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(spec(tmp_path, "resnet-st"), Interrupt(2))
    path = tmp_path / "resnet-st.log.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    _, card = train(spec(tmp_path, "resnet-st"))
    log = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["epoch"], line["loss"]) for line in log] == [(line["epoch"], line["loss"]) for line in card["log"]]


def test_the_command_of_a_card_is_one_that_a_shell_reads() -> None:
    wanted = TrainSpec(
        "dual-moe",
        "npz:my data.npz",
        Path("out"),
        recipe={"init_from": {"robust": "rt-er"}, "beta": 3.0},
        objective="at",
    )
    assert shlex.split(wanted.command) == [
        "moebench", "train", "--model", "dual-moe", "--dataset", "npz:my data.npz", "--seed", "0", "--recipe", "at",
        "--set", "init_from={'robust': 'rt-er'}", "--set", "beta=3.0",
    ]  # fmt: skip


# --- single epochs and phases


def test_validation_every_third_epoch_and_after_the_last(tmp_path: Path) -> None:
    told: list[EpochLog] = []
    wanted = spec(tmp_path, epochs=5, recipe={"validate_every": 3, "batch_size": 500})
    _, card = train(wanted, lambda line, epochs: told.append(line))
    assert [line.val_clean is not None for line in told] == [False, False, True, False, True]
    assert [line.val_robust is not None for line in told] == [False, False, True, False, True]
    assert card["validation"]["epoch"] in (3, 5)
    log = [json.loads(line) for line in (tmp_path / "resnet-at.log.jsonl").read_text().splitlines()]
    assert [line["val_clean"] for line in log] == [line.val_clean for line in told]


def test_a_phase_leaves_out_what_it_should() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 2), "c": nn.Linear(3, 3)}), "d": nn.Linear(4, 4)})
    phase = Phase(learns_nothing, part="a", without="a.c")
    assert [parameter.shape[0] for parameter in phase.parameters(model)] == [2, 2]

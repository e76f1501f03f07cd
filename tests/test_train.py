"""Training: what it writes, what it starts from, and what cannot be asked for."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_runs import FILES, QUICK, Interrupt, learns_nothing, refused, run, spec

from moebench.datasets import load_dataset
from moebench.models import MODELS
from moebench.models._base import Phase
from moebench.models._weights import read_weights
from moebench.train import EpochLog, TrainSpec, split_settings, train

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

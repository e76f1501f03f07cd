"""Runs whose loss is no number and runs that collapse are failures, and say so."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from training_runs import SURE, Interrupt, command, run, spec

from moebench.cli import main
from moebench.errors import RunError
from moebench.models._weights import read_weights
from moebench.train import train


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

"""Training goes on after interruptions, kills and full disks as if there had been none."""

from __future__ import annotations

import json
import os
import re
import resource
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
from small_models import Flat
from training_runs import FILES, SURE, Interrupt, command, refused, run, spec

from moebench.datasets import load_dataset
from moebench.errors import RunError
from moebench.models._weights import read_weights
from moebench.train import train

# --- interruptions


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

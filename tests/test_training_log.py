"""The log of a training run, its continuation, TensorBoard, and what a terminal is told."""

from __future__ import annotations

import builtins
import json
import resource
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moebench.commands.train import TrainingBar
from moebench.errors import RunError, UsageError
from moebench.train import EpochLog, TrainSpec, train
from moebench.training_log import TrainingLog

SPEC: dict[str, Any] = {
    "model": "resnet-st",
    "dataset": "digits",
    "recipe": {"epochs": 3, "cycles": 1, "attack_steps": 1, "batch_size": 100, "lr_low": 4e-3, "lr_high": 8e-3},
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_line_is_there_when_its_epoch_ends(tmp_path: Path) -> None:
    path = tmp_path / "resnet-st.log.jsonl"
    seen: list[list[int]] = []
    _, card = train(
        TrainSpec(out=tmp_path, **SPEC), lambda line, epochs: seen.append([x["epoch"] for x in lines(path)])
    )
    assert seen == [[1], [1, 2], [1, 2, 3]]
    written = lines(path)
    for line, known in zip(written, card["log"], strict=True):
        assert {key: line[key] for key in known} == known
        assert line["seconds"] > 0
    # The rate at the start of each epoch; one triangle over three epochs.
    assert [line["lr"] for line in written] == [
        [pytest.approx(rate)] for rate in (4e-3, 4e-3 + 4e-3 * 10 / 15, 4e-3 * 5 / 3)
    ]


def test_another_run_replaces_the_log(tmp_path: Path) -> None:
    path = tmp_path / "resnet-st.log.jsonl"
    path.write_text('{"epoch": 77}\n')
    train(TrainSpec(out=tmp_path, **SPEC))
    assert [line["epoch"] for line in lines(path)] == [1, 2, 3]


def epoch(number: int, **more: Any) -> dict[str, Any]:
    return {"epoch": number, "loss": 1.0 / number, **more}


def test_a_continued_log_has_each_epoch_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    kept = [epoch(1, seconds=5.0), epoch(2, seconds=6.0), epoch(3, seconds=7.0)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in kept) + '{"epoch": 4, "lo')
    log = TrainingLog(path)
    log.go_on([epoch(1), epoch(2)])
    log.write(epoch(3, seconds=8.0))
    log.write(epoch(4))
    log.close()
    assert lines(path) == [*kept[:2], epoch(3, seconds=8.0), epoch(4)]


@pytest.mark.parametrize("there", [None, "garbage\n\n[1]\n3\n", '{"epoch": 1, "loss": 0.5}\n{"epoch": "2"}\n'])
def test_what_the_file_lacks_comes_from_the_checkpoint(tmp_path: Path, there: str | None) -> None:
    path = tmp_path / "folder" / "log.jsonl"
    if there is not None:
        path.parent.mkdir()
        path.write_text(there)
    log = TrainingLog(path)
    log.go_on([epoch(1), epoch(2)])
    assert path.exists() == (there is not None)
    log.write(epoch(3))
    log.close()
    assert lines(path) == [epoch(1), epoch(2), epoch(3)]


def test_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"^cannot write .*log.jsonl: "):
        TrainingLog(tmp_path / "file" / "log.jsonl").write(epoch(1))


def test_a_full_disk_is_said_once_and_not_again_on_closing(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "log.jsonl")
    log.write(epoch(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
    try:
        with pytest.raises(RunError, match=r"^cannot write .*log.jsonl: File too large"):
            log.write(epoch(2))
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    again = TrainingLog(tmp_path / "log.jsonl")
    again.go_on([epoch(1), epoch(2)])
    again.catch_up()
    assert lines(tmp_path / "log.jsonl") == [epoch(1), epoch(2)]


# --- TensorBoard


class Writer:
    """Stands for SummaryWriter where TensorBoard is not installed."""

    made: list[Writer]

    def __init__(self, log_dir: str, purge_step: int) -> None:
        self.log_dir, self.purge_step = log_dir, purge_step
        self.scalars: dict[tuple[str, int], float] = {}
        self.closed = False
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name, step] = value

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_events_hold_the_numbers_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    Writer.made = []
    train(TrainSpec(out=tmp_path, tensorboard=True, **{**SPEC, "recipe": {**SPEC["recipe"], "validate_every": 2}}))
    (writer,) = Writer.made
    assert writer.closed
    assert (writer.log_dir, writer.purge_step) == (str(tmp_path / "resnet-st.tensorboard"), 1)
    expected = {}
    for line in lines(tmp_path / "resnet-st.log.jsonl"):
        values = {"loss": line["loss"], "val_clean": line["val_clean"], "val_robust": line["val_robust"]}
        values |= {"lr/0": line["lr"][0], "seconds": line["seconds"]}
        expected |= {(key, line["epoch"]): value for key, value in values.items() if value is not None}
    assert writer.scalars == expected and ("val_clean", 1) not in expected


def test_missing_tensorboard_is_one_line_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError) as caught:
        train(TrainSpec(out=tmp_path / "out", tensorboard=True, **SPEC))
    assert str(caught.value) == (
        "--tensorboard needs the package tensorboard (No module named 'tensorboard'); "
        "`pip install 'moebench[tensorboard]'`"
    )
    assert not (tmp_path / "out").exists()


def test_real_tensorboard_reads_the_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-not-found, unused-ignore]
        EventAccumulator,
    )

    train(TrainSpec(out=tmp_path, tensorboard=True, **SPEC))
    events = EventAccumulator(str(tmp_path / "resnet-st.tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(line["epoch"], pytest.approx(line["loss"])) for line in lines(tmp_path / "resnet-st.log.jsonl")]


# --- the terminal


def test_progress_tells_accuracies_pace_and_what_is_left() -> None:
    bar = TrainingBar("resnet-at")
    told = bar.describe(EpochLog(1, 2.5, 0.5, 0.25), 11, 3.0)
    assert told == "resnet-at: loss 2.500, val SA 50.0%, RA 25.0%, 3.0 s/epoch, 0:30 left"
    told = bar.describe(EpochLog(2, 1.5, None, None), 11, 1000.0)
    assert told == "resnet-at: loss 1.500, val SA 50.0%, RA 25.0%, 500.0 s/epoch, 1:15:00 left"


def test_pace_of_a_resumed_run_is_that_of_this_process() -> None:
    assert TrainingBar("m").describe(EpochLog(91, 1.0, None, None), 101, 2.0) == "m: loss 1.000, 2.0 s/epoch, 0:20 left"

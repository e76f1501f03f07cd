"""Labels and pictures in the store: what is kept, through kills, merges and older files."""

from __future__ import annotations

import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import (
    N,
    finish_cell,
    make_cell,
    make_chunk,
    make_example,
    make_protocol,
    make_record,
    make_run_start,
    same_examples,
)
from commands import MOE, Terminal
from hypothesis import given
from hypothesis import strategies as st

from moebench import cells
from moebench.attacks._engine import Engine
from moebench.datasets import load_dataset
from moebench.errors import RunError, UsageError
from moebench.schema import Chunk, Example, ExpertChoice, ThreatModel
from moebench.store import Store, migrate, pictures
from moebench.store.pictures import choose, pack_images, unpack_images

LABELS = np.arange(N) % 3
DATA = Path(__file__).parent / "data"


@pytest.fixture
def moebench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOEBENCH_DB", raising=False)
    return Terminal(tmp_path, capsys)


# Labels.


def test_labels_come_back_for_every_protocol_on_the_same_data(tmp_path: Path) -> None:
    wider = make_protocol(threat=ThreatModel("Linf", 0.3))
    other = make_protocol(data_sha256="ee" * 32)
    with Store.open(tmp_path / "r.db", write=True) as store:
        store.begin_run(make_run_start("old", protocol=wider))
        assert store.labels(wider) is None
        store.begin_run(make_run_start(), LABELS.astype(np.int32))
        store.begin_run(make_run_start("run-2", protocol=other))
        for protocol in (wider, make_protocol()):
            labels = store.labels(protocol)
            assert labels is not None and labels.dtype == np.int64
            np.testing.assert_array_equal(labels, LABELS)
        assert store.labels(other) is None and store.labels(make_protocol(data_sha256="unknown")) is None
    with sqlite3.connect(tmp_path / "r.db") as connection:
        assert connection.execute("SELECT count(*), count(labels) FROM protocol").fetchone() == (3, 2)
    connection.close()


@pytest.mark.parametrize("labels", [LABELS[:-1], LABELS + 1, LABELS - 1, LABELS / 1, LABELS[None]])
def test_labels_that_cannot_be_are_refused_with_the_run(tmp_path: Path, labels: Any) -> None:
    with Store.open(tmp_path / "r.db", write=True) as store:
        with pytest.raises(RunError, match="labels of digits must be 8 numbers from 0 to 2"):
            store.begin_run(make_run_start(), labels)
        assert store.runs() == []


def test_labels_that_contradict_the_stored_ones_are_refused(tmp_path: Path) -> None:
    with Store.open(tmp_path / "r.db", write=True) as store:
        store.begin_run(make_run_start(), LABELS)
        with pytest.raises(RunError, match="differ from those stored for the same data"):
            store.begin_run(make_run_start("run-2"), LABELS[::-1])


def test_damaged_labels_and_pictures_are_named(tmp_path: Path) -> None:
    with Store.open(tmp_path / "r.db", write=True) as store:
        store.begin_run(make_run_start(), LABELS)
        chunks = [make_chunk(), make_chunk("apgd-ce", broken={3}, examples=[make_example()])]
        result_id = finish_cell(store, "run-1", make_cell(), chunks)
    with sqlite3.connect(tmp_path / "r.db") as connection:
        connection.execute("UPDATE protocol SET labels = X'00'")
        connection.execute("UPDATE example SET images = substr(images, 1, 20)")
    connection.close()
    with Store.open(tmp_path / "r.db", write=False) as store:
        with pytest.raises(RunError, match="labels are damaged"):
            store.labels(make_protocol())
        with pytest.raises(RunError, match="an example is damaged"):
            store.examples(result_id)


# Which examples, and how small.


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60)), unique_by=lambda pair: pair[1]),
    st.integers(1, 8),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_the_choice_does_not_depend_on_how_the_samples_come_in(
    samples: list[tuple[int, int]], most: int, size: int, random: Any
) -> None:
    expected = [samples[at] for at in choose(samples, most)]
    assert len(expected) == min(most, len(samples)) and expected == [
        sorted(samples, key=lambda pair: pair[1])[at] for at in choose(sorted(samples, key=lambda pair: pair[1]), most)
    ]
    random.shuffle(samples)
    kept: list[tuple[int, int]] = []
    for start in range(0, len(samples), size):
        offered = samples[start : start + size]
        union = [*kept, *(offered[at] for at in choose(offered, most))]
        kept = [union[at] for at in choose(union, most)]
    assert kept == expected


def test_the_first_of_each_class_come_first() -> None:
    samples = [(0, 5), (0, 1), (0, 2), (1, 9), (2, 7), (1, 30)]
    assert [samples[at] for at in choose(samples, 5)] == [(0, 1), (2, 7), (1, 9), (0, 2), (1, 30)]


@pytest.mark.parametrize("steps", [255, 16, None])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_images_survive_packing(steps: int | None, shape: tuple[int, int, int]) -> None:
    draw = np.random.default_rng(0)
    clean = draw.random(shape, dtype=np.float32)
    if steps is not None:
        clean = draw.integers(0, steps + 1, shape).astype(np.float32) / np.float32(steps)
    delta = draw.uniform(-0.1, 0.1, shape).astype(np.float32)
    adversarial = np.clip(clean + delta, 0, 1)
    blob = pack_images(clean, adversarial)
    first, second = unpack_images(blob)
    assert first.dtype == second.dtype == np.float32
    np.testing.assert_array_equal(first, clean)
    np.testing.assert_allclose(second, adversarial, rtol=0, atol=0 if shape[0] == 1 else 0.1 * 2**-11)
    assert len(blob) < clean.size * (7 if steps is None else 5) + 400


def test_a_finished_result_keeps_what_fits(tmp_path: Path) -> None:
    """L2 perturbations of colour images do not shrink by deflating: fewer than eight stay, and 40 kB are not passed."""
    draw, shape = np.random.default_rng(0), (3, 32, 32)
    examples = []
    for index in range(N):
        clean = draw.integers(0, 256, shape).astype(np.float32) / np.float32(255)
        moved = np.clip(clean + draw.normal(0, 0.02, shape).astype(np.float32), 0, 1)
        examples.append(make_example(index, index % 3, clean=clean, adversarial=moved))
    large = make_example(99, 0, (3, 65, 65))
    with Store.open(tmp_path / "r.db", write=True) as store:
        store.begin_run(make_run_start())
        result_id, _ = store.open_cell("run-1", make_cell(), resume=False)
        chunks = [make_chunk(), make_chunk("apgd-ce", broken=range(N), examples=[*examples, large])]
        for chunk in chunks:
            store.append_chunk(result_id, chunk)
        assert len(store.examples(result_id)) == N
        store.finish_cell(result_id, make_record(chunks))
        kept = store.examples(result_id)
    assert [example.index for example in kept] == [0, 1, 2, 3]
    with sqlite3.connect(tmp_path / "r.db") as connection:
        (size,) = connection.execute("SELECT sum(length(images)) FROM example").fetchone()
    connection.close()
    assert 20_000 < size <= pictures.BYTES


def test_what_a_picture_says_comes_back(tmp_path: Path) -> None:
    routed = (ExpertChoice("layer", (1, 0), (2,)), ExpertChoice("blocks.1", (0, 3, 3), (1, 1, 2), per_token=True))
    examples = [make_example(2, 2), make_example(3, 1, experts=routed), make_example(5, 2)]
    with Store.open(tmp_path / "r.db", write=True) as store:
        store.begin_run(make_run_start())
        result_id, _ = store.open_cell("run-1", make_cell(), resume=False)
        store.append_chunk(result_id, make_chunk("apgd-ce", range(3, N), broken={3, 5}, examples=examples[:0:-1]))
        store.append_chunk(result_id, make_chunk("square", [2], broken={2}, examples=examples[:1]))
        assert same_examples(store.examples(result_id), examples) and store.examples(result_id + 1) == ()


# Real evaluations.


def arrays(path: str) -> dict[str, np.typing.NDArray[Any]]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def stored(path: str = "results.db") -> dict[str, tuple[Example, ...]]:
    with Store.open(path, write=False) as store:
        return {result.cell.view: store.examples(result.result_id) for result in store.results()}


def test_an_evaluation_keeps_labels_and_the_pictures_that_save_adv_writes(moebench: Terminal) -> None:
    words = (MOE, "pgd-5", 40, "--eps", "0.15", "--no-trust")
    moebench.evaluate(*words, "--view", "whole", "--save-adv", "adv.npz")
    data, saved = load_dataset("digits", n=40), arrays("adv.npz")
    with Store.open(write=False) as store:
        (result,) = store.results()
        labels, outcomes = store.labels(result.protocol), store.outcomes(result.result_id)
        examples = store.examples(result.result_id)
    assert labels is not None
    np.testing.assert_array_equal(labels, data.labels)
    np.testing.assert_array_equal(outcomes.clean_pred == labels, saved["clean_pred"] == saved["y"])
    fallen = np.flatnonzero(~saved["robust"] & (saved["clean_pred"] == saved["y"]))
    classes = [(int(labels[at]), int(at)) for at in fallen]
    assert [example.index for example in examples] == [classes[at][1] for at in choose(classes, 8)]
    assert len(examples) == 8 and len({example.label for example in examples}) >= 5
    for example in examples:
        at = example.index
        np.testing.assert_array_equal(example.clean, data.images[at])
        np.testing.assert_array_equal(example.adversarial, saved["x_adv"][at])
        assert (example.label, example.clean_pred, example.adv_pred) == (labels[at], labels[at], saved["adv_pred"][at])
        assert example.stage == outcomes.stage[at] == "pgd" and example.distance == outcomes.distance[at] > 0
        assert [len(choice.before) for choice in example.experts] == [1]
    assert any(choice.before != choice.after for example in examples for choice in example.experts)
    moebench.evaluate(*words, "--view", "whole,experts")
    views = stored()
    assert same_examples(views["whole"], examples) and 0 < len(views["experts"]) <= 8


def test_a_killed_evaluation_keeps_the_pictures_of_an_undisturbed_one(
    moebench: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "Engine", partial(Engine, flush_seconds=0.0))
    words = (MOE, "pgd-3", 20, "--view", "whole", "--batch-size", "6", "--eps", "0.15", "--no-trust")
    moebench.evaluate(*words, "--db", "undisturbed.db")
    real, left = Store.append_chunk, 0

    def limited(store: Store, result_id: int, chunk: Chunk) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        real(store, result_id, chunk)

    monkeypatch.setattr(Store, "append_chunk", limited)
    stops, left = 0, 1
    while moebench.evaluate(*words).code:
        stops, left = stops + 1, 1
    assert stops >= 3
    assert same_examples(stored()["whole"], stored("undisturbed.db")["whole"]) and len(stored()["whole"]) >= 5


# Older files.


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A file that the first schema's code wrote."""
    folder = tmp_path / "older"
    folder.mkdir()
    path = folder / "r.db"
    with sqlite3.connect(path) as connection:
        connection.executescript((DATA / "schema-0001.sql").read_text(encoding="utf-8"))
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("0001",)
    connection.close()
    return path


def test_an_older_file_is_read_and_stays_as_it_is(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = older.parent.parent / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    before = older.read_bytes()
    with Store.open(older, write=False) as store:
        results = store.results(newest_only=False)
        assert len(results) >= 2 and store.check() == [] and store.where == f"'{older}'"
        for result in results:
            assert store.labels(result.protocol) is None and store.examples(result.result_id) == ()
            assert len(store.outcomes(result.result_id).index) == result.record.n
        with pytest.raises(UsageError, match="was opened for reading"):
            store.begin_run(make_run_start())
    assert older.read_bytes() == before and [file.name for file in older.parent.iterdir()] == ["r.db"]
    assert list(scratch.iterdir()) == []


def test_an_older_file_is_upgraded_when_it_is_written(older: Path) -> None:
    with Store.open(older, write=False) as store:
        runs, results = store.runs(), store.results(newest_only=False)
    protocol = results[0].protocol
    with Store.open(older, write=True) as store:
        assert store.runs() == runs and store.results(newest_only=False) == results
        labels = load_dataset("digits", n=protocol.n).labels
        store.begin_run(make_run_start("new", protocol=protocol), labels)
        np.testing.assert_array_equal(store.labels(protocol), labels)
        assert store.run("new").protocol == protocol
    with sqlite3.connect(older) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (migrate.REVISIONS[-1],)
        count = "SELECT count(*) - count(DISTINCT digest) FROM protocol"
        assert connection.execute(count).fetchone() == (0,)
    connection.close()


@pytest.mark.parametrize("older", ["first release"], indirect=True)
def test_a_repeated_command_tells_an_older_file_the_labels(moebench: Terminal, older: Path) -> None:
    with Store.open(older, write=False) as store:
        run = store.runs()[-1]
    assert run.model.name == "resnet-at"
    said = moebench(*run.command.split()[1:], "--db", str(older), "--json").json
    with Store.open(older, write=False) as store:
        labels = store.labels(run.protocol)
        assert labels is not None and len(labels) == 12
        assert store.run(said["run_id"]).reused == 1 and store.check() == []

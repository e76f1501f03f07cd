"""Data sets by name: what is listed, refused and hashed, and how training data is split."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_checks import refused
from PIL import Image

from moebench.datasets import DATASETS, load_dataset, load_training_splits
from moebench.datasets._base import content_hash
from moebench.errors import UsageError


def test_listing_imports_no_source() -> None:
    code = (
        "import sys; from moebench.datasets import DATASETS; "
        "print(*DATASETS.names()); "
        "print(*{'torch', 'torchvision', 'sklearn', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, heavy = done.stdout.split("\n")[:2]
    assert set(names.split()) >= {"digits", "npz", "folder", "cifar10", "cifar100", "svhn"}
    assert heavy == ""


def test_every_data_set_has_a_summary() -> None:
    for declaration in DATASETS.declarations():
        argument = declaration.facts.get("argument")
        assert declaration.facts["summary"].startswith(f"{declaration.name}:{argument}, " if argument else "")
        assert len(declaration.facts["summary"]) > 20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "did you mean digits"),
        ("cifar-10", "did you mean cifar10"),
        ("npx:a.npz", "did you mean npz"),
        ("npz", "write npz:FILE"),
        ("npz:", "write npz:FILE"),
        ("folder:", "write folder:DIR"),
        ("digits:8x8", "takes nothing after a colon"),
        ("", "unknown data set ''"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    assert message in refused(name)


def test_a_bare_path_is_told_its_prefix(tmp_path: Path) -> None:
    file = tmp_path / "my.npz"
    file.touch()
    assert f"write npz:{file}" in refused(str(file))
    assert f"write folder:{tmp_path}" in refused(str(tmp_path))


@pytest.mark.parametrize(("n", "message"), [(0, "at least 1, got 0"), (-3, "at least 1, got -3"), (501, "at most 500")])
def test_wrong_n(n: int, message: str) -> None:
    assert message in refused("digits", n=n)


def test_wrong_split_names_the_splits() -> None:
    assert refused("digits", split="valid") == "data set digits has no split 'valid'; it has train, val, test"


def test_content_hash_sees_values_order_labels_and_shape() -> None:
    images = np.linspace(0, 1, 32, dtype=np.float32).reshape(2, 1, 4, 4)
    labels = np.array([0, 1], dtype=np.int64)
    hashes = {
        content_hash(images, labels),
        content_hash(images[::-1], labels),
        content_hash(images, labels[::-1]),
        content_hash(images.reshape(2, 1, 2, 8), labels),
        content_hash(images + np.float32(1e-6), labels),
    }
    assert len(hashes) == 5
    assert content_hash(images.astype(">f4"), labels.astype(">i8")) == content_hash(images, labels)


# Training and validation


@pytest.mark.parametrize(("count", "held"), [(10, 1), (57, 5), (61_000, 4692)])
def test_every_tenth_sample_is_held_out_where_there_is_no_validation_split(
    tmp_path: Path, count: int, held: int
) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (count, 1, 1, 1), dtype=np.uint8), np.arange(count) % 3
    np.savez(tmp_path / "data.npz", x=images, y=labels)
    name = f"npz:{tmp_path / 'data.npz'}"
    whole = load_dataset(name)
    train, val = load_training_splits(name)
    assert (len(train), len(val)) == (count - held, held)
    assert sorted([*train.ids, *val.ids]) == list(range(count)), "each sample once"
    for part in (train, val):
        assert np.array_equal(part.images, whole.images[part.ids])
        assert np.array_equal(part.labels, whole.labels[part.ids])
        assert part.class_names == whole.class_names
    assert len({train.sha256, val.sha256, whole.sha256}) == 3
    assert (train.split, val.split) == ("train", "val")


def test_splits_of_the_data_set_come_first() -> None:
    train, val = load_training_splits("digits")
    assert (train.sha256, val.sha256) == tuple(load_dataset("digits", split=one).sha256 for one in ("train", "val"))


def test_splits_of_different_shapes_are_refused(tmp_path: Path) -> None:
    """Colour in one split and none in the other is the likely case: grey images are read with one channel."""
    for split, mode in (("train", "RGB"), ("val", "L")):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.new(mode, (4, 4), color=80 if mode == "L" else (80, 10, 10)).save(tmp_path / split / name / "1.png")
    with pytest.raises(UsageError, match=r"training images of .*\(3, 4, 4\) and validation images of \(1, 4, 4\)"):
        load_training_splits(f"folder:{tmp_path}")


def test_too_little_training_data_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((9, 8, 8, 1), np.uint8), y=np.arange(9))
    with pytest.raises(UsageError, match="has 9 training samples and no validation split; at least 10 are needed"):
        load_training_splits(f"npz:{tmp_path / 'data.npz'}")

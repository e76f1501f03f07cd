from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import urllib.error
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from moebench.datasets import DATASETS, Dataset, load_dataset, load_training_splits
from moebench.datasets._base import content_hash
from moebench.datasets.digits import shares, split_ids
from moebench.errors import RunError, UsageError

# Numbers in the store belong to these samples; a change of one makes every digits result incomparable.
DIGITS_SHA256 = {
    "train": "e73a0855da36f7d9cf9eda4c56608705ce54d69e82492d5931599b6d428c7813",
    "val": "3b23374d7c5964c0b32961aa7486814459a5b9f8abd01c86f3d25df6bc1a36a2",
    "test": "6a086a74237c3429b6a1d6770cb7f256dfc98a247e6e764b4be11fb634c1465a",
}


def check(data: Dataset) -> Dataset:
    """What every data set promises."""
    assert data.images.dtype == np.float32 and data.images.ndim == 4 and data.images.flags.c_contiguous
    assert data.images.min() >= 0 and data.images.max() <= 1
    assert data.labels.dtype == data.ids.dtype == np.int64
    assert data.shape == data.images.shape[1:]
    assert len(data) == len(data.images) == len(data.labels) == len(data.ids) == len(np.unique(data.ids))
    assert data.labels.min() >= 0 and data.labels.max() < data.num_classes == len(data.class_names)
    assert data.sha256 == content_hash(data.images, data.labels)
    return data


def refused(name: str, *, split: str = "test", n: int | None = None) -> str:
    """The one line of the error that loading must end in."""
    with pytest.raises(UsageError) as caught:
        load_dataset(name, split=split, n=n)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- names, n, listing


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


def test_digits_load_without_torch() -> None:
    code = (
        "import sys; from moebench.datasets import load_dataset; load_dataset('digits'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


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


# --- digits


@pytest.mark.parametrize("split", DIGITS_SHA256)
def test_digits_splits_are_pinned(split: str) -> None:
    data = check(load_dataset("digits", split=split))
    assert data.sha256 == DIGITS_SHA256[split]
    assert (data.name, data.split, data.images.shape[1:], data.num_classes) == ("digits", split, (1, 8, 8), 10)


def test_digits_splits_are_disjoint_complete_and_stratified() -> None:
    parts = {split: load_dataset("digits", split=split) for split in DIGITS_SHA256}
    assert {split: len(part) for split, part in parts.items()} == {"train": 1000, "val": 297, "test": 500}
    assert sorted(np.concatenate([part.ids for part in parts.values()])) == list(range(1797))
    whole = sum(np.bincount(part.labels) for part in parts.values())
    for part in parts.values():
        assert np.abs(np.bincount(part.labels) - whole * len(part) / 1797).max() < 1.5


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    raw, data = load_digits(), load_dataset("digits", n=50)
    np.testing.assert_array_equal(data.images[:, 0] * 16, raw.images[data.ids])
    np.testing.assert_array_equal(data.labels, raw.target[data.ids])


def test_first_n_is_a_prefix() -> None:
    some, more = load_dataset("digits", n=20), load_dataset("digits", n=100)
    np.testing.assert_array_equal(some.images, more.images[:20])
    np.testing.assert_array_equal(some.ids, more.ids[:20])
    assert some.sha256 != more.sha256
    assert len(np.unique(more.labels)) == 10


def test_other_digits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebench.datasets.digits.RAW_SHA256", "0" * 64)
    with pytest.raises(RunError, match="scikit-learn"):
        load_dataset("digits")


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), data=st.data())
def test_shares_add_up_and_stay_near_proportion(sizes: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, sum(sizes)))
    counts = shares(np.array(sizes), total)
    assert counts.sum() == total
    assert (np.abs(counts - np.array(sizes) * total / sum(sizes)) < 1).all() and (counts <= sizes).all()


def test_split_ids_depend_on_labels_only() -> None:
    labels = np.arange(1797) % 7
    first, again = split_ids(labels), split_ids(labels.copy())
    assert all(np.array_equal(first[split], again[split]) for split in first)


def test_default_threats() -> None:
    digits = load_dataset("digits", n=1)
    assert (digits.default_threat().eps, digits.default_threat("L2").eps) == (0.2, 1.0)
    with pytest.raises(UsageError, match="unknown norm"):
        digits.default_threat("L1")  # type: ignore[arg-type]


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


# --- npz


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., str]:
    """Writes an archive and gives its data set name."""

    def write(**arrays: Any) -> str:
        np.savez(tmp_path / "set.npz", **arrays)
        return f"npz:{tmp_path / 'set.npz'}"

    return write


def pixels(*shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_npz_uint8(npz: Callable[..., str]) -> None:
    x, y = pixels(5, 6, 7, 3), np.array([0, 3, 1, 1, 0], dtype=np.int32)
    data = check(load_dataset(npz(x=x, y=y, other=y), n=4))
    np.testing.assert_array_equal(data.images, (x[:4] / np.float32(255)).transpose(0, 3, 1, 2))
    assert data.labels.tolist() == [0, 3, 1, 1] and data.ids.tolist() == [0, 1, 2, 3]
    assert (data.split, data.class_names) == ("all", ("0", "1", "2", "3"))
    assert (data.default_threat().eps, data.default_threat("L2").eps) == (8 / 255, 0.5)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
def test_npz_float_in_either_order(npz: Callable[..., str], dtype: str) -> None:
    x, y = (pixels(4, 3, 8, 9) / 255).astype(dtype), np.zeros(4, dtype=np.uint8)
    first = check(load_dataset(npz(x=x, y=y)))
    last = check(load_dataset(npz(x=x.transpose(0, 2, 3, 1), y=y)))
    np.testing.assert_array_equal(first.images, x.astype(np.float32))
    assert first.sha256 == last.sha256
    assert first.num_classes == 2


def test_npz_without_channel_axis(npz: Callable[..., str]) -> None:
    x, y = pixels(4, 8, 9), np.arange(4)
    grey = check(load_dataset(npz(x=x, y=y)))
    assert grey.images.shape == (4, 1, 8, 9)
    assert load_dataset(npz(x=(x / np.float32(255)), y=y)).sha256 == grey.sha256


def test_npz_class_names_may_say_more(npz: Callable[..., str]) -> None:
    data = load_dataset(npz(x=pixels(2, 4, 4), y=np.array([0, 1]), class_names=np.array(["cat", "dog", "cow"])))
    assert data.class_names == ("cat", "dog", "cow") and data.num_classes == 3


def test_npz_has_one_split(npz: Callable[..., str]) -> None:
    name = npz(x=pixels(2, 4, 4), y=np.array([0, 1]))
    assert load_dataset(name, split="all").sha256 == load_dataset(name, split="test").sha256
    assert "has no split 'train'; it has all" in refused(name, split="train")


NORMALISED = np.full((2, 3, 4, 4), -1.5, dtype=np.float32)
GOOD_Y = np.array([0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": GOOD_Y, "labels": GOOD_Y}, "no array x and y in it, it holds images, labels"),
        ({"x": pixels(2, 4, 4)}, "no array y in it, it holds x"),
        ({}, "it holds nothing"),
        ({"x": pixels(2, 4, 4).astype(np.int64), "y": GOOD_Y}, "x must be uint8, or float in [0, 1], got int64"),
        ({"x": np.ones((2, 4, 4), dtype=bool), "y": GOOD_Y}, "got bool"),
        ({"x": np.array(["a", "b"]), "y": GOOD_Y}, "got <U1"),
        ({"x": pixels(2, 16), "y": GOOD_Y}, "shape N×H×W×C or N×H×W, got (2, 16)"),
        ({"x": np.uint8(3), "y": GOOD_Y}, "got ()"),
        ({"x": pixels(2, 3, 8, 8), "y": GOOD_Y}, "try x.transpose(0, 2, 3, 1)"),
        ({"x": pixels(2, 8, 8, 4), "y": GOOD_Y}, "1 or 3 channels, got shape (2, 8, 8, 4)"),
        ({"x": pixels(2, 8, 8, 4) / 255, "y": GOOD_Y}, "1 or 3 channels"),
        ({"x": pixels(2, 3, 8, 3) / 255, "y": GOOD_Y}, "may be N×C×H×W or N×H×W×C; save x as uint8"),
        ({"x": pixels(3, 4, 4), "y": GOOD_Y}, "x has 3 images but y has 2 labels"),
        ({"x": pixels(2, 4, 4).astype(np.float32), "y": GOOD_Y}, "divide by 255?"),
        ({"x": NORMALISED, "y": GOOD_Y}, "undo the normalisation?"),
        ({"x": np.full((2, 4, 4), np.nan), "y": GOOD_Y}, "x holds NaN"),
        ({"x": np.full((2, 4, 4), np.inf), "y": GOOD_Y}, "values from inf to inf"),
        ({"x": pixels(2, 4, 4), "y": np.array([0.0, 1.0])}, "y must be integers (class numbers from 0), got float64"),
        ({"x": pixels(2, 4, 4), "y": np.array([True, False])}, "got bool"),
        ({"x": pixels(2, 4, 4), "y": np.array([[0], [1]])}, "shape (N,), got (2, 1); try y.ravel()"),
        ({"x": pixels(2, 4, 4), "y": np.array([0, -1])}, "must not be negative, got -1"),
        ({"x": pixels(2, 4, 4), "y": np.array([0, 1_000_000])}, "labels must be below 1000000, got 1000000"),
        ({"x": pixels(2, 4, 4), "y": np.array([0, 2**64 - 1], dtype=np.uint64)}, "labels must be below 1000000"),
        ({"x": pixels(0, 4, 4), "y": np.array([], dtype=np.int64)}, "has no samples"),
        ({"x": pixels(2, 0, 4), "y": GOOD_Y}, "no pixels"),
        ({"x": pixels(2, 4, 4), "y": np.array([0, None])}, "pickled objects, which are never loaded"),
        ({"x": np.array([None, None]), "y": GOOD_Y}, "pickled objects, which are never loaded"),
        ({"x": pixels(2, 4, 4), "y": GOOD_Y, "class_names": np.array(["one"])}, "has 1 names but there are 2 classes"),
        ({"x": pixels(2, 4, 4), "y": GOOD_Y, "class_names": GOOD_Y}, "must be a list of texts"),
    ],
)
def test_npz_refusals(npz: Callable[..., str], arrays: dict[str, Any], message: str) -> None:
    assert message in refused(npz(**arrays))


def test_npz_checks_the_samples_beyond_n(npz: Callable[..., str]) -> None:
    x = np.zeros((3, 4, 4), dtype=np.float32)
    x[2] = 7
    assert "must be in [0, 1]" in refused(npz(x=x, y=np.arange(3)), n=1)
    assert load_dataset(npz(x=x / 7, y=np.arange(3)), n=1).num_classes == 3


def test_npz_missing_or_another_file(tmp_path: Path) -> None:
    assert "there is no such file" in refused(f"npz:{tmp_path / 'none.npz'}")
    assert "there is no such file" in refused(f"npz:{tmp_path}")
    np.save(tmp_path / "one.npy", pixels(2, 4, 4))
    assert "not an npz archive" in refused(f"npz:{tmp_path / 'one.npy'}")
    (tmp_path / "code.npz").write_bytes(pickle.dumps(print))
    assert "not an npz archive" in refused(f"npz:{tmp_path / 'code.npz'}")
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("x", b"no array")
        archive.writestr("y.npy", b"no array either")
    assert "zip.npz: " in refused(f"npz:{tmp_path / 'zip.npz'}")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_npz_damage_ends_in_one_line(tmp_path: Path, changes: list[tuple[float, int]]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=pixels(3, 4, 4), y=np.arange(3))
    damaged = bytearray(buffer.getvalue())
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    path = tmp_path / "damaged.npz"
    path.write_bytes(damaged)
    try:
        check(load_dataset(f"npz:{path}"))
    except UsageError as error:
        assert "\n" not in str(error)


# --- folder


def draw(path: Path, *, size: tuple[int, int] = (6, 5), mode: str = "RGB", seed: int = 0) -> Path:
    """Writes an image with random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for label, name in enumerate(("ant", "bee", "cow")):
        for number in range(4):
            draw(root / name / f"{number}.png", seed=10 * label + number)
    return root


def test_folder(images: Path) -> None:
    (images / "README.txt").write_text("files beside the class folders do not count")
    (images / "ant" / ".DS_Store").write_bytes(b"nor do hidden ones")
    data = check(load_dataset(f"folder:{images}"))
    assert (data.split, data.class_names, data.images.shape) == ("all", ("ant", "bee", "cow"), (12, 3, 5, 6))
    names = [f"{name}/{number}.png" for name in data.class_names for number in range(4)]
    for image, label, i in zip(data.images, data.labels, data.ids, strict=True):
        assert data.class_names[label] == names[i].split("/")[0]
        np.testing.assert_array_equal(
            np.asarray(Image.open(images / names[i])) / np.float32(255), image.transpose(1, 2, 0)
        )


def test_folder_ids_are_those_of_torchvision(images: Path) -> None:
    from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]

    theirs, ours = ImageFolder(str(images)), load_dataset(f"folder:{images}")
    for image, label, i in zip(ours.images, ours.labels, ours.ids, strict=True):
        picture, target = theirs[int(i)]
        assert target == label
        np.testing.assert_array_equal(np.asarray(picture, dtype=np.float32) / np.float32(255), image.transpose(1, 2, 0))


def test_folder_prefix_mixes_classes_and_outlives_new_files(images: Path) -> None:
    before = load_dataset(f"folder:{images}", n=6)
    assert len(np.unique(before.labels)) > 1
    np.testing.assert_array_equal(before.images, load_dataset(f"folder:{images}").images[:6])
    draw(images / "bee" / "9.png", seed=99)
    after = load_dataset(f"folder:{images}")
    kept = [i for i in range(len(after)) if after.ids[i] != 8]
    np.testing.assert_array_equal(after.images[kept][:6], before.images)


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "bmp", "webp"])
def test_folder_formats(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        draw(tmp_path / "set" / name / f"1.{suffix}")
    assert check(load_dataset(f"folder:{tmp_path / 'set'}")).images.shape == (2, 3, 5, 6)


def test_folder_is_grey_only_if_all_images_are(tmp_path: Path) -> None:
    root = tmp_path / "set"
    draw(root / "a" / "1.png", mode="L")
    draw(root / "b" / "1.png", mode="1")
    assert check(load_dataset(f"folder:{root}")).images.shape == (2, 1, 5, 6)
    draw(root / "b" / "2.png", mode="P")
    assert check(load_dataset(f"folder:{root}", n=1)).images.shape == (1, 3, 5, 6)


def test_folder_splits_share_their_classes(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for place in ("train/a", "train/b", "train/c", "test/a", "test/c"):
        draw(root / place / "1.png")
    test = check(load_dataset(f"folder:{root}"))
    assert test.class_names == ("a", "b", "c") and sorted(test.labels) == [0, 2] and test.split == "test"
    assert len(load_dataset(f"folder:{root}", split="train")) == 3
    assert "has no split 'val'; it has train, test" in refused(f"folder:{root}", split="val")


def test_a_class_may_be_called_test(tmp_path: Path) -> None:
    for name in ("test", "exam"):
        draw(tmp_path / "set" / name / "1.png")
    assert load_dataset(f"folder:{tmp_path / 'set'}").class_names == ("exam", "test")


def test_folder_refuses_other_layouts(images: Path, tmp_path: Path) -> None:
    assert "there is no such folder" in refused(f"folder:{tmp_path / 'none'}")
    assert "there is no such folder" in refused(f"folder:{images / 'ant' / '0.png'}")
    assert "no class folders" in refused(f"folder:{images / 'ant'}")
    assert "no split 'train'; it has all" in refused(f"folder:{images}", split="train")
    assert "only one class folder, images" in refused(f"folder:{tmp_path}")
    (images / "dog").mkdir()
    assert "dog: the class folder is empty" in refused(f"folder:{images}")
    draw(images / "dog" / "inner" / "1.png")
    assert "inner: a folder inside a class folder" in refused(f"folder:{images}")


def test_folder_names_both_files_of_different_size(images: Path) -> None:
    draw(images / "bee" / "2.png", size=(7, 5))
    message = refused(f"folder:{images}")
    assert "bee/2.png is 7×5 but" in message and "ant/0.png is 6×5" in message


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_folder_names_the_file_that_is_no_image(images: Path, content: bytes) -> None:
    (images / "cow" / "3.png").write_bytes(content)
    assert "cow/3.png: " in refused(f"folder:{images}")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_folder_names_the_truncated_file(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        file = draw(tmp_path / "set" / name / f"1.{suffix}", size=(64, 64))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert f"b/1.{suffix}: " in refused(f"folder:{tmp_path / 'set'}")


def test_folder_refuses_what_is_no_image_file(images: Path) -> None:
    (images / "cow" / "notes.txt").write_text("x")
    assert "notes.txt: not an image file; expected .png" in refused(f"folder:{images}")


def test_folder_opens_no_other_format_under_a_known_suffix(images: Path) -> None:
    (images / "cow" / "3.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 5\n%%EndComments\n")
    assert "cow/3.png: not an image" in refused(f"folder:{images}")


def test_folder_refuses_deep_images(images: Path) -> None:
    Image.fromarray(np.full((5, 6), 40_000, dtype=np.uint16)).save(images / "cow" / "3.png")
    assert "more than 8 bits per channel" in refused(f"folder:{images}")


@pytest.mark.parametrize("limit", [20, 10])
def test_folder_refuses_decompression_bombs(images: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # the images have 30: a warning or an error of Pillow's
    assert f"0.png: has more than {limit} pixels" in refused(f"folder:{images}")


# --- torchvision


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


@pytest.fixture
def tiny_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """An archive in CIFAR-10's format with five images, and torchvision told to expect its hashes."""
    from torchvision.datasets import CIFAR10

    members = {
        "test_batch": pickle.dumps({"data": pixels(5, 3072), "labels": [3, 1, 4, 1, 5]}),
        "batches.meta": pickle.dumps({"label_names": list("abcdefghij")}),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(CIFAR10, "train_list", [])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(members["test_batch"])]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(members["batches.meta"])})
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(buffer.getvalue()))
    return buffer.getvalue()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.usefixtures("no_network")
def test_cifar10_from_an_archive_put_there(tiny_cifar: bytes, own_data_folder: Path, capsys: Any) -> None:
    own_data_folder.mkdir()
    (own_data_folder / "cifar-10-python.tar.gz").write_bytes(tiny_cifar)
    data = check(load_dataset("cifar10", n=4))
    assert (data.images.shape, data.labels.tolist(), data.class_names[3]) == ((4, 3, 32, 32), [3, 1, 4, 1], "d")
    np.testing.assert_array_equal(data.images, pixels(5, 3072)[:4].reshape(4, 3, 32, 32) / np.float32(255))
    assert load_dataset("cifar10", n=4).sha256 == data.sha256
    assert capsys.readouterr().out == ""


def test_cifar10_is_downloaded_and_checked(tiny_cifar: bytes, own_data_folder: Path, monkeypatch: Any) -> None:
    served = [tiny_cifar[:-1], tiny_cifar]

    def urlretrieve(_: str, path: str, **__: object) -> None:
        Path(path).write_bytes(served.pop(0))

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", urlretrieve)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    assert "could not be downloaded" in refused("cifar10")
    assert list(own_data_folder.iterdir()) == []
    assert len(load_dataset("cifar10")) == 5
    assert sorted(entry.name for entry in own_data_folder.iterdir()) == [
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
    ]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "archive"),
    [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz"), ("svhn", "test_32x32.mat")],
)
def test_without_network_the_message_says_what_to_put_where(name: str, archive: str, own_data_folder: Path) -> None:
    message = refused(name)
    assert (
        f"is not in {own_data_folder}" in message and f"put {archive} (MD5 " in message and "MOEBENCH_DATA" in message
    )
    assert "has no split 'val'" in refused(name, split="val")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.usefixtures("no_network")
def test_a_changed_batch_is_never_unpickled(tiny_cifar: bytes, own_data_folder: Path) -> None:
    own_data_folder.mkdir()
    (own_data_folder / "cifar-10-python.tar.gz").write_bytes(tiny_cifar)
    load_dataset("cifar10")
    (own_data_folder / "cifar-10-python.tar.gz").unlink()
    mark = own_data_folder / "executed"
    (own_data_folder / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(Payload(mark)))
    assert "could not be downloaded" in refused("cifar10")
    assert not mark.exists()


@pytest.mark.usefixtures("no_network")
def test_svhn(own_data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat  # type: ignore[import-untyped]
    from torchvision.datasets import SVHN

    own_data_folder.mkdir()
    x, file = pixels(32, 32, 3, 4), own_data_folder / "test_32x32.mat"
    savemat(file, {"X": x, "y": np.array([[10], [1], [2], [9]], dtype=np.uint8)})
    monkeypatch.setitem(SVHN.split_list, "test", ["http://none", file.name, md5(file.read_bytes())])
    data = check(load_dataset("svhn", n=3))
    assert data.labels.tolist() == [0, 1, 2] and data.num_classes == 10
    np.testing.assert_array_equal(data.images, x.transpose(3, 2, 0, 1)[:3] / np.float32(255))


# --- training and validation


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

"""npz archives as data sets: what they may hold, and one line for all else."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_checks import check, pixels, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebench.datasets import load_dataset
from moebench.errors import UsageError


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., str]:
    """Writes an archive and gives its data set name."""

    def write(**arrays: Any) -> str:
        np.savez(tmp_path / "set.npz", **arrays)
        return f"npz:{tmp_path / 'set.npz'}"

    return write


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

"""The bundled digits: the same samples for ever, in splits that are disjoint and stratified."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from data_checks import check
from hypothesis import given
from hypothesis import strategies as st

from moebench.datasets import load_dataset
from moebench.datasets.digits import shares, split_ids
from moebench.errors import RunError, UsageError

# Numbers in the store belong to these samples; a change of one makes every digits result incomparable.
DIGITS_SHA256 = {
    "train": "e73a0855da36f7d9cf9eda4c56608705ce54d69e82492d5931599b6d428c7813",
    "val": "3b23374d7c5964c0b32961aa7486814459a5b9f8abd01c86f3d25df6bc1a36a2",
    "test": "6a086a74237c3429b6a1d6770cb7f256dfc98a247e6e764b4be11fb634c1465a",
}


def test_digits_load_without_torch() -> None:
    code = (
        "import sys; from moebench.datasets import load_dataset; load_dataset('digits'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


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


def test_a_scikit_learn_that_keeps_its_file_elsewhere_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    here = load_dataset("digits")
    monkeypatch.setattr("moebench.datasets.digits.find_spec", lambda name: None)
    assert load_dataset("digits").sha256 == here.sha256


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

"""The embedded default: scikit-learn's digits, 1,797 handwritten digits of 8x8 pixels and 17 grey levels."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moebench.datasets._base import Request, Samples, register_dataset
from moebench.errors import RunError
from moebench.schema import IntArray

SIZES = {"test": 500, "val": 297, "train": 1000}
RAW_SHA256 = "65e5b4619795efb40c1082f4c350c049e4ad552200d369b6ae99e21eef5e72c5"


@register_dataset("digits", summary="handwritten digits, 8x8, grey, 10 classes; bundled", linf=0.2, l2=1.0)
def digits(request: Request) -> Samples:
    """The digits scaled from 0..16 to [0, 1], in splits train (1,000), val (297) and test (500).

    Raises:
        RunError: the installed scikit-learn holds other images than the ones all numbers were measured on.
    """
    split = request.choose_split(tuple(reversed(SIZES)))
    images, labels = _installed()
    if hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() != RAW_SHA256:
        raise RunError(
            "the digits of this scikit-learn are not the 1,797 that moebench is built on; install another version"
        )
    ids = split_ids(labels)[split]
    ids = ids[: request.count(len(ids))]
    scaled = images[ids, None].astype(np.float32) / np.float32(16)
    return Samples(split, scaled, labels[ids].astype(np.int64), ids, tuple(str(digit) for digit in range(10)))


def _installed() -> tuple[NDArray[np.uint8], IntArray]:
    """Images (1797, 8, 8) and labels of the installed scikit-learn.

    Its file is read by itself: `load_digits` imports all of scikit-learn, scipy.stats and pandas, more than a second of
    every command. Where the file is not in its place, `load_digits` knows where.
    """
    package = find_spec("sklearn")
    folders = (package.submodule_search_locations if package is not None else None) or []
    path = next(
        (file for folder in folders if (file := Path(folder, "datasets", "data", "digits.csv.gz")).exists()), None
    )
    if path is not None:
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
        return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype("<i8")
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    raw = load_digits()
    return raw.images.astype(np.uint8), raw.target.astype("<i8")


def split_ids(labels: IntArray) -> dict[str, IntArray]:
    """The sample numbers of each split, in order.

    The order is that of a hash of the sample's number, so it depends on no random generator, and the first n of a split
    are a fair draw from it. Each split takes its share of each class, the largest remainders rounded up.
    """
    order = sorted(range(len(labels)), key=lambda i: hashlib.sha256(f"moebench digits {i}".encode()).digest())
    left = np.bincount(labels)
    split_of: dict[int, str] = {}
    for split, size in SIZES.items():
        counts = shares(left, size)
        left = left - counts
        for i in order:
            if i not in split_of and counts[labels[i]] > 0:
                split_of[i] = split
                counts[labels[i]] -= 1
    return {split: np.array([i for i in order if split_of[i] == split], dtype=np.int64) for split in SIZES}


def shares(sizes: IntArray, total: int) -> IntArray:
    """Divides `total` among classes in proportion to their sizes, by largest remainder; the first class wins a tie."""
    quota, remainder = np.divmod(sizes * total, sizes.sum())
    largest = np.argsort(-remainder, kind="stable")[: total - quota.sum()]
    quota[largest] += 1
    return np.asarray(quota, dtype=np.int64)

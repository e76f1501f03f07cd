"""What every data set promises, and how a name that cannot be loaded is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moebench.datasets import Dataset, load_dataset
from moebench.datasets._base import content_hash
from moebench.errors import UsageError


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


def pixels(*shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Random bytes, the same each time."""
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

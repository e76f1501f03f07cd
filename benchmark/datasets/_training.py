"""What a model is trained on and what picks its epoch: two splits, or one with a part held out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moebench.datasets._base import SINGLE_SPLIT, Dataset, MissingSplit, content_hash, load_dataset
from moebench.errors import UsageError
from moebench.schema import BoolArray

SHARE = 10
"""One sample in so many is held out for validation where a data set has no split for it."""

MOST = 5000
"""Samples that are enough for validation: a standard error of 0.7 points at most."""


def load_training_splits(name: str) -> tuple[Dataset, Dataset]:
    """The training and the validation samples of a data set.

    Without a split "val" every tenth sample of "train" is held out, fewer where that would be more than 5,000; a file
    or folder without splits counts as training data.

    Args:
        name: as `load_dataset` takes it.
    Returns: no sample is in both.

    Raises:
        UsageError: there is no training data, or too little to hold some out, or it cannot be read, or images differ
            in shape.
    """
    try:
        train = load_dataset(name, split="train")
    except MissingSplit as missing:
        try:
            train = load_dataset(name, split=SINGLE_SPLIT)
        except MissingSplit:
            raise missing from None
    try:
        val = load_dataset(name, split="val")
    except MissingSplit:
        pass
    else:
        if train.images.shape[1:] != val.images.shape[1:]:
            raise UsageError(
                f"data set {name} has training images of (C, H, W) {train.images.shape[1:]} and validation images of "
                f"{val.images.shape[1:]}; expected one shape"
            )
        return train, val
    if len(train) < SHARE:
        raise UsageError(
            f"data set {name} has {len(train)} training samples and no validation split; "
            f"at least {SHARE} are needed to hold some out"
        )
    stride = max(SHARE, -(-len(train) // MOST))
    held_out = np.arange(len(train)) % stride == stride - 1
    return _part(train, "train", ~held_out), _part(train, "val", held_out)


def _part(whole: Dataset, split: str, chosen: BoolArray) -> Dataset:
    images, labels = whole.images[chosen], whole.labels[chosen]
    return replace(
        whole, split=split, images=images, labels=labels, ids=whole.ids[chosen], sha256=content_hash(images, labels)
    )

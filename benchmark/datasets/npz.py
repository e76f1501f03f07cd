"""A user's own data in one npz file: `x` images, `y` labels, and `class_names` where there are names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moebench.archives import read_npz
from moebench.datasets._base import SINGLE_SPLIT, FloatImages, Request, Samples, register_dataset
from moebench.errors import UsageError
from moebench.schema import IntArray

MAX_CLASSES = 1_000_000
CHANNELS = (1, 3)
Array = NDArray[Any]


@register_dataset(
    "npz",
    summary="npz:FILE, x (uint8 NxHxWxC, or float in [0, 1]) and y (integers) in a NumPy archive",
    argument="FILE",
)
def npz(request: Request) -> Samples:
    """The file's samples in their order; the id of a sample is its row.

    Raises:
        UsageError: the file is no such archive, or what it holds is not images in [0, 1] with class numbers.
    """
    split = request.choose_split((SINGLE_SPLIT,))
    path = Path(request.argument).expanduser()
    arrays = read_npz(
        path,
        ("x", "y"),
        ("class_names",),
        wants="npz:FILE wants a NumPy archive with x and y",
        hint="write one with numpy.savez(FILE, x=images, y=labels)",
        again="write it again with numpy.savez",
        meaning="x (images) and y (labels)",
    )
    x, y = arrays["x"], arrays["y"]
    if x.ndim and y.ndim and len(x) != len(y):
        raise UsageError(f"{path}: x has {len(x)} images but y has {len(y)} labels; they must be as many")
    labels = check_labels(path, y)
    kept = request.count(len(labels))
    images = to_images(path, x, kept)
    names = check_names(path, arrays.get("class_names"), int(labels.max()) + 1)
    return Samples(split, images, labels[:kept], np.arange(kept, dtype=np.int64), names)


def check_labels(path: Path, y: Array) -> IntArray:
    """The labels as (N,) int64.

    Raises:
        UsageError: they are not one class number from 0 on per image.
    """
    if y.dtype.kind not in "iu":
        raise UsageError(f"{path}: y must be integers (class numbers from 0), got {y.dtype}; try y.astype('int64')")
    if y.ndim != 1:
        raise UsageError(f"{path}: y must have one label per image, shape (N,), got {y.shape}; try y.ravel()")
    if y.size and y.min() < 0:
        raise UsageError(f"{path}: labels must not be negative, got {y.min()}; number the classes from 0")
    if y.size and y.max() >= MAX_CLASSES:
        raise UsageError(f"{path}: labels must be below {MAX_CLASSES}, got {y.max()}; number the classes from 0")
    return y.astype(np.int64)


def to_images(path: Path, x: Array, n: int) -> FloatImages:
    """The first n images as (n, C, H, W) float32 in [0, 1]; all images are checked.

    Raises:
        UsageError: x is neither uint8 nor a float in [0, 1], or its shape does not say which axis is the channels.
    """
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise UsageError(f"{path}: x must be uint8, or float in [0, 1], got {x.dtype}; try x.astype('uint8')")
    if x.ndim not in (3, 4):
        raise UsageError(f"{path}: x must have shape N×H×W×C or N×H×W, got {x.shape}")
    if x.size == 0:
        raise UsageError(f"{path}: x has no pixels, its shape is {x.shape}; expected one image at least")
    if x.dtype == np.uint8:
        last = channels_last(path, x[:n])
        return np.ascontiguousarray(last.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)
    low, high = float(x.min()), float(x.max())
    if np.isnan(low) or np.isnan(high):
        raise UsageError(f"{path}: x holds NaN; expected numbers in [0, 1]")
    if low < 0 or high > 1:
        hint = "divide by 255?" if low >= 0 and 2 < high <= 255 else "undo the normalisation?"
        raise UsageError(f"{path}: float x must be in [0, 1], got values from {low:g} to {high:g}; {hint}")
    return np.ascontiguousarray(channels_first(path, x[:n]), dtype=np.float32)


def channels_last(path: Path, x: Array) -> Array:
    """Uint8 images as N×H×W×C; without a channel axis they have one channel."""
    if x.ndim == 3:
        return x[..., None]
    if x.shape[3] not in CHANNELS:
        hint = "; try x.transpose(0, 2, 3, 1)" if x.shape[1] in CHANNELS else ""
        raise UsageError(f"{path}: uint8 x must be N×H×W×C with 1 or 3 channels, got shape {x.shape}{hint}")
    return x


def channels_first(path: Path, x: Array) -> Array:
    """Float images as N×C×H×W, whichever of the two orders they come in."""
    if x.ndim == 3:
        return x[:, None]
    first, last = x.shape[1] in CHANNELS, x.shape[3] in CHANNELS
    if first and last:
        raise UsageError(f"{path}: the shape {x.shape} of x may be N×C×H×W or N×H×W×C; save x as uint8 N×H×W×C instead")
    if not first and not last:
        raise UsageError(f"{path}: x must be N×C×H×W or N×H×W×C with 1 or 3 channels, got shape {x.shape}")
    return x if first else x.transpose(0, 3, 1, 2)


def check_names(path: Path, names: Array | None, classes: int) -> tuple[str, ...]:
    """One name per class, the class's number where the file has none; two classes at least.

    Raises:
        UsageError: `class_names` is no list of texts, or shorter than the labels need.
    """
    if names is None:
        return tuple(str(i) for i in range(max(classes, 2)))
    if not isinstance(names, np.ndarray) or names.dtype.kind != "U" or names.ndim != 1:
        raise UsageError(f"{path}: class_names must be a list of texts; try numpy.array(['cat', 'dog'])")
    if len(names) < max(classes, 2):
        raise UsageError(
            f"{path}: class_names has {len(names)} names but there are {max(classes, 2)} classes; add the rest"
        )
    return tuple(str(name) for name in names)

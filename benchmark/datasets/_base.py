"""What a data set is, the registry of data sets, and loading one by name. Numpy only: no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moebench.errors import UsageError
from moebench.registry import Registry, decorator_for
from moebench.schema import IntArray, Norm, ThreatModel

FloatImages = NDArray[np.float32]
SINGLE_SPLIT = "all"
DEFAULT_EPS: Mapping[Norm, float] = {"Linf": 8 / 255, "L2": 0.5}


class MissingSplit(UsageError):
    """The source does not have the split that was asked for."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """The samples of one split, in the split's order.

    `images` are (N, C, H, W) in [0, 1], `labels` (N,) in 0..num_classes-1, `ids` (N,) number the samples within their
    source and do not depend on `n`. `sha256` covers images, labels and their shapes. `name` is the name as it was asked
    for, such as "digits" or "npz:my.npz".
    """

    name: str
    split: str
    images: FloatImages
    labels: IntArray
    class_names: tuple[str, ...]
    sha256: str
    ids: IntArray
    default_eps: Mapping[Norm, float] = field(default_factory=lambda: DEFAULT_EPS)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """How many logits a model of this data has; classes without a sample count."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def default_threat(self, norm: Norm = "Linf") -> ThreatModel:
        """The perturbations that numbers on this data are published for.

        Raises:
            UsageError: there is no such norm.
        """
        return ThreatModel(norm, self.default_eps.get(norm, 0.0))


@dataclass(frozen=True)
class Samples:
    """What a source returns: arrays as in `Dataset`, already cut to the number asked for."""

    split: str
    images: FloatImages
    labels: IntArray
    ids: IntArray
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """What the user asked a source for: "npz:my.npz" has the name "npz:my.npz" and the argument "my.npz"."""

    name: str
    argument: str
    split: str
    n: int | None

    def choose_split(self, available: Sequence[str]) -> str:
        """The split to load. A source with the single split "all" serves it where "test" is asked for.

        Raises:
            MissingSplit: the source has no such split.
        """
        if self.split in available:
            return self.split
        if list(available) == [SINGLE_SPLIT] and self.split == "test":
            return SINGLE_SPLIT
        raise MissingSplit(f"data set {self.name} has no split {self.split!r}; it has {', '.join(available)}")

    def count(self, total: int) -> int:
        """How many samples to keep of a split that has `total`.

        Raises:
            UsageError: the split has no samples, or fewer than n.
        """
        if total == 0:
            raise UsageError(f"data set {self.name} has no samples; expected one image and one label at least")
        if self.n is not None and self.n > total:
            raise UsageError(
                f"n must be at most {total}, the size of data set {self.name}, got {self.n}; leave it out for all"
            )
        return total if self.n is None else self.n


Loader = Callable[[Request], Samples]


@dataclass(frozen=True)
class Source:
    """A registered data set, or a kind of them: `argument` says what follows the colon, None for a fixed set."""

    name: str
    load: Loader
    argument: str | None
    eps: Mapping[Norm, float]


DATASETS: Registry[Source] = Registry(
    "data set", __package__, Path(__file__).parent, "register_dataset", "moebench.datasets"
)


def _source(load: Loader, name: str, facts: Mapping[str, Any]) -> Source:
    eps: Mapping[Norm, float] = {
        "Linf": facts.get("linf", DEFAULT_EPS["Linf"]),
        "L2": facts.get("l2", DEFAULT_EPS["L2"]),
    }
    return Source(name, load, facts.get("argument"), eps)


_declare = decorator_for(lambda: DATASETS, _source)


def register_dataset(name: str, **facts: Any) -> Callable[[Loader], Loader]:
    """Registers a loader. Facts: `summary` (one line), `argument` ("FILE"), `linf` and `l2` (default radii)."""
    declared: Callable[[Loader], Loader] = _declare(name, **facts)
    return declared


def load_dataset(name: str, *, split: str = "test", n: int | None = None) -> Dataset:
    """The data set of that name: "digits", "cifar10", "npz:FILE", "folder:DIR", and so on.

    Args:
        name: a registered name, with its argument after a colon where it takes one.
        split: which split; files without splits have one, "all", and give it for "test" too.
        n: keep the first n samples of the split.

    Raises:
        UsageError: the name, the split or n is wrong, or the data cannot be read.
    """
    if n is not None and n < 1:
        raise UsageError(f"n must be at least 1, got {n}")
    source, argument = _find(name)
    samples = source.load(Request(name, argument, split, n))
    return Dataset(
        name=name,
        split=samples.split,
        images=samples.images,
        labels=samples.labels,
        class_names=samples.class_names,
        sha256=content_hash(samples.images, samples.labels),
        ids=samples.ids,
        default_eps=source.eps,
    )


def _find(name: str) -> tuple[Source, str]:
    kind, _, argument = name.partition(":")
    if kind not in DATASETS and Path(name).exists():
        prefix = "folder" if Path(name).is_dir() else "npz"
        raise UsageError(f"unknown data set {name!r}; to read the file or folder of that name write {prefix}:{name}")
    source = DATASETS.get(kind)
    if source.argument is None and ":" in name:
        raise UsageError(f"data set {kind!r} takes nothing after a colon, got {name!r}; write {kind}")
    if source.argument is not None and not argument:
        raise UsageError(f"data set {name!r} does not say what to read; write {kind}:{source.argument}")
    return source, argument


def content_hash(images: FloatImages, labels: IntArray) -> str:
    """SHA-256 in hex over the shapes, the images' float32 and the labels' int64 bytes, little endian."""
    digest = hashlib.sha256(f"images {images.shape} labels {labels.shape}\n".encode())
    digest.update(np.ascontiguousarray(images, dtype="<f4").data)
    digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
    return digest.hexdigest()

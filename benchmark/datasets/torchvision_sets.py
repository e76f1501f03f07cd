"""CIFAR-10, CIFAR-100 and SVHN through torchvision: downloaded once, checked by hash, kept in one folder."""

from __future__ import annotations

import os
import socket
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moebench.datasets._base import Request, Samples, register_dataset
from moebench.errors import UsageError, first_line

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]

ROOT_VARIABLE = "MOEBENCH_DATA"
TIMEOUT_SECONDS = 30.0


class Archive(NamedTuple):
    """A file to download: where from, its name on disk and its MD5 as torchvision knows it."""

    url: str
    filename: str
    md5: str


@register_dataset("cifar10", summary="CIFAR-10: objects, 32x32, colour, 10 classes; downloaded once")
def cifar10(request: Request) -> Samples:
    """CIFAR-10: 50,000 train and 10,000 test images in their official order."""
    from torchvision.datasets import CIFAR10

    return _cifar(CIFAR10, request)


@register_dataset("cifar100", summary="CIFAR-100: objects, 32x32, colour, 100 classes; downloaded once")
def cifar100(request: Request) -> Samples:
    """CIFAR-100 with its fine labels: 50,000 train and 10,000 test images in their official order."""
    from torchvision.datasets import CIFAR100

    return _cifar(CIFAR100, request)


@register_dataset("svhn", summary="SVHN: house numbers, 32x32, colour, 10 classes; downloaded once")
def svhn(request: Request) -> Samples:
    """Street View House Numbers, cropped: 73,257 train, 26,032 test and 531,131 extra images."""
    from torchvision.datasets import SVHN

    split = request.choose_split(("train", "test", "extra"))
    data = _open(request, Archive(*SVHN.split_list[split]), lambda get: SVHN(data_root(), split=split, download=get))
    return _samples(request, split, data.data, data.labels, [str(digit) for digit in range(10)])


def _cifar(kind: type[CIFAR10], request: Request) -> Samples:
    split = request.choose_split(("train", "test"))
    archive = Archive(kind.url, kind.filename, kind.tgz_md5)
    data = _open(request, archive, lambda get: kind(data_root(), train=split == "train", download=get))
    return _samples(request, split, data.data.transpose(0, 3, 1, 2), np.asarray(data.targets), data.classes)


def _samples(
    request: Request, split: str, pixels: NDArray[np.uint8], labels: NDArray[Any], names: list[str]
) -> Samples:
    kept = request.count(len(labels))
    images = np.ascontiguousarray(pixels[:kept], dtype=np.float32) / np.float32(255)
    return Samples(split, images, labels[:kept].astype(np.int64), np.arange(kept, dtype=np.int64), tuple(names))


def data_root() -> Path:
    """Where downloaded data sets are kept: the folder in MOEBENCH_DATA, else ~/.cache/moebench."""
    return Path(os.environ.get(ROOT_VARIABLE) or "~/.cache/moebench").expanduser()


def _open(request: Request, archive: Archive, build: Callable[[bool], Any]) -> Any:
    """The data set from disk, or else downloaded. `build(True)` unpacks a downloaded archive."""
    root = data_root()
    with redirect_stdout(sys.stderr), _network_timeout():
        try:
            return build(False)
        except RuntimeError:
            pass  # torchvision's word for files that are missing or fail their hash
        try:
            root.mkdir(parents=True, exist_ok=True)
            _fetch(archive, root)
            return build(True)
        except (OSError, RuntimeError, HTTPException, EOFError, tarfile.TarError) as error:
            raise UsageError(
                f"data set {request.name} is not in {root} and could not be downloaded ({first_line(error)}); put "
                f"{archive.filename} (MD5 {archive.md5}) there, or set {ROOT_VARIABLE} to a folder that has it"
            ) from None


def _fetch(archive: Archive, root: Path) -> None:
    """Downloads beside the target and moves the file there once its hash is right, so no half file stays behind."""
    from torchvision.datasets.utils import check_integrity, download_url  # type: ignore[import-untyped]

    if check_integrity(root / archive.filename, archive.md5):
        return
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
        download_url(archive.url, folder, archive.filename, archive.md5)
        os.replace(Path(folder) / archive.filename, root / archive.filename)


@contextmanager
def _network_timeout() -> Iterator[None]:
    """A silent network must end in a message, not in waiting; urllib's default is to wait forever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)

"""A user's own data as image files, one folder per class."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from moebench.datasets._base import SINGLE_SPLIT, FloatImages, Request, Samples, register_dataset
from moebench.errors import UsageError, first_line

SPLITS = ("train", "val", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
GREY_MODES = ("1", "L", "LA")
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class ImageFile(NamedTuple):
    """One sample: its path and the number of its class."""

    path: Path
    label: int


@register_dataset("folder", summary="folder:DIR, images in DIR/CLASS/FILE or DIR/SPLIT/CLASS/FILE", argument="DIR")
def folder(request: Request) -> Samples:
    """The images below a folder, classes numbered in sorted order.

    Without the subfolders train, val or test there is one split, "all". Colour is kept unless every image of the split
    is grey. The id of a sample is its place when sorted by class and file name, which is torchvision's order for an
    `ImageFolder`; the split's own order is that of a hash of those names, so that the first n images are not all of
    the first class.

    Raises:
        UsageError: the layout is another one, or a file is no image, damaged, or of another size than the rest.
    """
    root = Path(request.argument).expanduser()
    if not root.is_dir():
        raise UsageError(f"{root}: there is no such folder; folder:DIR wants images in DIR/CLASS/FILE")
    try:
        split, base, classes = choose_layout(root, request)
        files = list_files(base, classes)
    except OSError as error:
        raise UsageError(f"{root}: cannot be listed ({first_line(error)}); check the permissions") from None
    size, grey = check_files(files)
    order = sorted(range(len(files)), key=lambda i: name_hash(files[i].path))[: request.count(len(files))]
    images = read_images([files[i].path for i in order], size, "L" if grey else "RGB")
    labels = np.array([files[i].label for i in order], dtype=np.int64)
    return Samples(split, images, labels, np.array(order, dtype=np.int64), tuple(classes))


def choose_layout(root: Path, request: Request) -> tuple[str, Path, list[str]]:
    """The split, the folder that holds its classes, and the names of all classes.

    The classes are those of all splits together, so that a class that is missing from one does not renumber the others.
    """
    splits = [name for name in SPLITS if (root / name).is_dir() and subfolders(root / name)]
    if not splits:
        split, base, classes = request.choose_split((SINGLE_SPLIT,)), root, subfolders(root)
    else:
        split = request.choose_split(splits)
        base, classes = root / split, sorted({name for other in splits for name in subfolders(root / other)})
    if not classes:
        raise UsageError(f"{root}: no class folders in it; expected images in {root / 'CLASS' / 'FILE'}")
    if len(classes) < 2:
        raise UsageError(f"{base}: only one class folder, {classes[0]}; a classifier needs two")
    return split, base, classes


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in it, sorted; hidden ones do not count."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def list_files(base: Path, classes: Sequence[str]) -> list[ImageFile]:
    """All image files of a split, sorted by class and name.

    Raises:
        UsageError: a class folder is empty, or holds a folder or a file that is no image.
    """
    files: list[ImageFile] = []
    present = set(subfolders(base))
    for label, name in enumerate(classes):
        if name not in present:
            continue
        entries = sorted((e for e in (base / name).iterdir() if not e.name.startswith(".")), key=lambda e: e.name)
        if not entries:
            raise UsageError(f"{base / name}: the class folder is empty; add images to it or delete it")
        for entry in entries:
            if entry.is_dir():
                raise UsageError(f"{entry}: a folder inside a class folder; expected images in {base / name / 'FILE'}")
            if entry.suffix.lower() not in SUFFIXES:
                raise UsageError(f"{entry}: not an image file; expected {', '.join(SUFFIXES)} in a class folder")
            files.append(ImageFile(entry, label))
    return files


def check_files(files: Sequence[ImageFile]) -> tuple[tuple[int, int], bool]:
    """Width and height of all images, and whether all are grey. Reads the headers only.

    Raises:
        UsageError: two images differ in size, or one has more than 8 bits per channel.
    """
    size: tuple[int, int] | None = None
    grey = True
    for path, _ in files:
        with opened(path) as image:
            size = size or image.size
            if image.size != size:
                (w, h), (w0, h0) = image.size, size
                raise UsageError(f"{path} is {w}×{h} but {files[0].path} is {w0}×{h0}; resize all images to one size")
            if image.mode in DEEP_MODES:
                raise UsageError(f"{path}: has more than 8 bits per channel (mode {image.mode}); save it with 8 bits")
            grey = grey and image.mode in GREY_MODES
    return size or (0, 0), grey


def read_images(paths: Sequence[Path], size: tuple[int, int], mode: str) -> FloatImages:
    """The images as (N, C, H, W) float32 in [0, 1]."""
    width, height = size
    images = np.empty((len(paths), len(mode), height, width), dtype=np.float32)
    for row, path in zip(images, paths, strict=True):
        with opened(path) as image:
            pixels = np.asarray(image.convert(mode), dtype=np.float32) / np.float32(255)
        row[:] = pixels.reshape(height, width, len(mode)).transpose(2, 0, 1)
    return images


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file, open; whatever Pillow finds wrong with it becomes a message that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                yield image
    except UsageError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UsageError(
            f"{path}: has more than {Image.MAX_IMAGE_PIXELS} pixels, which is refused; make it smaller"
        ) from None
    except UnidentifiedImageError:
        raise UsageError(f"{path}: not an image, or damaged; expected PNG, JPEG, BMP or WebP") from None
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others for damaged files.
    except Exception as error:
        raise UsageError(f"{path}: damaged image ({first_line(error)}); replace or delete it") from None


def name_hash(path: Path) -> bytes:
    """Orders samples by class and file name in a fixed order that looks random."""
    return hashlib.sha256(f"{path.parent.name}/{path.name}".encode(errors="surrogateescape")).digest()

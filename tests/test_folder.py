"""Folders of images as data sets: layouts, formats, and one line for all else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_checks import check, refused
from PIL import Image

from moebench.datasets import load_dataset


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

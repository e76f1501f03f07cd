"""Adversarial examples on a model page: the pictures are the images, and the reason where there are none."""

from __future__ import annotations

import io
from base64 import b64decode
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_store import FakeStore, example, protocol
from PIL import Image
from report_parts import html_of, one_model, page_of, setting_of

from moebench.report import examples, render, write_report
from moebench.schema import ExpertChoice


def with_pictures(**facts: Any) -> FakeStore:
    store = one_model(("autoattack",))
    store.pictures[1] = tuple(replace(example(number, number, number + 1), **facts) for number in range(3))
    return store


@pytest.mark.parametrize("inline", [True, False])
def test_pictures_decode_to_the_images_and_the_magnified_perturbation(
    monkeypatch: pytest.MonkeyPatch, inline: bool
) -> None:
    monkeypatch.setattr(examples, "INLINE", 1024 if inline else 0)
    store = with_pictures()
    page, files = page_of(store), render(store)
    ((gallery,),) = (one.galleries for one in page.details.settings)
    assert gallery.factor == "× 2.5"
    for given, shown in zip(store.pictures[1], gallery.shown, strict=True):
        wanted = (given.clean, 0.5 + 2.5 * (given.adversarial.astype(float) - given.clean), given.adversarial)
        for image, picture in zip(wanted, shown.pictures, strict=True):
            assert picture.path.startswith("data:") == inline
            content = b64decode(picture.path.partition(",")[2]) if inline else files[f"models/{picture.path}"]
            assert isinstance(content, bytes)
            pixels = np.asarray(Image.open(io.BytesIO(content)))
            assert np.array_equal(pixels, np.clip(np.rint(image[0] * 255), 0, 255))
            assert (picture.width, picture.height, picture.tiny) == (96, 96, True)


def test_a_colour_picture_keeps_its_channels_and_a_large_one_is_made_smaller_by_the_page() -> None:
    image = np.random.default_rng(3).random((3, 300, 400)).astype(np.float32)
    pixels = np.asarray(Image.open(io.BytesIO(examples.png(image))))
    assert np.array_equal(pixels, np.rint(image.astype(float) * 255).transpose(1, 2, 0))
    store = with_pictures(clean=image, adversarial=image)
    shown = setting_of(store).galleries[0].shown[0].pictures[0]
    assert (shown.width, shown.height, shown.tiny) == (192, 144, False)


@pytest.mark.parametrize(
    ("norm", "eps", "largest", "factor"),
    [("Linf", 0.2, 0.1, 2.5), ("Linf", 8 / 255, 0.01, 15.0), ("L2", 0.5, 0.07, 7.1), ("L2", 0.5, 0.0, 1.0)],
)
def test_a_perturbation_is_magnified_to_the_range_of_its_ball(
    norm: Any, eps: float, largest: float, factor: float
) -> None:
    clean = np.full((1, 4, 4), 0.5, np.float32)
    moved = clean.copy()
    moved[0, 1, 2] += largest
    one = replace(example(0, 0, 1), clean=clean, adversarial=moved)
    assert examples.magnification(one, protocol(norm=norm, eps=eps).threat) == factor


def test_images_that_are_neither_grey_nor_rgb_are_not_shown_with_the_reason() -> None:
    store = with_pictures(clean=np.zeros((4, 8, 8), np.float32), adversarial=np.zeros((4, 8, 8), np.float32))
    assert "Not shown: images of 4 channels are neither grey nor RGB" in html_of(store)
    assert not [path for path in render(store) if path.endswith(".png")]


def test_an_example_names_its_classes_predictions_and_experts() -> None:
    tokens = ExpertChoice("blocks.1", before=(0, 1, 2), after=(0, 2, 1), per_token=True)
    store = with_pictures(experts=(ExpertChoice("moe", (2, 0), (1, 0)), ExpertChoice("top", (3,), (3,)), tokens))
    page = " ".join(html_of(store).split())
    assert "Sample 1, class 1; broken by apgd-ce, Linf distance 0.2." in page
    assert "clean: <b>1</b>" in page
    assert "adversarial: <b>2</b>" in page
    assert "moe 2, 0 → 1, 0; top 3 (unchanged); blocks.1 2 of 3 tokens go to another first expert" in page
    assert 'alt="sample 1, adversarial: seen as 2"' in page
    assert page.count('loading="lazy"') == 9


def test_pictures_of_an_earlier_report_go_and_foreign_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "INLINE", 0)
    store = with_pictures()
    written = write_report(store, tmp_path)
    pictures = {path for path in written if path.suffix == ".png"}
    assert pictures
    assert all(path.parent == tmp_path / "models" / examples.FOLDER for path in pictures)
    foreign = tmp_path / "models" / examples.FOLDER / "mine.png"
    Image.new("L", (2, 2)).save(foreign)
    store.pictures.clear()
    write_report(store, tmp_path)
    assert list(foreign.parent.iterdir()) == [foreign]


def test_without_pictures_the_page_says_why() -> None:
    assert "Not shown: the store holds no pictures of these results" in html_of(one_model())

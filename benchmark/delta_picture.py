"""A universal perturbation as a picture: δ itself, and test images without and with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from moebench.datasets._base import FloatImages
from moebench.errors import UsageError

TILE, GAP, LINE = 112, 8, 14
"""Side of an image, space between images, and height of a line of text, in pixels."""
INK, PAPER = (20, 20, 20), (255, 255, 255)
WRONG = (190, 20, 20)


@dataclass(frozen=True)
class Example:
    """A test image (C, H, W) in [0, 1], and with δ; the name of its class, and of those that the model predicts."""

    clean: FloatImages
    perturbed: FloatImages
    label: str
    clean_pred: str
    adv_pred: str


def check_channels(channels: int) -> None:
    """Refuses images that are neither grey nor RGB.

    Raises:
        UsageError: they have another number of channels.
    """
    if channels not in (1, 3):
        raise UsageError(f"--picture shows images of 1 or 3 channels, these have {channels}; leave --picture out")


def write_picture(file: IO[bytes], delta: FloatImages, examples: Sequence[Example]) -> None:
    """Writes a PNG with δ on the left and the examples on the right.

    δ is scaled so that grey is 0 and its largest entry is black or white.

    Args:
        file: where the PNG goes.
        delta: (C, H, W), C 1 or 3.
        examples: shown without δ above and with δ below.
    """
    width = (1 + len(examples)) * (TILE + GAP) + GAP
    height = 2 * (TILE + GAP + 2 * LINE) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()

    def put(column: int, row: int, image: FloatImages, lines: Sequence[str], colour: tuple[int, int, int]) -> None:
        left, top = GAP + column * (TILE + GAP), GAP + row * (TILE + GAP + 2 * LINE)
        tile = Image.fromarray(to_pixels(image)).resize((TILE, TILE), Image.Resampling.NEAREST)
        sheet.paste(tile, (left, top))
        for number, text in enumerate(lines):
            draw.text((left, top + TILE + 1 + number * LINE), _fitting(draw, font, text), fill=colour, font=font)

    largest = float(np.abs(delta).max())
    put(0, 0, 0.5 + delta / (2 * largest) if largest > 0 else np.full_like(delta, 0.5), (
        "perturbation", f"largest {largest:.3g}"
    ), INK)  # fmt: skip
    for column, one in enumerate(examples, start=1):
        put(column, 0, one.clean, (f"is {one.label}", f"seen as {one.clean_pred}"), _colour(one.clean_pred, one))
        put(column, 1, one.perturbed, ("perturbed", f"seen as {one.adv_pred}"), _colour(one.adv_pred, one))
    sheet.save(file, format="PNG")


def to_pixels(image: FloatImages) -> NDArray[np.uint8]:
    """An image (C, H, W) in [0, 1] as (H, W, 3) bytes; one channel is shown grey."""
    grey = np.clip(np.rint(image.astype(np.float64) * 255), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(grey.transpose(1, 2, 0), (*grey.shape[1:], 3)))


def _colour(prediction: str, example: Example) -> tuple[int, int, int]:
    return INK if prediction == example.label else WRONG


def _fitting(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> str:
    """The text, shortened to the width of a tile, in letters that Pillow's own font has."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    while draw.textlength(text, font=font) > TILE and len(text) > 1:
        text = f"{text[:-2]}." if text.endswith(".") else f"{text[:-1]}."
    return text

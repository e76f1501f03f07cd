"""Adversarial examples as pictures: the clean image, the perturbation magnified, the adversarial image.

PNG files of the images' own size beside the page, named by the hash of their bytes, so that equal ones are one file.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from moebench.report.evidence import WHOLE, Evidence
from moebench.report.per_class import class_name
from moebench.report.settings import Setting
from moebench.schema import Example, ExpertChoice, ThreatModel

FOLDER = "pictures"

INLINE = 1024
"""Bytes of a picture up to which it stands in the page itself: a digit has some 150, and there are thousands."""
MARK = "moebench report"
"""Kept in every file, so that a later report knows its own pictures."""

SMALL, LARGE = 96, 192
"""Images below the one are shown enlarged by a whole number, above the other reduced; in CSS pixels."""


@dataclass(frozen=True)
class Picture:
    """An image element: path from the page, size in CSS pixels, what it shows in words."""

    path: str
    width: int
    height: int
    alt: str
    tiny: bool


@dataclass(frozen=True)
class Choice:
    """The experts of one layer before and after, in words."""

    layer: str
    words: str
    changed: bool


@dataclass(frozen=True)
class Shown:
    """One example with its three pictures; names are those of the classes."""

    number: int
    label: str
    clean_pred: str
    adv_pred: str
    stage: str
    distance: str
    factor: str
    pictures: tuple[Picture, ...]
    choices: tuple[Choice, ...]

    @property
    def moved(self) -> int:
        """How many layers choose otherwise."""
        return sum(choice.changed for choice in self.choices)


@dataclass(frozen=True)
class Gallery:
    """The examples of one result; `factor` is by how much perturbations are magnified, None where it differs."""

    title: str
    factor: str
    shown: tuple[Shown, ...]
    files: Mapping[str, bytes] = field(repr=False)
    why: str = ""


def gallery(setting: Setting, one: Evidence, examples: Sequence[Example]) -> Gallery | None:
    """The pictures of a result's examples; None where it has none.

    Args:
        setting: whose protocol names the classes and the threat model.
        one: the result.
        examples: what the store keeps of it.
    """
    if not examples:
        return None
    title = (
        f"{one.attack} on {'the whole model' if one.view == WHOLE else one.view}{' (warm start)' if one.warm else ''}"
    )
    channels = {example.clean.shape[0] for example in examples}
    if not channels <= {1, 3}:
        return Gallery(title, "", (), {}, f"images of {max(channels)} channels are neither grey nor RGB")
    files: dict[str, bytes] = {}
    threat = setting.protocol.threat
    factors = [magnification(example, threat) for example in examples]
    shown = tuple(_shown(setting, example, factor, files) for example, factor in zip(examples, factors, strict=True))
    low, high = min(factors), max(factors)
    factor = f"× {low:g}" if low == high else f"× {low:g} to × {high:g}"
    return Gallery(title, factor, shown, files)


def magnification(example: Example, threat: ThreatModel) -> float:
    """What to multiply a perturbation by so that it fills the range around grey; the same for a whole Linf ball.

    Two significant digits, rounded down, so that nothing is cut off but what rounding leaves beyond the ball.
    """
    largest = threat.eps if threat.norm == "Linf" else float(np.abs(_delta(example)).max(initial=0.0))
    if largest <= 0:
        return 1.0
    exact = 0.5 / largest
    unit = 10.0 ** (math.floor(math.log10(exact)) - 1)
    return round(math.floor(exact / unit + 1e-9) * unit, 10)


def _delta(example: Example) -> NDArray[np.float64]:
    return example.adversarial.astype(np.float64) - example.clean.astype(np.float64)


def _shown(setting: Setting, example: Example, factor: float, files: dict[str, bytes]) -> Shown:
    protocol = setting.protocol
    label, before, after = (
        class_name(protocol, number) for number in (example.label, example.clean_pred, example.adv_pred)
    )
    images = (
        (example.clean, f"sample {example.index}, clean: class {label}, seen as {before}"),
        (
            0.5 + factor * _delta(example),
            f"perturbation of sample {example.index}, magnified {factor:g} times around grey",
        ),
        (example.adversarial, f"sample {example.index}, adversarial: seen as {after}"),
    )
    unit = f"{protocol.threat.norm} distance"
    return Shown(
        number=example.index,
        label=label,
        clean_pred=before,
        adv_pred=after,
        stage=example.stage,
        distance=f"{unit} {example.distance:.4g}",
        factor=f"× {factor:g}",
        pictures=tuple(_picture(np.asarray(image), alt, files) for image, alt in images),
        choices=tuple(map(_choice, example.experts)),
    )


def _picture(image: NDArray[np.floating], alt: str, files: dict[str, bytes]) -> Picture:
    content = png(image)
    if len(content) <= INLINE:
        path = f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
    else:
        path = f"{FOLDER}/{hashlib.sha256(content).hexdigest()[:20]}.png"
        files[path] = content
    height, width = image.shape[1:]
    longest = max(height, width, 1)
    times = math.ceil(SMALL / longest) if longest < SMALL else min(1.0, LARGE / longest)
    return Picture(path, max(1, round(width * times)), max(1, round(height * times)), alt, times > 1)


def png(image: NDArray[np.floating]) -> bytes:
    """An image (C, H, W) in [0, 1], C 1 or 3, as PNG with 8 bits per channel; values outside are cut off."""
    pixels = np.clip(np.rint(np.asarray(image, dtype=np.float64) * 255), 0, 255).astype(np.uint8)
    made = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    told = PngImagePlugin.PngInfo()
    told.add_text("Software", MARK)
    file = io.BytesIO()
    made.save(file, format="PNG", pnginfo=told, optimize=True)
    return file.getvalue()


def _choice(choice: ExpertChoice) -> Choice:
    if choice.per_token:
        moved = sum(before != after for before, after in zip(choice.before, choice.after, strict=True))
        return Choice(choice.layer, f"{moved} of {len(choice.before)} tokens go to another first expert", moved > 0)
    before, after = (", ".join(map(str, chosen)) or "none" for chosen in (choice.before, choice.after))
    return Choice(choice.layer, f"{before} → {after}" if before != after else before, before != after)

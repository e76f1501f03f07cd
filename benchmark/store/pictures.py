"""The adversarial examples that a result keeps as pictures: which, how small, and how they are read again.

Of the samples that the model gets right and the attack broke, the first of each class come first, by their number in
the data; then the second of each class, and so on. The rule chooses the same examples however the samples come in, for
what it drops from some of them it would drop from all. Each commit keeps the best so far; a killed run loses none.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from sqlalchemy import select
from sqlalchemy.orm import Session

from moebench.errors import RunError
from moebench.schema import Example, ExpertChoice
from moebench.store import records
from moebench.store.orm import ExampleRow

KEPT = 8
"""How many examples a result keeps at most."""

BYTES = 40_000
"""How many bytes the pictures of a finished result take; where they are more, fewer are kept, but one always is."""

LARGEST = 3 * 64 * 64
"""Values of the largest image of which pictures are kept; smaller copies would not show what the attack did."""

_EXACT = 32 * 32
"""Values of the largest image whose adversarial one is kept to the last bit."""

_STEPS = (255, 16)
"""Numbers of steps between 0 and 1 of images that began as whole numbers: photographs, and the digits."""


def choose(samples: Sequence[tuple[int, int]], most: int) -> list[int]:
    """Which samples to keep by the rule above, given label and number of each: at most `most` of their positions."""
    seen: Counter[int] = Counter()
    ranked = []
    for position in sorted(range(len(samples)), key=lambda at: samples[at][1]):
        label, number = samples[position]
        ranked.append((seen[label], number, position))
        seen[label] += 1
    return [position for _, _, position in sorted(ranked)[:most]]


def pictures_note(shape: tuple[int, int, int]) -> dict[str, str]:
    """What a run's environment says of images (C, H, W) that are too large to be kept; nothing of others."""
    if math.prod(shape) <= LARGEST:
        return {}
    return {"pictures": f"none: images of {' × '.join(map(str, shape))} are larger than 3 × 64 × 64"}


def keep(session: Session, result_id: int, examples: Sequence[Example]) -> None:
    """Adds the examples of a commit to those of a result, and drops what the rule puts behind `KEPT` others."""
    known = _rows(session, result_id) if examples else []
    told = {row.sample for row in known}
    offered = [example for example in examples if example.clean.size <= LARGEST and example.index not in told]
    if not offered:
        return
    there = [(row.label, row.sample) for row in known]
    chosen = set(choose([*there, *((example.label, example.index) for example in offered)], KEPT))
    for place, row in enumerate(known):
        if place not in chosen:
            session.delete(row)
    session.add_all(
        _row(result_id, example) for place, example in enumerate(offered, start=len(known)) if place in chosen
    )


def trim(session: Session, result_id: int) -> None:
    """Drops the last examples of a finished result that are over `BYTES` together."""
    total = 0
    for place, row in enumerate(_in_order(session, result_id)):
        total += len(row.images)
        if place > 0 and total > BYTES:
            session.delete(row)


def examples(session: Session, result_id: int) -> tuple[Example, ...]:
    """The examples of a result in the order of the rule.

    Raises:
        RunError: one is damaged.
    """
    return tuple(_example(row) for row in _in_order(session, result_id))


def pack_images(clean: NDArray[np.float32], adversarial: NDArray[np.float32]) -> bytes:
    """Two images (C, H, W) in [0, 1], deflated; grey levels are stored as such, perturbations of large images in half.

    Raises:
        RunError: they are no two images of one shape.
    """
    if clean.ndim != 3 or clean.shape != adversarial.shape:
        raise RunError(f"an example has images of shapes {clean.shape} and {adversarial.shape}, not (C, H, W) twice")
    arrays: dict[str, NDArray[Any]] = {"clean": clean.astype(np.float32)}
    for steps in _STEPS:
        levels = np.rint(clean * steps)
        if levels.min() >= 0 and levels.max() <= 255 and np.array_equal(_scaled(levels, steps), clean):
            arrays["clean"] = levels.astype(np.uint8)
            arrays["steps"] = np.array([steps], np.uint8)
            break
    if clean.size <= _EXACT:
        arrays["adversarial"] = adversarial.astype(np.float32)
    else:
        arrays["delta"] = (adversarial - clean).astype(np.float16)
    return zlib.compress(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}), 9)


def unpack_images(blob: bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The clean and the adversarial image of a blob of `pack_images`.

    Raises:
        RunError: the blob is damaged.
    """
    try:
        arrays = load(zlib.decompressobj().decompress(blob, 16 * LARGEST))
        clean = arrays["clean"].astype(np.float32)
        if "steps" in arrays:
            clean = _scaled(clean, int(arrays["steps"][0]))
        if "adversarial" in arrays:
            adversarial = arrays["adversarial"].astype(np.float32)
        else:
            adversarial = np.clip(clean + arrays["delta"].astype(np.float32), 0, 1)
        if clean.ndim != 3 or clean.shape != adversarial.shape:
            raise ValueError(f"shapes {clean.shape} and {adversarial.shape}")
    except (zlib.error, SafetensorError, KeyError, IndexError, ValueError) as error:
        raise RunError(f"an example is damaged ({error}); restore the database from a copy") from None
    return clean, adversarial


def _scaled(levels: NDArray[Any], steps: int) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = levels.astype(np.float32) / np.float32(steps)
    return scaled


def _rows(session: Session, result_id: int) -> list[ExampleRow]:
    return list(session.scalars(select(ExampleRow).where(ExampleRow.result_id == result_id)))


def _in_order(session: Session, result_id: int) -> list[ExampleRow]:
    rows = _rows(session, result_id)
    return [rows[at] for at in choose([(row.label, row.sample) for row in rows], len(rows))]


def _row(result_id: int, example: Example) -> ExampleRow:
    return ExampleRow(
        result_id=result_id,
        sample=example.index,
        label=example.label,
        clean_pred=example.clean_pred,
        adv_pred=example.adv_pred,
        distance=example.distance,
        stage=example.stage,
        experts=[records.plain(asdict(choice)) for choice in example.experts],
        images=pack_images(example.clean, example.adversarial),
    )


def _example(row: ExampleRow) -> Example:
    clean, adversarial = unpack_images(row.images)
    experts = tuple(
        ExpertChoice(one["layer"], tuple(one["before"]), tuple(one["after"]), one["per_token"]) for one in row.experts
    )
    told = (row.sample, row.label, row.clean_pred, row.adv_pred, row.distance, row.stage)
    return Example(*told, clean, adversarial, experts)

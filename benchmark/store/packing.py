"""Chunks and labels as compressed safetensors blobs, and chunks merged into the per-sample evidence of a cell."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moebench.errors import RunError
from moebench.schema import BoolArray, Chunk, IntArray, Outcomes, ResultRecord

CLEAN = "clean"
"""The stage of the clean pass; it comes before all others."""

_INTS = ("index", "clean_pred", "adv_pred", "forwards", "backwards")
_EXTRA = "extra/"
_NARROW = tuple(np.dtype(name) for name in ("uint8", "int8", "uint16", "int16", "int32", "int64"))
_TOLERANCE = 1e-6


_PRESSED = b"zlib-st:"
"""What a compressed blob begins with; a plain one begins with a length whose upper bytes are 0."""

LARGEST = 2**31
"""Bytes that a blob may unpack to."""


def press(blob: bytes) -> bytes:
    """The blob compressed; one that is already is given back. Verdicts and routing shrink to two fifths."""
    return blob if blob.startswith(_PRESSED) else _PRESSED + zlib.compress(blob)


def opened(blob: bytes) -> bytes:
    """What `press` was given; a plain blob is given back.

    Raises:
        ValueError: it is damaged, or larger than any blob of ours.
    """
    if not blob.startswith(_PRESSED):
        return blob
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(blob[len(_PRESSED) :], LARGEST)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if not unpacker.eof:
        raise ValueError("it is cut short or too large")
    return plain


def pack(chunk: Chunk) -> bytes:
    """The arrays of a chunk as one safetensors blob; whole numbers are stored in the narrowest type that holds them.

    Raises:
        RunError: the arrays are not flat, differ in length, or hold what cannot be (a negative index, a NaN distance).
    """
    ints = {name: np.asarray(getattr(chunk, name)) for name in _INTS}
    arrays: dict[str, NDArray[Any]] = {
        **ints,
        "broken": np.asarray(chunk.broken, dtype=np.bool_),
        "distance": np.asarray(chunk.distance, dtype=np.float32),
    }
    _check(chunk.stage, arrays)
    extras = {f"{_EXTRA}{name}": np.asarray(array) for name, array in chunk.extras.items()}
    wrong = [name for name, array in extras.items() if array.shape[:1] != (len(chunk),)]
    if wrong:
        raise RunError(
            f"a chunk of stage {chunk.stage!r} has {len(chunk)} samples, but {wrong[0]!r} has another length"
        )
    packed = {name: _narrow(array) if name in ints else array for name, array in {**arrays, **extras}.items()}
    return press(save({name: np.ascontiguousarray(array) for name, array in packed.items()}))


def unpack(stage: str, seconds: float, blob: bytes) -> Chunk:
    """The chunk that `pack` made a blob of.

    Raises:
        RunError: the blob is damaged.
    """
    try:
        arrays = load(opened(blob))
        ints: dict[str, Any] = {name: arrays[name].astype(np.int64) for name in _INTS}
        chunk = Chunk(
            stage=stage,
            seconds=seconds,
            broken=arrays["broken"].astype(np.bool_),
            distance=arrays["distance"].astype(np.float32),
            extras={name.removeprefix(_EXTRA): array for name, array in arrays.items() if name.startswith(_EXTRA)},
            **ints,
        )
        _check(stage, {name: getattr(chunk, name) for name in (*_INTS, "broken", "distance")})
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"a chunk of stage {stage!r} is damaged ({error}); restore the database from a copy") from None
    return chunk


def pack_labels(labels: IntArray) -> bytes:
    """Labels (n,) as one safetensors blob, in the narrowest type that holds them."""
    return save({"labels": np.ascontiguousarray(_narrow(np.asarray(labels)))})


def unpack_labels(blob: bytes) -> IntArray:
    """The labels (n,) that `pack_labels` made a blob of.

    Raises:
        RunError: the blob is damaged.
    """
    try:
        labels = load(blob)["labels"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"labels are damaged ({error}); restore the database from a copy") from None
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise RunError(f"labels are damaged (they are {labels.dtype} of shape {labels.shape}); restore a copy")
    return labels.astype(np.int64)


def merge(chunks: Sequence[Chunk]) -> Outcomes:
    """The evidence per sample: one row per index that occurs, sorted by it.

    The clean stage comes first, then the chunks in the order given. The first stage that breaks a sample gives its
    `adv_pred`, `distance` and `stage`; a sample that stands keeps those of its first chunk. Passes are summed.
    """
    ordered = sorted(chunks, key=lambda chunk: chunk.stage != CLEAN)
    index = np.unique(_joined(ordered, "index", np.int64))
    size = index.size
    seen, broken = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
    clean_pred, adv_pred = np.zeros(size, np.int64), np.zeros(size, np.int64)
    forwards, backwards = np.zeros(size, np.int64), np.zeros(size, np.int64)
    distance = np.zeros(size, np.float32)
    stage = np.full(size, "", dtype=object)
    for chunk in ordered:
        rows = np.searchsorted(index, chunk.index)
        new = ~seen[rows]
        clean_pred[rows[new]] = chunk.clean_pred[new]
        decides = new | (chunk.broken & ~broken[rows])
        adv_pred[rows[decides]] = chunk.adv_pred[decides]
        distance[rows[decides]] = chunk.distance[decides]
        if chunk.stage != CLEAN:
            stage[rows[chunk.broken & ~broken[rows]]] = chunk.stage
        broken[rows] |= chunk.broken
        seen[rows] = True
        forwards[rows] += chunk.forwards
        backwards[rows] += chunk.backwards
    return Outcomes(index, broken, clean_pred, adv_pred, distance, forwards, backwards, tuple(stage.tolist()))


def contradictions(record: ResultRecord, chunks: Sequence[Chunk], n: int) -> list[str]:
    """Where an aggregate over n samples differs from its samples, in words; empty if it does not."""
    outcomes = merge(chunks)
    if record.n != n:
        return [f"n is {record.n}, its protocol has {n} samples"]
    if not np.array_equal(outcomes.index, np.arange(n)):
        return [f"its chunks cover {outcomes.index.size} of {n} samples"]
    found = []
    standing = int(np.count_nonzero(~outcomes.broken))
    if not abs(record.accuracy * n - standing) <= _TOLERANCE * n:
        found.append(f"accuracy is {record.accuracy:.6g}, its samples give {standing}/{n} = {standing / n:.6g}")
    clean = [chunk for chunk in chunks if chunk.stage == CLEAN]
    right = sum(int(np.count_nonzero(~chunk.broken)) for chunk in clean)
    if sum(map(len, clean)) == n and not abs(record.clean_accuracy * n - right) <= _TOLERANCE * n:
        found.append(f"clean accuracy is {record.clean_accuracy:.6g}, its samples give {right}/{n} = {right / n:.6g}")
    return found


class Known:
    """Which of the n samples of a protocol are in which stage of a result."""

    def __init__(self, n: int, chunks: Sequence[Chunk] = ()) -> None:
        self.n = n
        self._stages: dict[str, BoolArray] = {}
        for chunk in chunks:
            self.add(chunk)

    def add(self, chunk: Chunk) -> None:
        """Counts the samples of a chunk as known."""
        self._stage(chunk.stage)[chunk.index] = True

    def with_(self, chunks: Sequence[Chunk]) -> Known:
        """These and those of further chunks.

        Raises:
            RunError: a chunk holds a sample twice, one that is known in its stage, or one that the protocol lacks.
        """
        both = Known(self.n)
        both._stages = dict(self._stages)
        for stage in {chunk.stage for chunk in chunks}:
            both._stages[stage] = both._stage(stage).copy()
        for chunk in chunks:
            both._refuse(chunk)
            both.add(chunk)
        return both

    def _stage(self, stage: str) -> BoolArray:
        return self._stages.setdefault(stage, np.zeros(self.n, np.bool_))

    def _refuse(self, chunk: Chunk) -> None:
        last = int(chunk.index.max()) if len(chunk) else 0
        if last >= self.n:
            raise RunError(f"stage {chunk.stage!r} names sample {last}, but the protocol has samples 0 to {self.n - 1}")
        values, counts = np.unique(np.asarray(chunk.index), return_counts=True)
        twice = values[(counts > 1) | self._stage(chunk.stage)[values]]
        if twice.size:
            name = f"stage {chunk.stage!r} twice ({twice.size} such samples)"
            raise RunError(f"sample {int(twice[0])} would be in {name}")


def _joined(chunks: Sequence[Chunk], name: str, dtype: type[np.int64]) -> IntArray:
    return np.concatenate([np.zeros(0, dtype), *(getattr(chunk, name) for chunk in chunks)])


def _narrow(array: NDArray[Any]) -> NDArray[Any]:
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    for dtype in _NARROW:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype)
    raise RunError(f"{high} is no 64-bit number")


def _check(stage: str, arrays: dict[str, NDArray[Any]]) -> None:
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) != 1 or len(shapes["index"]) != 1:
        raise RunError(f"the arrays of a chunk of stage {stage!r} must be flat and equally long, got {shapes}")
    for name in _INTS:
        if arrays[name].dtype.kind not in "iu":
            raise RunError(f"{name} of a chunk of stage {stage!r} must hold whole numbers, got {arrays[name].dtype}")
    for name in ("index", "forwards", "backwards", "distance"):
        if not bool(np.all(arrays[name] >= 0)):
            raise RunError(f"{name} of a chunk of stage {stage!r} holds a negative number or NaN")

"""Universal perturbations as files: an npz archive of plain arrays with its facts as JSON text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from moebench.archives import read_npz
from moebench.datasets._base import FloatImages
from moebench.errors import RunError, UsageError, first_line
from moebench.schema import NORMS, Norm, ThreatModel

FORMAT = "moebench universal perturbation 1"
MAX_BYTES = 2**28
"""What a member of the archive may unpack to; no image is as large."""

FACTS: Mapping[str, tuple[type, ...]] = {
    "format": (str,),
    "model": (str,),
    "weights_sha256": (str,),
    "dataset": (str,),
    "training_sha256": (str,),
    "training_n": (int,),
    "attack": (str,),
    "parameters": (dict,),
    "view": (str,),
    "norm": (str,),
    "eps": (float, int),
    "seed": (int,),
    "train_fooling_rate": (float, int),
}
"""What the JSON text must hold, and as what."""


@dataclass(frozen=True, eq=False)
class DeltaFile:
    """A universal perturbation (C, H, W) in units of the [0, 1] pixel scale, and where it comes from (see `FACTS`)."""

    delta: FloatImages
    facts: Mapping[str, Any]

    @property
    def threat(self) -> ThreatModel:
        """The threat model that it was made for."""
        return ThreatModel(cast(Norm, self.facts["norm"]), float(self.facts["eps"]))

    @property
    def sha256(self) -> str:
        """SHA-256 in hex over shape and float32 bytes, little endian."""
        digest = hashlib.sha256(f"delta {self.delta.shape}\n".encode())
        digest.update(np.ascontiguousarray(self.delta, dtype="<f4").data)
        return digest.hexdigest()


def write_delta(path: Path, file: DeltaFile) -> None:
    """Writes a perturbation.

    Raises:
        RunError: the file cannot be written.
    """
    text = json.dumps({**file.facts, "format": FORMAT}, sort_keys=True, allow_nan=False)
    with replacing(path) as out:
        np.savez_compressed(out, allow_pickle=False, delta=file.delta.astype("<f4"), metadata=np.array(text))


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its place only once it is complete.

    Raises:
        RunError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; the results are stored") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_delta(path: Path) -> DeltaFile:
    """Reads a perturbation. Pickled objects are refused, never loaded.

    Raises:
        UsageError: the file is missing, damaged, or does not hold a finite perturbation with all its facts.
    """
    delta, text = _arrays(path)
    if delta.dtype != np.float32:
        raise UsageError(f"{path}: delta must be float32, got {delta.dtype}; try delta.astype('float32')")
    if delta.ndim != 3 or delta.size == 0:
        raise UsageError(f"{path}: delta must have shape C×H×W, got {delta.shape}")
    if not bool(np.isfinite(delta).all()):
        raise UsageError(f"{path}: delta holds NaN or infinite numbers; expected a perturbation within eps")
    file = DeltaFile(np.ascontiguousarray(delta, dtype=np.float32), _facts(path, text))
    try:
        threat = file.threat
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    check_norm(path, file, threat)
    return file


def check_norm(path: Path, file: DeltaFile, threat: ThreatModel) -> None:
    """Refuses a perturbation outside a threat model.

    Raises:
        UsageError: its norm is larger than eps.
    """
    flat = file.delta.astype(np.float64).ravel()
    norm = float(np.abs(flat).max() if threat.norm == "Linf" else np.sqrt(np.square(flat).sum()))
    # One part in a million for perturbations that others projected in float32.
    if norm > threat.eps * (1 + 1e-6):
        raise UsageError(f"{path}: the {threat.norm} norm of delta is {norm:.6g}, more than eps {threat.eps:.6g}")


def check_shape(path: Path, file: DeltaFile, shape: tuple[int, int, int], dataset: str) -> None:
    """Refuses a perturbation of another size than the images.

    Raises:
        UsageError: it is of another size.
    """
    if file.delta.shape != shape:
        have, need = ("×".join(map(str, size)) for size in (file.delta.shape, shape))
        raise UsageError(f"{path}: delta is for images of {have}, and {dataset} has {need}")


def _arrays(path: Path) -> tuple[np.typing.NDArray[Any], str]:
    arrays = read_npz(
        path,
        ("delta", "metadata"),
        wants="--load wants one that --save wrote",
        hint="--load wants a file that --save wrote",
        again="make it again with --save",
        meaning="delta and metadata",
        max_bytes=MAX_BYTES,
    )
    if arrays["metadata"].dtype.kind != "U" or arrays["metadata"].ndim != 0:
        raise UsageError(f"{path}: metadata must be one JSON text, got {arrays['metadata'].dtype}")
    return arrays["delta"], str(arrays["metadata"])


def _facts(path: Path, text: str) -> dict[str, Any]:
    try:
        facts = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: the metadata is no JSON text ({first_line(error)})") from None
    if not isinstance(facts, dict):
        raise UsageError(f"{path}: the metadata must be a JSON object, got {type(facts).__name__}")
    for key, kinds in FACTS.items():
        if key not in facts:
            raise UsageError(f"{path}: the metadata does not say {key}; it needs {', '.join(FACTS)}")
        if not isinstance(facts[key], kinds) or isinstance(facts[key], bool):
            raise UsageError(f"{path}: {key} in the metadata must be {_kind(kinds)}, got {facts[key]!r:.80}")
    if facts["format"] != FORMAT:
        raise UsageError(f"{path}: is of format {facts['format']!r:.80}; this version reads {FORMAT!r}")
    if facts["norm"] not in NORMS:
        raise UsageError(f"{path}: unknown norm {facts['norm']!r:.80}; expected one of {', '.join(NORMS)}")
    return {key: facts[key] for key in FACTS}


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _kind(kinds: tuple[type, ...]) -> str:
    return {str: "a text", int: "a whole number", dict: "an object"}.get(kinds[0], "a number")

"""The file of adversarial images that `--save-adv` asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moebench.booking import CellOutcome
from moebench.errors import RunError, UsageError

if TYPE_CHECKING:
    from moebench.evaluation import Prepared


def save_adversarial(path: Path, prepared: Prepared, outcomes: Sequence[CellOutcome]) -> None:
    """Writes the images of `--save-adv`: per sample that of the first cell that broke it, else of the last cell.

    Raises:
        RunError: the file cannot be written.
    """
    x_adv, pred = outcomes[-1].x_adv.clone(), outcomes[-1].adv_pred.clone()
    robust = ~outcomes[-1].broken
    for outcome in reversed(outcomes[:-1]):
        broke = outcome.broken
        x_adv[broke], pred[broke] = outcome.x_adv[broke], outcome.adv_pred[broke]
        robust &= ~broke
    arrays: dict[str, Any] = {
        "x_adv": x_adv.cpu().numpy().astype(np.float32),
        "y": prepared.dataset.labels,
        "clean_pred": prepared.clean_pred.cpu().numpy(),
        "adv_pred": pred.cpu().numpy(),
        "robust": robust.cpu().numpy(),
        "index": prepared.dataset.ids,
    }
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; the results are stored") from None
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path, option: str = "--save-adv") -> None:
    """Refuses an output file that could not be written after hours of work."""
    if path.is_dir():
        raise UsageError(f"{option} takes a file, and {path} is a folder")
    if path.exists() and not path.is_file():
        raise UsageError(f"{option} takes an ordinary file, and {path} is none; name another")
    probe = path.with_name(f".{path.name}.probe")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; choose another place for {option}") from None

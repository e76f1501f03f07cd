"""The checkpoint of a training run: written whole or not at all, and no leftovers of a process that was killed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from moebench.errors import RunError, UsageError


def checkpoint_path(folder: Path, stem: str) -> Path:
    """Where the checkpoint of the model with that file name lies."""
    return folder / f".{stem}.training.pt"


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Replaces the checkpoint.

    Raises:
        RunError: it cannot be written, because the disk is full, say; the one before is kept.
    """
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state), draft)
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError that does not say so.
        reason = (error.strerror or error) if isinstance(error, OSError) else "the disk seems to be full"
        kept = "; the checkpoint before is kept" if path.exists() else ""
        raise RunError(f"cannot write {path}: {reason}{kept}") from None
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def read_checkpoint(path: Path, device: str) -> dict[str, Any] | None:
    """The state that was written last, None if there is none; it holds at least its run's `identity`.

    Raises:
        UsageError: the file is no checkpoint.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        assert isinstance(state["identity"], str)
    except Exception as error:
        raise UsageError(f"cannot read {path} ({type(error).__name__}); delete it or use --fresh") from None
    return dict(state)


def clear_drafts(folder: Path, stem: str) -> None:
    """Deletes what processes that are gone had begun to write for this model: checkpoint, weights or card."""
    draft = re.compile(rf"\.{re.escape(stem)}\.(?:training|safetensors|json)\.(\d+)")
    with suppress(OSError):
        for name in os.listdir(folder):
            found = draft.fullmatch(name)
            if found and not _alive(int(found[1])):
                (folder / name).unlink(missing_ok=True)


def _alive(process: int) -> bool:
    """Whether another process of that number runs; this one has not begun to write."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        # It belongs to another user.
        return True
    return True

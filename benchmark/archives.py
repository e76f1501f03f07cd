"""Reading npz archives that come from outside: number and text arrays only, nothing is ever unpickled."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moebench.errors import UsageError, first_line


def read_npz(
    path: Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    *,
    wants: str,
    hint: str,
    again: str,
    meaning: str,
    max_bytes: int | None = None,
) -> dict[str, NDArray[Any]]:
    """Some arrays of an archive by name.

    Args:
        path: the file.
        required: arrays that it must hold.
        optional: arrays that it may hold.
        wants: what should be there where there is no file.
        hint: what to do where the file is no npz archive.
        again: what to do where it is damaged.
        meaning: what the required arrays are, for a file without them.
        max_bytes: size of one array above which the file is refused unread; None for no limit.

    Raises:
        UsageError: the file is missing, damaged, no npz archive, too large, or lacks an array.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file; {wants}")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{path}: may not be read; check the permissions of the file")
    if not zipfile.is_zipfile(path):
        raise UsageError(f"{path}: not an npz archive; {hint}")
    try:
        if max_bytes is not None:
            _check_sizes(path, max_bytes)
        with np.load(path, allow_pickle=False) as archive:
            found = list(archive.files)
            arrays = {key: archive[key] for key in (*required, *optional) if key in found}
    # A damaged archive makes zipfile, zlib and numpy raise a dozen kinds of error; all mean the same to the user.
    except Exception as error:
        if "Object arrays" in str(error):
            raise UsageError(
                f"{path}: holds pickled objects, which are never loaded; save plain number arrays"
            ) from None
        raise UsageError(f"{path}: cannot be read ({first_line(error)}); {again}") from None
    missing = [key for key in required if not isinstance(arrays.get(key), np.ndarray)]
    if missing:
        held = ", ".join(found) or "nothing"
        raise UsageError(f"{path}: no array {' and '.join(missing)} in it, it holds {held}; expected {meaning}")
    return arrays


def _check_sizes(path: Path, most: int) -> None:
    with zipfile.ZipFile(path) as members:
        large = [item.filename for item in members.infolist() if item.file_size > most]
    if large:
        raise ValueError(f"{large[0]} is larger than any image")

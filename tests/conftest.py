"""What holds for every test: one thread per worker, and no file of the user's is read or written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before a test imports numpy or torch: they read these once.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Downloads, should a test cause one, go to a folder of the test's own."""
    folder = tmp_path / "moebench-data"
    monkeypatch.setenv("MOEBENCH_DATA", str(folder))
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path / "moebench-cache"))
    return folder

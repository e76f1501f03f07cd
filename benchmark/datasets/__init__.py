"""Data sets as numpy images in [0, 1] with stable sample ids and hashes. One public file per source."""

from __future__ import annotations

from moebench.datasets._base import DATASETS, Dataset, MissingSplit, Request, Samples, load_dataset, register_dataset
from moebench.datasets._training import load_training_splits

__all__ = [
    "DATASETS",
    "Dataset",
    "MissingSplit",
    "Request",
    "Samples",
    "load_dataset",
    "load_training_splits",
    "register_dataset",
]

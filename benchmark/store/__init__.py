"""The results database: every run, every cell, and the outcome of every sample."""

from moebench.store.packing import merge
from moebench.store.store import Store

__all__ = ["Store", "merge"]

"""Memory: how many rows fit a device, what running out of it looks like, and keeping it instead of fetching it anew."""

from __future__ import annotations

import ctypes
import gc
from functools import cache

import torch
from torch import nn

CPU_PIXELS = 2**16
"""Pixels of the rows that run together on a CPU: enough to hide the cost of a call, small enough for its caches."""

FEWEST_ROWS = 16
MOST_ROWS_CPU = 512
MOST_ROWS_CUDA = 4096
FILL = 0.6
"""Share of a GPU's free memory that a batch is planned to take."""

_KEPT_BYTES = 64 * 2**20


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or this machine, has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def release(device: torch.device) -> None:
    """Gives back what a failed pass left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def fitting_rows(model: nn.Module, shape: tuple[int, int, int], device: str) -> int:
    """Rows that run together where the user does not say.

    On a CPU by the size of the images alone, so that the same command runs the same batches on every machine. On a GPU
    by the memory that a small batch takes, forward and backward.

    Args:
        model: in eval mode, on the device.
        shape: of one image, (C, H, W).
        device: a torch device.
    """
    if torch.device(device).type != "cuda":
        return rows_for(CPU_PIXELS, shape[0] * shape[1] * shape[2], MOST_ROWS_CPU)
    probe = 8
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        x = torch.zeros(probe, *shape, device=device, requires_grad=True)
        with torch.enable_grad():
            out = model(x)
            if out.requires_grad:
                torch.autograd.grad(out.float().sum(), x, allow_unused=True)
    except Exception:
        # A model that fails is reported by the checks that follow, on real images; one that needs more memory is run
        # in parts.
        return FEWEST_ROWS
    taken = torch.cuda.max_memory_allocated(device) - before
    free, _ = torch.cuda.mem_get_info(device)
    return rows_for(int(FILL * free), max(taken // probe, 1), MOST_ROWS_CUDA)


def rows_for(budget: int, each: int, most: int) -> int:
    """The largest power of two of rows whose cost stays in the budget, between 16 and `most`."""
    rows = FEWEST_ROWS
    while rows * 2 <= most and rows * 2 * each <= budget:
        rows *= 2
    return rows


@cache
def keep_freed_memory() -> bool:
    """Has glibc keep buffers of up to 64 MB for reuse instead of returning each to the system; says whether it does.

    A search makes the same buffers again and again. Fetching them from the system costs a page fault for every 4 KB,
    up to a third of a pass on small images.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False  # another C library than glibc
    return bool(mallopt(m_mmap_threshold, _KEPT_BYTES)) and bool(mallopt(m_trim_threshold, 16 * _KEPT_BYTES))

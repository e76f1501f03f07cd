"""Forward and backward passes of a search: counted, timed, averaged over draws, and split where memory ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moebench.attacks._base import Loss, Rows
from moebench.attacks._memory import is_out_of_memory, release
from moebench.errors import RunError

Work = Callable[[Tensor, Rows], tuple[Tensor, ...]]
Sight = Callable[[Tensor, Rows], Tensor]
"""What rows see of a model at images x: logits (R, K), or more per row."""


def batches(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """Consecutive parts of up to `size` rows."""
    for start in range(0, len(tensor), size):
        yield tensor[start : start + size]


class Clock:
    """Seconds of work on a device; on CUDA measured by events, so that nobody waits for the device to read it."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts what is done inside."""
        if not self._on_cuda:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin
            return
        first = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        last = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        first.record()
        yield
        last.record()
        self._events.append((first, last))

    @property
    def seconds(self) -> float:
        """All that was counted so far; waits for the device."""
        for first, last in self._events:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1e3
        self._events.clear()
        return self._seconds


class Expectation(nn.Module):
    """A model that is random, averaged: the logarithm of the mean of its class probabilities over several draws."""

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self.model = model
        self.draws = draws

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (B, K) of images (B, C, H, W)."""
        drawn = torch.stack([self.model(x).float().log_softmax(dim=1) for _ in range(self.draws)])
        return drawn.logsumexp(dim=0) - math.log(self.draws)


class Passes:
    """Runs a model for the engine.

    Args:
        samples: number of samples whose passes are counted.
        device: where the model is.
        draws: passes that are averaged, for a model that is random (expectation over transformation, Athalye et al.,
            2018, arXiv 1802.00420).

    Attributes:
        forwards, backwards: passes per sample, (N,).
        limit: rows that fit into one pass, as far as is known; None before memory has run out once.
        search_type: the floating type of the search's passes under autocast, None for float32.
    """

    def __init__(self, samples: int, device: torch.device, *, draws: int = 1) -> None:
        self.device = device
        self.draws = draws
        self.limit: int | None = None
        self.search_type: torch.dtype | None = None
        self.clock = Clock(device)
        self.forwards = torch.zeros(samples, dtype=torch.int64, device=device)
        self.backwards = torch.zeros(samples, dtype=torch.int64, device=device)

    def logits(self, see: Sight, x: Tensor, rows: Rows) -> Tensor:
        """Logits (R, …), averaged over the draws."""

        def once(x: Tensor, rows: Rows) -> tuple[Tensor, ...]:
            with torch.no_grad(), self._search_precision():
                return (see(x, rows).float(),)

        (logits,) = self._run(once, x, rows)
        self._count(self.forwards, rows.index)
        return logits

    def gradient(self, see: Sight, x: Tensor, rows: Rows, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (R, K), loss (R,) and the gradient (R, C, H, W) of the loss, each averaged over the draws."""

        def once(x: Tensor, rows: Rows) -> tuple[Tensor, ...]:
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                with self._search_precision():
                    out = see(x, rows)
                if not out.requires_grad:
                    raise RunError(
                        "the model's logits have no gradient (is there a no_grad or detach in its forward pass?); "
                        "only --attack square can be run on it"
                    )
                out = out.float()
                value = loss(out, rows)
                (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
            gradient = torch.zeros_like(x) if gradient is None else gradient.contiguous()
            return out.detach(), value.detach(), gradient

        logits, value, gradient = self._run(once, x, rows)
        self._count(self.forwards, rows.index)
        self._count(self.backwards, rows.index)
        return logits, value, gradient

    def answers(self, model: nn.Module, x: Tensor, rows: Rows) -> Tensor:
        """Logits (R, K) of a whole model, in the model's own precision and without averaging."""

        def once(x: Tensor, rows: Rows) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (model(x),)

        with self.clock.running():
            (logits,) = self._split(once, x, rows)
        self._count(self.forwards, rows.index)
        return logits

    def _run(self, once: Work, x: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        def averaged(x: Tensor, rows: Rows) -> tuple[Tensor, ...]:
            total = once(x, rows)
            for _ in range(self.draws - 1):
                total = tuple(sum_ + draw for sum_, draw in zip(total, once(x, rows), strict=True))
            return total if self.draws == 1 else tuple(sum_ / self.draws for sum_ in total)

        with self.clock.running():
            return self._split(averaged, x, rows)

    def _split(self, work: Work, x: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        """Does the work in parts of up to `limit` rows, and halves them where memory runs out."""
        while True:
            limit = self.limit or max(len(rows), 1)
            try:
                if len(rows) <= limit:
                    return work(x, rows)
                order = torch.arange(len(rows), device=x.device)
                parts = [work(x[part], rows.take(part)) for part in batches(order, limit)]
                return tuple(torch.cat(column) for column in zip(*parts, strict=True))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the handler, whose traceback holds on to the tensors of the pass that failed.
            tried = min(len(rows), limit)
            if tried == 1:
                raise RunError(f"a single image does not fit into the memory of {self.device}; use a smaller model")
            self.limit = tried // 2
            release(self.device)

    @contextmanager
    def _search_precision(self) -> Iterator[None]:
        if self.search_type is None:
            yield
            return
        with torch.autocast(self.device.type, dtype=self.search_type):
            yield

    def _count(self, counter: Tensor, index: Tensor) -> None:
        counter.index_add_(0, index, torch.full_like(index, self.draws))

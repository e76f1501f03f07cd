"""The engine: runs an attack's rows to their end with full batches, and judges every image that the attack looks at.

One engine for all attacks and all views. A sample leaves the moment it is broken; the places of rows that are broken
or at their end are taken by rows that wait, and what is left to try on a broken sample is not tried. Neither changes
a
verdict: rows do not depend on each other, and nothing that comes after success could undo it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import override

from moebench.attacks._base import Attack, Loss, Oracle, Rows, State
from moebench.attacks._passes import Passes, batches
from moebench.attacks._projections import project
from moebench.attacks._random import sample_keys
from moebench.attacks._views import View, make_view
from moebench.schema import ThreatModel
from moebench.threat import within


@dataclass(frozen=True)
class Samples:
    """The samples of an evaluation on the device: images (N, C, H, W) float32 in [0, 1], labels (N,), names (N,).

    `ids` are the stable numbers of the samples in their data set; random streams hang on them.
    """

    x: Tensor
    y: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Finished:
    """Samples whose stage is over; all tensors are (m, …).

    `adv_pred` of a standing sample is its label; `x_adv` is the adversarial image, or the one that the attack of the
    first target class ended with.
    """

    index: Tensor
    broken: Tensor
    adv_pred: Tensor
    x_adv: Tensor
    forwards: Tensor
    backwards: Tensor
    seconds: float


Sink = Callable[[Finished], None]


@dataclass
class Queue:
    """Rows that wait for a place: sample, target class, random key and rank of each, (W,); `start` is the next."""

    index: Tensor
    target: Tensor
    key: Tensor
    rank: Tensor
    start: int = 0

    def next(self, count: int, broken: Tensor) -> Tensor:
        """Places of up to `count` rows to start now; rows of samples that are broken by now are passed over."""
        found: list[Tensor] = []
        while count > 0 and self.start < len(self.index):
            places = torch.arange(self.start, min(self.start + count, len(self.index)), device=self.index.device)
            self.start += len(places)
            places = places[~broken[self.index[places]]]
            count -= len(places)
            found.append(places)
        return torch.cat(found) if found else self.index[:0]


class Judge:
    """Decides success: inside the threat model, and wrong on the whole model in float32, in a pass of its own."""

    def __init__(self, model: nn.Module, samples: Samples, threat: ThreatModel, passes: Passes) -> None:
        self.model = model
        self.samples = samples
        self.threat = threat
        self.passes = passes

    @torch.no_grad()
    def __call__(self, x_adv: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Which images are adversarial, (m,) bool, and the predictions on them, (m,)."""
        valid = within(x_adv, self.samples.x[rows.index], self.threat)
        prediction = self.passes.answers(self.model, x_adv, rows).argmax(dim=1)
        return valid & (prediction != self.samples.y[rows.index]), prediction


class Engine(Oracle):
    """Runs the stages of an attack on one view of a model.

    Args:
        model: the whole model, in eval mode, parameters frozen.
        view: what the attack sees; `view.prepare` has been called with the samples.
        samples: what is attacked.
        threat: norm, radius and box.
        batch_size: rows that run together.
        seed: of the random starts and proposals.
        flush_seconds: how often finished samples are handed over while a stage runs.
        screen: a faster copy of the model; on views other than the whole, what it calls right is not judged.
        draws: passes that are averaged for a model that is random.
        stop_when_broken: drop a sample once it is broken. Otherwise nothing is judged, every row runs to its end, and
            of the images that a sample's rows end with the one of highest cross-entropy is kept.
        stop: asked between two steps; once it says so, what is decided is handed over and KeyboardInterrupt is raised.
    """

    def __init__(
        self,
        model: nn.Module,
        view: View,
        samples: Samples,
        threat: ThreatModel,
        *,
        batch_size: int = 256,
        seed: int = 0,
        flush_seconds: float = 5.0,
        screen: nn.Module | None = None,
        draws: int = 1,
        stop_when_broken: bool = True,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.threat = threat
        self.view = self.own_view = view
        self.samples = samples
        count, device = len(samples), samples.x.device
        self.passes = Passes(count, device, draws=draws)
        self.judge = Judge(model, samples, threat, self.passes)
        self.screen = model if screen is None else screen
        self.batch_size = batch_size
        self.seed = seed
        self.flush_seconds = flush_seconds
        self.stop_when_broken = stop_when_broken
        self.stop = stop
        self.broken = torch.zeros(count, dtype=torch.bool, device=device)
        # Rank of the target class by which a sample was broken in the current stage.
        self.rank = torch.full((count,), -1, dtype=torch.int64, device=device)
        self.adv_pred = samples.y.clone()
        self.x_adv = samples.x.clone()
        # Cross-entropy at `x_adv`; kept only where nothing stops a row.
        self.strength = torch.full((count,), float("-inf"), device=device)

    @property
    def forwards(self) -> Tensor:
        """Forward passes per sample in the current stage, (N,)."""
        return self.passes.forwards

    @property
    def backwards(self) -> Tensor:
        """Backward passes per sample in the current stage, (N,)."""
        return self.passes.backwards

    @property
    def model_seconds(self) -> float:
        """Time inside the model so far."""
        return self.passes.clock.seconds

    # What an attack asks for.

    @property
    @override
    def room(self) -> int:
        return self.batch_size

    @property
    @override
    def repeatable(self) -> bool:
        return self.passes.draws == 1

    @override
    def logits(self, x: Tensor, rows: Rows, *, propose: bool = True) -> Tensor:
        out = self.passes.logits(self._see, x, rows)
        if propose:
            self.propose(x, rows, out)
        return out

    @override
    def gradient(self, x: Tensor, rows: Rows, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        out, value, gradient = self.passes.gradient(self._see, x, rows, loss)
        self.propose(x, rows, out)
        return out, value, gradient

    def rows_of(self, index: Tensor) -> Rows:
        """Rows of samples (m,) that aim at nothing and draw nothing."""
        none = torch.full_like(index, -1)
        return Rows(index, self.samples.x[index], self.samples.y[index], none, none, none)

    def _see(self, x: Tensor, rows: Rows) -> Tensor:
        return self.view.aimed(x, rows.index, rows.target)

    # The loop.

    def run_stage(self, attack: Attack, index: Tensor, sink: Sink, *, search: torch.dtype | None = None) -> None:
        """Attacks the samples `index` (m,) and hands each over exactly once, broken or not.

        Args:
            attack: one stage.
            index: numbers of the samples to attack.
            sink: receives finished samples, every few seconds and at the end.
            search: floating type of the search's passes; None for float32. Success is judged in float32 all the same.
        """
        self.view = self._view_for(attack)
        self.passes.search_type = search
        self.forwards[index] = 0
        self.backwards[index] = 0
        self.rank[index] = -1
        waiting = self._queue(attack, index)
        handed = torch.ones(len(self.samples), dtype=torch.bool, device=index.device)
        handed[index] = False
        rows: Rows | None = None
        state: State | None = None
        last_flush = time.perf_counter()
        while True:
            rows, state = self._refill(attack, waiting, rows, state)
            if rows is None or state is None:
                break
            ended = attack.step(state, rows, self)
            keep = self._retire(attack, state, rows, ended)
            rows, state = (rows.take(keep), state.take(keep)) if len(keep) < len(rows) else (rows, state)
            now, stopping = time.perf_counter(), self.stop()
            if stopping or now - last_flush >= self.flush_seconds:
                running = rows.index[self._open(rows)]
                if self._flush(handed, (waiting.index[waiting.start :], running), now - last_flush, sink):
                    last_flush = now
            if stopping:
                raise KeyboardInterrupt
        self._flush(handed, (), time.perf_counter() - last_flush, sink)

    def _view_for(self, attack: Attack) -> View:
        """The engine's view, or the one that a stage needs for itself."""
        if attack.view is None:
            return self.own_view
        view = make_view(attack.view, self.screen)
        view.prepare(self.samples.x)
        return view

    def _queue(self, attack: Attack, index: Tensor) -> Queue:
        """All rows of a stage in the order in which they start: the first target of every sample, then the second."""
        targets = self._targets(attack, index)
        width = 1 if targets is None else targets.shape[1]
        order = index.repeat(width)
        keys = [sample_keys(self.seed, f"{attack.stage}/{number}", self.samples.ids[index]) for number in range(width)]
        aims = torch.full_like(order, -1) if targets is None else targets.t().reshape(-1)
        ranks = torch.arange(width, device=index.device).repeat_interleave(len(index))
        return Queue(order, aims, torch.cat(keys), ranks)

    @torch.no_grad()
    def _targets(self, attack: Attack, index: Tensor) -> Tensor | None:
        # Asked about no samples, an attack says whether it aims at classes at all.
        if len(index) == 0 or attack.targets(self.samples.x.new_empty(0, 2), self.samples.y[:0]) is None:
            return None
        found = []
        for part in batches(index, self.batch_size):
            rows = self.rows_of(part)
            logits = self.passes.logits(lambda x, rows: self.view.logits(x, rows.index), rows.x, rows)
            targets = attack.targets(logits, rows.y)
            assert targets is not None
            found.append(targets)
        return torch.cat(found)

    def _refill(
        self, attack: Attack, waiting: Queue, rows: Rows | None, state: State | None
    ) -> tuple[Rows | None, State | None]:
        """Starts waiting rows in the free places; None when nothing runs and nothing waits any more."""
        running = 0 if rows is None else len(rows)
        free = self.batch_size - running
        # Joining costs a copy of the state, so a few free places wait until there are more of them.
        if running > 0 and free < max(self.batch_size // 8, 1):
            return rows, state
        at = waiting.next(free, self.broken)
        if len(at) == 0:
            return (rows, state) if running else (None, None)
        index = waiting.index[at]
        x, y = self.samples.x[index], self.samples.y[index]
        fresh = Rows(index, x, y, waiting.target[at], waiting.key[at], waiting.rank[at])
        fresh_state = attack.start(fresh, self)
        if rows is None or state is None or running == 0:
            return fresh, fresh_state
        return rows.join(fresh), state.join(fresh_state)

    def _open(self, rows: Rows) -> Tensor:
        """Which running rows can still change a verdict, (R,) bool.

        Once a sample is broken by one target class, the rows of later targets are void. Those of earlier ones go on,
        so that the target that counts, and with it the image and the prediction, is the same however many rows run
        side by side.
        """
        return ~self.broken[rows.index] | (rows.rank < self.rank[rows.index])

    def _retire(self, attack: Attack, state: State, rows: Rows, ended: Tensor) -> Tensor:
        """Keeps the final images of standing samples; returns the positions of the rows that go on."""
        if not self.stop_when_broken:
            self._keep_strongest(attack, state, rows, ended)
            return (~ended).nonzero().squeeze(1)
        leaving = ended | ~self._open(rows)
        if not bool(leaving.any()):
            return torch.arange(len(rows), device=leaving.device)
        standing = (ended & ~self.broken[rows.index] & (rows.rank == 0)).nonzero().squeeze(1)
        if len(standing) > 0:
            # An attack may end outside the ball: FAB looks for the boundary wherever it is.
            final = attack.final(state)[standing]
            self.x_adv[rows.index[standing]] = project(final, rows.x[standing], self.threat)
        return (~leaving).nonzero().squeeze(1)

    @torch.no_grad()
    def _keep_strongest(self, attack: Attack, state: State, rows: Rows, ended: Tensor) -> None:
        """Keeps, of the images that rows end with, each sample's one of highest cross-entropy on the whole model."""
        at = ended.nonzero().squeeze(1)
        if len(at) == 0:
            return
        index = rows.index[at]
        final = project(attack.final(state)[at], rows.x[at], self.threat)
        loss = cross_entropy(self.passes.answers(self.screen, final, rows.take(at)), rows.y[at], reduction="none")
        order = loss.argsort(descending=True, stable=True)
        best = order[_first_of_each(index[order])]
        best = best[loss[best] > self.strength[index[best]]]
        self.strength[index[best]] = loss[best]
        self.x_adv[index[best]] = final[best]

    def _flush(self, handed: Tensor, unfinished: tuple[Tensor, ...], seconds: float, sink: Sink) -> bool:
        """Hands over what is decided and was not handed over before; says whether there was any.

        `unfinished` are the samples of the rows that wait (void for broken samples) and of those that run.
        """
        undecided = torch.zeros_like(handed)
        if unfinished:
            waiting, running = unfinished
            undecided[waiting] = True
            undecided &= ~self.broken
            undecided[running] = True
        done = ~(handed | undecided)
        at = done.nonzero().squeeze(1)
        handed |= done
        if len(at) > 0:
            sink(
                Finished(
                    at,
                    self.broken[at],
                    self.adv_pred[at],
                    self.x_adv[at],
                    self.forwards[at],
                    self.backwards[at],
                    seconds,
                )
            )
        return len(at) > 0

    # Judging.

    @override
    @torch.no_grad()
    def propose(self, x: Tensor, rows: Rows, logits: Tensor) -> None:
        """Judges images that an attack looked at.

        Those that seem to succeed are confirmed. On other views than the whole, the view's logits say nothing about
        the whole model, and its copy is asked first.
        """
        if not self.stop_when_broken:
            return
        open_rows = self._open(rows)
        if self.view.is_whole:
            open_rows &= logits.argmax(dim=1) != rows.y
        candidates = open_rows.nonzero().squeeze(1)
        if len(candidates) == 0:
            return
        candidates = candidates[within(x[candidates], rows.x[candidates], self.threat)]
        if not self.view.is_whole and len(candidates) > 0:
            seen = self.passes.answers(self.screen, x[candidates], rows.take(candidates)).argmax(dim=1)
            candidates = candidates[seen != rows.y[candidates]]
        if len(candidates) == 0:
            return
        success, prediction = self.judge(x[candidates], rows.take(candidates))
        hits = success.nonzero().squeeze(1)
        if len(hits) > 0:
            # Several rows of one sample may succeed at once: the first target counts, and rows keep that order.
            hits = hits[_first_of_each(rows.index[candidates[hits]])]
            at = rows.index[candidates[hits]]
            self.rank[at] = rows.rank[candidates[hits]]
            self.broken[at] = True
            self.adv_pred[at] = prediction[hits]
            self.x_adv[at] = x[candidates[hits]]


def _first_of_each(index: Tensor) -> Tensor:
    """Positions at which each number occurs for the first time."""
    ordered, positions = index.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return positions[first]


def to_samples(
    images: NDArray[np.float32], labels: NDArray[np.int64], ids: NDArray[np.int64], device: torch.device | str
) -> Samples:
    """Puts NumPy images (N, C, H, W), labels and ids on a device."""
    return Samples(
        torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device), torch.from_numpy(ids).to(device)
    )

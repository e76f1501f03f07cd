"""The account of a cell: what is decided per sample, committed chunk by chunk, and what it adds up to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moebench.attacks._engine import Finished
from moebench.attacks._passes import batches
from moebench.metrics import wilson
from moebench.routing import RoutingProbe
from moebench.schema import LOSSES, Chunk, Example, ResultRecord, is_protocol
from moebench.store import Store
from moebench.store.packing import CLEAN
from moebench.store.pictures import KEPT, LARGEST, choose
from moebench.threat import distances
from moebench.work import CellWork, Decided


@dataclass
class CellOutcome:
    """The state of a cell per sample while it runs and when it is over; all tensors are (N, …).

    `broken` includes samples that were wrong from the start. After resuming, `x_adv` of samples decided earlier is
    their clean image. `losses` are cross-entropies (2, N) on the clean and on the last image of each sample, NaN where
    an earlier process did not keep them.
    """

    x_adv: Tensor
    adv_pred: Tensor
    broken: Tensor
    losses: Tensor
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    stages: dict[str, dict[str, float]] = field(default_factory=dict)


class Booking:
    """Books what is decided of a cell, and commits it; `done` says per stage which samples (N,) it has decided.

    Args:
        work: model, samples, attack and view.
        store: where chunks and the result go; None computes without storing.
        run_id: the run that the result belongs to.
        resume: begin with what a killed run has committed of this cell.
        listing: list the chunks in `chunks`.
    """

    def __init__(self, work: CellWork, store: Store | None, run_id: str, *, resume: bool, listing: bool) -> None:
        self.work = work
        self.store = store
        self.chunks: list[Chunk] | None = [] if listing else None
        self.outcome = CellOutcome(
            x_adv=work.samples.x.clone() if work.images else work.samples.x,
            adv_pred=work.clean_pred.clone(),
            broken=torch.zeros_like(work.clean_pred, dtype=torch.bool),
            losses=work.samples.x.new_full((2, len(work.samples)), float("nan")),
        )
        self.done: dict[str, Tensor] = {}
        self.result_id: int | None = None
        known: list[Chunk] = []
        if store is not None:
            # First of all: where another process works on the cell, nothing need be computed to know it.
            self.result_id, known = store.open_cell(run_id, work.cell, resume=resume)
        self.probe = RoutingProbe(work.model, work.samples.x, work.batch_size, work.samples.y)
        for chunk in known:
            self._restore(chunk)

    def keep(self, stage: str, finished: Finished) -> None:
        """Books finished samples and commits them."""
        begin = time.perf_counter()
        at = finished.index
        distance = torch.zeros(len(at), device=at.device)
        if stage != "clean":
            moved = distances(finished.x_adv, self.work.samples.x[at], self.work.threat).float()
            distance = torch.where(finished.broken, moved, distance)
        if self.work.images:
            self.outcome.x_adv[at] = finished.x_adv
        extras = {} if stage == "clean" else self.probe.look(finished.x_adv, at)
        extras["loss"] = self._loss(finished.x_adv, at).cpu().numpy()
        chunk = Chunk(
            stage=stage,
            index=int64(at),
            broken=finished.broken.cpu().numpy(),
            clean_pred=int64(self.work.clean_pred[at]),
            adv_pred=int64(finished.adv_pred),
            distance=distance.cpu().numpy().astype(np.float32),
            forwards=int64(finished.forwards),
            backwards=int64(finished.backwards),
            seconds=finished.seconds + time.perf_counter() - begin,
            extras=extras,
            examples=[] if self.store is None and self.chunks is None else self._examples(stage, finished, distance),
        )
        self.commit(chunk)

    def take_in(self, decided: Sequence[Decided]) -> None:
        """Commits what other processes decided, all of it or none, and books it."""
        if self.store is not None and self.result_id is not None:
            self.store.append_chunks(self.result_id, [one.chunk for one in decided])
        for one in decided:
            self._restore(one.chunk)
            if one.x_adv is not None:
                at = torch.from_numpy(one.chunk.index.copy())
                self.outcome.x_adv[at] = one.x_adv.to(self.outcome.x_adv.device)

    def finish(self) -> tuple[ResultRecord, CellOutcome]:
        """The aggregate, checked and stored."""
        out, work = self.outcome, self.work
        n = len(work.samples)
        standing = int((~out.broken).sum())
        low, high = wilson(standing, n)
        if not bool(out.losses.isnan().any()):
            out.stages["clean"] |= dict(zip(LOSSES, out.losses.double().mean(dim=1).tolist(), strict=True))
        record = ResultRecord(
            attack=work.cell.attack,
            view=work.cell.view,
            accuracy=standing / n,
            ci_low=low,
            ci_high=high,
            n=n,
            seconds=out.seconds,
            forwards=out.forwards,
            backwards=out.backwards,
            clean_accuracy=int((work.clean_pred == work.samples.y).sum()) / n,
            changed_predictions=int((out.adv_pred != work.clean_pred).sum()) / n,
            routing=self.probe.layers(),
            stages=out.stages,
        )
        if self.store is not None and self.result_id is not None:
            self.store.finish_cell(self.result_id, record)
        return record, out

    def _examples(self, stage: str, finished: Finished, distance: Tensor) -> list[Example]:
        """Pictures of samples that this stage broke; none of a published protocol, whose images need not be valid."""
        work, samples = self.work, self.work.samples
        if stage == CLEAN or is_protocol(work.cell.attack) or samples.x[0].numel() > LARGEST:
            return []
        at = finished.index
        hits = (finished.broken & (work.clean_pred[at] == samples.y[at])).nonzero().squeeze(1)
        found = list(zip(samples.y[at[hits]].tolist(), at[hits].tolist(), strict=True))
        chosen = [(int(hits[place]), *found[place]) for place in choose(found, KEPT)]
        return [
            Example(
                index=index,
                label=label,
                clean_pred=int(work.clean_pred[index]),
                adv_pred=int(finished.adv_pred[row]),
                distance=float(distance[row]),
                stage=stage,
                clean=samples.x[index].cpu().numpy(),
                adversarial=finished.x_adv[row].float().cpu().numpy(),
                experts=self.probe.choices(index),
            )
            for row, label, index in chosen
        ]

    @torch.no_grad()
    def _loss(self, x: Tensor, index: Tensor) -> Tensor:
        """The whole model's cross-entropy at images of the samples `index`, (m,); a random model's draws are left."""
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            logits = [self.work.model(part).float() for part in batches(x, self.work.batch_size)]
        return F.cross_entropy(torch.cat(logits), self.work.samples.y[index], reduction="none")

    def commit(self, chunk: Chunk) -> None:
        """Books and commits a chunk."""
        self._book(chunk)
        if self.store is not None and self.result_id is not None:
            self.store.append_chunk(self.result_id, chunk)
        if self.chunks is not None:
            self.chunks.append(chunk)

    def _restore(self, chunk: Chunk) -> None:
        self._book(chunk)
        if chunk.stage != "clean":
            self.probe.restore(chunk.index, chunk.extras)

    def _book(self, chunk: Chunk) -> None:
        out, device = self.outcome, self.outcome.broken.device
        at = torch.from_numpy(chunk.index.copy()).to(device)
        broken = torch.from_numpy(chunk.broken.copy()).to(device)
        hit = at[broken]
        out.broken[hit] = True
        out.adv_pred[hit] = torch.from_numpy(chunk.adv_pred.copy()).to(device)[broken]
        if "loss" in chunk.extras:
            loss = torch.from_numpy(chunk.extras["loss"].copy()).to(device)
            out.losses[1, at] = loss
            if chunk.stage == "clean":
                out.losses[0, at] = loss
        out.forwards += int(chunk.forwards.sum())
        out.backwards += int(chunk.backwards.sum())
        out.seconds += chunk.seconds
        seen = self.done.setdefault(chunk.stage, torch.zeros_like(out.broken))
        seen[at] = True
        entry = out.stages.setdefault(
            chunk.stage, {"attacked": 0, "broken": 0, "forwards": 0, "backwards": 0, "seconds": 0.0}
        )
        entry["attacked"] += len(chunk)
        entry["broken"] += int(chunk.broken.sum())
        entry["forwards"] += int(chunk.forwards.sum())
        entry["backwards"] += int(chunk.backwards.sum())
        entry["seconds"] += chunk.seconds


def int64(tensor: Tensor) -> np.typing.NDArray[np.int64]:
    """A tensor as the array that a chunk holds."""
    return tensor.cpu().numpy().astype(np.int64)

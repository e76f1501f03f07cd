"""One cell: an attack on a view, run stage by stage, committed as it goes, resumed where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Protocol as Interface

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moebench import interrupt
from moebench.attacks._base import Attack, AttackPlan
from moebench.attacks._engine import Engine, Finished, Samples, Sink
from moebench.attacks._library import LibraryAttack
from moebench.attacks._passes import Expectation, batches
from moebench.attacks._protocol import Protocol, run_protocol
from moebench.attacks._reference import run_reference
from moebench.attacks._training import TrainedAttack
from moebench.attacks._views import make_view
from moebench.datasets import Dataset
from moebench.errors import RunError
from moebench.fitting import CRAFTING, fit_stage, shared_out
from moebench.metrics import wilson
from moebench.routing import RoutingProbe
from moebench.schema import (
    LOSSES,
    WARM_START,
    CellSpec,
    Chunk,
    Example,
    Precision,
    ResultRecord,
    ThreatModel,
    is_protocol,
)
from moebench.store import Store
from moebench.store.packing import CLEAN
from moebench.store.pictures import KEPT, LARGEST, choose
from moebench.threat import distances

Tell = Callable[[str, int, int, int], None]
Found = Callable[[], tuple[Tensor, Tensor]]


class UnfinishedCell(RunError):
    """Some samples of a cell could not be decided; the others are committed, and other cells go on."""


@dataclass(frozen=True)
class Decided:
    """Samples of one stage that were decided in another process, and their last images (m, C, H, W) if asked for."""

    chunk: Chunk
    x_adv: Tensor | None = None


@dataclass(frozen=True)
class Undecided:
    """Samples (m,) that could not be decided, and why in one line."""

    index: Tensor
    error: str


class Cluster(Interface):
    """Other processes, which search some samples each."""

    def search(
        self,
        work: CellWork,
        stage: Attack,
        search: torch.dtype | None,
        index: Tensor,
        keep: Callable[[Sequence[Decided]], None],
    ) -> Sequence[Undecided]:
        """Has `search_samples` run on all of the samples `index` (m,), and hands over what is decided as it comes in.

        Args:
            work: model, samples, attack and view.
            stage: what to run; fitted, where it learns from data.
            search: floating type of the search's passes; None for float32.
            index: numbers of the samples.
            keep: books and commits what it is given, as one.
        Returns: what could not be decided, however often it was tried.
        """


@dataclass(frozen=True)
class CellWork:
    """What a cell needs.

    `search` gives the logits of `model` faster; the attack runs on it, success is judged on `model`. `clean_pred`
    (N,) are the whole model's predictions; `draws` are the passes averaged for a model that is random; `tell(stage,
    done, n, standing)` reports progress. `found` gives samples (m,) and adversarial images (m, C, H, W) that are known
    from a smaller radius; they are judged before any attack. `training` is what attacks that learn first are fitted on.
    `only` (N,) bool says which samples to attack, None for all: the others are left standing, and nothing is stored.
    `cluster` searches in other processes, None in this one; with `images` it brings back the images too, without them
    `CellOutcome.x_adv` keeps the clean ones.
    """

    plan: AttackPlan
    cell: CellSpec
    model: nn.Module
    search: nn.Module
    samples: Samples
    clean_pred: Tensor
    threat: ThreatModel
    batch_size: int
    tell: Tell
    draws: int = 1
    found: Found | None = None
    training: Dataset | None = None
    only: Tensor | None = None
    cluster: Cluster | None = None
    images: bool = True


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


def run_cell(work: CellWork, store: Store | None, run_id: str, *, resume: bool) -> tuple[ResultRecord, CellOutcome]:
    """Runs a cell to its end.

    Args:
        work: model, samples, attack and view.
        store: where chunks and the result go; None computes without storing.
        run_id: the run that the result belongs to.
        resume: go on with what a killed run has committed of this cell.
    Returns: the aggregate and the outcome per sample.
    """
    runner = _CellRunner(work, store, run_id, resume)
    if isinstance(work.plan.stages[0], Protocol):
        runner.run_protocol(work.plan.stages[0])
        return runner.finish()
    if not runner.has("clean"):
        runner.commit_clean()
    if work.found is not None and not runner.has(WARM_START):
        runner.take_over(*work.found())
    for stage, search in searches(work.plan, work.cell.precision):
        runner.run_stage(stage, search)
    runner.refuse_gaps()
    return runner.finish()


def search_samples(work: CellWork, stage: Attack, search: torch.dtype | None) -> tuple[list[Chunk], Tensor]:
    """Runs one stage on all samples of `work`, which are right so far, and stores nothing.

    Args:
        work: model, samples, attack and view.
        stage: what to run; fitted, where it learns from data.
        search: floating type of the search's passes; None for float32.
    Returns: the chunks that a cell would commit, and the last image of each sample, (N, C, H, W).
    """
    runner = _CellRunner(work, None, "", resume=False)
    runner.kept = []
    everything = torch.arange(len(work.samples), device=work.samples.x.device)
    runner.search(stage, search, everything, partial(runner._keep, stage_name(stage, search)))
    return runner.kept, runner.outcome.x_adv


def searches(plan: AttackPlan, precision: Precision) -> list[tuple[Attack, torch.dtype | None]]:
    """The stages of a plan with the floating type of their searches, None for float32.

    "bfloat16" has the first stage cull in bfloat16 before everything runs in float32, so that nothing is lost by it.
    "bfloat16-only" is the quick look.
    """
    if precision == "bfloat16-only":
        return [(stage, torch.bfloat16) for stage in plan.stages]
    full: list[tuple[Attack, torch.dtype | None]] = [(stage, None) for stage in plan.stages]
    return [(plan.stages[0], torch.bfloat16), *full] if precision == "bfloat16" else full


def stage_name(stage: Attack, search: torch.dtype | None) -> str:
    """Under what name the store keeps a stage."""
    return stage.stage if search is None else f"{stage.stage} in {str(search).removeprefix('torch.')}"


def most_passes(stage: Attack, view: str) -> tuple[int, int]:
    """The most forward and backward passes that one sample can cost in a stage of an attack on a view.

    On other views than the whole, each image that the attack looks at is shown to the whole model as well.
    """
    forwards, backwards = stage.budget()
    elsewhere = (stage.view or view) != "whole" and not isinstance(stage, TrainedAttack)
    return forwards * (1 + elsewhere), backwards


class _CellRunner:
    def __init__(self, work: CellWork, store: Store | None, run_id: str, resume: bool) -> None:
        assert work.only is None or store is None
        self.work = work
        self.store = store
        self.kept: list[Chunk] | None = None
        self.undecided: list[Undecided] = []
        self.outcome = CellOutcome(
            x_adv=work.samples.x.clone() if work.images else work.samples.x,
            adv_pred=work.clean_pred.clone(),
            broken=torch.zeros_like(work.clean_pred, dtype=torch.bool),
            losses=work.samples.x.new_full((2, len(work.samples)), float("nan")),
        )
        self.probe = RoutingProbe(work.model, work.samples.x, work.batch_size, work.samples.y)
        self.done: dict[str, Tensor] = {}
        self.result_id: int | None = None
        if store is not None:
            self.result_id, chunks = store.open_cell(run_id, work.cell, resume=resume)
            for chunk in chunks:
                self._restore(chunk)

    @cached_property
    def engine(self) -> Engine:
        """The engine of this process; not made where all of the search is done in others."""
        work = self.work
        view = make_view(work.cell.view, work.search)
        view.prepare(work.samples.x)
        return Engine(
            work.model if work.draws == 1 else Expectation(work.model, work.draws),
            view,
            work.samples,
            work.threat,
            batch_size=work.batch_size,
            seed=work.cell.seed,
            screen=work.search if work.draws == 1 else Expectation(work.search, work.draws),
            draws=work.draws,
            stop=interrupt.requested,
        )

    def has(self, stage: str) -> bool:
        return stage in self.done

    def commit_clean(self) -> None:
        """The first chunk: which samples the model gets wrong without any attack."""
        everything = torch.arange(len(self.work.samples), device=self.work.samples.x.device)
        wrong = self.work.clean_pred != self.work.samples.y
        zeros = torch.zeros_like(everything)
        # One forward pass per sample was made for the clean predictions.
        finished = Finished(everything, wrong, self.work.clean_pred, self.work.samples.x, zeros + 1, zeros, 0.0)
        self._keep("clean", finished)

    def take_over(self, index: Tensor, x_adv: Tensor) -> None:
        """Judges images from a smaller radius; those that hold here too spare their samples the attack."""
        if len(index) == 0:
            return
        begin = time.perf_counter()
        self.engine.broken |= self.outcome.broken
        parts = zip(batches(index, self.work.batch_size), batches(x_adv, self.work.batch_size), strict=True)
        judged = [self.engine.judge(images, self.engine.rows_of(at)) for at, images in parts]
        success, prediction = (torch.cat(found) for found in zip(*judged, strict=True))
        zeros = torch.zeros_like(index)
        prediction = torch.where(success, prediction, self.work.samples.y[index])
        seconds = time.perf_counter() - begin
        self._keep(WARM_START, Finished(index, success, prediction, x_adv, zeros + 1, zeros, seconds))
        self.work.tell(WARM_START, len(index), len(index), int((~self.outcome.broken).sum()))

    def run_stage(self, stage: Attack, search: torch.dtype | None) -> None:
        """Attacks the samples that stand and that this stage has not decided yet."""
        name = stage_name(stage, search)
        decided = self.done.get(name)
        todo = ~self.outcome.broken
        if decided is not None:
            todo &= ~decided
        if self.work.only is not None:
            todo &= self.work.only
        for gap in self.undecided:
            todo[gap.index] = False
        index = todo.nonzero().squeeze(1)
        if len(index) == 0:
            return
        if isinstance(stage, TrainedAttack):
            stage = self._fitted(stage, index)
        total, decided_now = len(index), 0

        def tell(more: int) -> None:
            nonlocal decided_now
            decided_now += more
            self.work.tell(name, decided_now, total, int((~self.outcome.broken).sum()))

        def sink(finished: Finished) -> None:
            self._keep(name, finished)
            tell(len(finished.index))

        def keep(decided: Sequence[Decided]) -> None:
            self._take_in(decided)
            tell(sum(len(one.chunk) for one in decided))

        tell(0)
        if self.work.cluster is None:
            self.search(stage, search, index, sink)
        else:
            self.undecided += self.work.cluster.search(self.work, stage, search, index, keep)

    def search(self, stage: Attack, search: torch.dtype | None, index: Tensor, sink: Sink) -> None:
        """Runs a stage on the samples `index` (m,) in this process; the sink gets each of them once."""
        self.engine.broken |= self.outcome.broken
        if self.work.cell.engine == "reference" or isinstance(stage, LibraryAttack):
            run_reference(stage, self.engine, index, sink)
        else:
            with interrupt.deferring():
                self.engine.run_stage(stage, index, sink, search=search)

    def _take_in(self, decided: Sequence[Decided]) -> None:
        """Commits what other processes decided, all of it or none, and books it."""
        if self.store is not None and self.result_id is not None:
            self.store.append_chunks(self.result_id, [one.chunk for one in decided])
        for one in decided:
            self._restore(one.chunk)
            if one.x_adv is not None:
                at = torch.from_numpy(one.chunk.index.copy())
                self.outcome.x_adv[at] = one.x_adv.to(self.outcome.x_adv.device)

    def refuse_gaps(self) -> None:
        """Says which samples could not be decided.

        Raises:
            UnfinishedCell: there are some.
        """
        if self.undecided:
            work, first = self.work, self.undecided[0]
            count = sum(len(gap.index) for gap in self.undecided)
            raise UnfinishedCell(
                f"{work.cell.attack} on {work.cell.view}: {count} of {len(work.samples)} samples could not be decided "
                f"(such as number {int(first.index[0])}: {first.error})"
            )

    def run_protocol(self, protocol: Protocol) -> None:
        """Scores all samples by the rule of a published protocol, those that are wrong without an attack as well."""
        work, name = self.work, protocol.stage
        decided = self.done.get(name)
        todo = torch.ones_like(self.outcome.broken) if decided is None else ~decided
        if work.only is not None:
            todo &= work.only
        index, total = todo.nonzero().squeeze(1), len(self.outcome.broken)

        def sink(finished: Finished) -> None:
            self._keep(name, finished)
            work.tell(name, int(self.done[name].sum()), total, int((self.done[name] & ~self.outcome.broken).sum()))

        work.tell(name, total - len(index), total, total)
        run_protocol(
            protocol,
            work.model,
            work.samples,
            work.threat,
            index,
            sink,
            batch_size=work.batch_size,
            seed=work.cell.seed,
        )
        # What the rule calls right is predicted as its label, also where the clean prediction is wrong.
        self.outcome.adv_pred = torch.where(self.outcome.broken, self.outcome.adv_pred, work.samples.y)

    def _fitted(self, stage: TrainedAttack, index: Tensor) -> TrainedAttack:
        """The stage fitted on the training data; what that cost is committed as a stage of its own.

        A chunk counts passes per sample, so the cost is shared out among the samples that are attacked next.
        """
        work, name = self.work, f"{stage.stage}{CRAFTING}"
        standing = int((~self.outcome.broken).sum())
        if stage.fitted is None:
            assert work.training is not None
            stage = fit_stage(
                stage, work.training, model=work.model, search=work.search, view=work.cell.view, threat=work.threat,
                seed=work.cell.seed, device=index.device, tell=lambda done, all_: work.tell(name, done, all_, standing),
            )  # fmt: skip
        assert stage.fitted is not None
        if name not in self.done:
            chunk = Chunk(
                stage=name,
                index=_int64(index),
                broken=np.zeros(len(index), np.bool_),
                clean_pred=_int64(work.clean_pred[index]),
                adv_pred=_int64(work.clean_pred[index]),
                distance=np.zeros(len(index), np.float32),
                forwards=shared_out(stage.fitted.forwards, len(index)),
                backwards=shared_out(stage.fitted.backwards, len(index)),
                seconds=stage.fitted.seconds,
            )
            self._commit(chunk)
        self.outcome.stages[name]["train_n"] = stage.fitted.n
        self.outcome.stages[name]["train_fooling_rate"] = stage.fitted.fooling_rate
        return stage

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

    def _keep(self, stage: str, finished: Finished) -> None:
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
            index=_int64(at),
            broken=finished.broken.cpu().numpy(),
            clean_pred=_int64(self.work.clean_pred[at]),
            adv_pred=_int64(finished.adv_pred),
            distance=distance.cpu().numpy().astype(np.float32),
            forwards=_int64(finished.forwards),
            backwards=_int64(finished.backwards),
            seconds=finished.seconds + time.perf_counter() - begin,
            extras=extras,
            examples=[] if self.store is None and self.kept is None else self._examples(stage, finished, distance),
        )
        self._commit(chunk)

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

    def _commit(self, chunk: Chunk) -> None:
        self._book(chunk)
        if self.store is not None and self.result_id is not None:
            self.store.append_chunk(self.result_id, chunk)
        if self.kept is not None:
            self.kept.append(chunk)

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


def _int64(tensor: Tensor) -> np.typing.NDArray[np.int64]:
    return tensor.cpu().numpy().astype(np.int64)

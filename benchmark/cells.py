"""One cell: an attack on a view, run stage by stage, committed as it goes, resumed where it stopped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from moebench import interrupt
from moebench.attacks._base import Attack, AttackPlan
from moebench.attacks._engine import Engine, Finished, Sink
from moebench.attacks._library import LibraryAttack
from moebench.attacks._passes import Expectation, batches
from moebench.attacks._protocol import Protocol, run_protocol
from moebench.attacks._reference import run_reference
from moebench.attacks._training import TrainedAttack
from moebench.attacks._views import make_view
from moebench.booking import Booking, CellOutcome, int64
from moebench.errors import RunError
from moebench.fitting import CRAFTING, fit_stage, shared_out
from moebench.schema import WARM_START, Chunk, Precision, ResultRecord
from moebench.store import Store
from moebench.work import CellWork, Decided, Undecided


class UnfinishedCell(RunError):
    """Some samples of a cell could not be decided; the others are committed, and other cells go on."""


def run_cell(work: CellWork, store: Store | None, run_id: str, *, resume: bool) -> tuple[ResultRecord, CellOutcome]:
    """Runs a cell to its end.

    Args:
        work: model, samples, attack and view.
        store: where chunks and the result go; None computes without storing.
        run_id: the run that the result belongs to.
        resume: go on with what a killed run has committed of this cell.
    Returns: the aggregate and the outcome per sample.
    """
    runner = _CellRunner(work, store, run_id, resume=resume)
    if isinstance(work.plan.stages[0], Protocol):
        runner.run_protocol(work.plan.stages[0])
        return runner.books.finish()
    if not runner.has("clean"):
        runner.commit_clean()
    if work.found is not None and not runner.has(WARM_START):
        runner.take_over(*work.found())
    for stage, search in searches(work.plan, work.cell.precision):
        runner.run_stage(stage, search)
    runner.refuse_gaps()
    return runner.books.finish()


def search_samples(work: CellWork, stage: Attack, search: torch.dtype | None) -> tuple[list[Chunk], Tensor]:
    """Runs one stage on all samples of `work`, which are right so far, and stores nothing.

    Args:
        work: model, samples, attack and view.
        stage: what to run; fitted, where it learns from data.
        search: floating type of the search's passes; None for float32.
    Returns: the chunks that a cell would commit, and the last image of each sample, (N, C, H, W).
    """
    runner = _CellRunner(work, None, "", resume=False, listing=True)
    everything = torch.arange(len(work.samples), device=work.samples.x.device)
    runner.search(stage, search, everything, partial(runner.books.keep, stage_name(stage, search)))
    assert runner.books.chunks is not None
    return runner.books.chunks, runner.outcome.x_adv


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
    def __init__(
        self, work: CellWork, store: Store | None, run_id: str, *, resume: bool, listing: bool = False
    ) -> None:
        assert work.only is None or store is None
        self.work = work
        self.books = Booking(work, store, run_id, resume=resume, listing=listing)
        self.outcome, self.done = self.books.outcome, self.books.done
        self.undecided: list[Undecided] = []

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
        self.books.keep("clean", finished)

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
        self.books.keep(WARM_START, Finished(index, success, prediction, x_adv, zeros + 1, zeros, seconds))
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
            self.books.keep(name, finished)
            tell(len(finished.index))

        def keep(decided: Sequence[Decided]) -> None:
            self.books.take_in(decided)
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
            self.books.keep(name, finished)
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
                index=int64(index),
                broken=np.zeros(len(index), np.bool_),
                clean_pred=int64(work.clean_pred[index]),
                adv_pred=int64(work.clean_pred[index]),
                distance=np.zeros(len(index), np.float32),
                forwards=shared_out(stage.fitted.forwards, len(index)),
                backwards=shared_out(stage.fitted.backwards, len(index)),
                seconds=stage.fitted.seconds,
            )
            self.books.commit(chunk)
        self.outcome.stages[name]["train_n"] = stage.fitted.n
        self.outcome.stages[name]["train_fooling_rate"] = stage.fitted.fooling_rate
        return stage

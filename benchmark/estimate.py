"""What an evaluation will cost before it starts: a short calibration on this device, and what the store knows.

Each stage of each attack is run for its first steps, at the batch size of the evaluation. That gives the seconds per
pass, the attack's own arithmetic included, and shows which samples fall at once. "At most" takes every sample that is
right to the end of every stage; "about" takes those to the end that stand after the first steps, or as many as stood
in stored results of the same weights. Of later stages, results of the same family tell how many samples they break.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from moebench.attacks._base import Attack, AttackPlan, Oracle, Rows, State
from moebench.attacks._engine import Engine, Finished, Samples
from moebench.attacks._library import LibraryAttack
from moebench.attacks._passes import Expectation
from moebench.attacks._protocol import Protocol
from moebench.attacks._random import sample_keys
from moebench.attacks._training import PIXELS_PER_PASS, TrainedAttack
from moebench.attacks._views import make_view
from moebench.attacks.square import Square, SquareState
from moebench.bill import Bill, Cost
from moebench.cells import most_passes, searches, stage_name
from moebench.dry_run import PlannedCell, planned_cells, stored_results
from moebench.evaluation import Prepared
from moebench.fitting import fit_budget
from moebench.probes import CLIMBED, SAMPLES, STEPS
from moebench.schema import CellSpec, StoredResult

FIRST_STEPS, FIRST_SECONDS = 20, 1.5
"""How long the first stage of an attack is tried: it tells which samples fall at once."""

LATER_STEPS, LATER_SECONDS = 30, 0.3
"""How long the stages after it are tried: for their speed."""

USUAL: Mapping[str, tuple[float, float]] = {"fab-t": (0.95, 0.78), "square": (0.8, 1.0)}
"""Of its most forward and backward passes, what a stage spends on a sample that stands to its end, where that is not
all: measured on the adversarially trained models of the digits leaderboard."""

FEWEST = 20
"""Samples that a stage of a stored result has attacked, at least, for its shares to count."""


@dataclass(frozen=True)
class Share:
    """What a stage does to the samples that it attacks: the share that stands, and passes per sample."""

    standing: float
    forwards: float
    backwards: float


@dataclass(frozen=True)
class Trial:
    """The first steps of a stage: seconds per pass, and passes made per sample that was tried."""

    per_pass: float
    passes: float


class _EnoughError(Exception):
    """Enough steps were seen."""


@dataclass(frozen=True)
class _FirstSteps(Attack):
    """The first steps of a stage, timed; ends the engine's loop by an exception.

    `log` holds, at the beginning of each step, the time and the passes so far.
    """

    inner: Attack
    count: Callable[[], int]
    steps: int
    seconds: float
    log: list[tuple[float, int]] = field(default_factory=list, compare=False)

    @property
    @override
    def stage(self) -> str:
        return self.inner.stage

    @property
    @override
    def view(self) -> str | None:
        return self.inner.view

    @override
    def targets(self, logits: Tensor, y: Tensor) -> Tensor | None:
        return self.inner.targets(logits, y)

    @override
    def start(self, rows: Rows, oracle: Oracle) -> State:
        state = self.inner.start(rows, oracle)
        if isinstance(self.inner, Square) and isinstance(state, SquareState):
            # Its first patches are large; most of its time goes into later ones.
            state.queries = state.queries + self.inner.queries // 5
        return state

    @override
    def step(self, state: Any, rows: Rows, oracle: Oracle) -> Tensor:
        self.log.append((time.perf_counter(), self.count()))
        made, spent = len(self.log) - 1, self.log[-1][0] - self.log[0][0]
        if made >= self.steps or (made >= 2 and spent >= self.seconds):
            raise _EnoughError
        if isinstance(state, SquareState):
            # Its first proposals are often kept, and later ones are not, of which it makes many at a time.
            state.rate = state.rate.clamp_max(0.02)
        return self.inner.step(state, rows, oracle)

    @override
    def final(self, state: Any) -> Tensor:
        return self.inner.final(state)

    @override
    def budget(self) -> tuple[int, int]:
        return self.inner.budget()


def planned_with_costs(prepared: Prepared, price_per_hour: float | None = None) -> tuple[list[PlannedCell], Bill]:
    """The cells of a prepared evaluation with what those cost that are not stored, and all of it together.

    Args:
        prepared: the evaluation.
        price_per_hour: of the device.
    """
    spec, begin = prepared.spec, time.perf_counter()
    known = stored_results(spec)
    calibration = Calibration(prepared, known)
    cells = []
    for planned, (plan, cell) in zip(planned_cells(prepared, known), prepared.cells, strict=True):
        cost = None if planned.stored else calibration.cost(plan, cell, (planned.forwards, planned.backwards))
        cells.append(replace(planned, cost=cost))
    costs = [cell.cost for cell in cells if cell.cost is not None]
    probes = calibration.probes() if costs else 0.0
    seconds, at_most = (probes + sum(getattr(cost, name) for cost in costs) for name in ("seconds", "seconds_at_most"))
    took = time.perf_counter() - begin
    threads, device = torch.get_num_threads(), torch.device(spec.device).type
    return cells, Bill(seconds, at_most, device, threads, len(prepared.samples), took, price_per_hour)


class Calibration:
    """Tries the cells of a prepared evaluation on some of its samples; stores nothing and changes no random state.

    Args:
        prepared: the evaluation.
        stored: finished results of its database.
    """

    def __init__(self, prepared: Prepared, stored: Sequence[StoredResult] = ()) -> None:
        self.prepared = prepared
        self.stored = stored
        samples = prepared.samples
        right = (prepared.clean_pred == samples.y).nonzero().squeeze(1)
        self.right = len(right)
        # By random keys: data sets may be sorted by class.
        chosen = right[sample_keys(0, "estimate", samples.ids[right]).argsort()][: prepared.batch_size].sort().values
        self.tried = Samples(samples.x[chosen], samples.y[chosen], samples.ids[chosen])
        self._standing = float(self.right)
        self._plain: dict[tuple[str, int], tuple[float, float]] = {}

    def cost(self, plan: AttackPlan, cell: CellSpec, at_most: tuple[int, int]) -> Cost:
        """What a cell costs, given the most forward and backward passes that it can take."""
        if self.right == 0 or not self._can_try(plan, cell):
            forward, backward = self.plain(cell.view, self.prepared.batch_size)
            seconds = at_most[0] * forward + at_most[1] * backward
            return Cost(*at_most, seconds, seconds, "the bound, at the speed of the model alone")
        shares, basis = self._shares(plan, cell)
        self.plain(cell.view, self.prepared.batch_size)  # so that the first trial meets warm caches
        engine = self._engine(cell)
        attacked, seconds, seconds_at_most, spent = float(self.right), 0.0, 0.0, [0.0, 0.0]
        for number, (stage, search) in enumerate(searches(plan, cell.precision)):
            share = shares.get(stage_name(stage, search))
            standing = (~engine.broken).nonzero().squeeze(1)
            wanted = round(attacked / self.right * len(self.tried))
            index = standing[: max(wanted, 1)]
            if len(index) == 0:
                trial, left = _try_all(engine, stage, search), 0.0
            else:
                steps, limit = (FIRST_STEPS, FIRST_SECONDS) if number == 0 else (LATER_STEPS, LATER_SECONDS)
                trial = _try(engine, stage, search, index, steps, limit)
                left = float((~engine.broken[index]).sum()) / len(index)
            # The bound is of full batches: one sample by itself takes many times as long as one of a hundred.
            full = trial if 2 * len(index) >= len(self.tried) or len(index) == 0 else _try_all(engine, stage, search)
            budget = tuple(self.prepared.spec.draws * passes for passes in most_passes(stage, cell.view))
            if share is None:
                usual = USUAL.get(stage.stage, (1.0, 1.0))
                # What falls in the first steps costs no more than those.
                both = max(sum(budget), 1)
                early = (1 - left) * trial.passes
                needed = [left * usual[kind] * budget[kind] + early * budget[kind] / both for kind in (0, 1)]
                share = Share(left, *needed)
            made = [attacked * share.forwards, attacked * share.backwards]
            spent = [spent[kind] + made[kind] for kind in (0, 1)]
            seconds += sum(made) * trial.per_pass
            seconds_at_most += self.right * sum(budget) * min(trial.per_pass, full.per_pass)
            attacked *= share.standing
        self._standing = min(self._standing, attacked)
        seconds += self._around(plan, cell)
        seconds_at_most += self._around(plan, cell)
        return Cost(round(spent[0]), round(spent[1]), min(seconds, seconds_at_most), seconds_at_most, basis)

    def probes(self) -> float:
        """Seconds of the trust probes, which attack some of the samples that stand after the cells costed so far."""
        if not self.prepared.spec.trust or self.right == 0:
            return 0.0
        looked, climbed = min(SAMPLES, self.right), min(CLIMBED, round(self._standing))
        forward, backward = self.plain("whole", max(climbed, 1))
        return (2 * looked + 3 * climbed * (STEPS + 1)) * (forward + backward)

    def plain(self, view: str, rows: int) -> tuple[float, float]:
        """Seconds that a forward and a backward pass of one sample take in batches of so many rows; no attack."""
        samples = self.prepared.samples
        rows = max(1, min(rows, len(samples)))
        if (view, rows) not in self._plain:
            x = samples.x[:rows]
            index = torch.arange(rows, device=x.device)
            seen = make_view(view, self.prepared.search.module)
            seen.prepare(x)

            def forward() -> None:
                with torch.no_grad():
                    seen.logits(x, index)

            def both() -> None:
                leaf = x.clone().requires_grad_()
                with torch.enable_grad():
                    out = seen.logits(leaf, index)
                    if out.requires_grad:
                        torch.autograd.grad(out.float().sum(), leaf, allow_unused=True)

            once, twice = (_seconds(work, x.device) for work in (forward, both))
            self._plain[view, rows] = once / rows, max(twice - once, 0.0) / rows
        return self._plain[view, rows]

    def _around(self, plan: AttackPlan, cell: CellSpec) -> float:
        """Seconds for what is done per sample and stage beside the search: losses and routing; and for fitting."""
        forward, _ = self.plain("whole", self.prepared.batch_size)
        around = 2 * (1 + len(plan.stages)) * len(self.prepared.samples) * forward
        fit = fit_budget(plan, self.prepared.training)
        if any(fit):
            speed = self.plain(cell.view, PIXELS_PER_PASS // self.prepared.samples.x[0].numel())
            around += fit[0] * speed[0] + fit[1] * speed[1]
        return around

    def _engine(self, cell: CellSpec) -> Engine:
        prepared = self.prepared
        draws, model, search = prepared.spec.draws, prepared.loaded.module, prepared.search.module
        view = make_view(cell.view, search)
        view.prepare(self.tried.x)
        return Engine(
            model if draws == 1 else Expectation(model, draws),
            view,
            self.tried,
            prepared.threat,
            batch_size=prepared.batch_size,
            seed=cell.seed,
            screen=search if draws == 1 else Expectation(search, draws),
            draws=draws,
        )

    def _can_try(self, plan: AttackPlan, cell: CellSpec) -> bool:
        own = (LibraryAttack, Protocol, TrainedAttack)
        return cell.engine != "reference" and not any(isinstance(stage, own) for stage in plan.stages)

    def _shares(self, plan: AttackPlan, cell: CellSpec) -> tuple[dict[str, Share], str]:
        """What stored results say of the stages, and in words where that comes from."""
        alike = [one for one in self.stored if self._alike(one, cell)]
        names = [stage_name(*pair) for pair in searches(plan, cell.precision)]
        own = [one for one in alike if one.checkpoint.sha256 == self.prepared.loaded.checkpoint.sha256]
        if own:
            return _mean_shares(own, names), f"{_count(own)} of the same weights"
        record = self.prepared.loaded.record
        kin = [one for one in alike if (one.model.family, one.model.training) == (record.family, record.training)]
        shares = _mean_shares(kin, names[1:])
        return shares, "the first steps" + (f", and {_count(kin)} of its family" if shares else "")

    def _alike(self, one: StoredResult, cell: CellSpec) -> bool:
        """Whether a result is of the same attack and view under the same threat model."""
        protocol = self.prepared.protocol
        same = (one.protocol.dataset, one.protocol.threat) == (protocol.dataset, protocol.threat)
        return same and (one.cell.attack, one.cell.view) == (cell.attack, cell.view)


def _count(found: Sequence[StoredResult]) -> str:
    return f"{len(found)} stored result{'s' * (len(found) > 1)}"


def _mean_shares(results: Sequence[StoredResult], names: Sequence[str]) -> dict[str, Share]:
    """Per stage the mean over all samples that it attacked in the results; stages that attacked few are left out."""
    shares = {}
    for name in names:
        entries = [one.record.stages[name] for one in results if name in one.record.stages]
        attacked = sum(entry["attacked"] for entry in entries)
        if attacked >= FEWEST:
            broken, forwards, backwards = (
                sum(entry[kind] for entry in entries) for kind in ("broken", "forwards", "backwards")
            )
            shares[name] = Share(1 - broken / attacked, forwards / attacked, backwards / attacked)
    return shares


def _try(engine: Engine, stage: Attack, search: torch.dtype | None, index: Tensor, steps: int, seconds: float) -> Trial:
    """Runs the first steps of a stage on the samples `index` (m,); breaks what they break."""
    device = index.device

    def count() -> int:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return int(engine.forwards[index].sum()) + int(engine.backwards[index].sum())

    timed = _FirstSteps(stage, count, steps, seconds)
    begin = time.perf_counter()
    with suppress(_EnoughError):
        engine.run_stage(timed, index, _nowhere, search=search)
    end, made = time.perf_counter(), count()
    log = timed.log
    falling = int(engine.broken[index].sum()) > len(index) // 2
    if len(log) >= 4 and log[-1][1] > log[1][1] and not falling:
        # Starting comes once, and the steps after it many times; where most samples fall, it is what counts.
        return Trial((log[-1][0] - log[1][0]) / (log[-1][1] - log[1][1]), made / len(index))
    return Trial((end - begin) / max(made, 1), made / len(index))


def _try_all(engine: Engine, stage: Attack, search: torch.dtype | None) -> Trial:
    """Runs the first steps of a stage on all samples; leaves those broken that were."""
    before = engine.broken.clone()
    engine.broken[:] = False
    index = torch.arange(len(before), device=before.device)
    trial = _try(engine, stage, search, index, LATER_STEPS, LATER_SECONDS)
    engine.broken[:] = before
    return trial


def _nowhere(finished: Finished) -> None:
    """Takes what a trial decides."""


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """The median time of a piece of work after a first go, in up to five goes or half a second."""
    times: list[float] = []
    for number in range(6):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
        if number > 0 and sum(times[1:]) > 0.5:
            break
    return sorted(times[1:])[(len(times) - 1) // 2]

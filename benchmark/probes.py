"""Small experiments on a model that show whether its gradients can be trusted: cheap, bounded, deterministic by seed.

At most 2 · 64 + 3 · 32 · 21 = 2,144 forward and as many backward passes, whatever the size of the evaluation.
docs/trust.md has the tests and their thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.attacks._engine import Samples
from moebench.attacks._passes import batches
from moebench.attacks._projections import ascend, l2_norm, project, random_start
from moebench.attacks._random import sample_keys
from moebench.flags import EPS_DOES_NOT_HELP, STANDS_EVERYWHERE, STEPS_DO_NOT_HELP, ZERO_GRADIENTS
from moebench.metrics import worst_case
from moebench.schema import Flag, Outcomes, ThreatModel, format_eps, is_protocol
from moebench.store import Store
from moebench.trust import ALPHA, at_least

if TYPE_CHECKING:
    from moebench.evaluation import Prepared

VERSION = "1"
"""Flags of probes of another version are not reused."""

CODES = frozenset({EPS_DOES_NOT_HELP, STANDS_EVERYWHERE, STEPS_DO_NOT_HELP, ZERO_GRADIENTS})

SAMPLES, CLIMBED, STEPS = 64, 32, 20
"""Samples whose gradient is looked at, samples that are attacked, and steps of that attack."""

VANISHED = 1e-12
"""L2 norm of a gradient below which attacks take it for none: they divide by no smaller number."""

SATURATED = 2.0**-24
"""Probability of all wrong classes together below which the label's is 1 in float32, and the loss exactly 0."""

EXPECTED_ZEROS = 0.02
"""Share of vanished gradients, and of samples that stand at the largest radius, that an honest model may show."""

EXPECTED_STALLS = 0.10
"""Share of samples on which an honest model's loss is not raised by more steps or a larger radius."""


@dataclass(frozen=True)
class Climb:
    """A PGD run, per sample (m,): the loss after the first step and after the last, and whether any image was wrong."""

    first: Tensor
    last: Tensor
    broken: Tensor


def active_flags(prepared: Prepared, store: Store, *, run_fingerprint: str, all_reused: bool) -> list[Flag]:
    """The probes' flags for a run whose cells are finished; from an earlier run of the same cells where there is one.

    Args:
        prepared: model, samples and threat model.
        store: holds the outcomes of the run's cells.
        run_fingerprint: of the run's cells.
        all_reused: no cell was computed, so nothing can have changed.
    """
    if not prepared.spec.trust:
        return []
    for earlier in store.twin_runs(run_fingerprint) if all_reused else ():
        if earlier.environment.get("probes") == VERSION:
            return [flag for flag in earlier.flags if flag.code in CODES]
    right = prepared.clean_pred == prepared.samples.y
    found = _outcomes(prepared, store)
    standing = torch.from_numpy(worst_case(found)).to(right.device) if found else right
    return probe(
        prepared.loaded.module,
        prepared.samples,
        prepared.threat,
        right=right,
        standing=standing & right,
        several_classes=bool((prepared.clean_pred != prepared.clean_pred[0]).any()),
        seed=prepared.spec.seed,
        batch_size=prepared.batch_size,
    )


def _outcomes(prepared: Prepared, store: Store) -> list[Outcomes]:
    """Outcomes of the run's cells on the whole model, or of all its cells where none is on the whole."""
    cells = [cell for _, cell in prepared.cells if not is_protocol(cell.attack)]
    chosen = [cell for cell in cells if cell.view == "whole"] or cells
    found = [store.reusable(cell.fingerprint) for cell in chosen]
    return [store.outcomes(one.result_id) for one in found if one is not None]


def probe(
    model: nn.Module,
    samples: Samples,
    threat: ThreatModel,
    *,
    right: Tensor,
    standing: Tensor,
    several_classes: bool = True,
    seed: int = 0,
    batch_size: int = 256,
) -> list[Flag]:
    """Looks for gradients that vanish and for attacks that do not get better with more steps or a larger radius.

    Args:
        model: in eval mode, parameters frozen.
        samples: what was attacked.
        threat: norm, radius and box of the evaluation.
        right: (N,) bool, samples that the model gets right.
        standing: (N,) bool, those of them that the evaluation's attacks did not break; the only ones that are attacked.
        several_classes: whether the model predicts more than one class on the samples; else no radius breaks it.
        seed: of the choice of samples and of the random starts. The caller's random numbers are left alone.
        batch_size: samples per pass.
    """
    lab = _Lab(model, samples, threat, seed, batch_size)
    with torch.random.fork_rng(devices=_devices(samples.x)):
        torch.manual_seed(seed)
        gradients = lab.zero_gradients(lab.choose(right, SAMPLES))
        if not lab.differentiable:
            return gradients
        return [*gradients, *lab.climbs(lab.choose(standing, CLIMBED), several_classes)]


class _Lab:
    def __init__(self, model: nn.Module, samples: Samples, threat: ThreatModel, seed: int, batch_size: int) -> None:
        self.model = model
        self.samples = samples
        self.threat = threat
        self.batch_size = batch_size
        self.keys = sample_keys(seed, "trust", samples.ids)
        self.differentiable = True

    def choose(self, among: Tensor, count: int) -> Tensor:
        """Up to `count` of the samples, by the order of their random keys: data sets may be sorted by class."""
        index = among.nonzero().squeeze(1)
        return index[self.keys[index].argsort()][:count].sort().values

    def zero_gradients(self, index: Tensor) -> list[Flag]:
        """Vanished gradients at the clean images and at random points of their balls."""
        clean: list[Tensor] = []
        inside: list[Tensor] = []
        for part in batches(index, self.batch_size):
            x = self.samples.x[part]
            for found, point in ((clean, x), (inside, random_start(x, self.keys[part], self.threat))):
                vanished = self._vanished(point, self.samples.y[part])
                if isinstance(vanished, str):
                    self.differentiable = False
                    return [Flag(ZERO_GRADIENTS, vanished)]
                found.append(vanished)
        counts = [int(torch.cat(found).sum()) if found else 0 for found in (clean, inside)]
        # Two looks, one flag.
        if 2 * min(at_least(count, len(index), EXPECTED_ZEROS) for count in counts) > ALPHA:
            return []
        words = (
            f"the gradient of the cross-entropy vanishes on {counts[0]} of {len(index)} correctly classified images "
            f"and at a random point of the ball on {counts[1]}; {EXPECTED_ZEROS:.0%} could be chance"
        )
        return [Flag(ZERO_GRADIENTS, words)]

    def _vanished(self, x: Tensor, y: Tensor) -> Tensor | str:
        """Where the gradient is zero or the loss saturates, (m,) bool; or why there is no gradient at all."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.model(x).float()
            if not logits.requires_grad:
                return "the logits have no gradient at all (a no_grad, a detach or an argmax in the forward pass)"
            loss = F.cross_entropy(logits, y, reduction="sum")
            try:
                (gradient,) = torch.autograd.grad(loss, x, allow_unused=True)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                first = (str(error).strip().splitlines() or [""])[0]
                return f"the backward pass fails: {first[:200]}"
        if gradient is None:
            return "the logits do not depend on the image by any path that has a gradient"
        others = logits.detach().double().softmax(dim=1).scatter(1, y.unsqueeze(1), 0.0).sum(dim=1)
        vanished: Tensor = ~(l2_norm(gradient.double()) >= VANISHED) | (others < SATURATED)
        return vanished

    def climbs(self, index: Tensor, several_classes: bool) -> list[Flag]:
        """PGD at eps, at twice eps and at a radius that holds the whole box."""
        if len(index) == 0 or self.threat.eps == 0:
            return []
        whole_box = self._radius_of_box()
        double = min(2 * self.threat.eps, whole_box)
        own, wider, box = (self.climb(index, radius) for radius in (self.threat.eps, double, whole_box))
        stalls = int((~(own.last > own.first)).sum())
        found = []
        if at_least(stalls, len(index), EXPECTED_STALLS) <= ALPHA:
            words = (
                f"on {stalls} of {len(index)} standing samples the loss after {STEPS} steps of PGD is not above that "
                f"after the first step; {EXPECTED_STALLS:.0%} could be chance"
            )
            found.append(Flag(STEPS_DO_NOT_HELP, words))
        same = int((~(wider.last > own.last)).sum())
        if double > self.threat.eps and at_least(same, len(index), EXPECTED_STALLS) <= ALPHA:
            words = (
                f"on {same} of {len(index)} standing samples PGD-{STEPS} reaches no higher loss at eps "
                f"{format_eps(double)} than at {format_eps(self.threat.eps)}; {EXPECTED_STALLS:.0%} could be chance"
            )
            found.append(Flag(EPS_DOES_NOT_HELP, words))
        left = int((~box.broken).sum())
        if several_classes and at_least(left, len(index), EXPECTED_ZEROS) <= ALPHA:
            words = (
                f"PGD-{STEPS} at {self.threat.norm} eps {format_eps(whole_box)}, where every image is allowed, leaves "
                f"{left} of {len(index)} samples standing; {EXPECTED_ZEROS:.0%} could be chance"
            )
            found.append(Flag(STANDS_EVERYWHERE, words))
        return found

    def _radius_of_box(self) -> float:
        side = self.threat.upper - self.threat.lower
        return side if self.threat.norm == "Linf" else side * math.sqrt(self.samples.x[0].numel())

    def climb(self, index: Tensor, radius: float) -> Climb:
        """PGD on the cross-entropy with steps of radius / 4 from a random start; every image counts for `broken`."""
        threat = ThreatModel(self.threat.norm, radius, self.threat.lower, self.threat.upper)
        parts = [self._climb(part, threat) for part in batches(index, self.batch_size)]
        return Climb(*(torch.cat([getattr(part, name) for part in parts]) for name in ("first", "last", "broken")))

    def _climb(self, index: Tensor, threat: ThreatModel) -> Climb:
        x, y = self.samples.x[index], self.samples.y[index]
        x_adv = random_start(x, self.keys[index], threat)
        broken = torch.zeros_like(y, dtype=torch.bool)
        losses = []
        for step in range(STEPS + 1):
            x_adv = x_adv.detach().requires_grad_(step < STEPS)
            with torch.set_grad_enabled(step < STEPS):
                logits = self.model(x_adv).float()
                loss = F.cross_entropy(logits, y, reduction="none")
            broken |= logits.argmax(dim=1) != y
            losses.append(loss.detach())
            if step == STEPS:
                break
            (gradient,) = torch.autograd.grad(loss.sum(), x_adv)
            x_adv = project(ascend(x_adv.detach(), gradient, threat.eps / 4, threat), x, threat)
        return Climb(losses[1], losses[-1], broken)


def _devices(x: Tensor) -> Sequence[int]:
    return [x.device.index or 0] if x.device.type == "cuda" else []

"""The same attacks through the libraries that others trust, for comparison and for doubt.

pyautoattack (the AutoAttack authors' code) runs APGD, FAB and Square; torchattacks runs FGSM and PGD. Their verdicts
are theirs; whether an image counts is decided by the same judge as always.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moebench.attacks._base import Attack, AttackPlan
from moebench.attacks._engine import Engine, Finished, Sink, batches
from moebench.attacks._views import View
from moebench.attacks.apgd import APGD
from moebench.attacks.fab import FAB
from moebench.attacks.pgd import PGD
from moebench.attacks.square import Square
from moebench.errors import UsageError
from moebench.schema import ThreatModel

Perturb = Callable[[Tensor, Tensor], Tensor]


class _Contiguous(torch.autograd.Function):
    """Identity whose gradient is contiguous: pyautoattack 0.2 views gradients flat and fails on channels-last ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous()


class ReferenceModel(nn.Module):
    """A view as the plain model that the libraries expect; counts passes, and its logits may be overwritten."""

    def __init__(self, view: View, device: torch.device) -> None:
        super().__init__()
        self.view = view
        self.forwards = 0
        self.backwards = 0
        # torchattacks takes the device from the model's first parameter.
        self.anchor = nn.Parameter(torch.empty(0, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        if x.requires_grad:
            self.backwards += len(x)
        nowhere = torch.empty(0, dtype=torch.int64, device=x.device)
        logits: Tensor = self.view.logits(_Contiguous.apply(x), nowhere)
        return logits.clone()


def check_reference(plan: AttackPlan, view: str) -> None:
    """Refuses what the libraries cannot express.

    Raises:
        UsageError: a view that needs to know which sample it sees, or an attack that the libraries do not have.
    """
    if view in ("router", "experts"):
        raise UsageError(
            f"view {view!r} holds clean routing per sample, which pyautoattack and torchattacks cannot pass on; "
            "use --engine native"
        )
    for stage in plan.stages:
        if stage.view is not None or not isinstance(stage, (APGD, FAB, PGD, Square)):
            raise UsageError(f"attack {plan.name!r} has no reference implementation; use --engine native")


def run_reference(stage: Attack, engine: Engine, index: Tensor, sink: Sink) -> None:
    """Runs one stage through a library, batch by batch, on the samples `index`, and judges what comes back."""
    for part in batches(index, engine.batch_size):
        begin = time.perf_counter()
        model = ReferenceModel(engine.view, index.device)
        x, y = engine.samples.x[part], engine.samples.y[part]
        x_adv = _perturb(stage, model, engine.threat, engine.seed)(x.clone(), y.clone()).detach()
        broken, prediction = engine.judge(x_adv, part)
        engine.broken[part] |= broken
        # The libraries do not say which sample a pass was for: shared out evenly.
        share = torch.full_like(part, 1)
        sink(
            Finished(
                part,
                broken,
                torch.where(broken, prediction, y),
                x_adv,
                share * (1 + model.forwards // len(part)),
                share * (model.backwards // len(part)),
                time.perf_counter() - begin,
            )
        )


def _perturb(stage: Attack, model: ReferenceModel, threat: ThreatModel, seed: int) -> Perturb:
    if isinstance(stage, PGD):
        return _torchattacks(stage, model, threat, seed)
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted  # type: ignore[import-untyped]
    from pyautoattack.fab_pt import FABAttack_PT  # type: ignore[import-untyped]
    from pyautoattack.square import SquareAttack  # type: ignore[import-untyped]

    shared = {"norm": threat.norm, "eps": threat.eps, "seed": seed, "device": model.anchor.device, "verbose": False}
    logger = logging.getLogger("auto-attack")
    attack: Any
    if isinstance(stage, APGD) and stage.loss == "dlr-targeted":
        attack = APGDAttack_targeted(
            model, n_iter=stage.steps, rho=stage.rho, n_target_classes=stage.target_classes, logger=logger, **shared
        )
    elif isinstance(stage, APGD):
        attack = APGDAttack(model, n_iter=stage.steps, rho=stage.rho, loss=stage.loss, logger=logger, **shared)
    elif isinstance(stage, FAB):
        attack = FABAttack_PT(model, n_iter=stage.steps, targeted=True, n_target_classes=stage.target_classes, **shared)
    elif isinstance(stage, Square):
        attack = SquareAttack(model, n_queries=stage.queries, p_init=stage.p_init, resc_schedule=False, **shared)
    else:
        raise UsageError(f"attack stage {stage.stage!r} has no reference implementation; use --engine native")
    perturb: Perturb = attack.perturb
    return perturb


def _torchattacks(stage: PGD, model: nn.Module, threat: ThreatModel, seed: int) -> Perturb:
    import torchattacks  # type: ignore[import-untyped]

    torch.manual_seed(seed)
    kind = torchattacks.PGD if threat.norm == "Linf" else torchattacks.PGDL2
    attack = kind(
        model,
        eps=threat.eps,
        alpha=stage.step_fraction * threat.eps,
        steps=stage.steps,
        random_start=stage.random_start,
    )
    perturb: Perturb = attack
    return perturb

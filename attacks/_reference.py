"""Attacks through the libraries that others trust: ours, for comparison and for doubt, and any class of torchattacks.

pyautoattack (the AutoAttack authors' code) runs APGD, FAB and Square, torchattacks runs FGSM and PGD; APGD and PGD
begin at the random starts of our own engine. `torchattacks:NAME` comes through here as well. What counts is decided
by the same judge as always.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from moebench.attacks._base import Attack, AttackPlan, Rows
from moebench.attacks._engine import Engine, Finished, Sink
from moebench.attacks._library import LibraryAttack, owners
from moebench.attacks._passes import batches
from moebench.attacks._projections import expand, l2_norm, random_start
from moebench.attacks._random import sample_keys
from moebench.attacks._views import View
from moebench.attacks.apgd import APGD, start_on_sphere
from moebench.attacks.fab import FAB
from moebench.attacks.pgd import PGD
from moebench.attacks.square import Square
from moebench.errors import UsageError
from moebench.schema import ThreatModel

Perturb = Callable[[Tensor, Tensor], Tensor]
Watch = Callable[[Tensor, Rows, Tensor], None]


class _Contiguous(torch.autograd.Function):
    """Identity whose gradient is contiguous: pyautoattack 0.2 views gradients flat and fails on channels-last ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous()


class ReferenceModel(nn.Module):
    """A view as the plain model that the libraries expect; counts passes, and its logits may be overwritten.

    Args:
        view: what the library attacks.
        rows: the batch that it works on.
        watch: is shown every image that the library looks at, with the rows of the samples it was made from and its
            logits; where it is given, the view is told the samples too.
    """

    def __init__(self, view: View, rows: Rows, watch: Watch | None = None) -> None:
        super().__init__()
        self.view = view
        self.rows = rows
        self.watch = watch
        self.forwards = 0
        self.backwards = 0
        # torchattacks takes the device from the model's first parameter.
        self.anchor = nn.Parameter(torch.empty(0, device=rows.x.device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        self.forwards += len(x)
        if x.requires_grad:
            self.backwards += len(x)
        seen = self.rows.take(owners(x.detach(), self.rows.x)) if self.watch is not None else None
        index = self.rows.index[:0] if seen is None else seen.index
        logits: Tensor = self.view.logits(_Contiguous.apply(x), index)
        if self.watch is not None and seen is not None:
            self.watch(x.detach(), seen, logits.detach())
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
    """Runs one stage through a library, batch by batch, on the samples `index`, and judges what comes back.

    torchattacks returns its last image only, broken or not; as in our own PGD, every image on its way counts.
    """
    for part in batches(index, engine.batch_size):
        begin = time.perf_counter()
        x, y = engine.samples.x[part], engine.samples.y[part]
        zeros = torch.zeros_like(part)
        rows = Rows(part, x, y, zeros - 1, zeros, zeros)
        watch = engine.propose if isinstance(stage, (PGD, LibraryAttack)) else None
        model = ReferenceModel(engine.view, rows, watch)
        engine.rank[part] = -1
        x_adv = _perturb(stage, model, engine.threat, Starts(stage, engine, part))(x.clone(), y.clone()).detach()
        with torch.no_grad():
            engine.propose(x_adv, rows, engine.view.logits(x_adv, part))
        broken = engine.broken[part]
        # The libraries do not say which sample a pass was for: shared out evenly.
        sink(
            Finished(
                part,
                broken,
                engine.adv_pred[part],
                torch.where(expand(broken, x), engine.x_adv[part], x_adv),
                zeros + 1 + model.forwards // len(part),
                zeros + model.backwards // len(part),
                time.perf_counter() - begin,
            )
        )


class Starts:
    """The random starts of our engine, handed to a library run by run, so that both search from the same points.

    The libraries' own starts depend on the batch; from different starts even two runs of one library disagree on
    samples near the limit of what can be broken.
    """

    def __init__(self, stage: Attack, engine: Engine, index: Tensor) -> None:
        self.stage, self.engine, self.seed = stage, engine, engine.seed
        self.index = index
        self.runs = 0
        self._place = {_bytes(image): place for place, image in enumerate(engine.samples.x[index])}

    def next(self, x: Tensor) -> Tensor:
        """Starts for the next run (the next target class) on clean images (m, C, H, W), all or some of them."""
        at = self.index[[self._place[_bytes(image)] for image in x]]
        keys = sample_keys(self.seed, f"{self.stage.stage}/{self.runs}", self.engine.samples.ids[at])
        self.runs += 1
        unaimed = torch.full_like(at, -1)
        rows = Rows(at, x, self.engine.samples.y[at], unaimed, keys, torch.zeros_like(at))
        if isinstance(self.stage, PGD):
            return random_start(x, keys, self.engine.threat)
        return start_on_sphere(rows, self.engine.threat)


def _bytes(image: Tensor) -> bytes:
    return image.detach().cpu().numpy().tobytes()


def _from_our_starts(kind: type[Any], starts: Starts) -> type[Any]:
    """One of pyautoattack's APGD classes, which takes a start as an argument that its own loop never gives."""

    class Started(kind):  # type: ignore[misc]
        def attack_single_run(self, x: Tensor, y: Tensor, x_init: Tensor | None = None) -> Any:
            return super().attack_single_run(x, y, x_init=starts.next(x))

    return Started


def _perturb(stage: Attack, model: ReferenceModel, threat: ThreatModel, starts: Starts) -> Perturb:
    seed = starts.seed
    if isinstance(stage, LibraryAttack):
        return stage.perturb(model, seed, starts.engine.samples.ids[starts.index])
    if isinstance(stage, PGD):
        return _torchattacks(stage, model, threat, starts)
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted  # type: ignore[import-untyped]
    from pyautoattack.fab_pt import FABAttack_PT  # type: ignore[import-untyped]
    from pyautoattack.square import SquareAttack  # type: ignore[import-untyped]

    shared = {"norm": threat.norm, "eps": threat.eps, "seed": seed, "device": model.anchor.device, "verbose": False}
    logger = logging.getLogger("auto-attack")
    attack: Any
    if isinstance(stage, APGD) and stage.loss == "dlr-targeted":
        attack = _from_our_starts(APGDAttack_targeted, starts)(
            model, n_iter=stage.steps, rho=stage.rho, n_target_classes=stage.target_classes, logger=logger, **shared
        )
    elif isinstance(stage, APGD):
        attack = _from_our_starts(APGDAttack, starts)(
            model, n_iter=stage.steps, rho=stage.rho, loss=stage.loss, logger=logger, **shared
        )
    elif isinstance(stage, FAB):
        attack = FABAttack_PT(model, n_iter=stage.steps, targeted=True, n_target_classes=stage.target_classes, **shared)
    elif isinstance(stage, Square):
        attack = SquareAttack(model, n_queries=stage.queries, p_init=stage.p_init, resc_schedule=False, **shared)
    else:
        raise UsageError(f"attack stage {stage.stage!r} has no reference implementation; use --engine native")
    perturb: Perturb = attack.perturb
    return perturb


def _torchattacks(stage: PGD, model: nn.Module, threat: ThreatModel, starts: Starts) -> Perturb:
    import torchattacks  # type: ignore[import-untyped]

    kind = torchattacks.PGD if threat.norm == "Linf" else torchattacks.PGDL2
    attack = kind(
        model,
        eps=threat.eps,
        alpha=stage.step_fraction * threat.eps,
        steps=stage.steps,
        random_start=stage.random_start,
    )

    def perturb(x: Tensor, y: Tensor) -> Tensor:
        with _drawing(starts.next(x) - x, threat):
            x_adv: Tensor = attack(x, y)
        return x_adv

    return perturb


@contextmanager
def _drawing(delta: Tensor, threat: ThreatModel) -> Iterator[None]:
    """Has torchattacks draw a given start: it takes none as an argument, and draws in place from torch's generator.

    For Linf it adds a uniform draw; for L2 it scales a normal draw to a uniform share of eps.
    """
    share = l2_norm(delta) / max(threat.eps, 1e-12)

    def uniform(self: Tensor, *limits: float) -> Tensor:
        return self.copy_(delta if threat.norm == "Linf" else share.view(self.shape))

    def normal(self: Tensor, *moments: float) -> Tensor:
        return self.copy_(delta)

    with patch.object(Tensor, "uniform_", uniform), patch.object(Tensor, "normal_", normal):
        yield

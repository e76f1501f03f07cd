"""The evaluation protocols of four papers, as their published code runs them, each departure a switch.

Written from descriptions of that code. What each switch is about stands in `moebench.published`; `moebench show
published:NAME` prints it. Radius, data and model are those of the evaluation; steps and step sizes, as fractions of
eps, are the papers'. All are defined for Linf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from typing_extensions import override

from moebench.attacks._base import Attack, Rows, register_attack
from moebench.attacks._protocol import Protocol, Walk
from moebench.attacks.apgd import APGD, start_on_sphere
from moebench.models.adv_moe import ZHANG_2023
from moebench.models.robust_experts import PAVLITSKA_2025
from moebench.models.rt_er import ZHANG_2025
from moebench.models.v_moe import PUIGCERVER_2022
from moebench.schema import ThreatModel


@dataclass(frozen=True)
class OneAPGD(APGD):
    """One run of Auto-PGD, from the clean image or from a random point of the sphere."""

    start_at: Literal["clean", "random"] = "clean"

    @override
    def first(self, rows: Rows, threat: ThreatModel) -> Tensor:
        return rows.x.clone() if self.start_at == "clean" else start_on_sphere(rows, threat)

    @override
    def parameters(self) -> dict[str, object]:
        return {"start": self.start_at, "loss": self.loss, "steps": self.steps, "rho": self.rho}


@register_attack(
    "published:rt-er",
    summary="protocol of arXiv 2502.06832: PGD-50, unscaled float16 gradients, constant start, last image counts",
    views=("whole",),
    paper=ZHANG_2025,
)
def rt_er(
    *,
    fp16: bool = True,
    batch: int = 512,
    loss_scale: int = 1,
    start: Literal["constant", "random", "clean"] = "constant",
    score: Literal["final", "stale", "any"] = "final",
    steps: int = 50,
    step_fraction: float = 0.25,
) -> tuple[Attack, ...]:
    """PGD under float16 autocast, with the mean loss of a batch of 512 and no loss scaling (sections 1.3 and 1.4)."""
    walk = Walk(steps, step_fraction, start_at=start)
    return (Protocol("rt-er", walk, fp16=fp16, batch=batch, loss_scale=loss_scale, score=score),)


@register_attack(
    "published:rt-er-autoattack",
    summary="what arXiv 2502.06832 calls AutoAttack: one run of APGD from the clean image",
    views=("whole",),
    min_classes=3,
    paper=ZHANG_2025,
)
def rt_er_autoattack(
    *,
    start: Literal["clean", "random"] = "clean",
    fp16: bool = True,
    batch: int = 1,
    loss_scale: int = 1,
    score: Literal["final", "any"] = "any",
    loss: Literal["ce", "dlr"] = "ce",
    steps: int = 50,
) -> tuple[Attack, ...]:
    """One APGD run, no restart; no APGD-T, FAB or Square.

    Whether the code sums or averages the loss, and which iterate it scores, is not known; the defaults are the readings
    that leave the attack stronger.
    """
    search = OneAPGD(loss=loss, steps=steps, start_at=start)
    return (Protocol("rt-er-autoattack", search, fp16=fp16, batch=batch, loss_scale=loss_scale, score=score),)


@register_attack(
    "published:adv-moe",
    summary="protocol of arXiv 2308.10110: PGD-10 whose loss is spent on the router, last image counts",
    views=("whole",),
    paper=ZHANG_2023,
)
def adv_moe(
    *,
    router_weight: float = 6.0,
    straight_through: bool = True,
    start: Literal["random", "clean", "constant"] = "random",
    score: Literal["final", "stale", "any"] = "final",
    steps: int = 10,
    step_fraction: float = 0.25,
) -> tuple[Attack, ...]:
    """PGD on CE(F(x), y) + 6 CE(router, y mod E)."""
    walk = Walk(steps, step_fraction, start_at=start)
    routed = Protocol("adv-moe", walk, score=score, router_weight=router_weight, straight_through=straight_through)
    return (routed,)


@register_attack(
    "published:v-moe",
    summary="protocol of arXiv 2210.10253: PGD-40 of eps/40 from the clean image, pixels unclipped, last image counts",
    views=("whole",),
    paper=PUIGCERVER_2022,
)
def v_moe(
    *,
    start: Literal["clean", "random", "constant"] = "clean",
    step_fraction: float = 0.025,
    project: bool = False,
    clip: bool = False,
    score: Literal["final", "stale", "any"] = "final",
    steps: int = 40,
) -> tuple[Attack, ...]:
    """PGD in small steps that are neither projected nor clipped."""
    walk = Walk(steps, step_fraction, start_at=start, project=project, clip=clip)
    return (Protocol("v-moe", walk, score=score),)


@register_attack(
    "published:robust-experts",
    summary="protocol of arXiv 2509.05086: PGD-20, last image counts; float16 and train mode as switches",
    views=("whole",),
    paper=PAVLITSKA_2025,
)
def robust_experts(
    *,
    fp16: bool = False,
    mode: Literal["eval", "train"] = "eval",
    batch: int = 256,
    loss_scale: int = 1,
    start: Literal["random", "clean", "constant"] = "random",
    score: Literal["final", "stale", "any"] = "final",
    steps: int = 20,
    step_fraction: float = 0.25,
) -> tuple[Attack, ...]:
    """PGD on the mean loss of a batch; in float16 in the paper's ResNet-50 and WideResNet scripts."""
    walk = Walk(steps, step_fraction, start_at=start)
    return (Protocol("robust-experts", walk, fp16=fp16, batch=batch, loss_scale=loss_scale, score=score, mode=mode),)

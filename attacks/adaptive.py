"""moe-adaptive: AutoAttack together with attacks on the routing, as far as the model's kind of routing offers any.

Its stages depend on the model. All of AutoAttack's are always among them, with the same random numbers, so its RA is
never higher than AutoAttack's; the other stages are

- for hard routing (top-k of more experts): `region`, and Auto-PGD through soft and straight-through routing;
- for soft gates (every expert always runs): `joint`, Auto-PGD on the router alone, on the experts alone, and on each
  expert alone;
- for dual models, besides: Auto-PGD on each half;
- for routing per token, where there are too many regions: instead of `region`, `joint`; and, as for several layers
  behind each other, besides: Auto-PGD on expert i in all layers.

The strong and cheap stages come first; what is besides comes last.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from moebench.attacks._base import Attack, register_attack
from moebench.attacks._views import component_halves
from moebench.attacks.apgd import APGD
from moebench.attacks.fab import FAB
from moebench.attacks.joint import Joint
from moebench.attacks.region import Region
from moebench.attacks.square import Square
from moebench.models._moe import mixes_all, moe_layers, routes_tokens


@dataclass(frozen=True)
class APGDOnView(APGD):
    """Auto-PGD on a view of its own, whatever view the attack runs on."""

    on: str = "smooth"

    @property
    @override
    def stage(self) -> str:
        return f"{super().stage} on {self.on}"

    @property
    @override
    def view(self) -> str:
        return self.on

    @override
    def unfit(self, model: nn.Module) -> str | None:
        if self.on in ("smooth", "straight-through") and mixes_all(model):
            return f"every expert always runs, so the view {self.on} is the model itself"
        return None


def fit(stages: tuple[Attack, ...], model: nn.Module) -> tuple[Attack, ...]:
    """The stages for a model: those of hard routing, with what its kind of routing adds."""
    layers = moe_layers(model)
    halves = component_halves(model)
    if mixes_all(model):
        stages = (*stages[:-2], Joint(loss="ce"), *_on("router", "experts"), *_each_expert(model), *stages[-2:])
    elif routes_tokens(model):
        stages = (*stages, Joint(loss="ce"), *_each_expert(model))
    elif len(layers) > 1 and not halves:
        stages = (*stages, *_each_expert(model))
    return (*stages, *_on(*halves))


def _each_expert(model: nn.Module) -> tuple[Attack, ...]:
    """One stage for each expert, forced in all layers at once."""
    count = min(len(layer.experts) for layer in moe_layers(model).values())
    return _on(*(f"expert[{number}]" for number in range(count)))


def _on(*views: str) -> tuple[Attack, ...]:
    return tuple(APGDOnView(loss="ce", on=view) for view in views)


@register_attack(
    "moe-adaptive",
    summary="AutoAttack and attacks on the routing: by region, joint, through soft routing, by part",
    views=("whole",),
    min_classes=4,
    fit=fit,
)
def moe_adaptive(*, pairs: int = 36) -> tuple[Attack, ...]:
    """The stages for hard routing."""
    return (
        APGD(loss="ce"),
        Region(pairs=pairs),
        APGDOnView(loss="ce", on="smooth"),
        APGDOnView(loss="dlr-targeted", on="straight-through", target_classes=3),
        APGD(loss="dlr-targeted", target_classes=9),
        FAB(target_classes=9),
        Square(),
    )

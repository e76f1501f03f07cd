"""AutoAttack, standard version: four attacks in a row on the samples still standing (Croce and Hein, 2020).

The only thing that moebench calls AutoAttack. Constants are those of the published standard version and pinned by a
test.
"""

from __future__ import annotations

from moebench.attacks._base import Attack, register_attack
from moebench.attacks.apgd import APGD, CROCE_2020
from moebench.attacks.fab import FAB
from moebench.attacks.square import Square


@register_attack(
    "autoattack",
    summary="standard version: APGD-CE, APGD-T (9), FAB-T (9), Square (5000)",
    min_classes=4,
    paper=CROCE_2020,
)
def autoattack() -> tuple[Attack, ...]:
    """APGD-CE, targeted APGD, targeted FAB and Square, each with its standard budget."""
    return (
        APGD(loss="ce", steps=100, rho=0.75),
        APGD(loss="dlr-targeted", steps=100, rho=0.75, target_classes=9),
        FAB(steps=100, alpha_max=0.1, eta=1.05, beta=0.9, target_classes=9),
        Square(queries=5000, p_init=0.8),
    )

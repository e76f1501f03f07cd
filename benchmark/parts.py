"""One expert or one half of a model as a network of its own."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from moebench.attacks._views import check_view
from moebench.errors import UsageError
from moebench.models._moe import moe_layers
from moebench.schema import EXPERT_VIEW, PARTS


class OneExpert(nn.Module):
    """A model in which one expert stands in the place of an MoE layer, or of all of them: there is no routing there.

    What surrounds the layers is unchanged. The logits are those of the model with that expert forced.
    """

    def __init__(self, model: nn.Module, expert: int, layer: str | None) -> None:
        super().__init__()
        # The copy hangs below this module, so that a model which is itself an MoE layer can be replaced too.
        self.model = copy.deepcopy(model)
        chosen = {
            name: found for name, found in moe_layers(self).items() if layer in (None, name.removeprefix("model."))
        }
        for name, found in chosen.items():
            parent, _, child = name.rpartition(".")
            setattr(self.get_submodule(parent), child, found.alone(expert))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of [0, 1] images (B, C, H, W)."""
        logits: Tensor = self.model(x)
        return logits


def part_of(model: nn.Module, part: str, name: str) -> nn.Module:
    """The part of a model that the view of the same name shows: `expert[i]`, `expert[LAYER:i]`, `standard`, `robust`.

    Raises:
        UsageError: the model called `name` has no such part.
    """
    try:
        check_view(part, model)
    except UsageError as error:
        raise UsageError(f"{name} has no part {part!r}: {error}") from None
    if part in PARTS:
        return model.get_submodule(part)
    match = EXPERT_VIEW.fullmatch(part)
    assert match is not None
    return OneExpert(model, int(match["number"]), match["layer"])

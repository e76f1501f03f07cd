"""What attacks do to routing per token: one number per image and layer, whatever the number of tokens.

Routing weights of all tokens would be most of a database; what is kept per image are means over its tokens, and the
first choice of each token as one small number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moebench.models._moe import Routing
from moebench.schema import ExpertChoice, RoutingLayer


class TokenTrace:
    """Routing of T tokens per image.

    IoU, changed sets, load and entropy are means over the tokens of an image; `first` is the expert of the largest
    weight of each token. Load is the weight of an expert as a share of all experts' weight.
    """

    def __init__(self, routing: Routing, entropy: Tensor) -> None:
        self.selected = routing.selected
        self.experts = routing.selected.shape[2]
        self.clean = self._means(routing, entropy, routing.selected)
        self.attacked = {what: values.clone() for what, values in self.clean.items()}

    def note(self, index: Tensor, routing: Routing, entropy: Tensor) -> dict[str, NDArray[Any]]:
        """Keeps the means; the store gets `load` (m, E), `entropy`, `iou`, `changed` (m,) and `first` (m, T)."""
        means = self._means(routing, entropy, self.selected[index])
        self.restore(index, means)
        whole = np.uint8 if self.experts <= 256 else np.int32
        return {
            what: values.cpu().numpy().astype(whole if what == "first" else np.float32)
            for what, values in means.items()
        }

    def restore(self, index: Tensor, extras: Mapping[str, Tensor]) -> None:
        """Takes over the means."""
        for what, values in self.attacked.items():
            values[index] = extras[what].to(values.dtype)

    def aggregate(self, name: str, at: Tensor, y: Tensor | None) -> RoutingLayer:
        """Means over the samples `at` and their tokens; `moves` counts tokens."""
        clean, attacked = ({what: values[at] for what, values in one.items()} for one in (self.clean, self.attacked))
        pairs = (clean["first"] * self.experts + attacked["first"]).flatten()
        moves = torch.bincount(pairs, minlength=self.experts**2).view(self.experts, self.experts)
        return RoutingLayer(
            name=name,
            iou=float(attacked["iou"].double().mean()),
            changed=float(attacked["changed"].double().mean()),
            entropy_clean=float(clean["entropy"].mean()),
            entropy_adv=float(attacked["entropy"].mean()),
            load_clean=tuple(clean["load"].mean(dim=0).tolist()),
            load_adv=tuple(attacked["load"].mean(dim=0).tolist()),
            moves=tuple(tuple(row) for row in moves.tolist()),
        )

    def choice(self, name: str, sample: int) -> ExpertChoice:
        """The first expert of each token."""
        before, after = (tuple(one["first"][sample].tolist()) for one in (self.clean, self.attacked))
        return ExpertChoice(name, before, after, per_token=True)

    def _means(self, routing: Routing, entropy: Tensor, before: Tensor) -> dict[str, Tensor]:
        """What is kept of m images whose clean selection is `before`, (m, T, E)."""
        after = routing.selected
        shared, either = (before & after).sum(dim=2), (before | after).sum(dim=2)
        return {
            "load": routing.load(),
            "entropy": entropy.mean(dim=1),
            "iou": (shared / either.clamp_min(1)).mean(dim=1),
            "changed": (before != after).any(dim=2).float().mean(dim=1),
            "first": routing.weights.argmax(dim=2),
        }

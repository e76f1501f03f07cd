"""An attack whose images are made already: judges what was crafted elsewhere, on another model for instance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from moebench.attacks._base import Attack, Oracle, Rows, State


@dataclass
class GivenState(State):
    """x: the image of the row's sample, (R, C, H, W)."""

    x: Tensor


@dataclass(frozen=True, eq=False)
class Given(Attack):
    """One look at one given image per sample.

    Args:
        name: of the stage.
        origin: where the images come from; these are the attack's parameters in the store.
        images: gives the images (N, C, H, W) of all evaluated samples; asked only when there is something to judge.
    """

    name: str
    origin: Mapping[str, Any]
    images: Callable[[], Tensor]

    @property
    @override
    def stage(self) -> str:
        return self.name

    @override
    def start(self, rows: Rows, oracle: Oracle) -> GivenState:
        return GivenState(self.images().to(rows.x.device)[rows.index])

    @override
    def step(self, state: GivenState, rows: Rows, oracle: Oracle) -> Tensor:
        oracle.logits(state.x, rows)
        return torch.ones_like(rows.index, dtype=torch.bool)

    @override
    def final(self, state: GivenState) -> Tensor:
        return state.x

    @override
    def budget(self) -> tuple[int, int]:
        return 2, 0

    @override
    def parameters(self) -> dict[str, Any]:
        return dict(self.origin)

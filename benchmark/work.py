"""What a cell works on, and what it asks of other processes that search for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moebench.attacks._base import Attack, AttackPlan
from moebench.attacks._engine import Samples
from moebench.datasets import Dataset
from moebench.schema import CellSpec, Chunk, ThreatModel

Tell = Callable[[str, int, int, int], None]
Found = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Decided:
    """Samples of one stage that were decided in another process, and their last images (m, C, H, W) if asked for."""

    chunk: Chunk
    x_adv: Tensor | None = None


@dataclass(frozen=True)
class Undecided:
    """Samples (m,) that could not be decided, and why in one line."""

    index: Tensor
    error: str


class Cluster(Protocol):
    """Other processes, which search some samples each."""

    def search(
        self,
        work: CellWork,
        stage: Attack,
        search: torch.dtype | None,
        index: Tensor,
        keep: Callable[[Sequence[Decided]], None],
    ) -> Sequence[Undecided]:
        """Has `search_samples` run on all of the samples `index` (m,), and hands over what is decided as it comes in.

        Args:
            work: model, samples, attack and view.
            stage: what to run; fitted, where it learns from data.
            search: floating type of the search's passes; None for float32.
            index: numbers of the samples.
            keep: books and commits what it is given, as one.
        Returns: what could not be decided, however often it was tried.
        """


@dataclass(frozen=True)
class CellWork:
    """What a cell needs.

    `search` gives the logits of `model` faster; the attack runs on it, success is judged on `model`. `clean_pred`
    (N,) are the whole model's predictions; `draws` are the passes averaged for a model that is random; `tell(stage,
    done, n, standing)` reports progress. `found` gives samples (m,) and adversarial images (m, C, H, W) that are known
    from a smaller radius; they are judged before any attack. `training` is what attacks that learn first are fitted on.
    `only` (N,) bool says which samples to attack, None for all: the others are left standing, and nothing is stored.
    `cluster` searches in other processes, None in this one; with `images` it brings back the images too, without them
    `CellOutcome.x_adv` keeps the clean ones.
    """

    plan: AttackPlan
    cell: CellSpec
    model: nn.Module
    search: nn.Module
    samples: Samples
    clean_pred: Tensor
    threat: ThreatModel
    batch_size: int
    tell: Tell
    draws: int = 1
    found: Found | None = None
    training: Dataset | None = None
    only: Tensor | None = None
    cluster: Cluster | None = None
    images: bool = True

"""What attacks do to the routing: selected experts, entropy and load on clean and on attacked images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moebench.attacks._passes import batches
from moebench.models._moe import Routing, join, moe_layers, route
from moebench.schema import ExpertChoice, IntArray, RoutingLayer
from moebench.token_routing import TokenTrace

Extras = dict[str, NDArray[Any]]


class Trace(Protocol):
    """Clean and attacked routing of one layer."""

    def note(self, index: Tensor, routing: Routing, entropy: Tensor) -> Extras:
        """Keeps the routing of attacked images of the samples `index`; returns it as arrays (m, …) for the store."""

    def restore(self, index: Tensor, extras: Mapping[str, Tensor]) -> None:
        """Takes over what `note` returned in an earlier process."""

    def aggregate(self, name: str, at: Tensor, y: Tensor | None) -> RoutingLayer:
        """The routing of the layer over the samples `at`; with all samples' labels y, classes are counted too."""

    def choice(self, name: str, sample: int) -> ExpertChoice:
        """The experts of one sample, clean and attacked."""


class RoutingProbe:
    """Records routing on the clean samples once, and on attacked images as they are decided.

    Args:
        model: the whole model; for one without MoE layers the probe does nothing.
        x: clean samples, (N, C, H, W).
        batch_size: samples per forward pass.
        y: labels, (N,); None where classes are not to be counted.
    """

    def __init__(self, model: nn.Module, x: Tensor, batch_size: int, y: Tensor | None = None) -> None:
        self.model = model
        self.batch_size = batch_size
        self.y = y
        self.attacked = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._layers: dict[str, Trace] = {}
        if not moe_layers(model):
            return
        for name, (routing, entropy) in self._measure(x).items():
            trace = ImageTrace if routing.weights.dim() == 2 else TokenTrace
            self._layers[name] = trace(routing, entropy)

    def look(self, x_adv: Tensor, index: Tensor) -> Extras:
        """Measures the routing on attacked images of the samples `index`; returns it as arrays (m, …) for the store."""
        if not self._layers:
            return {}
        extras: Extras = {}
        for name, (routing, entropy) in self._measure(x_adv).items():
            noted = self._layers[name].note(index, routing, entropy)
            extras |= {f"{name}/{what}": array for what, array in noted.items()}
        self.attacked[index] = True
        return extras

    def restore(self, index: IntArray, extras: Mapping[str, NDArray[Any]]) -> None:
        """Takes over what an earlier process measured."""
        device = self.attacked.device
        at = torch.from_numpy(index.copy()).to(device)
        for name, layer in self._layers.items():
            start = f"{name}/"
            own = {key.removeprefix(start): array for key, array in extras.items() if key.startswith(start)}
            if own:
                layer.restore(at, {key: torch.from_numpy(array.copy()).to(device) for key, array in own.items()})
        self.attacked[at] = True

    def layers(self) -> tuple[RoutingLayer, ...]:
        """The routing of every layer, over the samples that were attacked (those that the model gets right)."""
        at = self.attacked.nonzero().squeeze(1)
        if len(at) == 0:
            return ()
        return tuple(layer.aggregate(name, at, self.y) for name, layer in self._layers.items())

    def choices(self, sample: int) -> tuple[ExpertChoice, ...]:
        """The experts of one sample in every layer, clean and as last attacked."""
        return tuple(layer.choice(name, sample) for name, layer in self._layers.items())

    @torch.no_grad()
    def _measure(self, x: Tensor) -> dict[str, tuple[Routing, Tensor]]:
        """The routing by layer, and the entropy of the router's softmax, (B,) or (B, T)."""
        parts: dict[str, list[tuple[Routing, Tensor]]] = {}
        for batch in batches(x, self.batch_size):
            soft = route(self.model, batch, soft=True)
            for name, hard in route(self.model, batch).items():
                probs = soft[name].weights
                entropy = -(probs * probs.clamp_min(1e-30).log()).sum(dim=-1)
                parts.setdefault(name, []).append((hard, entropy))
        return {
            name: (join(*(routing for routing, _ in found)), torch.cat([entropy for _, entropy in found]))
            for name, found in parts.items()
        }


class ImageTrace:
    """Routing per image: weights (N, E), of which the selected are positive, and entropy (N,)."""

    def __init__(self, routing: Routing, entropy: Tensor) -> None:
        self.weights, self.entropy = routing.weights, entropy
        self.adv_weights, self.adv_entropy = routing.weights.clone(), entropy.clone()

    def note(self, index: Tensor, routing: Routing, entropy: Tensor) -> Extras:
        """Keeps weights and entropy; the store gets (m, E) and (m,)."""
        self.restore(index, {"weights": routing.weights, "entropy": entropy})
        return {
            "weights": routing.weights.cpu().numpy().astype(np.float32),
            "entropy": entropy.cpu().numpy().astype(np.float32),
        }

    def restore(self, index: Tensor, extras: Mapping[str, Tensor]) -> None:
        """Takes over weights and entropy."""
        self.adv_weights[index] = extras["weights"]
        self.adv_entropy[index] = extras["entropy"]

    def aggregate(self, name: str, at: Tensor, y: Tensor | None) -> RoutingLayer:
        """Means over the samples `at`."""
        before, after = self.weights[at] > 0, self.adv_weights[at] > 0
        shared, either = (before & after).sum(dim=1), (before | after).sum(dim=1)
        first, last = self.weights[at].argmax(dim=1), self.adv_weights[at].argmax(dim=1)
        experts = before.shape[1]
        return RoutingLayer(
            name=name,
            iou=float((shared / either.clamp_min(1)).mean()),
            changed=float((before != after).any(dim=1).double().mean()),
            entropy_clean=float(self.entropy[at].mean()),
            entropy_adv=float(self.adv_entropy[at].mean()),
            load_clean=tuple(self.weights[at].mean(dim=0).tolist()),
            load_adv=tuple(self.adv_weights[at].mean(dim=0).tolist()),
            moves=_counts(first, last, experts, experts),
            classes=() if y is None else _counts(y[at], first, int(y.max()) + 1, experts),
        )

    def choice(self, name: str, sample: int) -> ExpertChoice:
        """The selected experts, the one of the largest weight first."""
        return ExpertChoice(name, _selected(self.weights[sample]), _selected(self.adv_weights[sample]))


def _selected(weights: Tensor) -> tuple[int, ...]:
    order = weights.argsort(descending=True, stable=True)
    return tuple(order[weights[order] > 0].tolist())


def _counts(rows: Tensor, columns: Tensor, height: int, width: int) -> tuple[tuple[int, ...], ...]:
    """How many samples fall into each cell of a table, given their row and column (n,)."""
    table = torch.bincount(rows * width + columns, minlength=height * width).view(height, width)
    return tuple(tuple(row) for row in table.tolist())

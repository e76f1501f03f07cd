"""What attacks do to the routing: selected experts, entropy and load on clean and on attacked images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moebench.attacks._passes import batches
from moebench.models._moe import moe_layers, route
from moebench.schema import IntArray, RoutingLayer


@dataclass
class _Layer:
    """Clean and attacked routing of one layer: weights (N, E), of which the selected are positive, entropy (N,)."""

    weights: Tensor
    entropy: Tensor
    adv_weights: Tensor
    adv_entropy: Tensor


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
        self._layers: dict[str, _Layer] = {}
        if not moe_layers(model):
            return
        for name, (weights, entropy) in self._measure(x).items():
            self._layers[name] = _Layer(weights, entropy, weights.clone(), entropy.clone())

    def look(self, x_adv: Tensor, index: Tensor) -> dict[str, NDArray[Any]]:
        """Measures the routing on attacked images of the samples `index`; returns it as arrays (m, …) for the store."""
        if not self._layers:
            return {}
        extras: dict[str, NDArray[Any]] = {}
        for name, (weights, entropy) in self._measure(x_adv).items():
            self._note(name, index, weights, entropy)
            extras[f"{name}/weights"] = weights.cpu().numpy().astype(np.float32)
            extras[f"{name}/entropy"] = entropy.cpu().numpy().astype(np.float32)
        self.attacked[index] = True
        return extras

    def restore(self, index: IntArray, extras: Mapping[str, NDArray[Any]]) -> None:
        """Takes over what an earlier process measured."""
        device = self.attacked.device
        at = torch.from_numpy(index.copy()).to(device)
        for name in self._layers:
            if f"{name}/weights" in extras:
                weights = torch.from_numpy(extras[f"{name}/weights"].copy()).to(device)
                entropy = torch.from_numpy(extras[f"{name}/entropy"].copy()).to(device)
                self._note(name, at, weights, entropy)
        self.attacked[at] = True

    def layers(self) -> tuple[RoutingLayer, ...]:
        """The routing of every layer, over the samples that were attacked (those that the model gets right)."""
        at = self.attacked.nonzero().squeeze(1)
        if len(at) == 0:
            return ()
        return tuple(_aggregate(name, layer, at, self.y) for name, layer in self._layers.items())

    def _note(self, name: str, index: Tensor, weights: Tensor, entropy: Tensor) -> None:
        layer = self._layers[name]
        layer.adv_weights[index] = weights
        layer.adv_entropy[index] = entropy

    @torch.no_grad()
    def _measure(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Routing weights (B, E) and the entropy of the router's softmax (B,), by layer."""
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for batch in batches(x, self.batch_size):
            soft = route(self.model, batch, soft=True)
            for name, hard in route(self.model, batch).items():
                probs = soft[name].weights
                entropy = -(probs * probs.clamp_min(1e-30).log()).sum(dim=1)
                parts.setdefault(name, []).append((hard.weights, entropy))
        return {
            name: (torch.cat([weights for weights, _ in found]), torch.cat([entropy for _, entropy in found]))
            for name, found in parts.items()
        }


def _aggregate(name: str, layer: _Layer, at: Tensor, y: Tensor | None) -> RoutingLayer:
    before, after = layer.weights[at] > 0, layer.adv_weights[at] > 0
    shared, either = (before & after).sum(dim=1), (before | after).sum(dim=1)
    first, last = layer.weights[at].argmax(dim=1), layer.adv_weights[at].argmax(dim=1)
    experts = before.shape[1]
    return RoutingLayer(
        name=name,
        iou=float((shared / either.clamp_min(1)).mean()),
        changed=float((before != after).any(dim=1).double().mean()),
        entropy_clean=float(layer.entropy[at].mean()),
        entropy_adv=float(layer.adv_entropy[at].mean()),
        load_clean=tuple(layer.weights[at].mean(dim=0).tolist()),
        load_adv=tuple(layer.adv_weights[at].mean(dim=0).tolist()),
        moves=_counts(first, last, experts, experts),
        classes=() if y is None else _counts(y[at], first, int(y.max()) + 1, experts),
    )


def _counts(rows: Tensor, columns: Tensor, height: int, width: int) -> tuple[tuple[int, ...], ...]:
    """How many samples fall into each cell of a table, given their row and column (n,)."""
    table = torch.bincount(rows * width + columns, minlength=height * width).view(height, width)
    return tuple(tuple(row) for row in table.tolist())

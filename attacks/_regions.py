"""Which regions of a hard router an attack goes through: all of them where they are few, else the likeliest per sample.

A region is a choice of top-k experts in every MoE layer. One layer of four experts has four (top-1) or six (top-2); a
network with many layers has the product of them, far too many to try.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, product
from math import comb, prod

import torch
from torch import Tensor, nn

from moebench.models._moe import MoELayer, Tape, mixes_all, moe_layers, record, routes_tokens

MOST = 64
"""Regions per sample, at most."""

MOST_SETS = 512
"""Sets of experts that are looked at in one layer, at most."""

PART = 256
"""Samples whose routing is recorded together."""


def no_regions(model: nn.Module) -> str | None:
    """Why attacks that go through the regions of a router have nothing to do on a model; None where they have."""
    if mixes_all(model):
        return "every expert always runs, so the router has one region only"
    if routes_tokens(model):
        return (
            "every token is routed by itself, so a layer has as many regions as sets of experts to the power of the "
            "tokens"
        )
    if any(layer.barred for layer in moe_layers(model).values()):
        return "the best experts are barred, so no region of the router is that of the experts that run"
    return None


@dataclass(frozen=True)
class Regions:
    """The regions to try, by number.

    Attributes:
        masks: experts of each region in each layer, {layer: (S, R, E) bool}; S is 1 where all samples share the list,
            else the number of samples.
        count: R.
    """

    masks: Mapping[str, Tensor]
    count: int

    def selected(self, layer: str, index: Tensor, region: Tensor) -> Tensor:
        """The experts of region `region` (R,) of the samples `index` (R,), as (R, E) bool."""
        masks = self.masks[layer]
        return masks[index, region] if len(masks) > 1 else masks[0, region]


def list_regions(model: nn.Module, x: Tensor) -> Regions:
    """All regions of a model in the order of their experts, or up to `MOST` per sample where there are more.

    The choice per sample starts from the router's softmax at the clean image, in the order of the log-probability that
    a region's experts have in sum over the layers:

    1. the route of the clean image;
    2. expert i in every layer, for the likeliest i (with k > 1: i and the k - 1 likeliest others); up to a quarter;
    3. another set of experts in one layer only; up to a half;
    4. the likeliest regions of all, until the list is full.

    Later layers' probabilities are those on the clean route; what they are on another one is seen by the attack only.

    Args:
        model: in eval mode.
        x: clean images of all samples, (N, C, H, W).
    """
    layers = moe_layers(model)
    if prod(comb(len(layer.experts), layer.top_k) for layer in layers.values()) <= MOST:
        return _all_regions(layers, x.device)
    with torch.no_grad():
        # At least one part, so that no sample makes an empty table of the right width.
        parts = [x[start : start + PART] for start in range(0, max(len(x), 1), PART)]
        table = torch.cat([_likeliest_regions(layers, record(model, part, soft=True)) for part in parts]).bool()
    masks, column = {}, 0
    for name, layer in layers.items():
        masks[name] = table[:, :, column : column + len(layer.experts)]
        column += len(layer.experts)
    return Regions(masks, MOST)


def _all_regions(layers: Mapping[str, MoELayer], device: torch.device) -> Regions:
    choices = [list(combinations(range(len(layer.experts)), layer.top_k)) for layer in layers.values()]
    regions = list(product(*choices))
    masks = {
        name: torch.stack([_mask(region[place], len(layer.experts)) for region in regions]).unsqueeze(0).to(device)
        for place, (name, layer) in enumerate(layers.items())
    }
    return Regions(masks, len(regions))


def _mask(experts: tuple[int, ...], count: int) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(experts)] = True
    return mask


def _likeliest_regions(layers: Mapping[str, MoELayer], tape: Tape) -> Tensor:
    """`MOST` different regions per sample, (B, MOST, D): a 0/1 column for each expert of each layer."""
    logs = [tape[name].weights.clamp_min(1e-30).log() for name in layers]
    sets = [_sets(log, layer.top_k) for log, layer in zip(logs, layers.values(), strict=True)]
    own = [masks[:, :1] for masks, _ in sets]
    found = torch.cat(
        (
            torch.cat(own, dim=2),
            _everywhere(logs, [layer.top_k for layer in layers.values()], own)[:, : MOST // 4],
            _one_layer_changed(sets, own)[:, : MOST // 2],
            _likeliest(sets),
        ),
        dim=1,
    )
    # All regions select equally many experts, so two are the same if they share that many.
    same = (found @ found.transpose(1, 2)) == sum(layer.top_k for layer in layers.values())
    seen_before = same.tril(diagonal=-1).any(dim=2)
    order = seen_before.long().argsort(dim=1, stable=True)[:, :MOST]
    return _rows(found, order)


def _sets(log: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Sets of k experts of one layer, likeliest first: 0/1 (B, S, E), and their log-probability in sum, (B, S)."""
    experts = log.shape[1]
    width = max(w for w in range(top_k, experts + 1) if w == top_k or comb(w, top_k) <= MOST_SETS)
    ranks = log.argsort(dim=1, descending=True, stable=True)
    places = torch.tensor(list(combinations(range(width), top_k)), device=log.device)
    members = ranks[:, places]
    scores = log.gather(1, members.flatten(1)).view(members.shape).sum(dim=2)
    order = scores.argsort(dim=1, descending=True, stable=True)
    masks = torch.zeros(*members.shape[:2], experts, device=log.device).scatter_(2, members, 1.0)
    return _rows(masks, order), scores.gather(1, order)


def _everywhere(logs: list[Tensor], top_ks: list[int], own: list[Tensor]) -> Tensor:
    """Expert i in every layer that has one, the likeliest i first, (B, max E, D)."""
    regions, scores = [], []
    for expert in range(max(log.shape[1] for log in logs)):
        parts, total = [], torch.zeros_like(logs[0][:, 0])
        for log, top_k, mine in zip(logs, top_ks, own, strict=True):
            mask = mine[:, 0]
            if expert < log.shape[1]:
                wanted = log.clone()
                wanted[:, expert] = float("inf")
                mask = torch.zeros_like(log).scatter_(1, wanted.topk(top_k, dim=1).indices, 1.0)
            parts.append(mask)
            total = total + (mask * log).sum(dim=1)
        regions.append(torch.cat(parts, dim=1))
        scores.append(total)
    order = torch.stack(scores, dim=1).argsort(dim=1, descending=True, stable=True)
    return _rows(torch.stack(regions, dim=1), order)


def _one_layer_changed(sets: list[tuple[Tensor, Tensor]], own: list[Tensor]) -> Tensor:
    """The clean route with another set in one layer, the likeliest first, (B, n, D)."""
    regions, losses = [], []
    for place, (masks, scores) in enumerate(sets):
        others = masks[:, 1 : MOST // 2 + 1]
        parts = [others if at == place else mine.expand(-1, others.shape[1], -1) for at, mine in enumerate(own)]
        regions.append(torch.cat(parts, dim=2))
        losses.append(scores[:, :1] - scores[:, 1 : MOST // 2 + 1])
    return _rows(torch.cat(regions, dim=1), torch.cat(losses, dim=1).argsort(dim=1, stable=True))


def _likeliest(sets: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The `MOST` regions of highest log-probability in sum, (B, MOST, D); exact, for the sum keeps the order."""
    regions, total = sets[0][0][:, :MOST], sets[0][1][:, :MOST]
    for masks, scores in sets[1:]:
        count, width = total.shape[1], scores.shape[1]
        sums = (total.unsqueeze(2) + scores.unsqueeze(1)).flatten(1)
        best = sums.argsort(dim=1, descending=True, stable=True)[:, :MOST]
        assert best.shape[1] <= count * width
        regions = torch.cat((_rows(regions, best // width), _rows(masks, best % width)), dim=2)
        total = sums.gather(1, best)
    return regions


def _rows(table: Tensor, order: Tensor) -> Tensor:
    """Entries `order` (B, n) of a table (B, m, D), each sample's own."""
    return table.gather(1, order.unsqueeze(2).expand(-1, -1, table.shape[2]))

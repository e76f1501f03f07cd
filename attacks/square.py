"""Square Attack: random search over square patches, without gradients.

Andriushchenko, Croce, Flammarion and Hein, "Square Attack: a query-efficient black-box adversarial attack via random
search", ECCV 2020 (arXiv 1912.00049), algorithms 1 to 3, with the margin loss and AutoAttack's schedule.

Differs from the authors' code: every sample draws its own patches (there all samples of a batch share them, so that a
verdict depends on the batch). As there, a patch smaller than the image never touches the last row and column, unless
`whole_image` is set: on 8×8 images those are a fifth of the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from typing_extensions import override

from moebench.attacks._base import Attack, Oracle, Rows, State, register_attack
from moebench.attacks._losses import margin
from moebench.attacks._projections import expand, l2_norm, project
from moebench.attacks._random import uniform
from moebench.schema import PaperCard, ThreatModel

ANDRIUSHCHENKO_2020 = PaperCard(
    title="Square Attack: a query-efficient black-box adversarial attack via random search",
    authors="Maksym Andriushchenko, Francesco Croce, Nicolas Flammarion, Matthias Hein",
    venue="ECCV",
    year=2020,
    arxiv="1912.00049",
    bibtex="""@inproceedings{andriushchenko2020square,
  title = {Square Attack: a query-efficient black-box adversarial attack via random search},
  author = {Andriushchenko, Maksym and Croce, Francesco and Flammarion, Nicolas and Hein, Matthias},
  booktitle = {European Conference on Computer Vision},
  year = {2020}
}""",
)

_BENDS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


_MOST_AHEAD = 32
_EXPECTED = 0.3
"""Acceptances to be expected in one round of proposals made ahead: about half of it is the share made in vain."""
_MOST_WASTE = 0.25
"""Proposals made in vain, at most, as a share of those that count."""


@dataclass
class SquareState(State):
    """Per-row state.

    Attributes:
        x: the best image so far.
        loss: its margin.
        queries: proposals made that count.
        wasted: proposals made in vain.
        rate: share of proposals kept of late.
    """

    x: Tensor
    loss: Tensor
    queries: Tensor
    wasted: Tensor
    rate: Tensor


@dataclass(frozen=True)
class Square(Attack):
    """Random search that keeps a proposal where it raises the margin.

    Args:
        queries: proposals per sample.
        p_init: share of the pixels that the first patches cover; halved at fixed numbers of queries.
        whole_image: let patches reach the last row and column, which the published code leaves out.
    """

    queries: int = 5000
    p_init: float = 0.8
    whole_image: bool = False

    @property
    @override
    def stage(self) -> str:
        return "square"

    @override
    def start(self, rows: Rows, oracle: Oracle) -> SquareState:
        threat = oracle.threat
        x = _stripes(rows, threat) if threat.norm == "Linf" else _tiles(rows, threat)
        loss = margin(oracle.logits(x, rows), rows)
        none = torch.zeros(len(rows), dtype=torch.int64, device=x.device)
        return SquareState(x, loss, none, none.clone(), torch.ones_like(loss))

    @override
    def step(self, state: SquareState, rows: Rows, oracle: Oracle) -> Tensor:
        """Makes the next proposals of each row, several where places are free, and keeps the first that is better.

        Most proposals are turned down, and the one after a proposal that is turned down does not depend on it. So the
        next few can be tried in one pass; what follows the first better one is void and is proposed anew from there.
        """
        left = self.queries - state.queries
        ahead = self._ahead(state, int(left.max()), oracle.room)
        row = torch.arange(len(rows), device=left.device).repeat_interleave(ahead)
        number = torch.arange(ahead, device=left.device)
        many = rows.take(row)
        queries = (state.queries.unsqueeze(1) + number).flatten()
        x_new = self._propose(state.x[row], queries, many, oracle.threat)
        logits = oracle.logits(x_new, many, propose=False)
        loss = margin(logits, many).view(-1, ahead)
        better = (loss > state.loss.unsqueeze(1)) & (number < left.unsqueeze(1))
        kept = better.any(dim=1)
        used = torch.where(kept, better.int().argmax(dim=1) + 1, left.clamp_max(ahead))
        risen = kept.nonzero().squeeze(1)
        if len(risen) > 0:
            at = risen * ahead + used[risen] - 1
            oracle.propose(x_new[at], rows.take(risen), logits[at])
            state.x = state.x.index_copy(0, risen, x_new[at])
            state.loss = state.loss.index_copy(0, risen, loss.flatten()[at])
        state.queries = state.queries + used
        state.wasted = state.wasted + ahead - used
        memory = 0.98**used
        state.rate = memory * state.rate + (1 - memory) * kept / used
        return state.queries >= self.queries

    def _ahead(self, state: SquareState, left: int, room: int) -> int:
        """Proposals per row in the next pass: what fits, as long as few of them are likely to be made in vain."""
        spare = (_MOST_WASTE * state.queries - state.wasted).amin()
        spare_now, rate = torch.stack((spare, state.rate.mean())).tolist()
        worthwhile = _EXPECTED / max(rate, 1e-6)
        return max(1, min(room // len(state.x), int(worthwhile), 1 + int(spare_now), left, _MOST_AHEAD))

    def _propose(self, x: Tensor, queries: Tensor, rows: Rows, threat: ThreatModel) -> Tensor:
        smallest = 1 if threat.norm == "Linf" else 3
        sides = patch_sides(self.queries, self.p_init, smallest, x.shape[2], x.shape[3], x.device)
        patches = _Patches(sides[queries.clamp_max(self.queries - 1)], self.whole_image)
        propose = _propose_linf if threat.norm == "Linf" else _propose_l2
        return propose(x, queries, rows, patches, threat)

    @override
    def budget(self) -> tuple[int, int]:
        return int((1 + _MOST_WASTE) * self.queries) + 2, 0

    @override
    def final(self, state: SquareState) -> Tensor:
        return state.x


@lru_cache(maxsize=16)
def patch_sides(queries: int, p_init: float, smallest: int, height: int, width: int, device: torch.device) -> Tensor:
    """Side of the patch at every query, (queries,): sqrt(p · pixels), with p halved at 10, 50, 200, 500, … queries.

    L2 patches (`smallest` 3) have odd sides.
    """
    sides = []
    for query in range(queries):
        p = p_init / 2 ** sum(query > bend for bend in _BENDS)
        side = max(round(math.sqrt(p * height * width)), smallest)
        if smallest == 3 and side % 2 == 0:
            side += 1
        sides.append(min(side, height, width))
    return torch.tensor(sides, device=device)


def _stripes(rows: Rows, threat: ThreatModel) -> Tensor:
    """Vertical stripes of ±eps, one sign per channel and column."""
    batch, channels, _, width = rows.x.shape
    signs = torch.where(uniform(rows.key, 0, channels * width) < 0.5, -1.0, 1.0).view(batch, channels, 1, width)
    return project(rows.x + threat.eps * signs, rows.x, threat)


@dataclass(frozen=True)
class _Patches:
    """How large each row's patches are, (R,), and whether they may touch the last row and column."""

    sides: Tensor
    whole_image: bool


def _patch(u: Tensor, patches: _Patches, height: int, width: int) -> Tensor:
    """Masks of square patches at random places, (R, 1, H, W) bool, from two uniform numbers per row."""
    sides, extra = patches.sides, int(patches.whole_image)
    top = (u[:, 0] * (height - sides + extra)).long()
    left = (u[:, 1] * (width - sides + extra)).long()
    y = torch.arange(height, device=u.device)
    x = torch.arange(width, device=u.device)
    inside_y = (y >= top.unsqueeze(1)) & (y < (top + sides).unsqueeze(1))
    inside_x = (x >= left.unsqueeze(1)) & (x < (left + sides).unsqueeze(1))
    return (inside_y.unsqueeze(2) & inside_x.unsqueeze(1)).unsqueeze(1)


def _propose_linf(x: Tensor, queries: Tensor, rows: Rows, patches: _Patches, threat: ThreatModel) -> Tensor:
    """Algorithm 2: a patch of ±2 eps per channel, projected back to the ball."""
    batch, channels, height, width = rows.x.shape
    u = uniform(rows.key, queries + 1, 2 + channels)
    signs = torch.where(u[:, 2:] < 0.5, -1.0, 1.0).view(batch, channels, 1, 1)
    patch = _patch(u, patches, height, width)
    return project(x + patch * (2 * threat.eps * signs), rows.x, threat)


def _tiles(rows: Rows, threat: ThreatModel) -> Tensor:
    """A grid of pyramids with random signs, scaled to norm eps: the start for L2."""
    batch, channels, height, width = rows.x.shape
    side = max(min(height, width) // 5, 1)
    down, across = height // side, width // side
    u = uniform(rows.key, 0, (channels + 1) * down * across).view(batch, channels + 1, down, across)
    delta = torch.zeros_like(rows.x)
    upright = pyramid(side, rows.x.device)
    for row in range(down):
        for column in range(across):
            turned = (u[:, -1, row, column] > 0.5).view(-1, 1, 1, 1)
            tile = torch.where(turned, upright.t(), upright)
            signs = torch.where(u[:, :-1, row, column] < 0.5, -1.0, 1.0).view(batch, channels, 1, 1)
            delta[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side] = tile * signs
    return _on_sphere(delta, rows, threat)


def _propose_l2(x: Tensor, queries: Tensor, rows: Rows, patches: _Patches, threat: ThreatModel) -> Tensor:
    """Algorithm 3: moves the budget of a second patch, and what is left of eps, into a first one."""
    batch, channels, height, width = rows.x.shape
    u = uniform(rows.key, queries + 1, 5 + channels)
    delta = x - rows.x
    first, second = _patch(u[:, 0:2], patches, height, width), _patch(u[:, 2:4], patches, height, width)
    spent = delta.square().sum(dim=(1, 2, 3), keepdim=True)
    budget = (threat.eps**2 - spent).clamp_min(0.0) / channels
    budget = budget + (delta * (first | second)).square().sum(dim=(2, 3), keepdim=True)
    inside = delta * first
    old = inside / (inside.square().sum(dim=(2, 3), keepdim=True).sqrt() + 1e-12)
    signs = torch.where(u[:, 5:] < 0.5, -1.0, 1.0).view(batch, channels, 1, 1)
    fresh = _pyramids_in(first, patches.sides, u[:, 4] > 0.5) * signs + old
    fresh = fresh / (fresh.square().sum(dim=(2, 3), keepdim=True).sqrt() + 1e-12) * budget.sqrt()
    return _on_sphere(torch.where(first, fresh, torch.where(second, torch.zeros_like(delta), delta)), rows, threat)


def _pyramids_in(patch: Tensor, sides: Tensor, turned: Tensor) -> Tensor:
    """Places a pyramid of the patch's side into each patch, (R, 1, H, W)."""
    out = torch.zeros(patch.shape, device=patch.device)
    for side, chosen in _groups(sides):
        upright = pyramid(side, patch.device)
        tiles = torch.where(turned[chosen].view(-1, 1, 1), upright.t(), upright)
        full = out[chosen]
        full[patch[chosen]] = tiles.reshape(-1)
        out[chosen] = full
    return out


def _groups(sides: Tensor) -> Iterator[tuple[int, Tensor]]:
    for side in sorted(set(sides.tolist())):
        yield side, (sides == side).nonzero().squeeze(1)


@lru_cache(maxsize=64)
def pyramid(side: int, device: torch.device) -> Tensor:
    """The L2 update: two stepped pyramids of opposite sign, one above the other, with norm 1, (side, side)."""
    half = side // 2
    parts = ([_steps(half, side)] if half > 0 else []) + [-_steps(side - half, side)]
    whole = torch.cat([part / part.square().sum().sqrt() for part in parts])
    return (whole / whole.square().sum().sqrt()).to(device)


def _steps(height: int, width: int) -> Tensor:
    """Concentric rectangles whose heights add up as 1 / k²."""
    middle_y, middle_x = height // 2, width // 2
    out = torch.zeros(height, width)
    for ring in range(max(middle_y, middle_x) + 1):
        top, left = middle_y - ring, middle_x - ring
        out[max(top, 0) : min(top + 2 * ring + 1, height), max(left, 0) : min(left + 2 * ring + 1, width)] += (
            1 / (ring + 1) ** 2
        )
    return out


def _on_sphere(delta: Tensor, rows: Rows, threat: ThreatModel) -> Tensor:
    scaled = delta * expand(threat.eps / l2_norm(delta).clamp_min(1e-12), delta)
    return (rows.x + scaled).clamp(threat.lower, threat.upper)


@register_attack("square", summary="Square Attack, 5000 queries, no gradients", paper=ANDRIUSHCHENKO_2020)
@register_attack(
    "square-whole",
    summary="Square Attack whose patches reach the last row and column too",
    settings={"whole_image": True},
    paper=ANDRIUSHCHENKO_2020,
)
def square(*, queries: int = 5000, whole_image: bool = False) -> tuple[Attack, ...]:
    """Random search over square patches."""
    return (Square(queries=queries, whole_image=whole_image),)

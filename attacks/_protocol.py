"""Published evaluation protocols: a search with the defects of a paper's code, scored by that code's own rule.

A protocol is no attack of ours. The engine judges every image that an attack looks at and accepts those inside the
threat model; here the rule of the published code decides, whatever it overlooks and whatever it lets pass. So these
stages do not run in the engine, and what they give is never counted as robust accuracy (`schema.is_protocol`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from moebench.attacks._base import Attack, Loss, Oracle, Rows, State
from moebench.attacks._engine import Finished, Samples, Sink
from moebench.attacks._losses import cross_entropy
from moebench.attacks._passes import Passes, batches
from moebench.attacks._projections import ascend, project, random_start
from moebench.attacks._random import sample_keys
from moebench.errors import RunError
from moebench.models._moe import MoELayer, Policy, Routing, moe_layers, routed_by, routes_tokens
from moebench.schema import ThreatModel

Start = Literal["constant", "random", "clean"]
Score = Literal["final", "stale", "any"]
Mode = Literal["eval", "train"]


@dataclass
class WalkState(State):
    """x: the current image; step: updates made."""

    x: Tensor
    step: Tensor


@dataclass(frozen=True)
class Walk(Attack):
    """PGD as papers' code writes it: the update and nothing else. Switched to the textbook, it is `pgd`.

    Args:
        steps: updates.
        step_fraction: step size as a fraction of eps.
        start: "random" in the ball, the "clean" image, or "constant": every pixel at the lower end of the ball. That is
            where noise ends that is normalised like an image, (noise - mean) / std, and then projected; the first of
            the steps is spent on getting there, and its gradient changes nothing, so none is computed.
        project: back into the ball after each update.
        clip: back into the range of pixels after each update and at the start.
    """

    steps: int
    step_fraction: float = 0.25
    start_at: Start = "random"
    project: bool = True
    clip: bool = True

    @property
    @override
    def stage(self) -> str:
        # The name of PGD's random stream, so that both start at the same point.
        return "pgd"

    @override
    def start(self, rows: Rows, oracle: Oracle) -> WalkState:
        x, threat = rows.x, oracle.threat
        if self.start_at == "random":
            x = random_start(x, rows.key, threat if self.clip else _open_box(threat))
        elif self.start_at == "constant":
            x = x - threat.eps
            x = x.clamp(threat.lower, threat.upper) if self.clip else x
        return WalkState(x.clone(), torch.full_like(rows.index, int(self.start_at == "constant")))

    @override
    def step(self, state: WalkState, rows: Rows, oracle: Oracle) -> Tensor:
        going = state.step < self.steps
        if bool(going.any()):
            _, _, gradient = oracle.gradient(state.x, rows, cross_entropy)
            threat = oracle.threat
            moved = ascend(state.x, gradient, self.step_fraction * threat.eps, threat)
            moved = self._bounded(moved, rows.x, threat)
            state.x = torch.where(going.view(-1, 1, 1, 1), moved, state.x)
            state.step = state.step + 1
        return state.step >= self.steps

    @override
    def final(self, state: WalkState) -> Tensor:
        return state.x

    @override
    def budget(self) -> tuple[int, int]:
        return self.steps, self.steps

    @override
    def parameters(self) -> dict[str, Any]:
        found = asdict(self)
        return {"start": found.pop("start_at"), **found}

    def _bounded(self, x_adv: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
        if self.project:
            return project(x_adv, x, threat if self.clip else _open_box(threat))
        return x_adv.clamp(threat.lower, threat.upper) if self.clip else x_adv


def _open_box(threat: ThreatModel) -> ThreatModel:
    return replace(threat, lower=-inf, upper=inf)


@dataclass(frozen=True)
class Protocol(Attack):
    """A search, how its gradients are computed, and what counts as robust.

    Args:
        name: of the protocol, without its prefix.
        search: the program that moves the images.
        fp16: passes under float16 autocast, predictions too.
        batch: the loss of an image is divided by this, as a mean over a batch does; 1 is the sum.
        loss_scale: factor on the loss before the backward pass, taken back after it.
        score: "final" counts the prediction on the last image alone, "stale" that of the last forward pass of the
            search, before its last update; "any" counts a sample as broken by any image on the way.
        mode: "train" keeps the network in train mode while it is attacked. Samples then depend on each other: blocks of
            `batch` samples in the order of the data. Predictions that count are made in eval mode.
        router_weight: weight of the router's cross-entropy towards the class label modulo the number of experts.
        straight_through: the chosen expert's weight has the gradient of its softmax probability.
    """

    name: str
    search: Attack
    fp16: bool = False
    batch: int = 1
    loss_scale: int = 1
    score: Score = "final"
    mode: Mode = "eval"
    router_weight: float = 0.0
    straight_through: bool = False

    @property
    @override
    def stage(self) -> str:
        return self.name

    @override
    def unfit(self, model: nn.Module) -> str | None:
        if self.router_weight == 0 and not self.straight_through:
            return None
        if not moe_layers(model):
            return "its loss is about a router, and a dense model has none"
        if routes_tokens(model):
            return "its loss is one of the routing of whole images, and this model routes each token of an image"
        return None

    @override
    def parameters(self) -> dict[str, Any]:
        """The settings of the protocol and of its search side by side."""
        own = ("fp16", "batch", "loss_scale", "score", "mode", "router_weight", "straight_through")
        return {**{key: getattr(self, key) for key in own}, **self.search.parameters()}

    @override
    def budget(self) -> tuple[int, int]:
        forwards, backwards = self.search.budget()
        # One more pass where search and score see the model in different modes.
        return forwards * (2 if self.mode == "train" and self.score != "final" else 1) + 1, backwards

    @override
    def start(self, rows: Rows, oracle: Oracle) -> State:
        self._elsewhere()

    @override
    def step(self, state: Any, rows: Rows, oracle: Oracle) -> Tensor:
        self._elsewhere()

    @override
    def final(self, state: Any) -> Tensor:
        self._elsewhere()

    def _elsewhere(self) -> NoReturn:
        raise RunError(f"the protocol {self.name} is scored by its own rule; `run_protocol` runs it")


class Witness(Oracle):
    """What the search of a protocol may ask, computed as the published code does; remembers what was predicted.

    Attributes:
        hit, hit_pred, hit_x: (N,), (N,), (N, C, H, W): samples for which an image on the way was wrong, with the first.
        last: (N,) prediction of the last forward pass.
    """

    def __init__(self, protocol: Protocol, model: nn.Module, samples: Samples, threat: ThreatModel) -> None:
        self.protocol = protocol
        self.threat = threat
        self.samples = samples
        self.model = model
        self.attacked = model
        self.passes = Passes(len(samples), samples.x.device)
        self.passes.search_type = torch.float16 if protocol.fp16 else None
        self.hit = torch.zeros(len(samples), dtype=torch.bool, device=samples.x.device)
        self.hit_pred = samples.y.clone()
        self.hit_x = samples.x.clone()
        self.last = samples.y.clone()

    @property
    @override
    def room(self) -> int:
        return len(self.samples)

    @property
    @override
    def repeatable(self) -> bool:
        # A search must not stop early: the published ones do not.
        return False

    @override
    def logits(self, x: Tensor, rows: Rows, *, propose: bool = True) -> Tensor:
        out = self.passes.logits(lambda x, rows: self._see(self.attacked, x), x, rows)
        self._note(x, rows, out)
        return out

    @override
    def propose(self, x: Tensor, rows: Rows, logits: Tensor) -> None:
        return

    @override
    def gradient(self, x: Tensor, rows: Rows, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        factor = self.protocol.loss_scale / self.protocol.batch
        weight = self.protocol.router_weight

        def scaled(out: Tensor, rows: Rows) -> Tensor:
            value = loss(out[:, :-1], rows) + weight * out[:, -1] if weight > 0 else loss(out, rows)
            return value * factor

        out, value, gradient = self.passes.gradient(self._with_router, x, rows, scaled)
        out = out[:, :-1] if weight > 0 else out
        self._note(x, rows, out)
        # An overflow of float16 moves nothing; without this it would make an image of NaN, and that a success.
        return out, value / factor, gradient.nan_to_num(nan=0.0)

    def predict(self, x: Tensor, rows: Rows) -> Tensor:
        """The prediction (R,) that counts: in eval mode, in the precision of the protocol."""
        return self.passes.logits(lambda x, rows: self._see(self.model, x), x, rows).argmax(dim=1)

    def _note(self, x: Tensor, rows: Rows, out: Tensor) -> None:
        if self.protocol.score == "final":
            return
        prediction = out.argmax(dim=1) if self.attacked is self.model else self.predict(x, rows)
        self.last[rows.index] = prediction
        new = ((prediction != rows.y) & ~self.hit[rows.index]).nonzero().squeeze(1)
        at = rows.index[new]
        self.hit[at], self.hit_pred[at], self.hit_x[at] = True, prediction[new], x[new].detach()

    @staticmethod
    def _see(model: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = model(x)
        return out

    def _with_router(self, x: Tensor, rows: Rows) -> Tensor:
        """Logits (R, K), and in a last column the router's cross-entropy where the loss asks for it."""
        protocol, losses = self.protocol, []
        if protocol.router_weight == 0 and not protocol.straight_through:
            return self._see(self.attacked, x)

        def policy(layer: MoELayer, features: Tensor) -> Routing:
            probs = layer.probabilities(features)
            if len(probs) != len(rows):
                raise RunError("the router's loss is one of whole images, and this model routes parts of an image")
            losses.append(F.nll_loss(probs.float().clamp_min(1e-30).log(), rows.y % probs.shape[1], reduction="none"))
            own = layer.own_routing(features)
            if not protocol.straight_through or layer.top_k > 1:
                return own
            kept = probs * own.selected
            return Routing(own.weights + kept - kept.detach(), own.selected)

        policies: dict[str, Policy] = dict.fromkeys(moe_layers(self.attacked), policy)
        with routed_by(self.attacked, policies):
            out = self._see(self.attacked, x)
        if protocol.router_weight == 0:
            return out
        # The published model decides once per image; of several decisions, the mean counts.
        return torch.cat((out.float(), torch.stack(losses).mean(dim=0).unsqueeze(1)), dim=1)


def run_protocol(
    protocol: Protocol,
    model: nn.Module,
    samples: Samples,
    threat: ThreatModel,
    index: Tensor,
    sink: Sink,
    *,
    batch_size: int,
    seed: int,
) -> None:
    """Runs a protocol on the samples `index` (m,) and hands each over once, right or wrong by the protocol's rule.

    Args:
        protocol: what to run.
        model: the whole model, in eval mode; it is left as it is.
        samples: all samples of the evaluation.
        threat: radius and box that the search is told.
        index: numbers of the samples to attack, ascending.
        sink: receives block after block. `broken` is the rule's verdict, images may be invalid.
        batch_size: samples side by side in eval mode, where it changes nothing.
        seed: of the random starts.
    """
    witness = Witness(protocol, model, samples, threat)
    for number, block in _blocks(protocol, len(samples), index, batch_size):
        begin = time.perf_counter()
        witness.passes.forwards[block] = 0
        witness.passes.backwards[block] = 0
        none = torch.full_like(block, -1)
        key = sample_keys(seed, f"{protocol.search.stage}/0", samples.ids[block])
        rows = Rows(block, samples.x[block], samples.y[block], none, key, torch.zeros_like(block))
        final = _searched(protocol, rows, witness, seed + number)
        broken, prediction, x_adv = _score(protocol.score, final, rows, witness)
        wanted = torch.isin(block, index)
        at = block[wanted]
        passes = (witness.passes.forwards[at], witness.passes.backwards[at])
        seconds = time.perf_counter() - begin
        sink(Finished(at, broken[wanted], prediction[wanted], x_adv[wanted], *passes, seconds))


def _blocks(protocol: Protocol, count: int, index: Tensor, batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """Samples that run together: any in eval mode, in train mode always the same ones, whatever is asked for."""
    if protocol.mode == "eval":
        yield from enumerate(batches(index, batch_size))
        return
    everything = torch.arange(count, device=index.device)
    for number, block in enumerate(batches(everything, protocol.batch)):
        if bool(torch.isin(block, index).any()):
            yield number, block


def _searched(protocol: Protocol, rows: Rows, witness: Witness, seed: int) -> Tensor:
    """The images that the search ends with. Gate noise and dropout of train mode are drawn from `seed`."""
    devices = [rows.x.device.index or 0] if rows.x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        if protocol.mode == "train":
            # Every block meets the network as it was trained.
            witness.attacked = copy.deepcopy(witness.model).train()
        state: Any = protocol.search.start(rows, witness)
        while not bool(protocol.search.step(state, rows, witness).all()):
            pass
        return protocol.search.final(state)


def _score(score: Score, final: Tensor, rows: Rows, witness: Witness) -> tuple[Tensor, Tensor, Tensor]:
    """Which samples the rule calls wrong, (R,) bool, with predictions (R,) and images (R, C, H, W)."""
    if score == "stale":
        prediction = witness.last[rows.index]
        return prediction != rows.y, prediction, final
    prediction = witness.predict(final, rows)
    broken = prediction != rows.y
    if score == "any":
        hit = witness.hit[rows.index]
        prediction = torch.where(hit, witness.hit_pred[rows.index], prediction)
        final = torch.where(hit.view(-1, 1, 1, 1), witness.hit_x[rows.index], final)
        broken = broken | hit
    return broken, prediction, final

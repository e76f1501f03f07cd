"""What a full evaluation costs on GPUs: a model of it, from FLOPs and passes; nothing is run and nothing is measured.

`python -m moebench.scale` prints the table of docs/scale.md: V-MoE-B/16 on ImageNet's 50,000 validation images under
suite v1. Work is the sum over all (attack, view) pairs of passes per image times FLOPs per pass:

- FLOPs by torch's counter on the meta device, forward, and backward to the image alone (no gradients of weights);
- passes per image at most by the attacks' own bounds, and about by the share of the bound that stored results of
  adversarially trained models have spent, stage by stage;
- speed by the peak of a GPU's data sheet and the share of it that is kept up, both assumptions that options change.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moebench.attacks import AttackPlan, load_attack
from moebench.attacks._training import TrainedAttack
from moebench.attacks._views import default_views
from moebench.cells import most_passes
from moebench.datasets import load_dataset
from moebench.errors import MoebenchError, UsageError
from moebench.models._vit import VisionTransformer
from moebench.models.v_moe import TokenMoE, v_moe
from moebench.schema import SUITE_VERSION, SUITES, WHOLE_ONLY, StoredResult
from moebench.store import Store

PEAKS: Mapping[str, tuple[float, str]] = {
    "a100": (19.5, "NVIDIA A100 80GB data sheet, FP32 outside of tensor cores"),
    "a100-tf32": (156.0, "NVIDIA A100 80GB data sheet, TF32 on tensor cores, dense"),
    "h100": (67.0, "NVIDIA H100 SXM data sheet, FP32 outside of tensor cores"),
    "h100-tf32": (494.5, "NVIDIA H100 SXM data sheet, TF32 on tensor cores, half of the figure with sparsity"),
}
"""Peak TFLOP/s by GPU and kind of arithmetic, and where the figure is from. Attacks search in float32."""

UTILISATION = 0.5
"""Share of the peak that is kept up, an assumption."""

IMAGENET, TRAINING_IMAGES = 50_000, 10_000
"""Validation images that are attacked, and training images that universal perturbations are made on."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one image: forward, and backward to the image alone."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Line:
    """One attack on one view: passes per image, at most and about, in units of forward FLOPs of the whole model."""

    attack: str
    view: str
    at_most: float
    about: float


class _Counted(nn.Module):
    """In place of an MoE layer: its router, and as many experts on every token as each token has."""

    def __init__(self, layer: TokenMoE, experts: int) -> None:
        super().__init__()
        self.router = layer.router
        self.experts = nn.ModuleList(layer.experts[:experts])

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, hidden) to the same shape."""
        weight = self.router(x).softmax(dim=-1)
        return torch.stack([expert(x) * weight[..., :1] for expert in self.experts]).sum(dim=0)


def count_flops(size: str, side: int, classes: int, *, dense: bool = False) -> Flops:
    """FLOPs of a V-MoE with 8 experts in every second block, K = 2, by torch's counter on the meta device.

    Each token runs K experts, whichever these are, so K experts on all tokens count the same; `dense` runs all of them,
    as soft routing does.

    Args:
        size: such as "B/16".
        side: of the images, in pixels.
        classes: of the data set.
        dense: every expert runs.
    """
    with torch.device("meta"):
        model = v_moe(classes, (3, side, side), size=size, experts=8, where="every-2")
        assert isinstance(model, VisionTransformer)
        replace_layers(model, dense=dense)
        model.eval().requires_grad_(False)
        x = torch.zeros(1, 3, side, side, requires_grad=True)
        return measured_flops(model, x)


def replace_layers(model: nn.Module, *, dense: bool = False) -> None:
    """Puts layers without data-dependent dispatch where the MoE layers are; the logits lose their meaning."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, TokenMoE):
                setattr(module, name, _Counted(child, len(child.experts) if dense else child.top_k))


def measured_flops(model: nn.Module, x: Tensor) -> Flops:
    """FLOPs of the passes of one image x (1, C, H, W) that wants a gradient."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            out = model(x * 1.0)  # the counter's hooks do not take a leaf
            forward = counter.get_total_flops()
            torch.autograd.grad(out.sum(), x)
        return Flops(int(forward), int(counter.get_total_flops() - forward))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def passes(size: str, side: int, classes: int, suite: str, stored: Sequence[StoredResult], images: int) -> list[Line]:
    """What a suite's attacks cost per image, in forward passes of the whole model's FLOPs.

    Args:
        size: such as "B/16".
        side: of the images, in pixels.
        classes: of the data set.
        suite: its version.
        stored: results whose stages say which share of the bound is spent.
        images: over how many the making of a universal perturbation is shared out.
    """
    one = count_flops(size, side, classes)
    factor = _factors(one, count_flops(size, side, classes, dense=True))
    back = one.backward / one.forward
    with torch.device("meta"):
        model = v_moe(classes, (3, side, side), size=size, experts=8, where="every-2")
    lines = []
    for name in SUITES[suite]:
        plan = load_attack(name).fitted(model)
        for view in plan.views or (("whole",) if name in WHOLE_ONLY else default_views(model)):
            weight = factor.get(view, 1.0)
            shares = _shares(plan, view, stored)
            most = about = 0.0
            for stage, share in zip(plan.stages, shares, strict=True):
                own = factor.get(stage.view, 1.0) if stage.view is not None else weight
                (forwards, backwards), (asked, _) = stage.budget(), most_passes(stage, view)
                work = own * (forwards + back * backwards) + asked - forwards
                most += work
                about += share * work
                if isinstance(stage, TrainedAttack):
                    fitting = stage.fit_budget(TRAINING_IMAGES)
                    made = own * (fitting[0] + back * fitting[1]) / images
                    most, about = most + made, about + made
            lines.append(Line(name, view, most, about))
    return lines


def _factors(sparse: Flops, dense: Flops) -> dict[str, float]:
    """What a pass on a view costs, in passes on the whole model: `router` runs the experts on the clean image too."""
    return {"router": 2.0, "smooth": dense.forward / sparse.forward}


def _shares(plan: AttackPlan, view: str, stored: Sequence[StoredResult]) -> list[float]:
    """Per stage the share of its bound that stored results of the attack on that view have spent.

    Results of an attack that had other stages on those models say little of what is left for each; then those of
    AutoAttack count. A stage of which nothing is stored has the share of the one before it, the first one 1.
    """
    stages = [stage.stage for stage in plan.stages]
    on_view = [one for one in stored if one.cell.view == view]
    alike = [one for one in on_view if one.cell.attack == plan.name and _stages(one) == stages]
    alike = alike or [one for one in on_view if one.cell.attack == "autoattack"]
    shares, last = [], 1.0
    for stage in plan.stages:
        # Models that never reach a stage spend nothing on it; those that do not have it say nothing of it.
        having = [one for one in alike if stage.stage in _stages(one)]
        bound = sum(one.record.n for one in having) * sum(most_passes(stage, view))
        if bound:
            entries = [one.record.stages.get(stage.stage, {}) for one in having]
            last = sum(entry.get("forwards", 0) + entry.get("backwards", 0) for entry in entries) / bound
        shares.append(last)
    return shares


def _stages(result: StoredResult) -> list[str]:
    """The stages that an attack had on a model, those without anyone left to attack included."""
    facts = {key: value for key, value in result.cell.parameters.items() if isinstance(value, Mapping)}
    return [name for name, settings in facts.items() if "skipped" not in settings]


def robust_results(where: str | Path | None) -> list[StoredResult]:
    """Stored results of adversarially trained models on 100 digits or more, at the usual radius.

    Raises:
        UsageError: the database cannot be read.
    """
    with Store.open(where, write=False) as store:
        found = store.results(dataset="digits")
    if not found:
        return []
    usual = load_dataset("digits", n=1).default_threat("Linf")
    found = [one for one in found if one.protocol.threat == usual and one.record.n >= 100]
    return [one for one in found if one.model.training not in (None, "standard")]


def hours(passes_per_image: float, images: int, flops: Flops, peak: float, utilisation: float) -> float:
    """GPU-hours of so many forward passes per image; `peak` is in TFLOP/s."""
    return passes_per_image * images * flops.forward / (peak * 1e12 * utilisation) / 3600


def table(lines: Iterable[Line], flops: Flops, arguments: argparse.Namespace, peak: float) -> list[str]:
    """The rows of both tables, as Markdown."""
    lines = list(lines)
    speed = arguments.images, flops, peak, arguments.utilisation
    out = ["| attack | view | forward passes per image, at most | about | GPU-hours, at most | about |"]
    out.append("| --- | --- | --- | --- | --- | --- |")
    for line in lines:
        most, about = (hours(value, *speed) for value in (line.at_most, line.about))
        out.append(
            f"| {line.attack} | {line.view} | {line.at_most:,.0f} | {line.about:,.0f} | {most:,.1f} | {about:,.1f} |"
        )
    sums = [sum(getattr(line, kind) for line in lines) for kind in ("at_most", "about")]
    most, about = (hours(value, *speed) for value in sums)
    out.append(f"| all | | {sums[0]:,.0f} | {sums[1]:,.0f} | {most:,.1f} | {about:,.1f} |")
    priced = arguments.price is not None
    out += ["", "| GPUs | hours, at most | about |" + (" price, at most | about |" if priced else "")]
    out.append("| --- | --- | --- |" + (" --- | --- |" if priced else ""))
    for count in arguments.gpus:
        row = f"| {count} | {most / count:,.2f} | {about / count:,.2f} |"
        out.append(row + (f" {most * arguments.price:,.0f} | {about * arguments.price:,.0f} |" if priced else ""))
    return out


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m moebench.scale", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="B/16", help="of the V-MoE")
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--classes", type=int, default=1000, help="of the data set")
    parser.add_argument("--images", type=int, default=IMAGENET, help="that are attacked")
    parser.add_argument("--suite", default=SUITE_VERSION, choices=list(SUITES))
    parser.add_argument("--gpu", default="a100", choices=list(PEAKS), help="whose peak is taken from its data sheet")
    parser.add_argument("--peak", type=float, metavar="TFLOP/S", help="instead of a data sheet's")
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="share of the peak that is kept up")
    parser.add_argument("--gpus", default="1,8,512", help="how many, as a list")
    parser.add_argument("--price", type=float, metavar="PER_HOUR", help="of one GPU")
    parser.add_argument("--db", help="whose results tell the share of the bound that is spent")
    arguments = parser.parse_args(words)
    try:
        arguments.gpus = [int(text) for text in arguments.gpus.split(",")]
    except ValueError:
        raise UsageError(f"--gpus takes numbers such as 1,8,512, got {arguments.gpus!r}") from None
    positive = {"--images": arguments.images, "--gpus": min(arguments.gpus), "--classes": arguments.classes - 1}
    positive |= {"--peak": arguments.peak or 1, "--price": arguments.price or 1, "--side": arguments.side}
    for option, value in positive.items():
        if not value > 0:
            raise UsageError(f"{option} must be positive")
    if not 0 < arguments.utilisation <= 1:
        raise UsageError(f"--utilisation is a share of the peak, in (0, 1], got {arguments.utilisation}")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Prints the model's assumptions and its tables; returns the exit code."""
    try:
        arguments = _parse(words)
        stored = robust_results(arguments.db)
        flops = count_flops(arguments.size, arguments.side, arguments.classes)
        size = arguments.size, arguments.side, arguments.classes
        lines = passes(*size, arguments.suite, stored, arguments.images)
    except MoebenchError as error:
        print(f"scale: {error}", file=sys.stderr)
        return 2
    peak, source = PEAKS[arguments.gpu] if arguments.peak is None else (arguments.peak, "given")
    print(f"V-MoE-{arguments.size} (8 experts in every second block, K = 2), {arguments.images:,} images of", end=" ")
    print(f"{arguments.side}×{arguments.side}, suite {arguments.suite}. Modelled, not measured.\n")
    print(f"- one image: {flops.forward / 1e9:.1f} GFLOPs forward, {flops.backward / 1e9:.1f} backward to the image")
    print(f"- speed: {arguments.utilisation:.0%} of {peak:g} TFLOP/s ({source})")
    print(f"- about: by the shares of {len(stored)} stored results of adversarially trained models on the digits\n")
    print("\n".join(table(lines, flops, arguments, peak)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

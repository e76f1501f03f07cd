"""BlockMoE and ConvMoE: sparse mixture-of-experts layers inside a ResNet.

Pavlitska, Fan, Ditschuneit and Zöllner, "Robust Experts: the Effect of Adversarial Training on CNNs with Sparse
Mixture-of-Experts Layers", ICCV Workshops 2025 (arXiv 2509.05086). Residual blocks (BlockMoE) or convolutions (ConvMoE)
of a late stage become layers of E experts: copies of the module with fresh weights. A gate on the layer's own input
routes whole images to k of them, with weight 1 for k = 1 (straight-through in training) and weights that sum to 1 for
larger k. Loss: cross-entropy + α sum over the layers of a balancing loss, on the images that the cross-entropy sees.

The paper's networks come from its data: 32×32 images get torchvision's ResNet-18 with a 3×3 stem; `backbone=resnet50`
and `backbone=wide-resnet50` are the others. Its training is

    moebench train --model block-moe-switch --dataset cifar100 --epochs 200 --set optimizer=sgd --set lr_high=0.1
        --set lr_low=0 --set schedule=poly --set nesterov=True --set weight_decay=5e-4 --set batch_size=640
        --set translate=4 --set flip=True

and `balance=0.5` for `conv-moe`. Its ResNet-50 has `backbone=resnet50`, `schedule=cosine`, `warmup=0.025` (5 epochs),
`lr_low=1e-5` and, in some scripts, `balance=0.01`. The baselines are `resnet18-st` and so on, with the same settings.

Digits get a ResNet-12 with MoE layers in its last stage and Adam: SGD at rates of 0.02 (40 epochs) and 0.05 (20 epochs,
clipped) left `block-moe-switch` near chance on the validation split, Adam at 0.01 did not. `conv-moe`, with five gates
under the entropy loss, stayed near chance with α = 0.5 and has α = 0.1. Batches of 64 give each of 4 experts 16 images.

Differs from the paper: no colour jitter; the epoch is chosen by validation instead of the last one kept.

Differs from the published code: attacks inside training run in eval mode (`attack_mode=train` is what it does);
training is in float32 (`precision=float16` for that of the ResNet-50 scripts), attacks always are; Free AT adds the
balancing losses once (it adds them twice, which is `balance=1.0`); the poly schedule falls by batches and begins at
`lr_high` (its first epoch is at 0.001); `backbone=wide-resnet50` is one (its configurations of that name build a
ResNet-50); weights of k > 1 sum to 1 exactly (it adds 1e-5 to their sum); the expert-output variance
(`output_variance`) can be computed.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from moebench.errors import UsageError
from moebench.models._backbones import Backbone, initialise, make_backbone
from moebench.models._balancing import balanced, column_entropy_loss, entropy_loss, switch_loss, variance_loss
from moebench.models._base import (
    Adversary,
    AdversaryOn,
    Forward,
    Normalize,
    Phase,
    PhaseLoss,
    Recipe,
    Shape,
    register_model,
)
from moebench.models._gates import GateName, NoisyMoELayer, make_gate
from moebench.models._moe import RoutedModel, top_experts
from moebench.models._objectives import ADVERSARIAL, FAST, FREE, STANDARD
from moebench.models._output_variance import with_output_variance
from moebench.schema import PaperCard

PAVLITSKA_2025 = PaperCard(
    title="Robust Experts: the Effect of Adversarial Training on CNNs with Sparse Mixture-of-Experts Layers",
    authors="Svetlana Pavlitska, Haixi Fan, Konstantin Ditschuneit, J. Marius Zöllner",
    venue="ICCV Workshops",
    year=2025,
    arxiv="2509.05086",
    bibtex="""@inproceedings{pavlitska2025robust,
  title = {Robust Experts: the Effect of Adversarial Training on {CNNs} with Sparse Mixture-of-Experts Layers},
  author = {Pavlitska, Svetlana and Fan, Haixi and Ditschuneit, Konstantin and Z{\\"o}llner, J. Marius},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision Workshops},
  year = {2025}
}""",
)

BALANCING: dict[str, Callable[[Tensor], Tensor]] = {
    "switch": lambda probs: switch_loss(probs, top_experts(probs, 1)),
    "entropy": entropy_loss,
    "column-entropy": column_entropy_loss,
    "variance": variance_loss,
}
"""The paper's balancing losses of a gate's softmax (B, E); loads are those of the likeliest expert, noise aside."""


@dataclass(frozen=True)
class LayerMoERecipe(Recipe):
    """Training of the digits' models, with the paper's PGD-7, eps : step = 4 : 1, and α = 0.5.

    Attributes:
        balance_loss: "switch", "entropy", "column-entropy" or "variance".
        attack_mode: "eval", or "train" as in the published code, whose attack leaves the network in train mode:
            BatchNorm then learns from all intermediate images and the gates' noise disturbs the attack.
        output_variance: weight of the expert-output variance, per layer (`variance_alpha` of the published code).
    """

    batch_size: int = 64
    lr_high: float = 1e-2
    cycles: int = 1
    attack_steps: int = 7
    balance: float = 0.5
    balance_loss: str = "switch"
    attack_mode: Literal["eval", "train"] = "eval"
    output_variance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance_loss not in BALANCING:
            raise UsageError(f"balance_loss must be one of {', '.join(BALANCING)}, got {self.balance_loss!r}")
        if self.attack_mode not in ("eval", "train"):
            raise UsageError(f"attack_mode must be eval or train, got {self.attack_mode!r}")
        weight = self.output_variance
        if type(weight) not in (int, float) or not 0 <= weight < math.inf:
            raise UsageError(f"output_variance of a recipe must be a finite number >= 0, got {weight!r}")


class LayerMoE(RoutedModel):
    """A network with MoE layers inside, for [0, 1] images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        logits: Tensor = self.network(self.normalize(x))
        return logits


WHERE = re.compile(r"(?P<stage>last|prev)-(?:(?P<number>[1-9])(?:st|nd|rd|th)|(?P<several>both|all))")


def positions(network: nn.Module, where: str, kind: Literal["block", "conv"]) -> list[str]:
    """The names of the blocks, or of the convolutions outside shortcuts, that `where` means.

    Args:
        network: a residual network with stages `layer1`, `layer2`, …
        where: "last-" or "prev-" (the stage before it), and "1st", "2nd", …, "both" (the first two) or "all".
        kind: what is counted.

    Raises:
        UsageError: `where` is written otherwise, or the stage has fewer of them.
    """
    match = WHERE.fullmatch(where) if isinstance(where, str) else None
    if match is None:
        raise UsageError(f"where must be last- or prev- and 1st, 2nd, …, both or all, such as last-2nd, got {where!r}")
    stages = [name for name, _ in network.named_children() if name.startswith("layer")]
    stage = stages[-1] if match["stage"] == "last" else stages[-2]
    blocks = network.get_submodule(stage)
    names = [f"{stage}.{number}" for number, _ in blocks.named_children()]
    if kind == "conv":
        names = [
            f"{stage}.{name}"
            for name, part in blocks.named_modules()
            if isinstance(part, nn.Conv2d) and "downsample" not in name
        ]
    if match["several"] is not None:
        return names[:2] if match["several"] == "both" else names
    number = int(match["number"])
    if number > len(names):
        raise UsageError(f"where={where!r} is not there: {stage} has {len(names)} {kind}s")
    return [names[number - 1]]


def shortcuts(network: nn.Module, where: str) -> list[str]:
    """The 1×1 convolutions in the shortcuts of the stage that `where` names."""
    stage = positions(network, where, "block")[0].partition(".")[0]
    parts = network.get_submodule(stage).named_modules()
    return [f"{stage}.{name}" for name, part in parts if isinstance(part, nn.Conv2d) and "downsample" in name]


def mix_experts(
    network: nn.Module,
    names: list[str],
    *,
    experts: int,
    top_k: int,
    gate: GateName,
    noise: float,
    capacity: float | None,
) -> None:
    """Puts an MoE layer in the place of each named module: experts of the same architecture with fresh weights."""
    for name in names:
        module = network.get_submodule(name)
        first = next(part for part in module.modules() if isinstance(part, nn.Conv2d))
        copies = [copy.deepcopy(module) for _ in range(experts)]
        for one in copies:
            initialise(one)
        layer = NoisyMoELayer(
            copies, make_gate(gate, first.in_channels, experts), top_k=top_k, noise=noise, capacity=capacity
        )
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer)


def in_train_mode(adversary: Adversary, model: nn.Module) -> Adversary:
    """The same attack with the model in train mode, as the published code has it."""

    def change(forward: Forward) -> Forward:
        def training(z: Tensor) -> Tensor:
            model.train()
            return forward(z)

        return training

    return AdversaryOn(adversary, change)


def paper_objective(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """An objective with the recipe's balancing losses, and with the attack in the mode that the recipe names."""

    def wrap(loss: PhaseLoss) -> PhaseLoss:
        def total(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
            assert isinstance(recipe, LayerMoERecipe)
            attack = in_train_mode(adversary, model) if recipe.attack_mode == "train" else adversary
            return loss(model, x, y, attack, recipe)

        return total

    def balance(probs: Tensor, selected: Tensor, recipe: Recipe) -> Tensor:
        assert isinstance(recipe, LayerMoERecipe)
        return BALANCING[recipe.balance_loss](probs)

    own = tuple(replace(phase, loss=wrap(phase.loss)) for phase in phases)
    return balanced(with_output_variance(own), loss=balance)


NORMAL_TRAINING = paper_objective(STANDARD)
PGD_TRAINING = paper_objective(ADVERSARIAL)
FAST_TRAINING = paper_objective(FAST)
FREE_TRAINING = paper_objective(FREE)

EPOCHS = 150
"""Of the digits' models."""


@register_model(
    "block-moe-switch",
    summary="4 experts per residual block of the last stage, switch loss, PGD adversarial training",
    family="moe",
    training="adversarial",
    routing="top-1",
    paper=PAVLITSKA_2025,
    settings={"noise": 0.1},
    recipe=LayerMoERecipe(epochs=EPOCHS, balance_loss="switch"),
    objective=PGD_TRAINING,
    regularize=paper_objective,
)
@register_model(
    "block-moe-entropy",
    summary="4 experts per residual block of the last stage, entropy loss, PGD adversarial training",
    family="moe",
    training="adversarial",
    routing="top-1",
    paper=PAVLITSKA_2025,
    recipe=LayerMoERecipe(epochs=EPOCHS, balance_loss="entropy"),
    objective=PGD_TRAINING,
    regularize=paper_objective,
)
@register_model(
    "block-moe-colent",
    summary="4 experts per residual block of the last stage, column-entropy loss, PGD adversarial training",
    family="moe",
    training="adversarial",
    routing="top-1",
    paper=PAVLITSKA_2025,
    settings={"noise": 0.1},
    recipe=LayerMoERecipe(epochs=EPOCHS, balance_loss="column-entropy"),
    objective=PGD_TRAINING,
    regularize=paper_objective,
)
@register_model(
    "block-moe-switch-st",
    summary="4 experts per residual block of the last stage, switch loss, standard training",
    family="moe",
    training="standard",
    routing="top-1",
    paper=PAVLITSKA_2025,
    settings={"noise": 0.1},
    recipe=LayerMoERecipe(epochs=EPOCHS, balance_loss="switch", select="clean"),
    objective=NORMAL_TRAINING,
    regularize=paper_objective,
)
@register_model(
    "block-moe-entropy-st",
    summary="4 experts per residual block of the last stage, entropy loss, standard training",
    family="moe",
    training="standard",
    routing="top-1",
    paper=PAVLITSKA_2025,
    recipe=LayerMoERecipe(epochs=EPOCHS, balance_loss="entropy", select="clean"),
    objective=NORMAL_TRAINING,
    regularize=paper_objective,
)
@register_model(
    "block-moe-colent-st",
    summary="4 experts per residual block of the last stage, column-entropy loss, standard training",
    family="moe",
    training="standard",
    routing="top-1",
    paper=PAVLITSKA_2025,
    settings={"noise": 0.1},
    recipe=LayerMoERecipe(epochs=EPOCHS, balance_loss="column-entropy", select="clean"),
    objective=NORMAL_TRAINING,
    regularize=paper_objective,
)
@register_model(
    "block-moe-switch-fast-at",
    summary="4 experts per residual block of the last stage, switch loss, Fast AT as in the paper (half the radius)",
    family="moe",
    training="fast-at",
    routing="top-1",
    paper=PAVLITSKA_2025,
    settings={"noise": 0.1},
    recipe=LayerMoERecipe(epochs=EPOCHS, balance_loss="switch", fast_from="clean", fast_step=1.0, eps_fraction=0.5),
    objective=FAST_TRAINING,
    regularize=paper_objective,
)
@register_model(
    "block-moe-switch-free-at",
    summary="4 experts per residual block of the last stage, switch loss, Free AT as in the paper (half the radius)",
    family="moe",
    training="free-at",
    routing="top-1",
    paper=PAVLITSKA_2025,
    settings={"noise": 0.1},
    recipe=LayerMoERecipe(epochs=40, balance_loss="switch", replays=4, eps_fraction=0.5),
    objective=FREE_TRAINING,
    regularize=paper_objective,
)
@register_model(
    "block-moe-single",
    summary="4 experts in the second block of the last stage alone, switch loss, PGD adversarial training",
    family="moe",
    training="adversarial",
    routing="top-1",
    paper=PAVLITSKA_2025,
    settings={"where": "last-2nd", "noise": 0.1},
    recipe=LayerMoERecipe(epochs=EPOCHS, balance_loss="switch"),
    objective=PGD_TRAINING,
    regularize=paper_objective,
)
def block_moe(
    num_classes: int,
    shape: Shape,
    *,
    experts: int = 4,
    top_k: int = 1,
    where: str = "last-all",
    gate: GateName = "conv-gap",
    noise: float = 0.0,
    capacity: float | None = None,
    backbone: Backbone = "auto",
) -> nn.Module:
    """BlockMoE: residual blocks as experts.

    Args:
        num_classes: K.
        shape: of the images, (C, H, W).
        experts: E.
        top_k: k.
        where: which blocks of the last stage or of the one before it: "last-1st", "last-2nd" (the residual-block MoE
            of the published code), "last-both", "last-all", "prev-1st", ….
        gate: the routing network, see `make_gate`.
        noise: of the gates while they train; the published code has 0.1, and none with the entropy loss.
        capacity: how many times its even share an expert takes while it trains; None for no limit.
        backbone: "auto" picks it by the image size.
    """
    network = make_backbone(backbone, num_classes, shape)
    names = positions(network, where, "block")
    mix_experts(network, names, experts=experts, top_k=top_k, gate=gate, noise=noise, capacity=capacity)
    return LayerMoE(network)


@register_model(
    "conv-moe",
    summary="4 experts per convolution of the last stage, entropy loss, PGD adversarial training",
    family="moe",
    training="adversarial",
    routing="top-1",
    paper=PAVLITSKA_2025,
    recipe=LayerMoERecipe(epochs=EPOCHS, balance=0.1, balance_loss="entropy"),
    objective=PGD_TRAINING,
    regularize=paper_objective,
)
@register_model(
    "conv-moe-switch",
    summary="4 experts per convolution of the last stage, switch loss, PGD adversarial training",
    family="moe",
    training="adversarial",
    routing="top-1",
    paper=PAVLITSKA_2025,
    settings={"noise": 0.1},
    recipe=LayerMoERecipe(epochs=EPOCHS, balance_loss="switch"),
    objective=PGD_TRAINING,
    regularize=paper_objective,
)
@register_model(
    "conv-moe-colent",
    summary="4 experts per convolution of the last stage, column-entropy loss, PGD adversarial training",
    family="moe",
    training="adversarial",
    routing="top-1",
    paper=PAVLITSKA_2025,
    settings={"noise": 0.1},
    recipe=LayerMoERecipe(epochs=EPOCHS, balance_loss="column-entropy"),
    objective=PGD_TRAINING,
    regularize=paper_objective,
)
@register_model(
    "conv-moe-st",
    summary="4 experts per convolution of the last stage, entropy loss, standard training",
    family="moe",
    training="standard",
    routing="top-1",
    paper=PAVLITSKA_2025,
    recipe=LayerMoERecipe(epochs=EPOCHS, balance_loss="entropy", select="clean"),
    objective=NORMAL_TRAINING,
    regularize=paper_objective,
)
@register_model(
    "conv-moe-switch-st",
    summary="4 experts per convolution of the last stage, switch loss, standard training",
    family="moe",
    training="standard",
    routing="top-1",
    paper=PAVLITSKA_2025,
    settings={"noise": 0.1},
    recipe=LayerMoERecipe(epochs=EPOCHS, balance_loss="switch", select="clean"),
    objective=NORMAL_TRAINING,
    regularize=paper_objective,
)
def conv_moe(
    num_classes: int,
    shape: Shape,
    *,
    experts: int = 4,
    top_k: int = 1,
    where: str = "last-all",
    shortcut: bool = True,
    gate: GateName = "conv-gap",
    noise: float = 0.0,
    capacity: float | None = None,
    backbone: Backbone = "auto",
) -> nn.Module:
    """ConvMoE: convolutions as experts, each with a gate of its own; BatchNorm is shared by all experts.

    Args:
        num_classes: K.
        shape: of the images, (C, H, W).
        experts: E.
        top_k: k.
        where: which convolutions of the last stage or of the one before it, counted without those of shortcuts:
            "last-1st", "last-4th", "last-all", "prev-2nd", ….
        shortcut: with "…-all", mix the 1×1 convolutions of the stage's shortcuts too, as the published code does.
        gate: the routing network, see `make_gate`.
        noise: of the gates while they train; the published code has 0.1, and none with the entropy loss.
        capacity: how many times its even share an expert takes while it trains; None for no limit.
        backbone: "auto" picks it by the image size.
    """
    network = make_backbone(backbone, num_classes, shape)
    names = positions(network, where, "conv")
    if shortcut and where.endswith("-all"):
        names += shortcuts(network, where)
    mix_experts(network, names, experts=experts, top_k=top_k, gate=gate, noise=noise, capacity=capacity)
    return LayerMoE(network)

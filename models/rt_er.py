"""RT-ER, the dual model and JTDMoE, with the MoE baselines that the paper compares with.

Zhang, Xu, Hu and Wang, "Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach", ICML 2025
(arXiv 2502.06832). Experts are whole classifiers; a linear router on the pixels picks one of them per image:

    F(x) = sum_i a_i(x) f_i(x),    a = softmax of the router, top-1 with weight 1 unless stated otherwise.

    RT-ER:    CE(F(x_adv), y) + beta KL( p_s(x) || p_s(x_adv^s) ), s the expert that the router ranks second at x_adv
    written:  the same with x_adv, which attacks the MoE, in the place of x_adv^s, which attacks expert s alone
    JTDMoE:   the RT-ER loss of F_R for F_R's parameters, then CE(F_D(x), y) on clean x for F_S's, in every batch
    official: s ranked second at x, routers never trained; in JTDMoE beta sum_i KL( p_i(x) || p_i(x_adv^i) ) over all
              experts i and images instead of s

with F_D = (1 - alpha) F_S + alpha F_R of a standard and a robust MoE.

Differs from the paper: its formula has the KL at x_adv (`rt-er-shared-attack`), the default at x_adv^s, as its code has
it; a tenth of the switch loss keeps the routers in use (balance=0 for the paper's losses); the epoch is chosen by
validation instead of the last one kept; ViT-small starts from fresh weights instead of ImageNet's. The paper leaves
open how top-2 mixes (here by the two softmax weights over their sum), the weight of TRADES (6) and whether F_D mixes
logits or probabilities (`mixing`; here logits, as in its code).

Differs from the published code: the router is trained (straight-through; the code's router gets no gradient),
BatchNorm statistics come from whole batches, attacks run in float32 with a real random start. Pixels are normalised by
0.5 and 0.5, not by the data's mean and deviation, and Adam's momentum stands still while the rate swings.
`rt-er-official` keeps what the code does to the router and to the choice of the second expert, and `jtd-moe-official`
its KL on all experts; what is plainly a slip there (16-bit attacks whose gradients vanish, a constant random start,
BatchNorm on single images, stale gradients in JTDMoE) is not repeated.

The registered recipes are for the digits. The paper's for CIFAR-10, with ResNet-18 experts:

    moebench train --model rt-er --dataset cifar10 --device cuda --set epochs=130 --set batch_size=512
        --set lr_low=5e-5 --set lr_high=1e-4 --set cycles=13 --set translate=2 --set flip=True --set balance=0.0

and beta 1, 3, 6 or 9 by `--set beta=`, 3 to 5 experts by `--set experts=`. Its ViT-small experts on TinyImageNet,
resized to 224 pixels, are fine-tuned for 10 epochs at eps 2/255 in steps of eps (epochs=10, step_fraction=1). The
paper's cutout is not offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from moebench.errors import UsageError
from moebench.models._balancing import balanced
from moebench.models._base import Adversary, Normalize, Phase, Recipe, Shape, evaluating, register_model
from moebench.models._image_moe import NetworkMoE
from moebench.models._moe import MoELayer, RoutedModel, RouterMode, Routing, Tape, combine, join
from moebench.models._objectives import (
    ADVERSARIAL,
    STANDARD,
    TRADES,
    cross_entropy_adversary,
    kl_divergence,
    standard_loss,
)
from moebench.models._resnet import classifier
from moebench.models._vit_small import vit_small
from moebench.schema import PaperCard

ZHANG_2025 = PaperCard(
    title="Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach",
    authors="Xu Zhang, Kaidi Xu, Ziqing Hu, Ren Wang",
    venue="ICML",
    year=2025,
    arxiv="2502.06832",
    bibtex="""@inproceedings{zhang2025optimizing,
  title = {Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach},
  author = {Zhang, Xu and Xu, Kaidi and Hu, Ziqing and Wang, Ren},
  booktitle = {Proceedings of the 42nd International Conference on Machine Learning},
  series = {PMLR},
  volume = {267},
  pages = {76436--76450},
  year = {2025}
}""",
)

SecondAt = Literal["clean", "adversarial"]
SecondAttack = Literal["own", "shared"]
Mixing = Literal["logits", "probabilities"]
Expert = Literal["auto", "resnet", "vit"]

LARGE = 64
"""Side in pixels above which experts are ViT-small, as in the paper's TinyImageNet models (resized to 224)."""


def make_expert(expert: Expert, num_classes: int, shape: Shape) -> nn.Module:
    """One expert: "resnet", the dense baseline's network; "vit", ViT-small; "auto", a ViT above 64 pixels."""
    if expert not in ("auto", "resnet", "vit"):
        raise UsageError(f"expert must be 'auto', 'resnet' or 'vit', got {expert!r}")
    if expert == "vit" or (expert == "auto" and shape[1] > LARGE):
        return vit_small(num_classes, shape)
    return classifier(num_classes, shape)


class ClassifierMoE(NetworkMoE):
    """Whole classifiers as experts of one MoE layer, routed by a linear map of the normalised pixels (section 3)."""

    def __init__(
        self, num_classes: int, shape: Shape, *, experts: int, top_k: int, router: RouterMode, expert: Expert = "auto"
    ) -> None:
        super().__init__()
        channels, height, width = shape
        self.normalize = Normalize()
        self.moe = MoELayer(
            [make_expert(expert, num_classes, shape) for _ in range(experts)],
            nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, experts)),
            top_k=top_k,
            router_mode=router,
        )

    def runner_up(self, x: Tensor) -> Tensor:
        """The best expert that the router does not select, (B,): second for top-1, (k+1)-th for top-k."""
        if self.moe.top_k == len(self.moe.experts):
            raise UsageError(f"the router selects all {self.moe.top_k} experts, so none comes next; use more experts")
        with torch.no_grad():
            ranking = self.moe.probabilities(self.normalize(x)).argsort(dim=1, descending=True)
        return ranking[:, self.moe.top_k]

    def pick(self, choice: Tensor) -> Routing:
        """The routing that sends image b to expert choice[b] alone, with weight 1."""
        selected = F.one_hot(choice, len(self.moe.experts)).bool()
        return Routing(selected.float(), selected)

    def forward_with(self, x: Tensor, routing: Routing) -> Tensor:
        """Logits (B, K) of images under a given routing, each expert run once."""
        return combine(self.moe.experts, self.normalize(x), routing)


class DualModel(RoutedModel):
    """F_D = (1 - alpha) F_S + alpha F_R of a standard and a robust MoE (equation 3).

    Mixes raw logits, as the published code does, or probabilities, as the paper's certificate presumes: there no
    standard half, however confident, outvotes a robust half that is sure. The logits are then log F_D.
    """

    def __init__(self, standard: ClassifierMoE, robust: ClassifierMoE, alpha: float, mixing: Mixing = "logits") -> None:
        super().__init__()
        if not 0.5 <= alpha <= 1:
            raise UsageError(f"alpha must be in [0.5, 1], got {alpha:g}")
        self.standard = standard
        self.robust = robust
        if mixing not in ("logits", "probabilities"):
            raise UsageError(f"mixing must be 'logits' or 'probabilities', got {mixing!r}")
        self.alpha = alpha
        self.mixing = mixing

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of [0, 1] images (B, C, H, W)."""
        return self._combine(self.standard(x), self.robust(x))

    def _combine(self, standard: Tensor, robust: Tensor) -> Tensor:
        if self.mixing == "logits":
            return (1 - self.alpha) * standard + self.alpha * robust
        both = torch.stack((standard.log_softmax(dim=1), robust.log_softmax(dim=1)))
        weights = both.new_tensor([max(1 - self.alpha, 1e-12), self.alpha]).log().view(2, 1, 1)
        return (both + weights).logsumexp(dim=0)

    @override
    def route(self, x: Tensor, *, soft: bool = False) -> Tape:
        return {
            f"{half}.{name}": routing
            for half in ("standard", "robust")
            for name, routing in self._half(half).route(x, soft=soft).items()
        }

    @override
    def expert_outputs(self, x: Tensor) -> dict[str, Tensor]:
        return {
            f"{half}.{name}": logits
            for half in ("standard", "robust")
            for name, logits in self._half(half).expert_outputs(x).items()
        }

    @override
    def mix(self, outputs: Mapping[str, Tensor], tape: Tape) -> Tensor:
        standard, robust = (
            self._half(half).mix({"moe": outputs[f"{half}.moe"]}, {"moe": tape[f"{half}.moe"]})
            for half in ("standard", "robust")
        )
        return self._combine(standard, robust)

    def _half(self, name: str) -> ClassifierMoE:
        half = self.get_submodule(name)
        assert isinstance(half, ClassifierMoE)
        return half


def rt_er_loss(
    model: ClassifierMoE,
    x: Tensor,
    y: Tensor,
    adversary: Adversary,
    recipe: Recipe,
    *,
    second_at: SecondAt,
    second_attack: SecondAttack = "own",
) -> Tensor:
    """CE(F(x_adv), y) + beta KL(p_s(x) || p_s(x_adv^s)), the objective of RT-ER (section 4.1).

    s is the best expert that the router does not select, at x_adv (the paper) or at x (the published code). x_adv
    attacks the MoE; x_adv^s is an attack of its own, a second PGD against expert s alone (the code), or x_adv again,
    shared by both terms (the paper's formula). Gradients flow through both arguments of KL.
    """
    x_adv = cross_entropy_adversary(model, x, y, adversary)
    second = model.pick(model.runner_up(x_adv if second_at == "adversarial" else x))
    x_adv_second = x_adv
    if second_attack == "own":
        x_adv_second = adversary(
            lambda z: model.forward_with(z, second), x, lambda logits: F.cross_entropy(logits, y, reduction="none")
        )
    # One pass for all three: with a pass each, an expert's BatchNorm would normalise the kinds of images apart, and the
    # running statistics would fit none of them.
    routing = join(model.moe.own_routing(model.normalize(x_adv)), second, second)
    adv, second_clean, second_adv = model.forward_with(torch.cat((x_adv, x, x_adv_second)), routing).chunk(3)
    return F.cross_entropy(adv, y) + recipe.beta * kl_divergence(second_clean, second_adv).mean()


def robust_half_loss(model: DualModel, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    """Lower level of JTDMoE: the RT-ER loss of the robust MoE (section 5)."""
    return rt_er_loss(model.robust, x, y, adversary, recipe, second_at="adversarial")


def standard_half_loss(model: DualModel, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    """Upper level of JTDMoE: CE(F_D(x), y) on clean images, for F_S alone (section 5).

    F_R stands still: in eval mode its BatchNorm normalises as it will when F_D answers, and does not count clean images
    into the statistics of its own training.
    """
    with evaluating(model.robust):
        return standard_loss(model, x, y, adversary, recipe)


def all_experts_loss(model: DualModel, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    """Lower level of JTDMoE as its code has it: CE(F_R(x_adv), y) + beta sum_i KL(p_i(x) || p_i(x_adv^i)).

    Every expert i of the robust MoE is robustified on every image, whether the router would send it there or not;
    x_adv^i is a PGD against expert i alone.
    """
    robust = model.robust
    experts = len(robust.moe.experts)
    x_adv = cross_entropy_adversary(robust, x, y, adversary)
    alone = [robust.pick(torch.full_like(y, number)) for number in range(experts)]

    def attacked(routing: Routing) -> Tensor:
        return adversary(
            lambda z: robust.forward_with(z, routing), x, lambda logits: F.cross_entropy(logits, y, reduction="none")
        )

    images = torch.cat((x_adv, *[x] * experts, *(attacked(routing) for routing in alone)))
    # One pass for all, as in `rt_er_loss`.
    routing = join(robust.moe.own_routing(robust.normalize(x_adv)), *alone, *alone)
    adv, *rest = robust.forward_with(images, routing).chunk(1 + 2 * experts)
    terms = [kl_divergence(*pair).mean() for pair in zip(rest[:experts], rest[experts:], strict=True)]
    return F.cross_entropy(adv, y) + recipe.beta * torch.stack(terms).sum()


RT_ER = balanced((Phase(partial(rt_er_loss, second_at="adversarial")),))
RT_ER_SHARED = balanced((Phase(partial(rt_er_loss, second_at="adversarial", second_attack="shared")),))
RT_ER_OFFICIAL = (Phase(partial(rt_er_loss, second_at="clean")),)
JTD = (
    *balanced((Phase(robust_half_loss, part="robust"),), part=lambda model: model.get_submodule("robust")),
    *balanced((Phase(standard_half_loss, part="standard"),), part=lambda model: model.get_submodule("standard")),
)
"""Each batch first steps the robust MoE, then the standard MoE on the dual model's clean cross-entropy."""
JTD_OFFICIAL = (Phase(all_experts_loss, part="robust"), Phase(standard_loss, part="standard"))


@register_model(
    "st-moe",
    summary="top-1 MoE of 4 classifiers, standard training",
    family="moe",
    training="standard",
    routing="top-1",
    paper=ZHANG_2025,
    recipe=Recipe(epochs=200, select="clean", balance=0.1),
    objective=balanced(STANDARD),
)
@register_model(
    "at-moe",
    summary="top-1 MoE of 4 classifiers, PGD adversarial training",
    family="moe",
    training="adversarial",
    routing="top-1",
    paper=ZHANG_2025,
    recipe=Recipe(epochs=200, balance=0.1),
    objective=balanced(ADVERSARIAL),
)
@register_model(
    "at-moe-top2",
    summary="top-2 MoE of 4 classifiers, PGD adversarial training",
    family="moe",
    training="adversarial",
    routing="top-2",
    paper=ZHANG_2025,
    settings={"top_k": 2},
    recipe=Recipe(epochs=200, balance=0.1),
    objective=balanced(ADVERSARIAL),
)
@register_model(
    "trades-moe",
    summary="top-1 MoE of 4 classifiers, TRADES with weight 6",
    family="moe",
    training="trades",
    routing="top-1",
    paper=ZHANG_2025,
    recipe=Recipe(epochs=200, beta=6.0, balance=0.1),
    objective=balanced(TRADES),
)
@register_model(
    "rt-er",
    summary="RT-ER: top-1 MoE whose second-ranked expert is robustified too",
    family="moe",
    training="rt-er",
    routing="top-1",
    paper=ZHANG_2025,
    recipe=Recipe(epochs=200, beta=6.0, balance=0.1),
    objective=RT_ER,
)
@register_model(
    "rt-er-shared-attack",
    summary="RT-ER as its formula is written: the second expert robustified at the images that attack the MoE",
    family="moe",
    training="rt-er-shared-attack",
    routing="top-1",
    paper=ZHANG_2025,
    recipe=Recipe(epochs=200, beta=6.0, balance=0.1),
    objective=RT_ER_SHARED,
)
@register_model(
    "rt-er-top2",
    summary="RT-ER with the two best experts mixed and the third robustified",
    family="moe",
    training="rt-er",
    routing="top-2",
    paper=ZHANG_2025,
    settings={"top_k": 2},
    recipe=Recipe(epochs=200, beta=6.0, balance=0.1),
    objective=RT_ER,
)
@register_model(
    "rt-er-e3",
    summary="RT-ER with 3 experts",
    family="moe",
    training="rt-er",
    routing="top-1",
    paper=ZHANG_2025,
    settings={"experts": 3},
    recipe=Recipe(epochs=110, beta=6.0, balance=0.1),
    objective=RT_ER,
)
@register_model(
    "rt-er-e4",
    summary="RT-ER with 4 experts, trained as briefly as with 3 and 5",
    family="moe",
    training="rt-er",
    routing="top-1",
    paper=ZHANG_2025,
    recipe=Recipe(epochs=110, beta=6.0, balance=0.1),
    objective=RT_ER,
)
@register_model(
    "rt-er-e5",
    summary="RT-ER with 5 experts",
    family="moe",
    training="rt-er",
    routing="top-1",
    paper=ZHANG_2025,
    settings={"experts": 5},
    recipe=Recipe(epochs=110, beta=6.0, balance=0.1),
    objective=RT_ER,
)
@register_model(
    "rt-er-beta1",
    summary="RT-ER with beta = 1, as brief a training as rt-er-e4 (beta = 6)",
    family="moe",
    training="rt-er",
    routing="top-1",
    paper=ZHANG_2025,
    recipe=Recipe(epochs=110, beta=1.0, balance=0.1),
    objective=RT_ER,
)
@register_model(
    "rt-er-beta3",
    summary="RT-ER with beta = 3, as brief a training as rt-er-e4 (beta = 6)",
    family="moe",
    training="rt-er",
    routing="top-1",
    paper=ZHANG_2025,
    recipe=Recipe(epochs=110, beta=3.0, balance=0.1),
    objective=RT_ER,
)
@register_model(
    "rt-er-beta9",
    summary="RT-ER with beta = 9, as brief a training as rt-er-e4 (beta = 6)",
    family="moe",
    training="rt-er",
    routing="top-1",
    paper=ZHANG_2025,
    recipe=Recipe(epochs=110, beta=9.0, balance=0.1),
    objective=RT_ER,
)
@register_model(
    "rt-er-official",
    summary="RT-ER as its code trains it: frozen router, second expert ranked at the clean image",
    family="moe",
    training="rt-er-official",
    routing="top-1, frozen",
    paper=ZHANG_2025,
    settings={"router": "frozen"},
    recipe=Recipe(epochs=200, beta=6.0),
    objective=RT_ER_OFFICIAL,
)
def classifier_moe(
    num_classes: int,
    shape: Shape,
    *,
    experts: int = 4,
    top_k: int = 1,
    router: RouterMode = "trained",
    expert: Expert = "auto",
) -> nn.Module:
    """An MoE of whole classifiers: residual networks as the dense baseline, ViT-small for more than 64 pixels."""
    return ClassifierMoE(num_classes, shape, experts=experts, top_k=top_k, router=router, expert=expert)


@register_model(
    "dual-moe",
    summary="dual model: trained st-moe and rt-er, mixed with alpha = 0.7",
    family="dual",
    training="composed",
    routing="top-1",
    paper=ZHANG_2025,
    recipe=Recipe(epochs=0, init_from={"standard": "st-moe", "robust": "rt-er"}),
)
@register_model(
    "jtd-moe",
    summary="dual model, both halves trained jointly (JTDMoE), alpha = 0.7",
    family="dual",
    training="jtd",
    routing="top-1",
    paper=ZHANG_2025,
    recipe=Recipe(
        epochs=100, beta=6.0, balance=0.1, select="mean", init_from={"standard": "st-moe", "robust": "rt-er"}
    ),
    objective=JTD,
)
@register_model(
    "jtd-moe-official",
    summary="JTDMoE as its code trains it: from scratch, frozen routers, KL on all experts and images, alpha = 0.7",
    family="dual",
    training="jtd-official",
    routing="top-1, frozen",
    paper=ZHANG_2025,
    settings={"router": "frozen"},
    recipe=Recipe(epochs=60, beta=6.0, select="mean"),
    objective=JTD_OFFICIAL,
)
def dual_model(
    num_classes: int,
    shape: Shape,
    *,
    alpha: float = 0.7,
    mixing: Mixing = "logits",
    experts: int = 4,
    top_k: int = 1,
    router: RouterMode = "trained",
    expert: Expert = "auto",
) -> nn.Module:
    """A standard and a robust MoE side by side, each with its own router and experts."""
    halves = [
        ClassifierMoE(num_classes, shape, experts=experts, top_k=top_k, router=router, expert=expert) for _ in range(2)
    ]
    return DualModel(halves[0], halves[1], alpha, mixing)

"""V-MoE: Vision Transformers in which some MLPs are sparse mixtures of experts that each token chooses for itself.

Puigcerver, Jenatton, Riquelme, Awasthi and Bhojanapalli, "On the Adversarial Robustness of Mixture of Experts", NeurIPS
2022 (arXiv 2210.10253), of the models of Riquelme et al., 2021 (arXiv 2106.05974). For a token t with router logits g:

    y(t) = sum over the K largest i of softmax(g(t))_i · MLP_i(t),

the softmax taken over all E experts and not renormalised. In training the logits carry noise N(0, 1/E²) and each expert
takes a limited number of the batch's tokens; what overflows passes by the layer on its shortcut.

Differs from the published code: all images of a batch share the experts' capacity (there, groups of eight do);
evaluation drops no token, so that an image's logits do not hang on its neighbours; softmax cross-entropy throughout
(there, pre-training from scratch is by the sigmoid's); router and patch embedding start as torch's layers do (there, by
LeCun's normal distribution, of three times that variance); adversarial training comes to its radius by steps, and its
attack does not see the auxiliary losses. The recipes are for the digits, whose model is 48 wide to stay below a
megabyte.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from moebench.errors import UsageError
from moebench.models._base import Adversary, Phase, PhaseLoss, Recipe, Shape, register_model
from moebench.models._curriculum import from_clean_to_adversarial
from moebench.models._moe import MoELayer, Policy, RoutedModel, Routing, moe_layers, routed_by
from moebench.models._objectives import standard_loss
from moebench.models._vit import Mlp, VisionTransformer, parse_size
from moebench.schema import PaperCard

PUIGCERVER_2022 = PaperCard(
    title="On the Adversarial Robustness of Mixture of Experts",
    authors="Joan Puigcerver, Rodolphe Jenatton, Carlos Riquelme, Pranjal Awasthi, Srinadh Bhojanapalli",
    venue="NeurIPS",
    year=2022,
    arxiv="2210.10253",
    bibtex="""@inproceedings{puigcerver2022adversarial,
  title = {On the Adversarial Robustness of Mixture of Experts},
  author = {Puigcerver, Joan and Jenatton, Rodolphe and Riquelme, Carlos and Awasthi, Pranjal
            and Bhojanapalli, Srinadh},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {35},
  year = {2022}
}""",
)


class TokenMoE(MoELayer):
    """An MoE layer in a Transformer's block: MLPs as experts, a dense router without bias on each token.

    Args:
        hidden: width of a token.
        experts: E, all with the same initial weights.
        top_k: K.
        capacity: share of an even load that an expert takes in training, see `room`.
        dropout: inside the experts, in training.
    """

    def __init__(self, hidden: int, experts: int, top_k: int, capacity: float, dropout: float) -> None:
        first = Mlp(hidden, dropout)
        copies: list[nn.Module] = [first, *(copy.deepcopy(first) for _ in range(experts - 1))]
        router = nn.Linear(hidden, experts, bias=False)
        super().__init__(copies, router, top_k=top_k, per_token=True, renormalize=False)
        if not 0 < capacity < math.inf:
            raise UsageError(f"capacity must be a positive number, got {capacity}")
        self.capacity = capacity

    @override
    def own_routing(self, x: Tensor) -> Routing:
        """The K best experts of each token; in train mode with noise and limited capacity."""
        return self.noisy_routing(x)[0] if self.training else super().own_routing(x)

    def noisy_routing(self, x: Tensor) -> tuple[Routing, Tensor, Tensor]:
        """The routing of training, with the router's logits (B, T, E) before and after the noise."""
        logits: Tensor = self.router(x)
        # Drawn on the CPU, so that every device trains on the same noise.
        noisy = logits + torch.randn(logits.shape).to(logits) / len(self.experts)
        probs = noisy.softmax(dim=-1)
        selected = within_capacity(probs, self.top_k, self.room(x.shape[0] * x.shape[1]))
        return Routing(probs * selected, selected), logits, noisy

    def room(self, tokens: int) -> int:
        """Tokens that an expert takes of so many: capacity · tokens · K / E, rounded up to a multiple of four."""
        share = math.ceil(tokens * self.top_k * self.capacity / len(self.experts))
        return 4 * math.ceil(share / 4)


def within_capacity(probs: Tensor, top_k: int, room: int) -> Tensor:
    """The K best experts of each token as long as they have room: first choices first, then by the token's place.

    Args:
        probs: (B, T, E).
        top_k: K.
        room: tokens that each expert takes.
    Returns: bool, of that shape.
    """
    count = probs.shape[-1]
    choices = probs.detach().flatten(0, 1).topk(top_k, dim=1).indices
    asked = F.one_hot(choices.t().flatten(), count)
    taken = asked.bool() & (asked.cumsum(dim=0) <= room)
    return taken.view(top_k, -1, count).any(dim=0).view_as(probs)


def squared_variation(values: Tensor) -> Tensor:
    """Variance over squared mean."""
    return values.var(correction=0) / values.mean().square()


def importance_loss(probs: Tensor) -> Tensor:
    """How unevenly the softmax weight is spread over the experts (Riquelme et al., appendix A); probs are (B, T, E)."""
    return squared_variation(probs.sum(dim=(0, 1)))


def load_loss(logits: Tensor, noisy: Tensor, top_k: int) -> Tensor:
    """How unevenly tokens would be spread if the noise were drawn again (Riquelme et al., appendix A).

    p_ti = 1 - Φ((the K-th largest noisy logit of t - logit_ti) / σ) with σ = 1/E; the loss is that of mean_t p_ti.

    Args:
        logits: (B, T, E), without noise.
        noisy: the same with noise.
        top_k: K.
    """
    threshold = noisy.topk(top_k, dim=-1).values[..., -1:]
    chance = torch.special.ndtr((logits - threshold) * logits.shape[-1])
    return squared_variation(chance.mean(dim=(0, 1)))


def gshard_loss(probs: Tensor) -> Tensor:
    """E · sum_i f_i P_i, f_i the share of tokens whose best expert is i (Lepikhin et al., 2021, arXiv 2006.16668)."""
    count = probs.shape[-1]
    best = F.one_hot(probs.argmax(dim=-1), count).to(probs.dtype)
    return count * (best.mean(dim=(0, 1)) * probs.mean(dim=(0, 1))).sum()


def auxiliary_loss(logits: Tensor, noisy: Tensor, top_k: int) -> Tensor:
    """Importance plus load; for two experts twice GShard's loss, as the code has it."""
    if logits.shape[-1] == 2:
        return 2 * gshard_loss(noisy.softmax(dim=-1))
    return importance_loss(logits.softmax(dim=-1)) + load_loss(logits, noisy, top_k)


def with_auxiliary(phase_loss: PhaseLoss) -> PhaseLoss:
    """The loss plus `recipe.balance` times the sum over the MoE layers of their auxiliary loss in its own passes.

    Layers answer attacks in eval mode, so those passes count nowhere; of several passes the mean counts.
    """

    def total(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
        terms: dict[str, list[Tensor]] = {}

        def listener(name: str) -> Policy:
            def policy(layer: MoELayer, features: Tensor) -> Routing:
                assert isinstance(layer, TokenMoE)
                if not layer.training:
                    return layer.own_routing(features)
                routing, logits, noisy = layer.noisy_routing(features)
                terms.setdefault(name, []).append(auxiliary_loss(logits, noisy, layer.top_k))
                return routing

            return policy

        with routed_by(model, {name: listener(name) for name in moe_layers(model)}):
            value = phase_loss(model, x, y, adversary, recipe)
        return value + recipe.balance * torch.stack([torch.stack(heard).mean() for heard in terms.values()]).sum()

    return total


def regularize(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """The phases with the auxiliary losses of V-MoE."""
    return tuple(replace(phase, loss=with_auxiliary(phase.loss)) for phase in phases)


balanced_loss = with_auxiliary(standard_loss)
"""CE(F(x), y) + `recipe.balance` times the auxiliary losses of that pass."""


class VMoE(VisionTransformer, RoutedModel):
    """A Vision Transformer with MoE layers, whose routing can be recorded and replayed."""


def moe_blocks(where: str, blocks: int) -> set[int]:
    """The numbers of the blocks that have an MoE layer: "last-N" are the last N odd ones, "every-N" each N-th.

    Raises:
        UsageError: neither of the two, or there are not so many blocks.
    """
    kind, _, text = where.partition("-") if isinstance(where, str) else ("", "", "")
    count = int(text) if text.isdecimal() else 0
    odd = range(1, blocks, 2)
    if kind == "last" and 1 <= count <= len(odd):
        return set(odd[-count:])
    if kind == "every" and 1 <= count <= blocks:
        return set(range(count - 1, blocks, count))
    raise UsageError(
        f"where must be last-N (N up to {len(odd)}) or every-N (N up to {blocks}) for {blocks} blocks, got {where!r}"
    )


V_MOE_ST = Recipe(
    epochs=150, select="clean", optimizer="adamw", schedule="cosine", warmup=0.1, lr_low=1e-5, lr_high=3e-3,
    weight_decay=0.05, clip=1.0, attack_steps=3, step_fraction=0.5, balance=0.005,
)  # fmt: skip
V_MOE_AT = replace(V_MOE_ST, epochs=180, select="robust", lr_high=2e-3)


@register_model(
    "v-moe",
    summary="V-MoE: ViT whose tokens choose 2 of the experts in two of the blocks, standard training",
    family="moe",
    training="standard",
    routing="top-2 per token",
    paper=PUIGCERVER_2022,
    recipe=V_MOE_ST,
    objective=(Phase(balanced_loss),),
    regularize=regularize,
)
@register_model(
    "v-moe-at",
    summary="V-MoE: ViT whose tokens choose 2 of the experts in two of the blocks, PGD adversarial training",
    family="moe",
    training="adversarial",
    routing="top-2 per token",
    paper=PUIGCERVER_2022,
    recipe=V_MOE_AT,
    objective=from_clean_to_adversarial(balanced_loss),
    regularize=regularize,
)
def v_moe(
    num_classes: int,
    shape: Shape,
    *,
    size: str = "auto",
    experts: int | None = None,
    top_k: int = 2,
    where: str = "last-2",
    capacity: float = 1.05,
    expert_dropout: float = 0.0,
    pre_logits: bool = False,
) -> nn.Module:
    """A V-MoE; the size is NAME/PATCH, such as S/32 or B/16, or fits the images.

    Without `experts` there are 4 for images of up to 16 pixels and 8 above. The paper's are S/32 with where=last-2, and
    B/16 and B/32 with where=every-2; it pre-trains S/32 with expert_dropout=0.2.
    """
    dimensions, patch = parse_size(size, shape)
    chosen = moe_blocks(where, dimensions.blocks)
    count = experts if experts is not None else 4 if shape[1] <= 16 else 8
    if type(count) is not int or count < 1:
        raise UsageError(f"experts must be a whole number >= 1, got {count!r}")

    def make_mlp(number: int) -> nn.Module | None:
        return TokenMoE(dimensions.hidden, count, top_k, capacity, expert_dropout) if number in chosen else None

    return VMoE(num_classes, shape, dimensions, patch, make_mlp=make_mlp, pre_logits=pre_logits)

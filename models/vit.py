"""Dense Vision Transformers, the baselines beside V-MoE: of equal block size, and wider ones of equal FLOPs.

Dosovitskiy et al., 2021 (arXiv 2010.11929); the comparison is that of V-MoE's robustness (arXiv 2210.10253, section 4).
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from moebench.models._base import Recipe, Shape, register_model
from moebench.models._curriculum import from_clean_to_adversarial
from moebench.models._objectives import STANDARD, TRADES, standard_loss
from moebench.models._training_papers import WONG_2020, ZHANG_2019
from moebench.models._vit import VisionTransformer, parse_size
from moebench.schema import PaperCard

DOSOVITSKIY_2021 = PaperCard(
    title="An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
    authors="Alexey Dosovitskiy, Lucas Beyer, Alexander Kolesnikov, Dirk Weissenborn, Xiaohua Zhai, "
    "Thomas Unterthiner, Mostafa Dehghani, Matthias Minderer, Georg Heigold, Sylvain Gelly, Jakob Uszkoreit, "
    "Neil Houlsby",
    venue="ICLR",
    year=2021,
    arxiv="2010.11929",
    bibtex="""@inproceedings{dosovitskiy2021image,
  title = {An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale},
  author = {Dosovitskiy, Alexey and Beyer, Lucas and Kolesnikov, Alexander and Weissenborn, Dirk and Zhai, Xiaohua
            and Unterthiner, Thomas and Dehghani, Mostafa and Minderer, Matthias and Heigold, Georg and Gelly, Sylvain
            and Uszkoreit, Jakob and Houlsby, Neil},
  booktitle = {International Conference on Learning Representations},
  year = {2021}
}""",
)

VIT_ST = Recipe(
    epochs=150, select="clean", optimizer="adamw", schedule="cosine", warmup=0.1, lr_low=1e-5, lr_high=3e-3,
    weight_decay=0.05, clip=1.0, attack_steps=3, step_fraction=0.5,
)  # fmt: skip
VIT_AT = replace(VIT_ST, epochs=180, select="robust", lr_high=2e-3)


@register_model(
    "vit",
    summary="dense ViT of V-MoE's block size, standard training",
    family="dense",
    training="standard",
    paper=DOSOVITSKIY_2021,
    recipe=VIT_ST,
    objective=STANDARD,
)
@register_model(
    "vit-at",
    summary="dense ViT of V-MoE's block size, PGD adversarial training",
    family="dense",
    training="adversarial",
    paper=DOSOVITSKIY_2021,
    recipe=VIT_AT,
    objective=from_clean_to_adversarial(standard_loss),
)
@register_model(
    "vit-trades",
    summary="dense ViT of V-MoE's block size, TRADES with weight 6",
    family="dense",
    training="trades",
    paper=ZHANG_2019,
    recipe=replace(VIT_AT, beta=6.0),
    objective=TRADES,
)
@register_model(
    "vit-fast-at",
    summary="dense ViT of V-MoE's block size, Fast AT, eps grown by steps",
    family="dense",
    training="fast-at",
    paper=WONG_2020,
    recipe=VIT_AT,
    objective=from_clean_to_adversarial(standard_loss, "fast"),
)
@register_model(
    "vit-wide",
    summary="dense ViT of V-MoE's FLOPs (wider blocks), standard training",
    family="dense",
    training="standard",
    paper=DOSOVITSKIY_2021,
    settings={"size": "auto+"},
    recipe=VIT_ST,
    objective=STANDARD,
)
def vit(num_classes: int, shape: Shape, *, size: str = "auto", pre_logits: bool = False) -> nn.Module:
    """A Vision Transformer; the size is NAME/PATCH, such as B/16 or B++/32, or fits the images.

    `vit-wide` runs as many FLOPs as the V-MoE of that image size; the paper's ladder is --set size=B+/32 to L/32.
    """
    return VisionTransformer(num_classes, shape, *parse_size(size, shape), pre_logits=pre_logits)

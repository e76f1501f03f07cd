"""The dense residual network that the MoEs have as experts, as the baseline beside them.

He et al., 2016 (arXiv 1512.03385), trained in the ways of `_training_papers`.
"""

from __future__ import annotations

from torch import nn

from moebench.models._base import NormalizedClassifier, Recipe, Shape, register_model
from moebench.models._objectives import ADVERSARIAL, FAST, STANDARD, TRADES
from moebench.models._resnet import classifier
from moebench.models._training_papers import MADRY_2018, WONG_2020, ZHANG_2019
from moebench.schema import PaperCard

HE_2016 = PaperCard(
    title="Deep Residual Learning for Image Recognition",
    authors="Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun",
    venue="CVPR",
    year=2016,
    arxiv="1512.03385",
    bibtex="""@inproceedings{he2016deep,
  title = {Deep Residual Learning for Image Recognition},
  author = {He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian},
  booktitle = {Proceedings of the IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2016}
}""",
)


@register_model(
    "resnet-st",
    summary="one ResNet, standard training",
    family="dense",
    training="standard",
    paper=HE_2016,
    recipe=Recipe(epochs=200, select="clean"),
    objective=STANDARD,
)
@register_model(
    "resnet-at",
    summary="one ResNet, PGD adversarial training",
    family="dense",
    training="adversarial",
    paper=MADRY_2018,
    recipe=Recipe(epochs=200),
    objective=ADVERSARIAL,
)
@register_model(
    "resnet-trades",
    summary="one ResNet, TRADES with weight 6",
    family="dense",
    training="trades",
    paper=ZHANG_2019,
    recipe=Recipe(epochs=200, beta=6.0),
    objective=TRADES,
)
@register_model(
    "resnet-fast-at",
    summary="one ResNet, Fast AT (one step of 1.25 eps from a random start)",
    family="dense",
    training="fast-at",
    paper=WONG_2020,
    recipe=Recipe(epochs=200),
    objective=FAST,
)
def resnet(num_classes: int, shape: Shape) -> nn.Module:
    """A residual classifier, ResNet-8 for images of up to 16 pixels and ResNet-18 above."""
    return NormalizedClassifier(classifier(num_classes, shape))

"""Dense residual networks, the baselines beside every MoE: standard, PGD adversarial training and TRADES.

He et al., 2016 (arXiv 1512.03385); Madry et al., 2018 (arXiv 1706.06083); Zhang et al., 2019 (arXiv 1901.08573).
"""

from __future__ import annotations

from torch import nn

from moebench.models._base import NormalizedClassifier, Recipe, Shape, register_model
from moebench.models._objectives import ADVERSARIAL, STANDARD, TRADES
from moebench.models._resnet import classifier
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
MADRY_2018 = PaperCard(
    title="Towards Deep Learning Models Resistant to Adversarial Attacks",
    authors="Aleksander Madry, Aleksandar Makelov, Ludwig Schmidt, Dimitris Tsipras, Adrian Vladu",
    venue="ICLR",
    year=2018,
    arxiv="1706.06083",
    bibtex="""@inproceedings{madry2018towards,
  title = {Towards Deep Learning Models Resistant to Adversarial Attacks},
  author = {Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, Adrian},
  booktitle = {International Conference on Learning Representations},
  year = {2018}
}""",
)
ZHANG_2019 = PaperCard(
    title="Theoretically Principled Trade-off between Robustness and Accuracy",
    authors="Hongyang Zhang, Yaodong Yu, Jiantao Jiao, Eric P. Xing, Laurent El Ghaoui, Michael I. Jordan",
    venue="ICML",
    year=2019,
    arxiv="1901.08573",
    bibtex="""@inproceedings{zhang2019theoretically,
  title = {Theoretically Principled Trade-off between Robustness and Accuracy},
  author = {Zhang, Hongyang and Yu, Yaodong and Jiao, Jiantao and Xing, Eric P. and El Ghaoui, Laurent
            and Jordan, Michael I.},
  booktitle = {International Conference on Machine Learning},
  year = {2019}
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
def resnet(num_classes: int, shape: Shape) -> nn.Module:
    """A residual classifier, ResNet-8 for images of up to 16 pixels and ResNet-18 above."""
    return NormalizedClassifier(classifier(num_classes, shape))

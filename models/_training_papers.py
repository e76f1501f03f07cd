"""The papers whose ways of training the baselines share."""

from __future__ import annotations

from moebench.schema import PaperCard

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
WONG_2020 = PaperCard(
    title="Fast is better than free: Revisiting adversarial training",
    authors="Eric Wong, Leslie Rice, J. Zico Kolter",
    venue="ICLR",
    year=2020,
    arxiv="2001.03994",
    bibtex="""@inproceedings{wong2020fast,
  title = {Fast is better than free: {R}evisiting adversarial training},
  author = {Wong, Eric and Rice, Leslie and Kolter, J. Zico},
  booktitle = {International Conference on Learning Representations},
  year = {2020}
}""",
)

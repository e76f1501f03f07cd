"""The records that cross module borders: frozen, and no behaviour beyond validation.

Accuracies are fractions, times are seconds, eps is in units of the [0, 1] pixel scale. Nothing here imports torch, so
that the command line can list and parse without waiting for it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moebench.errors import UsageError

Norm = Literal["Linf", "L2"]
Precision = Literal["float32", "bfloat16", "bfloat16-only"]
Json = Mapping[str, Any]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

PROTOCOL_VERSION = "1"
"""Version of the evaluation rules. Numbers of different versions are never ranked together."""

SUITE_VERSION = "v1"
"""Version of the attack definitions that `moebench list attacks` prints."""

SUITES: Mapping[str, tuple[str, ...]] = {
    "v1": ("fgsm", "pgd-50", "smooth-pgd-50", "autoattack", "moe-adaptive", "universal-pgd"),
}
"""Suite version -> the attacks that a complete row has, as far as they apply. A published suite never changes."""

WHOLE_ONLY = frozenset({"universal-pgd"})
"""Attacks that a suite runs on the whole model alone: making one perturbation for all images takes minutes per view."""

WARM_START = "warm-start"
"""Stage and parameter of a cell that takes over the adversarial images of a smaller radius."""

IMPORTED = "imported"
"""Key of a run's environment that says which lab measured it and which file it came in; runs of ours lack it."""

LOSSES = ("loss", "loss_attacked")
"""Facts of the stage `clean`: the mean cross-entropy of all samples on their clean images, and on those of the end."""
PROTOCOL_PREFIX = "published:"
"""How the names of papers' own evaluation protocols begin."""

NORMS: tuple[Norm, ...] = get_args(Norm)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
"""Of the search: float32; bfloat16 first and float32 on what is left; bfloat16 alone, a quick look, never ranked."""

VIEWS = ("whole", "router", "experts", "smooth", "straight-through", "standard", "robust")
"""Views by name; `expert[i]` and `expert[LAYER:i]` come on top."""

EXPERT_VIEW = re.compile(r"expert\[(?:(?P<layer>[\w.]+):)?(?P<number>\d+)\]")


PARTS = ("standard", "robust")
"""Parts of a model by name, beside its experts: the halves of a dual model."""


def split_part(name: str) -> tuple[str, str | None]:
    """The name of a model without its part, and the part: `rt-er/expert[0]` is expert 0 of rt-er, taken alone.

    Raises:
        UsageError: what follows the slash cannot be a part of any model.
    """
    model, slash, part = name.rpartition("/")
    # What follows the last slash of a path is FILE.py:FACTORY.
    if not slash or (":" in part and "[" not in part.partition(":")[0]):
        return name, None
    if model and (part in PARTS or EXPERT_VIEW.fullmatch(part)):
        return model, part
    if part.endswith(".py"):
        return name, None
    close = difflib.get_close_matches(part, [*PARTS, "expert[0]"], n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UsageError(
        f"no model has a part {part!r} (in {name!r}); {hint}parts are expert[i], expert[LAYER:i], standard and robust"
    )


def is_protocol(attack: str) -> bool:
    """Whether an attack's name is that of a published protocol: scored by its own rule, so no evidence of ours.

    Its images need not be inside the threat model and its rule may overlook successes; whatever counts, ranks or
    compares attacks leaves it out.
    """
    return attack.startswith(PROTOCOL_PREFIX)


def parse_eps(text: str) -> float:
    """The perturbation radius written as a decimal or a fraction ("0.03", "8/255").

    Raises:
        UsageError: the text is no number, or the number is not finite and positive.
    """
    wanted = f"eps must be a positive number such as 8/255 or 0.03, got {text!r}"
    try:
        value = float(Fraction(text.strip())) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UsageError(wanted) from None
    if not math.isfinite(value) or value <= 0:
        raise UsageError(wanted)
    return value


def parse_radii(text: str) -> dict[float, str]:
    """The radii of a comma-separated list, ascending and each once, with how each was first written.

    Raises:
        UsageError: one of them is no radius.
    """
    written: dict[float, str] = {}
    for part in text.split(","):
        written.setdefault(parse_eps(part), part.strip())
    return dict(sorted(written.items()))


def format_eps(eps: float) -> str:
    """A radius as people write it: a short decimal if it is one, "8/255" if it is a whole number of grey levels."""
    levels = eps * 255
    if round(eps, 3) != eps and levels >= 0.5 and math.isclose(levels, round(levels), rel_tol=1e-9):
        return f"{round(levels)}/255"
    return f"{eps:.6g}"


def check_view_name(name: str) -> None:
    """Refuses a view name that no model could have.

    Raises:
        UsageError: unknown name; the nearest one is offered.
    """
    if name in VIEWS or EXPERT_VIEW.fullmatch(name):
        return
    close = difflib.get_close_matches(name, [*VIEWS, "expert[0]"], n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UsageError(f"unknown view {name!r}{hint} (views: {', '.join(VIEWS)}, expert[i])")


@dataclass(frozen=True)
class ThreatModel:
    """All perturbations with `norm(x_adv - x) <= eps` and `lower <= x_adv <= upper`.

    eps = 0 is allowed (the clean accuracy must come out); the command line asks for a positive radius.
    """

    norm: Norm
    eps: float
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UsageError(f"unknown norm {self.norm!r}; choose one of {', '.join(NORMS)}")
        if not math.isfinite(self.eps) or self.eps < 0:
            raise UsageError(f"eps must be finite and not negative, got {self.eps}")
        if self.norm == "Linf" and self.eps > self.upper - self.lower:
            raise UsageError(
                f"eps must be at most {self.upper - self.lower:g} for Linf on [0, 1] images, got {self.eps:g}; "
                "write 8/255 for eight grey levels"
            )

    def __str__(self) -> str:
        return f"{self.norm} {format_eps(self.eps)}"


@dataclass(frozen=True)
class PaperCard:
    """The paper behind a model or an attack. `bibtex_key` names its entry in the bundled bibliography text `bibtex`."""

    title: str
    authors: str
    venue: str
    year: int
    arxiv: str | None
    bibtex: str

    @property
    def bibtex_key(self) -> str:
        """The key under which LaTeX cites the paper."""
        return self.bibtex.split("{", 1)[1].split(",", 1)[0]


@dataclass(frozen=True)
class ModelRecord:
    """What the store knows of a model. `family` is "dense", "ensemble", "moe", "dual", "external" or "part".

    A "part" is one expert or one half of a model, taken alone; it is never ranked among whole models.
    """

    name: str
    family: str
    summary: str
    training: str | None = None
    routing: str | None = None
    paper: PaperCard | None = None


@dataclass(frozen=True)
class CheckpointRecord:
    """One set of weights. `sha256` is of the safetensors file, or of state dict and source for a user's own model.

    `parameters` counts all weights, `active_parameters` those that one sample uses (one token, where tokens are
    routed), `flops` is per sample.
    """

    sha256: str
    model: str
    dataset: str | None
    origin: str
    parameters: int
    active_parameters: int | None
    flops: int | None
    recipe: Json = field(default_factory=dict)
    training_log: Sequence[Json] = ()


@dataclass(frozen=True)
class ProtocolRecord:
    """On what a number was measured: the data (by hash), the threat model and the version of the rules.

    `data_sha256` covers images and labels of the n samples that were used, in order.
    """

    dataset: str
    split: str
    data_sha256: str
    n: int
    num_classes: int
    class_names: tuple[str, ...]
    threat: ThreatModel
    version: str = PROTOCOL_VERSION


@dataclass(frozen=True)
class CellSpec:
    """One attack on one view: the unit of work, of reuse and of resuming.

    `parameters` holds every setting of the attack, defaults included. `fingerprint` hashes weights, model code version,
    data, threat model, attack, view, seed, engine and protocol version.
    """

    fingerprint: str
    attack: str
    parameters: Json
    view: str
    seed: int
    engine: str = "native"
    precision: Precision = "float32"
    suite: str = SUITE_VERSION


@dataclass(frozen=True)
class RunStart:
    """What is known of a run before it works. `environment` holds versions, device, git commit, host and process."""

    run_id: str
    fingerprint: str
    command: str
    model: ModelRecord
    checkpoint: CheckpointRecord
    protocol: ProtocolRecord
    environment: Json


@dataclass(frozen=True)
class ExpertChoice:
    """Which experts a layer chooses for one image, before and after an attack.

    Where images are routed, the chosen experts, the one of the largest weight first. Where tokens are (`per_token`),
    the expert of the largest weight of each token in turn.
    """

    layer: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    per_token: bool = False


@dataclass(frozen=True, eq=False)
class Example:
    """A sample that the model gets right and an attack broke, with both images: (C, H, W) float32 in [0, 1].

    `index` is the sample's number in the protocol's data, `stage` the stage that broke it, `distance` the norm of the
    perturbation as it was judged. Of large images the perturbation is stored with 11 binary digits.
    """

    index: int
    label: int
    clean_pred: int
    adv_pred: int
    distance: float
    stage: str
    clean: NDArray[np.float32]
    adversarial: NDArray[np.float32]
    experts: tuple[ExpertChoice, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """Finished samples of one stage of a cell; committed in one transaction, so that a killed run resumes after it.

    All arrays are (m,) and belong together by position. `index` is the sample's number in the protocol's data.
    `broken` says that an adversarial example inside the threat model changed the prediction of the whole model away
    from the label (or that the clean prediction was wrong already); `adv_pred` is the prediction on it. `distance` is
    the norm of the perturbation (0 for a sample that was wrong from the start). `forwards` and `backwards` count
    passes per sample. `extras` holds further per-sample arrays by name, (m, …): `loss`, the cross-entropy on the
    images, and of a model with routing what it is on the attacked ones. `examples` are offered for keeping: the store
    keeps a few per cell, and gives them back by themselves.
    """

    stage: str
    index: IntArray
    broken: BoolArray
    clean_pred: IntArray
    adv_pred: IntArray
    distance: NDArray[np.float32]
    forwards: IntArray
    backwards: IntArray
    seconds: float
    extras: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    examples: Sequence[Example] = ()

    def __len__(self) -> int:
        return int(self.index.size)


@dataclass(frozen=True)
class RoutingLayer:
    """Routing of one MoE layer on clean and on attacked images of a cell.

    `iou` is the mean intersection over union of the selected experts; `changed` the share of samples whose set of
    selected experts changed; entropies are of the router's softmax, in nats; loads are the shares of routing weight
    per expert, and `moves[i][j]` counts samples whose first expert went from i to j. `classes[y][i]` counts samples of
    class y whose first expert is i on the clean image; empty in results from before it was kept, and where each token
    is routed by itself: there, all else is over samples and tokens.
    """

    name: str
    iou: float
    changed: float
    entropy_clean: float
    entropy_adv: float
    load_clean: tuple[float, ...]
    load_adv: tuple[float, ...]
    moves: tuple[tuple[int, ...], ...]
    classes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class ResultRecord:
    """The aggregate of a finished cell; `accuracy` is the share of samples that the attack leaves right."""

    attack: str
    view: str
    accuracy: float
    ci_low: float
    ci_high: float
    n: int
    seconds: float
    forwards: int
    backwards: int
    clean_accuracy: float
    changed_predictions: float
    routing: tuple[RoutingLayer, ...] = ()
    stages: Json = field(default_factory=dict)

    @property
    def losses(self) -> tuple[float | None, float | None]:
        """Mean cross-entropy before and after the attack; None for results that did not keep it.

        An attack leaves a sample the moment it is broken, so the loss after is not the largest that it could reach.
        """
        clean = self.stages.get("clean", {})
        return clean.get(LOSSES[0]), clean.get(LOSSES[1])


PART_FAMILY = "part"
"""Family of a part of a model that is evaluated as a model of its own."""

OVERSTATED_RA = "over-stated-ra"
"""Flag: an attack on a part of the model leaves fewer samples standing than the attacks on the whole of it."""


@dataclass(frozen=True)
class Flag:
    """A reason to distrust a number: a short code, and the evidence in words."""

    code: str
    evidence: str


@dataclass(frozen=True)
class Outcomes:
    """Per-sample evidence of a finished cell, merged over its stages and sorted by `index`; all arrays are (n,).

    `stage` names, per sample, the stage that broke it ("" for a sample that stands or was wrong from the start).
    """

    index: IntArray
    broken: BoolArray
    clean_pred: IntArray
    adv_pred: IntArray
    distance: NDArray[np.float32]
    forwards: IntArray
    backwards: IntArray
    stage: tuple[str, ...]


@dataclass(frozen=True)
class StoredResult:
    """A finished cell as the store gives it back, with all it needs to be printed, ranked and repeated."""

    result_id: int
    run_id: str
    command: str
    finished_at: str
    cell: CellSpec
    record: ResultRecord
    model: ModelRecord
    checkpoint: CheckpointRecord
    protocol: ProtocolRecord
    environment: Json


@dataclass(frozen=True)
class StoredRun:
    """One command's run. `status` is "running", "done" or "failed"; `reused` counts results taken from earlier runs."""

    run_id: str
    status: str
    command: str
    started_at: str
    finished_at: str | None
    seconds: float | None
    error: str | None
    model: ModelRecord
    checkpoint: CheckpointRecord
    protocol: ProtocolRecord
    environment: Json
    results: tuple[StoredResult, ...]
    flags: tuple[Flag, ...]
    reused: int


@dataclass(frozen=True)
class Claim:
    """A published number, never ours: a percentage with its source and, after "FLAG:", why it may not add up."""

    arxiv: str
    model: str
    registry_name: str
    dataset: str
    architecture: str
    attack: str
    attack_params: str
    metric: str
    value: float
    source: str
    flag: str | None

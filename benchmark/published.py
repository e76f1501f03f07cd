"""What is known of the papers' evaluation protocols: their rule, and each departure from a careful evaluation.

Descriptions of published code; nothing here is run or imports torch. The attacks are in `attacks/published.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moebench.attack_names import AttackName, base_name, options_of, parse_attack, spell, written
from moebench.schema import Claim, Json


@dataclass(frozen=True)
class Switch:
    """One departure: the settings that take it away, what the published code does, and what that changes.

    `present` gives settings under which it is there where the published default has it not (a variant of the scripts).
    `needs` are further settings without which taking it away would compare something else.
    """

    label: str
    corrected: Mapping[str, Any]
    does: str
    changes: str
    needs: Mapping[str, Any] = field(default_factory=dict)
    present: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ProtocolCard:
    """A paper's protocol. `counterpart` is moebench's attack of the same kind; `claimed` the attacks of its claims."""

    name: str
    arxiv: str
    rule: str
    counterpart: str
    claimed: tuple[str, ...]
    switches: tuple[Switch, ...]
    options: Mapping[str, str] = field(default_factory=dict)

    def covers(self, claim: Claim) -> bool:
        """Whether a published number was made with this protocol."""
        return claim.arxiv == self.arxiv and claim.attack in self.claimed and claim.metric == "RA"

    def corrected(self) -> dict[str, Any]:
        """All departures taken away."""
        return {
            key: value for switch in self.switches for key, value in (*switch.corrected.items(), *switch.needs.items())
        }


LAST_ONLY = Switch(
    "only the last image counts",
    {"score": "any"},
    "as published code does, accuracy is measured on the last image of the search",
    "a sample that some image on the way broke and the last one does not counts as robust; moebench counts every image",
)
FLOAT16 = Switch(
    "float16 gradients, loss not scaled",
    {"fp16": False},
    "as published code does, the attack runs under float16 autocast and nothing scales its loss",
    "gradients below 2^-25 round to 0, and sign(0) moves no pixel: images the model is sure of are hardly attacked",
)
MEAN_512 = Switch(
    "loss averaged over 512 images",
    {"batch": 1},
    "as published code does, the loss is a mean over a batch of 512, so an image's gradient is 1/512 of its own",
    "nine more powers of two towards the underflow of float16; without float16 it changes nothing",
)
CONSTANT_START = Switch(
    "constant start",
    {"start": "random"},
    "as published code does, the noise of the random start is normalised like an image, (noise - mean) / std, so that "
    "the first projection puts every pixel at the lower end of the ball",
    "the start is the same for every seed, restarts would be useless, and one of the steps is spent on it",
)

_WALK = {
    "steps": "updates of PGD",
    "step_fraction": "step size, as a fraction of eps",
    "score": "final: the prediction on the last image; stale: that of the last forward pass, before the last update; "
    "any: wrong on any image on the way",
    "start": "random: a point of the ball; clean: the image; constant: every pixel at the lower end of the ball",
}
_HALF = {
    "batch": "what the loss of an image is divided by",
    "loss_scale": "factor on the loss before the backward pass, such as 65536",
}

CARDS: tuple[ProtocolCard, ...] = (
    ProtocolCard(
        "published:rt-er",
        "2502.06832",
        "share of samples that the model, under float16 autocast, gets right on the last of 50 PGD images",
        "pgd-50",
        ("PGD",),
        (FLOAT16, MEAN_512, CONSTANT_START, LAST_ONLY),
        {**_WALK, **_HALF},
    ),
    ProtocolCard(
        "published:rt-er-autoattack",
        "2502.06832",
        "share of samples that no image of one APGD run breaks; the paper calls it AutoAttack, whose standard version "
        "has APGD-T, FAB-T and Square besides",
        "apgd-ce[steps=50]",
        ("AutoAttack (as named by paper)",),
        (
            Switch(
                "start at the clean image",
                {"start": "random"},
                "as published code does, the run starts at the clean image, without a restart",
                "one deterministic search; nothing else is tried where its gradient vanishes",
            ),
            Switch(
                FLOAT16.label,
                FLOAT16.corrected,
                "the paper's attacks run under float16 autocast without loss scaling; that this one sums its loss is "
                "our reading",
                FLOAT16.changes,
            ),
        ),
        {
            **_HALF,
            "loss": "ce or dlr, the two that the code has",
            "steps": "iterations of APGD",
            "start": "clean: the image; random: a point at distance eps",
            "score": "final: the prediction on the image of highest loss; any: wrong on any image on the way",
        },
    ),
    ProtocolCard(
        "published:adv-moe",
        "2308.10110",
        "share of samples that the model gets right on the last of 10 PGD images",
        "pgd-10",
        ("PGD",),
        (
            Switch(
                "loss spent on the router",
                {"router_weight": 0.0},
                "as published code does, the attack climbs CE(F(x), y) + 6 CE(router, y mod E)",
                "six parts of the loss ask the router for another expert than number y mod E; that need not make the "
                "model wrong",
            ),
            Switch(
                "straight-through routing",
                {"straight_through": False},
                "as in the published model, the chosen expert's score has a gradient while the choice stays hard",
                "a property of the model, no fault; moebench's models show plain attacks no gradient of a hard choice",
            ),
            LAST_ONLY,
        ),
        {
            **_WALK,
            "router_weight": "weight of the router's cross-entropy towards the label modulo the number of experts",
            "straight_through": "the chosen expert's weight has the gradient of its probability",
        },
    ),
    ProtocolCard(
        "published:v-moe",
        "2210.10253",
        "share of images, valid or not, that the model gets right after 40 steps of eps/40",
        "pgd-40",
        ("PGD",),
        (
            Switch(
                "start at the clean image",
                {"start": "random"},
                "as published code does, the search starts at the clean image, without restarts",
                "one deterministic search, which begins where the loss is often flat",
                needs={"project": True},
            ),
            Switch(
                "step eps/40",
                {"step_fraction": 0.25},
                "as published code does, 40 steps of eps/40 are made",
                "the border of the ball is reached only in pixels whose gradient never changes its sign",
                needs={"project": True},
            ),
            Switch(
                "pixels not clipped",
                {"clip": True},
                "as published code does, images are not clipped to the range of pixels",
                "images that are no images count; moebench refuses them",
            ),
            LAST_ONLY,
        ),
        {
            **_WALK,
            "project": "back into the ball after each update; from the clean image nothing leaves it while steps times "
            "step_fraction is at most 1",
            "clip": "back into the range of pixels after each update",
        },
    ),
    ProtocolCard(
        "published:robust-experts",
        "2509.05086",
        "share of samples that the model gets right on the last of 20 PGD images",
        "pgd-20",
        ("PGD",),
        (
            Switch(
                FLOAT16.label,
                FLOAT16.corrected,
                "as the published ResNet-50 and WideResNet scripts do (precision 16); the ResNet-18 scripts do not",
                FLOAT16.changes,
                present={"fp16": True},
            ),
            Switch(
                "network in train mode while it is attacked",
                {"mode": "eval"},
                "as the published adversarial training does, where eval() is called on a module that does not hold the "
                "network; the published test runs in eval mode",
                "BatchNorm normalises each block of images by itself and gates may add noise: the search sees another "
                "network than the one that is scored",
                present={"mode": "train"},
            ),
            LAST_ONLY,
        ),
        {
            **_WALK,
            **_HALF,
            "mode": "train: the network is in train mode while it is attacked, in blocks of `batch` samples",
        },
    ),
)


def card_of(attack: str) -> ProtocolCard | None:
    """The card of a protocol, with or without settings in its name; None for what is none."""
    base = base_name(attack)
    return next((card for card in CARDS if card.name == base), None)


def shared_settings(attack: str) -> dict[str, Any]:
    """The settings in a protocol's name that no switch is about, such as a smaller number of steps.

    Raises:
        UsageError: a setting that it does not have.
    """
    card, asked = card_of(attack), parse_attack(attack)
    about = set() if card is None else {key for one in card.switches for key in {**one.corrected, **one.needs}}
    return {key: value for key, value in asked.settings.items() if key not in about}


@dataclass(frozen=True)
class Variant:
    """A protocol under some settings, as a row of an ablation."""

    kind: str
    label: str
    attack: str


def variants(card: ProtocolCard, keep: Mapping[str, Any] | None = None) -> list[Variant]:
    """The published protocol, each departure taken away alone, each left in alone, and none left.

    Args:
        card: the protocol.
        keep: settings that all rows share, such as a smaller number of steps.
    """
    base = {key: value for switch in card.switches for key, value in switch.present.items()} | dict(keep or {})
    clean = {**base, **card.corrected()}

    def row(kind: str, label: str, settings: Mapping[str, Any]) -> Variant:
        return Variant(kind, label, str(AttackName(card.name, _changed(card.name, settings))))

    rows = [row("published", "published protocol", dict(keep or {}))]
    if _changed(card.name, base) != _changed(card.name, dict(keep or {})):
        rows.append(row("all", "with every departure listed here", base))
    for switch in card.switches:
        rows.append(row("without", f"without: {switch.label}", {**base, **switch.corrected, **switch.needs}))
    for switch in card.switches:
        back = {key: base.get(key, option.default) for key, option in options_of(card.name).items()}
        left_in = {key: back[key] for key in switch.corrected}
        rows.append(row("only", f"only: {switch.label}", {**clean, **left_in}))
    return [*rows, row("none", "without any of them", clean)]


def _changed(base: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that differ from the protocol's own."""
    options = options_of(base)
    return {key: value for key, value in settings.items() if options[key].default != value}


def explain(attack: str, parameters: Json) -> Iterator[str]:
    """What the switches of a stored protocol cell say, one line each; nothing for other attacks."""
    card = card_of(attack)
    if card is None:
        return
    settings = next((value for value in parameters.values() if isinstance(value, Mapping)), {})
    yield f"protocol of arXiv {card.arxiv}, scored by its own rule: {card.rule}"
    yield "(no evidence of robustness: not part of RA, RA-worst, ranks or flags)"
    listed = set()
    for switch in card.switches:
        listed |= set(switch.corrected)
        off = all(settings.get(key) == value for key, value in switch.corrected.items())
        shown = written({key: settings.get(key) for key in switch.corrected})
        yield f"{shown}  {'corrected' if off else 'as published'}: {switch.label}"
        yield f"  {switch.does}; {switch.changes}"
    others = {key: value for key, value in settings.items() if key in card.options and key not in listed}
    for key, value in sorted(others.items()):
        yield f"{key}={spell(value)}  {card.options[key]}"


def describe(name: str) -> list[str]:
    """The card of a protocol, with or without settings, for `moebench show`.

    Raises:
        UsageError: a setting that it does not have.
    """
    asked = parse_attack(name)
    settings = {key: option.default for key, option in options_of(asked.base).items()} | dict(asked.settings)
    card = card_of(asked.base)
    assert card is not None
    return [
        str(asked),
        *(f"  {line}" for line in explain(asked.base, {"": settings})),
        f"  moebench ablation {card.name} --models …   shows what each of them is worth",
    ]

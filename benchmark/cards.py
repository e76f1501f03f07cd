"""The card of a model in words: paper, architecture, recipe, notes, shipped weights, published claims."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import asdict

from moebench.claims import load_claims
from moebench.models._base import MODELS, ModelEntry
from moebench.models._moe import MoELayer, moe_layers
from moebench.models._weights import SHIPPED, read_card
from moebench.registry import recipes_of
from moebench.schema import Claim, ThreatModel

DIGITS_SHAPE = (1, 8, 8)


def model_card(name: str) -> str:
    """Everything about a registered model, as text.

    Raises:
        UsageError: unknown name.
    """
    entry = MODELS.get(name)
    lines = [f"{entry.name}: {entry.summary}", ""]
    sections = (_paper(entry), _architecture(entry), _recipe(entry), _notes(entry), _weights(entry), _claims(entry))
    for section in map(list, sections):
        lines += [*section, ""] if section else []
    return "\n".join(lines).rstrip()


def _paper(entry: ModelEntry) -> Iterator[str]:
    paper = entry.paper
    if paper is None:
        return
    yield "Paper"
    yield f"  {paper.authors}: {paper.title}. {paper.venue} {paper.year}"
    if paper.arxiv:
        yield f"  arXiv {paper.arxiv}"
    yield from (f"  {line}" for line in paper.bibtex.splitlines())


def _architecture(entry: ModelEntry) -> Iterator[str]:
    yield "Architecture"
    doc = (entry.build.__doc__ or "").strip().splitlines()
    if doc:
        yield f"  {doc[0]}"
    yield f"  family {entry.family}" + (f", routing {entry.routing}" if entry.routing else "")
    settings = {**(entry.build.__kwdefaults__ or {}), **entry.settings}
    if settings:
        yield "  settings " + ", ".join(f"{key}={value}" for key, value in settings.items())
    model = entry.make(10, DIGITS_SHAPE)
    yield f"  at the scale of the digits (1×8×8, 10 classes): {sum(p.numel() for p in model.parameters()):,} parameters"
    for name, layer in moe_layers(model).items():
        yield f"  MoE layer {name}: {_layer(layer)}"


def _layer(layer: MoELayer) -> str:
    each = sum(p.numel() for p in layer.experts[0].parameters())
    router = sum(p.numel() for p in layer.router.parameters())
    experts = f"{len(layer.experts)} experts of {each:,} parameters, top-{layer.top_k}"
    if layer.per_token:
        experts += " per token"
    return f"{experts}, router of {router:,} ({layer.router_mode})"


def _recipe(entry: ModelEntry) -> Iterator[str]:
    yield f"Recipe ({entry.training})"
    if entry.recipe is None:
        yield "  none: this model is not trained here"
        return
    yield "  " + ", ".join(f"{key}={value}" for key, value in asdict(entry.recipe).items() if value not in ({}, None))
    for phase in entry.objective:
        left = f" without {phase.without}" if phase.without else ""
        when = "" if phase.span == (0, 1) else f", from {phase.span[0]:.0%} to {phase.span[1]:.0%} of the epochs"
        yield f"  trains {phase.part or 'the whole model'}{left}{when}"
    yield f"  moebench train --model {entry.name} --dataset digits"
    yield f"  --recipe takes {', '.join(recipes_of(entry.name))}"


def _notes(entry: ModelEntry) -> Iterator[str]:
    """What the paper's file says at its head: formulas, what differs from the paper or its code, the paper's recipe."""
    text = inspect.cleandoc(sys.modules[entry.build.__module__].__doc__ or "")
    rest = text.partition("\n")[2].strip()
    if rest:
        yield "Notes: formulas, and what differs from the paper or its code"
        yield from (f"  {line}".rstrip() for line in rest.splitlines())


def _weights(entry: ModelEntry) -> Iterator[str]:
    yield "Shipped weights"
    found = False
    for path in sorted(SHIPPED.glob(f"*/{entry.name}.safetensors")):
        found = True
        card = read_card(path)
        chosen = card["validation"]
        threat = ThreatModel(**card["threat"])
        yield f"  {path.parent.name}: sha256 {card['sha256']}, seed {card['seed']}, trained for {threat}"
        yield (
            f"    epoch {chosen['epoch']} of {card['recipe']['epochs']}, chosen by {chosen['selected_by']} accuracy "
            f"on the validation split: clean {chosen['clean']:.2%}, {chosen['robust']:.2%} under {chosen['attack']}"
        )
    if not found:
        yield "  none"


def _claims(entry: ModelEntry) -> Iterator[str]:
    claims = [claim for claim in load_claims() if claim.registry_name == entry.name]
    yield "Claims (published numbers, not ours)"
    if not claims:
        yield "  none on record"
    for claim in claims:
        yield f"  {_claim(claim)}"


def _claim(claim: Claim) -> str:
    attack = "" if claim.attack == "none" else f" under {claim.attack}"
    doubt = f"  [doubt: {claim.flag}]" if claim.flag else ""
    return f"{claim.dataset}: {claim.metric} {claim.value:g} %{attack} ({claim.source}){doubt}"

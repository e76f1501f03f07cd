"""`moebench list`: what there is, without importing torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from moebench.commands._options import debug_option
from moebench.registry import LIBRARY, Declaration, attack_registry, model_registry, objective_registry
from moebench.schema import PROTOCOL_VERSION, SUITE_VERSION, SUITES

LIBRARY_ROW = Declaration(
    LIBRARY, LIBRARY, LIBRARY, {"argument": "NAME", "summary": "an attack class of torchattacks, such as MIFGSM"}
)


@click.command("list")
@click.argument("what", type=click.Choice(["models", "attacks", "datasets", "suites", "recipes"]))
@debug_option
def list_command(what: str) -> None:
    """List models, attacks, data sets, suites or training recipes."""
    if what == "suites":
        for version, attacks in SUITES.items():
            current = " (current)" if version == SUITE_VERSION else ""
            click.echo(f"{version}{current}: {', '.join(attacks)}; protocol version {PROTOCOL_VERSION}")
        return
    declarations = _declarations(what)
    width = max((len(_shown(declaration)) for declaration in declarations), default=0)
    for declaration in declarations:
        facts = declaration.facts
        kind = f"{facts['family']:9}" if "family" in facts else ""
        rest = "" if what != "models" or _has_weights(declaration) else " (no weights shipped: moebench train)"
        click.echo(f"{_shown(declaration):{width}}  {kind}{facts.get('summary', '')}{rest}".rstrip())
    if what == "attacks":
        click.echo("NAME[KEY=VALUE,…] changes settings, such as apgd-ce[steps=20]; a wrong one is answered with all")
        click.echo(f"suite {SUITE_VERSION}, protocol {PROTOCOL_VERSION}")
    if what == "recipes":
        click.echo("These fit any model; `moebench show MODEL` names those of its own kind as well.")


def _declarations(what: str) -> list[Declaration]:
    if what == "models":
        return model_registry().declarations()
    if what == "attacks":
        return [*attack_registry().declarations(), *attack_registry().families(), LIBRARY_ROW]
    if what == "recipes":
        return objective_registry().declarations()
    from moebench.datasets import DATASETS

    return DATASETS.declarations()


def _has_weights(declaration: Declaration) -> bool:
    """Whether weights for any data set lie in the package; a model of another package looks after its own."""
    if not declaration.module.startswith("moebench."):
        return True
    found = find_spec("moebench.models")
    folders = (found.submodule_search_locations if found is not None else None) or ()
    return any(any(Path(folder).glob(f"weights/*/{declaration.name}.safetensors")) for folder in folders)


def _shown(declaration: Declaration) -> str:
    argument: Any = declaration.facts.get("argument")
    return f"{declaration.name}:{argument}" if argument else declaration.name

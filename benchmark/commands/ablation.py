"""`moebench ablation`: a published protocol with its departures taken away one by one, as a table."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import click

from moebench.commands._names import check_attack_names, check_model_name
from moebench.commands._options import (
    batch_option,
    database_option,
    dataset_option,
    debug_option,
    device_option,
    json_option,
    samples_option,
    seed_option,
    split_names,
)
from moebench.errors import UsageError
from moebench.schema import format_eps, is_protocol, parse_eps

if TYPE_CHECKING:
    from moebench.ablation import Ablation, AblationRow


@click.command("ablation")
@click.argument("protocol", metavar="published:NAME")
@click.option("--models", required=True, metavar="A[,B…]", help="Models to run the protocol on.")
@dataset_option
@click.option("--against", default="", metavar="A[,B…]", help="Attacks of moebench to show besides.")
@click.option("--eps", metavar="E", help="Radius [default: the data set's].")
@samples_option
@batch_option
@device_option
@seed_option("Seed of random starts.")
@database_option
@json_option
@debug_option
def ablation_command(
    protocol: str, models: str, dataset: str, against: str, eps: str | None, as_json: bool, **options: Any
) -> None:
    """Take a published protocol apart, defect by defect.

    Runs it as it is and with its departures taken away, and prints the table (Markdown).

    What the database has already is not computed again.
    """
    names, attacks = split_names(models), split_names(against)
    if not is_protocol(protocol):
        raise UsageError(f"{protocol!r} is no published protocol; an ablation takes one, such as published:rt-er")
    if not names:
        raise UsageError("no model given; --models takes names such as rt-er,st-moe")
    check_attack_names((protocol, *attacks))
    for name in (one for one in attacks if is_protocol(one)):
        raise UsageError(f"--against takes attacks of moebench, and {name!r} is a published protocol")
    for name in names:
        check_model_name(name)
    radius = None if eps is None else parse_eps(eps)

    from moebench.ablation import ablation
    from moebench.commands._guard import users_code
    from moebench.commands._progress import listening
    from moebench.evaluation import EvalSpec

    command = _command_line(protocol, models, dataset, against, eps, options)
    spec = EvalSpec(model=names[0], dataset=dataset, eps=radius, **options)
    with listening() as listener, users_code():
        found = ablation(protocol, names, spec, against=attacks, command=command, listener=listener)
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        for line in table_lines(found):
            click.echo(line)


def _command_line(
    protocol: str, models: str, dataset: str, against: str, eps: str | None, options: dict[str, Any]
) -> str:
    """The shortest command that computes the same numbers."""
    words = ["moebench", "ablation", protocol, "--models", models]
    for option, value, default in (("--dataset", dataset, "digits"), ("--against", against, ""), ("--eps", eps, None)):
        if value != default:
            words += [option, str(value)]
    for key, unset in (("n", None), ("batch_size", None), ("seed", 0)):
        if options[key] != unset:
            words += [f"--{key.replace('_', '-')}", str(options[key])]
    return shlex.join(words)


def table_lines(found: Ablation) -> list[str]:
    """The table in Markdown: percent, and in brackets the difference to the published protocol in points."""
    published = next(row for row in found.rows if row.kind == "published")
    lines = [
        f"{found.card.name} on {found.dataset}, n = {found.n}, Linf eps {format_eps(found.eps)}; percent, and in "
        "brackets the difference to the published protocol in points.",
        "",
        f"| row | {' | '.join(found.models)} |",
        f"| --- |{' --- |' * len(found.models)}",
    ]
    for row in found.rows:
        cells = row.texts if row.kind == "claim" else _cells(row, published)
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return [*lines, "", f"runs: {', '.join(found.runs)}"]


def _cells(row: AblationRow, published: AblationRow) -> list[str]:
    cells = []
    for one, base in zip(row.measures, published.measures, strict=True):
        text = "—" if one is None else f"{100 * one.value:.1f}"
        if one is not None and base is not None and row is not published:
            text += f" ({100 * (one.value - base.value):+.1f})"
        cells.append(text)
    return cells

"""`moebench experts`: each expert of an MoE layer, fixed for all images, beside the gated model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from moebench.commands._guard import users_code
from moebench.commands._names import check_names
from moebench.commands._options import (
    batch_option,
    database_option,
    dataset_option,
    debug_option,
    device_option,
    json_option,
    model_option,
    norm_option,
    parse_settings,
    samples_option,
    seed_option,
    settings_option,
    split_names,
    weights_option,
)
from moebench.commands.evaluate import command_line
from moebench.schema import ThreatModel, parse_eps

if TYPE_CHECKING:
    from moebench.experts import ExpertRow, ExpertTable
    from moebench.metrics import Paired


@click.command("experts")
@model_option
@click.option("--layer", metavar="NAME", help="MoE layer whose experts are fixed [default: the last one].")
@click.option("--attack", default="pgd-20", show_default=True, metavar="A[,B…]", help="Attacks, see `list attacks`.")
@dataset_option
@norm_option
@click.option("--eps", metavar="EPS", help="Radius, such as 8/255 or 0.03 [default: the data set's].")
@samples_option
@batch_option
@device_option
@seed_option("Seed of random starts and proposals.")
@weights_option
@settings_option
@database_option
@click.option("--fresh", is_flag=True, help="Compute again what the database already has.")
@json_option
@debug_option
def experts_command(
    model: str,
    layer: str | None,
    attack: str,
    dataset: str,
    eps: str | None,
    settings: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Compare each expert of an MoE layer with the gate.

    An expert is forced for all images, the other layers keep routing; attacks see that path and are judged on it. Every
    expert is a model of its own in the store, NAME/expert[LAYER:i].
    """
    radius = None if eps is None else parse_eps(eps)
    if radius is not None:
        ThreatModel(options["norm"], radius)
    attacks = split_names(attack)
    check_names(model, attacks, ())

    from moebench.commands._progress import listening
    from moebench.evaluation import EvalSpec
    from moebench.experts import fixed_experts

    spec = EvalSpec(
        model=model, dataset=dataset, attacks=attacks, eps=radius, settings=parse_settings(settings), **options
    )

    def command(name: str) -> str:
        return command_line(name, dataset, attacks, ("whole",), eps, settings, options)

    with listening() as listener, users_code():
        table = fixed_experts(spec, layer, command=command, listener=listener)
    if as_json:
        click.echo(json.dumps(table.to_json()))
    else:
        _print(table)


def _print(table: ExpertTable) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from moebench.commands._tables import percent, standard_output

    console = standard_output()
    gate, threat = table.rows[0], ThreatModel(table.norm, table.eps)  # type: ignore[arg-type]
    console.print(
        f"[bold]{escape(gate.model)}[/bold], experts of {escape(table.layer)}, on {escape(table.dataset)}, "
        f"n = {table.n}, {threat}"
    )
    console.print(
        "Each expert answers for all images; attacks see that path and are judged on it. p: paired with the gate"
    )
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("answers")
    for heading in ("load %", "SA %", "p", f"RA % ({', '.join(gate.attacks)})", "p"):
        shown.add_column(escape(heading), justify="right")
    for row in table.rows:
        shown.add_row(*map(escape, _cells(row, percent(row.load))))
    console.print(shown)
    for metric in ("sa", "ra"):
        better, sure = table.above(metric)
        names = f" ({', '.join(map(str, better))})" if better else ""
        console.print(
            f"{metric.upper()} above the gate: {len(better)} of {len(table.rows) - 1} experts{names}, "
            f"{len(sure)} with p < 0.05"
        )
    others = [name for name in table.layers if name != table.layer]
    if others:
        console.print(f"other MoE layers, for --layer: {escape(', '.join(others))}")
    if table.reused:
        console.print(f"{table.reused} results were in the database already and not computed again (--fresh does).")


def _cells(row: ExpertRow, load: str) -> tuple[str, ...]:
    from moebench.commands._tables import measured

    name = "the gate" if row.expert is None else f"expert {row.expert}"
    return (
        name, "" if row.expert is None else load,
        measured(row.sa), _p(row.sa_test), measured(row.ra), _p(row.ra_test),
    )  # fmt: skip


def _p(test: Paired | None) -> str:
    from moebench.report.text import p_value

    return "" if test is None else p_value(test.p)

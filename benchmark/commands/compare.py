"""`moebench compare`: paired tests between models of the database."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from moebench.commands._options import database_option, debug_option, json_option, split_names
from moebench.schema import check_view_name, parse_eps

if TYPE_CHECKING:
    from moebench.report.comparison import Comparison


@click.command("compare")
@click.option("--models", required=True, metavar="A,B[,…]", help="Models of the database; every two are compared.")
@click.option("--attack", default="", metavar="A[,B…]", help="Attacks [default: those that all models have].")
@click.option("--view", default="whole", show_default=True, metavar="V", help="What of the models the attacks saw.")
@click.option("--dataset", metavar="NAME", help="Only results on this data set.")
@click.option("--norm", type=click.Choice(["Linf", "L2"]), help="Only results in this norm.")
@click.option("--eps", metavar="EPS", help="Only results at this radius, such as 8/255.")
@click.option("--n", type=int, metavar="N", help="Only results on N samples.")
@database_option
@json_option
@debug_option
def compare_command(
    models: str, attack: str, view: str, eps: str | None, db: str | None, as_json: bool, **asked: Any
) -> None:
    """Compare models of the database on the same samples.

    For each attack the accuracy of both with its 95 % interval, how many samples only one of them gets wrong, and the p
    of the exact McNemar test on these (two-sided, no correction for many tests). Without --eps and --n the protocol
    counts that the models have most attacks on in common.
    """
    check_view_name(view)
    radius = None if eps is None else parse_eps(eps)
    from moebench.report.comparison import Wanted, compare
    from moebench.store import Store

    wanted = Wanted(split_names(models), split_names(attack), view, eps=radius, **asked)
    with Store.open(db, write=False) as store:
        found = compare(store, wanted)
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        _print(found)


def _print(found: Comparison) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from moebench.commands._tables import measured, standard_output
    from moebench.report.comparison import WORST
    from moebench.report.text import p_value

    console, protocol = standard_output(), found.protocol
    on_view = "" if found.view == "whole" else f"; attacks on the view {found.view}, {WORST} on all"
    console.print(escape(f"{protocol.dataset}, n = {protocol.n}, {protocol.threat}{on_view}"))
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("attack", "first", "second"):
        shown.add_column(heading)
    for heading in ("first %", "second %", "only first wrong", "only second wrong", "p"):
        shown.add_column(heading, justify="right")
    for one in found.contests:
        alone = (str(one.test.only_first), str(one.test.only_second))
        shown.add_row(
            *map(escape, (one.attack, *one.models, *map(measured, one.accuracies), *alone, p_value(one.test.p)))
        )
    console.print(shown)

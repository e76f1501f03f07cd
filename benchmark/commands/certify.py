"""`moebench certify`: margins, estimated radii and proven radii of a model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from moebench.commands._guard import users_code
from moebench.commands._names import check_names
from moebench.commands._options import (
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
    weights_option,
)
from moebench.schema import format_eps, parse_eps

if TYPE_CHECKING:
    from moebench.certify import Certificate, Spread


@click.command("certify")
@model_option
@dataset_option
@click.option("--attack", default="pgd-50", show_default=True, metavar="A", help="Makes the attacked images.")
@norm_option
@click.option("--eps", metavar="EPS", help="Radius of the attack and of the slopes [default: the data set's].")
@samples_option
@click.option("--points", type=int, default=8, show_default=True, metavar="N", help="Random points for the slopes.")
@click.option("--batch-size", type=int, metavar="N", help="Samples that run together [default: by image size].")
@device_option
@seed_option("Seed of random starts and random points.")
@weights_option
@settings_option
@json_option
@debug_option
def certify_command(
    settings: tuple[str, ...], attack: str, eps: str | None, points: int, as_json: bool, **options: Any
) -> None:
    """Measure a model's margins and the radii they give.

    Estimated radii put the largest gradient found in place of a Lipschitz constant and prove nothing. Proven radii
    come from interval bounds over all experts that the router can reach, and are small.
    """
    radius = None if eps is None else parse_eps(eps)
    check_names(options["model"], (attack,), ())

    from moebench.certify import certify
    from moebench.commands._progress import listening
    from moebench.evaluation import EvalSpec

    spec = EvalSpec(attacks=(attack,), views=("whole",), eps=radius, settings=parse_settings(settings), **options)
    with listening() as listener, users_code():
        found = certify(spec, points=points, listener=listener)
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        _print(found)


def _print(found: Certificate) -> None:
    radius = format_eps(found.eps)
    click.echo(f"{found.model} on {found.dataset}, n = {found.n}, {found.norm} {radius}")
    click.echo(f"  right on clean images {found.sa:.2%}, under {found.attack} {found.standing:.2%}")
    for name, spread in found.margins.items():
        _line(f"margin of the logits, {name}", spread, "above 0")
    _line("estimated radius (proves nothing)", found.estimated, f"at least {radius}")
    for name, spread in found.dual.items():
        _line(f"dual bound: {name}", spread, f"at least {spread.threshold:.3g}")
    if found.certified is None:
        click.echo(f"  proven radius: none, {found.why}")
    else:
        _line("proven radius (interval bounds)", found.certified, f"at least {radius}")


def _line(name: str, spread: Spread, reached: str) -> None:
    values = ", ".join(f"{level} {value:.3g}" for level, value in spread.percentiles.items())
    click.echo(f"  {name}: {values}; {reached} on {spread.reaching:.2%}")

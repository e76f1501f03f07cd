"""`moebench verify`: repeat a stored run on some of its samples and compare."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from moebench.commands._guard import users_code
from moebench.commands._options import database_option, debug_option, device_option, json_option, seed_option
from moebench.errors import UsageError

if TYPE_CHECKING:
    from moebench.repeat import Verification

SHOWN = 20
"""How many differing samples are printed."""


@click.command("verify")
@click.argument("run", metavar="RUN")
@click.option("--samples", type=int, metavar="N", help="How many of the run's samples, drawn at random [default: 20].")
@click.option("--all", "everything", is_flag=True, help="All samples.")
@device_option
@seed_option("Seed of the choice of samples.")
@database_option
@json_option
@debug_option
def verify_command(
    run: str, samples: int | None, everything: bool, device: str, seed: int, db: str | None, as_json: bool
) -> int:
    """Repeat a stored run on some samples, and compare.

    RUN is the start of a run's id. The verdict of each sample is compared with the stored one. Exit code 0 if all came
    out again, 1 if not, 2 if the run cannot be repeated: model, weights, data and settings must be what they were.
    Nothing is stored.
    """
    if samples is not None and everything:
        raise UsageError("--samples and --all exclude each other")
    if samples is not None and samples < 1:
        raise UsageError(f"--samples must be at least 1, got {samples}")
    from moebench.store import Store

    with Store.open(db, write=False) as store:
        stored = store.run(run)
        outcomes = {result.result_id: store.outcomes(result.result_id) for result in stored.results}
    from moebench.commands._progress import listening
    from moebench.commands._repeatable import spec_of
    from moebench.repeat import verify

    spec, radii = spec_of(stored, device)
    with listening() as listener, users_code():
        found = verify(
            stored,
            outcomes,
            spec,
            radii,
            samples=None if everything else samples or 20,
            seed=seed,
            listener=listener,
        )
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        _say(found)
    return 0 if found.agrees else 1


def _say(found: Verification) -> None:
    click.echo(f"run {found.run_id} again on {len(found.index)} of {found.n} samples")
    for cell in found.cells:
        name = f"  {cell.attack} on {cell.view}"
        if cell.skipped is not None:
            click.echo(f"{name}: not compared; {cell.skipped}")
            continue
        other = f"; {cell.other_class} broken into another class" if cell.other_class else ""
        click.echo(f"{name}: {cell.agree} of {cell.compared} verdicts as stored{other}")
    for one in found.differences[:SHOWN]:
        click.echo(
            f"  sample {one.index}, {one.attack} on {one.view}: {_verdict(one.was_broken, one.was_clean_pred)} then, "
            f"{_verdict(one.is_broken, one.is_clean_pred)} now"
        )
    if len(found.differences) > SHOWN:
        click.echo(f"  and {len(found.differences) - SHOWN} more")
    for doubt in found.doubts:
        click.echo(f"  {doubt}")


def _verdict(broken: bool, clean_pred: int) -> str:
    return f"{'broken' if broken else 'standing'} (clean prediction {clean_pred})"

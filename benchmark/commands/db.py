"""`moebench db`: bring a results database up to date, check it, add another one to it."""

from __future__ import annotations

import json

import click

from moebench.commands._options import database_option, debug_option, json_option


@click.group("db")
@debug_option
def db_command() -> None:
    """Look after a results database."""


@db_command.command("upgrade")
@database_option
@debug_option
def upgrade_command(db: str | None) -> None:
    """Bring a database of an earlier version up to date.

    Labels that it lacks are read from data that is bundled or a file on this machine; nothing is downloaded.
    """
    from moebench.labelling import fill_labels
    from moebench.store import Store
    from moebench.store.migrate import REVISIONS

    with Store.open(db, write=True, create=False) as store:
        filled, missing = fill_labels(store)
        steps = "is up to date" if store.found == REVISIONS[-1] else f"was of schema {store.found}, now up to date"
        click.echo(f"{store.where} {steps} (schema {REVISIONS[-1]})")
    if filled:
        sets = ", ".join(sorted({f"{protocol.dataset} (n = {protocol.n})" for protocol in filled}))
        click.echo(f"labels added: {sets}")
    for name, why in sorted(missing.items()):
        click.echo(f"labels of {name} stay unknown: {why}")


@db_command.command("check")
@database_option
@json_option
@debug_option
def check_command(db: str | None, as_json: bool) -> int:
    """Check that a database adds up.

    Exit code 1 and a line for each problem if it does not. Verifies pages, references, hashes (of models, weights and
    protocols; fingerprints of results and runs), and that every aggregate is what its samples give: accuracies,
    intervals, passes, seconds, stages, losses, routing, pictures.
    """
    from moebench.store import Store

    with Store.open(db, write=False) as store:
        problems = store.check()
        counts = {"runs": len(store.runs()), "results": len(store.results(newest_only=False))}
        facts = {"database": store.where, "schema": store.found, **counts, "problems": problems}
    if as_json:
        click.echo(json.dumps(facts))
    else:
        for line in problems:
            click.echo(line)
        found = f"{len(problems)} problem{'s' * (len(problems) != 1)}" if problems else "all of it adds up"
        click.echo(f"{facts['database']}: {counts['runs']} runs, {counts['results']} finished results; {found}")
    return 1 if problems else 0


@db_command.command("merge")
@click.argument("other", metavar="OTHER.db|URL")
@database_option
@json_option
@debug_option
def merge_command(other: str, db: str | None, as_json: bool) -> None:
    """Add another database to this one: its runs and finished results.

    What is here already is left alone, so that merging again changes nothing; OTHER is read and never changed. It is
    checked first; either all of it is added or none.
    """
    from dataclasses import asdict

    from moebench.store import Store

    with Store.open(other, write=False) as source:
        # Before the other one is opened, which may make or upgrade it.
        source.refuse_unsound()
        with Store.open(db, write=True) as store:
            merged = store.merge(source)
            where, origin = store.where, source.where
    if as_json:
        click.echo(json.dumps({"database": where, "other": origin, **asdict(merged)}))
        return
    click.echo(f"{where}: {merged.runs} runs and {merged.results} results added from {origin}")
    if merged.known_runs or merged.known_results:
        click.echo(f"{merged.known_runs} runs and {merged.known_results} results were here already")
    if merged.ended_runs:
        click.echo(f"{merged.ended_runs} runs that were running here have ended there")
    if merged.unfinished:
        click.echo(f"{merged.unfinished} unfinished results were left out; merge again when they are done")
    for cell in merged.contradictions:
        click.echo(f"both have computed {cell}, with different verdicts; the newest counts")

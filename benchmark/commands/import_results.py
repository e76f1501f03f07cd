"""`moebench import`: results of another lab, checked and kept apart."""

from __future__ import annotations

from pathlib import Path

import click

from moebench.commands._options import database_option, debug_option


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path), metavar="RESULTS.json")
@click.option("--from", "lab", metavar="NAME", help="Who measured, for tables [default: what the file says].")
@click.option("--dry-run", is_flag=True, help="Check the file and write nothing.")
@database_option
@debug_option
def import_command(file: Path, lab: str | None, dry_run: bool, db: str | None) -> None:
    """Take in another lab's results, marked as external.

    The file is what `moebench export --format json` wrote there. It is checked against its schema, its hashes and its
    own samples. What it holds is shown without a rank; it never replaces results of this store, and no command reuses
    it.
    """
    from moebench.errors import UsageError
    from moebench.external import read_external, without
    from moebench.report.external import origin
    from moebench.store import Store

    found = read_external(file, lab)
    if dry_run:
        click.echo(f"{found.results} results of {found.lab} in {len(found.runs)} runs; the file is sound")
        return
    try:
        with Store.open(db, write=False) as store:
            own = {run.run_id for run in store.runs() if origin(run.environment) is None}
    except UsageError:
        # No database yet; one that cannot be opened is refused below, by the same words.
        own = set()
    foreign = without(found, own)
    if not foreign.runs:
        click.echo(f"all {found.results} results are this store's own; nothing was added")
        return
    with Store.open(db, write=True) as store:
        added = store.add_external(foreign.runs)
        where = store.where
    there = foreign.results - added
    click.echo(
        f"{added} results of {found.lab} added to {where} as external"
        + (f", {there} were there already" if there else "")
        + (f", {found.results - foreign.results} are this store's own" if foreign.results != found.results else "")
    )

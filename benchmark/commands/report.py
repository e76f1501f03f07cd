"""`moebench report`: render the pages and tables from the store."""

from __future__ import annotations

from pathlib import Path

import click

from moebench.commands._options import database_option, debug_option


@click.command("report")
@click.option("--out", type=click.Path(path_type=Path), default=Path("reports"), show_default=True, metavar="DIR")
@database_option
@debug_option
def report_command(out: Path, db: str | None) -> None:
    """Render pages, LaTeX tables and data files from the database."""
    from moebench.report import write_report
    from moebench.store import Store

    with Store.open(db, write=False) as store:
        paths = write_report(store, out)
    click.echo(f"{len(paths)} files written; open {out / 'index.html'}")

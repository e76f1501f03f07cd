"""`moebench report`: render the pages and tables from the store."""

from __future__ import annotations

from pathlib import Path

import click

from moebench.commands._options import database_option, debug_option


@click.command("report")
@click.option("--out", type=click.Path(path_type=Path), default=Path("reports"), show_default=True, metavar="DIR")
@click.option(
    "--since", type=click.Path(path_type=Path), metavar="OLD",
    help="Also say what changed since an earlier report: its folder (--out itself will do: it is read first) or its "
    "data/snapshot.json.",
)  # fmt: skip
@database_option
@debug_option
def report_command(out: Path, since: Path | None, db: str | None) -> None:
    """Render pages, LaTeX tables and data files from the database."""
    from moebench.report import snapshot, write_report
    from moebench.store import Store

    before = None if since is None else snapshot.read(since)
    with Store.open(db, write=False) as store:
        paths = write_report(store, out, before)
    click.echo(f"{len(paths)} files written; open {out / 'index.html'}")

"""`moebench export`: tables for papers and files for machines, from the store."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moebench.commands._options import database_option, debug_option, split_names
from moebench.errors import RunError, UsageError
from moebench.schema import parse_eps

if TYPE_CHECKING:
    from moebench.report.export import Choice, Written

LATEX = ("wide", "caption", "label", "cite", "interval")
"""Options that only LaTeX has a use for."""

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9:._/+-]*")


@click.command("export")
@click.option(
    "--format", "kind", required=True, metavar="F", help="latex, csv, json, markdown, bibtex, parquet or model_info."
)
@click.option(
    "--out", metavar="FILE|DIR", help="Where to write; a folder (DIR/) takes all tables [default: standard output]."
)
@click.option(
    "--table",
    "tables",
    metavar="T[,U…]",
    help="leaderboard, claims, transfer, attacks or missed [default: leaderboard; all into a folder].",
)
@click.option("--dataset", metavar="NAME", help="Only this data set.")
@click.option("--norm", metavar="NORM", help="Only Linf or L2.")
@click.option("--eps", metavar="EPS", help="Only this radius, such as 8/255.")
@click.option("--n", type=int, metavar="N", help="Only results on N samples.")
@click.option("--models", default="", metavar="A[,B…]", help="Only these models; ranks stay those among all.")
@click.option("--columns", metavar="A[,B…]", help="These columns in this order; a wrong one is answered with all.")
@click.option("--interval", metavar="I", help="latex: pm (±), ends (sub- and superscripts) or none [default: pm].")
@click.option("--wide", is_flag=True, help="latex: a table* over both columns of the page.")
@click.option("--caption", metavar="TEXT", help="latex: a float with this caption.")
@click.option("--label", metavar="KEY", help="latex: a float with this label.")
@click.option("--cite", is_flag=True, help="latex: \\cite the paper of each row (--format bibtex has the entries).")
@click.option("--from", "lab", metavar="NAME", help="json: who measured, for those who import the file.")
@database_option
@debug_option
def export_command(kind: str, out: str | None, db: str | None, **options: Any) -> None:
    """Write tables for papers and files for machines.

    latex, markdown and csv of one table go to standard output unless --out names a file. json holds all results with
    the verdict on every sample; `moebench import` reads it. model_info is RobustBench's format, one file per model.
    """
    folder = out is not None and (out.endswith(("/", "\\")) or Path(out).is_dir())
    choice = _choice(kind, folder, options)
    if choice.format == "parquet" and out is None:
        raise UsageError("parquet is no text; name a file with --out FILE or a folder with --out DIR/")

    from moebench.report.export import export
    from moebench.store import Store

    with Store.open(db, write=False) as store:
        written = export(store, choice)
    for note in written.notes:
        click.echo(f"moebench: {note}", err=True)
    if out is None:
        _say(written, choice)
    else:
        _write(written, Path(out), folder)


def _choice(kind: str, folder: bool, options: dict[str, Any]) -> Choice:
    """The options as one choice.

    Raises:
        UsageError: an unknown name, or an option that the format has no use for.
    """
    from moebench.external import check_lab
    from moebench.report.export import FORMATS, TABLE_FORMATS, Choice
    from moebench.report.grids import KINDS
    from moebench.report.latex import INTERVALS, Style
    from moebench.report.suggest import one_of
    from moebench.schema import NORMS

    made = one_of("format", kind, FORMATS)
    for name in LATEX:
        if made != "latex" and options[name] not in (None, False):
            raise UsageError(f"--{name} is for --format latex, not {made}")
    if options["lab"] is not None and made != "json":
        raise UsageError(f"--from is for --format json, not {made}")
    if options["columns"] is not None and made not in TABLE_FORMATS:
        raise UsageError(f"--columns is for {', '.join(TABLE_FORMATS)}, not {made}")
    if options["tables"] is not None and made not in (*TABLE_FORMATS, "bibtex"):
        raise UsageError(f"--table is for {', '.join(TABLE_FORMATS)} and bibtex; {made} holds all results")
    kinds = tuple(one_of("table", name, KINDS) for name in split_names(options["tables"] or ""))
    if options["tables"] is not None and not kinds:
        raise UsageError(f"--table names no table; there is {', '.join(KINDS)}")
    if len(kinds) > 1 and made != "bibtex" and not folder:
        raise UsageError(f"{len(kinds)} tables need a folder: --out DIR/")
    if not kinds and made in TABLE_FORMATS and not folder:
        kinds = ("leaderboard",)
    if options["columns"] is not None and len(kinds) != 1:
        raise UsageError("--columns is for one kind of table; name it with --table")
    if options["label"] is not None and not LABEL.fullmatch(options["label"]):
        raise UsageError(f"--label takes letters, digits and : . _ / + -, got {options['label'][:60]!r}")
    columns = options["columns"]
    return Choice(
        format=made,  # type: ignore[arg-type]  # one of FORMATS
        kinds=kinds,
        dataset=options["dataset"],
        norm=None if options["norm"] is None else one_of("norm", options["norm"], NORMS),
        eps=None if options["eps"] is None else parse_eps(options["eps"]),
        n=options["n"],
        models=split_names(options["models"]),
        style=Style(
            columns=None if columns is None else split_names(columns),
            wide=options["wide"],
            caption=options["caption"],
            label=options["label"],
            interval=one_of("interval", options["interval"] or "pm", INTERVALS),  # type: ignore[arg-type]
        ),
        cite=options["cite"],
        lab=None if options["lab"] is None else check_lab(options["lab"]),
        together=folder,
    )


def _say(written: Written, choice: Choice) -> None:
    if len(written.files) > 1:
        raise UsageError(f"{len(written.files)} files need a folder: --out DIR/ (or choose with --models)")
    (content,) = written.files.values()
    # As bytes: what is UTF-8 in a file is UTF-8 in a pipe, whatever the locale.
    stream = getattr(sys.stdout, "buffer", None)
    if stream is None:
        click.echo(content.decode(), nl=False)
        return
    sys.stdout.flush()
    stream.write(content)
    stream.flush()


def _write(written: Written, out: Path, folder: bool) -> None:
    from moebench.files import replace_file

    if not folder and len(written.files) > 1:
        raise UsageError(f"{len(written.files)} files need a folder: --out {out}/")
    for name, content in written.files.items():
        path = out / name if folder else out
        try:
            replace_file(path, content)
        except OSError as error:
            raise RunError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
        click.echo(f"{path}", err=True)

"""The pages: a Jinja environment that escapes everything, and the few filters that write numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from moebench.report import boards, text
from moebench.report.evidence import public
from moebench.report.overlap import unit_label
from moebench.report.pages import Page
from moebench.report.tables import COMPONENTS, Report, page_name
from moebench.schema import format_eps

ASSETS = files("moebench") / "templates" / "assets"
GENERATOR = "moebench report"
PAGES = (
    ("Leaderboards", "index.html"),
    ("Models", "index.html#models"),
    ("Transfer", "transfer.html"),
    ("Pareto", "pareto.html"),
    ("Attacks", "attacks.html"),
    ("Method", "method.html"),
    ("Changes", "changes.html"),
)
"""Every page that the navigation may name, in its order."""


def asset(name: str) -> str:
    """The text of a file that ships beside the templates."""
    return ASSETS.joinpath(name).read_text(encoding="utf-8")


def assets() -> dict[str, str]:
    """What all pages share, by path: the style, the scripts, and the libraries with their licences."""
    own = sorted(file.name for file in ASSETS.iterdir() if file.is_file())
    vendored = sorted(file.name for file in ASSETS.joinpath("vendor").iterdir())
    return {f"assets/{name}": asset(name) for name in own} | {
        f"assets/vendor/{name}": asset(f"vendor/{name}") for name in vendored
    }


def arxiv_url(identifier: str | None) -> str | None:
    """The abstract's address, or None for what is no arXiv identifier."""
    if identifier is None or not re.fullmatch(r"\d{4}\.\d{4,5}(v\d+)?|[a-z-]+(\.[A-Z]{2})?/\d{7}", identifier):
        return None
    return f"https://arxiv.org/abs/{identifier}"


@cache
def environment(existing: tuple[str, ...] = ("index.html", "method.html")) -> Environment:
    """Strict templates: everything is escaped, and a name that does not exist is an error. Compiled once.

    Args:
        existing: the pages that this report has; the navigation names no other.
    """
    made = Environment(
        loader=PackageLoader("moebench", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(
        percent=text.percent,
        decimal=text.decimal,
        sortable=text.sortable,
        quantity=text.quantity,
        seconds=text.seconds,
        p_value=text.p_value,
        flatten=text.flatten,
        grouped=text.grouped,
        moment=text.moment,
        plain=text.plain,
        public=public,
        href=quote,
        eps=format_eps,
        arxiv=arxiv_url,
        unit=unit_label,
        page_name=page_name,
    )
    nav = tuple((name, file) for name, file in PAGES if file.partition("#")[0] in existing)
    made.globals.update(generator=GENERATOR, components=COMPONENTS, nav=nav)
    return made


def render(report: Report, pages: Sequence[Page] = ()) -> dict[str, str | bytes]:
    """The pages of a report by path with the pictures that they show: leaderboards, models, and the given ones."""
    templates = environment(("index.html", *(page.file for page in pages)))
    views = [boards.view(board) for board in report.boards]
    made: dict[str, str | bytes] = {
        "index.html": templates.get_template("leaderboard.html").render(report=report, views=views, root="")
    }
    made |= {page.file: templates.get_template(page.file).render(**page.facts, root="") for page in pages}
    model = templates.get_template("model.html")
    for page in report.models:
        made[f"models/{page.page}"] = model.render(page=page, root="../")
        made |= {f"models/{path}": content for path, content in page.details.files.items()}
    return made | assets()

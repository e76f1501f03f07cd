"""Names that try to be markup, formulas, paths or LaTeX, a store full of one, and what a page makes of it."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

from fake_store import FakeStore, claim, first_broken, model, paper, protocol, routing

from moebench.schema import Flag

HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "100% & more_$#{}~^\\input{x}",
    "=cmd()",
    "+1+1",
    "-2",
    "@SUM(A1)",
    "\t=1",
    "[starts with a bracket]",
    "專家混合 αβ – Łukasz Böhm 🤖",
    "../../etc/passwd",
    "{{ 7 * 7 }}{% raw %}",
    "x" * 200,
    "{{'a'}}``''--<<>>",
    "CON",
    "a\nb\r% c",
)


def hostile_store(name: str) -> FakeStore:
    """A model, its data sets, attacks, views, stages, flags, errors and claims, all of that name."""
    store, digits = FakeStore(), replace(protocol(), dataset=name)
    who = model(name, "moe", summary=name, paper=replace(paper(name), authors=name, venue=name, arxiv=name))
    done = store.add(who, "autoattack", first_broken(200, 40), layers=(routing(name),), stage=name, stages={name: {}})
    store.add(who, name, first_broken(200, 90), name)
    store.add(who, "pgd-50", first_broken(200, 20), on=digits)
    store.add_run(done, "failed", flags=(Flag(name, name),), error=name)
    facts = {"model": name, "architecture": name, "attack_params": name, "source": name, "flag": name}
    store.published = [claim(name, 50.0, dataset="CIFAR-10", **facts), claim(name, 51.0, dataset=name or "?", **facts)]
    return store


class Tags(HTMLParser):
    """Collects the elements of a page and the text outside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.scripts += [dict(attrs)][: tag == "script"]

    def handlers(self) -> list[str]:
        """The attributes that would run a script."""
        return [name for name in self.attributes if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] not in (["script"], ["style"]):
            self.words.append(data)


def parsed(page: str) -> Tags:
    """The elements and the text of a page."""
    seen = Tags()
    seen.feed(page)
    return seen

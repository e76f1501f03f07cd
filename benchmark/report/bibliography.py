"""BibTeX: one entry per paper, each key once, and nothing in it that a card from outside could run."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

from moebench.papers import own_paper, paper_cards
from moebench.report.latex_text import escape
from moebench.schema import PaperCard

HEAD = re.compile(r"\s*@(?P<kind>[A-Za-z]+)\s*\{\s*(?P<key>[A-Za-z0-9][A-Za-z0-9:._/+-]*)\s*,")
KINDS = frozenset(
    {"article", "book", "inproceedings", "incollection", "misc", "phdthesis", "techreport", "unpublished"}
)
ACCENT = re.compile(
    r"""\\(?:["'`^~=.&%$#_{}-]|(?:aa|AA|ae|AE|oe|OE|ss|o|O|l|L|i|j|c|u|v|H|r|k|emph|textit)(?![A-Za-z]))"""
)
"""The commands that an entry may hold: accents, letters, escaped signs."""


@dataclass(frozen=True)
class Bibliography:
    """The entries of some papers, in the order of their keys, and the key of each paper."""

    entries: tuple[str, ...]
    keys: Mapping[PaperCard, str]

    @property
    def text(self) -> str:
        """The content of a .bib file."""
        return "\n\n".join(self.entries) + "\n"


def bibliography(cards: Iterable[PaperCard]) -> Bibliography:
    """One entry for each paper among the cards, and moebench's own.

    Cards of one paper (the same arXiv identifier, or the same title) make one entry, that of the packaged card if there
    is one; unlike papers whose cards have the same key get unlike keys.
    """
    groups: dict[str, list[PaperCard]] = {}
    for card in dict.fromkeys([own_paper(), *cards]):
        groups.setdefault(_same(card), []).append(card)
    keys: dict[PaperCard, str] = {}
    entries: dict[str, str] = {}
    for identity in sorted(groups):
        chosen = _chosen(groups[identity], identity)
        key, entry = _entry(chosen)
        key = _free(key, entries)
        head = HEAD.match(entry)
        assert head is not None
        entries[key] = f"@{head['kind'].lower()}{{{key},{entry[head.end() :]}"
        keys |= dict.fromkeys(groups[identity], key)
    return Bibliography(tuple(entries[key] for key in sorted(entries)), keys)


def _same(card: PaperCard) -> str:
    """What two cards of one paper have in common."""
    if card == own_paper():
        return ""
    return f"arxiv {card.arxiv.partition('v')[0]}" if card.arxiv else f"title {_plain(card.title)}"


def _chosen(group: Sequence[PaperCard], identity: str) -> PaperCard:
    packaged = [card for card in (own_paper(), *paper_cards()) if _same(card) == identity]
    return packaged[0] if packaged else min(group, key=lambda card: (card.title, card.bibtex))


def _entry(card: PaperCard) -> tuple[str, str]:
    """Key and text of a card's entry: its own where that is sound, else one made of its facts."""
    found = HEAD.match(card.bibtex)
    if found and found["kind"].lower() in KINDS and _sound(card.bibtex):
        return found["key"], card.bibtex.strip()
    key = f"{_plain(_first_author(card) or 'anonymous')}{card.year or ''}{_plain(card.title.split(' ')[0])}"[:60]
    fields = {"title": f"{{{escape(card.title)}}}", "author": " and ".join(map(escape, _authors(card)))}
    fields |= {"howpublished": escape(card.venue), "year": str(card.year) if card.year > 0 else ""}
    fields["note"] = f"arXiv:{escape(card.arxiv)}" if card.arxiv else ""
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value and value != "{}")
    return key or "paper", f"@misc{{{key or 'paper'},\n{lines}\n}}"


def _sound(text: str) -> bool:
    """Whether a text is one entry with balanced braces, whose values are plain words to LaTeX.

    Anything else, a second entry or a command for instance, would be run by whoever cites the paper.
    """
    depth, closed = 0, 0
    for at, char in enumerate(text):
        escaped = at > 0 and text[at - 1] == "\\"
        if char in "{}" and not escaped:
            depth += 1 if char == "{" else -1
            closed += depth == 0
        if depth < 0 or (depth == 0 and closed and not (char.isspace() or char == "}")):
            return False
    bare = ACCENT.sub("", text)
    return depth == 0 and closed == 1 and not set(bare) & set("\\&%$#_^~\x00") and bare.count("@") == 1


def _authors(card: PaperCard) -> list[str]:
    return [name.strip() for name in re.split(r",| and ", card.authors) if name.strip()]


def _first_author(card: PaperCard) -> str:
    names = _authors(card)
    return names[0].split()[-1] if names else ""


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]", "", folded) or re.sub(r"\W", "", text.casefold())


def _free(key: str, taken: Mapping[str, str]) -> str:
    """The key, with a letter behind it where another paper has it; BibTeX takes keys of unlike case for one."""
    lowered = {one.lower() for one in taken}
    choices = [key, *(f"{key}{letter}" for letter in ascii_lowercase), *(f"{key}-{at}" for at in range(2, 10_000))]
    return next(one for one in choices if one.lower() not in lowered)

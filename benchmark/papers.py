"""The papers behind models and attacks, and how moebench itself is cited; read from the source, without torch.

A card is written once, beside the model or the attack that it is about. Where two files have a card of the same paper,
that of the model counts.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from moebench import __version__
from moebench.registry import LIBRARY, attack_registry, package_folder
from moebench.schema import PROTOCOL_VERSION, SUITE_VERSION, PaperCard

TITLE = "moebench: a benchmark of the adversarial robustness of mixture-of-experts models"
AUTHORS = "The moebench developers"

Scope = dict[str, PaperCard]


def own_paper() -> PaperCard:
    """How moebench is cited: the facts of CITATION.cff, which a test compares with these."""
    kind, colon, rest = TITLE.partition(":")
    bibtex = "\n".join(
        (
            "@misc{moebench,",
            f"  title = {{{{{kind}}}{colon}{rest}}},",
            f"  author = {{{{{AUTHORS}}}}},",
            f"  note = {{Software, version {__version__}, suite {SUITE_VERSION}, protocol {PROTOCOL_VERSION}}}",
            "}",
        )
    )
    return PaperCard(TITLE, AUTHORS, "Software", 0, None, bibtex)


@cache
def paper_cards() -> tuple[PaperCard, ...]:
    """All cards of the package, those of models first, each in the order of the files."""
    scopes = [scope for package in ("models", "attacks") for scope in _scopes(package).values()]
    return tuple(card for scope in scopes for card in scope.values())


def paper_of(arxiv: str) -> PaperCard:
    """The card of an arXiv identifier; one that says no more than the identifier where no file has one."""
    for card in paper_cards():
        if card.arxiv == arxiv:
            return card
    key = "arxiv" + "".join(char for char in arxiv if char.isalnum())
    bibtex = f"@misc{{{key},\n  title = {{arXiv:{arxiv}}},\n  note = {{arXiv:{arxiv}}}\n}}"
    return PaperCard(f"arXiv:{arxiv}", "", "arXiv", 0, arxiv, bibtex)


def attack_paper(attack: str) -> PaperCard | None:
    """The paper behind an attack's name, settings in brackets left out; None where it has none or is unknown."""
    name = attack.partition("[")[0]
    if name.startswith(f"{LIBRARY}:"):
        return _scopes("attacks").get("_library", {}).get("KIM_2020")
    declaration = attack_registry().declaration(name)
    return None if declaration is None else _registered().get(declaration.name)


@cache
def _registered() -> Scope:
    """Name of an attack -> the card that its decorator names."""
    found: Scope = {}
    for path in _files("attacks"):
        scope = _visible(path)
        for node in ast.walk(_tree(path)):
            for call in getattr(node, "decorator_list", ()):
                if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.args):
                    continue
                named = [word.value for word in call.keywords if word.arg == "paper"]
                if call.func.id == "register_attack" and named and isinstance(named[0], ast.Name):
                    card = scope.get(named[0].id)
                    if card is not None:
                        found[str(ast.literal_eval(call.args[0]))] = card
    return found


def _visible(path: Path) -> Scope:
    """The cards that a file of the attacks can name: its own, and those that it imports."""
    found = dict(_scopes("attacks").get(path.stem, {}))
    for node in _tree(path).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("moebench."):
            package, _, stem = node.module.removeprefix("moebench.").partition(".")
            theirs = _scopes(package).get(stem, {}) if package in ("models", "attacks") else {}
            found |= {alias.asname or alias.name: theirs[alias.name] for alias in node.names if alias.name in theirs}
    return found


@cache
def _scopes(package: str) -> dict[str, Scope]:
    """The cards of a package by file and by the name that they are assigned to."""
    return {path.stem: found for path in _files(package) if (found := dict(_assigned(_tree(path))))}


def _assigned(tree: ast.Module) -> Iterator[tuple[str, PaperCard]]:
    for node in tree.body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == PaperCard.__name__:
            facts = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
            yield node.targets[0].id, PaperCard(*map(ast.literal_eval, call.args), **facts)


def _files(package: str) -> list[Path]:
    return sorted(package_folder(f"moebench.{package}").glob("*.py"))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))

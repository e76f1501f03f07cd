"""Names from outside are text in HTML, in the JSON of charts, in links and in file names."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_store import FakeStore, example
from hostile import HOSTILE, hostile_store, parsed
from hypothesis import given
from hypothesis import strategies as st

from moebench.report import html, render, text, write_report
from moebench.schema import ExpertChoice


@cache
def plain_elements() -> tuple[int, frozenset[str]]:
    """How many pages there are of a store with a harmless name, and their elements."""
    pages = [page for path, page in render(hostile_store("plain")).items() if path.endswith(".html")]
    return len(pages), frozenset(element for page in pages for element in parsed(page).tags)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text_in_html(name: str, tmp_path: Path) -> None:
    count, known = plain_elements()
    pages = {path: page for path, page in render(hostile_store(name)).items() if path.endswith(".html")}
    assert len(pages) == count
    for page in pages.values():
        seen = parsed(page)
        assert set(seen.tags) <= known
        assert all(is_own(script) for script in seen.scripts)
        assert seen.handlers() == []
    index = " ".join("".join(parsed(pages["index.html"]).words).split())
    assert " ".join(name.split()) in index
    for path in write_report(hostile_store(name), tmp_path):
        assert path.resolve().is_relative_to(tmp_path.resolve())


def is_own(script: dict[str, str | None]) -> bool:
    """Whether a script is one of the files that ship with the report, or data, which no browser runs."""
    source = script.get("src")
    return script == {"type": "application/json"} if source is None else source.removeprefix("../") in html.assets()


@pytest.mark.parametrize("name", HOSTILE)
def test_the_link_to_a_model_leads_to_its_page(name: str, tmp_path: Path) -> None:
    write_report(hostile_store(name), tmp_path)
    (page,) = (tmp_path / "models").iterdir()
    assert f'href="models/{page.name}"' in (tmp_path / "index.html").read_text()


def test_an_arxiv_identifier_becomes_a_link_only_if_it_is_one() -> None:
    assert html.arxiv_url("2502.06832") == "https://arxiv.org/abs/2502.06832"
    assert html.arxiv_url("javascript:alert(1)") is None
    assert html.arxiv_url("2502.06832\n") is None
    assert html.arxiv_url(None) is None


@given(st.text(max_size=80), st.text(max_size=80))
def test_slugs_are_safe_and_tell_names_apart(one: str, other: str) -> None:
    name = text.slug(one)
    assert name.isascii()
    assert 0 < len(name) <= 80
    assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789._-")
    assert name[0] not in ".-"
    assert name.split(".")[0] not in text.RESERVED
    assert (name == text.slug(other)) == (one == other)


def hostile_models(names: tuple[str, ...]) -> FakeStore:
    """One model per name, which is also the name of all that is named of it."""
    store = FakeStore()
    for name in names:
        scratch = hostile_store(name)
        for one in scratch.stored:
            classes = tuple(f"{name}{number}" for number in range(10))
            number = len(store.stored) + 1
            stored = replace(one, result_id=number, protocol=replace(one.protocol, class_names=classes))
            store.stored.append(stored)
            store.evidence[number] = scratch.evidence[one.result_id]
            store.classes[one.protocol.data_sha256] = np.arange(200) % 10
            choice = (ExpertChoice(name, (0,), (1,)),)
            store.pictures[number] = (replace(example(1, 1, 2), stage=name, experts=choice),)
        store.published += scratch.published
        store.made += scratch.made
    return store


def texts(value: Any) -> set[str]:
    """All strings inside a JSON value."""
    if isinstance(value, str):
        return {value}
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {text for item in items for text in texts(item)}


def test_hostile_names_are_text_and_their_charts_are_json() -> None:
    files = render(hostile_models(("plain", *HOSTILE)))
    pages = [page for path, page in files.items() if re.fullmatch(r"models/[^/]*html", path)]
    assert len(pages) == 1 + len(HOSTILE)
    plain = parsed(str(files["models/plain.html"])).tags
    left = set(HOSTILE)
    for page in pages:
        found = parsed(str(page))
        assert (set(found.tags), found.tags.count("script")) == (set(plain), plain.count("script"))
        assert found.handlers() == []
        charts = re.findall(r'<script type="application/json">(.*?)</script>', str(page), re.DOTALL)
        written = {text for chart in charts for text in texts(json.loads(chart))}
        left -= {name for name in left if f"{name}3" in written}
    assert left == set()
    assert all(re.fullmatch(r"models/pictures/[0-9a-f]{20}\.png", path) for path in files if path.endswith(".png"))

"""The files of a report: a pure function of the store, written whole or not at all."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_store import FakeStore, demo, first_broken, model

from moebench.errors import UsageError
from moebench.report import html, write_report


def test_the_same_store_gives_the_same_bytes_in_whatever_order_it_answers(tmp_path: Path) -> None:
    store = demo(60)
    mixed = replace(store, stored=store.stored[::-1], published=store.published[::-1], made=store.made[::-1])
    first = {path.relative_to(tmp_path / "a"): path.read_bytes() for path in write_report(store, tmp_path / "a")}
    second = {path.relative_to(tmp_path / "b"): path.read_bytes() for path in write_report(mixed, tmp_path / "b")}
    assert first == second
    assert first == {
        path.relative_to(tmp_path / "a"): path.read_bytes() for path in write_report(store, tmp_path / "a")
    }


def test_the_written_paths_are_sorted_and_all_there_is(tmp_path: Path) -> None:
    written = write_report(demo(60), tmp_path)
    assert written == sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert {"index.html", "method.html", "leaderboard.csv", "results.jsonl"} <= {path.name for path in written}


def test_pages_of_rows_that_are_gone_go_and_foreign_files_stay(tmp_path: Path) -> None:
    store = FakeStore()
    store.add(model("old"), "autoattack", first_broken(200, 10))
    write_report(store, tmp_path)
    (tmp_path / "models" / "mine.html").write_text("<p>my notes</p>")
    (tmp_path / "tables" / "mine.tex").write_text("my table")
    write_report(FakeStore(), tmp_path)
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["mine.html"]
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == ["mine.tex"]


def test_an_empty_store_gives_a_page_that_says_so(tmp_path: Path) -> None:
    write_report(FakeStore(), tmp_path)
    assert "holds no finished results yet" in (tmp_path / "index.html").read_text()
    assert (tmp_path / "data" / "results.jsonl").read_text() == ""


def test_the_libraries_come_with_their_licences() -> None:
    shipped = html.assets()
    for library, words in (("datatables", "Permission is hereby granted"), ("echarts", "Apache License")):
        assert f"assets/vendor/{library}.min.js" in shipped
        assert words in shipped[f"assets/vendor/{library}.LICENSE"]


def test_a_file_in_the_way_is_one_line_and_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "reports").write_text("in the way")
    with pytest.raises(UsageError, match=r"^cannot write the report to .*reports.*--out$"):
        write_report(demo(20), tmp_path / "reports")
    (tmp_path / "out" / "index.html").mkdir(parents=True)
    with pytest.raises(UsageError, match="Is a directory"):
        write_report(demo(20), tmp_path / "out")
    assert not list(tmp_path.rglob("*.draft"))


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(FakeStore(), tmp_path)
    before = (tmp_path / "index.html").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UsageError, match="No space left on device"):
        write_report(demo(20), tmp_path)
    assert (tmp_path / "index.html").read_bytes() == before
    assert not list(tmp_path.rglob("*.draft"))


def test_a_disk_that_fills_up_leaves_the_old_report_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(FakeStore(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    real, written = Path.write_text, 0

    def filling(path: Path, *words: Any, **options: Any) -> int:
        nonlocal written
        written += 1
        if written == 8:
            real(path, "half of it")
            raise OSError(28, "No space left on device")
        return real(path, *words, **options)

    monkeypatch.setattr(Path, "write_text", filling)
    with pytest.raises(UsageError, match="No space left on device"):
        write_report(demo(20), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="Permission denied"):
        write_report(FakeStore(), tmp_path)

"""The numbers that the repository shows are those of its results.db."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from moebench.cli import main
from moebench.store import Store

ROOT = Path(__file__).resolve().parent.parent
DATABASE = ROOT / "results.db"


def readme_table() -> tuple[list[str], list[str]]:
    """The command that the README gives for its table of results, and the table's lines."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- results:begin -->")[1]
    block = block.split("<!-- results:end -->")[0]
    command = re.search(r"^moebench (export .*)$", block, flags=re.MULTILINE)
    assert command is not None
    return shlex.split(command[1]), [line for line in block.splitlines() if line.startswith("|")]


def test_the_table_of_the_readme_is_what_its_command_writes(capsys: pytest.CaptureFixture[str]) -> None:
    words, shown = readme_table()
    assert main([*words, "--db", str(DATABASE)]) == 0
    written = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(written) > 50
    assert shown == written


def test_no_run_of_the_database_is_under_way() -> None:
    with Store.open(str(DATABASE), write=False) as store:
        assert "running" not in {run.status for run in store.runs()}

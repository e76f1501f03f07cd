"""One thread per worker, no file of the user's is read or written, and what tests of several files ask for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from commands import Terminal

# Before a test imports numpy or torch: they read these once.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# Before a test imports them: their asserts then show values as those of the tests do.
pytest.register_assert_rewrite("builders", "commands", "data_checks", "training_runs", "typesetting")


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Downloads, should a test cause one, go to a folder of the test's own."""
    folder = tmp_path / "moebench-data"
    monkeypatch.setenv("MOEBENCH_DATA", str(folder))
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path / "moebench-cache"))
    return folder


@pytest.fixture
def own_work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no setting of the user's that commands would follow."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("MOEBENCH_DB", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def moebench(own_work_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    """`moebench` in that folder, to which a model's file adds no compiled one."""
    from commands import Terminal

    monkeypatch.setattr("sys.dont_write_bytecode", True)
    return Terminal(own_work_folder, capsys)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium for all tests of a file."""
    from browsing import launched

    with launched() as running:
        yield running


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages; when the test ends, none must have complained or asked a network for anything."""
    import leaderboard

    problems: list[str] = []
    contexts: list[Any] = []

    def opened(*words: Any, **options: Any) -> Any:
        page = leaderboard.opened(browser, problems, *words, **options)
        contexts.append(page.context)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="session")
def leaderboards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with three leaderboards, one of them folded, with flags, gaps, and rows without a rank."""
    import leaderboard

    return leaderboard.written(tmp_path_factory.mktemp("leaderboards"))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of four epochs of a short training run without an interruption."""
    from training_runs import spec

    from moebench.train import train

    path, _ = train(spec(tmp_path_factory.mktemp("undisturbed"), epochs=4))
    return path

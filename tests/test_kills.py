"""Evaluations that are killed at random moments: what they commit, and that the same command ends as if undisturbed."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import DENSE, MOE, chunks_in

from moebench import turns
from moebench.attacks._engine import Engine
from moebench.cli import main
from moebench.schema import Chunk
from moebench.store import Store

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")

WORDS = (
    "evaluate", "--n", "24", "--no-trust", "--view", "whole",
    "--attack", "fgsm,pgd-20,apgd-t[steps=6],fab-t[steps=4],square[queries=60]",
)  # fmt: skip
SHORT = (
    "evaluate",
    "--n",
    "16",
    "--no-trust",
    "--view",
    "whole",
    "--attack",
    "pgd-10,apgd-ce[steps=8],square[queries=20]",
)


@pytest.fixture(autouse=True)
def folder(own_work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Every step commits what it decided, so that there are many moments between two commits.
    monkeypatch.setitem(Engine.__init__.__kwdefaults__, "flush_seconds", 0.0)
    return own_work_folder


def everything(path: str) -> dict[tuple[str, str], list[Any]]:
    """Per cell all that must not depend on how often the work was interrupted.

    Square's forward passes do: how many proposals it makes ahead, some in vain, depends on how many samples are left.
    """
    found = {}
    with Store.open(path, write=False) as store:
        assert store.check() == []
        for one in store.results(newest_only=False):
            out = store.outcomes(one.result_id)
            facts: list[Any] = [
                getattr(out, name).tolist() for name in ("broken", "clean_pred", "adv_pred", "distance")
            ]
            facts += [out.stage, out.backwards.tolist(), one.record.accuracy, one.record.losses]
            if not one.cell.attack.startswith("square"):
                facts += [out.forwards.tolist(), one.record.forwards]
            cell = one.cell.attack, one.cell.view
            assert cell not in found, "a cell was computed twice"
            found[cell] = facts
    return found


def in_a_child(words: Sequence[str]) -> int:
    """Runs a command in a process that has everything imported already; returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os._exit(main(list(words)))
    finally:
        os._exit(99)


def killed(words: Sequence[str], database: Path, wanted: int, seconds: float) -> bool:
    """Kills a command `seconds` after its `wanted`-th commit; says whether it had not ended before."""
    target = chunks_in(database) + wanted
    child = in_a_child(words)
    while chunks_in(database) < target:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return False
        time.sleep(0.002)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill_and_compare(folder: Path, words: Sequence[str], kills: int, seed: int) -> None:
    """Kills a command again and again, in as many databases as it takes, and compares each with an undisturbed one."""
    chance = random.Random(seed)
    assert main([*words, "--db", "undisturbed.db"]) == 0
    expected = everything("undisturbed.db")
    left, number = kills, 0
    while left > 0:
        number += 1
        database = folder / f"r{number}.db"
        command = [*words, "--db", database.name]
        while left > 0 and killed(command, database, chance.randint(0, 4), chance.uniform(0, 0.05)):
            left -= 1
            if database.exists() and chunks_in(database):
                with Store.open(database, write=False) as store:
                    assert store.check() == []
        assert main(command) == 0
        assert everything(database.name) == expected
        with Store.open(database, write=False) as store:
            assert {run.status for run in store.runs()} <= {"done", "failed"} and store.runs()[-1].status == "done"
        assert not list(folder.glob("*-wal"))


def test_killed_at_random_moments(folder: Path) -> None:
    kill_and_compare(folder, (*SHORT, "--model", DENSE), kills=5, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("model", [DENSE, MOE])
def test_killed_at_25_random_moments(folder: Path, model: str) -> None:
    kill_and_compare(folder, (*WORDS, "--model", model), kills=25, seed=1)


@pytest.mark.parametrize("dies", [False, True])
def test_a_second_command_beside_the_first_computes_nothing_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    """It takes what the first has not begun, waits for the rest, and goes on with it if the first dies."""
    words = [*SHORT, "--model", DENSE]
    assert main([*words, "--db", "undisturbed.db"]) == 0
    append, really, ours, count, waited = Store.append_chunk, time.sleep, os.getpid(), 0, 0

    def stop_after_two(store: Store, result_id: int, chunk: Chunk) -> None:
        nonlocal count
        append(store, result_id, chunk)
        count += 1
        if os.getpid() != ours and count == 2:
            os.kill(os.getpid(), signal.SIGSTOP)

    def pause(seconds: float) -> None:
        nonlocal waited
        waited += 1
        os.kill(child, signal.SIGKILL if dies else signal.SIGCONT)
        if dies:
            os.waitpid(child, 0)
        really(0.05)

    monkeypatch.setattr(Store, "append_chunk", stop_after_two)
    child = in_a_child([*words, "--db", "r.db"])
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
    # Of that module alone: other threads of this process may sleep as well.
    monkeypatch.setattr(turns, "time", SimpleNamespace(sleep=pause))
    assert main([*words, "--db", "r.db"]) == 0
    if not dies:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert everything("r.db") == everything("undisturbed.db")
    assert waited == 1 if dies else waited > 0
    with Store.open("r.db", write=False) as store:
        runs = store.runs()
    assert [run.status for run in runs] == ["failed" if dies else "done", "done"]
    assert len(runs[1].results) == 3

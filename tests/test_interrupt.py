"""Ctrl-C and SIGTERM on real processes, and what is committed when they come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import DENSE

from moebench import interrupt
from moebench.cli import _how_to_go_on, _without_password, main
from moebench.store import Store

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

MODELS = """
import ctypes
import time
from pathlib import Path
import torch
from torch import nn


class Slow(nn.Module):
    def __init__(self, wait):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 10)
        self.wait = wait
        self.passes = 0

    def forward(self, x):
        self.passes += Path("results.db").exists()
        if Path("go").exists() and self.passes == 3:  # the first is that of the clean images
            Path("inside").touch()
            self.wait(30)
        return self.linear(x.flatten(1))


def calls(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


def library(seconds):
    # One call without a return to Python, which therefore runs no handler of a signal.
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ctypes.CDLL(None).poll(None, 0, int(1000 * seconds))


def many_calls(): return Slow(calls)
def one_call(): return Slow(library)
"""


@pytest.fixture(autouse=True)
def folder(own_work_folder: Path) -> Path:
    return own_work_folder


def allowed() -> float:
    """Two seconds, and more on a machine that has more to do than it has cores."""
    return 2.0 * max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1))


@POSIX
@pytest.mark.parametrize(
    ("factory", "signals", "code"),
    [
        ("many_calls", [signal.SIGINT], 1),
        ("one_call", [signal.SIGTERM], 1),
        ("one_call", [signal.SIGINT, signal.SIGINT], 130),
    ],
)
def test_a_signal_in_a_pass_of_half_a_minute(
    folder: Path, factory: str, signals: list[signal.Signals], code: int
) -> None:
    (folder / "slow.py").write_text(MODELS)
    words = ["evaluate", "--model", f"slow.py:{factory}", "--attack", "pgd-50", "--n", "20", "--no-trust"]
    assert main([*words, "--db", "undisturbed.db"]) == 0
    (folder / "go").touch()
    # A test run started in the background ignores the signal, and its children would inherit that.
    process = subprocess.Popen(
        [sys.executable, "-m", "moebench", *words, "--db", "sqlite:///results.db"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    path = folder / "results.db"
    while process.poll() is None and not (folder / "inside").exists():
        time.sleep(0.01)
    limit, begin = allowed(), time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.2)
    out, err = process.communicate()
    assert time.monotonic() - begin < limit
    assert (process.returncode, out) == (code, ""), err
    with Store.open(path, write=False) as store:
        (run,) = store.runs()
        assert store.check() == []
    if code == 1:
        assert (run.status, run.error) == ("failed", "interrupted")
        assert err.count("moebench: ") == 1 and "what was finished is kept" in err
        assert err.rstrip().endswith(f"moebench {' '.join(words)} --db sqlite:///results.db")
    else:
        assert run.status == "running" and err == ""
    (folder / "go").unlink()
    assert main(words) == 0
    with Store.open(path, write=False) as one, Store.open("undisturbed.db", write=False) as other:
        (mine,), (theirs,) = one.results(), other.results()
        np.testing.assert_array_equal(one.outcomes(mine.result_id).broken, other.outcomes(theirs.result_id).broken)
        assert one.check() == []


def test_what_is_decided_is_committed_at_the_safe_point(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "evaluate",
        "--model",
        DENSE,
        "--attack",
        "apgd-ce[steps=20]",
        "--n",
        "40",
        "--no-trust",
        "--view",
        "whole",
    ]
    assert main([*words, "--db", "undisturbed.db"]) == 0
    asked = 0

    def requested() -> bool:
        nonlocal asked
        asked += 1
        return asked == 12

    with monkeypatch.context() as patched:
        patched.setattr(interrupt, "requested", requested)
        assert main(words) == 1
    assert asked == 12
    with Store.open("undisturbed.db", write=False) as store:
        (result,) = store.results()
        expected = store.outcomes(result.result_id)
    with Store.open(write=False) as store:
        (run,) = store.runs()
        kept = store.outcomes(1)
        attacked = kept.forwards > 1
        assert (run.status, run.error) == ("failed", "interrupted")
        # Without the safe point nothing of the first five seconds would be there.
        assert 0 < attacked.sum() == kept.broken.sum() - (expected.stage.count("") - (~expected.broken).sum())
    assert main(words) == 0
    with Store.open(write=False) as store:
        (result,) = store.results()
        got = store.outcomes(result.result_id)
        for name in ("broken", "adv_pred", "distance", "forwards", "backwards"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)


@POSIX
def test_a_command_leaves_the_handlers_as_they_were() -> None:
    before = [signal.getsignal(number) for number in interrupt.SIGNALS]
    assert main(["list", "models"]) == 0
    assert [signal.getsignal(number) for number in interrupt.SIGNALS] == before
    assert not interrupt.requested()


@POSIX
def test_a_signal_that_nothing_defers_is_raised_at_once() -> None:
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupt.handling(lambda: None):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
    assert time.monotonic() - begin < 10


@POSIX
def test_a_signal_that_no_safe_point_saw_is_raised_at_the_end_of_the_work() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupt.handling(lambda: None):
        with interrupt.deferring():
            os.kill(os.getpid(), signal.SIGTERM)  # SIGINT may be ignored where the tests run in the background
            done.append("the work")
        done.append("what comes after it")
    assert done == ["the work"]


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("postgresql://me:se@cr/et@host/db", "postgresql://me:***@host/db"),
        ("postgresql+psycopg://me@host/db?password=secret&x=1", "postgresql+psycopg://me@host/db?password=***&x=1"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("sqlite:///a:b@c.db", "sqlite:///a:b@c.db"),
        ("rt-er", "rt-er"),
    ],
)
def test_no_password_is_shown(word: str, shown: str) -> None:
    assert _without_password(word) == shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("evaluate --model x", "the same command goes on from there: moebench evaluate --model x"),
        ("--debug train --model x", "the same command goes on from there: moebench --debug train --model x"),
        ("evaluate --fresh --model x", "the same command without --fresh goes on: moebench evaluate --model x"),
        ("sweep --dry-run --db postgresql://me:pw@h", "anew: moebench sweep --dry-run --db 'postgresql://me:***@h'"),
        ("report --out r", "the same command begins anew: moebench report --out r"),
        ("certify --model x", "the same command begins anew: moebench certify --model x"),
        ("verify 1a2b", "the same command begins anew: moebench verify 1a2b"),
    ],
)
def test_only_what_is_kept_is_said_to_be(words: str, said: str) -> None:
    line = _how_to_go_on(words.split())
    assert line.startswith("interrupted; ") and line.endswith(said)
    assert ("is kept" in line) == ("goes on" in line)

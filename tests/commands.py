"""Running `moebench` inside a test: in this process, in a folder of the test's own."""

from __future__ import annotations

import json
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebench.cli import main
from moebench.models._weights import SHIPPED

DENSE, MOE = "resnet-at", "st-moe"
"""Two models whose weights are shipped for the digits."""

USER_MODELS = """
import torch
from torch import nn
from torch.nn import functional as F


class Linear(nn.Module):
    def __init__(self, classes, spoil):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, classes)
        self.spoil = spoil

    def forward(self, x):
        return self.spoil(self.linear(x.flatten(1)))


def model(spoil=lambda z: z, classes=10):
    return Linear(classes, spoil)


def loud(z):
    print("what the model prints")
    return z


def raising(z):
    raise ValueError("one line\\nand another")


def leaving(z):
    raise SystemExit(7)


def good(): return model()
def swapped(): return model(lambda z: z.flip(1))
def talkative(): return model(loud)
def nan(): return model(lambda z: z * float("nan"))
def probabilities(): return model(lambda z: z.softmax(1))
def vector(): return model(lambda z: z[:, 0])
def image(): return model(lambda z: z[:, :, None])
def one_row(): return model(lambda z: z[:1])
def integers(): return model(lambda z: (100 * z).long())
def nothing(): return model(lambda z: None)
def pair(): return model(lambda z: (z, z))
def noisy(): return model(lambda z: z + torch.randn_like(z))
def dropping(): return model(lambda z: F.dropout(z, training=True))
def batchwise(): return model(lambda z: z - z.mean(0))
def few(): return model(classes=3)
def many(num_classes): return model(classes=num_classes)
def failing(): return model(raising)
def exiting(): return model(leaving)
def number(): return 5
def broken(): raise RuntimeError("no weights\\nsecond line")
def needy(weights): return weights
"""


@dataclass(frozen=True)
class Said:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output."""
        assert self.code == 0, self.err
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


class Terminal:
    """A working folder, and `moebench` in it."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capture = capture

    def __call__(self, *words: object) -> Said:
        self.capture.readouterr()
        code = main([str(word) for word in words])
        said = self.capture.readouterr()
        return Said(code, said.out, said.err)

    def evaluate(self, model: str, attack: str, n: int, *words: object) -> Said:
        """`moebench evaluate` with what nearly every test says."""
        return self("evaluate", "--model", model, "--attack", attack, "--n", n, *words)

    def files(self) -> dict[str, bytes]:
        """Every file below the folder, with what is in it."""
        paths = (Path(place) / name for place, _, names in os.walk(self.folder) for name in names)
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}

    def refuses(self, *words: object, code: int = 2) -> str:
        """The one line on standard error of a command that must change nothing."""
        before = self.files()
        said = self(*words)
        assert (said.code, said.out) == (code, ""), said
        assert said.err.startswith("moebench: ") and said.err.count("\n") == 1 and said.err.endswith("\n"), said.err
        assert self.files() == before
        return said.err


def write_npz(path: Path, n: int = 12, shape: tuple[int, ...] = (8, 8, 1), classes: int = 10) -> Path:
    """Random images and labels of all classes."""
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (n, *shape), dtype=np.uint8)
    np.savez(path, x=x, y=np.arange(n, dtype=np.int64) % classes)
    return path


def chunks_in(path: Path) -> int:
    """How many chunks a database holds to which another process may be writing; 0 before it is one."""
    if not path.exists():
        return 0
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    try:
        return int(connection.execute("SELECT count(*) FROM chunk").fetchone()[0])
    except sqlite3.OperationalError:  # the table is being made
        return 0
    finally:
        connection.close()


def shipped(*names: str) -> list[str]:
    """Those of the models whose digits weights are there."""
    return [name for name in names if (SHIPPED / "digits" / f"{name}.safetensors").exists()]

"""Where a number comes from: fingerprints of the work, and the environment it ran in."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SOURCES = ("benchmark", "models", "attacks")
PACKAGES = ("moebench", "torch", "torchvision", "numpy", "scikit-learn", "pyautoattack", "torchattacks")


def fingerprint(facts: Mapping[str, Any]) -> str:
    """SHA-256 of facts in canonical JSON: equal facts, equal fingerprint, on any machine."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), default=_plain, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def environment(device: str, threads: int) -> dict[str, Any]:
    """Versions, machine, process and git state, as stored with every run."""
    return {
        "versions": {name: installed(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "device": device,
        "threads": threads,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process": process_identity(os.getpid()),
        "git": git_state(),
    }


def process_identity(pid: int) -> str | None:
    """What no other process shares with this one, not even one of the same number: when the machine and it began.

    None where that cannot be told: the process is gone, or the system has no /proc.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # The name of the program, in brackets, may hold anything.
        facts = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return f"{boot}/{facts[19]}"
    except (OSError, IndexError):
        return None


def installed(package: str) -> str | None:
    """The version of an installed distribution, without a local build tag."""
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return None


def git_state() -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that the package runs from; None for an installed wheel."""
    folder = Path(__file__).resolve().parent
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", "--", *(f":(top,glob){name}/**/*.py" for name in SOURCES))
    if commit is None or status is None or _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return {"commit": commit, "dirty": bool(status)}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} cannot be part of a fingerprint")

"""Connecting to a Ray cluster: everything that can be wrong with one ends in one line."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from moebench.cluster.hello import refuse_silence
from moebench.cluster.settings import AUTO, LOCAL
from moebench.errors import UsageError, first_line

PATIENCE = 10.0
"""Seconds within which a cluster must answer."""

_OVERHEAD = 1e-6


def ray() -> Any:
    """The module, imported when it is needed; the types of its functions change from version to version."""
    return import_module("ray")


def exceptions() -> Any:
    """Ray's exceptions."""
    return import_module("ray.exceptions")


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection of this process to a cluster; one that is there already is used and left open.

    Args:
        address: "auto", "local" or HOST:PORT.

    Raises:
        UsageError: Ray is not installed, or nothing answers.
    """
    if find_spec("ray") is None:
        raise UsageError('--engine ray needs Ray; `pip install "moebench[ray]"` adds it')
    if ray().is_initialized():
        yield
        return
    # Ray asks for usage data by default; nothing is sent on a user's behalf.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS") or address if address == AUTO else address
    if address not in (AUTO, LOCAL):
        refuse_silence(address, PATIENCE)
    handlers = _handlers()
    try:
        # What models print in workers stays in Ray's logs: standard output is for results.
        ray().init(address=address, logging_level="error", log_to_driver=False, include_dashboard=_dashboard(address))
    except Exception as error:
        raise UsageError(_explained(address, error)) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray().shutdown()


def fitting_tasks(cpus: float, gpus: float) -> int:
    """Tasks of so many cores and GPUs that the living machines of the cluster can run at the same time."""
    total = 0
    for node in ray().nodes():
        has = node["Resources"]
        if node["Alive"] and cpus <= has.get("CPU", 0) and gpus <= has.get("GPU", 0):
            shares = [has["CPU"] / cpus] + ([has["GPU"] / gpus] if gpus else [])
            total += int(min(shares) + _OVERHEAD)
    return total


def _dashboard(address: str) -> bool | None:
    """Only a cluster that is started here can be told to have none."""
    return False if address == LOCAL else None


def _handlers() -> dict[int, Any]:
    """The signal handlers of this process, of which Ray would replace some."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    return {number: handler for number, handler in found.items() if handler is not None}


def _explained(address: str, error: Exception) -> str:
    if address == LOCAL:
        return f"Ray could not be started here: {first_line(error)}"
    if address == AUTO:
        return "no Ray cluster runs on this machine; give --address HOST:PORT, or --address local to start one here"
    return f"cannot join the Ray cluster at {address} from this machine: {first_line(error)}"

"""What `--engine ray` is told: which cluster, what a task takes, and how many samples it gets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moebench.errors import UsageError

LOCAL, AUTO = "local", "auto"

_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{1,5})")


@dataclass(frozen=True)
class ClusterSettings:
    """Which cluster, and how it is used.

    `address` is "auto" for the cluster of this machine, "local" for one that is started here and ends with the command,
    or HOST:PORT. A task takes `cpus_per_task` cores and `gpus_per_task` GPUs, which may be a part of one; None is a
    whole one where the device is a GPU, and none otherwise. `shard_size` None fits the cluster.

    Raises:
        UsageError: a value that no cluster could have.
    """

    address: str = AUTO
    cpus_per_task: float = 1.0
    gpus_per_task: float | None = None
    shard_size: int | None = None

    def __post_init__(self) -> None:
        if self.address.startswith("ray://"):
            raise UsageError(
                "--address takes no ray:// client address; start the command on a node of the cluster "
                "(`ray job submit`) and give --address auto"
            )
        if self.address not in (AUTO, LOCAL):
            split_address(self.address)
        _check_amount("--cpus-per-task", self.cpus_per_task)
        if self.gpus_per_task is not None:
            _check_amount("--gpus-per-task", self.gpus_per_task, zero=True)
        if self.shard_size is not None and self.shard_size < 1:
            raise UsageError(f"--shard-size takes at least 1 sample, got {self.shard_size}")

    def gpus_on(self, device: str) -> float:
        """GPUs that a task takes for work on a device.

        Raises:
            UsageError: the two contradict each other.
        """
        kind, _, number = device.partition(":")
        if kind == "cpu":
            if self.gpus_per_task:
                raise UsageError(
                    "--gpus-per-task keeps GPUs from others while the work is on the CPU; add --device cuda"
                )
            return 0.0
        if number not in ("", "0"):
            raise UsageError(f"the cluster chooses the GPU of each task; give --device {kind} instead of {device}")
        if self.gpus_per_task == 0:
            raise UsageError(f"--device {device} needs GPUs; leave out --gpus-per-task 0, or add --device cpu")
        return 1.0 if self.gpus_per_task is None else self.gpus_per_task


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT.

    Raises:
        UsageError: it is none.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found["port"]) < 2**16:
        raise UsageError(f"--address takes auto, local or HOST:PORT such as 10.0.0.1:6379, got {address!r}")
    return found["host"].strip("[]"), int(found["port"])


def _check_amount(option: str, amount: float, *, zero: bool = False) -> None:
    # Ray hands out parts of one and whole numbers, nothing in between.
    usable = 0 < amount < float("inf") or (zero and amount == 0)
    if not usable or (amount > 1 and amount != int(amount)):
        more = " or 0" if zero else ""
        raise UsageError(f"{option} takes a part of one, such as 0.5, or a whole number{more}, got {amount:g}")

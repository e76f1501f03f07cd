"""The native engine over Ray: connects to a cluster, sends the model once, and runs shards as tasks.

Tasks, not actors: a task asks for its cores and its share of a GPU, so Ray places it wherever these are free, on
machines that join later too, and a pool whose size is fixed at the start need not be kept alive. Ray uses the process
of a task for the next one, so the model is built once per process all the same.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moebench.attacks._base import Attack
from moebench.attacks._library import LibraryAttack
from moebench.attacks._passes import batches
from moebench.cluster import worker
from moebench.cluster.connection import connected, exceptions, fitting_tasks, ray
from moebench.cluster.loop import Drive, LostError, Policy, ShardError
from moebench.cluster.settings import ClusterSettings
from moebench.cluster.shipping import pack
from moebench.errors import GoneError, UsageError, first_line
from moebench.work import CellWork, Decided, Undecided

SHARDS_PER_WORKER = 4
"""How many shards a worker gets of a stage where the user does not say: enough that all end at about the same time."""


@contextmanager
def ray_engine(settings: ClusterSettings, device: str, policy: Policy | None = None) -> Iterator[RayEngine]:
    """The engine on a cluster; what was started here is stopped at the end.

    Args:
        settings: which cluster, and what a task takes.
        device: "cpu", or a GPU's kind such as "cuda".
        policy: when to try a shard again.

    Raises:
        UsageError: Ray is not installed, no cluster answers, or none of its machines can run a task.
    """
    gpus = settings.gpus_on(device)
    with connected(settings.address):
        workers = fitting_tasks(settings.cpus_per_task, gpus)
        if workers == 0:
            raise UsageError(_nothing_fits(settings.cpus_per_task, gpus))
        yield RayEngine(settings, torch.device(device).type, gpus, workers, policy or Policy())


def _nothing_fits(cpus: float, gpus: float) -> str:
    wanted = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
    nodes = [node["Resources"] for node in ray().nodes() if node["Alive"]]
    has = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes[:4])
    more = f" and {len(nodes) - 4} more" if len(nodes) > 4 else ""
    return f"no node of the cluster can run a task of {wanted} (they have {has}{more}); ask for less per task"


class RayEngine:
    """Searches shards on the workers of a connected cluster; see `moebench.work.Cluster`.

    Args:
        settings: what a task takes, and the size of shards.
        device: kind of the workers' device.
        gpus: that a task takes.
        workers: tasks that run at the same time, as the cluster is now.
        policy: when to try a shard again.
    """

    def __init__(self, settings: ClusterSettings, device: str, gpus: float, workers: int, policy: Policy) -> None:
        self.settings = settings
        self.device = device
        self.gpus = gpus
        self.workers = workers
        self.policy = policy
        self._sent: tuple[nn.Module, worker.Handle] | None = None
        # Without `max_calls` Ray ends a process that has used a GPU after one task, and the model with it. Repeating is
        # the loop's business: it knows a lost machine from a shard that always fails.
        takes = {"num_cpus": settings.cpus_per_task, "num_gpus": gpus, "max_calls": 0}
        self._look = ray().remote(**takes, max_retries=policy.tries)(worker.look)
        self._search = ray().remote(**takes, max_retries=0)(worker.search_shard)

    def facts(self) -> dict[str, Any]:
        """What a run's environment says of the cluster."""
        from importlib.metadata import version

        return {
            "engine": "ray",
            "ray": version("ray"),
            "workers": self.workers,
            "cpus_per_task": self.settings.cpus_per_task,
            "gpus_per_task": self.gpus,
            "shard_size": self.settings.shard_size,
        }

    def send(self, model: nn.Module, search: nn.Module) -> None:
        """Puts a model into the object store, unless it is there, and has a worker build it.

        Raises:
            UsageError: it cannot be sent, or not be built there.
        """
        if self._sent is not None and self._sent[0] is model:
            return
        self._sent = None  # the last model's bytes go before the next one's come
        on_cpu = _on_cpu(model, search)
        parcel = ray().put(pack(lambda: ray().put(on_cpu)))
        handle = worker.Handle(parcel, uuid.uuid4().hex, self.device, self._threads())
        try:
            ray().get(self._look.remote(handle))
        except exceptions().RayError as error:
            raise UsageError(f"the cluster cannot build the model: {_reason(error)}") from None
        self._sent = (model, handle)

    def search(
        self,
        work: CellWork,
        stage: Attack,
        search: torch.dtype | None,
        index: Tensor,
        keep: Callable[[Sequence[Decided]], None],
    ) -> list[Undecided]:
        """Runs `search_samples` on shards of the samples `index`; see `moebench.work.Cluster.search`."""
        self.send(work.model, work.search)
        assert self._sent is not None
        # Several tasks share a GPU, and its memory with them. What a library makes of a batch hangs on the batch.
        library = isinstance(stage, LibraryAttack)
        rows = work.batch_size if library else max(1, int(work.batch_size * min(1.0, self.gpus or 1.0)))
        facts = worker.StageFacts(
            work.plan, work.cell, stage, search, work.threat, rows, work.draws, images=work.images
        )
        size = self._shard_size(len(index), work.batch_size, whole_batches=library)
        shards = list(batches(index, size))
        tasks = _Tasks(self, self._sent[1], ray().put(facts), work)
        drive = Drive(shards, tasks, lambda found: keep([_decided(one) for one in found]), self.policy)
        try:
            failures = drive.run()
        except exceptions().RayError as error:
            raise GoneError(f"the cluster is gone ({_reason(error)}); what was finished is kept") from error
        return [Undecided(shards[one.place], f"{one.error}; tried {one.tries} times") for one in failures]

    def _shard_size(self, count: int, batch_size: int, *, whole_batches: bool) -> int:
        size = self.settings.shard_size
        if size is None:
            size = min(batch_size, -(-count // (SHARDS_PER_WORKER * max(1, self.room()))))
        return -(-size // batch_size) * batch_size if whole_batches else size

    def _threads(self) -> int:
        """Threads of a task: one per core, and no more than the driver was told to use."""
        told = os.environ.get("OMP_NUM_THREADS", "")
        cores = max(1, int(self.settings.cpus_per_task))
        return min(cores, int(told)) if told.isdigit() and int(told) else cores

    def submit(self, handle: worker.Handle, facts: Any, shard: worker.Shard) -> Hashable:
        """Hands a task in."""
        ticket: Hashable = self._search.remote(handle, facts, shard)
        return ticket

    def room(self) -> int:
        """Tasks that the machines which are there can run at the same time."""
        return fitting_tasks(self.settings.cpus_per_task, self.gpus)


@dataclass(frozen=True)
class _Tasks:
    """The shards of a stage as tasks of Ray; `facts` refers to a `StageFacts` in the object store."""

    engine: RayEngine
    handle: worker.Handle
    facts: Any
    work: CellWork

    def room(self) -> int:
        return self.engine.room()

    def submit(self, item: Tensor) -> Hashable:
        samples = self.work.samples
        columns = (samples.x, samples.y, samples.ids, self.work.clean_pred)
        shard = worker.Shard(item.cpu().numpy(), *(column[item].cpu().numpy() for column in columns))
        return self.engine.submit(self.handle, self.facts, shard)

    def ready(self, tickets: Sequence[Hashable], seconds: float) -> Sequence[Hashable]:
        first, rest = ray().wait(list(tickets), num_returns=1, timeout=seconds)
        if not first or not rest:
            return list(first)
        more, _ = ray().wait(rest, num_returns=len(rest), timeout=0)
        return [*first, *more]

    def result(self, ticket: Hashable) -> worker.Found:
        try:
            found = ray().get(ticket)
        except (exceptions().RayTaskError, exceptions().WorkerCrashedError, exceptions().OutOfMemoryError) as error:
            raise ShardError(_reason(error)) from None
        except exceptions().RayError as error:
            raise LostError(_reason(error)) from None
        assert isinstance(found, worker.Found)
        return found

    def cancel(self, ticket: Hashable) -> None:
        ray().cancel(ticket, force=True)


def _decided(found: worker.Found) -> Decided:
    images = None if found.x_adv is None else torch.from_numpy(np.array(found.x_adv))
    return Decided(found.chunk, images)


def _on_cpu(model: nn.Module, search: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The two on the CPU, sharing what they share; as they are where they are there already."""
    import copy

    if all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers())):
        return model, search
    both = copy.deepcopy(nn.ModuleList([model, search])).cpu()
    return both[0], both[1]


def _reason(error: BaseException) -> str:
    """What Ray's error says, in one line without its advice."""
    cause = getattr(error, "cause", None)
    if isinstance(error, exceptions().RayTaskError) and isinstance(cause, BaseException):
        return first_line(cause)
    known: Mapping[type[BaseException], str] = {
        exceptions().WorkerCrashedError: "its worker process died",
        exceptions().OutOfMemoryError: "its machine ran out of memory, and Ray ended the worker",
        exceptions().NodeDiedError: "its machine is gone",
    }
    said = next((text for kind, text in known.items() if isinstance(error, kind)), None)
    return said or f"{type(error).__name__}: {first_line(error)}"

"""`python -m moebench.simulate`: what the driver of a cluster bears, with shards that cost nothing.

The store, the driver's loop and the account of a cell are the real ones; only what a shard finds is made up. With
`--ray` the made-up shards go through Ray as tasks on this machine, images and all, which shows what the object store
and Ray's own scheduling bear.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
import uuid
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from moebench.attacks import load_attack
from moebench.attacks._base import Attack
from moebench.attacks._engine import Samples
from moebench.cells import run_cell
from moebench.cluster.loop import Drive, Policy
from moebench.errors import MoebenchError
from moebench.provenance import environment
from moebench.schema import (
    CellSpec,
    CheckpointRecord,
    Chunk,
    Example,
    IntArray,
    ModelRecord,
    ProtocolRecord,
    RunStart,
    ThreatModel,
)
from moebench.store import Store
from moebench.work import CellWork, Cluster, Decided, Undecided

ATTACK, EPS, CLASSES, EXPERTS = "pgd-10", 0.1, 10, 8


@dataclass(frozen=True)
class Size:
    """How large the simulated work is: shards of so many samples, images of one channel and `side` pixels a side."""

    shards: int
    samples: int
    side: int
    workers: int


@dataclass(frozen=True)
class Measured:
    """What came out: wall time, processor time of this process, and its peak of memory in bytes.

    `before` is the peak without any shard, `result` the number of the result in the store.
    """

    seconds: float
    busy: float
    commits: int
    before: int
    peak: int
    result: int


class Bright(nn.Module):
    """Says class 0 to dark images; enough of a model for the clean pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        return x.flatten(1).mean(dim=1, keepdim=True) * torch.linspace(-1.0, 1.0, CLASSES)


def made_up(stage: str, index: IntArray, side: int) -> Chunk:
    """What a shard of the samples `index` might find: a third is broken, with routing and up to 8 pictures."""
    m = len(index)
    broken = index % 3 == 0
    generator = np.random.default_rng(int(index[0]))
    weights = generator.dirichlet(np.ones(EXPERTS), m).astype(np.float32)
    grey = np.zeros((1, side, side), np.float32)
    examples = [
        Example(int(sample), 0, 0, 1, EPS, stage, grey, grey + np.float32(EPS))
        for sample in index[broken][:8]
        if side <= 64
    ]
    return Chunk(
        stage=stage,
        index=index,
        broken=broken,
        clean_pred=np.zeros(m, np.int64),
        adv_pred=broken.astype(np.int64),
        distance=np.where(broken, np.float32(EPS), np.float32(0)),
        forwards=np.full(m, 10, np.int64),
        backwards=np.full(m, 10, np.int64),
        seconds=0.0,
        extras={
            "loss": generator.random(m, dtype=np.float32),
            "moe/weights": weights,
            "moe/entropy": weights.sum(axis=1),
        },
        examples=examples,
    )


class Here:
    """A cluster whose shards are made up in this process.

    Args:
        size: of the work.
        policy: of the driver's loop; `together` results are one transaction at most.
    """

    def __init__(self, size: Size, policy: Policy) -> None:
        self.size, self.policy = size, policy

    def search(
        self,
        work: CellWork,
        stage: Attack,
        search: torch.dtype | None,
        index: Tensor,
        keep: Callable[[Sequence[Decided]], None],
    ) -> list[Undecided]:
        """See `moebench.work.Cluster.search`."""
        workers = _AtOnce(stage.stage, self.size)
        assert Drive(list(index.split(self.size.samples)), workers, keep, self.policy).run() == []  # type: ignore[no-untyped-call]
        return []


class _AtOnce:
    """Workers that are done before anybody asks."""

    def __init__(self, stage: str, size: Size) -> None:
        self.stage, self.size = stage, size
        self.done: dict[Hashable, Decided] = {}

    def room(self) -> int:
        return self.size.workers

    def submit(self, item: Tensor) -> Hashable:
        ticket = int(item[0])
        self.done[ticket] = Decided(made_up(self.stage, item.numpy(), self.size.side))
        return ticket

    def ready(self, tickets: Sequence[Hashable], seconds: float) -> Sequence[Hashable]:
        return tickets

    def result(self, ticket: Hashable) -> Decided:
        return self.done.pop(ticket)

    def cancel(self, ticket: Hashable) -> None:
        self.done.pop(ticket, None)


@contextmanager
def over_ray(size: Size, policy: Policy) -> Iterator[Cluster]:
    """A cluster of Ray on this machine, each of whose cores passes for many workers."""
    from moebench.cluster.connection import ray
    from moebench.cluster.engine import ray_engine
    from moebench.cluster.settings import LOCAL, ClusterSettings
    from moebench.cluster.worker import Found, Handle, Shard, StageFacts

    def search_shard(handle: Handle, facts: StageFacts, shard: Shard) -> Found:
        return Found(made_up(facts.stage.stage, shard.index, shard.x.shape[-1]), None, "", 0)

    with ray_engine(ClusterSettings(LOCAL, shard_size=size.samples), "cpu", policy) as engine:
        engine._search = ray().remote(num_cpus=1.0, max_retries=0)(search_shard)
        yield engine


def simulate(where: str, size: Size, cluster: Cluster) -> Measured:
    """Runs one attack whose shards are made up, and stores it like any other.

    Args:
        where: the database.
        size: of the work.
        cluster: where shards are made up.
    """
    n = size.shards * size.samples
    x, zeros = torch.zeros(n, 1, size.side, size.side), torch.zeros(n, dtype=torch.int64)
    threat = ThreatModel("Linf", EPS)
    fingerprint = uuid.uuid4().hex
    cell = CellSpec(fingerprint, ATTACK, {"simulated": True}, "whole", 0)
    names = tuple(map(str, range(CLASSES)))
    model = ModelRecord("simulated", "external", "no model: shards are made up")
    commits = 0

    def tell(stage: str, done: int, total: int, standing: int) -> None:
        nonlocal commits
        commits += 1

    work = CellWork(
        load_attack(ATTACK), cell, Bright(), Bright(), Samples(x, zeros, torch.arange(n)), zeros, threat, 256, tell,
        cluster=cluster, images=False,
    )  # fmt: skip
    run_id = fingerprint[:12]
    with Store.open(where, write=True) as store:
        protocol = ProtocolRecord("simulated", "test", fingerprint, n, CLASSES, names, threat)
        checkpoint = CheckpointRecord(fingerprint, model.name, None, "simulated", 0, 0, 0)
        start = RunStart(run_id, fingerprint, "", model, checkpoint, protocol, environment("cpu", 1))
        store.begin_run(start, zeros.numpy())
        before, begin, idle = peak_memory(), time.perf_counter(), time.process_time()
        run_cell(work, store, run_id, resume=False)
        seconds, busy = time.perf_counter() - begin, time.process_time() - idle
        store.finish_run(run_id, "done", seconds=seconds)
        (result,) = store.run(run_id).results
    return Measured(seconds, busy, commits - 1, before, peak_memory(), result.result_id)


def peak_memory() -> int:
    """The most memory that this process has had so far, in bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def report(size: Size, measured: Measured) -> str:
    """The figures in words."""
    rate = size.shards / measured.seconds
    before, peak = (f"{used / 2**20:,.0f} MiB" for used in (measured.before, measured.peak))
    return (
        f"{size.shards:,} shards of {size.samples} samples in {measured.seconds:.1f} s, {rate:,.0f} shards/s, in "
        f"{measured.commits:,} transactions; driver {measured.busy:.1f} s of processor time, {before} before and "
        f"{peak} at most"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one line of figures."""
    parser = argparse.ArgumentParser(description="Measure what the driver of a cluster bears, with made-up shards.")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=5, help="samples of a shard [5]")
    parser.add_argument("--side", type=int, default=8, help="pixels of a side of the images [8]")
    parser.add_argument(
        "--workers", type=int, default=512, help="shards that run at the same time, without --ray [512]"
    )
    parser.add_argument("--together", type=int, default=64, help="shards of a transaction at most [64]")
    parser.add_argument("--ray", action="store_true", help="send the shards through Ray on this machine")
    parser.add_argument("--db", required=True, metavar="URL", help="a database of its own: a new file, or PostgreSQL")
    told = parser.parse_args(arguments)
    size = Size(told.shards, told.samples, told.side, told.workers)
    policy = Policy(together=told.together)
    if min(size.shards, size.samples, size.side, size.workers, policy.together) < 1:
        parser.error("all numbers must be at least 1")
    try:
        if told.ray:
            with over_ray(size, policy) as cluster:
                measured = simulate(told.db, size, cluster)
        else:
            measured = simulate(told.db, size, Here(size, policy))
    except MoebenchError as error:
        print(f"simulate: {error}", file=sys.stderr)
        return error.exit_code
    print(report(size, measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())

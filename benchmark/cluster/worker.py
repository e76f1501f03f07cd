"""What runs in a worker: the native engine on one shard, with a model that the process builds once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moebench.attacks._base import Attack, AttackPlan
from moebench.attacks._engine import Samples
from moebench.attacks._memory import keep_freed_memory
from moebench.attacks._random import sample_keys
from moebench.cells import search_samples
from moebench.cluster.connection import exceptions, ray
from moebench.cluster.shipping import Parcel, admit
from moebench.errors import RunError, first_line
from moebench.schema import CellSpec, Chunk, IntArray, ThreatModel
from moebench.work import CellWork

Result = TypeVar("Result")


@dataclass(frozen=True)
class StageFacts:
    """What all shards of a stage share; it is put into the object store once per stage."""

    plan: AttackPlan
    cell: CellSpec
    stage: Attack
    search: torch.dtype | None
    threat: ThreatModel
    batch_size: int
    draws: int
    images: bool


@dataclass(frozen=True)
class Shard:
    """Samples to search: numbers in the evaluation (m,) ascending, images (m, C, H, W), labels, names, predictions."""

    index: IntArray
    x: NDArray[np.float32]
    y: IntArray
    ids: IntArray
    clean_pred: IntArray


@dataclass(frozen=True)
class Found:
    """A shard's chunk, in the numbers of the evaluation; its last images (m, C, H, W) if they were asked for."""

    chunk: Chunk
    x_adv: NDArray[np.float32] | None
    host: str
    pid: int


@dataclass(frozen=True)
class Handle:
    """Where a model's parcel lies in the object store; inside of this record, it is fetched only where it is needed.

    `name` is that of this sending of the model.
    """

    parcel: Any
    name: str
    device: str
    threads: int


_models: dict[str, tuple[nn.Module, nn.Module]] = {}


def look(handle: Handle) -> dict[str, Any]:
    """Builds the model; says what this machine is."""
    _guarded(lambda: _model(handle))
    name = torch.cuda.get_device_name() if handle.device != "cpu" else "cpu"
    return {"torch": torch.__version__.split("+")[0], "device": name}


def search_shard(handle: Handle, facts: StageFacts, shard: Shard) -> Found:
    """Runs a stage on a shard.

    Raises:
        RunError: whatever went wrong, in one line.
    """
    return _guarded(lambda: _search(handle, facts, shard))


def _search(handle: Handle, facts: StageFacts, shard: Shard) -> Found:
    model, search = _model(handle)
    device = torch.device(handle.device)
    numbers = (torch.from_numpy(array.copy()).to(device) for array in (shard.x, shard.y, shard.ids))
    samples = Samples(*numbers)
    work = CellWork(
        plan=facts.plan,
        cell=facts.cell,
        model=model,
        search=search,
        samples=samples,
        clean_pred=torch.from_numpy(shard.clean_pred.copy()).to(device),
        threat=facts.threat,
        batch_size=facts.batch_size,
        tell=lambda stage, done, n, standing: None,
        draws=facts.draws,
    )
    # Only a model that is random draws from here: by the shard, whichever process it runs in.
    torch.manual_seed(int(sample_keys(facts.cell.seed, facts.stage.stage, samples.ids[:1].cpu())))
    chunks, x_adv = search_samples(work, facts.stage, facts.search)
    images = x_adv.float().cpu().numpy() if facts.images else None
    return Found(_renumbered(joined(chunks), shard.index), images, os.uname().nodename, os.getpid())


def _model(handle: Handle) -> tuple[nn.Module, nn.Module]:
    """The model on this process's device; one is kept, for the shards that follow."""
    if handle.name not in _models:
        _models.clear()
        parcel = ray().get(handle.parcel)
        assert isinstance(parcel, Parcel)
        torch.set_num_threads(handle.threads)
        if handle.device == "cpu":
            keep_freed_memory()
        admit(parcel)
        model, search = (network.to(handle.device).eval() for network in _fetched(parcel))
        _models[handle.name] = (model, search)
    return _models[handle.name]


def _fetched(parcel: Parcel) -> tuple[nn.Module, nn.Module]:
    """The network and its copy, built by Ray from the object store.

    Raises:
        RunError: this machine lacks a module.
    """
    try:
        model, search = ray().get(parcel.model)
    except exceptions().RaySystemError as error:
        # What went wrong while it was built comes as an error of the system.
        cause = error.client_exc
        if not isinstance(cause, ModuleNotFoundError):
            raise RunError(f"{type(cause).__name__}: {first_line(cause)}") from error
        raise RunError(
            f"{first_line(cause)} on this machine; install it on all, or give the model as FILE.py:FACTORY"
        ) from error
    return model, search


def _guarded(work: Callable[[], Result]) -> Result:
    """Any error as one that every machine can read: a user's exception class may exist in this process only."""
    try:
        return work()
    except RunError:
        raise
    except SystemExit as error:
        raise RunError(f"the code of the model called sys.exit({error.code!r})") from None
    except Exception as error:
        raise RunError(f"{type(error).__name__}: {first_line(error)}") from None


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """The chunks of one stage as one, in ascending order of the samples."""
    together = np.concatenate([chunk.index for chunk in chunks])
    order = np.argsort(together, kind="stable")

    def column(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate(arrays)[order]

    names = ("broken", "clean_pred", "adv_pred", "distance", "forwards", "backwards")
    return Chunk(
        stage=chunks[0].stage,
        index=together[order],
        seconds=sum(chunk.seconds for chunk in chunks),
        extras={name: column([chunk.extras[name] for chunk in chunks]) for name in chunks[0].extras},
        examples=[example for chunk in chunks for example in chunk.examples],
        **{name: column([getattr(chunk, name) for chunk in chunks]) for name in names},
    )


def _renumbered(chunk: Chunk, index: IntArray) -> Chunk:
    """A chunk of the samples 0, 1, … of a shard, in the numbers of the evaluation."""
    examples = [replace(example, index=int(index[example.index])) for example in chunk.examples]
    return replace(chunk, index=index[chunk.index], examples=examples)

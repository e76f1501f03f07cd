"""Turns the name of a model into a network ready to be evaluated: registered, from a file, or from a module."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from moebench.datasets import Dataset
from moebench.errors import MoebenchError, Notice, UsageError
from moebench.flops import count_flops
from moebench.models._base import MODELS, ModelEntry
from moebench.models._moe import moe_layers, reroute
from moebench.models._weights import load_into, read_weights, shipped_weights, state_sha256
from moebench.overrides import RoutingOverride, parse_routing
from moebench.parts import part_of
from moebench.recipes import own_settings, variant_name
from moebench.schema import PART_FAMILY, CheckpointRecord, ModelRecord, split_part


@dataclass(frozen=True)
class LoadedModel:
    """A network in eval mode with frozen parameters, and what the store will say of it.

    `code` identifies the program: the registry entry's version, or the hash of the user's file.
    """

    module: nn.Module
    record: ModelRecord
    checkpoint: CheckpointRecord
    code: str


def load(
    name: str,
    dataset: Dataset,
    *,
    weights: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    routing: str | None = None,
    device: str = "cpu",
) -> LoadedModel:
    """Loads a model for a data set.

    Args:
        name: a registered name, FILE.py:FACTORY or package.module:FACTORY; with `/expert[i]`, `/expert[LAYER:i]`,
            `/standard` or `/robust` behind it, that part alone.
        dataset: decides the number of classes, the image shape, and which shipped weights are taken.
        weights: a safetensors file with its card, instead of the shipped weights.
        settings: settings of a registered model that the weights' card does not fix.
        routing: overrides the routing of every MoE layer, see `parse_routing`; the model is then a variant of its own,
            unless that changes nothing, of which a `Notice` tells.
        device: where the network goes.

    Raises:
        UsageError: unknown name, no weights, no such part, a factory that fails, or a routing that the model cannot do.
    """
    check_device(device)
    name, part = split_part(name)
    if ":" in name:
        if weights is not None or settings:
            raise UsageError("--weights and --set belong to registered models; a factory loads its own weights")
        loaded = _from_factory(name, dataset)
    else:
        loaded = _from_registry(name, dataset, weights, settings or {})
    if part is not None:
        loaded = _part(loaded, part, dataset)
    if routing is not None:
        loaded = _rerouted(loaded, parse_routing(routing), dataset)
    loaded.module.requires_grad_(False).eval().to(device)
    return loaded


def check_device(device: str) -> None:
    """Refuses a device that this machine does not have."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(f"device {device!r} cannot be used here ({first}); use --device cpu") from None


def _from_registry(name: str, dataset: Dataset, weights: Path | None, settings: Mapping[str, Any]) -> LoadedModel:
    entry = MODELS.get(name)
    path = weights or shipped_weights(dataset.name, name)
    if weights is None and not path.exists():
        raise UsageError(
            f"no weights of {name} are shipped for data set {dataset.name}; "
            f"train them (`moebench train --model {name} --dataset {dataset.name}`) and pass --weights FILE"
        )
    state, card = read_weights(path)
    if card.get("model") != name:
        raise UsageError(f"{path} holds weights of {card.get('model')!r}, not of {name!r}")
    _check_card(card, path)
    if tuple(card["shape"]) != dataset.shape:
        have, need = "×".join(map(str, card["shape"])), "×".join(map(str, dataset.shape))
        raise UsageError(f"the weights {path} are for images of {have}, and {dataset.name} has {need}")
    settings = _new_settings(name, settings, entry, card)
    changed = {**own_settings(card, entry.settings), **settings}
    module = entry.make(card["num_classes"], dataset.shape, **changed)
    load_into(module, state, str(path))
    # A variant is a model of its own in tables: "rt-er[router=frozen]", "resnet-at[recipe=free-at]".
    recipe_name = card.get("objective")
    record = replace(entry.record(), name=variant_name(name, recipe_name, changed))
    if recipe_name is not None:
        record = replace(record, training=card["training"])
    origin = "shipped" if weights is None else path.name
    recipe = {key: card.get(key) for key in ("recipe", "settings", "seed", "validation", "command", "initialised_from")}
    recipe |= {} if recipe_name is None else {"objective": recipe_name}
    checkpoint = _checkpoint(
        module, card["sha256"], record.name, card.get("dataset"), origin, dataset, recipe, card.get("log", ())
    )
    return LoadedModel(module, record, checkpoint, f"{name}/{entry.version}/{sorted(settings.items())}")


def _new_settings(name: str, settings: Mapping[str, Any], entry: ModelEntry, card: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that the model does not have already; the others would give it a second name."""
    has = {**(entry.build.__kwdefaults__ or {}), **entry.settings, **card.get("settings", {})}
    new = {}
    for key, value in settings.items():
        # 1, 1.0 and True are equal, and not every builder takes them all.
        if key in has and type(has[key]) is type(value) and has[key] == value:
            _note(f"--set {key}={value} changes nothing on these weights of {name}: they have it already")
        else:
            new[key] = value
    return new


def _part(loaded: LoadedModel, part: str, dataset: Dataset) -> LoadedModel:
    """One expert or one half as a model of its own: another name and another identity than the whole has."""
    whole, checkpoint = loaded.record, loaded.checkpoint
    name = f"{whole.name}/{part}"
    module = part_of(loaded.module, part, whole.name)
    # With one expert forced in one layer, the other layers still route.
    routing = whole.routing if moe_layers(module) else None
    record = ModelRecord(name, PART_FAMILY, f"{part} of {whole.name}, alone", whole.training, routing, whole.paper)
    identity = hashlib.sha256(f"{checkpoint.sha256}/{part}".encode()).hexdigest()
    alone = _checkpoint(module, identity, name, checkpoint.dataset, checkpoint.origin, dataset, checkpoint.recipe, ())
    return LoadedModel(module, record, alone, loaded.code)


def _rerouted(loaded: LoadedModel, override: RoutingOverride, dataset: Dataset) -> LoadedModel:
    """The model with its routing overridden: another name, another program, and what it costs now.

    Where the override changes nothing it stays the model that it is, so that its results are found and not made again.
    """
    selected = [layer.top_k for layer in moe_layers(loaded.module).values()]
    try:
        reroute(loaded.module, top_k=override.top_k, barred=override.barred)
    except UsageError as error:
        raise UsageError(f"--routing {override} does not suit {loaded.record.name}: {error}") from None
    asked, override = override, override.on(selected)
    if override == RoutingOverride():
        _note(
            f"--routing {asked} changes nothing on {loaded.record.name}, whose layers select {selected[0]} already; "
            "this is the model itself"
        )
        return loaded
    name = variant(loaded.record.name, f"routing={override}")
    checkpoint = replace(
        loaded.checkpoint,
        model=name,
        active_parameters=loaded.checkpoint.parameters - idle_parameters(loaded.module),
        flops=count_flops(loaded.module, dataset.shape),
    )
    return LoadedModel(
        loaded.module, replace(loaded.record, name=name), checkpoint, f"{loaded.code}/routing={override}"
    )


def _note(text: str) -> None:
    warnings.warn(text, Notice, stacklevel=2)


def variant(name: str, change: str) -> str:
    """The name of a model of which something is changed; variants are models of their own in tables."""
    return f"{name[:-1]},{change}]" if name.endswith("]") and "/" not in name else f"{name}[{change}]"


def _check_card(card: Mapping[str, Any], path: Path) -> None:
    """Refuses a card whose entries cannot be used, such as one that was edited."""
    usable = {
        "num_classes": type(card.get("num_classes")) is int and card["num_classes"] > 0,
        "shape": isinstance(card.get("shape"), list),
        "settings": isinstance(card.get("settings", {}), dict),
        "log": isinstance(card.get("log", []), list),
        "objective": card.get("objective") is None or isinstance(card["objective"], str),
        "training": card.get("objective") is None or isinstance(card.get("training"), str),
    }
    wrong = [key for key, fine in usable.items() if not fine]
    if wrong:
        raise UsageError(f"the card of {path} has no usable {wrong[0]}; `moebench train` writes one")


def _from_factory(name: str, dataset: Dataset) -> LoadedModel:
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        raise UsageError(f"{name!r} lacks a part; --model takes a name, FILE.py:FACTORY or package.module:FACTORY")
    with _neighbours(source):
        module, code = _import(source)
        factory = getattr(module, attribute, None)
        if not callable(factory):
            found = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise UsageError(f"{source} has no callable {attribute!r}; it has {', '.join(found[:8]) or 'none'}")
        network = _call(factory, name, dataset.num_classes)
    if not isinstance(network, nn.Module):
        raise UsageError(f"{name} returned {type(network).__name__}; a factory must return a torch.nn.Module")
    family = "moe" if moe_layers(network) else "dense"
    shown = f"{Path(source).name if source.endswith('.py') else source}:{attribute}"
    record = ModelRecord(shown, "external", f"a user's {family} model", None, None, None)
    # Weights alone do not identify a user's model: the file around them may compute something else tomorrow.
    identity = hashlib.sha256(f"{state_sha256(network)}\n{code}".encode()).hexdigest()
    checkpoint = _checkpoint(network, identity, shown, None, shown, dataset, {}, ())
    return LoadedModel(network, record, checkpoint, code)


@contextmanager
def _neighbours(source: str) -> Iterator[None]:
    """Lets a user's file, and the factory in it, import what lies beside it."""
    folder = str(Path(source).resolve().parent)
    if not source.endswith(".py"):
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        # The file may have changed the list.
        if folder in sys.path:
            sys.path.remove(folder)


def _import(source: str) -> tuple[ModuleType, str]:
    """Imports a user's file or module; returns it with a hash of its source."""
    if not source.endswith(".py"):
        try:
            module = importlib.import_module(source)
        except ModuleNotFoundError as error:
            raise UsageError(f"cannot import {source} ({error}); is its folder on PYTHONPATH?") from error
        except (Exception, SystemExit) as error:
            raise UsageError(f"importing {source} failed: {_line(error)} (--debug shows where)") from error
        return module, _source_hash(getattr(module, "__file__", None), source)
    path = Path(source)
    if not path.is_file():
        raise UsageError(
            f"no file {source}; --model takes a registered name, FILE.py:FACTORY or package.module:FACTORY"
        )
    name = f"moebench_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"importing {source} failed: {_line(error)} (--debug shows where)") from error
    return module, _source_hash(source, source)


def _call(factory: Callable[..., Any], name: str, num_classes: int) -> Any:
    try:
        accepts = "num_classes" in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        accepts = False
    try:
        return factory(num_classes=num_classes) if accepts else factory()
    except MoebenchError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"the factory {name} failed: {_line(error)} (--debug shows where)") from error


def _checkpoint(
    module: nn.Module,
    sha256: str,
    name: str,
    trained_on: str | None,
    origin: str,
    dataset: Dataset,
    recipe: Mapping[str, Any],
    log: Any,
) -> CheckpointRecord:
    total = sum(parameter.numel() for parameter in module.parameters())
    return CheckpointRecord(
        sha256=sha256,
        model=name,
        dataset=trained_on,
        origin=origin,
        parameters=total,
        active_parameters=total - idle_parameters(module),
        flops=count_flops(module, dataset.shape),
        recipe=dict(recipe),
        training_log=tuple(log),
    )


def idle_parameters(module: nn.Module) -> int:
    """Parameters of experts that a sample (or token) does not use: each layer runs its largest ones at most."""
    idle = 0
    for layer in moe_layers(module).values():
        sizes = sorted((sum(p.numel() for p in expert.parameters()) for expert in layer.experts), reverse=True)
        idle += sum(sizes[layer.active :])
    return idle


def _source_hash(path: str | None, fallback: str) -> str:
    if path is None:
        return fallback
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__

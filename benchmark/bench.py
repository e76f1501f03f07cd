"""Measured speed: our engine against pyautoattack and torchattacks, and sparse routing against the published loop.

`make bench` runs it. Both sides see the same model and images in one process, take turns, and the median of several
rounds counts. Verdicts are compared per sample. Last comes what `--dry-run` says of an evaluation, and what it takes.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moebench.attacks import AttackPlan, load_attack
from moebench.attacks._engine import Engine, Finished, Samples, to_samples
from moebench.attacks._memory import fitting_rows, keep_freed_memory
from moebench.attacks._reference import run_reference
from moebench.attacks._search import search_copy
from moebench.attacks._views import make_view
from moebench.datasets import load_dataset
from moebench.errors import MoebenchError
from moebench.estimate import planned_with_costs
from moebench.evaluation import EvalSpec, evaluate, prepare
from moebench.models import load_model
from moebench.models.rt_er import ClassifierMoE
from moebench.planning import parse_attacks
from moebench.registry import model_registry
from moebench.schema import ThreatModel, format_eps, parse_eps

REFERENCE_BATCH = 256


@dataclass(frozen=True)
class Case:
    """What is timed: a model on images, (N, C, H, W), under a threat model."""

    name: str
    model: nn.Module
    samples: Samples
    threat: ThreatModel
    attacks: tuple[str, ...]


@dataclass(frozen=True)
class Round:
    """One timed attack: wall time in seconds, samples standing (N,), passes, and the share of time inside the model."""

    seconds: float
    standing: Tensor
    passes: int
    inside: float


def attack(case: Case, plan: AttackPlan, *, reference: bool) -> Round:
    """Runs an attack on the whole view, from the clean pass and the making of our search's copy to the last verdict."""
    begin = time.perf_counter()
    model, samples = case.model, case.samples
    shape = samples.x.shape[1], samples.x.shape[2], samples.x.shape[3]
    rows = REFERENCE_BATCH if reference else fitting_rows(model, shape, str(samples.x.device))
    search = model if reference else search_copy(model, samples.x[:rows]).module
    engine = Engine(model, make_view("whole", search), samples, case.threat, batch_size=rows, screen=search)
    with torch.no_grad():
        for start in range(0, len(samples), rows):
            part = slice(start, start + rows)
            engine.broken[part] |= model(samples.x[part]).argmax(1) != samples.y[part]
    passes = [len(samples)]
    for stage in plan.stages:
        index = (~engine.broken).nonzero().squeeze(1)

        def sink(done: Finished) -> None:
            passes.append(int(done.forwards.sum()) + int(done.backwards.sum()))

        if not reference:
            engine.run_stage(stage, index, sink)
        elif len(index) > 0:
            run_reference(stage, engine, index, sink)
    seconds = time.perf_counter() - begin
    return Round(seconds, ~engine.broken, sum(passes), engine.model_seconds / seconds)


def compare(case: Case, attack_name: str, rounds: int) -> str:
    """One row of the table: reference against native."""
    plan = load_attack(attack_name)
    theirs, ours = [], []
    for _ in range(rounds):
        theirs.append(attack(case, plan, reference=True))
        ours.append(attack(case, plan, reference=False))
    slow = statistics.median(one.seconds for one in theirs)
    fast = statistics.median(one.seconds for one in ours)
    equal = (theirs[0].standing == ours[0].standing).double().mean().item()
    ra_theirs, ra_ours = (one.standing.double().mean().item() for one in (theirs[0], ours[0]))
    library = "torchattacks" if attack_name.startswith(("pgd", "fgsm")) else "pyautoattack"
    return (
        f"| {case.name} | {format_eps(case.threat.eps)} | {attack_name} | {len(case.samples)} | {library} | {slow:.2f} "
        f"| {fast:.2f} | {slow / fast:.1f}× | {equal:.1%} | {100 * ra_ours:.1f} / {100 * ra_theirs:.1f} "
        f"| {ours[0].passes:,} / {theirs[0].passes:,} | {ours[0].inside:.0%} |"
    )


def digits_cases(n: int) -> Iterator[Case]:
    """The shipped models on the digits; the one that breaks easily on all test images, since it takes no time."""
    attacks = ("pgd-50", "apgd-ce", "apgd-t", "autoattack")
    for name, count in (("resnet-st", None), ("resnet-at", n), ("rt-er", n), ("dwf", n)):
        if name in model_registry():
            dataset = load_dataset("digits", n=count)
            samples = to_samples(dataset.images, dataset.labels, dataset.ids, "cpu")
            yield Case(name, load_model(name).requires_grad_(False), samples, dataset.default_threat(), attacks)


def resnet18_cases(images: str, sizes: Mapping[str, int]) -> Iterator[Case]:
    """The ResNet-18 for CIFAR-10 that pyautoattack brings, at radii where it breaks easily and where it hardly does.

    Args:
        images: a data set of 32×32 colour images, such as npz:FILE.
        sizes: samples per radius, by the radius as text.
    """
    model = packaged_resnet18()
    for eps, n in sizes.items():
        dataset = load_dataset(images, n=n)
        if dataset.shape != (3, 32, 32):
            raise MoebenchError(f"--images takes images of 3×32×32; {images} has {'×'.join(map(str, dataset.shape))}")
        samples = to_samples(dataset.images, dataset.labels, dataset.ids, "cpu")
        attacks = ("apgd-ce", "autoattack") if eps == "8/255" else ("apgd-ce", "apgd-t")
        yield Case("ResNet-18", model, samples, ThreatModel("Linf", parse_eps(eps)), attacks)


def packaged_resnet18() -> nn.Module:
    """Pyautoattack's example network, in eval mode, with the weights of its package."""
    found = importlib.util.find_spec("pyautoattack")
    if found is None or found.origin is None:
        raise MoebenchError("pyautoattack is not installed")
    folder = Path(found.origin).parent / "examples"
    spec = importlib.util.spec_from_file_location("pyautoattack_resnet", folder / "resnet.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.ResNet18()
    network.load_state_dict(torch.load(folder / "model_test.pt", weights_only=True, map_location="cpu"))
    return network.eval().requires_grad_(False)


def copies(case: Case, rounds: int) -> list[str]:
    """What each step towards the search's copy saves: forward and backward, per image, at our own batch size."""
    shape = case.samples.x.shape[1], case.samples.x.shape[2], case.samples.x.shape[3]
    rows = min(fitting_rows(case.model, shape, "cpu"), len(case.samples))
    x = case.samples.x[:rows]
    folded = search_copy(case.model, x)
    compiled = search_copy(case.model, x, compiled=True)
    ways = {"as it is": case.model, "search copy": folded.module, "search copy, compiled": compiled.module}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3 * rounds + 2):
        for name, module in ways.items():
            leaf = x.clone().requires_grad_()
            begin = time.perf_counter()
            torch.autograd.grad(module(leaf).logsumexp(1).sum(), leaf)
            times[name].append(time.perf_counter() - begin)
    base = statistics.median(times["as it is"][2:])
    notes = ", ".join(f"{step}: {outcome}" for step, outcome in compiled.notes.items())
    lines = []
    for name, found in times.items():
        middle = statistics.median(found[2:])
        lines.append(f"| {case.name}, {rows} images | {name} | {1e3 * middle / rows:.3f} | {base / middle:.2f}× |")
    return [*lines, f"| {case.name} | {notes} | | |"]


def published_loop(model: ClassifierMoE, x: Tensor) -> Tensor:
    """Top-1 routing as the published RT-ER code runs it: one expert call per image, written anew."""
    z = model.normalize(x)
    choice = model.moe.router(z).argmax(dim=1).tolist()
    return torch.cat([model.moe.experts[expert](z[number : number + 1]) for number, expert in enumerate(choice)])


def dense(model: ClassifierMoE, x: Tensor) -> Tensor:
    """Every expert on every image, then the chosen one's logits."""
    return model.mix(model.expert_outputs(x), model.route(x))


def dispatch(rounds: int) -> list[str]:
    """Forward pass of the shipped RT-ER model on 256 digits: sparse dispatch, dense, and the loop over samples."""
    model = load_model("rt-er")
    assert isinstance(model, ClassifierMoE)
    x = torch.from_numpy(load_dataset("digits", n=256).images)
    ways: dict[str, Callable[[], Tensor]] = {
        "sparse (ours)": lambda: model(x),
        "dense": lambda: dense(model, x),
        "published loop over samples": lambda: published_loop(model, x),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        expected = model(x)
        for _ in range(rounds * 5):
            for name, way in ways.items():
                begin = time.perf_counter()
                out = way()
                times[name].append(time.perf_counter() - begin)
                assert torch.allclose(out, expected, atol=1e-4)
    base = statistics.median(times["sparse (ours)"])
    return [
        f"| {name} | {1e3 * statistics.median(found):.2f} | {statistics.median(found) / base:.1f}× |"
        for name, found in times.items()
    ]


DRY_RUNS: tuple[tuple[str, int | None, str], ...] = (
    ("resnet-at", 50, "autoattack"),
    ("resnet-at", 200, "autoattack"),
    ("resnet-st", None, "autoattack"),
    ("rt-er", 50, "autoattack"),
    ("rt-er", 50, "moe-adaptive"),
    ("dwf", 50, "autoattack"),
)
"""Model, samples (None for all) and attack of the rows that compare a dry run with the evaluation itself."""


def estimate(model: str, n: int | None, attack_name: str) -> str:
    """One row of the table: what `--dry-run` says of an evaluation into an empty database, and what it then takes."""
    with tempfile.TemporaryDirectory() as folder:
        spec = EvalSpec(model, attacks=(attack_name,), views=("whole",), n=n, db=str(Path(folder) / "results.db"))
        (cell,), bill = planned_with_costs(prepare(spec, parse_attacks(spec.attacks)))
        summary = evaluate(spec)
    assert cell.cost is not None
    (result,) = summary.results
    passes = [cell.cost.forwards + cell.cost.backwards, result.forwards + result.backwards]
    return (
        f"| {model} | {attack_name} | {summary.n} | {bill.seconds_at_most:.1f} | {bill.seconds:.1f} "
        f"| {summary.seconds:.1f} | {bill.seconds / summary.seconds:.2f} | {passes[0]:,} / {passes[1]:,} "
        f"| {passes[0] / passes[1]:.2f} | {bill.calibration:.1f} |"
    )


def main() -> int:
    """Prints the tables as Markdown."""
    parser = argparse.ArgumentParser(description="Measure moebench against the reference libraries.")
    parser.add_argument("--n", type=int, default=200, help="digits test samples for the models that are hard to break")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per side; the median counts")
    parser.add_argument("--images", metavar="DATASET", help="CIFAR-10 images for the ResNet-18, such as npz:FILE")
    parser.add_argument("--quick", action="store_true", help="one round on few samples, to see that all of it works")
    arguments = parser.parse_args()
    n, rounds = (8, 1) if arguments.quick else (arguments.n, arguments.rounds)
    sizes = {"8/255": 4, "1/255": 2} if arguments.quick else {"8/255": 64, "1/255": 16}
    keep_freed_memory()
    try:
        cases = list(digits_cases(n))
        cases += resnet18_cases(arguments.images, sizes) if arguments.images else []
    except MoebenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, Linf\n")
    print("| model | eps | attack | n | reference | its s | ours s | ratio | equal | RA ours / its | passes | inside |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for case in cases:
        for attack_name in case.attacks:
            print(compare(case, attack_name, rounds), flush=True)
    print("\n| RT-ER forward pass, 256 digits | ms | relative |\n| --- | --- | --- |")
    print("\n".join(dispatch(rounds)), flush=True)
    print("\n| forward and backward | network | ms per image | gain |\n| --- | --- | --- | --- |")
    for case in {case.name: case for case in cases}.values():
        print("\n".join(copies(case, rounds)), flush=True)
    print("\n| dry run | attack | n | at most s | about s | measured s | ratio | passes | ratio | trial s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in DRY_RUNS[:1] if arguments.quick else DRY_RUNS:
        print(estimate(*row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

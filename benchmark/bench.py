"""Measured speed: our engine against pyautoattack and torchattacks, and sparse routing against the published loop.

`make bench` runs it. Both sides see the same model and images in one process, take turns, and the median of several
rounds counts. Verdicts are compared per sample.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moebench.attacks import AttackPlan, load_attack
from moebench.attacks._engine import Engine, Finished, Samples, to_samples
from moebench.attacks._reference import run_reference
from moebench.attacks._search import search_copy
from moebench.attacks._views import make_view
from moebench.datasets import load_dataset
from moebench.models import load_model
from moebench.models.rt_er import ClassifierMoE
from moebench.schema import ThreatModel


@dataclass(frozen=True)
class Round:
    """One timed attack: wall time in seconds, samples standing (N,), passes, and the share of time inside the model."""

    seconds: float
    standing: Tensor
    forwards: int
    backwards: int
    inside: float


def attack(model: nn.Module, samples: Samples, threat: ThreatModel, plan: AttackPlan, *, reference: bool) -> Round:
    """Runs an attack on the whole view, from the clean pass to the last verdict."""
    begin = time.perf_counter()
    search = model if reference else search_copy(model, samples.x[:256]).module
    view = make_view("whole", search)
    engine = Engine(model, view, samples, threat, batch_size=256 if reference else 1024)
    with torch.no_grad():
        engine.broken |= model(samples.x).argmax(1) != samples.y
    forwards = backwards = 0
    for stage in plan.stages:
        index = (~engine.broken).nonzero().squeeze(1)
        counts: list[tuple[int, int]] = []

        def sink(done: Finished, counts: list[tuple[int, int]] = counts) -> None:
            counts.append((int(done.forwards.sum()), int(done.backwards.sum())))

        if reference and len(index) > 0:
            run_reference(stage, engine, index, sink)
        else:
            engine.run_stage(stage, index, sink)
        forwards += sum(count[0] for count in counts)
        backwards += sum(count[1] for count in counts)
    seconds = time.perf_counter() - begin
    return Round(seconds, ~engine.broken, forwards, backwards, engine.model_seconds / seconds)


def compare(name: str, attack_name: str, n: int, rounds: int) -> str:
    """One row of the table: reference against native on a shipped digits model."""
    dataset = load_dataset("digits", n=n)
    samples = to_samples(dataset.images, dataset.labels, dataset.ids, "cpu")
    model = load_model(name).requires_grad_(False)
    plan, threat = load_attack(attack_name), dataset.default_threat()
    theirs, ours = [], []
    for _ in range(rounds):
        theirs.append(attack(model, samples, threat, plan, reference=True))
        ours.append(attack(model, samples, threat, plan, reference=False))
    slow = statistics.median(one.seconds for one in theirs)
    fast = statistics.median(one.seconds for one in ours)
    equal = (theirs[0].standing == ours[0].standing).double().mean().item()
    ra_theirs, ra_ours = (one.standing.double().mean().item() for one in (theirs[0], ours[0]))
    library = "torchattacks" if attack_name.startswith(("pgd", "fgsm")) else "pyautoattack"
    passes = f"{ours[0].forwards + ours[0].backwards:,} / {theirs[0].forwards + theirs[0].backwards:,}"
    return (
        f"| {name} | {attack_name} | {n} | {library} | {slow:.2f} | {fast:.2f} | {slow / fast:.1f}× | {equal:.1%} | "
        f"{100 * ra_ours:.1f} / {100 * ra_theirs:.1f} | {passes} | {ours[0].inside:.0%} |"
    )


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


def main() -> None:
    """Prints the tables as Markdown."""
    parser = argparse.ArgumentParser(description="Measure moebench against the reference libraries.")
    parser.add_argument("--n", type=int, default=200, help="digits test samples")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per side; the median counts")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, digits, Linf 0.2\n")
    print(
        "| model | attack | n | reference | its s | ours s | ratio | equal verdicts | RA ours, its | passes | inside |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in ("resnet-st", "resnet-at", "rt-er"):
        for attack_name in ("pgd-50", "apgd-ce", "apgd-t", "autoattack"):
            print(compare(name, attack_name, arguments.n, arguments.rounds), flush=True)
    print("\n| RT-ER forward pass, 256 digits | ms | relative |\n| --- | --- | --- |")
    print("\n".join(dispatch(arguments.rounds)))


if __name__ == "__main__":
    main()

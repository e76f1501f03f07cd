"""Passes: counting, averaging over draws, and going on in smaller parts when memory runs out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys import EPS, attack, digits, frozen, make_engine, reduced, trained_conv, trained_moe

from moebench.attacks._engine import Engine, Finished
from moebench.attacks._memory import FEWEST_ROWS, fitting_rows, is_out_of_memory, keep_freed_memory, rows_for
from moebench.attacks._passes import Expectation, batches
from moebench.attacks._views import make_view
from moebench.attacks.pgd import PGD
from moebench.attacks.square import Square
from moebench.errors import RunError
from moebench.schema import ThreatModel

THREAT = ThreatModel("Linf", EPS["Linf"])


class Cramped(nn.Module):
    """A model on a device whose memory holds `most` images at a time."""

    def __init__(self, model: nn.Module, most: int, words: str = "CUDA out of memory. Tried to allocate") -> None:
        super().__init__()
        self.model, self.most, self.words = model, most, words
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        if len(x) > self.most:
            raise RuntimeError(self.words)
        logits: Tensor = self.model(x)
        return logits


class Noisy(nn.Module):
    """A model that adds noise to its input, anew in every pass."""

    def __init__(self, model: nn.Module, sigma: float) -> None:
        super().__init__()
        self.model, self.sigma = model, sigma

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x + self.sigma * torch.randn_like(x))
        return logits


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory: you"])
@pytest.mark.parametrize("most", [1, 3, 7])
def test_running_out_of_memory_costs_passes_and_changes_no_verdict(most: int, words: str) -> None:
    samples = digits(12)
    stages = reduced("apgd-t").stages
    roomy = attack(trained_conv(), samples, THREAT, stages, batch_size=12)
    model = Cramped(trained_conv(), most, words)
    cramped = attack(model, samples, THREAT, stages, batch_size=12)
    assert torch.equal(roomy.broken, cramped.broken)
    torch.testing.assert_close(roomy.x_adv, cramped.x_adv, rtol=0, atol=1e-5)
    # Found once by halving, not again in every pass.
    assert sum(size > most for size in model.seen) <= 5


def test_an_image_that_does_not_fit_alone_ends_the_run_with_a_line() -> None:
    engine = make_engine(Cramped(trained_conv(), 0), digits(4), THREAT)
    with pytest.raises(RunError, match="a single image does not fit"):
        engine.run_stage(PGD(steps=2), torch.arange(4), lambda done: None)


def test_other_errors_of_the_model_are_not_taken_for_memory() -> None:
    engine = make_engine(Cramped(trained_conv(), 2, "shape mismatch"), digits(4), THREAT)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        engine.run_stage(PGD(steps=2), torch.arange(4), lambda done: None)
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("budget", "each", "most", "rows"),
    [(1000, 10, 512, 64), (10, 10, 512, FEWEST_ROWS), (10**9, 1, 512, 512), (320, 10, 512, 32), (319, 10, 512, 16)],
)
def test_a_batch_is_the_largest_power_of_two_that_fits(budget: int, each: int, most: int, rows: int) -> None:
    assert rows_for(budget, each, most) == rows


def test_the_batch_on_a_cpu_follows_from_the_images_alone() -> None:
    assert fitting_rows(trained_conv(), (1, 8, 8), "cpu") == 512
    assert fitting_rows(trained_conv(), (1, 28, 28), "cpu") == 64
    assert fitting_rows(trained_conv(), (3, 32, 32), "cpu") == FEWEST_ROWS


def test_keeping_freed_memory_can_be_asked_for_twice() -> None:
    assert keep_freed_memory() == keep_freed_memory()


def test_passes_are_counted_per_draw() -> None:
    samples, counts = digits(6), []
    for draws in (1, 4):
        engine = make_engine(trained_conv(), samples, ThreatModel("Linf", 0.01), draws=draws)

        def sink(done: Finished) -> None:
            counts.append((done.forwards.tolist(), done.backwards.tolist()))

        engine.run_stage(PGD(steps=3), torch.arange(6), sink)
    (once, back), (four, back_four) = counts
    assert [4 * one for one in once] == four and [4 * one for one in back] == back_four
    assert max(back) == 3 and max(once) == 4


def test_averaging_draws_gives_the_gradient_of_the_expected_loss() -> None:
    """For logits that are linear in the noise, the mean gradient of the loss tends to its expectation."""
    model, samples = Noisy(trained_conv(), 0.1), digits(8)

    def gradient(draws: int, seed: int) -> Tensor:
        engine = make_engine(model, samples, THREAT, draws=draws)
        rows = _rows_of(engine)
        torch.manual_seed(seed)
        return engine.gradient(samples.x, rows, lambda logits, rows: logits.logsumexp(1))[2]

    exact = torch.stack([gradient(1, seed) for seed in range(200)]).mean(0)

    def error(draws: int) -> float:
        return float(torch.stack([(gradient(draws, 1000 + seed) - exact).norm() for seed in range(10)]).mean())

    assert error(16) < 0.5 * error(1)


def test_the_expectation_of_a_random_model_is_the_mean_of_its_probabilities() -> None:
    model = Noisy(trained_conv(), 0.3)
    x = digits(5).x
    torch.manual_seed(3)
    drawn = torch.stack([model(x).softmax(1) for _ in range(7)]).mean(0)
    torch.manual_seed(3)
    torch.testing.assert_close(Expectation(model, 7)(x).exp(), drawn)


def test_a_random_model_is_never_taken_for_going_round_in_circles() -> None:
    samples = digits(4)
    engine = make_engine(Noisy(trained_conv(), 0.0), samples, ThreatModel("Linf", 0.0), draws=2)
    passes: list[Tensor] = []
    engine.run_stage(PGD(steps=20), torch.arange(4), lambda done: passes.append(done.backwards))
    assert torch.cat(passes).max() == 2 * 20


# Searching in less.


@pytest.mark.parametrize("view", ["whole", "router", "experts", "smooth"])
def test_a_search_in_bfloat16_is_judged_in_float32(view: str) -> None:
    model, samples = trained_moe(), digits(24)
    shown = make_view(view, model)
    shown.prepare(samples.x)
    seen: list[torch.dtype] = []
    hooked = model.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    engine = Engine(model, shown, samples, THREAT)
    engine.run_stage(PGD(steps=5), torch.arange(24), lambda done: None, search=torch.bfloat16)
    hooked.remove()
    broken = engine.broken.nonzero().squeeze(1)
    assert len(broken) > 0
    # Each verdict is that of the float32 model.
    assert torch.equal(model(engine.x_adv[broken]).argmax(1), engine.adv_pred[broken])
    assert torch.float32 in seen
    if view == "whole":
        assert torch.bfloat16 in seen


# Proposals made ahead and circles: less work, the same images.


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("view", ["whole", "experts"])
def test_proposals_made_ahead_change_no_verdict(norm: str, view: str) -> None:
    samples, threat = digits(8), ThreatModel(norm, EPS[norm])  # type: ignore[arg-type]
    stage = Square(queries=120)
    one_by_one = attack(trained_moe(), samples, threat, [stage], view, batch_size=1)
    ahead = attack(trained_moe(), samples, threat, [stage], view, batch_size=400)
    assert torch.equal(one_by_one.broken, ahead.broken)
    torch.testing.assert_close(one_by_one.x_adv, ahead.x_adv, rtol=0, atol=1e-5)


def test_proposals_made_ahead_stay_within_the_budget_and_waste_little() -> None:
    samples, queries = digits(4), 300
    stage = Square(queries=queries)
    engine = make_engine(trained_conv(), samples, ThreatModel("Linf", 0.01), batch_size=256)
    passes: list[Tensor] = []
    engine.run_stage(stage, torch.arange(4), lambda done: passes.append(done.forwards))
    spent = torch.cat(passes)
    # One pass for the start, and one per confirmed success.
    assert (spent > queries).all() and (spent <= stage.budget()[0]).all()


class Saddle(nn.Module):
    """Two classes; the gradient of the margin changes its sign at a ridge, so that PGD steps back and forth over it."""

    def forward(self, x: Tensor) -> Tensor:
        ridge = -(x.flatten(1) - 0.5).abs().sum(dim=1)
        return torch.stack((torch.ones_like(ridge), ridge), dim=1)


def test_pgd_stops_when_it_goes_round_in_circles_and_its_verdict_and_image_stay() -> None:
    from moebench.attacks._engine import Samples

    x = torch.full((3, 1, 2, 2), 0.4)
    samples = Samples(x, torch.zeros(3, dtype=torch.int64), torch.arange(3))
    threat = ThreatModel("Linf", 0.25)
    engine = make_engine(frozen(Saddle()), samples, threat)
    handed: list[Finished] = []
    engine.run_stage(PGD(steps=1000), torch.arange(3), handed.append)
    assert handed[0].backwards.max() < 100
    full = make_engine(frozen(Saddle()), samples, threat, draws=2)
    full.run_stage(PGD(steps=1000), torch.arange(3), handed.append)
    assert handed[1].backwards.min() == 2 * 1000
    torch.testing.assert_close(handed[0].x_adv, handed[1].x_adv)


@pytest.mark.parametrize("steps", [1, 5, 50, 200])
def test_circles_change_no_verdict_of_pgd(steps: int) -> None:
    samples = digits(60)
    with_stop = attack(trained_conv(), samples, THREAT, [PGD(steps=steps)])
    without = attack(trained_conv(), samples, THREAT, [PGD(steps=steps)], draws=2)
    assert torch.equal(with_stop.broken, without.broken)
    torch.testing.assert_close(with_stop.x_adv, without.x_adv, rtol=0, atol=1e-5)


def test_batches_cover_everything_once() -> None:
    parts = list(batches(torch.arange(10), 4))
    assert [len(part) for part in parts] == [4, 4, 2] and torch.equal(torch.cat(parts), torch.arange(10))


def _rows_of(engine: Engine):  # type: ignore[no-untyped-def]
    from moebench.attacks._base import Rows

    index = torch.arange(len(engine.samples))
    return Rows(index, engine.samples.x, engine.samples.y, index * 0 - 1, index * 0, index * 0)

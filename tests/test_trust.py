from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from commands import Said, Terminal
from fake_store import FakeStore, first_broken, model, protocol
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest  # type: ignore[import-untyped]
from torch import Tensor, nn
from toys import digits, trained_conv

from moebench import flags, probes, schema
from moebench.attacks import load_attack
from moebench.flags import (
    ADAPTIVE_WINS,
    BATCH_DEPENDENT,
    BLACK_BOX_WINS,
    EPS_DOES_NOT_HELP,
    FEWER_STEPS_WIN,
    MEANINGS,
    RANDOM_FORWARD,
    SMALLER_EPS_WINS,
    STANDS_EVERYWHERE,
    STEPS_DO_NOT_HELP,
    TRAIN_MODE,
    ZERO_GRADIENTS,
)
from moebench.report import render
from moebench.schema import BoolArray, Flag, Outcomes, StoredResult, ThreatModel
from moebench.store import Store
from moebench.trust import ALPHA, at_least, mcnemar, paired_interval, passive_flags

WHO, N = model("toy"), 200

# What users hand in: a small honest digits network, and ways to spoil it.
MODELS = """
import copy
import torch
from torch import nn
from toys import trained_conv


class Spoilt(nn.Module):
    def __init__(self, before=None, after=None, noise=0.0, drop=None):
        super().__init__()
        self.net, self.before, self.after, self.noise = trained_conv(), before, after, noise
        self.drop = drop

    def forward(self, x):
        if self.before is not None:
            x = self.before(x)
        if self.noise:
            x = x + self.noise * torch.randn_like(x)
        z = self.net(x)
        return z if self.after is None else self.after(z)


class Forgetful(nn.Module):
    "Switches itself to train mode in every forward pass: dropout drops, BatchNorm uses the batch."

    def __init__(self, norm):
        super().__init__()
        self.net, self.drop, self.norm = trained_conv(), nn.Dropout(0.2), norm

    def forward(self, x):
        (self.net.bn1 if self.norm else self.drop).train()
        return self.net(x) if self.norm else self.net(self.drop(x))


def honest(): return Spoilt()
def saturating(): return Spoilt(after=lambda z: 1e4 * z)
def rounding(): return Spoilt(before=lambda x: (8 * x).round() / 8)
def blind(): return Spoilt(before=lambda x: x.detach())
def noisy(): return Spoilt(noise=0.5)
def dropping(): return Forgetful(norm=False)
def leaking(): return Forgetful(norm=True)
"""


@pytest.fixture
def moebench(moebench: Terminal) -> Terminal:
    (moebench.folder / "mine.py").write_text(MODELS)
    return moebench


def codes(said: Said) -> list[str]:
    return sorted(flag["code"] for flag in said.json["flags"])


# A model for each flag.


@pytest.mark.parametrize(
    ("name", "attack", "expected"),
    [
        ("honest", "pgd-20", []),
        ("saturating", "pgd-20", [STEPS_DO_NOT_HELP, EPS_DOES_NOT_HELP, ZERO_GRADIENTS]),
        ("rounding", "pgd-20", [STEPS_DO_NOT_HELP, ZERO_GRADIENTS]),
        ("blind", "square", [ZERO_GRADIENTS]),
        ("noisy", "pgd-20", [RANDOM_FORWARD]),
        ("dropping", "pgd-20", [RANDOM_FORWARD, TRAIN_MODE]),
        ("leaking", "pgd-20", [BATCH_DEPENDENT, TRAIN_MODE]),
    ],
)
def test_each_way_to_mask_gradients_is_flagged(moebench: Terminal, name: str, attack: str, expected: list[str]) -> None:
    eps = "0.02" if attack == "square" else "0.05"
    said = moebench.evaluate(f"mine.py:{name}", attack, 60, "--eps", eps, "--json")
    found = codes(said)
    assert set(expected) <= set(found) and bool(found) == bool(expected), said.json["flags"]
    with Store.open("results.db", write=False) as store:
        (run,) = store.runs()
    assert [{"code": flag.code, "evidence": flag.evidence} for flag in run.flags] == said.json["flags"]
    shown = moebench("show", said.json["run_id"]).out
    for flag in run.flags:
        assert f"flag {flag.code}: {flag.evidence}\n" in shown
        assert MEANINGS[flag.code].meaning in shown and MEANINGS[flag.code].advice in shown
    assert ("    means  " in shown) == bool(expected)


def test_a_hard_router_is_flagged_by_the_attack_through_soft_routing(moebench: Terminal) -> None:
    plain = moebench.evaluate("rt-er-official", "pgd-20", 60, "--view", "whole", "--json")
    assert ADAPTIVE_WINS not in codes(plain)
    through = moebench.evaluate("rt-er-official", "pgd-20", 60, "--view", "smooth", "--json")
    (flag,) = (flag for flag in through.json["flags"] if flag["code"] == ADAPTIVE_WINS)
    assert flag["evidence"].startswith("pgd-20 on smooth breaks ") and "paired interval" in flag["evidence"]
    assert f"flag {ADAPTIVE_WINS}: pgd-20 on smooth" in moebench("show", through.json["run_id"]).out


@pytest.mark.parametrize(
    ("name", "norm", "eps"),
    [
        ("resnet-at", "Linf", 0.2),
        ("resnet-at", "L2", 0.5),
        ("resnet-trades", "Linf", 0.2),
        ("ensemble-mean", "Linf", 0.2),
    ],
)
def test_honest_robust_models_are_not_flagged(moebench: Terminal, name: str, norm: str, eps: float) -> None:
    said = moebench.evaluate(name, "fgsm,pgd-10,pgd-20", 60, "--norm", norm, "--eps", eps, "--json")
    assert said.json["ra"] > 0.5 and said.json["flags"] == []


# Probes on the model.


def probed(module: nn.Module, n: int = 40, **options: Any) -> dict[str, str]:
    samples = digits(n)
    with torch.no_grad():
        right = module(samples.x).argmax(dim=1) == samples.y
    options = {"right": right, "standing": right, "threat": ThreatModel("Linf", 0.05), **options}
    found = probes.probe(module, samples, **options)
    assert len({flag.code for flag in found}) == len(found)
    return {flag.code: flag.evidence for flag in found}


class Around(nn.Module):
    """A trained network with something before and after it."""

    def __init__(self, before: Any = lambda x: x, after: Any = lambda z: z) -> None:
        super().__init__()
        self.net, self.before, self.after = trained_conv(), before, after

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(self.net(self.before(x)))
        return out


def noted(passes: list[int], x: Tensor) -> Tensor:
    """The images as they are; keeps how many there were."""
    passes.append(len(x))
    return x


class Shattered(torch.autograd.Function):
    """The identity, whose gradient has nothing to do with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.sin(1e6 * gradient + torch.arange(gradient.numel()).view_as(gradient) ** 2)


class NoBackward(Shattered):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("no derivative\nsecond line")


def test_honest_network_passes_every_probe_at_every_batch_size() -> None:
    assert probed(Around()) == {}
    assert probed(Around(), batch_size=7) == {} and probed(Around(), n=1) == {}
    assert probed(Around(), threat=ThreatModel("L2", 0.3)) == {}


def test_a_gradient_that_points_anywhere_does_not_climb() -> None:
    found = probed(Around(before=Shattered.apply))
    assert STEPS_DO_NOT_HELP in found and ZERO_GRADIENTS not in found


def test_an_attack_that_misses_the_whole_box_is_reported_with_its_counts() -> None:
    saturated = Around(after=lambda z: 1e4 * z)
    found = probed(saturated)
    assert "Linf eps 1, where every image is allowed, leaves " in found[STANDS_EVERYWHERE]
    # A model that says the same of every image has nothing to be fooled into.
    assert STANDS_EVERYWHERE not in probed(saturated, several_classes=False)


def test_a_model_without_a_backward_pass_is_reported_not_raised() -> None:
    assert "second" not in probed(Around(before=NoBackward.apply))[ZERO_GRADIENTS]
    assert "the backward pass fails: no derivative" in probed(Around(before=NoBackward.apply))[ZERO_GRADIENTS]
    assert "no gradient at all" in probed(Around(before=lambda x: x.detach()))[ZERO_GRADIENTS]


def test_probes_repeat_themselves_and_leave_the_random_numbers_alone() -> None:
    noisy = Around(before=lambda x: x + 2 * torch.randn_like(x))
    right = torch.ones(40, dtype=torch.bool)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = probed(noisy, right=right, standing=right)
    torch.manual_seed(6)
    again = probes.probe(noisy, digits(40), ThreatModel("Linf", 0.05), right=right, standing=right)
    assert [(flag.code, flag.evidence) for flag in again] == list(first.items())
    torch.manual_seed(5)
    probes.probe(noisy, digits(40), ThreatModel("Linf", 0.05), right=right, standing=right)
    torch.testing.assert_close(torch.rand(3), expected)


def test_probes_cost_what_they_say() -> None:
    passes: list[int] = []
    counted = Around(before=partial(noted, passes))
    right = torch.ones(200, dtype=torch.bool)
    probes.probe(counted, digits(200), ThreatModel("Linf", 0.05), right=right, standing=right)
    assert sum(passes) == 2 * 64 + 3 * 32 * 21 and f"{sum(passes):,}" in (probes.__doc__ or "")


def test_nothing_is_attacked_where_nothing_stands() -> None:
    passes: list[int] = []
    counted = Around(before=partial(noted, passes))
    right = torch.ones(10, dtype=torch.bool)
    assert probes.probe(counted, digits(10), ThreatModel("Linf", 0.1), right=right, standing=~right) == []
    assert sum(passes) == 20


# Probes and the store.


def test_probes_run_once_per_command(moebench: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = probes.probe

    def counting(*args: Any, **options: Any) -> list[Flag]:
        calls.append(1)
        return real(*args, **options)

    monkeypatch.setattr(probes, "probe", counting)
    words = ("mine.py:rounding", "pgd-10", 20, "--json")
    first = moebench.evaluate(*words)
    assert len(calls) == 1 and codes(first)
    again = moebench.evaluate(*words)
    assert len(calls) == 1 and again.json["flags"] == first.json["flags"]
    fresh = moebench.evaluate(*words, "--fresh")
    assert len(calls) == 2 and fresh.json["flags"] == first.json["flags"]
    quiet = moebench.evaluate(*words, "--no-trust")
    assert len(calls) == 2 and codes(quiet) == []
    # The run without probes says nothing about the model; the one before it does.
    assert moebench.evaluate(*words).json["flags"] == first.json["flags"] and len(calls) == 2


def test_a_command_that_was_never_probed_is_probed_once(moebench: Terminal) -> None:
    words = ("mine.py:rounding", "pgd-10", 20, "--json")
    assert codes(moebench.evaluate(*words, "--no-trust")) == []
    found = moebench.evaluate(*words)
    assert ZERO_GRADIENTS in codes(found) and codes(moebench.evaluate(*words)) == codes(found)


# Comparisons of stored outcomes.


def add(store: FakeStore, attack: str, broken: BoolArray, **facts: Any) -> tuple[StoredResult, Outcomes]:
    """A finished cell with the parameters of a registered attack; `square` samples at the end fell to Square."""
    fell = facts.pop("square", 0)
    stored = store.add(WHO, attack, broken, **facts)
    parameters = load_attack(attack).parameters()
    left = int((~broken).sum()) + fell
    stages = {name: {"attacked": N, "broken": 0} for name in parameters} | {
        "square": {"attacked": left, "broken": fell}
    }
    cell, record = replace(stored.cell, parameters=parameters), replace(stored.record, stages=stages)
    return replace(stored, cell=cell, record=record), store.evidence[stored.result_id]


def flagged(*results: tuple[StoredResult, Outcomes], elsewhere: Sequence[Any] = ()) -> dict[str, str]:
    found = passive_flags(results, elsewhere)
    assert passive_flags(results[::-1], elsewhere) == found
    return {flag.code: flag.evidence for flag in found}


def test_square_after_gradients() -> None:
    store = FakeStore()
    few = add(store, "autoattack", first_broken(N, 60), square=2)
    assert flagged(few) == {}
    many = add(store, "autoattack", first_broken(N, 60), square=20)
    found = flagged(many, few)
    assert list(found) == [BLACK_BOX_WINS] and "square breaks 20 of the 160 samples" in found[BLACK_BOX_WINS]
    # On a part of the model it says nothing about the gradients of the whole.
    assert flagged(add(store, "autoattack", first_broken(N, 60), square=20, view="experts")) == {}


def test_square_against_gradients() -> None:
    store = FakeStore()
    pgd, apgd_t = (add(store, name, first_broken(N, 40)) for name in ("pgd-50", "apgd-t"))
    some, many = (add(store, "square", first_broken(N, k)) for k in (60, 120))
    # Square may well beat the cross-entropy alone by a little, but not a loss that does not saturate.
    assert flagged(pgd, some) == {}
    assert list(flagged(pgd, apgd_t, some)) == list(flagged(pgd, many)) == [BLACK_BOX_WINS]
    assert flagged(add(store, "fgsm", first_broken(N, 0)), many) == {} and flagged(many) == {}
    other = add(store, "pgd-50", first_broken(N, 40), engine="reference")
    assert flagged(other, many) == {}


def test_fewer_steps_and_smaller_radius() -> None:
    store = FakeStore()
    one, ten, fifty = (
        add(store, name, first_broken(N, k)) for name, k in (("fgsm", 60), ("pgd-10", 60), ("pgd-50", 40))
    )
    found = flagged(one, ten, fifty)
    assert (
        list(found) == [FEWER_STEPS_WIN]
        and "that pgd-50 leaves standing, and misses 0 others" in found[FEWER_STEPS_WIN]
    )
    assert flagged(one, ten) == {}
    wide = add(store, "fgsm", first_broken(N, 30), on=protocol(n=N, eps=0.4))
    found = flagged(one, elsewhere=[wide])
    assert list(found) == [SMALLER_EPS_WINS] and "fgsm at eps 0.2 breaks 30" in found[SMALLER_EPS_WINS]
    assert "eps 0.4 leaves" in found[SMALLER_EPS_WINS]
    assert flagged(wide, elsewhere=[one]) == found
    assert flagged(ten, elsewhere=[wide]) == {}


def test_adaptive_against_plain() -> None:
    store = FakeStore()
    plain = add(store, "autoattack", first_broken(N, 60))
    near, far = (add(store, "moe-adaptive", first_broken(N, k)) for k in (62, 90))
    assert flagged(plain, near) == flagged(near) == {}
    assert list(flagged(plain, far)) == [ADAPTIVE_WINS]
    pgd = add(store, "pgd-50", first_broken(N, 20))
    smooth = add(store, "smooth-pgd-50", first_broken(N, 50), view="smooth")
    assert list(flagged(plain, pgd, smooth)) == [ADAPTIVE_WINS]
    assert flagged(plain, smooth, add(store, "pgd-10", first_broken(N, 20))) == {}


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 200))
def test_the_tests_keep_their_promises(won: int, lost: int, rest: int) -> None:
    n = won + lost + rest + 1
    low, high = paired_interval(won, lost, n)
    assert -1 <= low <= (won - lost) / n <= high <= 1 or won + lost == 0
    assert 0 <= mcnemar(won, lost) <= 1 and mcnemar(won + 1, lost) <= mcnemar(won, lost) + 1e-12
    # What a test calls significant lies outside the interval too.
    assert mcnemar(won, lost) > ALPHA or low > 0
    assert at_least(0, n, 0.1) == 1 and at_least(won, n, 0.01) <= at_least(won, n, 0.02) + 1e-12


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 200), st.sampled_from([0.01, 0.1, 0.5]))
def test_the_tests_are_those_of_scipy(won: int, lost: int, rest: int, share: float) -> None:
    pairs = won + lost
    n = pairs + rest + 1
    assert at_least(won, n, share) == pytest.approx(binom.sf(won - 1, n, share), rel=1e-9, abs=1e-300)
    if pairs:
        assert mcnemar(won, lost) == pytest.approx(binomtest(won, pairs, alternative="greater").pvalue, rel=1e-9)
        exact = binomtest(won, pairs).proportion_ci(method="exact")
        wanted = ((2 * exact.low - 1) * pairs / n, (2 * exact.high - 1) * pairs / n)
        assert paired_interval(won, lost, n) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("share", [0.01, 0.02, 0.1, 0.2])
def test_the_false_alarm_rate_is_what_the_documents_say(share: float) -> None:
    for n in (1, 5, 32, 64, 337):
        alarm = np.array([at_least(k, n, share) <= ALPHA for k in range(n + 1)])
        drawn = np.random.default_rng(n).binomial(n, share, 20_000)
        assert alarm[drawn].mean() <= ALPHA + 0.003 and alarm[n] == (share**n <= ALPHA)


# Where flags are shown.


def test_every_code_is_explained_and_shown_escaped_in_the_report() -> None:
    named = {value for key, value in vars(flags).items() if key.isupper() and isinstance(value, str)}
    assert named | {schema.OVERSTATED_RA} == MEANINGS.keys()
    named.discard(schema.OVERSTATED_RA)
    for said in MEANINGS.values():
        assert said.meaning and said.advice and not said.meaning.endswith(".")
    store = FakeStore()
    broken = first_broken(N, 20)
    done = store.add(WHO, "autoattack", broken)
    old = tuple(Flag(code, "older words") for code in sorted(named))
    store.add_run(done, flags=old)
    store.add_run(done, flags=tuple(Flag(code, f"<b>{code}</b> & 50 %") for code in sorted(named)))
    pages = render(store)
    for page in ("index.html", "models/toy.html"):
        for code in named:
            assert f"&lt;b&gt;{code}&lt;/b&gt; &amp; 50 %" in pages[page]
        assert "<b>" not in pages[page] and "older words" not in pages[page]
    assert all(code in pages["data/leaderboard.csv"] for code in named)


def test_the_report_takes_comparisons_from_the_outcomes_not_from_old_runs() -> None:
    store = FakeStore()
    plain = store.add(WHO, "autoattack", first_broken(N, 60))
    parameters = load_attack("autoattack").parameters()
    store.stored[0] = replace(plain, cell=replace(plain.cell, parameters=parameters))
    assert "adaptive-wins" not in render(store)["index.html"]
    store.add(WHO, "moe-adaptive", first_broken(N, 100))
    shown = render(store)["index.html"]
    assert "moe-adaptive breaks 40 of the 140 samples that autoattack leaves standing" in shown

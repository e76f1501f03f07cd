"""Routing per token in the probe, and overrides of a model's routing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import MOE, Terminal
from small_models import Flat, LayeredMoE, TwoExperts
from torch import Tensor
from toys import awake, frozen

from moebench.attacks import load_attack
from moebench.datasets import load_dataset
from moebench.errors import Notice, UsageError
from moebench.loading import load, variant
from moebench.models import MODELS
from moebench.models._moe import moe_layers, record, reroute
from moebench.models.v_moe import VMoE
from moebench.overrides import RoutingOverride, parse_routing
from moebench.routing import RoutingProbe
from moebench.store import Store


@pytest.fixture
def moebench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOEBENCH_DB", raising=False)
    return Terminal(tmp_path, capsys)


@pytest.fixture(autouse=True)
def same_weights() -> None:
    """Fresh models are the same whatever ran before: a lopsided router would leave some tests nothing to see."""
    torch.manual_seed(0)


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def v_moe(**settings: object) -> VMoE:
    made = frozen(awake(MODELS.get("v-moe").make(10, (1, 8, 8), **settings)))
    assert isinstance(made, VMoE)
    return made


# The probe.


def test_the_probe_averages_over_images_and_tokens() -> None:
    model, x, moved = v_moe(), images(5), images(3, seed=1)
    index = torch.tensor([4, 0, 2])
    probe = RoutingProbe(model, x, batch_size=2)
    probe.look(moved, index)
    before, after, soft = record(model, x[index]), record(model, moved), record(model, moved, soft=True)
    for found in probe.layers():
        ious, changed, entropy = [], [], []
        load, moves = [0.0] * 4, [[0] * 4 for _ in range(4)]
        for b in range(3):
            for t in range(17):
                old, new = (tape[found.name].weights[b, t].double().tolist() for tape in (before, after))
                first, second = ({i for i in range(4) if weights[i] > 0} for weights in (old, new))
                ious.append(len(first & second) / len(first | second))
                changed.append(first != second)
                moves[old.index(max(old))][new.index(max(new))] += 1
                load = [total + weight / sum(new) / 51 for total, weight in zip(load, new, strict=True)]
                probs = soft[found.name].weights[b, t].double()
                entropy.append(float(-(probs * probs.log()).sum()))
        assert found.iou == pytest.approx(sum(ious) / 51, rel=1e-6) and 0 < found.iou < 1
        assert found.changed == pytest.approx(sum(changed) / 51, rel=1e-6)
        assert found.entropy_adv == pytest.approx(sum(entropy) / 51, rel=1e-5)
        assert found.load_adv == pytest.approx(load, rel=1e-5) and sum(found.load_clean) == pytest.approx(1)
        assert found.moves == tuple(map(tuple, moves))


def test_clean_images_change_nothing_and_a_later_look_replaces_an_earlier_one() -> None:
    model, x = v_moe(), images(4)
    probe = RoutingProbe(model, x, batch_size=4)
    probe.look(images(4, seed=1), torch.arange(4))
    assert all(layer.iou < 1 for layer in probe.layers())
    probe.look(x, torch.arange(4))
    assert [(layer.iou, layer.changed) for layer in probe.layers()] == [(1.0, 0.0)] * 2
    assert all(
        layer.load_adv == layer.load_clean and layer.entropy_adv == layer.entropy_clean for layer in probe.layers()
    )


def test_what_the_store_keeps_is_small_and_enough() -> None:
    model, x = v_moe(), images(6)
    looked, restored = (RoutingProbe(model, x, batch_size=4) for _ in range(2))
    for seed, index in ((1, [0, 5]), (2, [3, 1, 2])):
        extras = looked.look(images(len(index), seed=seed), torch.tensor(index))
        m = len(index)
        shapes = {"load": (m, 4), "entropy": (m,), "iou": (m,), "changed": (m,), "first": (m, 17)}
        assert {name: array.shape for name, array in extras.items()} == {
            f"blocks.{block}.mlp/{what}": shape for block in (1, 3) for what, shape in shapes.items()
        }
        assert sum(array.nbytes for array in extras.values()) == m * 2 * (7 * 4 + 17)
        restored.restore(torch.tensor(index).numpy(), extras)
    assert restored.layers() == looked.layers()


# Overrides.


@pytest.mark.parametrize(
    ("text", "override", "written"),
    [
        ("top-k=3", RoutingOverride(top_k=3), "top-k=3"),
        ("drop-best", RoutingOverride(barred=0), "drop-best"),
        ("drop-best=2", RoutingOverride(barred=2), "drop-best=2"),
        (" drop-best , top-k=1", RoutingOverride(1, 0), "top-k=1,drop-best"),
    ],
)
def test_an_override_is_read_and_written(text: str, override: RoutingOverride, written: str) -> None:
    assert parse_routing(text) == override == parse_routing(written) and str(override) == written


WRONG = [
    "",
    "top-k",
    "top-k=0",
    "top-k=-1",
    "top-k=two",
    "topk=2",
    "drop-best=0",
    "drop-worst",
    "top-k=1,top-k=2",
    "top-k=1,",
]


@pytest.mark.parametrize("text", WRONG)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--routing takes top-k=N, drop-best .* got "):
        parse_routing(text)


@pytest.mark.parametrize(
    ("text", "top_ks", "name"),
    [
        ("drop-best=2", [2, 2], "drop-best"),
        ("drop-best", [2, 2], "drop-best"),
        ("drop-best=1", [2, 2], "drop-best=1"),
        ("drop-best=2", [1, 2], "drop-best=2"),
        ("top-k=1,drop-best=1", [2], "top-k=1,drop-best"),
        ("top-k=1,drop-best=2", [2], "top-k=1,drop-best=2"),
        ("top-k=2", [2], ""),
        ("top-k=2", [2, 2], ""),
        ("top-k=2", [1, 2], "top-k=2"),
        ("top-k=1", [2], "top-k=1"),
        ("top-k=2,drop-best", [2, 2], "drop-best"),
        ("top-k=2,drop-best=2", [2, 2], "drop-best"),
        ("top-k=2,drop-best=1", [2, 2], "drop-best=1"),
        ("top-k=2,drop-best=2", [1, 2], "top-k=2,drop-best"),
        ("top-k=4", [4], ""),
    ],
)
def test_one_override_has_one_name_on_a_model(text: str, top_ks: list[int], name: str) -> None:
    assert str(parse_routing(text).on(top_ks)) == name


def test_dropping_the_best_takes_the_next_best() -> None:
    model, x = v_moe(), images(3)
    plain = record(model, x)
    reroute(model, barred=0)
    for name, routing in record(model, x).items():
        if name == "blocks.1.mlp":  # later layers see other features
            assert torch.equal(routing.selected, ~plain[name].selected)
        assert bool((routing.selected.sum(-1) == 2).all())
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(3, 17))
    reroute(model, barred=1)
    ranks = moe_layers(model)["blocks.1.mlp"]
    features: list[Tensor] = []
    ranks.router.register_forward_pre_hook(lambda module, given: features.append(given[0]))
    selected = record(model, x)["blocks.1.mlp"].selected
    order = ranks.router(features[0]).argsort(-1, descending=True)
    assert torch.equal(selected.nonzero()[:, 2].view(3, 17, 2), order[..., 1:3].sort(-1).values)


@pytest.mark.parametrize("top_k", [1, 2])
def test_routing_per_image_is_overridden_too(top_k: int) -> None:
    model = LayeredMoE(experts=4, top_k=top_k).eval()
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    order = model.first.router(x).argsort(dim=1, descending=True)
    reroute(model, barred=0)
    routing = model.first.own_routing(x)
    assert torch.equal(routing.selected.nonzero()[:, 1].view(8, top_k), order[:, top_k : 2 * top_k].sort(1).values)
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(8))
    torch.testing.assert_close(model.first.straight_through_routing(x).weights, routing.weights)
    assert not bool(model.first.soft_routing(x).weights[routing.selected.roll(1, 1) & ~routing.selected].isnan().any())
    with pytest.raises(UsageError, match="the best experts are barred"):
        load_attack("region").fitted(model)
    reroute(model, top_k=4, barred=None)
    assert model.first.top_k == 4


def test_more_or_fewer_experts() -> None:
    model, x = v_moe(), images(2)
    for top_k in (1, 3, 4):
        reroute(model, top_k=top_k)
        assert all(bool((routing.selected.sum(-1) == top_k).all()) for routing in record(model, x).values())
        assert all(layer.top_k == top_k for layer in moe_layers(model).values())


def test_gradients_of_a_model_without_its_best_experts_are_finite() -> None:
    model, x = v_moe(), images(2).requires_grad_()
    reroute(model, barred=0)
    for soft in (False, True):
        weights = record(model, x, soft=soft)["blocks.1.mlp"].weights
        (gradient,) = torch.autograd.grad(weights.square().sum(), x)
        assert bool(torch.isfinite(gradient).all()) and float(gradient.abs().max()) > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"top_k": 4}, "top-k must be between 1 and the 3 experts of layer 'first', got 4"),
        (
            {"barred": 0, "top_k": 2},
            "without its 2 best experts, layer 'first' has 1 of 3 left .* use drop-best=1 or less",
        ),
        ({"barred": 3}, "has 0 of 3 left and selects 1; use drop-best=2 or less"),
        ({"barred": 1, "top_k": 3}, "layer 'first' selects all its 3 experts"),
    ],
)
def test_what_a_model_cannot_do_is_refused(override: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        reroute(LayeredMoE(), **override)


def test_a_dense_model_has_no_routing_to_override() -> None:
    with pytest.raises(UsageError, match="no MoE layers"):
        reroute(Flat(2, 2), top_k=1)


# Through the harness.


def test_a_rerouted_model_is_a_variant_of_its_own() -> None:
    data = load_dataset("digits", n=4)
    plain, other = load(MOE, data), load(MOE, data, routing="drop-best")
    assert (plain.record.name, other.record.name) == (MOE, f"{MOE}[routing=drop-best]")
    assert other.checkpoint.sha256 == plain.checkpoint.sha256 and other.checkpoint.model == other.record.name
    assert other.code == f"{plain.code}/routing=drop-best"
    x = torch.from_numpy(data.images)
    (kept, next_best) = (record(one.module, x)["moe"].selected for one in (plain, other))
    assert not bool((kept & next_best).any())
    same = load(MOE, data, routing="drop-best=1")
    assert (same.record, same.checkpoint, same.code) == (other.record, other.checkpoint, other.code)
    assert load(MOE, data, settings={"top_k": 2}, routing="drop-best=1").record.name.endswith(",routing=drop-best=1]")
    both = load(MOE, data, settings={"top_k": 2}, routing="top-k=3")
    assert both.record.name == f"{MOE}[top_k=2,routing=top-k=3]"
    assert both.checkpoint.active_parameters is not None and plain.checkpoint.active_parameters is not None
    assert both.checkpoint.active_parameters > plain.checkpoint.active_parameters
    assert load("dual-moe/standard", data, routing="top-k=2").record.name == "dual-moe/standard[routing=top-k=2]"
    assert variant("rt-er/expert[0]", "routing=top-k=1") == "rt-er/expert[0][routing=top-k=1]"


def test_an_override_that_changes_nothing_is_the_model_itself() -> None:
    data = load_dataset("digits", n=4)
    for name, own in (("v-moe", 2), (MOE, 1), ("dwf", 9)):
        plain = load(name, data)
        with pytest.warns(Notice, match=f"--routing top-k={own} changes nothing on {name}, whose layers select {own}"):
            same = load(name, data, routing=f"top-k={own}")
        assert (same.record, same.checkpoint, same.code) == (plain.record, plain.checkpoint, plain.code)
        assert all((layer.top_k, layer.barred) == (own, 0) for layer in moe_layers(same.module).values())
    one, other = (load("v-moe", data, routing=text) for text in ("drop-best", "top-k=2,drop-best=2"))
    assert (one.record, one.checkpoint, one.code) == (other.record, other.checkpoint, other.code)


UNEVEN = """
from small_models import LayeredMoE


def uneven(num_classes):
    model = LayeredMoE(64, num_classes)
    model.second.top_k = 2
    return model
"""


def test_layers_that_differ_in_their_number_of_experts(tmp_path: Path) -> None:
    """No single top-k is that of both layers, so each changes the model; drop-best=2 is not what drop-best is."""
    (tmp_path / "uneven.py").write_text(UNEVEN)
    data, name = load_dataset("digits", n=4), "uneven.py:uneven"
    names, outputs = set(), set()
    for routing in (None, "top-k=1", "top-k=2", "drop-best=1"):
        loaded = load(f"{tmp_path}/{name}", data, routing=routing)
        assert loaded.record.name == (name if routing is None else f"{name}[routing={routing}]")
        assert routing is None or loaded.code.endswith(f"/routing={routing}")
        names.add(loaded.record.name)
        outputs.add(float(loaded.module(torch.from_numpy(data.images)).abs().sum()))
    assert len(names) == len(outputs) == 4
    for routing, layer in (("drop-best", "second"), ("top-k=3,drop-best=1", "first")):
        with pytest.raises(UsageError, match=f"--routing {routing} does not suit {name}: .*layer '{layer}'"):
            load(f"{tmp_path}/{name}", data, routing=routing)


def test_a_setting_that_changes_nothing_is_the_model_itself() -> None:
    data = load_dataset("digits", n=4)
    plain = load(MOE, data)
    with pytest.warns(Notice, match=f"--set top_k=1 changes nothing on these weights of {MOE}: they have it already"):
        same = load(MOE, data, settings={"top_k": 1})
    assert (same.record, same.checkpoint, same.code) == (plain.record, plain.checkpoint, plain.code)
    with pytest.warns(Notice, match="--set top_k=2"):
        assert load("rt-er-top2", data, settings={"top_k": 2}).record.name == "rt-er-top2"
    with pytest.warns(Notice, match="--set top_k=1"):
        mixed = load(MOE, data, settings={"top_k": 1}, routing="top-k=2")
    assert (mixed.record.name, mixed.code) == (f"{MOE}[routing=top-k=2]", f"{plain.code}/routing=top-k=2")


@pytest.mark.parametrize("words", ["--eps 0.1", "--eps 0.1,0.2", "--eps 0.1 --dry-run"])
def test_the_same_work_is_not_done_twice(moebench: Terminal, words: str) -> None:
    options = ("--view", "whole", "--no-trust", "--json")
    assert moebench.evaluate("v-moe", "fgsm", 8, *options, "--eps", "0.1,0.2", "--cold").code == 0
    said = moebench.evaluate("v-moe", "fgsm", 8, *options, "--cold", *words.split(), "--routing", "top-k=2")
    notes = [line for line in said.err.splitlines() if line.startswith("moebench: ")]
    assert notes == [
        "moebench: --routing top-k=2 changes nothing on v-moe, whose layers select 2 already; this is the model itself"
    ]
    if "--dry-run" in words:
        assert [cell["stored"] for cell in said.json["cells"]] == [True]
        return
    assert said.json["model"] == "v-moe"
    with Store.open("results.db", write=False) as store:
        assert len(list(store.results())) == 2
        (*_, again) = store.runs()
        assert again.reused == 1 and again.model.name == "v-moe"
    assert moebench("verify", again.run_id, "--samples", 4, "--json").json["agrees"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model dwf --routing drop-best", "layer 'moe' selects all its 9 experts, so none could take the place"),
        ("--model dwf --routing top-k=10", "top-k must be between 1 and the 9 experts of layer 'moe', got 10"),
        ("--model v-moe --routing top-k=0", "got 'top-k=0'"),
        ("--model v-moe --routing topk=2", "got 'topk=2'"),
        ("--model v-moe --routing top-k=3,drop-best", "layer 'blocks.1.mlp' has 1 of 4 left and selects 3"),
        ("--model vit --routing top-k=1", "does not suit vit: this model has no MoE layers"),
        ("--model st-moe --routing top-k", "--routing takes top-k=N, drop-best (the selected experts) or drop-best=N"),
        (
            "--model st-moe --routing top-k=9",
            "--routing top-k=9 does not suit st-moe: top-k must be between 1 and the 4",
        ),
        (
            "--model st-moe --routing drop-best=4",
            "--routing drop-best=4 does not suit st-moe: without its 4 best experts",
        ),
        ("--model resnet-at --routing drop-best", "does not suit resnet-at: this model has no MoE layers"),
        (
            "--model st-moe/expert[0] --routing drop-best",
            "does not suit st-moe/expert[0]: this model has no MoE layers",
        ),
    ],
)
def test_wrong_overrides_are_one_line(moebench: Terminal, words: str, message: str) -> None:
    assert message in moebench.refuses("evaluate", "--attack", "fgsm", "--n", 4, *words.split())


def test_numbers_of_a_rerouted_model_never_mix_with_its_own(moebench: Terminal) -> None:
    words = ("--view", "whole", "--no-trust", "--json")
    plain = moebench.evaluate("rt-er", "fgsm", 40, *words).json
    other = moebench.evaluate("rt-er", "fgsm", 40, *words, "--routing", "drop-best").json
    assert other["model"] == "rt-er[routing=drop-best]" and other["sa"] < plain["sa"]
    assert other["ra_worst"] == other["ra"] != plain["ra"]
    again = moebench.evaluate("rt-er", "fgsm", 40, *words).json
    assert again["ra_worst"] == plain["ra_worst"]
    with Store.open("results.db", write=False) as store:
        runs = {run.run_id: run for run in store.runs()}
        assert "--routing drop-best" in runs[other["run_id"]].command
        assert len({result.cell.fingerprint for result in store.results()}) == 2
        stored = {result.model.name: result.record for result in store.results()}
    before, after = stored["rt-er"].losses
    assert before is not None and after is not None and after > before
    said = moebench("show", plain["run_id"])
    assert f"loss {before:.3f} → {after:.3f}" in said.out and "predictions changed" in said.out


def test_show_prints_what_an_attack_does_to_every_layer(moebench: Terminal) -> None:
    run_id = moebench.evaluate("v-moe", "fgsm", 20, "--view", "whole", "--no-trust", "--json").json["run_id"]
    with Store.open("results.db", write=False) as store:
        (result,) = store.run(run_id).results
    record, said = result.record, moebench("show", run_id).out
    assert [layer.name for layer in record.routing] == ["blocks.1.mlp", "blocks.3.mlp"]
    assert f"fgsm on whole: predictions changed {record.changed_predictions:.1%}, loss " in said
    for layer in record.routing:
        assert 0 < layer.iou < 1 and 0 < layer.changed < 1 and layer.entropy_clean != layer.entropy_adv
        clean, attacked = (
            "/".join(f"{100 * share:.0f}" for share in load) for load in (layer.load_clean, layer.load_adv)
        )
        assert clean != attacked and len(layer.load_clean) == 4
        assert (
            f"  fgsm on whole, layer {layer.name}: routes changed {layer.changed:.1%}, IoU {layer.iou:.3f}, "
            f"entropy {layer.entropy_clean:.3f} → {layer.entropy_adv:.3f}, load {clean} → {attacked}\n"
        ) in said


# Losses before and after.


def test_losses_are_those_of_the_images(moebench: Terminal) -> None:
    import numpy as np
    from torch.nn import functional as F

    found = moebench.evaluate(MOE, "fgsm", 30, "--view", "whole", "--no-trust", "--json", "--save-adv", "adv.npz").json
    data = load_dataset("digits", n=30)
    model, y = load(MOE, data).module, torch.from_numpy(data.labels)
    x_adv = torch.from_numpy(np.load("adv.npz")["x_adv"])
    with torch.no_grad():
        before, after = (float(F.cross_entropy(model(x), y)) for x in (torch.from_numpy(data.images), x_adv))
    with Store.open("results.db", write=False) as store:
        (result,) = store.run(found["run_id"]).results
    assert result.record.losses == pytest.approx((before, after), rel=1e-4)


def test_known_gate_is_unchanged_by_the_general_layer() -> None:
    """Routing per image gives weights (B, E), exactly 0 and 1 for top-1."""
    routing = TwoExperts().eval().moe.own_routing(torch.tensor([[0.9, 0.0], [0.1, 0.0]]))
    assert routing.weights.tolist() == [[0.0, 1.0], [1.0, 0.0]] and routing.selected.shape == (2, 2)

"""Fixed-expert evaluation: attacks on the fixed path, judged on the fixed path, beside the gated model."""

from __future__ import annotations

import json

import pytest
import torch
from commands import DENSE, MOE, Terminal
from toys import digits, make_engine

from moebench.attacks import load_attack
from moebench.attacks._engine import Finished
from moebench.metrics import paired
from moebench.models import load_model
from moebench.models._moe import forced_forward, moe_layers, route
from moebench.parts import part_of
from moebench.schema import ThreatModel
from moebench.store import Store

N = 40

LAYERED = """
import torch
from moebench.models import MODELS

def layered():
    torch.manual_seed(0)
    return MODELS.get("block-moe-switch").make(10, (1, 8, 8), gate="gap-fc")
"""


@pytest.fixture
def moebench(moebench: Terminal) -> Terminal:
    (moebench.folder / "mine.py").write_text(LAYERED)
    return moebench


def attacked(model: torch.nn.Module, attack: str) -> torch.Tensor:
    """Which of the first digits an attack on a model leaves right, by the engine."""
    samples = digits(N)
    engine = make_engine(model, samples, ThreatModel("Linf", 0.2), batch_size=N)
    with torch.no_grad():
        right = model(samples.x).argmax(1) == samples.y

    def sink(done: Finished) -> None:
        right[done.index[done.broken]] = False

    (stage,) = load_attack(attack).stages
    engine.run_stage(stage, right.nonzero().squeeze(1), sink)
    return right


def test_rows_are_the_gate_and_every_expert_attacked_and_judged_on_its_own_path(moebench: Terminal) -> None:
    found = moebench("experts", "--model", MOE, "--attack", "fgsm", "--n", N, "--json").json
    model, samples = load_model(MOE), digits(N)
    assert (found["layer"], found["layers"], found["n"], found["eps"]) == ("moe", ["moe"], N, 0.2)
    assert [row["model"] for row in found["rows"]] == [MOE, *(f"{MOE}/expert[{i}]" for i in range(4))]
    with torch.no_grad():
        loads = route(model, samples.x)["moe"].weights.mean(0)
    gate_right, gate_stands = None, attacked(model.requires_grad_(False), "fgsm").numpy()
    for row in found["rows"]:
        number = row["expert"]
        alone = model if number is None else part_of(model, f"expert[{number}]", MOE)
        with torch.no_grad():
            right = (alone(samples.x).argmax(1) == samples.y).numpy()
        stands = attacked(alone, "fgsm").numpy()
        assert row["sa"]["value"] == pytest.approx(right.mean())
        assert row["ra"]["value"] == row["attacks"]["fgsm"]["value"] == pytest.approx(stands.mean())
        if number is None:
            gate_right = right
            assert (row["load"], row["sa_p"], row["ra_p"]) == (1.0, None, None)
        else:
            assert gate_right is not None
            assert row["load"] == pytest.approx(float(loads[number]))
            assert row["sa_p"] == paired(gate_right, right).p
            assert row["ra_p"] == paired(gate_stands, stands).p


def test_the_forced_view_of_the_whole_model_is_another_number(moebench: Terminal) -> None:
    """`--view expert[i]` makes examples on that path and judges them on the gated model."""
    view = moebench.evaluate(MOE, "fgsm", N, "--view", "expert[1]", "--no-trust", "--json").json["results"][0]
    model, samples = load_model(MOE).requires_grad_(False), digits(N)
    whole = attacked(model, "fgsm").float().mean()
    alone = moebench.evaluate(f"{MOE}/expert[1]", "fgsm", N, "--no-trust", "--json").json
    with torch.no_grad():
        clean = (forced_forward(model, samples.x, 1).argmax(1) == samples.y).float().mean()
    assert alone["sa"] == pytest.approx(float(clean))
    assert alone["ra"] == pytest.approx(float(attacked(part_of(model, "expert[1]", MOE), "fgsm").float().mean()))
    assert view["accuracy"] >= float(whole) and view["accuracy"] != alone["ra"]


def test_experts_of_a_layer_inside_a_network(moebench: Terminal) -> None:
    words = ("experts", "--model", "mine.py:layered", "--attack", "fgsm,pgd-2", "--n", N)
    found = moebench(*words, "--json").json
    assert found["layers"] == ["network.layer3.0", "network.layer3.1"] and found["layer"] == "network.layer3.1"
    assert [row["model"] for row in found["rows"][1:]] == [
        f"mine.py:layered/expert[network.layer3.1:{number}]" for number in range(4)
    ]
    assert sum(row["load"] for row in found["rows"][1:]) == pytest.approx(1)
    for row in found["rows"]:
        assert set(row["attacks"]) == {"fgsm", "pgd-2"}
        assert row["ra"]["value"] <= min(each["value"] for each in row["attacks"].values())
    with Store.open("results.db", write=False) as store:
        stored = {result.model.name: result for result in store.results()}
    assert set(stored) == {row["model"] for row in found["rows"]}
    part = stored["mine.py:layered/expert[network.layer3.1:2]"]
    # The first layer still routes, and its routing is measured.
    assert part.model.family == "part"
    assert [layer.name for layer in part.record.routing] == ["model.network.layer3.0"]
    again = moebench(*words, "--json").json
    assert again == {
        **found,
        "reused": 10,
        "rows": [{**row, "run_id": new["run_id"]} for row, new in zip(found["rows"], again["rows"], strict=True)],
    }
    other = moebench(*words, "--layer", "network.layer3.0", "--json").json
    assert other["layer"] == "network.layer3.0" and other["reused"] == 2


def test_experts_of_a_layer_that_routes_tokens(moebench: Terminal) -> None:
    found = moebench("experts", "--model", "v-moe", "--attack", "fgsm", "--n", 6, "--json").json
    model, samples = load_model("v-moe"), digits(6)
    assert moe_layers(model)[found["layer"]].per_token
    with torch.no_grad():
        weights = route(model, samples.x)[found["layer"]].weights
    assert weights.dim() == 3
    tokens = [token / sum(token) for image in weights.double().numpy() for token in image]
    expected = [float(sum(token[i] for token in tokens)) / len(tokens) for i in range(weights.shape[2])]
    assert [row["load"] for row in found["rows"][1:]] == pytest.approx(expected)
    assert sum(row["load"] for row in found["rows"][1:]) == pytest.approx(1)


def test_what_the_terminal_says(moebench: Terminal) -> None:
    said = moebench("experts", "--model", "mine.py:layered", "--attack", "pgd-20[steps=2]", "--n", N)
    assert said.code == 0, said.err
    assert "(pgd-20[steps=2])" in " ".join(said.out.split())
    assert "experts of network.layer3.1" in said.out and "other MoE layers, for --layer: network.layer3.0" in said.out
    assert "RA above the gate:" in said.out and "of 4 experts" in said.out
    assert all(f"expert {number}" in said.out for number in range(4))


def test_the_command_of_each_row_repeats_it(moebench: Terminal) -> None:
    moebench("experts", "--model", MOE, "--attack", "fgsm", "--n", N, "--eps", "0.1")
    with Store.open("results.db", write=False) as store:
        commands = {result.model.name: result.command for result in store.results()}
    assert commands[f"{MOE}/expert[3]"] == (
        f"moebench evaluate --model '{MOE}/expert[3]' --dataset digits --attack fgsm --view whole --eps 0.1 --n {N}"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", DENSE), "resnet-at has no MoE layer, so there is no expert to fix"),
        (("--model", MOE, "--layer", "mo"), "st-moe has no MoE layer 'mo'; it has moe"),
        (("--model", f"{MOE}/expert[1]"), "is a part already; give the whole model"),
        (("--model", "st-mo"), "unknown model 'st-mo'"),
        (("--model", MOE, "--attack", "pgd-O"), "unknown attack 'pgd-O'"),
        (("--model", MOE, "--attack", "region"), "needs a model with routing; st-moe/expert[0] has none"),
        (("--model", MOE, "--attack", " , "), "no attack given"),
        (("--model", MOE, "--attack", "fgsm,published:robust-experts"), "counts nowhere as robust accuracy"),
        (("--model", "dual-moe", "--layer", "moe"), "has no MoE layer 'moe'; it has standard.moe, robust.moe"),
        (("--model", MOE, "--n", "0"), "0"),
    ],
)
def test_wrong_commands_are_refused_in_one_line(moebench: Terminal, words: tuple[str, ...], message: str) -> None:
    assert message in moebench.refuses("experts", *words)


def test_json_is_one_line(moebench: Terminal) -> None:
    said = moebench("experts", "--model", MOE, "--attack", "fgsm", "--n", 10, "--json")
    assert said.out.count("\n") == 1 and set(json.loads(said.out)) >= {"layer", "rows", "suite", "reused"}
    assert len(moe_layers(load_model(MOE))) == 1

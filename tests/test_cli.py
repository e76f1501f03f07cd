from __future__ import annotations

import errno
import json
import shlex
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import DENSE, MOE, USER_MODELS, Terminal, shipped, write_npz

from moebench.cards import model_card
from moebench.commands._tables import HEADINGS, results_lines
from moebench.metrics import standing, wilson
from moebench.models import MODELS
from moebench.models._weights import SHIPPED
from moebench.schema import ResultRecord
from moebench.store import Store

KEYS = [
    "run_id", "model", "dataset", "n", "norm", "eps", "suite", "precision", "seconds",
    "sa", "ra", "ra_e", "ra_r", "ra_worst", "flags", "results",
]  # fmt: skip
RESULT_KEYS = ["attack", "view", "accuracy", "ci_low", "ci_high", "n", "seconds", "forwards", "backwards"]


@pytest.fixture
def moebench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    folder = tmp_path / "a folder, ünïcode"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MOEBENCH_DB", raising=False)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    return Terminal(folder, capsys)


# Refusals.


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("foo", "No such command 'foo' (see `moebench --help`)"),
        ("evaluate", "Missing option '--model' (see `moebench evaluate --help`)"),
        ("evaluate --model", "'--model' requires an argument"),
        ("evaluate --model resnet-at surplus", "unexpected extra argument (surplus)"),
        ("evaluate --model resnet-at --modle x", "No such option '--modle'"),
        ("evaluate --model rter", "unknown model 'rter'; did you mean rt-er"),
        ("evaluate --model zzzzz", "unknown model 'zzzzz'; `moebench list models` shows all"),
        ("evaluate --model resnet-at --attack pgd10", "unknown attack 'pgd10'; did you mean pgd-10"),
        ("evaluate --model resnet-at --attack fgsm,auto", "unknown attack 'auto'; did you mean autoattack"),
        ("evaluate --model resnet-at --attack ,", "no attack given"),
        ("evaluate --model resnet-at --dataset digit", "unknown data set 'digit'; did you mean digits"),
        ("evaluate --model resnet-at --view wohle", "unknown view 'wohle'; did you mean whole"),
        ("evaluate --model resnet-at --view router", "'router' needs a model with routing; this one is dense"),
        ("evaluate --model resnet-at --attack smooth-pgd-50", "needs a model with routing; resnet-at has none"),
        ("evaluate --model st-moe --view expert[4]", "'expert[4]' does not exist on this model; it has whole, router"),
        ("evaluate --model st-moe --view robust", "'robust' does not exist on this model"),
        ("evaluate --model st-moe --attack smooth-pgd-50 --view router", "runs on view smooth, not on 'router'"),
        ("evaluate --model st-moe --attack fgsm --view experts --engine reference", "use --engine native"),
        ("evaluate --model resnet-at --eps -0.1", "eps must be a positive number such as 8/255 or 0.03, got '-0.1'"),
        ("evaluate --model resnet-at --eps 0", "got '0'"),
        ("evaluate --model resnet-at --eps nan", "got 'nan'"),
        ("evaluate --model resnet-at --eps inf", "got 'inf'"),
        ("evaluate --model resnet-at --eps 8/0", "got '8/0'"),
        ("evaluate --model resnet-at --eps eight", "got 'eight'"),
        ("evaluate --model resnet-at --eps 8", "at most 1 for Linf on [0, 1] images, got 8; write 8/255"),
        ("evaluate --model resnet-at --norm L1", "'L1' is not one of 'Linf', 'L2'"),
        ("evaluate --model resnet-at --n 0", "n must be at least 1, got 0"),
        ("evaluate --model resnet-at --n 501", "n must be at most 500, the size of data set digits, got 501"),
        ("evaluate --model resnet-at --n ten", "'ten' is not a valid integer"),
        ("evaluate --model resnet-at --batch-size 0", "batch size must be at least 1, got 0"),
        ("evaluate --model resnet-at --seed -1", "the seed must be between 0 and 4294967295, got -1"),
        ("evaluate --model resnet-at --seed 4294967296", "the seed must be between"),
        ("evaluate --model resnet-at --device abacus", "device 'abacus' cannot be used here"),
        ("evaluate --model resnet-at --set top_k", "--set takes KEY=VALUE, got 'top_k'"),
        ("evaluate --model resnet-at --set top_k=2", "model 'resnet-at' has no setting 'top_k'; it has none"),
        (
            "evaluate --model st-moe --set topk=2",
            "model 'st-moe' has no setting 'topk'; it has expert, experts, router, top_k",
        ),
        ("evaluate --model st-moe --set top_k=9", "top_k must be between 1 and the 4 experts, got 9"),
        ("evaluate --model resnet-at --weights none.safetensors", "cannot read the weights none.safetensors"),
        ("evaluate --model none.py:make", "no file none.py"),
        ("evaluate --model none.py", "(a file is given as none.py:FACTORY)"),
        ("evaluate --model no_such_module:make", "cannot import no_such_module"),
        ("evaluate --model resnet-at --dataset npz:none.npz", "none.npz: there is no such file"),
        ("evaluate --model resnet-at --db none/r.db", "there is no folder 'none' for the database 'r.db'"),
        ("evaluate --model resnet-at --db .", "is a folder; name a file"),
        ("evaluate --model resnet-at --db mysql://x", "unknown kind of database 'mysql'"),
        ("evaluate --model resnet-at --save-adv none/adv.npz", "cannot write none/adv.npz: No such file or directory"),
        ("evaluate --model resnet-at --save-adv .", "--save-adv takes a file"),
        ("train --model resnett", "unknown model 'resnett'; did you mean resnet-"),
        ("train --model resnet-at --epochs -1", "-1 is not in the range"),
        ("show", "Missing argument 'MODEL|PROTOCOL|RUN'"),
        ("show rt-err", "neither a model nor a run: unknown model 'rt-err'; did you mean rt-er"),
        ("list", "models, attacks, datasets, suites"),
        ("list papers", "'papers' is not one of"),
        ("report", "there is no database 'results.db'"),
        ("report --db none.db", "there is no database 'none.db'"),
    ],
)
def test_a_wrong_command_is_answered_in_one_line_and_leaves_nothing(
    moebench: Terminal, words: str, expected: str
) -> None:
    assert expected in moebench.refuses(*words.split(" "))


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="no devices")
def test_adversarial_images_do_not_replace_a_device(moebench: Terminal) -> None:
    line = moebench.refuses("evaluate", "--model", DENSE, "--attack", "fgsm", "--save-adv", "/dev/null")
    assert "/dev/null is none" in line and Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("nan", "returns NaN or infinite logits"),
        ("probabilities", "returns probabilities; attacks need logits"),
        ("vector", "torch.float32 of shape 8 for 8 images; expected float logits 8×classes"),
        ("image", "shape 8×10×1 for 8 images"),
        ("one_row", "shape 1×10 for 8 images"),
        ("integers", "torch.int64"),
        ("nothing", "returns NoneType; expected a tensor"),
        ("pair", "returns tuple; expected a tensor"),
        ("few", "the model has 3 classes and the data set 10"),
        ("failing", "ValueError: one line"),
        ("number", "returned int; a factory must return a torch.nn.Module"),
        ("broken", "RuntimeError: no weights (--debug shows where)"),
        ("needy", "missing 1 required positional argument: 'weights'"),
        ("god", "has no callable 'god'; it has "),
        ("", "lacks a part"),
    ],
)
def test_a_model_that_cannot_be_measured_is_refused(moebench: Terminal, factory: str, expected: str) -> None:
    (moebench.folder / "mine.py").write_text(USER_MODELS)
    line = moebench.refuses("evaluate", "--model", f"mine.py:{factory}", "--attack", "fgsm", "--n", 8)
    assert expected in line


def test_code_that_leaves_the_program_does_not_pass_for_success(moebench: Terminal) -> None:
    (moebench.folder / "mine.py").write_text(USER_MODELS)
    (moebench.folder / "script.py").write_text("import sys\nsys.exit(0)\n")
    words = ("evaluate", "--attack", "fgsm", "--n", 8, "--model")
    assert "importing script.py failed: SystemExit: 0" in moebench.refuses(*words, "script.py:make")
    assert "called sys.exit(7)" in moebench.refuses(*words, "mine.py:exiting", code=1)


def test_autoattack_needs_four_classes(moebench: Terminal) -> None:
    (moebench.folder / "mine.py").write_text(USER_MODELS)
    write_npz(moebench.folder / "three.npz", classes=3)
    words = ("evaluate", "--model", "mine.py:few", "--dataset", "npz:three.npz", "--attack")
    assert "'autoattack' needs at least 4 classes; this model has 3" in moebench.refuses(*words, "autoattack")
    assert moebench(*words, "fgsm", "--json").json["n"] == 12


def test_weights_must_be_what_their_card_says(moebench: Terminal) -> None:
    for suffix in (".safetensors", ".json"):
        shutil.copy(SHIPPED / "digits" / f"{DENSE}{suffix}", moebench.folder)
    path = moebench.folder / f"{DENSE}.safetensors"
    words = ("evaluate", "--attack", "fgsm", "--n", 8, "--weights", path.name, "--model")
    assert moebench(*words, DENSE, "--json").json["model"] == DENSE
    assert "holds weights of 'resnet-at', not of 'resnet-st'" in moebench.refuses(*words, "resnet-st")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "do not match their card: sha256" in moebench.refuses(*words, DENSE)
    path.with_suffix(".json").write_text("{")
    assert "cannot read the card" in moebench.refuses(*words, DENSE)
    path.with_suffix(".json").unlink()
    assert "no card resnet-at.json beside the weights" in moebench.refuses(*words, DENSE)


def test_weights_for_other_images_are_refused(moebench: Terminal) -> None:
    write_npz(moebench.folder / "colour.npz", shape=(32, 32, 3))
    words = ("evaluate", "--model", DENSE, "--dataset", "npz:colour.npz", "--attack", "fgsm")
    assert "no weights of resnet-at are shipped for data set npz:colour.npz" in moebench.refuses(*words)
    weights = SHIPPED / "digits" / f"{DENSE}.safetensors"
    assert "are for images of 1×8×8, and npz:colour.npz has 3×32×32" in moebench.refuses(*words, "--weights", weights)


@pytest.mark.parametrize("command", ["evaluate", "report", "show"])
def test_a_file_that_is_no_database_of_ours_is_left_alone(moebench: Terminal, command: str) -> None:
    words = {"evaluate": ("--model", DENSE, "--attack", "fgsm", "--n", 8), "report": (), "show": ("abc",)}[command]
    (moebench.folder / "text.db").write_text("these are no results\n" * 200)
    with sqlite3.connect(moebench.folder / "other.db") as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    for name in ("text.db", "other.db"):
        moebench.refuses(command, *words, "--db", name)
    moebench.refuses(command, *words, "--db", "text.db/r.db")


def test_a_report_needs_a_folder(moebench: Terminal) -> None:
    assert moebench.evaluate(DENSE, "fgsm", 8).code == 0
    (moebench.folder / "taken").write_text("")
    assert "cannot write the report to 'taken'" in moebench.refuses("report", "--out", "taken")


@pytest.mark.parametrize("place", ["before the command", "after it"])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(moebench: Terminal, place: str) -> None:
    words = ["evaluate", "--model", DENSE, "--n", "0"]
    said = moebench("--debug", *words) if place == "before the command" else moebench(*words, "--debug")
    assert said.code == 2 and "Traceback (most recent call last)" in said.err
    assert said.err.splitlines()[-1].startswith("moebench: n must be at least 1")


def test_a_full_disk_fails_the_run_but_keeps_its_results(moebench: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", no_space)
    said = moebench.evaluate(DENSE, "fgsm", 8, "--save-adv", "adv.npz")
    assert said.code == 1 and said.out == ""
    assert said.err == "moebench: cannot write adv.npz: No space left on device; the results are stored\n"
    assert list(moebench.files()) == ["results.db"]
    with Store.open("results.db", write=False) as store:
        (run,) = store.runs()
        assert (run.status, len(store.results())) == ("failed", 1)
        assert run.error is not None and "No space left on device" in run.error


# What is printed.


@pytest.mark.parametrize("model", shipped(DENSE, MOE, "rt-er", "at-moe", "dual-moe"))
def test_json_is_one_object_that_agrees_with_the_store(moebench: Terminal, model: str) -> None:
    said = moebench.evaluate(model, "fgsm,pgd-10", 30, "--json")
    found = said.json
    assert said.err == "" and said.out.count("\n") == 1
    assert list(found) == KEYS and [list(item) for item in found["results"]] == [RESULT_KEYS] * len(found["results"])
    assert (found["model"], found["dataset"], found["n"]) == (model, "digits", 30)
    assert (found["norm"], found["eps"], found["suite"]) == ("Linf", 0.2, "v1")
    assert found["seconds"] > 0 and all(set(flag) == {"code", "evidence"} for flag in found["flags"])
    views = ["whole"] if model == DENSE else ["whole", "router", "experts"]
    assert {item["view"] for item in found["results"]} >= set(views)
    with Store.open("results.db", write=False) as store:
        assert store.check() == [] and store.run(found["run_id"]).status == "done"
        stored = {(one.cell.attack, one.cell.view): store.outcomes(one.result_id) for one in store.results()}
    left: dict[str, np.typing.NDArray[np.bool_]] = {}
    for item in found["results"]:
        outcomes = stored.pop((item["attack"], item["view"]))
        right = standing(outcomes)
        assert item["accuracy"] == right.mean() and item["n"] == right.size == 30
        assert (item["ci_low"], item["ci_high"]) == wilson(int(right.sum()), 30)
        assert (item["forwards"], item["backwards"]) == (outcomes.forwards.sum(), outcomes.backwards.sum())
        left[item["view"]] = left.get(item["view"], np.ones(30, bool)) & right
    assert stored == {}
    assert found["ra"] == left["whole"].mean()
    assert found["ra_e"] == (left["experts"].mean() if "experts" in left else None)
    assert found["ra_r"] == (left["router"].mean() if "router" in left else None)
    assert found["ra_worst"] == np.logical_and.reduce(list(left.values())).mean()
    assert 0 <= found["ra_worst"] <= found["ra"] <= found["sa"] <= 1


def test_what_a_model_prints_does_not_reach_the_results(moebench: Terminal) -> None:
    (moebench.folder / "mine.py").write_text(USER_MODELS)
    said = moebench.evaluate("mine.py:talkative", "fgsm", 8, "--json")
    assert said.json["model"] == "mine.py:talkative" and "what the model prints" in said.err
    dry = moebench.evaluate("mine.py:talkative", "fgsm", 8, "--json", "--dry-run")
    assert list(dry.json) == ["cells", "total"]


def test_the_printed_numbers_are_those_of_the_json(moebench: Terminal) -> None:
    found = moebench.evaluate(MOE, "fgsm,smooth-pgd-50", 30, "--json").json
    said = moebench.evaluate(MOE, "fgsm,smooth-pgd-50", 30)
    lines = said.out.splitlines()
    assert lines[0] == "st-moe on digits, n = 30, Linf 0.2" and "\x1b" not in said.out and "…" not in said.out
    for label, key in (("SA", "sa"), ("RA", "ra"), ("RA-E", "ra_e"), ("RA-R", "ra_r"), ("RA-worst", "ra_worst")):
        (line,) = (line for line in lines if line.split()[:1] == [label])
        assert line.split()[1] == f"{100 * found[key]:.2f}", line
    for item in found["results"]:
        (line,) = (line for line in lines if line.split()[:2] == [item["attack"], item["view"]])
        assert line.split()[2] == f"{100 * item['accuracy']:.2f}"
        assert f"{100 * item['ci_low']:.2f}–{100 * item['ci_high']:.2f}" in line
    assert "not applicable or not attacked here: RA-SMoE, RA-RMoE" in said.out
    assert "All results were in the database already" in said.out


def test_what_a_dense_model_has_not_is_said_to_be_not_applicable(moebench: Terminal) -> None:
    said = moebench.evaluate(DENSE, "fgsm", 20)
    assert "not applicable or not attacked here: RA-E, RA-R, RA-SMoE, RA-RMoE\n" in said.out
    assert "rerouted" in said.out and not any(line.split()[:1] == ["RA-E"] for line in said.out.splitlines())


def test_a_narrow_terminal_loses_columns_but_never_part_of_a_number() -> None:
    views = ("whole", "straight-through", "expert[0]")
    records = [ResultRecord("smooth-pgd-50", view, 0.5, 0.25, 0.75, 8, 1234.5, 12_345, 99_999, 1, 0) for view in views]
    for width in range(20, 130):
        heading, *lines = (line.replace("\\[", "[") for line in results_lines(records, width))
        shown = [name for name in HEADINGS if name in heading]
        assert shown[:4] == list(HEADINGS[:4])
        for view, line in zip(views, lines, strict=True):
            assert f"smooth-pgd-50  {view}" in line and "50.00    25.00–75.00" in line
            assert ("1234.5" in line) == ("seconds" in shown) and ("99k" in line) == ("backwards" in shown)
        assert len(lines[0]) <= max(width, 54) and (width < 99 or shown == list(HEADINGS))


# Reuse.


def rows(path: str = "results.db") -> int:
    with Store.open(path, write=False) as store:
        return len(store.results(newest_only=False))


def numbers(found: dict[str, Any]) -> dict[str, Any]:
    """What must not change when a command is repeated."""
    return {key: value for key, value in found.items() if key not in ("run_id", "seconds")}


def test_the_same_command_again_computes_nothing(moebench: Terminal) -> None:
    first = moebench.evaluate(MOE, "fgsm,pgd-10", 20, "--json").json
    again = moebench.evaluate(MOE, "fgsm,pgd-10", 20, "--json").json
    assert numbers(first) == numbers(again) and first["run_id"] != again["run_id"] and rows() == 6
    with Store.open("results.db", write=False) as store:
        assert [run.reused for run in store.runs()] == [0, 6]


def test_fresh_computes_anew_with_the_same_verdicts(moebench: Terminal) -> None:
    moebench.evaluate(MOE, "pgd-10", 20)
    said = moebench.evaluate(MOE, "pgd-10", 20, "--fresh")
    assert "in the database already" not in said.out and rows() == 6
    with Store.open("results.db", write=False) as store:
        by_cell: dict[str, list[Any]] = {}
        for one in store.results(newest_only=False):
            by_cell.setdefault(one.cell.fingerprint, []).append(store.outcomes(one.result_id))
    for first, second in by_cell.values():
        for name in ("broken", "adv_pred", "distance", "forwards", "backwards"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_commands_share_the_cells_that_they_have_in_common(moebench: Terminal) -> None:
    moebench.evaluate(MOE, "pgd-10", 20, "--view", "whole")
    said = moebench.evaluate(MOE, "fgsm,pgd-10", 20, "--view", "whole,router")
    assert "1 of 4 results were in the database already" in said.out
    assert rows() == 4
    moebench.evaluate(MOE, "pgd-10", 20, "--view", "whole", "--batch-size", 7)
    assert rows() == 4, "the batch size changes no verdict, so it is no reason to compute again"


@pytest.mark.parametrize(
    "change",
    ["--seed 1", "--eps 0.1", "--n 21", "--norm L2", "--engine reference"],
)
def test_another_question_is_computed(moebench: Terminal, change: str) -> None:
    moebench.evaluate(DENSE, "pgd-10", 20)
    said = moebench.evaluate(DENSE, "pgd-10", 20, *change.split())
    assert said.code == 0 and "in the database already" not in said.out and rows() == 2


def test_the_worst_case_is_over_all_that_is_stored_for_the_same_weights(moebench: Terminal) -> None:
    weak = moebench.evaluate(DENSE, "fgsm", 40, "--json").json
    strong = moebench.evaluate(DENSE, "pgd-20", 40, "--json").json
    again = moebench.evaluate(DENSE, "fgsm", 40, "--json").json
    other = moebench.evaluate(DENSE, "fgsm", 40, "--eps", "0.01", "--json").json
    assert weak["ra_worst"] == weak["ra"] == again["ra"] > strong["ra"] >= again["ra_worst"]
    assert other["ra_worst"] == other["ra"] > weak["ra"]


# Dry runs, listings, cards.


def test_a_dry_run_writes_nothing_and_its_bound_holds(moebench: Terminal) -> None:
    said = moebench.evaluate(MOE, "fgsm,pgd-10", 20, "--dry-run", "--json")
    planned = {(cell["attack"], cell["view"]): cell for cell in said.json["cells"]}
    assert len(planned) == 6 and moebench.files() == {} and not any(cell["stored"] for cell in planned.values())
    for item in moebench.evaluate(MOE, "fgsm,pgd-10", 20, "--json").json["results"]:
        bound = planned[item["attack"], item["view"]]
        assert bound["n"] == 20 and item["backwards"] <= bound["backwards"]
        assert item["forwards"] - 20 <= bound["forwards"], "beside the clean pass"
    again = moebench.evaluate(MOE, "fgsm,pgd-10,pgd-20", 20, "--dry-run")
    assert again.out.count("stored already") == 6 and again.out.count("at most") == 4, "three cells and the total"
    assert "pgd-20 on view whole, 20 samples: at most " in again.out


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("models", ["rt-er", "dual-moe", "resnet-at"]),
        ("attacks", ["autoattack", "pgd-50", "smooth-pgd-50", "pgd-N", "smooth-pgd-N", "suite v1"]),
        ("datasets", ["digits", "npz:FILE", "folder:DIR", "cifar10"]),
        ("suites", ["v1 (current): fgsm, pgd-50, smooth-pgd-50, autoattack"]),
    ],
)
def test_lists(moebench: Terminal, what: str, expected: list[str]) -> None:
    said = moebench("list", what)
    assert said.code == 0 and said.err == ""
    starts = [line.split("  ")[0].split(",")[0] for line in said.out.splitlines()]
    for text in expected:
        assert any(start == text.split(",")[0] for start in starts) or text in said.out
    assert all(line == line.rstrip() and "None" not in line for line in said.out.splitlines())


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "-h",
        "evaluate --help",
        "train -h",
        "show -h",
        "list -h",
        "report -h",
        "transfer -h",
        "db -h",
        "runs -h",
        "verify -h",
    ],
)
def test_help(moebench: Terminal, words: str) -> None:
    said = moebench(*words.split())
    assert said.code == 0 and said.out.startswith("Usage: moebench") and said.err == ""
    assert words not in ("-h", "--help") or "..." not in said.out.split("Commands:")[1]


def test_the_list_says_which_models_have_weights(moebench: Terminal) -> None:
    lines = {line.split()[0]: line for line in moebench("list", "models").out.splitlines()}
    trained = {path.stem for path in SHIPPED.glob("*/*.safetensors")}
    assert trained and trained <= set(lines)
    for name, line in lines.items():
        assert line.endswith("(no weights shipped: moebench train)") == (name not in trained), line


def test_the_card_of_a_model(moebench: Terminal) -> None:
    said = moebench("show", "rt-er")
    assert said.code == 0 and moebench.files() == {}
    for text in (
        "arXiv 2502.06832",
        "@inproceedings{zhang2025optimizing,",
        "epochs=200",
        "4 experts of",
        "moebench train --model rt-er",
        "Claims (published numbers, not ours)",
        "CIFAR-10: RA",
    ):
        assert text in said.out, text
    assert "sha256" in moebench("show", DENSE).out


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("rt-er", ["Differs from the paper: ", "Differs from the published code: "]),
        ("jtd-moe-official", ["its KL on all experts", "KL( p_i(x) || p_i(x_adv^i) )"]),
        ("adv-moe", ["Differs from the published code: ", "CE(g(x), y mod E)"]),
        ("soe", ["Differs from the published code: ", "R_i(x) = A_i(x) max_c p_i,c(x)"]),
        ("dwf", ["No code is published"]),
    ],
)
def test_the_card_says_what_differs_from_the_paper(name: str, texts: list[str]) -> None:
    said = model_card(name)
    for text in texts:
        assert text in said, text


@pytest.mark.parametrize("name", MODELS.names())
def test_every_card_has_paper_bibtex_recipe_and_claims(name: str) -> None:
    said, entry = model_card(name), MODELS.get(name)
    assert entry.paper is not None and entry.recipe is not None
    assert entry.routing is None or "Differs from the p" in said or "No code is published" in said
    for line in entry.paper.bibtex.splitlines():
        assert line.strip() in said
    for text in (entry.paper.title, f"Recipe ({entry.training})", f"epochs={entry.recipe.epochs}", "Claims (published"):
        assert text in said
    assert said.count(f"train --model {name} --dataset digits") == 1


def test_a_run_is_shown_by_the_start_of_its_id(moebench: Terminal) -> None:
    found = moebench.evaluate(MOE, "fgsm", 20, "--json").json
    run_id = found["run_id"]
    said = moebench("show", run_id[:6])
    assert said.code == 0 and f"run {run_id}  done" in said.out
    assert "command     moebench evaluate --model st-moe --dataset digits --attack fgsm --n 20\n" in said.out
    assert "layer moe: routes changed" in said.out
    assert f"{100 * found['ra']:.2f}" in said.out
    assert f"it has {run_id}" in moebench.refuses("show", "nonsense")


def test_the_command_that_a_run_shows_gives_its_numbers(moebench: Terminal) -> None:
    (moebench.folder / "my models.py").write_text(USER_MODELS)
    first = moebench.evaluate("my models.py:many", "pgd-10", 12, "--eps", "8/255", "--seed", 3, "--json").json
    with Store.open("results.db", write=False) as store:
        command = store.run(first["run_id"]).command
    program, *words = shlex.split(command)
    again = moebench(*words, "--json", "--db", "other.db")
    assert program == "moebench" and numbers(again.json) | {"results": 0} == numbers(first) | {"results": 0}
    assert [one["accuracy"] for one in again.json["results"]] == [one["accuracy"] for one in first["results"]]


# Where the database is.


def test_three_ways_to_name_the_database(moebench: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    assert moebench.evaluate(DENSE, "fgsm", 8, "--db", "sqlite:///one.db").code == 0
    assert moebench.evaluate(DENSE, "fgsm", 8, "--db", "zwei drei.db").code == 0
    monkeypatch.setenv("MOEBENCH_DB", str(moebench.folder / "four.db"))
    assert moebench.evaluate(DENSE, "fgsm", 8).code == 0
    assert sorted(moebench.files()) == ["four.db", "one.db", "zwei drei.db"]
    assert rows("one.db") == rows("zwei drei.db") == rows("four.db") == 1


# The report.


def test_the_report_of_a_real_store(moebench: Terminal) -> None:
    found = {model: moebench.evaluate(model, "fgsm,pgd-10", 25, "--json").json for model in (DENSE, MOE)}
    said = moebench("report", "--out", "out put")
    assert said.code == 0 and said.err == "" and "open out put/index.html" in said.out
    first = moebench.files()
    index = first["out put/index.html"].decode()
    for model, numbers_of in found.items():
        assert model in index and f"out put/models/{model}.html" in first
        assert f"{100 * numbers_of['ra_worst']:.1f}" in index
    lines = first["out put/data/results.jsonl"].decode().splitlines()
    assert len(lines) == 8 and all(json.loads(line) for line in lines)
    assert 'src="http' not in index and 'href="http' not in index.replace("https://arxiv.org", "")
    assert moebench("report", "--out", "out put").code == 0
    assert moebench.files() == first

"""What a dry run says an evaluation costs, against what it then takes; the modelled cost of large ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from commands import DENSE, MOE, Terminal

from moebench import scale
from moebench.bill import Bill, together
from moebench.flops import count_flops
from moebench.models.v_moe import v_moe


def total(result: dict[str, Any]) -> int:
    return int(result["forwards"] + result["backwards"])


@pytest.mark.parametrize(
    ("model", "attack", "n", "words"),
    [
        (DENSE, "apgd-ce,apgd-t[steps=10],fab-t[steps=10],square[queries=300]", 24, ()),
        ("resnet-st", "autoattack", 40, ()),
        (DENSE, "pgd-20", 24, ("--norm", "L2", "--precision", "bfloat16")),
        (MOE, "pgd-20,smooth-pgd-50", 24, ()),
    ],
)
def test_the_expected_passes_are_within_half_of_the_real_ones(
    moebench: Terminal, model: str, attack: str, n: int, words: tuple[str, ...]
) -> None:
    """Passes, which are the same on every machine; seconds are compared by `make bench`."""
    planned = moebench.evaluate(model, attack, n, "--dry-run", "--json", "--no-trust", *words).json
    assert moebench.files() == {}
    done = moebench.evaluate(model, attack, n, "--json", "--no-trust", *words).json
    for cell, result in zip(planned["cells"], done["results"], strict=True):
        cost = cell["cost"]
        assert total(cost) <= cell["forwards"] + cell["backwards"]
        assert 0 < cost["seconds"] <= cost["seconds_at_most"]
        assert 2 / 3 <= total(cost) / total(result) <= 3 / 2, (cell, result)
    bill = planned["total"]
    assert bill["seconds"] == pytest.approx(sum(cell["cost"]["seconds"] for cell in planned["cells"]))
    assert bill["seconds"] < bill["seconds_at_most"] and bill["price"] is None and bill["calibration_seconds"] > 0


def test_results_of_the_same_weights_tell_more(moebench: Terminal) -> None:
    words = ("apgd-ce[steps=30]", 40, "--view", "whole", "--no-trust")
    first = moebench.evaluate(DENSE, *words, "--dry-run", "--json").json["cells"][0]["cost"]
    assert first["basis"] == "the first steps"
    done = moebench.evaluate(DENSE, *words, "--json").json["results"][0]
    again = moebench.evaluate(DENSE, *words, "--seed", 1, "--dry-run", "--json").json["cells"][0]
    assert again["cost"]["basis"] == "1 stored result of the same weights" and not again["stored"]
    assert total(again["cost"]) == pytest.approx(total(done) - 40, rel=0.01), "without the clean pass of each sample"
    stored = moebench.evaluate(DENSE, *words, "--dry-run", "--json").json
    assert (stored["cells"][0]["cost"], stored["total"]["seconds"]) == (None, 0)


def test_what_cannot_be_tried_costs_its_bound(moebench: Terminal) -> None:
    words = (DENSE, "published:rt-er,torchattacks:FGSM", 12, "--no-trust", "--dry-run", "--json")
    for cell in moebench.evaluate(*words).json["cells"]:
        assert total(cell["cost"]) == total(cell) and cell["cost"]["seconds"] == cell["cost"]["seconds_at_most"] > 0
        assert cell["cost"]["basis"].startswith("the bound")


def test_hours_and_prices_in_words(moebench: Terminal) -> None:
    words = ("--eps", "0.1,0.2", "--view", "whole", "--no-trust", "--dry-run", "--price", "2.5")
    lines = moebench.evaluate(DENSE, "fgsm", 10, *words).out.splitlines()
    assert len(lines) == 5 and lines[0].startswith("eps 0.1: fgsm on view whole, 10 samples: at most 30 forward and 10")
    assert lines[2].startswith("total: about 0 s (") and lines[2].endswith(" core-hours)")
    assert lines[3].startswith("price at 2.5 per hour: about ") and lines[3].count("per 1,000 images") == 2
    assert lines[4].startswith("tried on this CPU, 1 thread for ")


def test_a_suite_has_a_bill_per_model(moebench: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    from moebench.schema import SUITES

    monkeypatch.setitem(SUITES, "v1", ("fgsm", "pgd-3"))  # type: ignore[arg-type]
    words = ("sweep", "--models", f"{DENSE},{MOE}", "--n", 10, "--dry-run", "--price", 1)
    plans = moebench(*words, "--json").json["models"]
    assert [plan["total"]["price_per_hour"] for plan in plans] == [1, 1]
    assert all(cell["cost"]["seconds"] > 0 for plan in plans for cell in plan["cells"])
    said = moebench(*words)
    assert said.out.splitlines()[0].split()[-3:] == ["about", "at", "most"] and "total: about" in said.out
    assert moebench.files() == {}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--price", 2), "--price is for the estimate of --dry-run; give both or neither"),
        (("--price", 0, "--dry-run"), "--price takes what an hour costs, a positive number such as 2.5, got 0.0"),
        (("--price", "nan", "--dry-run"), "a positive number such as 2.5, got nan"),
        (("--price", "much", "--dry-run"), "'much' is not a valid float"),
        (("--dry-run", "--db", "text.db"), "'text.db' is damaged or no SQLite database"),
        (("--dry-run", "--db", "mysql://me:secret@host/x"), "unknown kind of database 'mysql'"),
        (("--dry-run", "--db", "no/folder/r.db"), "there is no folder 'no/folder' for the database"),
    ],
)
def test_wrong_input(moebench: Terminal, words: tuple[object, ...], expected: str) -> None:
    (moebench.folder / "text.db").write_text("no database at all\n" * 60)
    for command in (("evaluate", "--model", DENSE, "--n", 4), ("sweep", "--models", DENSE, "--n", 4)):
        said = moebench.refuses(*command, *words)
        assert expected in said and "secret" not in said


def test_a_bill() -> None:
    on_cpu = Bill(3600, 7200, "cpu", 4, 500, 1.0, 3.0)
    assert (on_cpu.hours(3600), on_cpu.unit, on_cpu.price_per_1000(3600)) == (4, "core-hours", 6)
    on_gpu = Bill(1800, 1800, "cuda", 4, 500, 1.0)
    assert (on_gpu.hours(1800), on_gpu.unit, on_gpu.price(1800)) == (0.5, "GPU-hours", None)
    both = together([on_cpu, on_cpu])
    assert (both.seconds, both.images, both.price(both.seconds), both.price_per_1000(both.seconds)) == (
        7200,
        1000,
        6,
        6,
    )


# The model of large evaluations.


def test_the_flops_of_a_v_moe_are_those_of_the_real_one() -> None:
    """Where the real one can be counted: the stand-in for its layers runs as many experts on as many tokens."""
    torch.manual_seed(0)
    real = v_moe(10, (1, 8, 8)).eval()
    counted = count_flops(real, (1, 8, 8))
    scale.replace_layers(real)
    found = scale.measured_flops(real.requires_grad_(False), torch.zeros(1, 1, 8, 8, requires_grad=True))
    assert counted is not None and found.forward == pytest.approx(counted, rel=0.02)
    assert found.forward <= found.backward < 1.3 * found.forward, "no gradients of weights"


def test_the_table_of_docs(moebench: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    moebench.evaluate(DENSE, "fgsm", 4)
    words = ["--size", "S/32", "--images", "1000", "--gpus", "1,4", "--peak", "10", "--price", "2"]
    words += ["--db", "results.db"]
    capsys.readouterr()
    assert scale.main(words) == 0
    out = capsys.readouterr().out
    assert "Modelled, not measured" in out and "50% of 10 TFLOP/s (given)" in out and "of 0 stored results" in out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    every = next(row for row in rows if row[0] == "all")
    one, four = (next(row for row in rows if row[0] == count) for count in ("1", "4"))
    hours = float(every[-2].replace(",", ""))
    assert hours == pytest.approx(float(one[1].replace(",", "")), abs=0.06)
    assert float(one[1].replace(",", "")) == pytest.approx(4 * float(four[1].replace(",", "")), abs=0.03)
    assert float(one[3].replace(",", "")) == pytest.approx(2 * hours, abs=0.6) and one[3] == four[3]
    # Without stored results nothing is known but the bound.
    assert every[2] == every[3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "1,many"], "--gpus takes numbers"),
        (["--utilisation", "2"], "a share of the peak"),
        (["--images", "0"], "--images must be positive"),
        (["--size", "X/16"], "size must be auto or NAME/PATCH"),
        (["--side", "225"], "cannot be cut into patches"),
        (["--db", "none.db"], "there is no database 'none.db'"),
    ],
)
def test_wrong_words_of_the_model(
    moebench: Terminal, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    moebench.evaluate(DENSE, "fgsm", 4)
    capsys.readouterr()
    assert scale.main(["--db", "results.db", *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err

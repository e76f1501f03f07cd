"""Names of attacks with settings: what is read, what is refused, and that none of it needs torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.attack_names import AttackName, base_name, options_of, parse_attack
from moebench.attacks import list_attacks, list_protocols, load_attack
from moebench.commands._options import split_names
from moebench.errors import UsageError


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("pgd-50", "pgd-50", {}),
        ("published:rt-er", "published:rt-er", {}),
        ("published:rt-er[fp16=on]", "published:rt-er", {}),
        (
            "published:rt-er[start=random, fp16=off]",
            "published:rt-er[fp16=off,start=random]",
            {"fp16": False, "start": "random"},
        ),
        ("published:v-moe[step_fraction=1/4]", "published:v-moe[step_fraction=0.25]", {"step_fraction": 0.25}),
        ("published:v-moe[step_fraction=1/40]", "published:v-moe", {}),
        ("pgd-10[steps=10]", "pgd-10", {}),
        ("pgd-10[steps=50]", "pgd-10[steps=50]", {"steps": 50}),
        ("pgd-30[step_fraction=.1]", "pgd-30[step_fraction=0.1]", {"step_fraction": 0.1}),
        ("torchattacks:MIFGSM[decay=0.5]", "torchattacks:MIFGSM[decay=0.5]", {"decay": 0.5}),
    ],
)
def test_what_is_read(text: str, name: str, values: dict[str, object]) -> None:
    asked = parse_attack(text)
    assert (str(asked), dict(asked.settings)) == (name, values)
    assert parse_attack(str(asked)) == asked
    assert load_attack(text).name == name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pgd-50[", "settings of an attack are written NAME"),
        ("pgd-50[]", "settings of an attack are written NAME"),
        ("pgd-50[steps=3", "settings of an attack are written NAME"),
        ("pgd-50[steps]", "got 'steps' in"),
        ("pgd-50[steps=]", "got 'steps='"),
        ("pgd-50[steps=3]x", "settings of an attack are written NAME"),
        ("pgd-50[steps=3,steps=4]", "gives 'steps' twice"),
        ("pgd-50[step=3]", "no setting 'step'; did you mean steps? it has steps=50, step_fraction=0.25"),
        ("pgd-50[steps=0]", "takes a whole number from 1 to 1,000,000, got '0'"),
        ("pgd-50[steps=-1]", "takes a whole number"),
        ("pgd-50[steps=1e3]", "takes a whole number"),
        ("pgd-50[steps=9999999]", "takes a whole number"),
        ("pgd-50[step_fraction=nan]", "takes a finite number"),
        ("pgd-50[step_fraction=-1]", "takes a finite number"),
        ("pgd-50[step_fraction=1/0]", "takes a finite number"),
        ("pgd-30[steps=4]", "no setting 'steps'; it has step_fraction=0.25"),
        ("published:rt-er[fp16=maybe]", "takes on or off, got 'maybe'"),
        ("published:rt-er[start=middle]", "takes constant or random or clean, got 'middle'"),
        ("autoattack[steps=3]", "has no setting 'steps'; it has none"),
        ("published:rter[fp16=off]", "unknown attack 'published:rter'; did you mean published:rt-er"),
        ("torchattacks:MIFGSM[steps=abc]", "takes a value like 10, got 'abc'"),
        ("torchattacks:MIFGSM[bogus=1]", "has no setting 'bogus'"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_attack(text)
    assert words in str(refused.value) and "\n" not in str(refused.value)


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    for base in ("pgd-50", "published:rt-er"):
        try:
            parse_attack(f"{base}[{text}]")
        except UsageError as error:
            assert str(error)


def test_the_settings_of_a_name_are_those_of_the_attack() -> None:
    for name in (*list_attacks(), *list_protocols()):
        entry = load_attack(name)
        values = {key: option.default for key, option in options_of(name).items()}
        assert load_attack(name, **values).parameters() == entry.parameters(), name
        assert str(AttackName(name, {})) == base_name(f"{name}[x=1]") == name


def test_commas_in_brackets_do_not_separate() -> None:
    assert split_names("a, b[x=1,y=2],c/expert[0],") == ("a", "b[x=1,y=2]", "c/expert[0]")
    assert split_names("a[b,c") == ("a[b,c",)
    assert split_names("a],b") == ("a]", "b")


def test_reading_names_needs_no_torch() -> None:
    code = (
        "import sys; from moebench.attack_names import parse_attack; from moebench.published import describe; "
        "parse_attack('published:rt-er[fp16=off]'); parse_attack('torchattacks:PGD[steps=3]'); "
        "describe('published:v-moe'); assert not {'torch', 'numpy'} & set(sys.modules) - {'numpy'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)

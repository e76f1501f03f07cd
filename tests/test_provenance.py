from __future__ import annotations

import enum
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import moebench
from moebench.provenance import PACKAGES, environment, fingerprint, git_state, installed
from moebench.schema import ThreatModel

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)
facts = st.dictionaries(st.text(), values, max_size=5)


def reversed_keys(value: Any) -> Any:
    """The same facts, every mapping in the opposite order."""
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


def same(one: Any, other: Any) -> bool:
    """Equality that tells True from 1 and 1 from 1.0, as their meaning in a setting may differ."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return repr(one) == repr(other)
    return bool(one == other)


@given(facts)
def test_equal_facts_have_equal_fingerprints_whatever_the_order(given_facts: dict[str, Any]) -> None:
    found = fingerprint(given_facts)
    assert found == fingerprint(reversed_keys(given_facts)) == fingerprint(json.loads(json.dumps(given_facts)))
    assert len(found) == 64 and set(found) <= set("0123456789abcdef")


@given(facts, st.data())
def test_any_changed_fact_changes_the_fingerprint(given_facts: dict[str, Any], data: st.DataObject) -> None:
    assume(given_facts)
    changed = json.loads(json.dumps(given_facts))
    assert same(changed, given_facts)
    place: Any = changed
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        inner = place[key]
        if not (isinstance(inner, dict | list) and inner and data.draw(st.booleans())):
            break
        place = inner
    replacement = data.draw(values)
    assume(not same(replacement, place[key]))
    place[key] = replacement
    assert fingerprint(changed) != fingerprint(given_facts)


@given(facts, facts)
def test_fingerprints_are_equal_only_for_equal_facts(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (fingerprint(one) == fingerprint(other)) == same(one, other)


def test_a_removed_or_added_fact_changes_the_fingerprint() -> None:
    base: dict[str, Any] = {"a": 1, "b": None}
    found = {fingerprint(one) for one in (base, {"a": 1}, {"b": None}, {}, {**base, "c": None}, {"a": None, "b": 1})}
    assert len(found) == 6


def test_neighbouring_texts_do_not_run_together() -> None:
    assert fingerprint({"a": "b,c"}) != fingerprint({"a": "b", "c": ""})
    assert fingerprint({"a": '"'}) != fingerprint({"a": '\\"'})
    assert fingerprint({"a": ["b", "c"]}) != fingerprint({"a": ["bc"]})


def test_records_count_by_their_fields() -> None:
    threat = ThreatModel("Linf", 8 / 255)
    assert fingerprint({"threat": threat}) == fingerprint({"threat": asdict(threat)})
    for change in ({"eps": 0.0313725490196078}, {"norm": "L2"}, {"upper": 0.9}):
        assert fingerprint({"threat": replace(threat, **change)}) != fingerprint({"threat": threat})
    assert fingerprint({"steps": (1, 2)}) == fingerprint({"steps": [1, 2]})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [1, v], lambda v: {"deep": {"er": v}}, np.float64])
def test_nan_and_infinity_are_refused(bad: float, wrap: Any) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        fingerprint({"eps": wrap(bad)})


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize("bad", [object(), {1, 2}, b"bytes", np.zeros(2), np.float32(1), Colour.RED, ThreatModel])
def test_things_without_a_canonical_form_are_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match=f"{type(bad).__name__} cannot be part of a fingerprint"):
        fingerprint({"setting": bad})


def test_fingerprint_does_not_depend_on_the_process() -> None:
    given_facts = {"b": [1, 2.5, "ä\n", None, True], "a": {"z": 0.1, "y": -0.0}}
    code = "import sys, json; from moebench.provenance import fingerprint; print(fingerprint(json.loads(sys.argv[1])))"
    other = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(given_facts)], capture_output=True, text=True, env=other, check=True
    )
    assert done.stdout.strip() == fingerprint(given_facts)
    # Pinned: another value here means that every stored result is computed again.
    assert fingerprint(given_facts) == "39c6f100113f8de7d70ab42169e8672e839347b503ae61da711772041bcbf997"


def test_environment_says_where_a_number_was_made() -> None:
    found = environment("cpu", 3)
    assert (found["device"], found["threads"], found["pid"]) == ("cpu", 3, os.getpid())
    assert set(found["versions"]) == set(PACKAGES)
    assert found["versions"]["moebench"] == moebench.__version__
    assert found["versions"]["torch"] is not None and "+" not in found["versions"]["torch"]
    assert found["git"] == git_state()
    json.dumps(found)


def test_git_state_is_a_commit_or_nothing() -> None:
    state = git_state()
    assert state is None or (len(state["commit"]) == 40 and isinstance(state["dirty"], bool))


def test_package_that_is_not_installed_has_no_version() -> None:
    assert installed("no-such-distribution-here") is None

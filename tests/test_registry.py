from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moebench.errors import UsageError
from moebench.models import MODELS
from moebench.registry import Registry, attack_registry, decorator_for, model_registry, scan

ONE = '''"""A file with two members."""
from registry_of_{name} import register

@register("first", summary="the first", family="a", settings={{"k": 2}}, other=undefined if False else len("x"))
@register("second", summary="the second")
def build(): ...
'''
TWO = """from registry_of_{name} import register

@register("third")
class Third: ...

def plain(): ...

@staticmethod
def decorated(): ...
"""


@dataclass(frozen=True)
class Member:
    name: str
    definition: Any
    facts: dict[str, Any]

    def named(self, name: str) -> Member:
        return replace(self, name=name)


def member(definition: Any, name: str, facts: dict[str, Any]) -> Member:
    return Member(name, definition, facts)


MakePackage = Callable[..., Registry[Member]]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> MakePackage:
    """Makes a package of the given files, and its registry; the decorator comes from a module of its own."""

    def make(**files: str) -> Registry[Member]:
        name = f"zoo_{abs(hash(request.node.nodeid)) % 10**8}"
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        for stem, text in files.items():
            (folder / f"{stem}.py").write_text(text.format(name=name))
        monkeypatch.syspath_prepend(tmp_path)
        registry: Registry[Member] = Registry("model", name, folder, "register", f"{name}.members")
        helper: Any = type(sys)(f"registry_of_{name}")
        helper.register = decorator_for(lambda: registry, member)
        monkeypatch.setitem(sys.modules, helper.__name__, helper)
        return registry

    return make


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- names and members


def test_names_are_read_without_importing(package: MakePackage) -> None:
    registry = package(one=ONE, two=TWO, _hidden=ONE)
    assert registry.names() == ["first", "second", "third"]
    assert "first" in registry and "fourth" not in registry
    assert not any(name.startswith("zoo_") for name in sys.modules)
    first, second, third = registry.declarations()
    assert dict(first.facts) == {"summary": "the first", "family": "a", "settings": {"k": 2}}
    assert (first.origin, second.origin, third.origin) == ("one.py:4", "one.py:5", "two.py:3")
    assert third.module.endswith(".two")


def test_get_imports_the_file_that_defines_the_name_and_no_other(package: MakePackage) -> None:
    registry = package(one=ONE.replace("undefined", "1"), two=TWO)
    third = registry.get("third")
    assert (third.name, third.definition.__name__, third.facts) == ("third", "Third", {})
    assert [name.rpartition(".")[2] for name in sys.modules if name.startswith("zoo_")][-1] == "two"
    second = registry.get("second")
    assert second.facts == {"summary": "the second"}
    assert second.definition.__name__ == "build"
    assert registry.get("first").facts["other"] == 1
    assert registry.get("first").definition is second.definition


def test_decorator_returns_the_definition_itself(package: MakePackage) -> None:
    registry = package()
    register = decorator_for(lambda: registry, member)

    def build() -> int:
        return 3

    assert register("mine")(build) is build
    assert registry.get("mine").definition is build


def test_scan_of_a_broken_file_names_it(package: MakePackage) -> None:
    registry = package(broken="def build(:\n")
    with pytest.raises(SyntaxError) as caught:
        registry.names()
    assert caught.value.filename is not None and caught.value.filename.endswith("broken.py")


def test_scan_reads_nested_definitions_and_aliases_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "f.py"
    path.write_text("class A:\n    @register('inner')\n    def f(self): ...\n@other.register('no')\ndef g(): ...\n")
    assert [found.name for found in scan(path, "f", "register")] == ["inner"]


def test_a_family_makes_the_member_of_every_name_that_matches(package: MakePackage) -> None:
    registry = package(
        many="from registry_of_{name} import register\n"
        '@register("other:NAME", pattern="other:[a-z]+", takes="a lower-case word")\n'
        '@register("other:known", summary="declared one by one")\n'
        "def build(): ...\n"
    )
    assert registry.names() == ["other:known"] and [one.name for one in registry.families()] == ["other:NAME"]
    assert "other:thing" in registry and "other:7" not in registry and "other:NAME" not in registry
    for _ in range(2):
        assert registry.get("other:thing").name == "other:thing"
        assert registry.get("other:known").facts == {"summary": "declared one by one"}
        for wrong in ("other:NAME", "other:7", "other:"):
            assert "other:NAME takes a lower-case word; `moebench list" in refused(partial(registry.get, wrong))
    assert "NAME" not in refused(lambda: registry.get("thing"))


# --- wrong names


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("rt-err", "rt-er"), ("RT-ER", "rt-er"), ("resnet-a", "resnet-at"), ("ensemble-mena", "ensemble-mean")],
)
def test_close_names_are_suggested(wrong: str, near: str) -> None:
    message = refused(lambda: MODELS.get(wrong))
    assert message.startswith(f"unknown model {wrong!r}; did you mean ")
    assert near in message
    assert message.endswith("`moebench list models` shows all")


def test_far_names_get_the_list_only() -> None:
    assert refused(lambda: MODELS.get("xyzzy")) == "unknown model 'xyzzy'; `moebench list models` shows all"
    assert refused(lambda: MODELS.get("")) == "unknown model ''; `moebench list models` shows all"
    assert "did you mean pgd-50" in attack_registry().unknown("pgd-5O")


# --- collisions


def test_name_declared_in_two_files_names_both(package: MakePackage) -> None:
    registry = package(one=ONE, other=TWO.replace('"third"', '"first"'))
    message = refused(registry.names)
    assert message == "model 'first' is declared twice, in one.py:4 and in other.py:3; rename one of them"
    assert refused(registry.names) == message, "also when asked again"


def test_name_declared_twice_in_one_file_names_both_lines(package: MakePackage) -> None:
    message = refused(package(one=ONE.replace('"second"', '"first"')).names)
    assert "one.py:4 and in one.py:5" in message


def one() -> None: ...


def other() -> None: ...


def test_name_registered_twice_names_both(package: MakePackage) -> None:
    registry = package()
    register = decorator_for(lambda: registry, member)
    register("mine")(one)
    register("mine")(one)  # the same definition again, as after a reload
    message = refused(lambda: register("mine")(other))
    assert message == f"model 'mine' is registered twice, in {__name__}.one and in {__name__}.other; rename one"
    assert registry.get("mine").definition is one


def test_name_of_the_package_cannot_be_taken_from_outside(package: MakePackage) -> None:
    """Also before the file that declares it was imported: a published name never means another model."""
    registry = package(one=ONE.replace("undefined", "1"))
    register = decorator_for(lambda: registry, member)
    message = refused(lambda: register("first")(other))
    assert message == f"model 'first' is registered twice, in one.py:4 and in {__name__}.other; rename one"
    assert registry.get("first").definition.__name__ == "build"


def test_copy_of_a_models_file_cannot_take_its_names(tmp_path: Path) -> None:
    import moebench.models.ensemble as original

    copy = tmp_path / "copied_ensemble.py"
    copy.write_text(Path(original.__file__).read_text())
    code = "import copied_ensemble"
    done = python("-c", code, path=tmp_path)
    assert "model 'ensemble-vote' is registered twice, in ensemble.py:" in done.stderr
    assert "copied_ensemble.ensemble; rename one" in done.stderr


# --- without torch


def python(*words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path)} if path else dict(os.environ)
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=200, check=False, env=environment
    )


@pytest.mark.parametrize("kind", ["model", "attack"])
def test_listing_needs_no_torch(kind: str) -> None:
    code = (
        f"import sys; from moebench.registry import {kind}_registry as registry; "
        "names = registry().names(); registry().unknown('x'); [d.facts for d in registry().declarations()]; "
        "assert names; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_every_declared_name_is_registered_by_its_file() -> None:
    for registry in (model_registry(), attack_registry()):
        for declaration in registry.declarations():
            registry.get(declaration.name)


# --- plug-ins


PROJECT = """[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "moebench-plugged"
version = "1.2"

[project.entry-points."moebench.models"]
plugged-linear = "plugged_models"

[tool.setuptools]
py-modules = ["plugged_models"]
"""

MODULE = '''"""A model from another distribution."""
from torch import nn

from moebench.models._base import Recipe, register_model
from moebench.models._objectives import STANDARD

RECIPE = Recipe(1, select="clean")


@register_model(
    "plugged-linear", summary="linear", family="dense", training="standard", recipe=RECIPE, objective=STANDARD
)
def linear(num_classes, shape, *, bias=True):
    channels, height, width = shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes, bias=bias))
'''


@pytest.fixture(scope="module")
def plugged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which a real plug-in package was installed."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "plugged_models.py").write_text(MODULE)
    words = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = python(*words, "--target", str(target), str(source))
    assert done.returncode == 0, done.stderr
    return target


def test_installed_plug_in_is_listed_without_being_imported(plugged: Path) -> None:
    done = python("-m", "moebench", "list", "models", path=plugged)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("plugged-linear ")]
    assert line.endswith("from moebench-plugged")
    assert "plugged-linear" not in python("-m", "moebench", "list", "models").stdout
    code = "import sys; from moebench.registry import model_registry; model_registry().names(); print(*sys.modules)"
    assert "plugged_models" not in python("-c", code, path=plugged).stdout.split()


def test_installed_plug_in_is_loaded_and_trained(plugged: Path, tmp_path: Path) -> None:
    code = (
        "import torch; from moebench import load_model; "
        "m = load_model('plugged-linear', dataset=None, num_classes=7, bias=False); "
        "print(tuple(m(torch.rand(2, 1, 8, 8)).shape), sum(p.numel() for p in m.parameters()))"
    )
    done = python("-c", code, path=plugged)
    assert done.stdout.strip() == "(2, 7) 448", done.stderr
    words = ["train", "--model", "plugged-linear", "--epochs", "2", "--set", "lr_high=0.1", "--out", str(tmp_path)]
    done = python("-m", "moebench", *words, path=plugged)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plugged-linear.safetensors").is_file()


def announce(folder: Path, name: str, entry: str, distribution: str) -> None:
    """A distribution that is installed by hand: nothing but its announcement."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[moebench.models]\n{name} = {entry}\n")


def test_plug_in_with_a_taken_name_is_refused_with_both_origins(tmp_path: Path) -> None:
    announce(tmp_path, "rt-er", "nowhere.models:rt_er", "rival")
    done = python("-m", "moebench", "list", "models", path=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("moebench: model 'rt-er' is declared twice, in rt_er.py:")
    assert "and in entry point nowhere.models:rt_er" in done.stderr
    assert done.stdout == ""


def test_plug_in_that_keeps_no_promise_is_refused(tmp_path: Path) -> None:
    announce(tmp_path, "empty-promise", "promises_nothing", "promises")
    (tmp_path / "promises_nothing.py").write_text("")
    announce(tmp_path, "gone-model", "module_that_is_gone", "gone")
    announce(tmp_path, "broken-model", "module_that_breaks", "breaks")
    (tmp_path / "module_that_breaks.py").write_text("1 / 0\n")
    done = python("-m", "moebench", "show", "empty-promise", path=tmp_path)
    assert done.returncode == 2
    assert "model 'empty-promise' is announced by its package but entry point promises_nothing does not" in done.stderr
    done = python("-m", "moebench", "show", "gone-model", path=tmp_path)
    assert done.returncode == 2
    assert "'gone-model' cannot be imported from entry point module_that_is_gone: ModuleNotFoundError" in done.stderr
    done = python("-m", "moebench", "show", "broken-model", path=tmp_path)
    assert done.returncode == 2
    assert "'broken-model' cannot be imported from entry point module_that_breaks: ZeroDivisionError" in done.stderr
    done = python("-m", "moebench", "list", "models", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"empty-promise", "gone-model", "rt-er"} <= {line.split()[0] for line in done.stdout.splitlines()}

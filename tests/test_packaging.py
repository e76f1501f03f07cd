from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import moebench

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"benchmark": "moebench", "models": "moebench.models", "attacks": "moebench.attacks"}
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python_files() -> Iterator[tuple[str, Path]]:
    """The import name and path of every module of the package."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if "__pycache__" not in parts:
                yield ".".join((package, *(part for part in parts if part != "__init__"))), path


class Import(NamedTuple):
    """One module that a file imports."""

    importer: str
    imported: str
    line: int


def imports(module: str, path: Path) -> Iterator[Import]:
    """What a file imports, wherever in it: `from moebench import x` counts as `moebench.x`."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            if source == "moebench":
                for alias in node.names:
                    yield Import(module, f"moebench.{alias.name}", node.lineno)
            else:
                yield Import(module, source, node.lineno)


@cache
def all_imports() -> list[Import]:
    return [item for module, path in python_files() for item in imports(module, path)]


def part(module: str) -> str:
    """The part of moebench that a module belongs to: moebench.store.orm is of "store"."""
    return [*module.split("."), ""][1]


def ours(item: Import) -> bool:
    return item.imported.split(".")[0] == "moebench"


# --- metadata


def test_one_version() -> None:
    assert moebench.__version__ == PYPROJECT["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [moebench.__version__]


def test_the_listed_packages_are_the_folders_with_python_files() -> None:
    found = {name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in python_files()}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


def test_package_data_patterns_match_files() -> None:
    homes = {package: ROOT / folder for folder, package in FOLDERS.items()}
    for package, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items():
        home = homes.get(package) or ROOT / "benchmark" / Path(*package.split(".")[1:])
        for pattern in patterns:
            assert any(path.is_file() for path in home.glob(pattern)), f"{package}: nothing matches {pattern}"


def test_constraints_are_plain_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][0-9A-Za-z.]*", line) for line in lines)
    names = [normal(line.split("==")[0]) for line in lines]
    assert len(names) == len(set(names))
    assert declared("test") <= set(names)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    """The names of the distributions that the project asks for."""
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {normal(re.split(r"[\[<>=!~; ]", line)[0]) for line in wanted}


def undeclared(used: list[Import], allowed: set[str]) -> list[str]:
    providers = packages_distributions()
    wrong = []
    for item in used:
        top = item.imported.split(".")[0]
        if top in sys.stdlib_module_names or top == "moebench":
            continue
        if not {normal(name) for name in providers.get(top, [top])} & allowed:
            wrong.append(f"{item.importer}:{item.line} imports {top}")
    return wrong


def test_every_import_is_a_declared_dependency() -> None:
    assert undeclared(all_imports(), declared("ray", "postgres", "hub")) == []


def test_every_import_of_the_tests_is_declared() -> None:
    files = sorted((ROOT / "tests").glob("*.py"))
    helpers = {path.stem for path in files}
    used = [item for path in files for item in imports(path.stem, path) if item.imported not in helpers]
    assert undeclared(used, declared("ray", "postgres", "hub", "tensorboard", "test")) == []


# --- importing


def run(code: str, folder: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_no_top_level_package_of_ours_but_moebench(tmp_path: Path) -> None:
    code = (
        "import moebench, importlib.util as u; print([bool(u.find_spec(m)) for m in ('models','attacks','benchmark')])"
    )
    assert run(code, tmp_path) == ["[False,", "False,", "False]"]


def test_importing_moebench_is_light(tmp_path: Path) -> None:
    code = "import sys, moebench; print(*{'torch', 'numpy', 'pandas', 'sqlalchemy', 'click'} & set(sys.modules))"
    assert run(code, tmp_path) == []


def test_public_names_resolve() -> None:
    for name in moebench.__all__:
        assert getattr(moebench, name) is not None
        assert name in dir(moebench)
    with pytest.raises(AttributeError, match="evalute"):
        moebench.evalute  # noqa: B018


@pytest.mark.parametrize("first", ["import moebench.evaluation", "from moebench.evaluation import EvalSpec", "pass"])
def test_evaluate_is_the_function_whatever_was_imported_before(tmp_path: Path, first: str) -> None:
    then = "from moebench import evaluate\nfrom moebench.evaluation import evaluate as same\nprint(evaluate is same)"
    assert run(f"{first}\n{then}", tmp_path) == ["True"]


# --- directions of imports


def test_models_and_attacks_import_the_shared_types_only() -> None:
    allowed = {"schema", "errors", "registry", "attack_names", "threat", "models", "attacks"}
    assert [
        item
        for item in all_imports()
        if ours(item) and part(item.importer) in ("models", "attacks") and part(item.imported) not in allowed
    ] == []


def test_nothing_imports_the_command_line() -> None:
    importers = {item.importer for item in all_imports() if ours(item) and part(item.imported) == "cli"}
    assert importers == {"moebench.__main__"}


def test_the_report_reads_the_store_only() -> None:
    allowed = {
        "report",
        "store",
        "metrics",
        "trust",
        "schema",
        "errors",
        "claims",
        "papers",
        "published",
        "attack_names",
        "registry",
        "flags",
        "__version__",
    }
    assert [
        item
        for item in all_imports()
        if ours(item) and part(item.importer) == "report" and part(item.imported) not in allowed
    ] == []


def test_what_the_report_computes_is_computed_from_records_alone() -> None:
    """The report may use these two because they are functions of what the store holds."""
    imported = {
        part(item.imported)
        for item in all_imports()
        if part(item.importer) in ("metrics", "trust", "flags") and ours(item)
    }
    assert imported == {"metrics", "flags", "schema"}


def test_no_module_is_imported_by_its_folders_name() -> None:
    assert [item for item in all_imports() if item.imported.split(".")[0] in FOLDERS] == []


def test_the_import_reader_sees_every_form(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    path.write_text(
        "import a.b\nfrom moebench import cli\nfrom . import x\nfrom .y import z\ndef f():\n    import late\n"
    )
    found = [item.imported for item in imports("moebench.report.some", path)]
    assert found == ["a.b", "moebench.cli", "moebench.report", "moebench.report.y", "late"]


# --- the wheel


def test_the_wheel_holds_moebench_and_nothing_else(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.iterdir()
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for folder, package in FOLDERS.items():
        for path in (source / folder).rglob("*"):
            # The log of a training run stays where the run was.
            if path.is_file() and not path.name.endswith(".log.jsonl"):
                expected.add(f"{package.replace('.', '/')}/{path.relative_to(source / folder).as_posix()}")
    assert held == expected
    assert "moebench/py.typed" in held

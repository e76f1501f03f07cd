"""One registry for models, attacks and data sets.

A name is written once, as the first argument of the decorator that registers it. Names and their literal keyword
arguments are read from the source by its syntax tree, so listing, looking up and suggesting names import nothing (torch
takes seconds); the file that defines a name is imported when the name is used.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Generic, TypeVar, cast

from moebench.errors import MoebenchError, UsageError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """A keyword-only argument of a declared function: its default, and the values that its `Literal` type lists."""

    default: Any
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Declaration:
    """Where a name is declared, the literal keyword arguments of its decorator, and the options of its function.

    `definition` is the function or class that the decorator stands on; names that share one are variants of one thing.
    """

    name: str
    module: str
    origin: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    definition: str | None = None
    options: Mapping[str, Option] = field(default_factory=dict)

    @property
    def pattern(self) -> str | None:
        """The regular expression of the names that a whole family of members has, None for a single member."""
        return self.facts.get("pattern")


class Registry(Generic[T]):
    """Names of one kind of thing, found in the files of one package and in the entry points of one group.

    A declaration with the keyword `pattern`, a regular expression, stands for a family of names ("pgd-N"): it is no
    name itself, and its member makes the member of every name that matches, by a method `named(name)`. Names that are
    declared one by one come first.

    Args:
        kind: what a member is called in messages, such as "model".
        package: the import name whose public modules declare members.
        folder: the folder of that package.
        decorator: the name of the decorator that declares a member.
        group: entry-point group through which other packages add members; the entry point's value is a module.
        files: which files of the folder declare members, as a glob pattern.
    """

    def __init__(
        self,
        kind: str,
        package: str,
        folder: Path,
        decorator: str,
        group: str | None = None,
        files: str = "[!_]*.py",
    ) -> None:
        self.kind = kind
        self._package = package
        self._folder = folder
        self._decorator = decorator
        self._group = group
        self._files = files
        self._members: dict[str, T] = {}
        self._origins: dict[str, str] = {}
        self._declared: dict[str, Declaration] | None = None

    def register(self, name: str, origin: str, member: T) -> None:
        """Adds a member.

        Raises:
            UsageError: the name is taken by a definition elsewhere.
        """
        taken = self._origins.get(name)
        declared = self._everything().get(name)
        # A name of the package itself belongs to its file, imported or not.
        if taken is None and declared is not None and self._owns(declared) and not _inside(origin, declared.module):
            taken = declared.origin
        if taken is not None and taken != origin:
            raise UsageError(f"{self.kind} {name!r} is registered twice, in {taken} and in {origin}; rename one")
        self._origins[name] = origin
        self._members[name] = member

    def names(self) -> list[str]:
        """All names, in the order of their declaration."""
        return list(self._declarations())

    def declarations(self) -> list[Declaration]:
        """All names with what their source says of them."""
        return list(self._declarations().values())

    def declaration(self, name: str) -> Declaration | None:
        """What the source says of a name, or of the family that it belongs to; None for an unknown name."""
        declared = self._declarations().get(name)
        return declared if declared is not None else self._family(name)

    def families(self) -> list[Declaration]:
        """The families of names, such as "pgd-N"."""
        return [declaration for declaration in self._everything().values() if declaration.pattern is not None]

    def __contains__(self, name: object) -> bool:
        return name in self._declarations() or (isinstance(name, str) and self._family(name) is not None)

    def get(self, name: str) -> T:
        """The member of that name, its module imported.

        Raises:
            UsageError: nothing has that name; close matches are offered.
        """
        declaration, family = self._everything().get(name), self._family(name)
        if declaration is not None and declaration.pattern is not None:
            raise UsageError(self.unknown(name))
        if name not in self._members:
            if declaration is None and family is not None:
                return self._of_family(family, name)
            if declaration is None:
                raise UsageError(self.unknown(name))
            self._import(declaration)
        if name not in self._members:
            raise UsageError(
                f"{self.kind} {name!r} is announced by its package but {self._origin(name)} does not register it"
            )
        return self._members[name]

    def _family(self, name: str) -> Declaration | None:
        """The first family that a name belongs to."""
        return next((family for family in self.families() if re.fullmatch(family.pattern or "", name)), None)

    def _of_family(self, family: Declaration, name: str) -> T:
        if family.name not in self._members:
            self._import(family)
        return cast(T, cast(Any, self._members[family.name]).named(name))

    def _import(self, declaration: Declaration) -> None:
        try:
            importlib.import_module(declaration.module)
        except Exception as error:
            if self._owns(declaration) or isinstance(error, MoebenchError):
                raise
            first = (str(error).splitlines() or [""])[0]
            raise UsageError(
                f"{self.kind} {declaration.name!r} cannot be imported from {declaration.origin}: "
                f"{type(error).__name__}: {first}"
            ) from error

    def _owns(self, declaration: Declaration) -> bool:
        """Whether a file of the registry's own package declares it, and not a plug-in."""
        return _inside(declaration.module, self._package)

    def unknown(self, name: str) -> str:
        """The message for a wrong name."""
        close = difflib.get_close_matches(name.lower(), self.names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        for family in self.families():
            # "pgd-" of "pgd-N": what is written as it stands.
            if name.startswith(family.name.rstrip(ascii_uppercase)):
                hint += f"{family.name} takes {family.facts.get('takes', f'names like {family.pattern}')}; "
        return f"unknown {self.kind} {name!r}; {hint}`moebench list {self.kind.replace(' ', '')}s` shows all"

    def _origin(self, name: str) -> str:
        return self._declarations()[name].origin

    def _declarations(self) -> dict[str, Declaration]:
        return {name: one for name, one in self._everything().items() if one.pattern is None}

    def _everything(self) -> dict[str, Declaration]:
        if self._declared is None:
            found: dict[str, Declaration] = {}
            for declaration in (*self._scan(), *self._plugins()):
                other = found.get(declaration.name)
                if other is not None:
                    raise UsageError(
                        f"{self.kind} {declaration.name!r} is declared twice, in {other.origin} and in "
                        f"{declaration.origin}; rename one of them"
                    )
                found[declaration.name] = declaration
            self._declared = found
        return self._declared

    def _scan(self) -> Iterator[Declaration]:
        for path in sorted(self._folder.glob(self._files)):
            yield from scan(path, f"{self._package}.{path.stem}", self._decorator)

    def _plugins(self) -> Iterator[Declaration]:
        if self._group is None:
            return
        for point in entry_points(group=self._group):
            yield Declaration(
                point.name, _module(point), f"entry point {point.value}", {"summary": f"from {_distribution(point)}"}
            )


def scan(path: Path, module: str, decorator: str) -> Iterator[Declaration]:
    """The names that the decorator declares in a source file, in order, without importing it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        for call in getattr(node, "decorator_list", ()):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == decorator):
                continue
            name = ast.literal_eval(call.args[0])
            facts = {
                word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg and _literal(word.value)
            }
            yield Declaration(
                name, module, f"{path.name}:{call.lineno}", facts, getattr(node, "name", None), _options(node)
            )


def _options(node: ast.AST) -> dict[str, Option]:
    """The keyword-only arguments of a function that have a literal default."""
    if not isinstance(node, ast.FunctionDef):
        return {}
    found = {}
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if default is not None and _literal(default):
            kind, choices = argument.annotation, ()
            if isinstance(kind, ast.Subscript) and isinstance(kind.value, ast.Name) and kind.value.id == "Literal":
                listed = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
                choices = tuple(ast.literal_eval(item) for item in listed if _literal(item))
            found[argument.arg] = Option(ast.literal_eval(default), choices)
    return found


def _inside(name: str, package: str) -> bool:
    return name.startswith(f"{package}.")


def _literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return False
    return True


def _module(point: EntryPoint) -> str:
    return point.value.partition(":")[0].strip()


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def decorator_for(registry: Callable[[], Registry[T]], wrap: Callable[..., T]) -> Callable[..., Callable[[F], F]]:
    """Builds the decorator that registers a definition under a name.

    Args:
        registry: gives the registry.
        wrap: makes the member from (definition, name, keyword arguments of the decorator).
    """

    def declare(name: str, **facts: Any) -> Callable[[F], F]:
        def keep(definition: F) -> F:
            origin = f"{definition.__module__}.{definition.__qualname__}"
            registry().register(name, origin, wrap(definition, name, facts))
            return definition

        return keep

    return declare


@cache
def model_registry() -> Registry[Any]:
    """All models; their names are known without importing torch."""
    return _of_package("model", "moebench.models", "register_model")


@cache
def attack_registry() -> Registry[Any]:
    """All attacks; their names are known without importing torch."""
    return _of_package("attack", "moebench.attacks", "register_attack")


@cache
def objective_registry() -> Registry[Any]:
    """The training objectives that fit any classifier; their names are known without importing torch."""
    return Registry(
        "recipe", "moebench.models", package_folder("moebench.models"), "register_objective", files="_objectives.py"
    )


def _of_package(kind: str, package: str, decorator: str) -> Registry[Any]:
    return Registry(kind, package, package_folder(package), decorator, package)


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        ImportError: it is not there.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the package {package} is not installed completely")
    return Path(next(iter(spec.submodule_search_locations)))


LIBRARY = "torchattacks"
"""Attacks named `torchattacks:NAME` are classes of that library."""


@cache
def library_classes() -> tuple[str, ...]:
    """The attack classes of torchattacks, read from its source: importing it would import torch.

    Raises:
        UsageError: it is not installed, or lists its classes in a way that cannot be read.
    """
    spec = find_spec(LIBRARY)
    if spec is None or spec.origin is None:
        raise UsageError(f"{LIBRARY} is not installed; `pip install {LIBRARY}`")
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8"), spec.origin).body:
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == "__all__" for to in node.targets):
            return tuple(map(str, ast.literal_eval(node.value)))
    raise UsageError(f"the installed {LIBRARY} does not list its attacks in __all__; install version 3.5.1")


def check_attack_name(name: str) -> None:
    """Refuses an attack that is neither registered nor a class of torchattacks, without importing torch.

    Raises:
        UsageError: unknown name; close matches are offered.
    """
    library, colon, kind = name.partition(":")
    if library != LIBRARY:
        if name not in attack_registry():
            raise UsageError(attack_registry().unknown(name))
        return
    folded = {known.lower(): known for known in library_classes()}
    if not colon or not kind:
        raise UsageError(f"attack {name!r} does not say which class; write {LIBRARY}:NAME, such as {LIBRARY}:MIFGSM")
    if kind not in folded.values():
        close = difflib.get_close_matches(kind.lower(), folded, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(f'{LIBRARY}:{folded[one]}' for one in close)}?" if close else "classes: "
        raise UsageError(f"unknown attack {name!r}; {hint}" + ("" if close else ", ".join(folded.values())))


COMPOSED = "composed"
"""The `training` of models that are put together from trained ones."""


def recipes_of(model: str) -> list[str]:
    """What `--recipe` takes for a model, without importing torch.

    The objectives that fit any classifier, and the models of the same builder that have an objective of their own.
    """
    declared = {one.name: one for one in model_registry().declarations()}
    own = declared.get(model)
    alike = [
        one.name
        for one in declared.values()
        if own is not None
        and (one.name == model or (own.definition and (one.module, one.definition) == (own.module, own.definition)))
        and one.facts.get("training") != COMPOSED
    ]
    return [*objective_registry().names(), *alike]


def recipe_refusal(model: str, recipe: str) -> str:
    """The message for a recipe that this model cannot be trained by."""
    offered = recipes_of(model)
    takes = f"{model} takes {', '.join(offered)}"
    if recipe in model_registry():
        return f"recipe {recipe!r} does not fit {model}, a model of another kind; {takes}"
    close = difflib.get_close_matches(recipe.lower(), offered, n=2, cutoff=0.5)
    return f"unknown recipe {recipe!r}; " + (f"did you mean {' or '.join(close)}? " if close else "") + takes


def check_recipe_name(model: str, recipe: str) -> None:
    """Refuses a recipe that a registered model cannot be trained by, without importing torch.

    Raises:
        UsageError: an unknown recipe, or one of another kind of model.
    """
    if recipe not in recipes_of(model):
        raise UsageError(recipe_refusal(model, recipe))

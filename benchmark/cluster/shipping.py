"""A model on its way to the workers: what the driver packs once, and what a worker must do before it can build it.

Ray carries the network as it is, weights included, with the faster copy that the search runs on: a worker need have
neither the weights file nor what a user's factory reads. Classes of moebench and of installed packages travel by name,
and workers must have the same version of moebench. Those of a user's file travel as source text, with the modules that
the file has imported from its own folder.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import linecache
import sys
import tokenize
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from typing_extensions import override

import moebench
from moebench.errors import RunError, UsageError, first_line

USER = "moebench_user_"
"""How the names of modules begin that a user's FILE.py is imported as."""

LARGEST_SOURCE = 8 * 2**20
"""Bytes of source beside a user's model that are sent at most."""


@dataclass(frozen=True)
class Source:
    """One module of a user: its text, and whether others lie inside of it."""

    path: str
    text: str
    is_package: bool


@dataclass(frozen=True)
class Parcel:
    """A model, and what its classes need.

    `model` refers to the network and its copy in the object store: they can be fetched only once `admit` has made
    their modules importable. `code` is the digest of the sources of moebench that packed it.
    """

    model: Any
    sources: Mapping[str, Source]
    code: str


def pack(put: Callable[[], Any]) -> Parcel:
    """A parcel of the model that `put` puts into the object store, returning a reference.

    Raises:
        UsageError: it cannot be serialised, or lies beside more source than is sent.
    """
    sources = user_sources()
    try:
        model = put()
    except Exception as error:
        # A user's model may hold anything: an open file, a lock, a generator. Ray says first what it tried.
        cause = error.__cause__ or error
        text = f"{type(cause).__name__}: {first_line(cause)}"
        raise UsageError(
            f"the model cannot be sent to other machines ({text}); leave out --engine ray, or keep what cannot be "
            "pickled out of the model"
        ) from error
    return Parcel(model, sources, package_digest())


def admit(parcel: Parcel) -> None:
    """Makes the modules of a parcel importable here.

    Raises:
        RunError: this machine has another moebench.
    """
    if parcel.code != package_digest():
        raise RunError(
            f"this machine has another moebench ({moebench.__version__}, sources {package_digest()[:12]}) than the "
            f"driver (sources {parcel.code[:12]}); install the same on all"
        )
    _Finder.serve(parcel.sources)


@cache
def package_digest() -> str:
    """Hash of the source text of moebench as this process imports it."""
    from moebench import attacks, models

    digest = hashlib.sha256()
    for package in (moebench, attacks, models):
        for folder in package.__path__:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(f"{package.__name__}/{path.relative_to(folder).as_posix()}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def user_sources() -> dict[str, Source]:
    """The modules of users' files, and those that these have imported from their own folders.

    Raises:
        UsageError: they are too large to be sent.
    """
    modules = dict(sys.modules)
    files = {name: path for name, module in modules.items() if (path := _path(module)) is not None}
    folders = {Path(path).resolve().parent for name, path in files.items() if name.startswith(USER)}
    found = {}
    for name, path in files.items():
        top = name.partition(".")[0]
        if name.startswith(USER) or (top != "moebench" and _home(files.get(top)) in folders):
            # A file that is gone or no Python by now was of another model.
            with suppress(OSError, SyntaxError, UnicodeDecodeError), tokenize.open(path) as file:
                found[name] = Source(path, file.read(), hasattr(modules[name], "__path__"))
    size = sum(len(source.text) for source in found.values())
    if size > LARGEST_SOURCE:
        raise UsageError(f"the modules beside the model have {size:,} bytes of source; keep the model's file apart")
    return found


def _path(module: ModuleType) -> str | None:
    path = getattr(module, "__file__", None)
    return path if isinstance(path, str) and path.endswith(".py") else None


def _home(path: str | None) -> Path | None:
    """The folder from which a module or package is imported."""
    if path is None:
        return None
    file = Path(path).resolve()
    return file.parent.parent if file.name == "__init__.py" else file.parent


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a user's modules from the text that the driver sent."""

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}

    @classmethod
    def serve(cls, sources: Mapping[str, Source]) -> None:
        """Makes the modules importable; those of an earlier parcel whose text is another are forgotten."""
        finder = next((one for one in sys.meta_path if isinstance(one, cls)), None)
        if finder is None:
            finder = cls()
            sys.meta_path.insert(0, finder)
        stale = [name for name, source in finder.sources.items() if sources.get(name) != source]
        for name in stale:
            sys.modules.pop(name, None)
        finder.sources = dict(sources)

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        source = self.sources.get(fullname)
        if source is None:
            return None
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=source.path, is_package=source.is_package)
        spec.has_location = True
        return spec

    @override
    def exec_module(self, module: ModuleType) -> None:
        source = self.sources[module.__name__]
        # Tracebacks and torch.jit look for the lines here; there is no such file on this machine.
        linecache.cache[source.path] = (len(source.text), None, source.text.splitlines(keepends=True), source.path)
        exec(compile(source.text, source.path, "exec"), module.__dict__)

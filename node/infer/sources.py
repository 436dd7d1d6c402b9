"""A package's own Python: on the module path while it runs, never mixed with another's, and its errors explained."""

from __future__ import annotations

import pydoc
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def sources_of(folder: Path, modules: dict[str, ModuleType]) -> Iterator[None]:
    """The package's root on the module path, as `monai.bundle run` has it, without compiled files.

    All bundles call their package `scripts`, so what a bundle imports is kept in `modules` while another one runs.
    The digest of a package leaves `__pycache__` out, so nothing in one may be run.
    """
    names = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}
    others = _take_modules(names)
    sys.modules.update(modules)
    before = sys.pycache_prefix
    sys.path.insert(0, str(folder))
    with tempfile.TemporaryDirectory(prefix="radnode-") as cache:
        sys.pycache_prefix = cache
        try:
            yield
        finally:
            sys.pycache_prefix = before
            sys.path.remove(str(folder))
            modules.clear()
            modules.update(_take_modules(names))
            sys.modules.update(others)


def tell_of(folder: Path, error: BaseException) -> str:
    """Why a package raised, by the innermost cause, and in which part of it."""
    causes = _causes_of(error)
    part = _part_of(causes, folder)
    first_line = (str(causes[-1]).splitlines() or [""])[0][:300]
    where = f" (in {part})" if part else ""
    return f"{type(causes[-1]).__name__}: {first_line}{where}"


def _take_modules(names: set[str]) -> dict[str, ModuleType]:
    """The imported modules and packages of these names and all that is in them, which are then no longer imported."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in names}


def _causes_of(error: BaseException) -> list[BaseException]:
    """The error, what it was raised from, and so on. What was being handled by the way explains nothing."""
    causes = [error]
    while True:
        # MONAI imports by pydoc, whose error holds the module's own.
        deeper = causes[-1].value if isinstance(causes[-1], pydoc.ErrorDuringImport) else causes[-1].__cause__
        if deeper is None:
            return causes
        causes.append(deeper)


def _part_of(causes: Sequence[BaseException], folder: Path) -> str:
    """Which part of the bundle raised: its own source, or the class that its configuration names; "" when unknown."""
    innermost = causes[-1]
    places = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(innermost.__traceback__)]
    if isinstance(innermost, SyntaxError) and innermost.filename:
        places.append((Path(innermost.filename), innermost.lineno))
    for file, line in reversed(places):
        if file.is_relative_to(folder):
            return f"{file.relative_to(folder).as_posix()}, line {line}"
    for cause in reversed(causes):  # MONAI's own words, with the class or the object's repr
        if found := re.match(r"applying transform <(\S+) object|Failed to instantiate component '(\S+)'", str(cause)):
            return (found[1] or found[2]).rpartition(".")[2]
    return ""

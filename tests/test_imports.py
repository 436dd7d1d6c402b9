"""The modules import each other in one direction: whichever a process starts with, there is no circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_no_circle_of_imports() -> None:
    files = {_name(path): path for path in (ROOT / "node").rglob("*.py")}
    imports = {
        name: {found for found in _imported(ast.parse(path.read_text()).body, set(files)) if found != name}
        for name, path in files.items()
    }
    assert "node.report.results" in imports["node.analyse"]
    TopologicalSorter(imports).prepare()  # CycleError names the modules of a circle


def test_ray_is_imported_by_nobody_who_does_not_use_it() -> None:
    script = "import sys, node.work, node.commands.check, node.infer.ray_slot; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imported(body: list[ast.stmt], modules: set[str]) -> Iterator[str]:
    """The modules of radnode that a module needs before it is complete: not those that its functions or types name."""
    for statement in body:
        match statement:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name in modules)
            case ast.ImportFrom(module=str(module), names=names, level=0) if module in modules:
                inner = {f"{module}.{name.name}" for name in names} & modules
                yield from inner or {module}
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                pass
            case ast.If() | ast.Try() | ast.With() | ast.ClassDef():
                yield from _imported(list(statement.body), modules)

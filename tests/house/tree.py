"""Reads the source tree as text: which modules there are, and what they import."""

import ast
from collections.abc import Iterator
from pathlib import Path

__all__ = ["FOLDERS", "ROOT", "imports", "module_name", "modules"]

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("parallel", "moe", "launch", "clusters")
PACKAGE = ROOT / "src" / "meshwright"


def modules() -> dict[str, Path]:
    """Every module of the library by its import name."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return {module_name(path): path for path in sorted([*paths, *PACKAGE.glob("*.py")])}


def module_name(path: Path) -> str:
    """The import name of a file of the library.

    >>> module_name(ROOT / "parallel" / "mesh.py")
    'meshwright.parallel.mesh'
    """
    base = PACKAGE if path.is_relative_to(PACKAGE) else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(["meshwright", *(part for part in parts if part != "__init__")])


def imports(text: str) -> Iterator[tuple[str, bool]]:
    """Each imported module of a text, and whether its import runs when the module is imported.

    >>> list(imports("import os\\ndef f():\\n    from torch.nn import Module"))
    [('os', True), ('torch.nn', False)]
    """
    yield from _imports(ast.parse(text), at_top=True)


def _imports(node: ast.AST, *, at_top: bool) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, at_top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield str(child.module), at_top
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from _imports(child, at_top=False)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, at_top=at_top and not inside)

"""The limits of the house style, measured over `ast`.

Every measure has a soft limit and a hard one. What lies between them today is listed in `limits.json`; the list can
only shrink: `python -m tests.house.limits --write` lowers and removes entries, and needs `--allow-new` to add any.
"""

import argparse
import ast
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["LEDGER", "ROOT", "SOFT", "breaches", "forbidden", "measures", "source_files", "tree_breaches"]

ROOT = Path(__file__).resolve().parents[2]
LEDGER = Path(__file__).with_name("limits.json")
FOLDERS = ("parallel", "moe", "launch", "clusters", "benchmarks")

SOFT = {
    "file lines": 300,
    "function lines": 35,
    "arguments": 6,
    "positional arguments": 3,
    "cyclomatic": 10,
    "methods": 15,
    "attributes": 12,
}
HARD = SOFT | {"file lines": 400, "function lines": 60, "arguments": 8, "positional arguments": 5}
HARD |= {"cyclomatic": 15, "methods": 20, "attributes": 24}
TEST_FILE_LINES = 400
GRAB_BAGS = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "tools", "stuff"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Measure(NamedTuple):
    """One number of one place, such as ("Mesh.group", "cyclomatic", 3)."""

    place: str
    kind: str
    value: int


def source_files() -> list[Path]:
    """The library's own files; tests are held only by the length of a file."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return sorted([*found, *(ROOT / "src" / "meshwright").glob("*.py")])


def measures(text: str) -> Iterator[Measure]:
    """All measures of one module's text.

    >>> [m.value for m in measures("def f(a, *, b): return a if b else 0") if m.place == "f"]
    [1, 2, 1, 2]
    """
    yield Measure("", "file lines", len(text.splitlines()))
    yield from _walk(ast.parse(text), prefix="", in_class=False)


def _walk(node: ast.AST, *, prefix: str, in_class: bool) -> Iterator[Measure]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            place = f"{prefix}{child.name}"
            yield from _of_function(child, place, in_class=in_class)
            yield from _walk(child, prefix=f"{place}.", in_class=False)
        elif isinstance(child, ast.ClassDef):
            place = f"{prefix}{child.name}"
            yield from _of_class(child, place)
            yield from _walk(child, prefix=f"{place}.", in_class=True)
        else:
            yield from _walk(child, prefix=prefix, in_class=in_class)


def _of_function(node: Function, place: str, *, in_class: bool) -> Iterator[Measure]:
    assert node.end_lineno is not None
    positional = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
    if in_class and positional and positional[0] in {"self", "cls"}:
        positional = positional[1:]
    yield Measure(place, "function lines", node.end_lineno - node.lineno + 1)
    yield Measure(place, "arguments", len(positional) + len(node.args.kwonlyargs))
    yield Measure(place, "positional arguments", len(positional))
    yield Measure(place, "cyclomatic", 1 + sum(_branches(child) for child in node.body))


def _branches(node: ast.AST) -> int:
    if isinstance(node, (*Function.__args__, ast.ClassDef, ast.Lambda)):
        return 0
    own = 0
    if isinstance(node, ast.If | ast.IfExp | ast.For | ast.AsyncFor | ast.While | ast.ExceptHandler | ast.match_case):
        own = 1
    elif isinstance(node, ast.BoolOp):
        own = len(node.values) - 1
    elif isinstance(node, ast.comprehension):
        own = len(node.ifs)
    return own + sum(_branches(child) for child in ast.iter_child_nodes(node))


def _of_class(node: ast.ClassDef, place: str) -> Iterator[Measure]:
    methods = [child for child in node.body if isinstance(child, Function)]
    fields = {child.target.id for child in node.body if isinstance(child, ast.AnnAssign) and _is_name(child.target)}
    for each in (inner for method in methods for inner in ast.walk(method)):
        on_self = isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
        if on_self and isinstance(each.value, ast.Name) and each.value.id == "self":
            fields.add(each.attr)
    yield Measure(place, "methods", len(methods))
    yield Measure(place, "attributes", len(fields))


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def forbidden(text: str, name: str) -> Iterator[str]:
    """What the style never allows, as `line: what`; `name` is the module's own name.

    >>> list(forbidden("from os import *", "mesh"))
    ['1: star import']
    """
    if name.strip("_") in GRAB_BAGS:
        yield f"1: a module named {name!r} is named for nothing"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Global):
            yield f"{node.lineno}: global"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{node.lineno}: print"
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield f"{node.lineno}: relative import"
        elif isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield f"{node.lineno}: star import"


def breaches(found: Mapping[str, int], listed: Mapping[str, int]) -> list[str]:
    """What stands over the limits and is not excused by the list, and entries of the list that are too generous.

    Args:
        found: `path::place::kind` -> value, of everything over its soft limit.
        listed: the committed list.
    """
    wrong = []
    for key, value in found.items():
        kind = key.rsplit("::", 1)[-1]
        if value > HARD[kind]:
            wrong.append(f"{key} is {value}, over the hard limit {HARD[kind]}")
        elif key not in listed:
            wrong.append(f"{key} is {value}, over the limit {SOFT[kind]}")
        elif value > listed[key]:
            wrong.append(f"{key} grew from {listed[key]} to {value}")
    for key, value in listed.items():
        if found.get(key, 0) < value:
            wrong.append(f"{key} is listed with {value} and is better now: python -m tests.house.limits --write")
    return wrong


def tree_breaches() -> dict[str, int]:
    """Everything in the tree that is over a soft limit, as `path::place::kind` -> value."""
    over = {}
    for path in source_files():
        for place, kind, value in measures(path.read_text(encoding="utf-8")):
            if value > SOFT[kind]:
                over[f"{path.relative_to(ROOT)}::{place}::{kind}"] = value
    return over


def lowered(listed: Mapping[str, int], found: Mapping[str, int], *, allow_new: bool) -> dict[str, int]:
    """The next list: never higher and never longer, unless new entries are asked for.

    >>> lowered({"a": 40, "b": 50}, {"a": 38, "c": 60}, allow_new=False)
    {'a': 38}
    """
    kept = {key: value if allow_new else min(value, listed.get(key, 0)) for key, value in found.items()}
    return {key: value for key, value in sorted(kept.items()) if value}


def main(arguments: Iterable[str]) -> int:
    """Prints what is over the limits, or rewrites the list."""
    parser = argparse.ArgumentParser(prog="python -m tests.house.limits", description=__doc__)
    parser.add_argument("--write", action="store_true", help="lower and remove entries of limits.json")
    parser.add_argument("--allow-new", action="store_true", help="with --write: also add and raise entries")
    chosen = parser.parse_args(list(arguments))
    listed, found = json.loads(LEDGER.read_text(encoding="utf-8")), tree_breaches()
    if chosen.write:
        listed = lowered(listed, found, allow_new=chosen.allow_new)
        LEDGER.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    wrong = breaches(found, listed)
    sys.stdout.write("".join(f"{each}\n" for each in wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

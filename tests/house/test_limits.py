"""The ratchet: the tree holds the limits of the house style, and the list of exceptions only shrinks."""

import json
from pathlib import Path

import pytest

from tests.house import limits

LISTED = json.loads(limits.LEDGER.read_text(encoding="utf-8"))
FILES = limits.source_files()


def _name(path: Path) -> str:
    return str(path.relative_to(limits.ROOT))


def test_the_tree_is_found() -> None:
    assert {"parallel", "launch", "clusters", "moe", "src"} <= {
        path.relative_to(limits.ROOT).parts[0] for path in FILES
    }


def test_nothing_is_over_its_limit_or_its_listed_exception() -> None:
    assert limits.breaches(limits.tree_breaches(), LISTED) == []


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_a_module_has_no_global_print_star_or_relative_import_and_a_name(path: Path) -> None:
    assert list(limits.forbidden(path.read_text(encoding="utf-8"), path.stem)) == []


def test_test_files_stay_short() -> None:
    lengths = {_name(path): len(path.read_text().splitlines()) for path in (limits.ROOT / "tests").rglob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > limits.TEST_FILE_LINES} == {}


def test_growth_a_new_breach_and_a_stale_entry_are_each_refused() -> None:
    place = "a.py::f::function lines"
    assert limits.breaches({place: 41}, {place: 40}) == [f"{place} grew from 40 to 41"]
    assert limits.breaches({place: 41}, {}) == [f"{place} is 41, over the limit 35"]
    assert limits.breaches({place: 61}, {place: 61}) == [f"{place} is 61, over the hard limit 60"]
    assert "is better now" in limits.breaches({place: 39}, {place: 40})[0]
    assert "is better now" in limits.breaches({}, {place: 40})[0]
    assert limits.breaches({place: 40}, {place: 40}) == []


def test_writing_the_list_never_raises_or_adds_unless_asked() -> None:
    listed, found = {"x": 40, "gone": 50}, {"x": 45, "new": 38}
    assert limits.lowered(listed, found, allow_new=False) == {"x": 40}
    assert limits.lowered(listed, found, allow_new=True) == {"new": 38, "x": 45}


def test_each_kind_of_measure_sees_what_it_is_for() -> None:
    lines = "".join(f"    x{number} = {number}\n" for number in range(40))
    branches = "".join(f"    if a and b: x = {number}\n" for number in range(6))
    methods = "".join(f"    def m{number}(self): self.a{number} = 1\n" for number in range(16))
    wide = "def wide(a, b, c, d, *, e, f, g): ..."
    text = f"def long():\n{lines}\n{wide}\ndef bushy(a, b):\n{branches}\nclass Big:\n{methods}"
    over = {(m.place, m.kind): m.value for m in limits.measures(text) if m.value > limits.SOFT[m.kind]}
    assert over == {
        ("long", "function lines"): 41,
        ("wide", "arguments"): 7,
        ("wide", "positional arguments"): 4,
        ("bushy", "cyclomatic"): 13,
        ("Big", "methods"): 16,
        ("Big", "attributes"): 16,
    }


@pytest.mark.parametrize(
    ("text", "name", "what"),
    [
        ("def f():\n    global x", "mesh", "2: global"),
        ("print('x')", "mesh", "1: print"),
        ("from os import *", "mesh", "1: star import"),
        ("from . import x", "mesh", "1: relative import"),
        ("", "utils", "1: a module named 'utils' is named for nothing"),
    ],
)
def test_what_is_forbidden_is_found(text: str, name: str, what: str) -> None:
    assert list(limits.forbidden(text, name)) == [what]

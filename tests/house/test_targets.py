"""What continuous integration runs is every test: each belongs to exactly one target of the Makefile."""

import re
from itertools import combinations

import pytest
from _pytest.mark.expression import Expression

from tests.house.tree import ROOT
from tests.later import LATER
from tests.turns import COMPUTING, WAITING

MARKERS = ("slow", "faults", "wide", "lab")


def _expressions() -> dict[str, str]:
    """What each target selects, by its name."""
    makefile = (ROOT / "Makefile").read_text()
    names = dict(re.findall(r"^([A-Z]+) +:= (.*\b(?:slow|wide)\b.*)$", makefile, re.MULTILINE))
    targets: dict[str, str] = {}
    for target in ("test", "wide", "lab"):
        body = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
        assert body is not None, target
        for found in re.findall(r'-m ("\$\(\w+\)"|\w+) ?', body[1]):
            words = names.get(found.strip('"$()'), found)
            targets[f"{target}: {words}"] = words
    return {name: words for name, words in targets.items() if words != "pytest"}


@pytest.mark.parametrize("marks", [each for n in range(5) for each in combinations(MARKERS, n)], ids=" ".join)
def test_a_test_belongs_to_exactly_one_target(marks: tuple[str, ...]) -> None:
    selected = [
        name
        for name, words in _expressions().items()
        if Expression.compile(words).evaluate(lambda mark, **_: mark in marks)
    ]
    assert len(selected) == 1, selected


def test_continuous_integration_runs_them_all_and_those_that_decide_come_first() -> None:
    lines = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("make ")]
    assert lines[:2] == ["make test", "make wide"]
    assert lines[2].startswith("make lab")


def test_files_that_workers_take_first_are_there_once() -> None:
    named = [*WAITING, *COMPUTING]
    assert [each for each in named if not (ROOT / each).is_file()] == []
    assert len(set(named)) == len(named)


def test_long_tests_that_wait_for_a_later_target_are_there() -> None:
    named = [re.split(r"::|\[", each)[:2] for each in LATER]
    gone = [(path, name) for path, name in named if f"def {name}" not in (ROOT / path).read_text(encoding="utf-8")]
    assert gone == []
    assert len(set(LATER)) == len(LATER)

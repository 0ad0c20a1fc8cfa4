"""Files of a run may be missing, torn or hold anything: what can be read of them is."""

import math
from pathlib import Path

import pytest

from meshwright.launch.page.values import finite, json_of, lines_of, listed, number


@pytest.mark.parametrize("value", [True, "3", None, [], 10**400])
def test_what_is_no_number_is_none(value: object) -> None:
    assert number(value) is None


def test_a_number_that_is_not_finite_is_one_and_is_left_out_where_it_could_not_be_drawn() -> None:
    assert number(math.inf) == math.inf
    assert [finite(value) for value in (2, math.inf, math.nan)] == [2.0, None, None]


def test_a_missing_or_torn_file_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "torn").write_text('{"a": 1')
    (tmp_path / "deep").write_text("[" * 100_000)
    assert [json_of(tmp_path / name) for name in ("none", "torn", "deep")] == [None, None, None]
    assert list(lines_of(tmp_path / "none")) == []


def test_lines_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b'{"a": 1}\n[1]\n\xff\n{"a": 2}\n{"a": 3')
    assert list(lines_of(tmp_path / "lines")) == [{"a": 1}, {"a": 2}]
    assert listed([{"a": 1}, 2, [3]]) == [{"a": 1}]
    assert listed({"a": 1}) == []

"""Durations, sizes, names and templates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.launch.values import (
    DIRECTORY_FIELDS,
    check_line,
    check_name,
    check_template,
    check_variable,
    fill,
    format_duration,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90.0), ("10m", 600.0), ("24h", 86400.0), ("1d", 86400.0), ("1.5h", 5400.0), ("1h30m", 5400.0), (0, 0.0)],
)
def test_durations_become_seconds(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("value", [5, 1.5, True, "5", "24:00:00", "", "10 m", "-5s", "5min", "9" * 400 + "h", None, []])
def test_what_is_no_duration_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration(value)


@given(st.integers(0, 10**8), st.sampled_from(["ms", "s", "m"]))
def test_formatted_durations_are_read_back_exactly(number: int, unit: str) -> None:
    seconds = parse_duration(f"{number}{unit}") if number * 60 < 3e8 else float(number)
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.floats(0, 3e8))
def test_any_number_of_seconds_survives_its_text(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("4MiB", 4 << 20), ("900GiB", 900 << 30), ("1.5KB", 1500), ("7 B", 7), (12, 12), ("1TB", 10**12)]
)
def test_sizes_become_bytes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("value", ["4", "4Mb", "4M", "0.3B", -1, True, 1.5, None, "1e3B", "99999999TiB"])
def test_what_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(value)


def test_a_wrong_unit_of_bytes_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'MiB'"):
        parse_size("4Mib")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a b", "a\n", "é", "x" * 101, "~"])
def test_names_that_are_no_safe_directory_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected a name"):
        check_name(name)


@pytest.mark.parametrize("text", ["", "  ", "a\x1bb", "a\nb", "\x7f", "a\u2028b"])
def test_lines_hold_no_control_characters(text: str) -> None:
    with pytest.raises(ValueError, match="expected one line"):
        check_line(text)


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A=B", "A B"])
def test_variables_have_shell_names(name: str) -> None:
    with pytest.raises(ValueError, match="expected a variable name"):
        check_variable(name)


@pytest.mark.parametrize("text", ["{nam}", "{name!r}", "{name:>9}", "{", "}", "{}", "{0}", "{name.__class__}", "{{a}"])
def test_templates_take_known_plain_fields_only(text: str) -> None:
    with pytest.raises(ValueError, match=r"\{name\}, \{run_id\}"):
        check_template(text, DIRECTORY_FIELDS)


def test_filling_leaves_foreign_braces_alone() -> None:
    assert fill('{"a": 1} {name} ${x} {run_id}', name="n", run_id="r") == '{"a": 1} n ${x} r'
    assert fill("{name}", name="{run_id}", run_id="r") == "{run_id}", "filled text is not filled again"

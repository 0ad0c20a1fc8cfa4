"""Lines of ranks are whole, clean and without secrets."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.clusters.masking import Mask
from meshwright.clusters.records import clean_line, log_end
from meshwright.launch.logs import LogTail


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b"plain", "plain"),
        (b"\x1b[1;31mred\x1b[0m", "red"),
        (b"\x1b]0;title\x07text", "text"),
        (b"\x1b]52;c;aGVsbG8=\x1b\\text", "text"),
        (b"10%\r20%\r", "20%"),
        (b"a\x08b\x00c", "abc"),
        ("smørrebrød".encode(), "smørrebrød"),
        (b"\xff", "\ufffd"),
        (b"windows\r", "windows"),
    ],
)
def test_a_line_is_safe_on_a_terminal(raw: bytes, line: str) -> None:
    assert clean_line(raw) == line


@given(st.binary(max_size=200))
def test_no_control_character_gets_through(raw: bytes) -> None:
    assert all(
        each == "\t" or each == "\n" or (each >= " " and not "\x7f" <= each <= "\x9f") for each in clean_line(raw)
    )


@given(st.binary(max_size=300), st.lists(st.integers(1, 40), max_size=20))
def test_a_tail_loses_and_invents_nothing(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("tail") / "log"
    lines: list[bytes] = []
    tail = LogTail(path, lines.append)
    assert not tail.read()
    with path.open("wb", buffering=0) as file:
        for cut in [*cuts, len(raw)]:
            file.write(raw[:cut])
            raw = raw[cut:]
            tail.read()
    tail.close()
    expected = path.read_bytes().split(b"\n")
    assert lines == (expected[:-1] if not expected[-1] else expected)


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    lines: list[bytes] = []
    tail = LogTail(tmp_path / "log", lines.append)
    with (tmp_path / "log").open("wb", buffering=0) as file:
        file.write(b"half")
        tail.read()
        assert lines == []
        file.write(b" done\n")
        tail.read()
    assert lines == [b"half done"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("private\n")
    (tmp_path / "log").symlink_to(tmp_path / "other")
    assert not LogTail(tmp_path / "log", list).read()


def test_the_longest_secret_is_masked_first_and_each_line_of_one() -> None:
    mask = Mask(["pass", "password", "line one\nline two"])
    assert mask("password pass line two") == "*** *** ***"
    assert Mask([])("pass") == "pass"


def test_the_end_of_a_log_is_its_end(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("x" * 100 + "\nend\n")
    assert log_end(tmp_path / "log", max_bytes=10) == "xxxxx\nend"
    assert log_end(tmp_path / "none") == ""

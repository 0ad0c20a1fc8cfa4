"""What pods print again of pods before them, so that it is found by whoever had not fetched it."""

import io
import json
from pathlib import Path

import pytest

from meshwright.clusters.masking import Mask
from meshwright.clusters.pod_lines import Printer, last_lines, left_of, missing_of


def logs(folder: Path, **texts: str) -> Path:
    (folder / "logs").mkdir()
    for name, text in texts.items():
        (folder / "logs" / f"rank-{name.replace('__', '.attempt-')}.log").write_text(text)
    return folder


def test_the_last_lines_of_all_attempts_are_left_in_their_order(tmp_path: Path) -> None:
    texts = {"0": "a\nb\n", "0__2": "c\nd\x1b[31m", "0__10": "e\n", "1": "", "10": "of another\n"}
    assert left_of(logs(tmp_path, **texts), [0, 1]) == {0: ["a", "b", "c", "d", "e"]}


def test_of_many_lines_the_last_are_left_and_none_is_torn(tmp_path: Path) -> None:
    logs(tmp_path, **{"0": "".join(f"line {number}\n" for number in range(100_000))})
    (found,) = left_of(tmp_path, [0]).values()
    assert found[-1] == "line 99999"
    assert found == [f"line {number}" for number in range(100_000 - len(found), 100_000)]
    assert 7000 < sum(map(len, found)) < 8192
    known = last_lines(tmp_path / "logs/rank-0.log")
    assert len(known) > len(found), "or what is known could not be told from what is left"
    assert last_lines(tmp_path / "logs/rank-7.log") == []


@pytest.mark.parametrize(
    ("known", "left", "missing"),
    [
        ("", "abc", "abc"),
        ("abc", "abc", ""),
        ("xxabc", "bcd", "d"),
        ("abc", "xyz", "xyz"),
        ("xx", "xxx", "x"),
        ("abc", "", ""),
        ("ab", "xab", "x"),
        ("sta", "stpab", "pb"),
        ("abc", "bba", "b"),
        ("abcdef", "xya", "xya"),
    ],
)
def test_only_what_was_not_known_is_missing(known: str, left: str, missing: str) -> None:
    assert missing_of(list(known), list(left)) == list(missing)


def test_what_is_left_is_printed_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    Printer("n0", [0], Mask(["hidden"])).begin([], {0: ["it is hidden"]})
    first, second = (json.loads(line)["meshwright"] for line in out.getvalue().splitlines())
    assert first == {"node": "n0", "rank": 0, "left": ["it is ***"]}
    assert second == {"node": "n0", "events": [], "files": {}}

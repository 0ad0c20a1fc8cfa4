"""What ranks write themselves has its secrets masked afterwards, whatever is written meanwhile."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.clusters.masking import Concealer, Mask, logs_of
from meshwright.clusters.records import clean_line

SECRET = "s3cr3t-'\"-\\-ü-value"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs/rank-0.log"


def test_a_secret_is_masked_in_every_form_in_which_python_writes_it() -> None:
    mask = Mask([SECRET, "first line\nx\nsecond line"])
    shown = [
        SECRET,
        repr(SECRET),
        ascii(SECRET),
        json.dumps(SECRET),
        json.dumps(repr(SECRET)),
        "first line",
        "second line",
    ]
    assert not any(part in mask(text) for text in shown for part in ("cr3t", "value", "line"))
    assert mask("x stays, as a line that says nothing does") == "x stays, as a line that says nothing does"


@pytest.mark.parametrize("secret", ["tok-123", 'a "quoted" one', "back\\slash", "s\u00f8 h\u00e9", "more\nlines", "x"])
def test_no_value_and_no_key_inside_of_what_goes_out_as_json_holds_a_secret(secret: str) -> None:
    told = {"files": [{secret: 1, "then": f"9 {secret}!"}, (secret, None, 2.5)]}
    hidden = json.loads(json.dumps(Mask([secret]).inside(told)))
    shown = "\n".join("***" for _ in secret.splitlines())
    assert hidden == {"files": [{shown: 1, "then": f"9 {shown}!"}, [shown, None, 2.5]]}


def test_what_is_overwritten_in_place_moves_nothing_and_reads_as_a_mask(log: Path) -> None:
    with log.open("ab", buffering=0) as rank:
        rank.write(f"a {SECRET} b\n".encode())
        concealer = Concealer(log.parents[1], [SECRET])
        concealer.look()
        assert SECRET.encode() in log.read_bytes(), "who follows it may not have read it to the end"
        rank.write(f"c {SECRET[:5]}".encode())
        concealer.look()
        rank.write(f"{SECRET[5:]} d\n".encode())
        assert SECRET.encode() in log.read_bytes(), "the second one is new"
        concealer.look()
        concealer.look()
    assert SECRET.encode() not in log.read_bytes()
    assert [clean_line(line) for line in log.read_bytes().splitlines()] == ["a *** b", "c *** d"]
    assert log.stat().st_size == len(f"a {SECRET} bc {SECRET} d".encode()) + 2


@given(
    st.lists(st.sampled_from(["word ", "\n", SECRET, SECRET[:7], SECRET[7:], "other secret", "s3cr3t"]), max_size=40),
    st.data(),
)
def test_nothing_is_lost_or_torn_and_no_secret_stays(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "logs").mkdir()
    log, values = folder / "logs/rank-0.log", [SECRET, "other secret"]
    concealer, whole = Concealer(folder, values), "".join(parts).encode()
    with log.open("ab", buffering=0) as rank:
        at = 0
        while at < len(whole):
            end = data.draw(st.integers(at + 1, len(whole)))
            rank.write(whole[at:end])
            at = end
            concealer.look()
    concealer.finish()
    left = log.read_bytes() if log.exists() else b""
    assert len(left) == len(whole)
    assert left.replace(b"\x7f", b"").decode() == Mask(values)(whole.decode())


def test_records_stay_records(tmp_path: Path) -> None:
    (tmp_path / "errors").mkdir()
    record = tmp_path / "errors/rank-1.json"
    record.write_text(json.dumps({"rank": 1, "traceback": f"ValueError: {SECRET!r}\n{SECRET}"}))
    Concealer(tmp_path, [SECRET]).finish()
    assert json.loads(record.read_text()) == {"rank": 1, "traceback": "ValueError: '***'\n***"}
    assert record.stat().st_mode & 0o777 == 0o600


def test_a_link_out_of_the_run_directory_is_left_alone(log: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text(SECRET)
    os.symlink(other, log)
    Concealer(log.parents[1], [SECRET]).finish()
    assert other.read_text() == SECRET


def test_what_is_masked_is_not_read_again_until_more_is_there(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr(os, "open", lambda *given, of=os.open: (opened.append(given[0]), of(*given))[1])
    concealer = Concealer(log.parents[1], [SECRET])
    log.write_text(f"a {SECRET[:9]}")
    for _ in range(4):
        concealer.look()
    assert len(opened) == 1
    with log.open("a") as rank:
        rank.write(f"{SECRET[9:]} b")
    for _ in range(4):
        concealer.look()
    assert len(opened) == 2
    assert SECRET not in log.read_text()


def test_a_secret_that_is_short_or_looks_like_a_number_leaves_everything_else_whole(log: Path, tmp_path: Path) -> None:
    (tmp_path / "errors").mkdir()
    record = tmp_path / "errors/rank-0.json"
    record.write_text(json.dumps({"time_unix_s": 1234567890.5, "message": "pin 4567 of a"}))
    log.write_bytes(b"ab\nab c\n")
    Concealer(tmp_path, ["4567", " ab\n"]).finish()
    assert json.loads(record.read_text()) == {"time_unix_s": 1234567890.5, "message": "pin *** of a"}
    assert log.read_bytes() == b"**\n** c\n"


def test_a_node_masks_the_logs_of_its_own_ranks(log: Path, tmp_path: Path) -> None:
    names = ("rank-0.log", "rank-0.attempt-1.log", "rank-10.log", "rank-1.log", "agent-n[0].log", "agent-n0.log")
    for name in names:
        (log.parent / name).write_text(SECRET)
    Concealer(tmp_path, [SECRET], logs=logs_of({"ranks": [0, 10], "name": "n[0]"})).finish()
    left = [name for name in names if SECRET in (log.parent / name).read_text()]
    assert left == ["rank-1.log", "agent-n0.log"]

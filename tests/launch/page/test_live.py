"""While a run goes on, its page is written again where something is new; whatever befalls it, the run is left alone."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshwright.clusters.base import Limits, Meeting, StartPlan
from meshwright.launch.page import live
from meshwright.launch.page.live import LivePage
from meshwright.launch.page.write import write_page
from meshwright.launch.supervise import RunState
from tests.launch.page.made import write_run


def state(attempt: int = 0, *, begun: bool = True) -> RunState:
    plan = StartPlan("local", "j", "r", "/r", (), (), None, Meeting(None), Limits(), ())
    return RunState(plan, attempt, attempt_unix_s=1.0 if begun else 0.0)


def written(page: LivePage, found: RunState) -> None:
    """Looks once, and waits for the page."""
    page._next_s = 0.0
    page(found)
    if page._thread is not None:
        page._thread.join(60)


def test_the_page_says_how_the_run_stands_and_asks_for_itself_again(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "r")
    page = LivePage(run_dir, print, every_s=7.5)
    written(page, state(2))
    text = (run_dir / "page.html").read_text()
    assert 'class="pill running">running<' in text
    assert "<span>step 200 of 250</span><span>attempt 2</span><span>at 2" in text
    assert '<meta http-equiv="refresh" content="8">' in text


def test_it_is_written_only_where_something_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, times = write_run(tmp_path / "r"), []
    monkeypatch.setattr(live, "write_page", lambda *words, **more: times.append(more["live"].attempt))
    page = LivePage(run_dir, print)
    for _ in range(3):
        written(page, state())
    assert times == [0]
    (run_dir / "nodes").mkdir()
    (run_dir / "nodes/n0.jsonl").write_text("{}\n")
    written(page, state())
    (run_dir / "health.jsonl").write_text("{}\n")
    written(page, state())
    written(page, state(1))
    assert times == [0, 0, 0, 1]


def test_it_waits_for_ranks_and_for_its_time(tmp_path: Path) -> None:
    page = LivePage(write_run(tmp_path / "r"), print, every_s=600.0)
    page(state(begun=False))
    assert page._thread is None
    page(state())
    first = page._thread
    assert first is not None
    first.join(60)
    page(state(1))
    assert page._thread is first


def test_an_error_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def fail(*words: Any, **more: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(live, "write_page", fail)
    page = LivePage(write_run(tmp_path / "r"), said.append)
    for attempt in range(4):
        written(page, state(attempt))
    assert said == ["meshwright: page.html waits for the end of the run: OSError: the disk is full"]


def test_what_cannot_be_drawn_again_and_again_is_drawn_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(live, "_MOST_BYTES", 1000)
    page = LivePage(write_run(tmp_path / "r"), said.append)
    written(page, state())
    written(page, state())
    assert "up to 1,000 are drawn while it goes on" in said[0]
    assert not (tmp_path / "r/page.html").exists()


def test_a_file_system_that_hangs_keeps_nobody_and_gets_no_second_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on, times = threading.Event(), threading.Event(), []

    def hang(*words: Any, **more: Any) -> None:
        times.append(1)
        began.set()
        go_on.wait(60)

    monkeypatch.setattr(live, "write_page", hang)
    monkeypatch.setattr(live, "_LAST_S", 0.05)
    page = LivePage(write_run(tmp_path / "r"), print, every_s=0.0)
    page(state())
    assert began.wait(60)
    for attempt in range(5):
        page(state(attempt))
    page.close()
    page(state(9))
    go_on.set()
    assert times == [1]


def test_a_page_that_comes_late_does_not_take_the_place_of_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, began, go_on, sync = write_run(tmp_path / "r"), threading.Event(), threading.Event(), os.fsync

    def hang(file: int) -> None:
        if threading.current_thread().name == "page":
            began.set()
            go_on.wait(60)
        sync(file)

    monkeypatch.setattr(os, "fsync", hang)
    monkeypatch.setattr(live, "_LAST_S", 0.05)
    page = LivePage(run_dir, print, every_s=0.0)
    page(state())
    assert began.wait(60)
    page.close()
    write_page(run_dir, state="succeeded")
    last = (run_dir / "page.html").read_text()
    go_on.set()
    assert page._thread is not None
    page._thread.join(60)
    assert (run_dir / "page.html").read_text() == last
    assert "succeeded" in last
    assert not list(run_dir.glob(".page*")), "nothing is left behind"


def test_a_page_that_takes_long_is_written_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, now_s = LivePage(write_run(tmp_path / "r"), print, every_s=0.0), [100.0]

    def slow(*words: Any, **more: Any) -> None:
        now_s[0] += 3.0

    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    monkeypatch.setattr(live, "write_page", slow)
    page(state())
    assert page._thread is not None
    page._thread.join(60)
    assert page._next_s == 103.0 + 20 * 3.0

"""A launcher and agents that share a folder: what one says the other hears, also when a node is cut off."""

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.clusters import files
from meshwright.clusters.files import FileLine, StepHandle, alive_file, step_folder
from meshwright.clusters.slurm import named, plan_slurm
from tests.clusters.test_lines import room
from tests.clusters.test_slurm import OPTIONS, REQUEST
from tests.launch.waiting import eventually


def started(run_dir: Path, *, reached: bool, warning: Callable[[bool], str | None] = lambda asked: None) -> StepHandle:
    """Two nodes, started by a command that does not end by itself."""
    (run_dir / "private").mkdir()
    plan = named(plan_slurm(replace(REQUEST, run_dir=run_dir), OPTIONS), ["gpu7", "gpu9"])
    return StepHandle(plan, {}, words=["sleep", "600"], warning=warning, reached=lambda: reached)


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[StepHandle]:
    """Two nodes, of which the first hears of the queue's controller."""
    found = started(tmp_path, reached=True)
    yield found
    found.kill()


def test_a_node_that_is_cut_off_is_named_and_not_waited_for(handle: StepHandle, tmp_path: Path) -> None:
    first = FileLine(step_folder(tmp_path), 0)
    first.tell("unheard", of=1)
    assert [event for event in handle.poll(1.0) if event["event"] == "gone"] == [
        {
            "node": "gpu9",
            "event": "gone",
            "code": 69,
            "exit_code": 69,
            "message": "node gpu9: it was not heard of over the network for 10 s; is it up, and its link?",
        }
    ]
    assert not handle.done, "the first node has not ended"
    first.tell("unheard", of=1)
    first.tell("result", state="stopped", message="")
    assert [event["event"] for event in handle.poll(1.0)] == ["unheard", "result"], "it is named once"
    assert handle.done
    began_s = time.monotonic()
    handle.kill()
    assert time.monotonic() - began_s < 3
    assert handle.poll(0.0) == []


def test_a_first_node_that_hears_of_nobody_is_the_one_that_is_cut_off(tmp_path: Path) -> None:
    handle = started(tmp_path, reached=False)
    try:
        FileLine(step_folder(tmp_path), 0).tell("unheard", of=1)
        told = {event["event"]: event for event in handle.poll(1.0)}
        assert told["health"]["node"] == told["gone"]["node"] == "gpu7"
        assert told["gone"]["message"] == (
            "node gpu7: neither gpu9, for 10 s, nor the queue's controller was heard of over the network; "
            "its own link seems to be cut"
        )
        assert not handle.done, "its own agent has not ended"
        FileLine(step_folder(tmp_path), 0).tell("result", state="stopped", message="")
        handle.poll(1.0)
        assert handle.done
    finally:
        handle.kill()


def test_a_launcher_is_heard_of_until_it_has_ended_and_no_longer(handle: StepHandle, tmp_path: Path) -> None:
    before = alive_file(tmp_path).stat().st_mtime_ns
    assert eventually(lambda: bool(handle.poll(0.0)) or alive_file(tmp_path).stat().st_mtime_ns > before, 20)
    handle.kill()
    assert not alive_file(tmp_path).exists()
    time.sleep(2.5)
    handle.poll(0.0)
    assert not alive_file(tmp_path).exists()


def test_a_launcher_that_waits_for_the_queue_is_heard_of_and_one_that_looks_no_more_is_not(
    handle: StepHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched() -> int:
        return alive_file(tmp_path).stat().st_mtime_ns

    before = touched()
    assert eventually(lambda: touched() > before, 20), "nothing is asked of the handle meanwhile"
    monkeypatch.setattr("meshwright.clusters.files._STALLED_S", 0.0)
    time.sleep(0.5)  # for a touch that had begun
    before = touched()
    time.sleep(5.0)
    assert touched() == before


def test_a_node_that_has_ended_cannot_be_cut_off(handle: StepHandle, tmp_path: Path) -> None:
    FileLine(step_folder(tmp_path), 1).tell("result", state="succeeded", message="")
    assert [event["event"] for event in handle.poll(1.0)] == ["result"]
    FileLine(step_folder(tmp_path), 0).tell("unheard", of=1)
    assert [event["event"] for event in handle.poll(1.0)] == ["unheard"]
    assert not handle.done


def test_a_warning_is_repeated_for_those_that_do_not_listen_yet(tmp_path: Path) -> None:
    asked: list[bool] = []

    def warning(each: bool) -> str | None:
        asked.append(each)
        return "SIGUSR2" if len(asked) > 1 else None

    handle = started(tmp_path, reached=True, warning=warning)
    try:
        FileLine(step_folder(tmp_path), 1).tell("asked")
        assert [event["event"] for event in handle.poll(1.0)] == ["asked"]
        commands = step_folder(tmp_path) / "command.jsonl"
        assert not commands.exists()
        words = '{"command": "leave", "signal": "SIGUSR2"}\n'
        assert eventually(lambda: bool(handle.poll(0.0)) or commands.read_text() == words * 3, 10)
        assert asked[:3] == [False, True, False]
    finally:
        handle.kill()


def test_what_agents_hear_when_they_are_killed_is_no_warning(tmp_path: Path) -> None:
    asked: list[bool] = []

    def warning(each: bool) -> None:
        asked.append(each)

    handle = started(tmp_path, reached=True, warning=warning)
    FileLine(step_folder(tmp_path), 1).tell("asked")
    handle.kill()
    while not handle.done:
        handle.poll(0.1)
    assert True not in asked


def test_agents_that_are_asked_to_end_without_a_warning_are_told_to(tmp_path: Path) -> None:
    handle = started(tmp_path, reached=True, warning=lambda asked: "" if asked else None)
    try:
        FileLine(step_folder(tmp_path), 1).tell("asked")
        handle.poll(1.0)
        handle.poll(0.0)
        handle.poll(0.0)
        assert (step_folder(tmp_path) / "command.jsonl").read_text() == '{"command": "stop"}\n'
    finally:
        handle.kill()


def test_secrets_and_the_key_lie_there_until_every_agent_has_them(handle: StepHandle, tmp_path: Path) -> None:
    lines = [FileLine(step_folder(tmp_path), node) for node in (0, 1)]
    for left, line in ((True, lines[0]), (False, lines[1])):
        assert next(line.messages())["secrets"] == {}
        line.tell("joined", host="h", shared=True)
        handle.poll(1.0)
        assert (step_folder(tmp_path) / "start.json").exists() == left


def test_a_full_disk_costs_no_event_and_keeps_nobody_from_ending(handle: StepHandle, tmp_path: Path) -> None:
    agent = FileLine(step_folder(tmp_path), 1)
    messages = agent.messages()
    next(messages)
    agent.tell("started", attempt=0)
    handle.poll(1.0)
    with room(10):
        agent.tell("exit", rank=2)
        assert handle.poll(0.1) == []
        handle.stop()
        handle.poll(0.1)
    handle.poll(0.0)
    assert eventually(lambda: next(messages)["command"] == "stop", 10)
    agent.tell("result", state="stopped", message="")
    assert [event["event"] for event in handle.poll(1.0)] == ["exit", "result"]
    with room(10):
        handle.kill()
    assert not (step_folder(tmp_path) / "start.json").exists()


def test_an_agent_hears_the_plan_its_lease_and_what_is_said(handle: StepHandle, tmp_path: Path) -> None:
    messages = FileLine(step_folder(tmp_path), 1).messages()
    first = next(messages)
    assert (first["node"], first["lease_s"], first["plan"]["run_id"]) == (1, 10.0, "r1")
    handle.stop()
    assert eventually(lambda: next(messages)["command"] == "stop", 10)
    told = (step_folder(tmp_path) / "command.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in told] == [{"command": "stop"}]


def test_what_is_said_while_a_run_is_killed_is_heard_once(
    handle: StepHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_KILL_WAIT_S", 0.3)
    FileLine(step_folder(tmp_path), 0).tell("result", state="stopped", message="")
    handle.kill()
    assert [event["event"] for event in handle.poll(0.0)] == ["result", "gone"]


def test_a_launcher_that_can_open_no_file_does_not_take_agents_for_silent(
    handle: StepHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FileLine(step_folder(tmp_path), 0).tell("joined", shared=True)

    def none_left(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as full:
        full.setattr(Path, "open", none_left)
        with pytest.raises(OSError, match="Too many open files"):
            handle.poll(0.0)
    assert [event["event"] for event in handle.poll(1.0)] == ["joined"]

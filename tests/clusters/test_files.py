"""A launcher and agents that share a folder: what one says the other hears, also when a node is cut off."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.clusters.files import FileLine, StepHandle, step_folder
from meshwright.clusters.slurm import named, plan_slurm
from tests.clusters.test_slurm import OPTIONS, REQUEST
from tests.launch.waiting import eventually


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[StepHandle]:
    """Two nodes, started by a command that does not end by itself."""
    (tmp_path / "private").mkdir()
    plan = named(plan_slurm(replace(REQUEST, run_dir=tmp_path), OPTIONS), ["gpu7", "gpu9"])
    found = StepHandle(plan, {}, words=["sleep", "600"], warning=lambda: None)
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


def test_a_node_that_has_ended_cannot_be_cut_off(handle: StepHandle, tmp_path: Path) -> None:
    FileLine(step_folder(tmp_path), 1).tell("result", state="succeeded", message="")
    assert [event["event"] for event in handle.poll(1.0)] == ["result"]
    FileLine(step_folder(tmp_path), 0).tell("unheard", of=1)
    assert [event["event"] for event in handle.poll(1.0)] == ["unheard"]
    assert not handle.done


def test_an_agent_hears_the_plan_its_lease_and_what_is_said(handle: StepHandle, tmp_path: Path) -> None:
    messages = FileLine(step_folder(tmp_path), 1).messages()
    first = next(messages)
    assert (first["node"], first["lease_s"], first["plan"]["run_id"]) == (1, 10.0, "r1")
    handle.stop()
    assert eventually(lambda: next(messages)["command"] == "stop", 10)
    told = (step_folder(tmp_path) / "command.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in told] == [{"command": "stop"}]

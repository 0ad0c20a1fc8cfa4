"""A launcher's end of many pipes: who reads late or never delays nobody, and everybody is told their own part only."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters.base import NodePlan, StartPlan
from meshwright.clusters.channel import Channel
from meshwright.clusters.pipes import Far, PipeHandle, agents_of, part_of
from meshwright.clusters.ssh import SshHost, SshOptions, plan_ssh
from tests.clusters.test_ssh import REQUEST

LATE_S, LOST_AFTER_S = 3.0, 1.5
BIG = {"files": {"job.json": "x" * 500_000}}
"""More than a pipe takes at once."""

PRETENDED_AGENT = """
import json, os, sys, threading, time
time.sleep(float(sys.argv[1]))
told, heard_s = json.loads(sys.stdin.readline()), [time.monotonic()]
def say(**event):
    os.write(1, json.dumps(event).encode() + b"\\n")
def listen():
    for line in sys.stdin:
        heard_s[0] = time.monotonic()
        command = json.loads(line)["command"]
        if command == "kill":
            break
        if command != "alive":
            say(event="heard", command=command)
    os._exit(0)
say(event="joined", node_told=told["node"], size=len(told["files"]["job.json"]))
threading.Thread(target=listen, daemon=True).start()
while time.monotonic() - heard_s[0] < told["lost_after_s"]:
    time.sleep(0.02)
say(event="result", state="abandoned")
"""


def plan_of(num_nodes: int) -> StartPlan:
    hosts = [SshHost(f"host{index:03d}", f"10.0.{index // 250}.{index % 250}", 8) for index in range(num_nodes)]
    return plan_ssh(replace(REQUEST, num_nodes=num_nodes, ranks_per_node=8), hosts, SshOptions())


def explained(name: str, code: int) -> Mapping[str, Any]:
    return {"message": f"{name} ended with {code}"}


Start = Callable[..., PipeHandle]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts pretended agents that read after so many seconds each."""
    handles: list[PipeHandle] = []

    def begin(*reads_after_s: float) -> PipeHandle:
        plan = plan_of(len(reads_after_s))
        agents = {
            node.name: subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", PRETENDED_AGENT, str(after_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
            )
            for node, after_s in zip(plan.nodes, reads_after_s, strict=True)
        }
        far = Far(BIG, LOST_AFTER_S, explained, lambda event: None)
        handles.append(PipeHandle(plan, agents, {}, far=far))
        return handles[-1]

    yield begin
    for each in handles:
        each.kill()


def polled(handle: PipeHandle, until: Callable[[list[dict[str, Any]]], bool], timeout_s: float = 30.0) -> list[Any]:
    events: list[dict[str, Any]] = []
    end_s = time.monotonic() + timeout_s
    while not until(events) and time.monotonic() < end_s:
        events += handle.poll(0.1)
    return events


def test_hosts_that_read_late_delay_nobody_and_nobody_gives_the_launcher_up(start: Start) -> None:
    began_s = time.monotonic()
    handle = start(0.0, LATE_S, LATE_S, 0.0)
    assert time.monotonic() - began_s < LATE_S / 2, "nobody is waited for"
    events = polled(handle, lambda events: len(events) >= 4)
    assert [event["event"] for event in events] == ["joined"] * 4, "none has given the launcher up"
    assert {event["node"] for event in events[:2]} == {"host000", "host003"}, "those that read at once come first"
    assert [event["node_told"] for event in events] == [int(event["node"][-3:]) for event in events]
    assert {event["size"] for event in events} == {500_000}, "all of a long message comes"


def test_a_host_that_never_reads_holds_up_neither_words_to_others_nor_the_end(start: Start) -> None:
    handle = start(600.0, 0.0)
    polled(handle, lambda events: len(events) >= 1)
    handle.stop()
    (heard,) = polled(handle, lambda events: len(events) >= 1)
    assert (heard["node"], heard["command"]) == ("host001", "stop")
    began_s = time.monotonic()
    handle.kill()
    assert time.monotonic() - began_s < 10
    assert sorted(event["node"] for event in handle.poll(0.0) if event["event"] == "gone") == ["host000", "host001"]
    assert handle.done


def test_a_node_is_told_all_of_itself_and_of_others_that_they_are_there() -> None:
    whole = json.loads(json.dumps(asdict(plan_of(512))))
    part = part_of(whole, 300)
    assert part["nodes"][300] == whole["nodes"][300]
    assert [node["index"] for node in part["nodes"]] == list(range(512)), "ranks are numbered as before"
    assert {**part, "nodes": whole["nodes"]} == whole
    assert len(json.dumps(part)) < 16_384, "it fits into a pipe, whatever reads it when"


def test_handles_that_have_ended_hold_no_descriptor(start: Start) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        handle = start(0.0)
        polled(handle, lambda events: len(events) >= 1)
        handle.kill()
        handle.poll(0.0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_a_launcher_that_died_did_not_say_to_the_end_is_not_obeyed(tmp_path: Path) -> None:
    script = f"import sys; from {Channel.__module__} import Channel; sys.stderr.write(repr(list(Channel().messages())))"
    said = b'{"command": "alive"}\n{"command": "meet", "addr'
    done = subprocess.run([sys.executable, "-c", script], input=said, capture_output=True, check=False)
    assert done.stderr.decode() == "[{'command': 'alive'}]"


def test_where_one_agent_cannot_be_started_none_is_left() -> None:
    made: list[subprocess.Popen[bytes]] = []

    def begin(node: NodePlan) -> subprocess.Popen[bytes]:
        words = ["sleep", "600"] if node.index < 2 else ["/there/is/no/such/program"]
        made.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0))
        return made[-1]

    with pytest.raises(FileNotFoundError):
        agents_of(plan_of(3).nodes, begin)
    assert [agent.poll() for agent in made] == [-9, -9]

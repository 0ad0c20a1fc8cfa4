"""The program of one pod: its node's launcher, which starts the agent, prints what ranks write, and ends as they do.

It is told by variables: MESHWRIGHT_PLAN and MESHWRIGHT_FILES (JSON), MESHWRIGHT_KEY, the values of secrets, and
JOB_COMPLETION_INDEX, which Kubernetes gives to the pods of an indexed job. Pods meet at the first one, whose name the
plan has and whose port is fixed; a pod that comes before the name is known waits for it.
"""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from meshwright.clusters.deaths import exit_code_of
from meshwright.clusters.masking import Concealer, Mask, conceal_while, logs_of
from meshwright.clusters.node_counters import FOLDER, thinned
from meshwright.clusters.records import clean_line
from meshwright.clusters.sending import Sender, make_run_dir
from meshwright.clusters.spawn import end_agent, spawn_agent

__all__ = ["code_of", "main"]

_RETRY_S = 0.5
_RECORD = re.compile(r"errors/[^/]+\.json|ranks/[0-9]+/error\.json|nodes/[^/]+\.jsonl")
_MOST_COUNTED = 100
_OF_RANK = re.compile(r"(?:logs/rank-|errors/rank-|ranks/)([0-9]+)")
_KEPT = ("started", "exit", "decided", "health", "result")
_CODES = {"setup_failed": 70, "rendezvous_failed": 76, "error": 70, "stopped": 143, "abandoned": 143}
Event = Mapping[str, Any]


def code_of(events: Sequence[Event], status: int) -> int:
    """A pod's exit code from the events of its agent: that of the first rank that failed by itself, else the agent's.

    >>> exits = [{"event": "exit", "rank": 0, "code": -15, "ended_by_us": True, "time_unix_s": 1.0, "attempt": 0}]
    >>> exits += [{"event": "exit", "rank": 1, "code": 7, "ended_by_us": False, "time_unix_s": 2.0, "attempt": 0}]
    >>> code_of([*exits, {"event": "result", "state": "failed", "message": ""}], 0)
    7
    """
    results = [event for event in events if event["event"] == "result"]
    if not results:
        return exit_code_of(status) or 70
    if results[-1]["state"] == "succeeded":
        return 0
    exits = [each for each in events if each["event"] == "exit"]
    newest = max((each["attempt"] for each in exits), default=0)
    own = [each for each in exits if each["code"] and not each["ended_by_us"] and each["attempt"] == newest]
    if own:
        return exit_code_of(min(own, key=lambda each: float(each["time_unix_s"]))["code"])
    return _CODES.get(results[-1]["state"], 1)


class _Printer:
    """Prints what grows in the logs of ranks, a line at a time, each with its host and rank, without secrets.

    Args:
        host: of this pod.
        ranks: of this pod; on a volume that pods share, logs of others lie beside theirs.
        mask: takes secrets out.
    """

    def __init__(self, host: str, ranks: Collection[int], mask: Mask) -> None:
        self._host, self._ranks, self._mask = host, ranks, mask
        self._counted = f"{FOLDER}/{host}.jsonl"
        self._rest: dict[str, bytes] = {}
        self.records: dict[str, str] = {}

    def __call__(self, event: str, **part: Any) -> None:
        """Takes what was written to a file; error records are kept until the end."""
        name, data = str(part["path"]), base64.b64decode(part["data"])
        found = _OF_RANK.match(name)
        if found and int(found[1]) not in self._ranks:
            return
        if name.startswith("logs/rank-"):
            *lines, self._rest[name] = (self._rest.get(name, b"") + data).split(b"\n")
            self._print(name, lines)
        elif _RECORD.fullmatch(name) and (name == self._counted or not name.startswith(FOLDER)):
            self.records[name] = (self.records[name] if part["at"] else "") + data.decode(errors="replace")

    def _print(self, name: str, lines: list[bytes]) -> None:
        rank = name.split("-")[1].partition(".")[0]
        sys.stdout.write("".join(f"{self._host}:{rank} {self._mask(clean_line(line))}\n" for line in lines))
        sys.stdout.flush()

    def finish(self, code: int, events: Sequence[Event]) -> None:
        """Prints lines that were not ended, and the record by which who looks from outside tells what happened."""
        for name, line in self._rest.items():
            self._print(name, [line] if line else [])
        files = {}
        for name, text in self.records.items():
            with suppress(ValueError):  # a rank that was killed while it wrote
                files[name] = _few(text) if name.endswith(".jsonl") else json.loads(text)
        told = {"node": self._host, "exit_code": code, "events": events, "files": files}
        sys.stdout.write(json.dumps({"meshwright": self._mask.inside(told)}) + "\n")


def _few(text: str) -> list[Mapping[str, Any]]:
    """Counters of a node, as few as fit into a line of a log."""
    records: list[Mapping[str, Any]] = [json.loads(line) for line in text.splitlines()]
    while len(records) > _MOST_COUNTED:
        records = thinned(records)
    return records


def _first_pod(meeting: Mapping[str, Any], timeout_s: float) -> str | None:
    """The address of the first pod, once it listens; None where it does not in time."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        with suppress(OSError):
            address = socket.gethostbyname(meeting["host"])
            socket.create_connection((address, meeting["port"]), 5.0).close()
            return address
        time.sleep(_RETRY_S)
    return None


def _say(agent: "subprocess.Popen[bytes]", message: Mapping[str, Any]) -> None:
    assert agent.stdin is not None, "it was started with a pipe"
    left = memoryview(json.dumps(message).encode() + b"\n")
    with suppress(OSError):  # a dead agent is found by its end of output
        while left:
            left = left[agent.stdin.write(left) or 0 :]


def main() -> int:
    """Runs this pod's node to its end; returns the exit code."""
    told = {name: os.environ.pop(f"MESHWRIGHT_{name}") for name in ("PLAN", "FILES", "KEY")}
    plan, index = json.loads(told["PLAN"]), int(os.environ["JOB_COMPLETION_INDEX"])
    node, run_dir = plan["nodes"][index], Path(plan["run_dir"])
    make_run_dir(run_dir, json.loads(told["FILES"]))
    secrets = {name: os.environ[name] for name, _ in plan["secrets"]}
    agent = spawn_agent()
    assert agent.stdout is not None, "it was started with a pipe"

    def stop(number: int, frame: FrameType | None) -> None:
        _say(agent, {"command": "stop"})

    signal.signal(signal.SIGTERM, stop)
    _say(agent, {"plan": plan, "node": index, "secrets": secrets, "key": told["KEY"], "lost_after_s": None})
    printer = _Printer(node["name"], node["ranks"], Mask(secrets.values()))
    sender = Sender(run_dir, printer)
    concealer = Concealer(run_dir, secrets.values(), logs=logs_of(node))  # of what stays on a volume
    conceal_while(concealer, threading.Event())
    if index:
        address = _first_pod(plan["meeting"], plan["limits"]["join_timeout_s"])
        if address is not None:
            _say(agent, {"command": "meet", "address": address, "port": plan["meeting"]["port"]})
    events = [{"told_unix_s": time.time(), **json.loads(line)} for line in agent.stdout]
    status = agent.wait()
    sender.finish()
    concealer.finish()
    end_agent(agent)
    code = code_of(events, status)
    printer.finish(code, [each for each in events if each["event"] in _KEPT])
    return code


if __name__ == "__main__":
    sys.exit(main())

"""Agents at the other end of pipes, of this machine or through ssh, and their events.

launcher --(plan; then meet, alive, leave, stop, kill)--> agent
         <--(joined, meeting, started, exit, data, result)--
"""

import json
import os
import secrets as tokens
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from meshwright.clusters.base import NodePlan, StartPlan
from meshwright.clusters.descriptors import need_room
from meshwright.clusters.spawn import end_agent
from meshwright.clusters.sweep import sweep

__all__ = ["Far", "PipeHandle", "agents_of", "event_of", "part_of"]

_MAX_LINE_BYTES = 1 << 26
_KILL_WAIT_S = 3.0
_LEASE = 1.05  # an agent that is cut off looks at its clock so often

Event = dict[str, Any]


def _nothing(event: Event) -> None:
    del event


@dataclass(frozen=True)
class Far:
    """What is different where agents run on other machines.

    Args:
        message: further words of the first message to every agent.
        lost_after_s: silence after which an agent ends its ranks; it hears from us four times as often. None is never.
        explain: what the end of an agent means that said nothing: its node and exit status -> fields of that event.
        keep: takes what an agent sends of a run directory that is not shared.
    """

    message: Mapping[str, Any]
    lost_after_s: float | None
    explain: Callable[[str, int], Mapping[str, Any]]
    keep: Callable[[Event], None]


_NEAR = Far({}, None, lambda name, code: {}, _nothing)


class PipeHandle:
    """A run whose agents are children of this process, or whose ssh clients are.

    Args:
        plan: what is started.
        agents: node -> process.
        secrets: values of the plan's secrets.
        far: None for agents of this machine.
    """

    def __init__(
        self,
        plan: StartPlan,
        agents: "Mapping[str, subprocess.Popen[bytes]]",
        secrets: Mapping[str, str],
        *,
        far: Far | None = None,
    ) -> None:
        self._plan, self._agents, self._far = plan, dict(agents), far or _NEAR
        self._rest, self._unsaid = dict.fromkeys(agents, b""), dict.fromkeys(agents, b"")
        self._selector = selectors.DefaultSelector()
        self._open = set(agents)
        self._alive_s = time.monotonic()
        self._late: list[Event] = []
        whole = asdict(plan)
        told = {"secrets": dict(secrets), "key": tokens.token_hex(32), **self._far.message}
        for node in plan.nodes:
            out, into = self._pipes(node.name)
            os.set_blocking(into.fileno(), False)  # who reads late, or never, holds nobody up
            self._selector.register(out, selectors.EVENT_READ, node.name)
            own = {"plan": part_of(whole, node.index), "node": node.index, "lost_after_s": self._far.lost_after_s}
            self._say(node.name, {**told, **own})

    def _pipes(self, name: str) -> "tuple[IO[bytes], IO[bytes]]":
        agent = self._agents[name]
        assert agent.stdout is not None, name
        assert agent.stdin is not None, name
        return agent.stdout, agent.stdin

    def _say(self, name: str, message: Mapping[str, Any]) -> None:
        self._unsaid[name] += json.dumps(message).encode() + b"\n"
        self._write(name)

    def _write(self, name: str) -> None:
        """Says as much as an agent takes now; the rest when it takes more, see `poll`."""
        _, pipe = self._pipes(name)
        left = memoryview(b"" if pipe.closed else self._unsaid[name])
        try:
            while left and (taken := pipe.write(left)):
                left = left[taken:]
        except OSError:  # a dead agent is found by its end of output
            left = left[:0]
        self._unsaid[name] = bytes(left)
        waits = not pipe.closed and pipe in self._selector.get_map()
        if left and not waits:
            self._selector.register(pipe, selectors.EVENT_WRITE, name)
        elif waits and not left:
            self._selector.unregister(pipe)

    @property
    def done(self) -> bool:
        """Whether no agent is left."""
        return not self._open and not self._late

    def poll(self, timeout_s: float) -> list[Event]:
        """Events since the last call; an agent that is gone gives a last one, {"event": "gone", "code": ...}.

        `ends_within_s` of it: where only the connection may be gone, how long agent and ranks may still be there.
        """
        self._stay_in_touch()
        events, self._late = self._late, []
        for key, ready in self._selector.select(0.0 if events else timeout_s) if self._open else ():
            if ready & selectors.EVENT_READ:
                events += self._read(key.data, key.fd)
            else:
                self._write(key.data)
        return events

    def _stay_in_touch(self) -> None:
        every_s = self._far.lost_after_s
        if every_s is not None and time.monotonic() - self._alive_s > every_s / 4:
            self._alive_s = time.monotonic()
            for name in self._agents:
                if not self._unsaid[name]:  # it hears of us as it is
                    self._say(name, {"command": "alive"})

    def _read(self, name: str, fd: int) -> list[Event]:
        data = os.read(fd, 1 << 16)
        if not data:
            return [self._gone(name)]
        *lines, self._rest[name] = (self._rest[name] + data).split(b"\n")
        if len(self._rest[name]) > _MAX_LINE_BYTES:
            self._agents[name].kill()
            self._rest[name] = b""
        found = [event for line in lines if (event := event_of(line)) is not None]
        for event in found:
            if event["event"] == "meeting":  # the first node listens: tell the others
                for other in self._agents:
                    self._say(other, {**event, "command": "meet"})
            elif event["event"] == "data":
                self._far.keep(event)
        return [{**event, "node": name} for event in found if event["event"] not in ("meeting", "data")]

    def _gone(self, name: str) -> Event:
        agent, (out, into) = self._agents[name], self._pipes(name)
        self._open.remove(name)
        for pipe in (out, into):
            if pipe in self._selector.get_map():
                self._selector.unregister(pipe)
        code = agent.wait()
        end_agent(agent)
        left_s = 0.0 if self._far.lost_after_s is None else self._far.lost_after_s * _LEASE
        return {"node": name, "event": "gone", "code": code, "ends_within_s": left_s, **self._far.explain(name, code)}

    def stop(self) -> None:
        """Asks all agents to end their ranks: TERM, then KILL after the plan's grace."""
        for name in self._agents:
            self._say(name, {"command": "stop"})

    def kill(self) -> None:
        """Kills everything of this run at once, and what it left behind."""
        for name in self._agents:
            self._say(name, {"command": "kill"})
        end_s, late = time.monotonic() + _KILL_WAIT_S, []
        while self._open and time.monotonic() < end_s:
            late += self.poll(0.1)
        for agent in self._agents.values():
            if agent.poll() is None:
                agent.send_signal(signal.SIGKILL)
                agent.wait()
        self._late += late + [self._gone(name) for name in sorted(self._open)]
        self._selector.close()
        sweep(self._plan.run_id)


def agents_of(
    nodes: Sequence[NodePlan], start: "Callable[[NodePlan], subprocess.Popen[bytes]]"
) -> "dict[str, subprocess.Popen[bytes]]":
    """Node -> its agent; where one of them cannot be started, none is left.

    Args:
        nodes: of a plan.
        start: starts the agent of one, with two pipes.

    Raises:
        UnavailableError: when this process may not have so many pipes.
    """
    need_room(2 * len(nodes), f"{len(nodes)} nodes")
    agents: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for node in nodes:
            agents[node.name] = start(node)
    except BaseException:
        for agent in agents.values():
            end_agent(agent)
        raise
    return agents


def part_of(plan: Mapping[str, Any], node: int) -> dict[str, Any]:
    """What one node needs of a plan: all of itself, and of others only that they are there; pure.

    Args:
        plan: as a dictionary.
        node: its index.

    >>> part_of({"run_id": "r", "nodes": [{"index": 0, "env": []}, {"index": 1, "env": []}]}, 1)
    {'run_id': 'r', 'nodes': [{'index': 0}, {'index': 1, 'env': []}]}
    """
    nodes = [each if each["index"] == node else {"index": each["index"]} for each in plan["nodes"]]
    return {**plan, "nodes": nodes}


def event_of(line: bytes) -> Event | None:
    """An event; None for what a login shell prints before an agent speaks, or a program of MPI by itself."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "event" in found else None
